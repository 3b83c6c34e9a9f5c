"""The two checksums, against other people's code and published values."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from itertools import pairwise

import crc32c as package
import numpy as np
import pytest
import xxhash

from lynxproto.codecs._library import ISAS, ffi, instruction_set, lib, select_instruction_set
from lynxproto.digest import Sums, checksums, crc32c
from lynxproto.errors import CodecError

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


def words_of(length: int) -> memoryview:
    return memoryview(bytearray(np.random.default_rng(length).integers(0, 256, length, np.uint8).tobytes()))


def check(sums: Sums) -> None:
    assert sums.crc == package.crc32c(sums.data)
    assert sums.digest() == xxhash.xxh3_128(sums.data).digest()


def test_sums_of_every_length(isa: str) -> None:
    for length in [*range(241, 2200), 16 << 10, (16 << 10) + 1, (17 << 10) - 1, 100_000]:
        sums = Sums(words_of(length))
        sums.add(length)
        check(sums)


def test_sums_while_memory_fills(isa: str) -> None:
    rng = np.random.default_rng(3)
    for length in (241, 1024, 1025, 2048, 50_000, 300_000):
        for _ in range(20):
            words = words_of(length)
            memory = memoryview(bytearray(b"\xff" * length))
            sums = Sums(memory)
            for first, last in pairwise([0, *sorted(rng.integers(0, length, 6).tolist()), length]):
                memory[first:last] = words[first:last]
                sums.add(last)
            check(sums)


def test_a_digest_before_the_end_is_refused(isa: str) -> None:
    sums = Sums(words_of(5000))
    sums.add(4999)
    with pytest.raises(CodecError):
        sums.digest()
    short = Sums(words_of(240))
    short.add(240)
    assert short.crc == package.crc32c(short.data)
    with pytest.raises(CodecError):
        short.digest()


def test_checksums_of_short_and_long_words() -> None:
    for length in (1, 240, 4096, (64 << 10) - 1, 64 << 10, 1 << 20):
        words = words_of(length)
        assert checksums(words) == (package.crc32c(words), xxhash.xxh3_128(words).digest())


def test_sums_from_a_socket(isa: str) -> None:
    words = words_of(700_001)
    left, right = socket.socketpair()
    with left, right:
        left.setblocking(False)
        sums = Sums(memoryview(bytearray(words.nbytes)))
        with pytest.raises(BlockingIOError):
            sums.receive(right.fileno())
        at = 0
        while sums.there < words.nbytes:
            at += left.send(words[at : at + 100_000])
            before = sums.there
            assert sums.receive(right.fileno()) == sums.there - before > 0
        assert sums.data == words
        check(sums)
        more = Sums(memoryview(bytearray(1000)))
        left.send(words[:300])
        left.close()
        assert (more.receive(right.fileno()), more.receive(right.fileno())) == (300, 0)
    with pytest.raises(OSError, match="descriptor"):
        more.receive(-1)
