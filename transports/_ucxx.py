"""UCX as ``transports/ucx.py`` needs it: tagged messages and progress, on the package ``ucxx``.

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
from importlib.util import find_spec
from typing import Any, Final

from lynxproto.codecs._library import ffi, lib
from lynxproto.errors import MissingDependencyError, TransportError

__all__ = [
    "BUSY",
    "FOUND",
    "LONG",
    "OVER",
    "PIECE",
    "QUIET",
    "SETTINGS",
    "Endpoint",
    "Message",
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
}
#: Messages of so many bytes stay with the sender until the receiver says where they are to go.
LONG: Final = 8 << 10
#: Bytes of a message at most.
PIECE: Final = 512 << 10

#: What :meth:`Worker.poll` returns.
QUIET: Final[int] = lib.LYNX_UCX_QUIET
BUSY: Final[int] = lib.LYNX_UCX_BUSY
OVER: Final[int] = lib.LYNX_UCX_OVER
FOUND: Final[int] = lib.LYNX_UCX_FOUND

_IN_PROGRESS: Final = 1
_CALLS: Final = (
    "ucp_worker_progress",
    "ucp_tag_probe_nb",
    "ucp_tag_msg_recv_nbx",
    "ucp_tag_send_nbx",
    "ucp_request_free",
    "ucp_ep_close_nbx",
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
        """Lent to UCX; to be let go of when it is done."""
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


class Message:
    """A message that has come, to be received exactly once. Until then UCX, or its sender, has the bytes."""

    __slots__ = ("handle", "nbytes", "tag")

    def __init__(self, handle: Any, tag: int, nbytes: int) -> None:
        self.handle = handle
        self.tag = tag
        self.nbytes = nbytes


class Endpoint:
    """The way to one peer."""

    __slots__ = ("_calls", "_closed", "_endpoint", "_worker", "handle")

    def __init__(self, worker: Worker, endpoint: Any) -> None:
        self._worker = worker
        self._calls = worker.calls
        self._endpoint = endpoint
        self.handle = ffi.cast("void *", endpoint.handle)
        self._closed = False

    def send(self, buffer: memoryview, tag: int) -> Operation:
        """Send ``buffer`` as one message. Not after :meth:`close`."""
        operation = Operation()
        data = operation.buffer = ffi.from_buffer(buffer)
        lib.lynx_ucx_send(self._calls, self.handle, data, len(data), tag, operation.state)
        return operation

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
        config = {key: value for key, value in SETTINGS.items() if f"UCX_{key}" not in os.environ}
        config["RNDV_THRESH"] = str(LONG)
        context = libucxx.UCXContext(config, (libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
        self._worker = libucxx.UCXWorker(context, False, False)
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

    def connect(self, address: bytes) -> Endpoint:
        """An endpoint to the worker with this address. Raises :class:`~lynxproto.errors.TransportError`."""
        try:
            peer = self._api.UCXAddress.create_from_buffer(address)
            return Endpoint(self, self._api.UCXEndpoint.create_from_worker_address(self._worker, peer, True))
        except self._api.UCXError as error:
            raise TransportError(
                f"UCX cannot reach the peer: {error}; UCX_TLS must name a transport that both sides have"
            ) from error

    def receive(self, message: Message, buffer: memoryview) -> Operation:
        """Receive ``message`` into ``buffer``. What does not fit is lost, and an error."""
        operation = Operation()
        data = operation.buffer = ffi.from_buffer(buffer, require_writable=True)
        lib.lynx_ucx_receive(self.calls, message.handle, data, len(data), operation.state)
        return operation

    def bound(self, quiet_ns: int, most_ns: int) -> None:
        """How long to poll: until nothing has happened for ``quiet_ns`` (0: just once), or ``most_ns`` are over."""
        self.calls.quiet_ns, self.calls.most_ns = quiet_ns, most_ns

    def poll(self, operation: Operation | None = None) -> int:
        """Make progress, without Python's lock, until one of these:

        a message comes (:data:`FOUND`: take it from :meth:`found`), ``operation`` is over (:data:`OVER`), nothing has
        happened for a while (:data:`QUIET`), or it is time for other things (:data:`BUSY`).
        """
        state = ffi.NULL if operation is None else operation.state
        outcome: int = lib.lynx_ucx_poll(self.calls, state)
        return outcome

    def send_poll(self, operation: Operation, endpoint: Endpoint, buffer: memoryview, tag: int) -> int:
        """Send ``buffer``, in messages of :data:`PIECE` bytes, as ``operation``, and :meth:`poll` until it is over."""
        data = operation.buffer = ffi.from_buffer(buffer)
        outcome: int = lib.lynx_ucx_send_poll(self.calls, endpoint.handle, data, len(data), PIECE, tag, operation.state)
        return outcome

    def receive_poll(self, operation: Operation, tag: int, buffer: memoryview) -> int:
        """:meth:`poll`, but if the first message that comes has this tag and fits, ``operation`` receives it.

        If it is long so do the next ones. The poll is :data:`OVER` then when all is there; the operation's size is 0 if
        there was no such message.
        """
        data = operation.buffer = ffi.from_buffer(buffer, require_writable=True)
        outcome: int = lib.lynx_ucx_receive_poll(self.calls, tag, data, len(data), PIECE, LONG, operation.state)
        return outcome

    def found(self) -> Message:
        """The message that was found last."""
        found = self.calls.found
        return Message(found.handle, found.tag, found.nbytes)

    def arm(self) -> bool:
        """Get ready to wait for the descriptor; False if there is progress to make first."""
        armed: bool = self._worker.arm()
        return armed

    def progress(self) -> None:
        """Do what there is to do, without waiting."""
        self._worker.progress()

    def close(self) -> None:
        """Let go of everything. All endpoints must be closed."""
        del self._worker


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
