"""The two checksums, against other people's code and published values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import crc32c as package
import numpy as np
import pytest

from lynxproto.codecs._library import ISAS, ffi, instruction_set, lib, select_instruction_set
from lynxproto.digest import crc32c

#: RFC 3720, appendix B.4, as integers.
PUBLISHED = [
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
]


@pytest.fixture(params=sorted(ISAS))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = instruction_set()
    if lib.lynx_isa_select(ISAS[request.param]) != 0:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    select_instruction_set(before)


def native(data: bytes | memoryview, value: int = 0) -> int:
    found: int = lib.lynx_crc32c(value, ffi.from_buffer(data), len(data))
    return found


def test_published_values(isa: str) -> None:
    for data, crc in PUBLISHED:
        assert native(data) == crc32c(data) == crc


def test_every_length_and_alignment(isa: str) -> None:
    data = memoryview(np.random.default_rng(0).integers(0, 256, 5000, np.uint8).tobytes())
    for length in [*range(1200), *range(4000, 4100), 4900]:
        for start in (0, 1, 7, 33):
            piece = data[start : start + length]
            assert native(piece) == package.crc32c(piece), (start, length)


def test_pieces_add_up(isa: str) -> None:
    data = np.random.default_rng(1).integers(0, 256, 300_000, np.uint8).tobytes()
    rng = np.random.default_rng(2)
    for _ in range(20):
        cuts = [0, *sorted(rng.integers(0, len(data), 5).tolist()), len(data)]
        crc = mine = 0
        for first, last in pairwise(cuts):
            crc = crc32c(memoryview(data)[first:last], crc)
            mine = native(memoryview(data)[first:last], mine)
        assert crc == mine == package.crc32c(data)
