"""Capture files."""

from __future__ import annotations

import struct
from typing import Any

from pieces import File

from lynxproto.digest import crc32c
from lynxproto.errors import ErrorCode

_NOTES = {"unused": "bytes that readers ignore", "cut": "the file ends early", "checksum": "a CRC32C does not match"}
_START = 1_700_000_000_000_000_000


def _file(
    magic: bytes = b"\x89LYNX\r\n\x1a", version: int = 1, size: int = 32, flags: int = 0, reserved: int = 0
) -> bytes:
    head = struct.pack("<8sHHIQI", magic, version, size, flags, _START, reserved)
    return head + crc32c(head).to_bytes(4, "little")


def _record(data: bytes, kind: int = 0, direction: int = 0, when: int = 0, stripe: int = 0, reserved: int = 0) -> bytes:
    head = struct.pack("<IBBHQI", len(data), kind, direction, reserved, when, stripe)
    return head + crc32c(head).to_bytes(4, "little") + data


def _told(data: bytes, kind: int = 0, direction: int = 0, when: int = 0, stripe: int = 0) -> dict[str, Any]:
    return {"length": len(data), "kind": kind, "direction": direction, "time": when, "stripe": stripe, "data": data}


def captures() -> File:
    f = File("captures", "Capture files", _NOTES)
    f.group("capture", "capture.md")
    example = _file() + _record(b"", 1) + _record(b"abc", when=1_000_000) + _record(b"", 2, when=2_000_000)
    told = [_told(b"", 1), _told(b"abc", when=1_000_000), _told(b"", 2, when=2_000_000)]

    def good(comment: str, data: bytes, records: list[Any], *flags: str) -> None:
        f.valid(comment, {"data": data}, {"start": _START, "records": records}, *flags)

    def bad(comment: str, data: bytes, offset: int, records: list[Any], *flags: str) -> None:
        f.invalid(comment, {"data": data}, ErrorCode.FRAME_CORRUPT, *flags, offset=offset, records=records)

    good("no records", _file(), [])
    good("the example of capture.md", example, told)
    good("reserved bytes are not 0", _file(reserved=7) + _record(b"x", reserved=9), [_told(b"x")], "unused")
    good("a record of an unknown kind", _file() + _record(b"xyz", 77, 1, 5, 3), [_told(b"xyz", 77, 1, 5, 3)])
    good("a record without data", _file() + _record(b""), [_told(b"")])
    good(
        "the largest numbers",
        _file() + _record(b"", 255, 1, 2**64 - 1, 2**32 - 1),
        [_told(b"", 255, 1, 2**64 - 1, 2**32 - 1)],
    )
    bad("no bytes", b"", 0, [], "cut")
    bad("half a file header", _file()[:20], 0, [], "cut")
    bad("another magic", _file(magic=b"\x89LYNX\n\x1a\n"), 0, [])
    bad("version 2", _file(version=2), 0, [])
    bad("a header of 40 bytes", _file(size=40), 0, [])
    bad("flags 1", _file(flags=1), 0, [])
    bad("wrong CRC32C of the file header", _file()[:-1] + b"\0", 0, [], "checksum")
    bad("direction 2", _file() + _record(b"a") + _record(b"b", direction=2), 57, [_told(b"a")])
    broken = bytearray(example)
    broken[32 + 24 + 2] ^= 1
    bad("wrong CRC32C of a record", bytes(broken), 56, told[:1], "checksum")
    bad("the file ends inside a record's header", example[: 32 + 24 + 10], 56, told[:1], "cut")
    bad("the file ends inside a record", example[: 32 + 24 + 24 + 2], 56, told[:1], "cut")
    huge = struct.pack("<IBBHQI", 2**32 - 1, 0, 0, 0, 0, 0)
    bad("a record of 4 GiB that is not there", _file() + huge + crc32c(huge).to_bytes(4, "little"), 32, [], "cut")
    return f
