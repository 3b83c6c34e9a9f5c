"""What a prefill worker sends: one transfer for each part of a cache and each decode worker, on a thread of its own.

The engine's thread only copies rows and puts them into a queue; it never waits for the link.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

from numpy.typing import NDArray

from lynxproto import blocking
from lynxproto.errors import ConnectionClosedError, LimitError, LynxError, TransferCancelledError, TransportError
from lynxproto.integrations.vllm.settings import Settings
from lynxproto.manifest import Manifest

__all__ = ["Outbox", "Push", "Sent", "use_all_cpus"]

_THREADS: Final = 64
_log = logging.getLogger("vllm.lynxproto")


@dataclass(frozen=True, slots=True)
class Sent:
    """A transfer that is over; ``error`` says why the peer does not have it."""

    name: str
    url: str
    error: LynxError | None
    seconds: float
    wire_bytes: int
    cache_bytes: int


def use_all_cpus() -> None:
    """Let this thread, and those that it starts, run anywhere: vLLM binds its own threads to a core each."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


class Push:
    """A transfer that the engine fills, layer by layer."""

    def __init__(self, manifest: Manifest, url: str) -> None:
        self.manifest = manifest
        self.url = url
        self.layers: queue.SimpleQueue[tuple[int, NDArray[Any], NDArray[Any]] | bool] = queue.SimpleQueue()

    def write(self, layer: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
        """Send a layer: words ``[kv_heads, tokens, head_dim]`` that nobody changes any more."""
        self.layers.put((layer, keys, values))

    def close(self, complete: bool) -> None:
        """No more layers come; all have, or the transfer is void."""
        self.layers.put(complete)


class Outbox:
    """Sessions with decode workers, by URL, and the transfers under way."""

    def __init__(self, settings: Settings, report: Callable[[Sent], None]) -> None:
        self._settings = settings
        self._report = report
        self._room = settings.buffer_bytes
        self._open: set[Push] = set()
        self._lock = threading.Lock()
        self._sessions: dict[str, tuple[threading.Lock, list[blocking.Sender]]] = {}
        self._threads = ThreadPoolExecutor(_THREADS, "lynxproto-push", initializer=use_all_cpus)

    def open(self, manifest: Manifest, url: str) -> Push:
        """Begin a transfer. Raises :class:`~lynxproto.errors.LimitError` when too many wait already."""
        with self._lock:
            if manifest.nbytes > self._room:
                raise LimitError(
                    f"{manifest.nbytes} bytes to send do not fit into the {self._room} left of buffer_bytes"
                )
            self._room -= manifest.nbytes
            push = Push(manifest, url)
            self._open.add(push)
        self._threads.submit(self._run, push)
        return push

    def close(self) -> None:
        """Cancel what is under way."""
        with self._lock:
            pushes = list(self._open)
        for push in pushes:
            push.close(complete=False)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._close_sessions()
        self._threads.shutdown()
        self._close_sessions()  # that were just being made

    def _close_sessions(self) -> None:
        for _, kept in list(self._sessions.values()):
            while kept:
                kept.pop().close()

    def _run(self, push: Push) -> None:
        began, wire, error = time.monotonic(), 0, None
        try:
            wire = self._send(push)
        except LynxError as failed:
            error = failed
        except Exception as bug:  # must not be lost with the thread
            _log.exception("sending %s failed", push.manifest.request_id)
            error = LynxError(f"sending failed: {bug!r}")
        finally:
            with self._lock:
                self._room += push.manifest.nbytes
                self._open.discard(push)
        seconds = time.monotonic() - began
        self._report(Sent(push.manifest.request_id, push.url, error, seconds, wire, push.manifest.nbytes))

    def _send(self, push: Push) -> int:
        policy = self._settings.make_policy(push.manifest.dtype)
        session = self._session(push.url)
        try:
            transfer = session.open(push.manifest, policy)
        except (TransportError, ConnectionClosedError):  # the peer was restarted since
            self._discard(push.url, session)
            session = self._session(push.url)
            transfer = session.open(push.manifest, policy)
        try:
            while not isinstance(item := push.layers.get(), bool):
                layer, keys, values = item
                transfer.write(layer, keys, values)
            if not item:
                transfer.cancel(timeout=self._settings.timeout)
                raise TransferCancelledError("the engine did not compute all layers")
            transfer.finish(timeout=self._settings.timeout)
        except TransportError:
            self._discard(push.url, session)
            raise
        return transfer.stats.bytes

    def _session(self, url: str) -> blocking.Sender:
        with self._lock:
            lock, kept = self._sessions.setdefault(url, (threading.Lock(), []))
        with lock:
            if not kept:
                session = blocking.connect(url, self._settings.config(), **self._settings.client_options())
                kept.append(session.__enter__())
            return kept[0]

    def _discard(self, url: str, session: blocking.Sender) -> None:
        lock, kept = self._sessions[url]
        with lock:
            if session in kept:
                kept.remove(session)
        session.close()
