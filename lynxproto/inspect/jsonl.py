"""Frames and faults as JSON objects; docs/inspect.md lists the keys. Bytes are hexadecimal text."""

from __future__ import annotations

import json
import math
from typing import Any, Final

from lynxproto import _cbor
from lynxproto.capture import Direction
from lynxproto.errors import LynxError
from lynxproto.frames import FrameType, Open
from lynxproto.inspect.annotate import Field
from lynxproto.inspect.model import Fault, Frame, type_name
from lynxproto.inspect.table import part_name

__all__ = ["SCHEMA", "dumps", "fault_object", "field_object", "frame_object"]

SCHEMA: Final = "lynxproto.inspect/1"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such numbers
    return value


def _direction(direction: Direction | None) -> str | None:
    return None if direction is None else "to-server" if direction == Direction.TO_SERVER else "to-client"


def frame_object(frame: Frame) -> dict[str, Any]:
    """One frame."""
    h = frame.header
    found: dict[str, Any] = {
        "frame": frame.number,
        "time": frame.time / 1e9,
        "start": frame.start / 1e9,
        "stripe": frame.stripe,
        "direction": _direction(frame.direction),
        "type": type_name(h.type),
        "transfer": f"{h.transfer:032x}" if h.transfer else None,
        "flags": h.flags,
        "offset": frame.offset,
        "stream_offset": frame.stream_offset,
        "header_size": frame.overhead,
        "size": h.payload_length,
        "checksum": frame.checksum,
    }
    if h.type == FrameType.DATA:
        ratio = frame.ratio
        found |= {
            "layer": h.layer,
            "part": part_name(h.part),
            "level": h.level,
            "attempt": h.attempt,
            "heads": [h.head_start, h.head_start + h.heads],
            "tokens": [h.token_start, h.token_stop],
            "token_count": frame.tokens,
            "codec": frame.codec,
            "codec_id": h.codec_id,
            "uncompressed": frame.uncompressed,
            "ratio": None if ratio is None else round(ratio, 6),
        }
    elif frame.body is not None:
        body = _cbor.loads(frame.payload, type_name(h.type)).raw
        if isinstance(frame.body, Open):
            try:
                body["manifest"] = _cbor.loads(frame.body.manifest, "manifest").raw
            except LynxError:  # the frame's problem says so; its bytes are shown as they are
                pass
        found["body"] = _plain(body)
    if frame.problem:
        found["problem"] = frame.problem
    return found


def field_object(field: Field) -> dict[str, Any]:
    """One field of a frame."""
    return {
        "offset": field.offset,
        "bytes": field.raw.hex(),
        "name": field.name,
        "value": _plain(field.value),
        "text": field.text,
        "section": field.section,
    }


def fault_object(fault: Fault) -> dict[str, Any]:
    """One fault that belongs to no frame."""
    return {
        "fault": fault.reason,
        "time": fault.time / 1e9,
        "stripe": fault.stripe,
        "direction": _direction(fault.direction),
        "offset": fault.offset,
        "stream_offset": fault.stream_offset,
    }


def dumps(value: Any) -> str:
    """One line."""
    return json.dumps(value, separators=(",", ":"))
