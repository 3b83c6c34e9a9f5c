"""The scheduler's side of the connector: which requests are sent, which received, and into which blocks.

Prefill side: a request with ``do_remote_decode`` and ``remote_urls`` in its kv_transfer_params. Each step that
computes part of its prompt also sends that part. When it has finished, its kv_transfer_params name the cache for the
decode side.

Decode side: a request with ``do_remote_prefill`` and ``transfer_key``. It waits, without computing anything, until its
blocks are filled and verified; if that fails, vLLM's ``kv_load_failure_policy`` decides.
"""

from __future__ import annotations

import logging
import math
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from lynxproto.errors import ConfigError
from lynxproto.integrations.vllm.metadata import Load, LynxMetadata, Save
from lynxproto.integrations.vllm.settings import Settings, prompt_hash

__all__ = ["SchedulerSide", "wire_name"]

#: Chunks of a chunked prefill are cut at multiples of this many tokens: the hq codec's groups.
_GROUP: Final = 64
_KEY: Final = re.compile(r"[A-Za-z0-9_-]{16,64}")

_log = logging.getLogger("vllm.lynxproto")


@dataclass(slots=True)
class _Sending:
    """A prompt that is being prefilled and sent."""

    name: str
    key: str
    urls: tuple[str, ...]
    prompt_tokens: int
    blocks: list[int] = field(default_factory=list)
    sent: int = 0


def wire_name(key: str, request: Any) -> str:
    """What a request's cache is called on the wire: a key that only its two sides know, and what was prefilled.

    Two sides that do not mean the same prompt cannot meet.
    """
    lora = getattr(request, "lora_request", None)
    images = [feature.identifier for feature in getattr(request, "mm_features", None) or ()]
    return f"{key}/{prompt_hash(request.prompt_token_ids or (), [getattr(lora, 'lora_name', None), images])}"


class SchedulerSide:
    """State of one scheduler; no I/O. ``block_tokens``: tokens of a block of vLLM's block manager."""

    def __init__(self, settings: Settings, block_tokens: int, *, producer: bool, consumer: bool) -> None:
        self._settings = settings
        self._block_tokens = block_tokens
        self._cut = math.lcm(block_tokens, _GROUP)
        self._producer = producer
        self._consumer = consumer
        self._sending: dict[str, _Sending] = {}
        self._finished: dict[str, dict[str, Any]] = {}
        self._asked: dict[str, str] = {}  # request that loads or has loaded -> name
        self._loading: set[str] = set()
        self._step = LynxMetadata()

    # --- decode side

    def matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        """How many tokens beyond ``computed`` are to come from the prefill side, and whether between steps."""
        if not self._wants_load(request) or request.request_id in self._asked:
            return 0, False
        count = self._tokens_to_load(request) - computed
        return (count, True) if count > 0 else (0, False)

    def allocated(self, request: Any, blocks: Sequence[int], external: int) -> None:
        """``external`` tokens are to be loaded into ``blocks``, those of the prompt from its first token on."""
        if self._wants_send(request):
            self._begin(request)
        if not self._wants_load(request) or request.request_id in self._asked:
            return
        name = wire_name(request.kv_transfer_params["transfer_key"], request)
        self._asked[request.request_id] = name
        if not external:  # all of it is cached here
            self._step.dropped.append(name)
            return
        stop = self._tokens_to_load(request)
        used = -(-stop // self._block_tokens)
        self._loading.add(request.request_id)
        self._step.loads.append(Load(request.request_id, name, tuple(blocks[:used]), stop - external, stop))

    def received(self, requests: Iterable[str]) -> None:
        """The workers have received these requests' caches, or failed to."""
        self._loading.difference_update(requests)

    def _wants_load(self, request: Any) -> bool:
        params = request.kv_transfer_params
        if not self._consumer or not params or not params.get("do_remote_prefill"):
            return False
        try:
            return bool(_key(params)) and bool(request.prompt_token_ids)
        except ConfigError as error:
            _log.error("request %s is prefilled here: %s", request.request_id, error)
            return False

    def _tokens_to_load(self, request: Any) -> int:
        tokens: int = request.num_prompt_tokens
        if request.kv_transfer_params.get("whole_blocks", self._settings.whole_blocks):
            return max(0, tokens - 2) // self._block_tokens * self._block_tokens
        return tokens if tokens > 1 else 0  # vLLM computes the last token again, to sample the next

    # --- prefill side

    def _wants_send(self, request: Any) -> bool:
        params = request.kv_transfer_params
        return self._producer and bool(params) and bool(params.get("do_remote_decode"))

    def _begin(self, request: Any) -> None:
        """A request names whom to send to; one that does so wrongly is not sent, and must not stop the engine."""
        if request.request_id in self._sending:
            return
        params = request.kv_transfer_params
        try:
            urls = _urls(params, self._settings)
            key = _key(params) or uuid.uuid4().hex
            if not request.prompt_token_ids:
                raise ConfigError("a prompt without token ids (embeddings) has no name that the decode side knows")
        except ConfigError as error:
            _log.error("request %s is prefilled but not sent: %s", request.request_id, error)
            return
        self._sending[request.request_id] = _Sending(wire_name(key, request), key, urls, request.num_prompt_tokens)

    def build(self, output: Any) -> LynxMetadata:
        """This step's work; ``output`` is vLLM's SchedulerOutput."""
        for new in output.scheduled_new_reqs:
            if (sending := self._sending.get(new.req_id)) is not None:
                sending.blocks = list(new.block_ids[0])
                self._save(new.req_id, sending, new.num_computed_tokens, output)
        cached = output.scheduled_cached_reqs
        for i, request in enumerate(cached.req_ids):
            if (sending := self._sending.get(request)) is None:
                continue
            if (added := cached.new_block_ids[i]) is not None:
                sending.blocks = (
                    list(added[0]) if request in cached.resumed_req_ids else sending.blocks + list(added[0])
                )
            self._save(request, sending, cached.num_computed_tokens[i], output)
        step, self._step = self._step, LynxMetadata()
        step.idle = not output.total_num_scheduled_tokens
        return step

    def _save(self, request: str, sending: _Sending, computed: int, output: Any) -> None:
        done = min(computed + output.num_scheduled_tokens[request], sending.prompt_tokens)
        stop = done if done == sending.prompt_tokens else done // self._cut * self._cut
        if stop <= sending.sent:
            return
        blocks = tuple(sending.blocks[: -(-stop // self._block_tokens)])
        self._step.saves.append(
            Save(request, sending.name, sending.urls, blocks, sending.sent, stop, sending.prompt_tokens)
        )
        sending.sent = stop

    # --- both

    def finished(self, request: Any) -> tuple[bool, dict[str, Any] | None]:
        """A request is over. Its blocks may be freed at once: what is sent was copied.

        Returns the kv_transfer_params for the decode side where all of its prompt has been given to the workers.
        """
        name = self._asked.pop(request.request_id, None)
        if request.request_id in self._loading:
            self._loading.discard(request.request_id)
            self._step.aborted.append(request.request_id)
        elif name is None and self._wants_load(request):  # it was never scheduled
            self._step.dropped.append(wire_name(request.kv_transfer_params["transfer_key"], request))
        sending = self._sending.pop(request.request_id, None)
        if sending is None or sending.sent < sending.prompt_tokens:
            return False, None
        return False, {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "transfer_key": sending.key,
            "remote_num_tokens": sending.prompt_tokens,
        }


def _key(params: Mapping[str, Any]) -> str:
    """The request's ``transfer_key``, "" if it has none. Raises :class:`~lynxproto.errors.ConfigError`."""
    key = params.get("transfer_key")
    if key is None:
        return ""
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise ConfigError(f"kv_transfer_params: transfer_key must be 16 to 64 letters, digits, - or _, not {key!r}")
    return key


def _urls(params: Mapping[str, Any], settings: Settings) -> tuple[str, ...]:
    """The decode side's URLs that a request names.

    Raises :class:`~lynxproto.errors.ConfigError` where they are none, or not allowed.
    """
    urls = params.get("remote_urls")
    if not isinstance(urls, list | tuple) or not urls or not all(isinstance(url, str) for url in urls):
        raise ConfigError(f"kv_transfer_params: remote_urls must be a list, a URL for each decode worker, not {urls!r}")
    if settings.peers and (strangers := [url for url in urls if url not in settings.peers]):
        raise ConfigError(f"kv_transfer_params: {strangers[0]} is not one of the peers in kv_connector_extra_config")
    return tuple(urls)
