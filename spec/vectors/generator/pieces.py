"""How a file of vectors is put together, and bytes that every kind of vector needs."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from lynxproto import _cbor
from lynxproto.conformance.plain import plain
from lynxproto.conformance.vectors import FORMAT
from lynxproto.digest import crc32c
from lynxproto.frames import HEADER_FIELDS

#: A transfer id that shows the order of its bytes.
TRANSFER = bytes(range(1, 17))


class File:
    """One file of vectors. Groups and tests keep the order in which they are added."""

    def __init__(self, name: str, title: str, notes: dict[str, str]) -> None:
        self.name = name
        self._title = title
        self._notes = notes
        self._groups: list[dict[str, Any]] = []
        self._used: set[str] = set()
        self._count = 0

    def group(self, op: str, section: str) -> File:
        """What follows uses ``op`` and follows from ``section``."""
        self._groups.append({"op": op, "section": section, "tests": []})
        return self

    def add(self, result: str, comment: str, input_: dict[str, Any], expected: dict[str, Any], *flags: str) -> None:
        """One test."""
        unknown = set(flags) - set(self._notes)
        assert not unknown, f"{self.name}: no note explains {unknown}"
        self._used |= set(flags)
        self._count += 1
        self._groups[-1]["tests"].append(
            {
                "tcId": self._count,
                "comment": comment,
                "flags": list(flags),
                "result": result,
                "input": plain(input_),
                "expected": plain(expected),
            }
        )

    def valid(self, comment: str, input_: dict[str, Any], expected: dict[str, Any], *flags: str) -> None:
        """The program must answer with ``expected``."""
        self.add("valid", comment, input_, expected, *flags)

    def invalid(self, comment: str, input_: dict[str, Any], code: int, *flags: str, **expected: Any) -> None:
        """The program must refuse with this error code."""
        self.add("invalid", comment, input_, {"code": int(code), **expected}, *flags)

    def write(self, folder: Path) -> None:
        """Write the file."""
        content = {
            "format": FORMAT,
            "wireVersion": 1,
            "status": "draft",
            "title": self._title,
            "generator": "spec/vectors/generator",
            "numberOfTests": self._count,
            "notes": {flag: self._notes[flag] for flag in sorted(self._used)},
            "groups": [group for group in self._groups if group["tests"]],
        }
        text = json.dumps(content, indent=1, ensure_ascii=True) + "\n"
        (folder / f"{self.name}.json").write_text(text)


def rng(*seed: Any) -> Random:
    """Numbers that depend on ``seed`` alone. Use ``random()`` and ``getrandbits()``, whose streams never change."""
    return Random("/".join(map(str, seed)))


def header(kind: int, payload: bytes = b"", extension: bytes = b"", *, crc: int | None = None, **given: Any) -> bytes:
    """64 bytes, by the table of spec/wire-format.md; any field may be given, also wrongly. ``crc``: the header's."""
    values: dict[str, Any] = {name: 0 for name, _ in HEADER_FIELDS}
    values |= {"magic": b"\xabLYX", "version": 1, "header_length": 8, "type": kind, "transfer": TRANSFER}
    values |= {"payload_length": len(payload), "payload_crc": crc32c(payload), "extension_length": len(extension)}
    values |= given
    head = struct.pack("<" + "".join(code for _, code in HEADER_FIELDS), *values.values())[:60]
    return head + (crc32c(head) if crc is None else crc).to_bytes(4, "little")


def frame(kind: int, payload: bytes = b"", extension: bytes = b"", **given: Any) -> bytes:
    """A whole frame."""
    return header(kind, payload, extension, **given) + extension + payload


def control(kind: int, body: dict[str, Any], **given: Any) -> bytes:
    """A control frame with this map."""
    return frame(kind, _cbor.dumps(body), **given)


def data_frame(payload: bytes, bitmap: bytes = b"", **given: Any) -> bytes:
    """A DATA frame: of the keys of layer 3, heads 2 and 3, tokens 16 to 31, unless given otherwise."""
    extension = bitmap + crc32c(bitmap).to_bytes(4, "little") if bitmap else b""
    fields = {"layer": 3, "head_start": 2, "heads": 2, "token_start": 16, "token_stop": 32, "codec_id": 1}
    return frame(9, payload, extension, **{**fields, **given})
