"""Values of the protocol as plain JSON, and back. spec/conformance.md, "Values"."""

from __future__ import annotations

from typing import Any

__all__ = ["plain", "unhex"]

_EXACT = 1 << 53  # JSON readers with binary64 numbers keep integers below it


def plain(value: Any) -> Any:
    """Bytes become hexadecimal text, integers that binary64 may not hold become decimal text, tuples become lists."""
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if type(value) is int and not -_EXACT < value < _EXACT:
        return str(value)
    return value


def unhex(text: str) -> bytes:
    """The bytes of hexadecimal text."""
    return bytes.fromhex(text)
