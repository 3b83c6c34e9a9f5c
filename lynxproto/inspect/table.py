"""Frames as lines of a table for people."""

from __future__ import annotations

from typing import Final

from lynxproto.capture import Direction
from lynxproto.chunk import PARTS
from lynxproto.frames import FrameType
from lynxproto.inspect.model import Fault, Frame, type_name

__all__ = ["HEADING", "arrow", "fault_line", "frame_lines", "part_name", "seconds"]

_COLUMNS: Final = "{:>7} {:>11} {:>3} {:<3} {:<9} {:<8} {:>5} {:<9} {:>5} {:>7} {:>13} {:<8} {:>9} {:>5} {:<3}  {}"
HEADING: Final = _COLUMNS.format(
    "#", "time", "str", "dir", "type", "transfer", "layer", "part", "level", "heads", "tokens", "codec", "size",
    "ratio", "sum", "what it says",
)  # fmt: skip

_RED, _YELLOW, _DIM, _RESET = "\x1b[31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
#: Colours of levels: the anchor stands out, residuals fade.
_LEVELS: Final = ("\x1b[32m", "\x1b[36m", "\x1b[34m", "\x1b[35m")
_NOTABLE: Final = {FrameType.ERROR, FrameType.GOAWAY, FrameType.REJECT, FrameType.NACK, FrameType.CANCEL}


def seconds(time: int) -> str:
    """Nanoseconds as seconds with microseconds."""
    return f"{time / 1e9:.6f}"


def arrow(direction: Direction | None) -> str:
    """``->``: to the server, that is the side which did not open the stripe."""
    return "" if direction is None else "->" if direction == Direction.TO_SERVER else "<-"


def part_name(part: int) -> str:
    """``key``, ``value``..., or the number of a part that version 1 does not define."""
    return PARTS[part] if part < len(PARTS) else str(part)


def frame_lines(frame: Frame, *, colour: bool) -> str:
    """The frame's line, and below it what is wrong with it."""
    h = frame.header
    kind = type_name(h.type)
    transfer = f"{h.transfer >> 96:08x}" if h.transfer else ""
    checksum = frame.checksum if frame.checksum == "ok" else frame.checksum.upper()
    if frame.is_data:
        ratio = frame.ratio
        line = _COLUMNS.format(
            frame.number, seconds(frame.time), frame.stripe, arrow(frame.direction), kind, transfer, h.layer,
            part_name(h.part), f"{h.level}{'+' if h.attempt else ''}", f"{h.head_start}-{h.head_start + h.heads - 1}",
            f"{h.token_start}-{h.token_stop - 1}{'*' if h.extension_length else ''}", frame.codec, h.payload_length,
            "" if ratio is None else f"{ratio:.3f}", checksum, frame.note,
        )  # fmt: skip
    else:
        layer = frame.layer
        line = _COLUMNS.format(
            frame.number, seconds(frame.time), frame.stripe, arrow(frame.direction), kind, transfer,
            "" if layer is None else layer, "", "", "", "", "", h.payload_length, "", checksum, frame.note,
        )  # fmt: skip
    line = line.rstrip()
    if colour:
        if frame.is_data:
            line = _LEVELS[min(h.level, len(_LEVELS) - 1)] + line + _RESET
        else:
            line = (_YELLOW if h.type in _NOTABLE else _DIM) + line + _RESET
    if frame.problem:
        where = "" if frame.offset is None else f" at offset {frame.offset}"
        problem = f"        ! frame {frame.number}{where}: {frame.problem}"
        line += "\n" + (f"{_RED}{problem}{_RESET}" if colour else problem)
    return line


def fault_line(fault: Fault, *, colour: bool) -> str:
    """One line about a fault."""
    where = "" if fault.offset is None else f"offset {fault.offset}: "
    stream = ""
    if fault.stripe is not None:
        stream = f" (stripe {fault.stripe} {arrow(fault.direction)}, byte {fault.stream_offset})"
    line = f"        ! {where}{fault.reason}{stream}"
    return f"{_RED}{line}{_RESET}" if colour else line
