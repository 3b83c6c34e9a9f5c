"""Frames: round trips, limits before allocation, hostile bytes."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lynxproto import frames
from lynxproto.chunk import PARTS, Tile, TokenSet
from lynxproto.config import MAX_LEVELS, Limits
from lynxproto.digest import crc32c
from lynxproto.errors import CorruptFrameError, ErrorCode, LimitError, ProtocolError, VersionError
from lynxproto.frames import HEADER_SIZE, FrameType, Header, LayerStatus, TileKey, TileStatus
from lynxproto.manifest import FetchKey, Want

LIMITS = Limits()
U16, U32 = st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)
POSITIONS = st.sets(st.integers(0, 300), min_size=1)
TILES = st.builds(
    lambda part, start, heads, tokens, codec: Tile(3, part, start, heads, TokenSet.of(tokens), codec),
    st.sampled_from(PARTS), st.integers(0, 100), st.integers(1, 100), POSITIONS, st.integers(0, 255),
)  # fmt: skip
KEYS = TILES.map(TileKey.of)
SPANS = st.none() | st.tuples(st.integers(0, 9), st.integers(10, 20))
WANTS = st.lists(
    st.builds(Want, layers=SPANS, heads=SPANS, tokens=SPANS, levels=st.none() | st.integers(1, 8)), max_size=3
).map(tuple)
CLASSES = st.tuples(*[st.integers(0, 1 << 50)] * MAX_LEVELS)
STATUS = st.builds(TileStatus, st.integers(0, 255), st.integers(0, 255), st.integers(0, 1), st.booleans())
PACKED = st.lists(STATUS, max_size=5).map(lambda tiles: b"".join(tile.pack() for tile in tiles))
LAYER = st.builds(LayerStatus, U16, st.booleans(), st.booleans(), PACKED)
HOLDINGS = {
    "layers": st.lists(LAYER, max_size=3).map(tuple),
    "result": st.booleans(),
    "level": st.integers(0, 7),
    "settled": st.integers(0, 7),
    "urgent": st.booleans(),
}
REPORT = {"code": st.sampled_from(ErrorCode), "text": st.text(max_size=50)}
NACKED = st.builds(frames.NackItem, KEYS, st.integers(0, 7), st.integers(0, 1), st.integers(1, 4))
PLANNED = st.lists(st.tuples(KEYS, st.integers(1, MAX_LEVELS)), max_size=4)
BODIES = st.one_of(
    st.builds(
        frames.Hello,
        versions=st.just((1, 3)),
        nonce=st.binary(min_size=32, max_size=32),
        stripe=U32,
        name=st.text(max_size=20),
        lease=st.floats(1, 100),
        limits=st.builds(Limits, layers=st.integers(1, 99)),
        codecs=st.just(("raw", "hq")),
        features=st.just(()),
        session=st.sampled_from([b"", b"s" * 16]),
        token=st.sampled_from([b"", b"t" * 32]),
        alive=st.lists(U16, max_size=3).map(tuple),
        secret=st.text(max_size=16),
    ),
    st.builds(frames.HelloAck, version=st.just(1), mac=st.binary(min_size=32, max_size=32)),
    st.builds(frames.Open, manifest=st.binary(min_size=1), fetch=st.none() | st.integers(1, (1 << 128) - 1)),
    st.builds(frames.Accept, wants=WANTS, credit=CLASSES, **HOLDINGS),
    st.builds(frames.Resume, wants=WANTS, **HOLDINGS),
    st.builds(frames.Ack, **HOLDINGS),
    st.builds(frames.Reject, **REPORT),
    st.builds(frames.Error, **REPORT),
    st.builds(frames.GoAway, **REPORT),
    st.builds(frames.NotFound, **REPORT),
    st.builds(
        frames.Fetch,
        key=st.builds(FetchKey, identity=st.just(b"i" * 16), blocks=st.just((b"b" * 16,)), salt=st.binary(max_size=9)),
        wants=WANTS,
        lease=st.floats(0, 100),
    ),
    PLANNED.map(
        lambda items: frames.Plan(layer=3, tiles=tuple(k for k, _ in items), levels=tuple(n for _, n in items))
    ),
    st.builds(frames.Result, first_token=U32, logit_gap=st.none() | st.floats(0, 9)),
    st.builds(frames.End, layer=U16, digests=st.lists(st.sampled_from([b"", b"d" * 16])).map(tuple)),
    st.builds(frames.Nack, items=st.lists(NACKED, max_size=3).map(tuple)),
    st.builds(frames.Credit, limits=CLASSES),
    st.builds(frames.Cancel, above=st.integers(-1, 7), **REPORT),
    st.builds(frames.Closed, level=st.integers(0, 7), end=st.booleans(), final=CLASSES, **REPORT),
    st.just(frames.Urgent()),
    st.builds(frames.Ping, id=U32, probe=st.booleans()),
    st.builds(frames.Pong, id=U32),
)


def parse(frame: bytes) -> frames.Body:
    header = Header.unpack(frame[:HEADER_SIZE])
    header.check(LIMITS)
    assert header.payload_length == len(frame) - HEADER_SIZE
    assert header.payload_crc == crc32c(frame[HEADER_SIZE:])
    return frames.parse_body(header, frame[HEADER_SIZE:], LIMITS)


@given(BODIES, st.none() | st.integers(0, 1 << 32))
def test_bodies_round_trip_with_and_without_grease(body, seed):
    grease = None if seed is None else Random(seed)
    assert parse(frames.control_frame(body, 5, grease)) == body


@given(st.lists(STATUS, max_size=9), st.lists(STATUS, max_size=9))
def test_status_says_what_changed(new, old):
    status = LayerStatus(1, True, True, b"".join(tile.pack() for tile in new))
    assert status.tiles == tuple(new)
    changed = status.changed(b"".join(tile.pack() for tile in old))
    if len(new) == len(old):
        assert changed == [i for i in range(len(new)) if new[i] != old[i]]
    else:
        assert changed == list(range(len(new)))


def test_every_type_has_a_body_but_data():
    assert {t for t in FrameType if t != FrameType.DATA} == set(frames._BODIES)


@given(TILES)
def test_tile_keys_round_trip(tile):
    key = TileKey.of(tile)
    key.check("test")
    assert key.tile() == tile
    assert TileKey.from_list(3, key.as_list(), "test") == key
    assert key.positions == (0 if tile.tokens.is_range else len(tile.tokens))


@given(TILES, st.binary(min_size=1, max_size=99), st.integers(0, 7), st.integers(0, 1))
def test_data_frames_describe_themselves(tile, payload, level, attempt):
    key = TileKey.of(tile)
    head, body = frames.data_frame(9, key, level, memoryview(payload), attempt=attempt, codec_id=0x8001)
    header = Header.unpack(head[:HEADER_SIZE])
    header.check(LIMITS)
    bitmap = frames.parse_extension(head[HEADER_SIZE:]) if header.extension_length else b""
    assert header.key(bitmap) == key
    assert (header.transfer, header.level, header.attempt, header.codec_id) == (9, level, attempt, 0x8001)
    assert body.obj is payload  # borrowed, not copied


@given(st.integers(0, HEADER_SIZE * 8 - 1))
def test_any_flipped_header_bit_is_noticed(bit):
    data = bytearray(Header(FrameType.DATA, 7, 10, heads=2, token_stop=9).pack())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptFrameError):
        Header.unpack(data)


def test_header_is_64_bytes_and_known_by_heart():
    header = Header(
        FrameType.DATA, 0x0102, 0xAABB, 0xDEADBEEF, layer=3, part=1, level=2, attempt=1, head_start=4, heads=5,
        token_start=6, token_stop=7, codec_id=8, codec=9,
    )  # fmt: skip
    expected = (
        "ab4c5958" "01" "08" "0900" "0000" "01" "02" "bbaa0000" "00000000000000000000000000000102"
        "0300" "01" "00" "0400" "0500" "06000000" "07000000" "0800" "0900" "00000000" "efbeadde"
    )  # fmt: skip
    assert header.pack()[:60].hex() == expected
    assert header.pack()[60:] == crc32c(bytes.fromhex(expected)).to_bytes(4, "little")


def test_crc32c_is_castagnoli():
    assert crc32c(b"123456789") == 0xE3069283


def test_another_version_is_a_version_error():
    data = bytearray(Header(FrameType.PING).pack())
    data[4] = 2
    data[60:] = crc32c(data[:60]).to_bytes(4, "little")
    with pytest.raises(VersionError, match="version 2"):
        Header.unpack(data)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"type": 77}, ErrorCode.UNKNOWN_CRITICAL),
        ({"flags": 0x0100}, ErrorCode.UNKNOWN_CRITICAL),
        ({"payload_length": LIMITS.frame_bytes + 1}, ErrorCode.FRAME_TOO_LARGE),
        ({"type": FrameType.PLAN, "payload_length": LIMITS.control_bytes + 1}, ErrorCode.FRAME_TOO_LARGE),
        ({"type": 0x8000, "payload_length": LIMITS.control_bytes + 1}, ErrorCode.FRAME_TOO_LARGE),
        ({"type": FrameType.PING, "extension_length": 9}, ErrorCode.PROTOCOL),
        ({"token_stop": LIMITS.tokens + 1}, ErrorCode.LIMIT),
        ({"extension_length": 1 << 31}, ErrorCode.PROTOCOL),
        ({"level": 8}, ErrorCode.PROTOCOL),
        ({"attempt": 2}, ErrorCode.PROTOCOL),
        ({"payload_length": 0}, ErrorCode.PROTOCOL),
        ({"heads": 0}, ErrorCode.PROTOCOL),
        ({"part": 5}, ErrorCode.PROTOCOL),
        ({"token_stop": 0}, ErrorCode.PROTOCOL),
    ],
)
def test_headers_are_refused_before_anything_is_allocated(change, code):
    good = Header(FrameType.DATA, 7, 10, heads=2, token_stop=9)
    good.check(LIMITS)
    with pytest.raises(ProtocolError) as caught:
        good._replace(**change).check(LIMITS)
    assert caught.value.code is code


@given(st.sampled_from([t for t in FrameType if t != FrameType.DATA]), st.binary(max_size=60))
def test_hostile_payloads_never_raise_anything_else(kind, payload):
    try:
        frames.parse_body(Header(kind), payload, LIMITS)
    except ProtocolError:
        pass


@given(BODIES, st.data())
def test_mutated_bodies_never_raise_anything_else(body, data):
    frame = bytearray(frames.control_frame(body))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(HEADER_SIZE, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        frames.parse_body(Header.unpack(frame[:HEADER_SIZE]), frame[HEADER_SIZE:], LIMITS)
    except ProtocolError:
        pass


@pytest.mark.parametrize(
    "payload",
    ["d81c80", "c249010000000000000000", "a1016161", "a0a0", "81" * 40 + "80", "bf6161", "a16161d81d00", "f7"],
    ids=["shareable", "bignum", "integer key", "trailing", "deep", "unfinished", "shared reference", "undefined"],
)
def test_cbor_is_plain_data_only(payload):
    with pytest.raises(ProtocolError):
        frames.parse_body(Header(FrameType.URGENT), bytes.fromhex(payload), LIMITS)


def test_unknown_fields_are_ignored_unless_critical():
    header = Header(FrameType.URGENT)
    assert frames.parse_body(header, bytes.fromhex("a1616101"), LIMITS) == frames.Urgent()  # {"a": 1}
    with pytest.raises(ProtocolError, match="critical") as caught:
        frames.parse_body(header, bytes.fromhex("a162216101"), LIMITS)  # {"!a": 1}
    assert caught.value.code is ErrorCode.UNKNOWN_CRITICAL


def test_grease_uses_reserved_ignorable_types():
    random = Random(1)
    for _ in range(200):
        header = Header.unpack(frames.grease_frame(random)[:HEADER_SIZE])
        header.check(LIMITS)
        assert header.type & frames.IGNORABLE_TYPE
        assert (header.type - 0x8000) % 31 == 27
        assert not header.flags & frames.CRITICAL_FLAGS


def cover(tiles: list[Tile], heads: range = range(4), tokens: range = range(10)) -> None:
    frames.check_cover("plan", [TileKey.of(tile) for tile in tiles], [0], heads, tokens)


def tile(tokens: TokenSet, head_start: int = 0, heads: int = 4) -> Tile:
    return Tile(0, "key", head_start, heads, tokens, 0)


def test_plans_cover_a_layer_exactly_once():
    evens, odds = TokenSet.of(range(0, 10, 2)), TokenSet.of(range(1, 10, 2))
    cover([tile(TokenSet.range(0, 10))])
    cover([tile(odds), tile(evens)])
    cover([tile(TokenSet.range(3, 10), 1, 3), tile(TokenSet.range(0, 3), 1, 3), tile(evens, 0, 1), tile(odds, 0, 1)])
    for bad, match in (
        ([tile(TokenSet.range(0, 9))], "up to token 9"),
        ([tile(TokenSet.range(1, 10))], "gap"),
        ([tile(TokenSet.range(0, 10)), tile(evens)], "overlap"),
        ([tile(TokenSet.range(0, 10), 0, 3)], "head 3"),
        ([tile(TokenSet.range(0, 10), 1, 4)], "outside"),
        ([tile(evens)], "gap"),
        ([], "up to token 0"),
    ):
        with pytest.raises(ProtocolError, match=match):
            cover(bad)


def test_cover_checks_are_bounded():
    many = [tile(TokenSet.of(range(i, 4096, 2)), 0, 0x7FFF) for i in (0, 1)]
    with pytest.raises(LimitError):
        cover(many, range(0x7FFF), range(4096))
