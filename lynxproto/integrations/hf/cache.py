""":class:`LynxCache`: KV caches to another process, to a file, and back. ``docs/embedding/transformers.md``."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from lynxproto import blocking
from lynxproto._stats import Progress, Result, TransferStats
from lynxproto.cachefile import Cache, load_cache, save_cache
from lynxproto.chunk import Part
from lynxproto.config import Config
from lynxproto.errors import DeadlineError, IdentityError, LocalError, NotFoundError, SpecError
from lynxproto.integrations.attention import AttentionMass, watch_attention
from lynxproto.integrations.hf.dynamic import cache_of, dynamic_of, put_layer
from lynxproto.integrations.hf.model import (  # says what to install if torch or transformers is missing
    NAMES,
    layer_shapes,
    make_identity,
    make_manifest,
    prompt_id,
    weights_revision,
)
from lynxproto.integrations.hf.words import HFEngine, WordCache
from lynxproto.linkpolicy import AutoPolicy
from lynxproto.manifest import FetchKey, Identity, LayerSpec, Manifest
from lynxproto.policy import Policy
from lynxproto.session import IncomingTransfer, Sender, connect, listen

import torch  # isort: skip  # after model, whose error names the extra
from transformers.cache_utils import DynamicCache  # isort: skip  # the same

__all__ = [
    "CacheReceiver",
    "Expected",
    "IncomingCache",
    "LynxCache",
    "arriving",
    "identity_of",
    "stock_of",
    "token_ids",
]

P = ParamSpec("P")
T = TypeVar("T")
#: Tokens that a cache which is decoded on while it arrives has room for, after the prompt.
_ROOM_TOKENS = 1024


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    coroutine.close()
    raise LocalError("this thread runs an event loop: await the method whose name begins with 'a'")


def _blocking(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, T]:
    """The same without asyncio."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        return _run(function(*args, **kwargs))

    return run


class LynxCache:
    """Push, pull, save and load the KV cache of one sequence.

    ``cache`` is a ``DynamicCache`` (or a :class:`WordCache`), ``model`` the transformers model that made it or will
    decode on it, ``tokens`` the ids of the prompt whose K and V it holds: a list, or a tensor ``[1, tokens]``. A cache
    says whose it is (model, a hash of a sample of its weights, position encoding) and of which prompt; the other side
    compares that, dtype, layers, heads and tokens with its own model and prompt before it takes a byte, and raises
    :class:`~lynxproto.errors.IdentityError`. Without ``tokens`` the prompt is neither told nor compared.

    ``dtype`` of a cache that is taken: the model's, unless another is named; its values are converted to the model's.
    ``identity`` says whose cache it is in the caller's own words, the same on both sides, instead of what
    :func:`identity_of` finds.

    Methods whose names begin with ``a`` are for asyncio; the others block, and raise
    :class:`~lynxproto.errors.LocalError` on a thread whose event loop runs. ``timeout`` is in seconds and raises
    :class:`~lynxproto.errors.DeadlineError`.
    """

    @staticmethod
    def save(
        cache: Any,
        path: str | Path,
        model: Any,
        tokens: Any = None,
        *,
        first_token: int | None = None,
        identity: Identity | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> Path:
        """Write ``cache`` to a file that :meth:`load` and ``lynxproto send`` read; ``on_progress(done, total)``: bytes.

        Raises :class:`~lynxproto.errors.CacheFileError` if ``path`` exists or cannot be written, and
        :class:`~lynxproto.errors.SpecError` for a cache that cannot be transferred.
        """
        return save_cache(path, _described(cache, model, tokens, identity, first_token), on_progress=on_progress)

    @staticmethod
    def load(
        path: str | Path,
        model: Any,
        tokens: Any = None,
        *,
        dtype: str | None = None,
        identity: Identity | None = None,
        on_progress: Callable[[int, int], object] | None = None,
    ) -> DynamicCache:
        """The ``DynamicCache`` of a file; its attribute ``first_token`` is what prefill chose next, or None.

        Raises :class:`~lynxproto.errors.CacheFileError` for a file that is no cache, and
        :class:`~lynxproto.errors.IdentityError` for a cache of another model or prompt.
        """
        held = load_cache(path)
        Expected(model, tokens, identity, dtype).check(held.manifest)
        dynamic = dynamic_of(held, model.config, on_progress=on_progress)
        return _told(_moved(dynamic, model), held.first_token)

    @staticmethod
    async def apush(
        cache: Any,
        to: str | Sender | blocking.Sender,
        model: Any,
        tokens: Any = None,
        *,
        first_token: int | None = None,
        identity: Identity | None = None,
        policy: Policy | AutoPolicy | None = None,
        config: Config | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> TransferStats:
        """Send ``cache`` to a peer that listens (:meth:`listen`, ``lynxproto recv``, ``serve``); return when it has it.

        ``to``: a URL, which ``config`` and ``options`` of :func:`lynxproto.connect` go with, or an open session.
        The cache's tensors are read until this returns or raises: leave them alone. ``first_token``: what prefill chose
        after the prompt. ``policy``: default the session's, or :meth:`Policy.progressive` for the cache's dtype.

        Raises :class:`~lynxproto.errors.RejectedError` if the peer does not want it (its text says why), and what
        :func:`lynxproto.connect` and :meth:`OutgoingTransfer.finish` raise.
        """
        held = _described(cache, model, tokens, identity, first_token)
        async with _limited(timeout), _sender(to, policy, config, options) as sender:
            transfer = sender.open(held.manifest, None if isinstance(to, str) else policy)
            try:
                await transfer.send(held)
            except BaseException:
                await transfer.cancel()
                raise
            return transfer.stats

    push = staticmethod(_blocking(apush))

    @staticmethod
    async def aprefill(
        model: Any,
        tokens: Any,
        to: str | Sender | blocking.Sender,
        *,
        dtype: str | None = None,
        identity: Identity | None = None,
        policy: Policy | AutoPolicy | None = None,
        config: Config | None = None,
        on_layer: Callable[[int], object] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> tuple[WordCache, Result, TransferStats]:
        """Run the model on the prompt and send each layer as soon as it exists; greedy first token included.

        Returns the cache, the first token with its lead over the second, and the transfer's statistics. ``dtype`` of
        the cache: the model's by default; a coarser one rounds K and V where they enter. ``on_layer(layer)`` is called
        when a layer is computed. A policy that ranks tokens by attention gets it. The rest is as in :meth:`apush`.
        """
        ids, name = token_ids(tokens), dtype or _dtype_of(model)
        manifest = make_manifest(
            model,
            len(ids),
            identity or identity_of(model),
            dtype=name,
            windows=True,
            request_id=prompt_id(ids),
        )
        loop = asyncio.get_running_loop()
        writes: list[Future[None]] = []

        def write(layer: int, importance: Any) -> None:
            first = manifest.layer(layer).token_start
            pair = (cache.words(layer, part)[:, first:] for part in ("key", "value"))
            mass = None if importance is None else importance[:, first:]
            writes.append(asyncio.run_coroutine_threadsafe(transfer.write(layer, *pair, importance=mass), loop))

        def computed(layer: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
            if not ranked:
                write(layer, None)
            if on_layer is not None:
                on_layer(layer)

        # A plan by attention waits for the layer's attention, a moment after its keys and values exist.
        ranked = isinstance(policy, Policy) and policy.tiers is not None and policy.importance == "attention"
        cache = WordCache(model.config, len(ids), name, on_layer=computed, windows=True)
        async with _limited(timeout), _sender(to, policy, config, options) as sender:
            transfer = sender.open(manifest, None if isinstance(to, str) else policy)
            try:
                with watch_attention(model, AttentionMass(on_layer=write)) if ranked else contextlib.nullcontext():
                    logits = await asyncio.to_thread(HFEngine(model, cache).prefill, ids)
                second, best = np.partition(logits, -2)[-2:]
                result = Result(int(np.argmax(logits)), float(best - second))
                transfer.result(result.first_token, result.logit_gap)
                await asyncio.gather(*map(asyncio.wrap_future, writes))
                await transfer.finish()
            except BaseException:
                await transfer.cancel()
                raise
            cache.on_layer = None
            cache.grows = True
            return cache, result, transfer.stats

    prefill = staticmethod(_blocking(aprefill))

    @staticmethod
    def listen(
        url: str,
        model: Any,
        *,
        room: int = _ROOM_TOKENS,
        dtype: str | None = None,
        identity: Identity | None = None,
        lossy: bool = False,
        config: Config | None = None,
        **options: Any,
    ) -> CacheReceiver:
        """Listen for caches of ``model``: ``with LynxCache.listen(url, model) as receiver`` (or ``async with``).

        ``room``: tokens that each cache gets memory for beyond its prompt, to decode on it while it arrives
        (:func:`~lynxproto.integrations.hf.generate`). ``dtype`` of the caches: the model's by default; one that differs
        must be named. ``lossy``: also take caches that never become exact. ``config`` and ``options``: of
        :func:`lynxproto.listen`.
        """
        return CacheReceiver(url, Expected(model, None, identity, dtype, lossy=lossy), room, config, options)

    @staticmethod
    async def apull(
        source: str | CacheReceiver | IncomingCache,
        model: Any,
        tokens: Any = None,
        *,
        dtype: str | None = None,
        identity: Identity | None = None,
        on_progress: Callable[[Progress], object] | None = None,
        timeout: float | None = None,
        **options: Any,
    ) -> DynamicCache:
        """The exact ``DynamicCache`` of a prompt; its attribute ``first_token`` is what prefill chose next, or None.

        ``source``: a receiver, whose next cache must be this prompt's; one cache of its; or the URL of a peer that
        keeps caches (``lynxproto serve``), which is asked for the cache of ``tokens``, with ``options`` of
        :func:`lynxproto.connect`. ``on_progress``: called on the I/O thread as chunks arrive.

        Raises :class:`~lynxproto.errors.IdentityError` for a cache that is not this model's and prompt's,
        :class:`~lynxproto.errors.NotFoundError` if the peer has none, and what
        :meth:`~lynxproto.session.IncomingTransfer.exact` raises. A cache that did not arrive whole is never returned.
        """
        expected = Expected(model, tokens, identity, dtype)
        async with _limited(timeout), arriving(source, expected, 0, options) as incoming:
            if on_progress is not None:
                incoming.transfer.on_progress = on_progress
            return await incoming.aexact()

    pull = staticmethod(_blocking(apull))


class _Landing(dict[tuple[int, Part], Any]):
    """The arrays of a cache that is on its way, and the cache."""

    def __init__(self, words: WordCache, arrays: dict[tuple[int, Part], NDArray[Any]]) -> None:
        super().__init__(arrays)
        self.words = words


class IncomingCache:
    """A cache of ``model`` on its way in: ``transfer`` decodes into ``words``."""

    def __init__(self, model: Any, transfer: IncomingTransfer) -> None:
        landing = transfer.arrays
        assert isinstance(landing, _Landing)
        self.model = model
        self.transfer = transfer
        self.words = landing.words

    @property
    def manifest(self) -> Manifest:
        """What it carries."""
        return self.transfer.manifest

    def blocking(self) -> blocking.IncomingTransfer:
        """The transfer for programs without asyncio."""
        return blocking.IncomingTransfer(self.transfer._io, self.transfer._side)

    def check(self, tokens: Any) -> None:
        """Raise :class:`~lynxproto.errors.IdentityError` unless this is the cache of the first of ``tokens``."""
        _check_prompt(self.manifest, token_ids(tokens))

    async def aexact(self) -> DynamicCache:
        """Wait until all words are there and verified; see :meth:`LynxCache.apull`."""
        await self.transfer.exact()
        self.words.expect(self.manifest.prompt_tokens)
        dynamic = stock_of(self.words, self.model)
        try:
            first_token = (await self.transfer.result()).first_token
        except NotFoundError:
            first_token = None
        return _told(dynamic, first_token)


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)


class CacheReceiver:
    """Caches of one model, as peers push them; made by :meth:`LynxCache.listen`. For several threads."""

    def __init__(self, url: str, expected: Expected, room: int, config: Config | None, options: dict[str, Any]) -> None:
        self._expected = expected
        self._room = room
        self._refused: list[Exception] = []
        self._waiting: set[asyncio.Future[None]] = set()
        self._lock = threading.Lock()
        self._receiver = listen(url, config, allocate=self._allocate, **options)

    @property
    def url(self) -> str:
        """Where it listens, with the real port."""
        return self._receiver.url

    async def atake(self, timeout: float | None = None) -> IncomingCache:
        """The next cache, once its transfer has begun.

        Raises :class:`~lynxproto.errors.IdentityError` for one that is not of this model, or whose dtype, layers or
        tokens are not what the model computes with; its sender is told the same. The next call waits for the next.
        """
        async with _limited(timeout):
            while True:
                refused: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                with self._lock:
                    if self._refused:
                        raise self._refused.pop(0)
                    self._waiting.add(refused)
                offered = asyncio.ensure_future(anext(self._receiver))
                waiting: list[asyncio.Future[Any]] = [offered, refused]
                try:
                    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    if offered.done():
                        return IncomingCache(self._expected.model, offered.result())
                except StopAsyncIteration:
                    raise LocalError("the receiver was closed while a cache was waited for") from None
                finally:
                    with self._lock:
                        self._waiting.discard(refused)
                    offered.cancel()

    def take(self, timeout: float | None = None) -> IncomingCache:
        """:meth:`atake`, blocking."""
        return _run(self.atake(timeout))

    def _allocate(self, manifest: Manifest) -> _Landing:
        try:
            return self._expected.land(manifest, self._room)
        except Exception as error:  # also what is no refusal: who waits here must not wait in vain
            with self._lock:
                self._refused.append(error)
                for waiting in self._waiting:  # they leave with the lock held, so their loops still run
                    waiting.get_loop().call_soon_threadsafe(_wake, waiting)
            raise

    async def __aenter__(self) -> Self:
        await self._receiver.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._receiver.__aexit__(kind, error, trace)

    def __enter__(self) -> Self:
        return _run(self.__aenter__())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _run(self.__aexit__(kind, error, trace))


class Expected:
    """What this side computes with: a model, perhaps a prompt. Caches of anything else are refused."""

    def __init__(
        self,
        model: Any,
        tokens: Any = None,
        identity: Identity | None = None,
        dtype: str | None = None,
        *,
        lossy: bool = False,
    ) -> None:
        self.model = model
        self.ids = None if tokens is None else token_ids(tokens)
        self.dtype = dtype or _dtype_of(model)
        self.lossy = lossy
        self.shapes = layer_shapes(model)
        found = identity or identity_of(model)
        # Which library and kernels computed the words does not matter to who computes on them.
        self.identity = replace(found, producer="", attention_backend="")

    def check(self, manifest: Manifest) -> None:
        """Raise :class:`~lynxproto.errors.IdentityError` if the cache is not what this side expects."""
        if difference := self.identity.mismatch(manifest.identity):
            raise IdentityError(f"the cache's {difference}")
        if manifest.dtype != self.dtype:
            raise IdentityError(f"the cache holds {manifest.dtype}, the model computes with {self.dtype}")
        if manifest.lossy and not self.lossy:
            raise IdentityError("the cache is lossy and never becomes exact")
        if manifest.packing or manifest.shard_count != 1:
            raise IdentityError(
                f"the cache is shard {manifest.shard_index} of {manifest.shard_count} with packing "
                f"{manifest.packing!r}; whole caches of plain rows are taken"
            )
        tokens = manifest.prompt_tokens
        ours = {shape.index: shape for shape in self.shapes}
        if differing := sorted({spec.index for spec in manifest.layers} ^ set(ours)):
            raise IdentityError(f"the cache and the model differ in which layers keep K and V: {differing[:8]}")
        for spec in manifest.layers:
            shape = ours[spec.index]
            wanted = LayerSpec(
                index=spec.index,
                kv_heads=shape.kv_heads,
                key_dim=shape.key_dim,
                value_dim=shape.value_dim,
                token_start=min(spec.token_start, shape.first_kept(tokens)),  # more than is needed does no harm
                token_stop=tokens,
                kind=shape.kind,
            )
            if spec != wanted:
                raise IdentityError(f"layer {spec.index} of the cache is {spec}, the model's would be {wanted}")
        if self.ids is not None:
            _check_prompt(manifest, self.ids)

    def land(self, manifest: Manifest, room: int) -> _Landing:
        """Memory for a cache, with ``room`` tokens after it."""
        self.check(manifest)
        words = WordCache(self.model.config, manifest.prompt_tokens + room, manifest.dtype, windows=True)
        return _Landing(words, words.allocate(manifest, self.model, "cpu"))


@contextlib.asynccontextmanager
async def arriving(
    source: str | CacheReceiver | IncomingCache,
    expected: Expected,
    room: int,
    options: dict[str, Any],
) -> AsyncIterator[IncomingCache]:
    """The cache of the expected prompt out of any source; given up at the end if it is not whole by then."""
    if isinstance(source, str):
        if expected.ids is None:
            raise SpecError("a peer is asked for the cache of a prompt: give its tokens")
        plain = Identity(model=expected.identity.model, revision=expected.identity.revision)
        key = FetchKey.of_request(prompt_id(expected.ids), plain)
        async with connect(source, allocate=lambda manifest: expected.land(manifest, room), **options) as peer:
            yield IncomingCache(expected.model, await peer.fetch(key))
        return
    if options:
        raise SpecError("session options go with a URL; a receiver has its own")
    incoming = await source.atake() if isinstance(source, CacheReceiver) else source
    try:
        if incoming.model is not expected.model:
            raise SpecError("the receiver was opened for another model object")
        if expected.ids is not None:
            incoming.check(expected.ids)
        yield incoming
    finally:
        if not incoming.transfer.released.is_set():  # else nothing writes into it any more
            await incoming.transfer.cancel()


def identity_of(model: Any) -> Identity:
    """Whose caches a model makes, alike on all machines: its name (a folder's last part), and a hash of its weights."""
    name = model.config._name_or_path
    return make_identity(model, name=Path(name).name if Path(name).is_dir() else "", revision=weights_revision(model))


def token_ids(tokens: Any) -> list[int]:
    """A prompt as a list. Raises :class:`~lynxproto.errors.SpecError` for a batch, or what are no token ids."""
    array = np.asarray(tokens.cpu() if isinstance(tokens, torch.Tensor) else tokens)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        raise SpecError(f"expected the token ids of one prompt, not an array of {array.dtype} {array.shape}")
    return [int(token) for token in array]


def _described(held: Any, model: Any, tokens: Any, identity: Identity | None, first_token: int | None) -> Cache:
    cache = cache_of(
        held,
        identity or identity_of(model),
        request_id="" if tokens is None else prompt_id(token_ids(tokens)),
        first_token=first_token,
    )
    if tokens is not None and len(token_ids(tokens)) != cache.manifest.prompt_tokens:
        raise SpecError(
            f"the cache holds {cache.manifest.prompt_tokens} tokens, and {len(token_ids(tokens))} were given: "
            "name those whose K and V it holds"
        )
    return cache


def _check_prompt(manifest: Manifest, ids: Sequence[int]) -> None:
    tokens = manifest.prompt_tokens
    if not manifest.request_id.startswith("prompt-"):
        raise IdentityError(f"the cache {manifest.request_id!r} does not say of which prompt it is")
    if tokens > len(ids) or manifest.request_id != prompt_id(ids[:tokens]):
        raise IdentityError(f"the cache is of another prompt of {tokens} tokens than the first of these {len(ids)}")


def _dtype_of(model: Any) -> str:
    if model.dtype not in NAMES:
        raise SpecError(
            f"the model computes in {model.dtype}; caches of {', '.join(NAMES.values())} can be transferred"
        )
    return NAMES[model.dtype]


def stock_of(words: WordCache, model: Any) -> DynamicCache:
    """The stock cache that holds what a word cache holds: views where device and dtype are the model's."""
    dynamic = DynamicCache(config=model.config)
    for index, keys, values, seen, _ in words.held_words():
        put_layer(dynamic.layers[index], (keys, values), seen)
    return _moved(dynamic, model)


def _moved(dynamic: DynamicCache, model: Any) -> DynamicCache:
    """To where, and in what type, the model computes."""
    for shape in layer_shapes(model):
        layer = dynamic.layers[shape.index]
        put = [states.to(model.device, model.dtype) for states in (layer.keys, layer.values)]
        if put[0] is not layer.keys:
            layer.lazy_initialization(*put)
            layer.keys, layer.values = put
    return dynamic


def _told(dynamic: DynamicCache, first_token: int | None) -> DynamicCache:
    dynamic.first_token = first_token
    return dynamic


@contextlib.asynccontextmanager
async def _limited(seconds: float | None) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():  # an error of the transfer's own
            raise
        raise DeadlineError(f"not done within {seconds:g} s") from None


@contextlib.asynccontextmanager
async def _sender(
    to: str | Sender | blocking.Sender,
    policy: Policy | AutoPolicy | None,
    config: Config | None,
    options: dict[str, Any],
) -> AsyncIterator[Sender]:
    if isinstance(to, str):
        async with connect(to, config, policy=policy, **options) as sender:
            yield sender
        return
    if config is not None or options:
        raise SpecError("config and session options go with a URL; an open session has its own")
    yield Sender(to._endpoint) if isinstance(to, blocking.Sender) else to
