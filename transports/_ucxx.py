"""UCX as ``transports/ucx.py`` needs it: active messages and progress, on the package ``ucxx``.

ucxx brings the library, and makes contexts, workers and endpoints. Its coroutines poll in a busy loop on whatever event
loop runs, and all threads share one worker; so its lower layer is used, with a context and a worker for each event
loop. Messages go through UCX's own calls (``native/src/ucx.c``): ucxx's take microseconds each, in Python, and do not
tell how long a message is before it has been received.

Its predecessor ``ucp`` (ucx-py) will not do: it closes an endpoint only after everything sent was received, and blocks
the thread until then, so a peer that stops reading would hang this side.
"""

from __future__ import annotations

import ctypes
import os
import zlib
from importlib.util import find_spec
from typing import Any, Final

from lynxproto.codecs._library import ffi, lib
from lynxproto.errors import MissingDependencyError, TransportError

__all__ = [
    "BUSY",
    "COST",
    "END",
    "KIND",
    "LONG",
    "NEWS",
    "OVER",
    "PIECE",
    "QUIET",
    "SETTINGS",
    "SHORTEST",
    "WINDOW",
    "Endpoint",
    "Operation",
    "Worker",
    "require_ucxx",
]

#: Settings of UCX other than its defaults, unless the environment has them.
SETTINGS: Final = {
    # Shared memory notices that a peer died only when told to (UCX's default leaves it out of such endpoints).
    "POSIX_ERROR_HANDLING": "y",
    "SYSV_ERROR_HANDLING": "y",
    # TCP in pieces of 8 KiB, UCX's default, is half as fast, and copies at the sender.
    "TCP_TX_SEG_SIZE": "64k",
    "TCP_RX_SEG_SIZE": "64k",
    # Shared memory in pieces of 32 KiB instead of 8, and few of them, which stay in the cores' caches.
    "POSIX_SEG_SIZE": "32832",
    "SYSV_SEG_SIZE": "32832",
    "SELF_SEG_SIZE": "32832",
    "POSIX_FIFO_SIZE": "32",
    "SYSV_FIFO_SIZE": "32",
}
#: From so many bytes on messages stay with the sender until the receiver says where they are to go.
_RENDEZVOUS: Final = 64 << 10
#: Bytes of a message that comes as one packet of any device; of shared memory and TCP with the settings above.
SHORTEST: Final = 8 << 10
_SHARED_PACKET: Final = 32 << 10
_TCP_PACKET: Final = (64 << 10) - 64
#: On TCP the receiver's word comes late: bytes that are under way go before it.
_TCP_RENDEZVOUS: Final = 256 << 10
#: Transports, in UCX's words, that copy at both sides whatever the protocol.
_SHARED: Final = frozenset({"self", "posix", "sysv"})

PIECE: Final[int] = lib.LYNX_UCX_PIECE
COST: Final[int] = lib.LYNX_UCX_COST
WINDOW: Final[int] = lib.LYNX_UCX_WINDOW
END: Final[int] = lib.LYNX_UCX_END
KIND: Final[int] = lib.LYNX_UCX_KIND

#: What :meth:`Worker.poll` returns.
QUIET: Final[int] = lib.LYNX_UCX_QUIET
BUSY: Final[int] = lib.LYNX_UCX_BUSY
OVER: Final[int] = lib.LYNX_UCX_OVER
NEWS: Final[int] = lib.LYNX_UCX_NEWS
LONG: Final[int] = lib.LYNX_UCX_LONG

_REFUSALS: Final = {
    lib.LYNX_UCX_IMPOSSIBLE: "a message that cannot be",
    lib.LYNX_UCX_EXCESS: "it sends more than it may",
    lib.LYNX_UCX_NO_MEMORY: "no memory for what it sends",
}
_IN_PROGRESS: Final = 1
_LANES: Final = 16
_CALLS: Final = (
    "ucp_worker_progress",
    "ucp_worker_set_am_recv_handler",
    "ucp_am_send_nbx",
    "ucp_am_recv_data_nbx",
    "ucp_am_data_release",
    "ucp_request_free",
    "ucp_ep_close_nbx",
    "ucp_ep_query",
)


def require_ucxx() -> Any:
    """The package. Raises :class:`~lynxproto.errors.MissingDependencyError` if it is missing or does not load."""
    os.environ.setdefault("UCX_WARN_UNUSED_ENV_VARS", "n")  # settings for other versions of UCX are no news
    try:
        import ucxx
    except ImportError as error:
        why = "" if find_spec("ucxx") is None else f"; ucxx is installed, but: {error}"
        raise MissingDependencyError(f"ucx:// needs UCX for Python: pip install 'lynxproto[ucx]'{why}") from error
    return ucxx


class Operation:
    """A send or receive. Keep it until it is :attr:`done`: UCX uses its buffer and itself. Then it can be another."""

    __slots__ = ("bell", "buffer", "state")

    def __init__(self) -> None:
        self.buffer: Any = None
        """What is lent to UCX; to be let go of when it is done."""
        self.state = ffi.new("lynx_ucx_operation *")
        """As UCX sees it."""
        self.bell: Any = None
        """What wakes those who wait for it."""

    @property
    def done(self) -> bool:
        """Whether it is over."""
        over: bool = self.state.status != _IN_PROGRESS
        return over

    @property
    def nbytes(self) -> int:
        """Bytes of its messages."""
        nbytes: int = self.state.nbytes
        return nbytes

    @property
    def error(self) -> str | None:
        """Why it failed, once it is over."""
        status = self.state.status
        return None if status == 0 else _status_text(status)


class Endpoint:
    """The way to one peer."""

    __slots__ = ("_calls", "_closed", "_endpoint", "_worker", "handle")

    def __init__(self, worker: Worker, endpoint: Any) -> None:
        self._worker = worker
        self._calls = worker.calls
        self._endpoint = endpoint
        self.handle = ffi.cast("void *", endpoint.handle)
        self._closed = False

    @property
    def transports(self) -> frozenset[str]:
        """The transports that UCX uses for it, in UCX's words."""
        names = ffi.new("const char *[]", _LANES)
        count = lib.lynx_ucx_transports(self._calls, self.handle, names, _LANES)
        return frozenset(ffi.string(names[lane]).decode() for lane in range(count))

    def close(self) -> None:
        """Break the way off without waiting for the peer; what is under way ends. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._endpoint.close_blocking()
        if self._endpoint.handle:  # ucxx leaves one open whose peer has failed
            operation = Operation()
            lib.lynx_ucx_close_endpoint(self._calls, self.handle, operation.state)
            while not operation.done:
                self._worker.progress()


class Worker:
    """Sends and receives for one thread."""

    def __init__(self) -> None:
        require_ucxx()
        from ucxx._lib import libucxx

        self._api = libucxx
        #: UCX trusts that both sides have the same: a peer with longer packets would write past this side's.
        self.settings = zlib.crc32(repr([os.environ.get(f"UCX_{key}", SETTINGS[key]) for key in SETTINGS]).encode())
        config = {key: value for key, value in SETTINGS.items() if f"UCX_{key}" not in os.environ}
        try:
            context = libucxx.UCXContext(config, (libucxx.Feature.AM, libucxx.Feature.WAKEUP))
            self._worker = libucxx.UCXWorker(context, False, False)
        except self._api.UCXError as error:
            raise TransportError(
                f"UCX cannot start: {error}; UCX_TLS and UCX_NET_DEVICES must name what this machine has"
            ) from error
        self._worker.init_blocking_progress_mode()
        #: Readable when there is progress to make, if :meth:`arm` was the last call.
        self.fileno: int = self._worker.epoll_file_descriptor
        #: What a peer needs to connect.
        self.address = bytes(self._worker.address)
        ucp = _library("ucp")
        self.calls = ffi.new("lynx_ucx *")
        self.calls.worker = ffi.cast("void *", self._worker.handle)
        for name in _CALLS:
            setattr(self.calls, name, ctypes.cast(getattr(ucp, name), ctypes.c_void_p).value)
        if (status := lib.lynx_ucx_listen(self.calls)) != 0:
            raise TransportError(f"UCX takes no handler of messages: {_status_text(status)}")

    def connect(self, address: bytes) -> Endpoint:
        """An endpoint to the worker with this address. Raises :class:`~lynxproto.errors.TransportError`."""
        try:
            peer = self._api.UCXAddress.create_from_buffer(address)
            return Endpoint(self, self._api.UCXEndpoint.create_from_worker_address(self._worker, peer, True))
        except self._api.UCXError as error:
            raise TransportError(
                f"UCX cannot reach the peer: {error}; UCX_TLS must name a transport that both sides have"
            ) from error

    def open_stream(self, tag: int) -> Any:
        """A ``lynx_ucx_stream``, known by ``tag`` until :meth:`close_stream`. Before :meth:`direct` it only listens."""
        stream = ffi.new("lynx_ucx_stream *")
        stream.mine = tag
        lib.lynx_ucx_open_stream(self.calls, stream)
        return stream

    def close_stream(self, stream: Any) -> None:
        """Forget it, and what has come for it."""
        lib.lynx_ucx_close_stream(self.calls, stream)

    def direct(self, stream: Any, endpoint: Endpoint, tag: int) -> None:
        """``stream`` goes to ``endpoint``, where it is known by ``tag``."""
        stream.endpoint, stream.theirs = endpoint.handle, tag
        stream.shortest, stream.longest, stream.enough = _pieces(endpoint.transports)

    def confirm(self, stream: Any, operation: Operation) -> None:
        """Tell the peer of what ``operation``, which is over, has received, unless :meth:`receive_poll` has."""
        lib.lynx_ucx_confirm(self.calls, stream, operation.state)

    def cut(self, stream: Any) -> None:
        """The endpoint is to be closed: nothing goes there any more."""
        stream.endpoint = ffi.NULL

    def begin(self, operation: Operation) -> None:
        """``operation`` has nothing to do yet."""
        lib.lynx_ucx_begin(self.calls, operation.state)

    def send(self, operation: Operation, stream: Any, buffer: memoryview) -> None:
        """Send ``buffer`` too. Not after the endpoint was closed."""
        data = ffi.from_buffer(buffer)
        operation.buffer = (operation.buffer, data)
        lib.lynx_ucx_send(self.calls, stream, data, len(data), operation.state)

    def tell(self, stream: Any, kind: int) -> Operation:
        """Send a message of this kind, which has no bytes. Not after the endpoint was closed."""
        operation = Operation()
        lib.lynx_ucx_tell(self.calls, stream, kind, operation.state)
        return operation

    def next(self, stream: Any) -> int:
        """Bytes of the next message in the inbox, which is not empty."""
        nbytes: int = stream.inbox[stream.first].nbytes
        return nbytes

    def refused(self, stream: Any) -> str | None:
        """Why the stream takes nothing more."""
        return _REFUSALS.get(stream.refused)

    def news(self) -> int:
        """The tag of a stream that waits for a message, or for leave to send, or refuses more; 0 if there is none."""
        tag: int = lib.lynx_ucx_news(self.calls)
        return tag

    def bound(self, quiet_ns: int, most_ns: int) -> None:
        """How long to poll: until nothing has happened for ``quiet_ns`` (0: just once), or ``most_ns`` are over."""
        self.calls.quiet_ns, self.calls.most_ns = quiet_ns, most_ns

    def poll(self, operation: Operation | None = None) -> int:
        """Make progress, without Python's lock, until one of these:

        there are news (:data:`NEWS`, see :meth:`news`), ``operation`` is over (:data:`OVER`), nothing has happened for
        a while (:data:`QUIET`), or it is time for other things (:data:`BUSY`).
        """
        state = ffi.NULL if operation is None else operation.state
        outcome: int = lib.lynx_ucx_poll(self.calls, state)
        return outcome

    def send_poll(self, operation: Operation, stream: Any, buffer: memoryview) -> int:
        """Send ``buffer`` as ``operation``, and :meth:`poll` until it is over."""
        data = operation.buffer = ffi.from_buffer(buffer)
        outcome: int = lib.lynx_ucx_send_poll(self.calls, stream, data, len(data), operation.state)
        return outcome

    def receive_poll(self, operation: Operation, stream: Any, buffer: memoryview) -> int:
        """Receive into ``buffer``, as ``operation``, what has come and what comes in a :meth:`poll`.

        The peer is told of what was received, unless the operation is still under way (:meth:`confirm`).
        :data:`LONG`: the next message is longer than ``buffer``, and comes only as a whole.
        """
        data = operation.buffer = ffi.from_buffer(buffer, require_writable=True)
        outcome: int = lib.lynx_ucx_receive_poll(self.calls, stream, data, len(data), operation.state)
        return outcome

    def arm(self) -> bool:
        """Get ready to wait for the descriptor; False if there is progress to make first."""
        armed: bool = self._worker.arm()
        return armed

    def progress(self) -> None:
        """Do what there is to do, without waiting."""
        self._worker.progress()

    def close(self) -> None:
        """Let go of everything. All endpoints must be closed."""
        lib.lynx_ucx_let_go(self.calls)
        del self._worker


def _pieces(transports: frozenset[str]) -> tuple[int, int, int]:
    """How bytes become messages where these transports are used: ``shortest``, ``longest``, ``enough`` of ``ucx.h``.

    A short message is one packet: UCX would put several together in memory of its own, and copy once more. Long ones,
    for which the receiver asks, land in place with RDMA and TCP; but shared memory copies anyhow, and would only wait
    for the receiver's word.
    """
    if transports & _SHARED and transports <= _SHARED | {"cma", "tcp"}:
        return _SHARED_PACKET if _ours("POSIX", "SYSV", "SELF") else SHORTEST, 0, 0
    if transports == {"tcp"} and _ours("TCP"):
        return _TCP_PACKET, PIECE, _TCP_RENDEZVOUS
    return SHORTEST, PIECE, _RENDEZVOUS


def _ours(*devices: str) -> bool:
    """Whether the environment leaves the settings of these devices to us."""
    return not any(f"UCX_{key}" in os.environ for key in SETTINGS if "SEG_SIZE" in key and key.startswith(devices))


def _library(name: str) -> ctypes.CDLL:
    """The library of UCX that ucxx has loaded."""
    try:
        return ctypes.CDLL(f"lib{name}.so.0")
    except OSError as error:
        raise MissingDependencyError(f"ucx:// needs UCX's library, which ucxx did not bring: {error}") from error


def _status_text(status: int) -> str:
    describe = _library("ucs").ucs_status_string
    describe.restype = ctypes.c_char_p
    text: bytes = describe(status)
    return text.decode()
