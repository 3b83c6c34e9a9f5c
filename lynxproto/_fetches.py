"""Caches asked for by key: this side's requests, and the peer's that wait for an answer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lynxproto import frames
from lynxproto._context import Backoff, Context
from lynxproto.errors import (
    DeadlineError,
    ErrorCode,
    ForbiddenError,
    LocalError,
    NotFoundError,
    PeerError,
    RemoteError,
    SpecError,
)
from lynxproto.events import FetchFailed, FetchRequested
from lynxproto.manifest import FetchKey, Want, check_wants

__all__ = ["Fetches"]

_KINDS: Final[dict[ErrorCode, Callable[[str], RemoteError]]] = {
    ErrorCode.NOT_FOUND: NotFoundError,
    ErrorCode.FORBIDDEN: ForbiddenError,
}


@dataclass(slots=True)
class _Fetch:
    body: frames.Fetch
    backoff: Backoff
    expires_at: float


class Fetches:
    """Both sides of FETCH. The answer is an OPEN that names the request, or NOT_FOUND."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._mine: dict[int, _Fetch] = {}
        #: the peer's requests -> what was answered, if it was not OPEN
        self._theirs: OrderedDict[int, frames.NotFound | None] = OrderedDict()

    # --- the shell's calls

    def ask(self, request: int, key: FetchKey, now: float, wants: Sequence[Want] | None, lease: float) -> None:
        ctx = self._ctx
        body = frames.Fetch(key=key, wants=(Want(),) if wants is None else tuple(wants), lease=float(lease))
        check_wants(body.wants)
        size = len(frames.control_frame(body)) + 64
        if ctx.peer is not None and size > ctx.peer.limits.control_bytes:
            raise SpecError(f"a FETCH of {size} bytes, the peer's limit is {ctx.peer.limits.control_bytes}")
        self._mine[request] = _Fetch(body, Backoff(ctx.config, now), now + ctx.config.lease)
        ctx.emit(body, request)

    def refuse(self, request: int, code: ErrorCode, text: str) -> None:
        if request not in self._theirs:
            raise LocalError(f"no FETCH {request:032x} is open")
        answer = self._theirs[request] = frames.NotFound(code=code, text=text)
        self._ctx.emit(answer, request)

    def answered(self, request: int) -> None:
        """The peer's request is answered by an OPEN of this side."""
        self._theirs.pop(request, None)

    # --- frames from the peer

    def on_fetch(self, request: int, body: frames.Fetch) -> None:
        answer = self._theirs.get(request)
        if answer is not None:
            self._ctx.reply(answer, request)
        elif request not in self._theirs:
            waiting = sum(done is None for done in self._theirs.values())
            if waiting >= self._ctx.config.limits.transfers:
                text = f"{waiting} requests are open already"
                self._ctx.reply(frames.NotFound(code=ErrorCode.LIMIT, text=text), request)
                return
            self._theirs[request] = None
            while len(self._theirs) > self._ctx.config.tombstones:
                self._theirs.popitem(last=False)
            self._ctx.events.append(FetchRequested(request=request, key=body.key, wants=body.wants, lease=body.lease))

    def on_not_found(self, request: int, body: frames.NotFound) -> None:
        if self._mine.pop(request, None) is not None:
            text = body.text or "the peer holds no cache under this key"
            kind = _KINDS.get(body.code)
            error = PeerError(text, body.code) if kind is None else kind(text)
            self._ctx.events.append(FetchFailed(request=request, error=error))

    def on_open(self, request: int) -> None:
        """The peer answers a request of this side by an OPEN."""
        self._mine.pop(request, None)

    # --- time, the end

    def resync(self) -> None:
        """A stripe came back: ask again."""
        for request, fetch in self._mine.items():
            self._ctx.emit(fetch.body, request)

    def timer(self) -> float | None:
        """When :meth:`handle_timer` has something to do."""
        ready = self._ctx.ready
        times = (min(f.expires_at, f.backoff.at) if ready else f.expires_at for f in self._mine.values())
        return min(times, default=None)

    def handle_timer(self, now: float) -> None:
        for request, fetch in list(self._mine.items()):
            if now >= fetch.expires_at:
                del self._mine[request]
                text = f"FETCH was not answered for {self._ctx.config.lease:g} s"
                self._ctx.events.append(FetchFailed(request=request, error=DeadlineError(text)))
            elif self._ctx.ready and now >= fetch.backoff.at:
                self._ctx.emit(fetch.body, request)
                fetch.backoff.tried(now)

    def forget_theirs(self) -> None:
        """The session begins anew: the peer has forgotten what it asked."""
        self._theirs.clear()

    def abandon(self, error: RemoteError) -> None:
        """The session is over."""
        for request in self._mine:
            self._ctx.events.append(FetchFailed(request=request, error=error))
        self._mine.clear()
        self._theirs.clear()
