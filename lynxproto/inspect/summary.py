"""What a whole source amounts to: bytes by type, level and layer, order, times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from lynxproto.capture import Direction
from lynxproto.config import MAX_LEVELS
from lynxproto.inspect.jsonl import fault_object
from lynxproto.inspect.model import Fault, Frame, type_name
from lynxproto.inspect.order import Novelty, Order, Tally, Transfer
from lynxproto.inspect.timeline import Timeline

__all__ = ["SCHEMA", "Layer", "Summary"]

SCHEMA: Final = "lynxproto.inspect.summary/1"
_MAX_LAYERS: Final = 1 << 12
_MAX_FAULTS: Final = 1000


class Layer:
    """Payload bytes of a layer by level, each chunk once, and the uncompressed bytes of its tiles."""

    __slots__ = ("levels", "uncompressed")

    def __init__(self) -> None:
        self.levels = [0] * MAX_LEVELS
        self.uncompressed = 0


class Summary:
    """Feed it frames and faults in order. Times are nanoseconds since the source began."""

    def __init__(self) -> None:
        self.frames = 0
        self.bytes = 0
        """With headers."""
        self.types: dict[str, Tally] = {}
        """Bytes here are with headers."""
        self.directions = dict.fromkeys(Direction, 0)
        self.checksums: Counter[str] = Counter()
        self.levels = [Tally() for _ in range(MAX_LEVELS)]
        """Each chunk once."""
        self.layers: dict[int, Layer] = {}
        self.uncompressed = 0
        self.data_headers = 0
        self.stripes: set[int] = set()
        self.order = Order()
        self.timeline = Timeline()
        self.faults: list[Fault] = []
        """The first of them."""
        self.fault_count = 0
        self.start: int | None = None
        self.stop = 0

    def add(self, one: Frame | Fault) -> None:
        """One more."""
        if self.start is None:
            self.start = one.start if isinstance(one, Frame) else one.time
        self.stop = max(self.stop, one.time)
        if isinstance(one, Fault):
            self._fault(one)
            return
        size = one.overhead + one.size
        self.frames += 1
        self.bytes += size
        name = type_name(one.header.type) if one.header.known else "unknown"
        tally = self.types.setdefault(name, Tally())
        tally.add(size)
        self.directions[one.direction] += size
        self.checksums[one.checksum] += 1
        if len(self.stripes) < _MAX_LAYERS:
            self.stripes.add(one.stripe)
        if one.problem:
            reason = f"frame {one.number}: {one.problem}"
            self._fault(Fault(one.time, reason, one.stripe, one.direction, one.offset, one.stream_offset))
        if one.is_data:
            self._data(one, size)
        else:
            self.timeline.control_frame(one.time - self.start, size)
            self.order.control(one)

    @property
    def seconds(self) -> float:
        """From the first frame to the last."""
        return (self.stop - (self.start or 0)) / 1e9

    def _fault(self, fault: Fault) -> None:
        self.fault_count += 1
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(fault)

    def _data(self, frame: Frame, size: int) -> None:
        h = frame.header
        self.data_headers += frame.overhead
        zero = self.start or 0
        self.timeline.data(max(0, frame.start - zero), frame.time - zero, h.level, h.layer, size)
        novelty = self.order.data(frame)
        if novelty is Novelty.REPEAT or h.level >= MAX_LEVELS:
            return
        self.levels[h.level].add(frame.size)
        layer = self.layers.get(h.layer)
        if layer is None:
            if len(self.layers) >= _MAX_LAYERS:
                return
            layer = self.layers[h.layer] = Layer()
        layer.levels[h.level] += frame.size
        if novelty is Novelty.TILE and frame.uncompressed:
            layer.uncompressed += frame.uncompressed
            self.uncompressed += frame.uncompressed

    def top_level(self) -> int:
        """The highest level that was seen."""
        return max((level for level, tally in enumerate(self.levels) if tally.frames), default=-1)

    def as_object(self) -> dict[str, Any]:
        """The summary as JSON; docs/inspect.md lists the keys."""
        order, top = self.order, self.top_level() + 1

        def tally(t: Tally) -> dict[str, int]:
            return {"frames": t.frames, "bytes": t.bytes}

        def ratio(nbytes: int, of: int) -> float | None:
            return round(nbytes / of, 6) if of else None

        return {
            "schema": SCHEMA,
            "frames": self.frames,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "stripes": len(self.stripes),
            "directions": {
                "to-server": self.directions[Direction.TO_SERVER],
                "to-client": self.directions[Direction.TO_CLIENT],
            },
            "checksums": {state: self.checksums[state] for state in ("ok", "bad", "cut")},
            "types": {name: tally(t) for name, t in sorted(self.types.items())},
            "uncompressed": self.uncompressed,
            "data_header_bytes": self.data_headers,
            "levels": [
                {"level": n, "chunks": t.frames, "bytes": t.bytes, "ratio": ratio(t.bytes, self.uncompressed)}
                for n, t in enumerate(self.levels[:top])
            ],
            "layers": [
                {
                    "layer": n,
                    "uncompressed": layer.uncompressed,
                    "bytes": layer.levels[:top],
                    "ratio": ratio(sum(layer.levels), layer.uncompressed),
                }
                for n, layer in sorted(self.layers.items())
            ],
            "transfers": [self._transfer_object(transfer, ratio) for transfer in order.transfers.values()],
            "inversions": tally(order.inversions),
            "contended": tally(order.contended),
            "layer_inversions": tally(order.layer_inversions),
            "duplicates": tally(order.duplicates),
            "resends": tally(order.resends),
            "nacked_chunks": order.nacks,
            "missing_chunks": sum(transfer.missing() for transfer in order.transfers.values()),
            "longest_silence": {"seconds": order.silence[0] / 1e9, "until": order.silence[1] / 1e9},
            "untracked_frames": order.untracked,
            "timeline": {
                "bin_seconds": self.timeline.width / 1e9,
                "control": self.timeline.control[: self.timeline.used],
                "levels": {str(n): row[: self.timeline.used] for n, row in sorted(self.timeline.levels.items())},
            },
            "fault_count": self.fault_count,
            "faults": [fault_object(fault) for fault in self.faults],
        }

    @staticmethod
    def _transfer_object(t: Transfer, ratio: Callable[[int, int], float | None]) -> dict[str, Any]:
        def when(time: int | None) -> float | None:
            return None if time is None else time / 1e9

        total = sum(level.bytes for level in t.levels)
        return {
            "transfer": f"{t.id:032x}",
            "name": t.name,
            "outcome": t.outcome,
            "opened": when(t.opened),
            "accepted": when(t.accepted),
            "result": when(t.result),
            "closed": when(t.closed),
            "uncompressed": t.uncompressed,
            "bytes": total,
            "ratio": ratio(total, t.uncompressed),
            "levels": [
                {
                    "level": n,
                    "planned": t.planned(n),
                    "chunks": level.frames,
                    "bytes": level.bytes,
                    "last": when(t.last[n]),
                }
                for n, level in enumerate(t.levels)
                if level.frames or t.planned(n)
            ],
            "missing": t.missing(),
        }
