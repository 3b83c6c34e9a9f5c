"""Packets out of pcap and pcapng files, and TCP out of packets.

Sources: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng, the LINKTYPE_ pages of tcpdump.org, RFC 791, 8200, 9293.
Own code, because a hostile file must not make a reader allocate, and faults need their offset.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from lynxproto.errors import CaptureError
from lynxproto.inspect.model import Fault

__all__ = ["MAGICS", "Packet", "Tcp", "decode_tcp", "read_packets"]

_PCAPNG: Final = b"\x0a\x0d\x0d\x0a"
#: First bytes of a pcap -> byte order, nanoseconds of a fraction.
_PCAP: Final = {
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
    b"\xa1\xb2\x3c\x4d": (">", 1),
}
MAGICS: Final = (_PCAPNG, *_PCAP)

#: The largest packet or block that is read; tcpdump's largest snapshot is 262,144.
_MAX_BLOCK: Final = 1 << 24
_MAX_INTERFACES: Final = 1024

_NULL, _ETHERNET, _RAW, _LOOP, _SLL, _SLL2 = 0, 1, (12, 14, 101, 228, 229), 108, 113, 276
_IPV4, _IPV6, _VLAN = 0x0800, 0x86DD, (0x8100, 0x88A8, 0x9100)
_TCP: Final = 6
#: IPv6 extension headers that may stand before TCP: hop-by-hop, routing, destination options.
_EXTENSIONS: Final = (0, 43, 60)


class Packet(NamedTuple):
    """``time``: nanoseconds since 1970. ``offset``: of ``data`` in the file. ``link``: LINKTYPE_ number."""

    time: int
    offset: int
    link: int
    data: bytes


class Tcp(NamedTuple):
    """A TCP segment. Ends are (address, port); ``at`` is where ``data`` begins in the packet."""

    source: tuple[bytes, int]
    target: tuple[bytes, int]
    sequence: int
    syn: bool
    ack: bool
    fin: bool
    reset: bool
    at: int
    data: bytes


def read_packets(name: str, file: io.BufferedReader) -> Iterator[Packet | Fault]:
    """The packets of a pcap or pcapng file; the last item is a :class:`Fault` if the file is broken.

    Raises :class:`~lynxproto.errors.CaptureError` for a file whose header is broken.
    """
    magic = file.read(4)
    if magic == _PCAPNG:
        return _Pcapng(name, file).packets()
    order, unit = _PCAP[magic]
    header = file.read(20)
    if len(header) < 20:
        raise CaptureError(f"{name} begins like a pcap and ends inside its header")
    link = struct.unpack(order + "HHiIII", header)[5] & 0xFFFF
    return _pcap(file, order, unit, link)


def _pcap(file: io.BufferedReader, order: str, unit: int, link: int) -> Iterator[Packet | Fault]:
    layout = struct.Struct(order + "IIII")
    offset, time = 24, 0
    while raw := file.read(16):
        if len(raw) < 16:
            yield Fault(time, f"the pcap ends inside a packet header: {len(raw)} of 16 bytes", offset=offset)
            return
        seconds, fraction, caught, _length = layout.unpack(raw)
        if caught > _MAX_BLOCK:
            yield Fault(time, f"the pcap is broken: a packet of {caught} bytes", offset=offset)
            return
        data = file.read(caught)
        if len(data) < caught:
            yield Fault(time, f"the pcap ends inside a packet: {len(data)} of {caught} bytes", offset=offset)
            return
        time = seconds * 10**9 + fraction * unit
        yield Packet(time, offset + 16, link, data)
        offset += 16 + caught


class _Pcapng:
    """Blocks of type, length, body, length; a section says the byte order, interfaces the units of time."""

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        self._name = name
        self._file = file
        self._order = "<"
        self._offset = 0
        self._time = 0
        #: link type, numerator and denominator of a unit in nanoseconds, offset in nanoseconds
        self._interfaces: list[tuple[int, int, int, int]] = []

    def packets(self) -> Iterator[Packet | Fault]:
        head = _PCAPNG + self._file.read(4)
        if len(head) < 8:
            raise CaptureError(f"{self._name} begins like a pcapng and ends inside its header")
        return self._blocks(head)

    def _blocks(self, head: bytes) -> Iterator[Packet | Fault]:
        while head:
            start = self._offset
            block = self._block(head)
            if isinstance(block, str):
                yield Fault(self._time, f"the pcapng is broken: {block}", offset=start)
                return
            kind, body = block
            try:
                packet = self._packet(kind, body, start)
            except (struct.error, IndexError):
                yield Fault(self._time, f"the pcapng is broken: a block of type {kind} is too short", offset=start)
                return
            if packet is not None:
                self._time = packet.time
                yield packet
            head = self._file.read(8)

    def _block(self, head: bytes) -> tuple[int, bytes] | str:
        """Type and body of the block that begins with the 8 bytes ``head``; or what is wrong with it."""
        if len(head) < 8:
            return f"it ends inside a block header: {len(head)} of 8 bytes"
        body = b""
        if head[:4] == _PCAPNG:
            body = self._file.read(4)
            if body not in (b"\x4d\x3c\x2b\x1a", b"\x1a\x2b\x3c\x4d"):
                return "a section without a byte order"
            self._order = "<" if body[0] == 0x4D else ">"
            self._interfaces.clear()
        kind, length = struct.unpack(self._order + "II", head)
        if not 12 + len(body) <= length <= _MAX_BLOCK or length % 4:
            return f"a block of {length} bytes"
        want = length - 8 - len(body)
        rest = self._file.read(want)
        if len(rest) < want:
            return f"it ends inside a block: {8 + len(body) + len(rest)} of {length} bytes"
        self._offset += length
        return kind, (body + rest)[:-4]

    def _packet(self, kind: int, body: bytes, start: int) -> Packet | None:
        if kind == 1 and len(self._interfaces) < _MAX_INTERFACES:
            self._interfaces.append(self._interface(body))
        elif kind == 6:
            number, high, low, caught, _ = struct.unpack_from(self._order + "IIIII", body)
            link, numerator, denominator, offset = self._interfaces[number]
            time = (high << 32 | low) * numerator // denominator + offset
            return Packet(time, start + 28, link, body[20 : 20 + caught])
        elif kind == 3:  # simple packet block: no time
            link = self._interfaces[0][0]
            return Packet(self._time, start + 12, link, body[4:])
        return None

    def _interface(self, body: bytes) -> tuple[int, int, int, int]:
        link, _, _ = struct.unpack_from(self._order + "HHI", body)
        numerator, denominator, offset = 1000, 1, 0
        at = 8
        while at + 4 <= len(body):
            code, size = struct.unpack_from(self._order + "HH", body, at)
            value = body[at + 4 : at + 4 + size]
            if code == 9 and size == 1:  # if_tsresol
                base = 2 if value[0] & 0x80 else 10
                numerator, denominator = 10**9, base ** (value[0] & 0x7F)
            elif code == 14 and size == 8:  # if_tsoffset
                offset = struct.unpack(self._order + "q", value)[0] * 10**9
            at += 4 + (size + 3) // 4 * 4
        return link, numerator, denominator, offset


def decode_tcp(packet: Packet) -> Tcp | None:
    """The TCP segment in ``packet``; None if it holds none, or a fragment of one."""
    try:
        return _decode(packet.link, packet.data)
    except (struct.error, IndexError):  # cut short
        return None


def _decode(link: int, p: bytes) -> Tcp | None:
    if link == _ETHERNET:
        at, kind = 14, int.from_bytes(p[12:14], "big")
        while kind in _VLAN:
            kind = int.from_bytes(p[at + 2 : at + 4], "big")
            at += 4
        if kind not in (_IPV4, _IPV6):
            return None
    elif link == _SLL:
        at = 16
    elif link == _SLL2:
        at = 20
    elif link in (_NULL, _LOOP):
        at = 4
    elif link in _RAW:
        at = 0
    else:
        return None
    version = p[at] >> 4
    if version == 4:
        total, _, fragment = struct.unpack_from(">HHH", p, at + 2)
        if p[at + 9] != _TCP or fragment & 0x3FFF:
            return None
        source, target = p[at + 12 : at + 16], p[at + 16 : at + 20]
        end = at + total if total else len(p)  # 0: left to the network card
        at += (p[at] & 15) * 4
    elif version == 6:
        length, header = struct.unpack_from(">HB", p, at + 4)
        source, target = p[at + 8 : at + 24], p[at + 24 : at + 40]
        end = at + 40 + length if length else len(p)
        at += 40
        while header in _EXTENSIONS:
            header, size = p[at], (p[at + 1] + 1) * 8
            at += size
        if header != _TCP:
            return None
    else:
        return None
    sport, dport, sequence, _, offset, flags = struct.unpack_from(">HHIIBB", p, at)
    at += (offset >> 4) * 4
    return Tcp(
        (source, sport), (target, dport), sequence, bool(flags & 2), bool(flags & 16), bool(flags & 1),
        bool(flags & 4), at, p[at:end],
    )  # fmt: skip
