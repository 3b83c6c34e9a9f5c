"""What is used of LMCache 0.5.6's compiled module. Held to its .pyi by check_stubs.py."""

from __future__ import annotations


class Bitmap:
    def __init__(self, size: int) -> None:
        self._bits = [False] * size

    def set(self, index: int) -> None:
        self._bits[index] = True

    def test(self, index: int) -> bool:
        return self._bits[index]
