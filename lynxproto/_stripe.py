"""One byte stream of a session: where its bytes are read to, how they become frames, and the frame being written."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Protocol

from lynxproto import frames
from lynxproto.digest import Sums, crc32c, sums_of
from lynxproto.frames import HEADER_SIZE, FrameType, Header
from lynxproto.state import StripeState

if TYPE_CHECKING:
    from lynxproto._receiver import Arrival
    from lynxproto._sender import Chunk
    from lynxproto.config import Secret

__all__ = ["FrameHandler", "FrameReader", "Stripe", "Target"]

_SCRATCH = 64 * 1024
#: Payloads with less than this still to come are read together with what follows them, and copied once.
_DIRECT = 8 * 1024
#: Read after a large payload: a header, and little of the payload that may follow and would be copied.
_BRIEF = 1024
_MAX_PROBES = 16
#: What is read at once, so that checksums find it in the core's cache.
_DIRECT_MAX = 1 << 20
#: Where the bytes go that nobody wants.
_SINK = bytearray(_SCRATCH)


class Target:
    """Where the bytes of a payload (or an extension) go. Checksums are made as they come, while the cache has them."""

    __slots__ = ("filled", "sums", "view")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self.filled = 0
        self.sums = sums_of(view)  # None: it is short

    @property
    def wanted(self) -> bool:
        """Whether the rest may still be written; asked before each read."""
        return True

    @property
    def crc(self) -> int:
        """CRC32C of the whole, once it is there."""
        return crc32c(self.view) if self.sums is None else self.sums.crc

    def took(self, nbytes: int) -> None:
        """``nbytes`` more are in place."""
        self.filled += nbytes
        if self.sums is not None:
            self.sums.add(self.filled)


class FrameHandler(Protocol):
    """What a reader calls. Any call may raise a ProtocolError, or end the stripe (:meth:`FrameReader.stop`)."""

    def check_header(self, header: Header) -> None:
        """A header arrived; refuse it before anything else of the frame is read."""

    def begin_payload(self, header: Header, bitmap: bytes) -> Target | None:
        """Where the payload goes; None to skip it."""

    def end_payload(self, header: Header, target: Target) -> None:
        """The payload is complete, or its rest is not wanted any more and will be skipped."""


class FrameReader:
    """Cuts a byte stream into frames, reading large payloads straight into their own buffers."""

    def __init__(self, handler: FrameHandler) -> None:
        self._handler = handler
        self._scratch = bytearray(_SCRATCH)
        self._start = self._end = 0  # of the unread bytes in the scratch buffer
        self._header: Header | None = None
        self._target: Target | None = None  # of the extension or the payload
        self._in_extension = False
        self._skip = 0
        self._direct = False
        self._after_large = False  # what comes next is probably the header of another large payload
        self._stopped = False

    def stop(self) -> None:
        """Ignore all further bytes, and let go of what was half read."""
        self._stopped = True
        self._target = None
        self._direct = False
        self._scratch = _SINK

    def get_buffer(self) -> memoryview:
        """Where to read the next bytes to."""
        self._direct = False
        target = self._target
        if target is not None and not target.wanted:
            self._abandon(target)
        elif target is not None and self._start == self._end and len(target.view) - target.filled >= _DIRECT:
            self._direct = True
            return target.view[target.filled : target.filled + _DIRECT_MAX]
        if self._stopped:
            self._start = self._end = 0
        elif self._start:
            self._scratch[: self._end - self._start] = self._scratch[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        room = _BRIEF if self._after_large and self._end < _BRIEF else _SCRATCH
        return memoryview(self._scratch)[self._end : room]

    @property
    def sums(self) -> Sums | None:
        """Those that the last buffer begins with the rest of; None if it is no part of a long payload."""
        return self._target.sums if self._direct and self._target is not None else None

    def buffer_updated(self, nbytes: int) -> None:
        """``nbytes`` bytes are in the last buffer."""
        if self._stopped:
            return
        if self._direct:
            assert self._target is not None
            self._target.took(nbytes)
            self._target_filled()
        else:
            self._end += nbytes
        while not self._stopped and self._step():
            pass

    def _step(self) -> bool:
        """Consume some of the scratch buffer; False when it must wait for more."""
        available = self._end - self._start
        if self._skip:
            n = min(available, self._skip)
            self._start += n
            self._skip -= n
            return n > 0
        if self._target is not None:
            target = self._target
            n = min(available, len(target.view) - target.filled)
            if n and target.wanted:
                target.view[target.filled : target.filled + n] = memoryview(self._scratch)[
                    self._start : self._start + n
                ]
                target.took(n)
                self._start += n
                self._target_filled()
            elif n:
                self._abandon(target)
            return n > 0
        if available < HEADER_SIZE:
            return False
        header = Header.unpack(memoryview(self._scratch)[self._start : self._start + HEADER_SIZE])
        self._handler.check_header(header)
        self._start += HEADER_SIZE
        self._header = header
        if header.extension_length:
            self._in_extension = True
            self._target = Target(memoryview(bytearray(header.extension_length)))
        else:
            self._begin(b"")
        return True

    def _begin(self, bitmap: bytes) -> None:
        assert self._header is not None
        target = self._handler.begin_payload(self._header, bitmap)
        if target is None:
            self._skip = self._header.payload_length
            self._header = None
        elif not self._stopped:
            self._target = target
            self._target_filled()

    def _abandon(self, target: Target) -> None:
        """Write no more to a target that became unwanted; read over the rest."""
        header = self._header
        assert header is not None
        self._target = self._header = None
        self._skip = len(target.view) - target.filled
        self._handler.end_payload(header, target)

    def _target_filled(self) -> None:
        target, header = self._target, self._header
        if target is None or target.filled < len(target.view):
            return
        assert header is not None
        self._target = None
        self._direct = False
        self._after_large = target.filled >= _SCRATCH
        if self._in_extension:
            self._in_extension = False
            self._begin(frames.parse_extension(target.view))
        else:
            self._header = None
            self._handler.end_payload(header, target)


class Stripe:
    """State of one byte stream."""

    def __init__(self, index: int, now: float) -> None:
        self.index = index
        self.number = index  # the client's number of it, the same on both sides
        self.state = StripeState.HELLO
        self.reader: FrameReader
        self.opened_at = now
        self.heard_at = now
        self.pinged_at = now
        self.my_hello = b""
        self.peer_hello: bytes | None = None  # payloads, as they came
        self.peer_proof: bytes | None = None
        self.joins = False  # an existing session
        self.secret: Secret | None = None  # the shared secret that its handshake is about
        self.hello: frames.Hello | None = None  # the peer's
        self.control: deque[bytes] = deque()  # frames that belong to this stripe
        self.pongs: list[int] = []  # PINGs to answer
        self.probed = False  # one of them was a probe
        self.out: deque[memoryview] = deque()  # rest of the frame being written
        self.writing: Chunk | None = None
        self.writing_bytes = 0
        self.may_pause = False  # its chunk is a residual that was begun while no anchor waited
        self.paused_at: float | None = None  # when anchors first overtook it
        self.lender: int | None = None  # the transfer whose payload `out` reads
        self.lent: set[int] = set()  # transfers of the payloads that were given out last
        self.arrival: Arrival | None = None
        #: id of a probing PING -> number of the last chunk written before it
        self.probes: OrderedDict[int, int] = OrderedDict()

    @property
    def ready(self) -> bool:
        """Whether it carries frames."""
        return self.state is StripeState.READY

    @property
    def closed(self) -> bool:
        """Whether it is over."""
        return self.state is StripeState.CLOSED

    def note_probe(self, ping: int, sequence: int) -> None:
        """Remember a probing PING."""
        self.probes[ping] = sequence
        while len(self.probes) > _MAX_PROBES:
            self.probes.popitem(last=False)


#: Frame types that are allowed before the handshake of a stripe is over.
HANDSHAKE_TYPES = frozenset({FrameType.HELLO, FrameType.HELLO_ACK, FrameType.ERROR, FrameType.GOAWAY})
