"""UCX as ``transports/ucx.py`` needs it: tagged messages and progress, from the package ``ucxx``.

Its coroutines poll in a busy loop on whatever event loop runs, and all threads share one worker; so its lower layer is
used, with a context and a worker for each event loop, progressed when its descriptor says so.

Its predecessor ``ucp`` (ucx-py) will not do: it closes an endpoint only after everything sent was received, and blocks
the thread until then, so a peer that stops reading would hang this side.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any, Final

from lynxproto.errors import MissingDependencyError, TransportError

__all__ = ["Endpoint", "Operation", "Worker", "require_ucxx"]

#: Shared memory notices that a peer died only when told to (UCX's default leaves it out of such endpoints altogether).
_CONFIG: Final = {"POSIX_ERROR_HANDLING": "y", "SYSV_ERROR_HANDLING": "y"}


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
    """A send or receive under way. Its buffer is in use until :attr:`done`."""

    __slots__ = ("_buffer", "_request")

    def __init__(self, request: Any, buffer: memoryview) -> None:
        self._request = request
        self._buffer = buffer

    @property
    def done(self) -> bool:
        """Whether it is over."""
        completed: bool = self._request.completed
        return completed

    @property
    def error(self) -> str | None:
        """Why it failed, once it is over."""
        try:
            self._request.check_error()
        except Exception as error:  # a class for each of UCX's codes, none of which is more than its text here
            return str(error) or type(error).__name__
        return None


class Endpoint:
    """The way to one peer."""

    __slots__ = ("_array", "_endpoint", "_tag")

    def __init__(self, endpoint: Any) -> None:
        from ucxx._lib.arr import Array
        from ucxx.types import Tag

        self._endpoint = endpoint
        self._array, self._tag = Array, Tag

    def send(self, buffer: memoryview, tag: int) -> Operation:
        """Send ``buffer`` as one message."""
        return Operation(self._endpoint.tag_send(self._array(buffer), self._tag(tag)), buffer)

    def receive(self, buffer: memoryview, tag: int) -> Operation:
        """Receive the next message with ``tag``, which has exactly the size of ``buffer``."""
        return Operation(self._endpoint.tag_recv(self._array(buffer), self._tag(tag)), buffer)

    def close(self) -> None:
        """Break the way off without waiting for the peer; what is under way ends. Idempotent."""
        self._endpoint.close_blocking()


class Worker:
    """Sends and receives for one thread."""

    def __init__(self) -> None:
        require_ucxx()
        from ucxx._lib import libucxx

        self._api = libucxx
        config = {key: value for key, value in _CONFIG.items() if f"UCX_{key}" not in os.environ}
        context = libucxx.UCXContext(config, (libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
        self._worker = libucxx.UCXWorker(context, False, False)
        self._worker.init_blocking_progress_mode()
        #: Readable when there is progress to make, if :meth:`arm` was the last call.
        self.fileno: int = self._worker.epoll_file_descriptor
        #: What a peer needs to connect.
        self.address = bytes(self._worker.address)

    def connect(self, address: bytes) -> Endpoint:
        """An endpoint to the worker with this address. Raises :class:`~lynxproto.errors.TransportError`."""
        try:
            peer = self._api.UCXAddress.create_from_buffer(address)
            return Endpoint(self._api.UCXEndpoint.create_from_worker_address(self._worker, peer, True))
        except self._api.UCXError as error:
            raise TransportError(
                f"UCX cannot reach the peer: {error}; UCX_TLS must name a transport that both sides have"
            ) from error

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
