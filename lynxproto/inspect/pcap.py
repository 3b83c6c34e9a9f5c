"""TCP streams out of packets: put in order, retransmissions dropped, losses told. Memory is bounded."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from typing import Final, NamedTuple

from lynxproto.capture import Direction
from lynxproto.inspect.model import Fault, Gap, Item, Segment, StripeEnd
from lynxproto.inspect.packets import Packet, Tcp, decode_tcp, read_packets

__all__ = ["open_pcap"]

#: Bytes and packets that wait for an earlier one before that is given up.
_MAX_WAITING: Final = 8 << 20
_MAX_PACKETS: Final = 8192
_MAX_FLOWS: Final = 4096
_SEQUENCES: Final = 1 << 32


class _Held(NamedTuple):
    data: bytes
    offset: int


class _Half:
    """One direction of a TCP connection."""

    def __init__(self, stripe: int, direction: Direction) -> None:
        self._stripe = stripe
        self._direction = direction
        self._next: int | None = None  # sequence number
        self._waiting: dict[int, _Held] = {}
        self._bytes = 0
        self.finished = False

    def start(self, sequence: int) -> None:
        """A SYN: data begins at ``sequence``."""
        if self._next is None:
            self._next = sequence

    def feed(self, time: int, sequence: int, held: _Held) -> Iterator[Item]:
        """A packet's data."""
        if self._next is None:
            self._next = sequence
        ahead = (sequence - self._next) % _SEQUENCES
        if 0 < ahead < _SEQUENCES // 2:
            before = self._waiting.get(sequence)
            if before is None or len(held.data) > len(before.data):
                self._bytes += len(held.data) - (len(before.data) if before else 0)
                self._waiting[sequence] = held
            if self._bytes > _MAX_WAITING or len(self._waiting) > _MAX_PACKETS:
                yield from self._skip(time)
            return
        yield from self._take(time, sequence, held)
        yield from self._drain(time)

    def flush(self, time: int) -> Iterator[Item]:
        """Nothing more will come."""
        while self._waiting:
            yield from self._skip(time)

    def _skip(self, time: int) -> Iterator[Item]:
        """Give up what is missing before the next packet that is there."""
        start = self._next or 0
        nearest = min((sequence - start) % _SEQUENCES for sequence in self._waiting)
        yield Gap(time, self._stripe, self._direction, nearest)
        self._next = (start + nearest) % _SEQUENCES
        yield from self._drain(time)

    def _drain(self, time: int) -> Iterator[Item]:
        """Pass on what waited for the bytes that have come."""
        while self._waiting:
            start = self._next or 0
            due = (
                [start]
                if start in self._waiting
                else [sequence for sequence in self._waiting if (sequence - start) % _SEQUENCES >= _SEQUENCES // 2]
            )
            if not due:
                return
            for sequence in due:
                held = self._waiting.pop(sequence)
                self._bytes -= len(held.data)
                yield from self._take(time, sequence, held)

    def _take(self, time: int, sequence: int, held: _Held) -> Iterator[Item]:
        """Pass on what of ``held`` is new."""
        assert self._next is not None
        seen = (self._next - sequence) % _SEQUENCES
        data = held.data[seen:]
        if data:
            self._next = (self._next + len(data)) % _SEQUENCES
            yield Segment(time, self._stripe, self._direction, data, held.offset + seen)


class _Flow:
    """A TCP connection."""

    def __init__(self, stripe: int, client: tuple[bytes, int]) -> None:
        self.stripe = stripe
        self.client = client
        self.halves = {direction: _Half(stripe, direction) for direction in Direction}

    def end(self, time: int) -> Iterator[Item]:
        """It is over."""
        for half in self.halves.values():
            yield from half.flush(time)
        yield StripeEnd(time, self.stripe)


def open_pcap(name: str, file: io.BufferedReader) -> tuple[int, Iterator[Item]]:
    """When the first packet was caught (nanoseconds since 1970), and the items of all TCP connections.

    Raises :class:`~lynxproto.errors.CaptureError` for a file whose header is broken.
    """
    packets = read_packets(name, file)
    first = next(packets, None)
    if first is None:
        return 0, iter(())
    return first.time, _items(chain([first], packets), first.time)


def _items(packets: Iterator[Packet | Fault], start: int) -> Iterator[Item]:
    flows: dict[frozenset[tuple[bytes, int]], _Flow] = {}
    count = time = 0
    for packet in packets:
        time = max(time, packet.time - start)
        if isinstance(packet, Fault):
            yield Fault(time, packet.reason, offset=packet.offset)
            break
        tcp = decode_tcp(packet)
        if tcp is None:
            continue
        key = frozenset((tcp.source, tcp.target))
        flow = flows.get(key)
        if flow is not None and tcp.syn and not tcp.ack:  # the ports are used again
            yield from flows.pop(key).end(time)
            flow = None
        if flow is None:
            if tcp.reset or not (tcp.syn or tcp.data):
                continue
            if len(flows) >= _MAX_FLOWS:
                yield Fault(time, f"more than {_MAX_FLOWS} TCP connections at a time", offset=packet.offset)
                break
            flow = flows[key] = _Flow(count, _client(tcp))
            count += 1
        direction = Direction.TO_SERVER if tcp.source == flow.client else Direction.TO_CLIENT
        half = flow.halves[direction]
        if tcp.syn:
            half.start((tcp.sequence + 1) % _SEQUENCES)
        if tcp.data:
            sequence = (tcp.sequence + tcp.syn) % _SEQUENCES
            yield from half.feed(time, sequence, _Held(tcp.data, packet.offset + tcp.at))
        half.finished |= tcp.fin
        if tcp.reset or all(h.finished for h in flow.halves.values()):
            yield from flows.pop(key).end(time)
    for flow in flows.values():
        yield from flow.end(time)


def _client(tcp: Tcp) -> tuple[bytes, int]:
    """Who opened the connection: its SYN says so; without one, the side with the higher port."""
    if tcp.syn:
        return tcp.target if tcp.ack else tcp.source
    return max(tcp.source, tcp.target, key=lambda end: end[1])
