"""``model.generate`` on a cache that is still arriving: draft on its anchor, verify on its exact words."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np

from lynxproto import blocking
from lynxproto.config import MAX_LEVELS
from lynxproto.errors import ConfigError, LocalError, NotFoundError
from lynxproto.integrations.hf.cache import CacheReceiver, Expected, IncomingCache, arriving, stock_of, token_ids
from lynxproto.integrations.hf.sampling import Multinomial, split_warpers
from lynxproto.integrations.hf.words import HFEngine, WordCache
from lynxproto.manifest import Identity
from lynxproto.speculation import Event, Greedy, Logits, Report, Speculation, Verified

import torch  # isort: skip  # after cache, whose error names the extra
from transformers.generation import (  # isort: skip  # the same
    GenerateDecoderOnlyOutput,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

__all__ = ["decode_arriving", "generate"]

T = TypeVar("T")
_LAST_LEVEL: Final = MAX_LEVELS - 1
#: What ``generate`` hands to a decoding loop besides the prompt, and is not needed here: there is one sequence without
#: padding, at the positions that follow the cache's.
_KNOWN_INPUTS: Final = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}
#: Settings of a GenerationConfig that change what comes out in ways that are not built here: all must be off.
_UNSUPPORTED: Final = (
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "guidance_scale",
    "prefill_chunk_size",
    "cache_implementation",
    "prompt_lookup_num_tokens",
    "use_mtp",
    "token_healing",
)
_noise: weakref.WeakKeyDictionary[Any, tuple[float, ...]] = weakref.WeakKeyDictionary()


def generate(
    model: Any,
    input_ids: Any,
    source: CacheReceiver | IncomingCache | str,
    *,
    cached_tokens: int | None = None,
    max_draft: int = 64,
    noise: float | Sequence[float] | None = None,
    dtype: str | None = None,
    identity: Identity | None = None,
    session: Mapping[str, Any] | None = None,
    on_event: Callable[[Event], object] | None = None,
    on_report: Callable[[Report], object] | None = None,
    streamer: Any = None,
    **arguments: Any,
) -> Any:
    """What ``model.generate(input_ids, past_key_values=cache, **arguments)`` returns, for a cache that is arriving.

    ``source`` brings the cache of the first tokens of ``input_ids`` (``[1, tokens]``): a receiver, whose next cache it
    must be; one cache of its; or the URL of a peer that keeps caches, which is asked for that of the first
    ``cached_tokens`` (default: all), with the arguments of :func:`lynxproto.connect` in ``session``. Tokens that follow
    the cache are fed in one forward, as ``generate`` does. If there are none, the first new token is the one that
    prefill chose (``push(first_token=...)``); if it told none, the last prompt token is fed again.

    While residuals arrive, at most ``max_draft`` tokens are drafted. ``on_event`` gets drafts as
    :class:`~lynxproto.speculation.Provisional`, and :class:`~lynxproto.speculation.Verified` tokens; a ``streamer``
    gets verified tokens only. ``noise``: see :class:`~lynxproto.speculation.Speculation`; by default it is learned
    from the first request of each model, and ``math.inf`` rules out that a batch decides. ``on_report`` gets the
    :class:`~lynxproto.speculation.Report` at the end. ``dtype`` and ``identity``: as for :class:`LynxCache`.

    Greedy decoding and sampling (``temperature``, ``top_k``, ``top_p``; seeded by torch's generator, which is left
    where ``generate`` leaves it) are supported, with logits processors and stopping criteria (which must be functions
    of their arguments: they see drafts too), ``eos_token_id``, ``stop_strings``, ``return_dict_in_generate``. Blocks;
    not for a thread whose event loop runs (``await asyncio.to_thread(generate, ...)``).

    Raises :class:`~lynxproto.errors.ConfigError` for anything else (other filters, beams, batches, padding, scores...),
    before a cache is taken; :class:`~lynxproto.errors.IdentityError` for a cache of something else; and what
    :meth:`~lynxproto.session.IncomingTransfer.exact` raises when the cache does not arrive whole: nothing is returned
    then, and nothing but prefill's own first token has gone to ``streamer``.
    """
    ids = token_ids(input_ids)
    if (model_device := torch.device(model.device)).type != "cpu":
        raise ConfigError(
            f"generate decodes into memory of the CPU, the model is on {model_device}; use LynxCache.pull"
        )
    if "past_key_values" in arguments:
        raise ConfigError("the source brings the cache: leave past_key_values out, or call model.generate")
    cached = len(ids) if cached_tokens is None else cached_tokens
    if not 0 < cached <= len(ids):
        raise ConfigError(f"cached_tokens is {cached}, input_ids has {len(ids)} tokens")
    expected = Expected(model, ids if cached_tokens is None else ids[:cached], identity, dtype)

    if (stop_strings := arguments.pop("stop_strings", None)) is not None:  # their tokenizer does not reach the hook
        if (tokenizer := arguments.pop("tokenizer", None)) is None:
            raise ConfigError("stop_strings need the tokenizer: generate(..., tokenizer=...)")
        criteria = arguments.pop("stopping_criteria", None) or ()
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, StopStringCriteria(tokenizer, stop_strings)])

    def decode(
        model: Any,
        input_ids: Any,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **inputs: Any,
    ) -> Any:
        _check(generation_config, input_ids, inputs)
        before, warpers = split_warpers(logits_processor) if generation_config.do_sample else (logits_processor, [])
        room = max_draft + 1 + len(ids) - cached
        with _entered(arriving(source, expected, room, dict(session or {}))) as incoming:
            run = _speculation(
                incoming,
                input_ids,
                max_draft=max_draft,
                warpers=warpers if generation_config.do_sample else None,
                noise=_noise.get(model) if noise is None else noise,
                processors=_processors(LogitsProcessorList(before), input_ids),
                stop=partial(_stops, stopping_criteria, input_ids),
            )
            committed = _Committed(streamer, on_event)
            committed.first(run)
            for event in decode_arriving(run, incoming.words, incoming.blocking()):
                committed.take(event)
            if isinstance(run.sampler, Multinomial):
                run.sampler.leave(len(ids) + len(run.tokens))
            if noise is None and run.noise is not None:
                _noise[model] = run.noise
        if streamer is not None:
            streamer.end()
        if on_report is not None:
            on_report(run.report)
        tokens = torch.tensor([run.tokens], dtype=input_ids.dtype, device=input_ids.device)
        sequences = torch.cat([input_ids, tokens], dim=-1)
        if not generation_config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(sequences=sequences, past_key_values=stock_of(incoming.words, model))

    inputs = torch.tensor([ids], device=model.device) if not isinstance(input_ids, torch.Tensor) else input_ids
    return model.generate(inputs, streamer=streamer, custom_generate=decode, **arguments)


def decode_arriving(
    run: Speculation,
    cache: WordCache,
    transfer: blocking.IncomingTransfer,
    *,
    verified: bool = True,
    on_stage: Callable[[str], object] = lambda name: None,
) -> Iterator[Event]:
    """Draft on ``cache`` while ``transfer`` decodes into it, verify when it is exact, and decode to the end.

    The first forward waits for each layer as it needs it. ``on_stage`` is told ``anchor`` (level 0 of all layers is
    used), ``drafted``, ``exact`` and ``settled``. ``verified=False`` commits tokens without waiting for digests, from
    the first forward on, as systems do that have none: for comparison, with a run that drafts nothing and a cache of
    one level.

    Raises what the transfer raises when it does not become exact; no token is committed then.
    """
    tokens = transfer.manifest.prompt_tokens
    layers = [layer.index for layer in transfer.manifest.layers]
    missing = set(layers)
    improving: dict[int, Future[None]] = {}

    def arrive(layer: int) -> None:
        if layer in missing:
            transfer.ready(level=0, layer=layer)
            cache.refresh(layer, tokens)
            missing.remove(layer)
            if transfer.is_ready(_LAST_LEVEL, layer):
                improving.pop(layer, None)
            if not missing:
                on_stage("anchor")

    def refresh() -> bool:
        # Layers become exact between two steps: later drafts gain, and little is left to do at the end.
        for layer in [layer for layer, ready in improving.items() if ready.done()]:
            improving.pop(layer).result()
            cache.refresh(layer, tokens)
        return whole.done()

    def complete() -> None:
        if not whole.done():
            transfer.urgent()  # out of drafts: this request waits for its residual
        whole.result()
        on_stage("exact")
        for layer in improving:
            cache.refresh(layer, tokens)
        missing.clear()
        cache.grows = True  # nobody writes into its buffers from outside any more

    cache.grows = False
    cache.expect(tokens)
    cache.before_layer = arrive
    lossy = transfer.manifest.lossy
    whole = transfer.when_ready(_LAST_LEVEL) if lossy else transfer.when_exact()
    improving.update((layer, transfer.when_ready(_LAST_LEVEL, layer)) for layer in layers)
    try:
        yield from run.draft(until=refresh)
        on_stage("drafted")
        if run.finished:  # by prefill's own token: the rest need not come
            transfer.cancel(above_level=0)
            transfer.wait_released()
            return
        if verified:
            complete()
        yield from run.verify()
        on_stage("settled")
        yield from run.decode()
        if not verified:
            whole.result()
    finally:
        cache.before_layer = None
        for future in (whole, *improving.values()):
            future.cancel()


class _Committed:
    """Shows tokens to the user as they come."""

    def __init__(self, streamer: Any, on_event: Callable[[Event], object] | None) -> None:
        self._streamer = streamer
        self._on_event = on_event

    def first(self, run: Speculation) -> None:
        """Prefill's own token, which is final."""
        if run.tokens:
            self.take(Verified(len(run.tokens), run.tokens))

    def take(self, event: Event) -> None:
        """Show one event."""
        if self._on_event is not None:
            self._on_event(event)
        if self._streamer is not None and isinstance(event, Verified):
            for token in event.tokens:
                self._streamer.put(torch.tensor([token]))


def _speculation(
    incoming: IncomingCache,
    input_ids: Any,
    *,
    max_draft: int,
    warpers: Sequence[Any] | None,
    **options: Any,
) -> Speculation:
    """The request over an arriving cache; waits for prefill's first token if that is the next."""
    ids = token_ids(input_ids)
    held = incoming.manifest.prompt_tokens
    first_token = None
    if held == len(ids):
        with contextlib.suppress(NotFoundError):  # there is none: the last prompt token is fed again
            first_token = incoming.blocking().result().first_token
    engine = HFEngine(incoming.model, incoming.words, base=held, lead=ids[held : len(ids) - 1])
    sampler = Greedy() if warpers is None else Multinomial(warpers, len(ids) + (first_token is not None))
    room = incoming.words.capacity - len(ids) - 1  # buffers cannot move while the transfer writes into them
    return Speculation(
        engine,
        ids,
        first_token,
        sampler=sampler,
        max_draft=max(0, min(max_draft, room)),
        rounding=torch.finfo(incoming.model.dtype).eps,
        **options,
    )


def _check(settings: Any, input_ids: Any, inputs: Mapping[str, Any]) -> None:
    """Refuse what is not decoding of one sequence without padding, greedily or by sampling."""
    if input_ids.shape[0] != 1 or settings.num_beams != 1 or settings.num_return_sequences != 1:
        raise ConfigError(
            f"generate decodes one sequence: got a batch of {input_ids.shape[0]} with {settings.num_beams} beams "
            f"(num_return_sequences is {settings.num_return_sequences}); pull the cache and use model.generate"
        )
    if settings.use_cache is False:
        raise ConfigError("use_cache=False makes no sense with a cache that arrives")
    mode = str(getattr(settings.get_generation_mode(), "value", ""))
    if mode not in ("greedy_search", "sample"):
        raise ConfigError(f"generation mode {mode} is not supported; pull the cache and use model.generate")
    if on := [name for name in _UNSUPPORTED if getattr(settings, name, None)]:
        raise ConfigError(f"generate does not support {', '.join(on)}; pull the cache and use model.generate")
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and not bool((mask == 1).all()):
        raise ConfigError("generate takes a prompt without padding: attention_mask must be all ones")
    if positions is not None and positions.flatten().tolist() != list(range(positions.numel())):
        raise ConfigError("generate computes position_ids itself: the prompt's, from 0 on")
    unknown = [name for name, value in inputs.items() if name not in _KNOWN_INPUTS and value is not None]
    if unknown:
        raise ConfigError(f"generate does not support the model inputs {', '.join(unknown)}")


def _processors(processors: LogitsProcessorList, input_ids: Any) -> list[Callable[[Sequence[int], Logits], Logits]]:
    """transformers' processors as one that takes and returns arrays."""
    if not processors:
        return []
    prompt = input_ids.shape[1]

    def process(sequence: Sequence[int], logits: Logits) -> Logits:
        scores = processors(_extended(input_ids, sequence[prompt:]), torch.tensor(np.asarray(logits))[None])
        row: Logits = scores[0].numpy()
        return row

    return [process]


def _stops(criteria: Any, input_ids: Any, generated: Sequence[int]) -> bool:
    """Whether transformers' stopping criteria end the sequence here."""
    return bool(criteria(_extended(input_ids, generated), None).all())


def _extended(input_ids: Any, generated: Sequence[int]) -> Any:
    new = torch.tensor([list(generated)], dtype=input_ids.dtype, device=input_ids.device)
    return torch.cat([input_ids, new], dim=-1)


@contextlib.contextmanager
def _entered(context: AbstractAsyncContextManager[T]) -> Iterator[T]:
    """An asynchronous context for a program that blocks."""
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop()
        raise LocalError("this thread runs an event loop: await asyncio.to_thread(generate, ...)")
    with asyncio.Runner() as runner, contextlib.ExitStack() as stack:

        def leave(*error: Any) -> bool | None:
            return runner.run(context.__aexit__(*error))

        value = runner.run(context.__aenter__())
        stack.push(leave)
        yield value
