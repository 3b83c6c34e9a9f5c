"""The workers' side of the connector: copies rows out of pages as layers are computed, and into pages as they arrive.

Three kinds of threads: the engine's, which copies what it has just computed and posts claims; one for each transfer
under way; and the courier, which puts verified layers of claims into blocks and looks at the clock.
"""

from __future__ import annotations

import logging
import queue
import re
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from lynxproto import blocking
from lynxproto.errors import ConfigError, LynxError, SpecError
from lynxproto.integrations.vllm.inbox import Cache, Inbox, Piece
from lynxproto.integrations.vllm.metadata import Load, LynxMetadata, Save
from lynxproto.integrations.vllm.outbox import Outbox, Push, Sent, use_all_cpus
from lynxproto.integrations.vllm.pages import LayerPages, Packing
from lynxproto.integrations.vllm.settings import Settings, head_range
from lynxproto.integrations.vllm.stats import LynxStats
from lynxproto.manifest import Identity, LayerSpec, Manifest

__all__ = ["WorkerSide", "layer_index"]

_THREADS: Final = 64
#: An idle engine with loads under way looks this often whether requests have come, in seconds.
_PATIENCE: Final = 5e-3
_log = logging.getLogger("vllm.lynxproto")


@dataclass(frozen=True, slots=True)
class _Claim:
    """Mail: a request waits."""

    load: Load
    made: float


@dataclass(frozen=True, slots=True)
class _Abort:
    """Mail: a request waits no more."""

    request: str


@dataclass(frozen=True, slots=True)
class _Drop:
    """Mail: forget a cache."""

    name: str


@dataclass(frozen=True, slots=True)
class _Refused:
    """Mail: a transfer was refused, or given up before it began."""

    name: str
    error: LynxError


@dataclass(frozen=True, slots=True)
class _Tick:
    """Mail: look at the clock."""


_Mail = _Claim | _Abort | _Drop | _Refused | _Tick | None


def layer_index(name: str) -> int:
    """The number in a layer's name: 7 of ``model.layers.7.self_attn.attn``.

    Raises :class:`~lynxproto.errors.SpecError` where there is none, or more than one.
    """
    numbers = [part for part in name.split(".") if re.fullmatch(r"\d+", part)]
    if len(numbers) != 1:
        raise SpecError(f"the layer {name!r} has no index that the other side would know")
    return int(numbers[0])


class WorkerSide:
    """One worker (tensor-parallel rank ``rank`` of ``ranks``) of a model with ``kv_heads`` KV heads in all.

    ``caches``: by layer name, ``[blocks, heads, page_tokens, content]``; ``block_tokens``: tokens of a block as the
    scheduler counts, a multiple of ``page_tokens``. ``listen``: the URL to listen on, "" for a side that only sends.
    """

    def __init__(
        self,
        settings: Settings,
        identity: Identity,
        caches: Mapping[str, Any],
        packing: Packing,
        *,
        block_tokens: int,
        kv_heads: int,
        rank: int,
        ranks: int,
        max_tokens: int,
        listen: str,
    ) -> None:
        self._settings = settings
        self._identity = identity
        self._kv_heads = kv_heads
        self._heads, self._first_copy = head_range(kv_heads, ranks, rank)
        self._pages = {layer_index(name): LayerPages(cache, packing) for name, cache in caches.items()}
        self._names = {name: layer_index(name) for name in caches}
        if len(self._pages) != len(caches):
            raise SpecError("two layers of the KV cache have the same index")
        first = next(iter(self._pages.values()))
        if first.kv_heads != len(self._heads):
            raise ConfigError(
                f"the KV cache has {first.kv_heads} heads; rank {rank} of {ranks} should have {self._heads}"
            )
        if block_tokens % packing.block_tokens:
            raise ConfigError(f"blocks of {block_tokens} tokens are not whole pages of {packing.block_tokens}")
        self._pages_per_block = block_tokens // packing.block_tokens
        self._dims = (packing.key.shape[1], packing.value.shape[1])
        self._dtype = first.dtype
        self._pushes: dict[Save, list[tuple[slice, Push]]] = {}
        self._saved: set[int] = set()
        self._lock = threading.Lock()
        self._stats = LynxStats()
        self._outbox = Outbox(settings, self._sent)
        self._inbox: Inbox | None = None
        self._news = threading.Event()
        self._loading = 0  # claims without an outcome
        self._receiver: blocking.Receiver | None = None
        if listen:
            self._listen(listen, max_tokens)

    @property
    def url(self) -> str:
        """Where it listens, "" if it does not."""
        return "" if self._receiver is None else self._receiver.url

    # --- prefill side, on the engine's thread

    def save_layer(self, name: str, metadata: LynxMetadata) -> None:
        """A layer of this step's prompts is computed: hand it to its transfers."""
        if not metadata.saves or (layer := self._names.get(name)) is None:
            return
        for save in metadata.saves:
            pushes = self._pushes.get(save)
            if pushes is None:
                pushes = self._pushes[save] = self._open(save)
            if pushes:
                keys, values = self._pages[layer].read(self._to_pages(save.blocks), save.start, save.stop)
                for heads, push in pushes:
                    push.write(layer, keys[heads], values[heads])
        self._saved.add(layer)

    def end_step(self) -> None:
        """The forward is over: transfers that got all layers are complete, others void."""
        complete = self._saved == set(self._pages)
        for pushes in self._pushes.values():
            for _, push in pushes:
                push.close(complete)
        self._pushes.clear()
        self._saved.clear()

    def _open(self, save: Save) -> list[tuple[slice, Push]]:
        """A transfer to each decode worker that has some of this worker's heads."""
        found: list[tuple[slice, Push]] = []
        if not self._first_copy:
            return found
        for rank, url in enumerate(save.urls):
            try:
                theirs, _ = head_range(self._kv_heads, len(save.urls), rank)
                shared = range(max(self._heads.start, theirs.start), min(self._heads.stop, theirs.stop))
                if shared:
                    heads = slice(shared.start - self._heads.start, shared.stop - self._heads.start)
                    found.append((heads, self._outbox.open(self._manifest(save, shared), url)))
            except LynxError as error:
                self._sent(Sent(save.name, url, error, 0.0, 0, 0))
        return found

    def _manifest(self, save: Save, heads: range) -> Manifest:
        key_dim, value_dim = self._dims
        layers = tuple(
            LayerSpec(
                index=index,
                kv_heads=len(heads),
                head_start=heads.start,
                key_dim=key_dim,
                value_dim=value_dim,
                token_start=save.start,
                token_stop=save.stop,
            )
            for index in sorted(self._pages)
        )
        return Manifest(
            identity=self._identity,
            dtype=self._dtype,
            layers=layers,
            prompt_tokens=save.prompt_tokens,
            request_id=save.name,
        )

    def _sent(self, sent: Sent) -> None:
        with self._lock:
            if sent.error is None:
                self._stats.sent(sent.seconds, sent.wire_bytes, sent.cache_bytes)
            else:
                self._stats.failed("failed_sends")
        if sent.error is not None:
            _log.warning("%s was not sent to %s: %s", sent.name, sent.url, sent.error)

    # --- decode side, on the engine's thread

    def begin_loads(self, metadata: LynxMetadata) -> None:
        """Take this step's claims."""
        if self._inbox is not None:
            now = time.monotonic()
            self._loading += len(metadata.loads)
            mail: tuple[_Mail, ...] = (
                *(_Claim(load, now) for load in metadata.loads),
                *map(_Abort, metadata.aborted),
                *map(_Drop, metadata.dropped),
            )
            for message in mail:
                self._mail.put(message)

    def take_outcomes(self, *, idle: bool) -> tuple[set[str], set[str]]:
        """Requests whose loads are over since the last call, and those of them that failed.

        An engine that has nothing to compute asks again at once: ``idle`` waits a little for news, because what the
        engine's loop burns is missing where caches are decoded.
        """
        if self._inbox is None:
            return set(), set()
        if idle and self._loading:
            self._news.wait(_PATIENCE)
        with self._lock:
            self._news.clear()
            outcomes, self._inbox.outcomes = self._inbox.outcomes, []
            self._loading -= len(outcomes)
            for outcome in outcomes:
                if outcome.error is None:
                    self._stats.received(time.monotonic() - outcome.made, outcome.wire_bytes, outcome.cache_bytes)
                else:
                    self._stats.failed("failed_receives")
        for outcome in outcomes:
            if outcome.error is not None:
                _log.warning("the cache of request %s was not received: %s", outcome.request, outcome.error)
        failed = {outcome.request for outcome in outcomes if outcome.error is not None}
        return {outcome.request for outcome in outcomes}, failed

    # --- both

    def take_stats(self) -> LynxStats | None:
        """What happened since the last call, None if nothing did."""
        with self._lock:
            stats, self._stats = self._stats, LynxStats()
        return None if stats.is_empty() else stats

    def close(self) -> None:
        """End all transfers; no thread touches the caches when this returns."""
        self._outbox.close()
        if self._receiver is not None:
            self._receiver.close()
            self._mail.put(None)
            self._courier.join()
            self._transfers.shutdown()

    def _to_pages(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Blocks of the scheduler are runs of the kernels' pages."""
        each = self._pages_per_block
        return blocks if each == 1 else tuple(block * each + i for block in blocks for i in range(each))

    # --- decode side, on threads of its own

    def _listen(self, url: str, max_tokens: int) -> None:
        cache = Cache(
            identity=self._identity,
            dtype=self._dtype,
            layers=tuple(sorted(self._pages)),
            heads=self._heads,
            key_dim=self._dims[0],
            value_dim=self._dims[1],
            max_tokens=max_tokens,
        )
        s = self._settings
        self._inbox = Inbox(
            cache, self._fill, idle=s.idle, timeout=s.timeout, lease=s.lease, buffer_bytes=s.buffer_bytes
        )
        self._mail: queue.SimpleQueue[_Mail] = queue.SimpleQueue()
        self._offered: dict[int, Piece] = {}  # by the identity of the arrays that a transfer got
        self._transfers = ThreadPoolExecutor(_THREADS, "lynxproto-pull", initializer=use_all_cpus)
        opened = threading.Event()
        failed: list[BaseException] = []

        def run() -> None:
            use_all_cpus()
            try:
                receiver = blocking.listen(
                    url, s.config(), allocate=self._allocate, observe=self._observe, **s.server_options()
                )
                self._receiver = receiver.__enter__()
            except BaseException as error:
                failed.append(error)
                return
            finally:
                opened.set()
            for transfer in self._receiver:
                self._transfers.submit(self._receive, transfer)

        threading.Thread(target=run, name="lynxproto-listen", daemon=True).start()
        opened.wait()
        if failed:
            raise failed[0]
        self._courier = threading.Thread(target=self._carry, name="lynxproto-courier", daemon=True)
        self._courier.start()

    def _allocate(self, manifest: Manifest) -> Mapping[tuple[int, Any], NDArray[Any]]:
        assert self._inbox is not None
        with self._lock:
            piece = self._inbox.offer(manifest, time.monotonic())
            self._offered[id(piece.arrays)] = piece
        return piece.arrays

    def _observe(self, event: str, fields: Mapping[str, Any]) -> None:
        """On the I/O thread: a transfer that was refused, here or because its sender gave up, is never handed out."""
        if event == "transfer_refused" and fields.get("request_id"):
            self._mail.put(_Refused(fields["request_id"], LynxError(str(fields.get("error")))))

    def _receive(self, transfer: blocking.IncomingTransfer) -> None:
        """Follow a transfer to its end."""
        assert self._inbox is not None
        inbox, piece = self._inbox, self._offered.pop(id(transfer.arrays))
        try:
            for layer in transfer.manifest.layers:
                transfer.exact(timeout=self._settings.timeout, layer=layer.index)
                with self._lock:
                    inbox.layer_exact(piece, layer, transfer.stats.bytes, time.monotonic())
                    self._tell()
                if piece.dropped and layer is not transfer.manifest.layers[-1]:
                    transfer.cancel(timeout=self._settings.timeout)
                    return
        except Exception as error:  # a LynxError, or a bug that must not be lost with the thread
            if not isinstance(error, LynxError):
                _log.exception("receiving %s failed", transfer.manifest.request_id)
                error = LynxError(f"receiving failed: {error!r}")
            with self._lock:
                inbox.piece_failed(piece, error, time.monotonic())
                self._tell()

    def _carry(self) -> None:
        """The courier: claims, and the clock."""
        assert self._inbox is not None
        use_all_cpus()
        inbox = self._inbox
        while True:
            with self._lock:
                timer = inbox.next_timer()
            try:
                message = self._mail.get(timeout=None if timer is None else max(0.0, timer - time.monotonic()))
            except queue.Empty:
                message = _Tick()
            if message is None:
                return
            now = time.monotonic()
            with self._lock:
                if isinstance(message, _Claim):
                    inbox.claim(message.load, message.made)
                elif isinstance(message, _Abort):
                    inbox.abort(message.request)
                elif isinstance(message, _Refused):
                    inbox.refused(message.name, message.error, now)
                elif isinstance(message, _Drop):
                    inbox.drop(message.name)
                inbox.handle_timer(now)
                self._tell()

    def _tell(self) -> None:
        """Wake the engine's thread if a load is over; under the lock."""
        if self._inbox is not None and self._inbox.outcomes:
            self._news.set()

    def _fill(self, load: Load, layer: LayerSpec, keys: NDArray[Any], values: NDArray[Any]) -> None:
        first = layer.head_start - self._heads.start
        heads = slice(first, first + layer.kv_heads)
        self._pages[layer.index].write(self._to_pages(load.blocks), layer.token_start, keys, values, heads)
