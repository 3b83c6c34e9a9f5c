"""Side files: canonical JSON with the xxh3-128 of its fields, read whole and written whole."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import xxhash

from lynxproto.errors import LynxError

__all__ = ["SideFile", "digest", "pack", "unpack"]


def digest(fields: Mapping[str, Any]) -> bytes:
    """xxh3-128 of the canonical JSON of ``fields``."""
    return xxhash.xxh3_128_digest(_json(fields))


def pack(fields: Mapping[str, Any]) -> bytes:
    """Canonical JSON (sorted keys, no spaces, a line feed at the end) with the field ``xxh3_128``, of the others."""
    return _json({**fields, "xxh3_128": digest(fields).hex()}) + b"\n"


def unpack(data: bytes, kind: type[SideFile]) -> tuple[dict[str, Any], bool]:
    """The fields of :func:`pack`'s form, and whether their hash is right. Raises the error of ``kind``."""
    if len(data) > kind.MAX_BYTES:
        raise kind.ERROR(f"larger than {kind.MAX_BYTES} bytes: not a {kind.WHAT}")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise kind.ERROR(f"not JSON ({error})") from error
    if not isinstance(fields, dict) or fields.get("format") != kind.FORMAT:
        raise kind.ERROR(f"not a {kind.WHAT}: format is not {kind.FORMAT!r}; make one with `lynxproto {kind.COMMAND}`")
    stated = fields.pop("xxh3_128", None)
    return fields, stated == digest(fields).hex()


class SideFile(ABC):
    """Something that is kept in such a file; ``COMMAND`` makes it."""

    __slots__ = ()
    FORMAT: ClassVar[str]
    WHAT: ClassVar[str]
    COMMAND: ClassVar[str]
    MAX_BYTES: ClassVar[int]
    ERROR: ClassVar[type[LynxError]]

    @abstractmethod
    def to_bytes(self) -> bytes:
        """The file's content."""

    @classmethod
    @abstractmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode and check :meth:`to_bytes`' form."""

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all. Raises the class's ``ERROR``."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.part")
        try:
            temporary.write_bytes(self.to_bytes())
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self.ERROR(f"cannot write {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read and check a file. Raises the class's ``ERROR``."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                data = file.read(cls.MAX_BYTES + 1)
        except OSError as error:
            raise cls.ERROR(f"cannot read {path}: {error.strerror or error}") from error
        try:
            return cls.from_bytes(data)
        except cls.ERROR as error:
            raise cls.ERROR(f"{path}: {error}") from error


def _json(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, separators=(",", ":"), sort_keys=True).encode()
