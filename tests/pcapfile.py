"""Writes TCP connections into pcap and pcapng files: Ethernet, IPv4, TCP, as a capture program would have seen them."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from lynxproto.capture import Direction

CLIENT, SERVER = (b"\x0a\x00\x00\x01", 40001), (b"\x0a\x00\x00\x02", 7500)
SYN, ACK, FIN, PSH = 2, 16, 1, 8


@dataclass
class Tcp:
    """One connection; ``packets`` are (nanoseconds, Ethernet frame) and may be shuffled, dropped, repeated."""

    mss: int = 1448
    start: int = 1_700_000_000 * 10**9
    first: int = 0xFFFFF000  # sequence numbers wrap early
    packets: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._sequence = [self.first, self.first]
        self._packet(0, Direction.TO_SERVER, b"", SYN)
        self._packet(0, Direction.TO_CLIENT, b"", SYN | ACK)

    def send(self, time: int, direction: Direction, data: bytes) -> None:
        for at in range(0, len(data), self.mss):
            self._packet(time, direction, data[at : at + self.mss], PSH | ACK)

    def close(self, time: int) -> None:
        self._packet(time, Direction.TO_SERVER, b"", FIN | ACK)
        self._packet(time, Direction.TO_CLIENT, b"", FIN | ACK)

    def _packet(self, time: int, direction: Direction, data: bytes, flags: int) -> None:
        source, target = (CLIENT, SERVER) if direction == Direction.TO_SERVER else (SERVER, CLIENT)
        sequence, other = self._sequence[direction], self._sequence[1 - direction]
        self._sequence[direction] = (sequence + len(data) + bool(flags & (SYN | FIN))) % (1 << 32)
        tcp = struct.pack(">HHIIBBHHH", source[1], target[1], sequence, other, 5 << 4, flags, 65535, 0, 0) + data
        ip = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0, source[0], target[0])
        self.packets.append((self.start + time, b"\x02" * 6 + b"\x04" * 6 + b"\x08\x00" + ip + tcp))


def write_pcap(path: Path, packets: list[tuple[int, bytes]]) -> None:
    """Little-endian, nanoseconds."""
    with path.open("wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1))
        for time, data in packets:
            file.write(struct.pack("<IIII", *divmod(time, 10**9), len(data), len(data)) + data)


def write_pcapng(path: Path, packets: list[tuple[int, bytes]]) -> None:
    """Big-endian, an interface in nanoseconds, and a block of a type that nobody knows."""

    def block(kind: int, body: bytes) -> bytes:
        body += bytes(-len(body) % 4)
        return struct.pack(">II", kind, len(body) + 12) + body + struct.pack(">I", len(body) + 12)

    with path.open("wb") as file:
        file.write(block(0x0A0D0D0A, struct.pack(">IHHq", 0x1A2B3C4D, 1, 0, -1)))
        file.write(block(1, struct.pack(">HHI", 1, 0, 0) + struct.pack(">HHB3x", 9, 1, 9) + struct.pack(">HH", 0, 0)))
        file.write(block(0x0BAD, b"ignored"))
        for time, data in packets:
            head = struct.pack(">IIIII", 0, time >> 32, time & 0xFFFFFFFF, len(data), len(data))
            file.write(block(6, head + data))
