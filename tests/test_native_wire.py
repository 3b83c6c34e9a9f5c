"""The C readers of frames, manifests, plans and captures: the vectors, and what Python makes of the same bytes."""

from __future__ import annotations

from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto import _cbor, frames
from lynxproto._native import ffi, lib
from lynxproto.chunk import DTYPES, PARTS, ChunkSpec, Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.codecs.bitplane import Bitplane
from lynxproto.codecs.hq import HQ
from lynxproto.config import Limits
from lynxproto.conformance.vectors import Case, default_vectors, load
from lynxproto.errors import LynxError, ProtocolError
from lynxproto.frames import End, FrameType, Header, Plan, TileKey
from lynxproto.manifest import Identity, LayerSpec, Manifest

CASES = load(default_vectors())
#: Errors of the library, and the wire's codes.
CODES = {
    lib.LYNX_ERR_PROTOCOL: 2, lib.LYNX_ERR_VERSION: 3, lib.LYNX_ERR_FRAME: 4, lib.LYNX_ERR_TOO_LARGE: 5,
    lib.LYNX_ERR_CRITICAL: 6, lib.LYNX_ERR_LIMIT: 11,
}  # fmt: skip
CHUNK_FIELDS = (
    "layer",
    "part",
    "level",
    "attempt",
    "head_start",
    "heads",
    "token_start",
    "token_stop",
    "codec_id",
    "codec",
)


class Refused(Exception):
    """An error of the library."""


def check(code: int) -> int:
    if 0 < code < lib.LYNX_STORED:
        raise Refused(code)
    return code


def limits_of(stated: Limits) -> Any:
    limits = ffi.new("lynx_limits *")
    lib.lynx_default_limits(limits)
    for name in ("frame_bytes", "control_bytes", "layers", "tokens", "tiles", "transfer_bytes"):
        setattr(limits, name, getattr(stated, name))
    return limits


def text(value: Any) -> str:
    return bytes(ffi.buffer(value.text, value.size)).decode()


def bitmap_of(item: Any) -> str:
    if item.bitmap == ffi.NULL:
        return ""
    return bytes(ffi.buffer(item.bitmap, (item.token_stop - item.token_start + 7) // 8)).hex()


def body_of(kind: int, payload: Any, size: int, limits: Any) -> dict[str, Any] | None:
    """Of the frames that the library reads."""
    reader = ffi.new("lynx_list *")
    if kind == FrameType.PLAN:
        check(lib.lynx_plan_read(payload, size, limits, reader))
        tile, tiles, levels = ffi.new("lynx_plan_tile *"), [], []
        while check(lib.lynx_plan_next(reader, tile)) != lib.LYNX_END:
            numbers = [tile.part, tile.head_start, tile.heads, tile.token_start, tile.token_stop, tile.codec]
            tiles.append([*numbers, bitmap_of(tile)] if tile.bitmap else numbers)
            levels.append(tile.levels)
            span, bitmap = tile.token_stop - tile.token_start, bitmap_of(tile)
            assert tile.tokens == (int(bitmap, 16).bit_count() if bitmap else span)
        assert len(tiles) == reader.count
        return {"layer": reader.layer, "tiles": tiles, "levels": bytes(levels).hex()}
    if kind == FrameType.END:
        check(lib.lynx_end_read(payload, size, limits, reader))
        digest, digests = ffi.new("const uint8_t **"), []
        while check(lib.lynx_end_next(reader, digest)) != lib.LYNX_END:
            digests.append(bytes(ffi.buffer(digest[0], 16)).hex() if digest[0] else "")
        assert len(digests) == reader.count
        return {"layer": reader.layer, "digests": digests}
    return None


def read_frames(data: bytes, stated: Limits) -> dict[str, Any]:
    """As the conformance suite's operation ``frames``."""
    limits, frame, found, at = limits_of(stated), ffi.new("lynx_frame *"), [], 0
    memory = ffi.from_buffer("const uint8_t[]", data)
    try:
        while True:
            outcome = lib.lynx_frame_read(memory + at, len(data) - at, limits, frame)
            if outcome == lib.LYNX_MORE:
                assert frame.size > len(data) - at
                return {"frames": found, "rest": len(data) - at}
            if outcome != lib.LYNX_ERR_CRC:
                check(outcome)
            one: dict[str, Any] = {"type": frame.type, "flags": frame.flags, "payload_length": frame.payload_length}
            one["transfer"] = bytes(frame.transfer).hex()
            if frame.type == FrameType.DATA:
                one |= {name: getattr(frame, name) for name in CHUNK_FIELDS} | {"bitmap": bitmap_of(frame)}
            if frame.type < 0x8000:
                one["payload_intact"] = outcome == lib.LYNX_OK
                body = (
                    body_of(frame.type, frame.payload, frame.payload_length, limits) if outcome == lib.LYNX_OK else None
                )
                if body is not None:
                    one["body"] = body
            found.append(one)
            at += frame.size
    except Refused as refused:
        return {"code": CODES[refused.args[0]], "offset": at}


def manifest_of(data: bytes, stated: Limits, *, is_open: bool = False) -> Any:
    """The manifest and its layers."""
    manifest = ffi.new("lynx_manifest *")
    memory = ffi.from_buffer("const uint8_t[]", data)
    read = lib.lynx_open_read if is_open else lib.lynx_manifest_read
    check(read(memory, len(data), limits_of(stated), manifest))
    layers = ffi.new("lynx_layer[]", manifest.layers)
    check(lib.lynx_manifest_layers(manifest, layers))
    return manifest, layers, memory


def as_python(manifest: Any, layers: Any) -> dict[str, Any]:
    """What the library understands of a manifest, in the form of the vectors."""
    identity = {name: text(getattr(manifest, name)) for name in Identity.__dataclass_fields__}
    return {
        "identity": {name: value for name, value in identity.items() if value or name == "model"},
        "dtype": list(DTYPES)[manifest.dtype],
        "layers": [
            {
                "index": layer.index, "kv_heads": layer.kv_heads, "key_dim": layer.key_dim,
                "value_dim": layer.value_dim, "tokens": [layer.token_start, layer.token_stop], "kind": text(layer.kind),
                "parts": {part for i, part in enumerate(PARTS) if layer.parts >> i & 1}, "head_start": layer.head_start,
            }
            for layer in layers
        ],
        "prompt_tokens": manifest.prompt_tokens, "layout": text(manifest.layout), "packing": text(manifest.packing),
        "request_id": text(manifest.request_id), "shard": [manifest.shard_index, manifest.shard_count],
        "lossy": bool(manifest.lossy),
    }  # fmt: skip


def name(case: Case) -> str:
    return case.address


def ours(case: Case) -> bool:
    whole = case.file == "headers" or case.section.endswith(("PLAN", "END", "OPEN"))
    return case.op == "frames" and whole


@pytest.mark.parametrize("case", [case for case in CASES if ours(case)], ids=name)
def test_frames_of_the_vectors(case: Case) -> None:
    data = bytes.fromhex(case.input["data"])
    stated = Limits(**case.input.get("limits", {}))
    found = read_frames(data, stated)
    if case.section.endswith("OPEN"):
        header = Header.unpack(data[:64])
        if "code" in case.expected:
            with pytest.raises(Refused):
                manifest_of(data[64 : 64 + header.payload_length], stated, is_open=True)
            return
    for frame in case.expected.get("frames", []):
        if frame["type"] not in (FrameType.PLAN, FrameType.END):
            frame.pop("body", None)
    assert found == case.expected


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "manifest"], ids=name)
def test_manifests_of_the_vectors(case: Case) -> None:
    data, stated = bytes.fromhex(case.input["data"]), Limits(**case.input.get("limits", {}))
    if "code" in case.expected:
        with pytest.raises(Refused) as refused:
            manifest_of(data, stated)
        assert CODES[refused.value.args[0]] == case.expected["code"]
        return
    manifest, layers, _ = manifest_of(data, stated)
    expected = case.expected["manifest"]
    found = as_python(manifest, layers)
    for layer in expected["layers"]:
        layer["parts"] = set(layer["parts"])
    assert (manifest.codecs, manifest.tables) == (len(expected.pop("codecs")), len(expected.pop("tables")))
    assert found == expected
    assert manifest.cache_bytes == case.expected["bytes"]
    opened = _cbor.dumps({"fetch": b"", "resume": bytes(32), "manifest": data})
    assert as_python(*manifest_of(opened, stated, is_open=True)[:2]) == found


@pytest.mark.parametrize("case", [case for case in CASES if case.op == "capture"], ids=name)
def test_captures_of_the_vectors(case: Case) -> None:
    data = bytes.fromhex(case.input["data"])
    memory, capture, record = (
        ffi.from_buffer("const uint8_t[]", data),
        ffi.new("lynx_capture *"),
        ffi.new("lynx_record *"),
    )
    outcome = lib.lynx_capture_open(memory, len(data), capture)
    streams: dict[tuple[int, int], bytes] = {}
    found = []
    while outcome == lib.LYNX_OK:
        outcome = lib.lynx_capture_next(capture, record)
        if outcome == lib.LYNX_OK:
            content = bytes(ffi.buffer(record.data, record.length))
            found.append({"data": content.hex()})
            found[-1] |= {n: getattr(record, n) for n in ("length", "kind", "direction", "time", "stripe")}
            if record.kind == lib.LYNX_RECORD_DATA:
                place = (record.stripe, record.direction)
                streams[place] = streams.get(place, b"") + content
    if "code" in case.expected:
        assert outcome == lib.LYNX_ERR_CAPTURE
        if found:
            assert capture.at == case.expected["offset"]
    else:
        assert outcome == lib.LYNX_END
        assert str(capture.start) == case.expected["start"]
        assert found == [{**item, "time": int(item["time"])} for item in case.expected["records"]]
    for (stripe, direction), content in streams.items():
        size = lib.lynx_capture_stream(capture, stripe, direction, ffi.NULL, 0)
        out = bytearray(size)
        assert lib.lynx_capture_stream(capture, stripe, direction, ffi.from_buffer("uint8_t[]", out), size) == size
        assert bytes(out) == content
        part, room = bytearray(b"\xee" * (size + 1)), size // 2
        lib.lynx_capture_stream(capture, stripe, direction, ffi.from_buffer("uint8_t[]", part), room)
        assert bytes(part) == content[:room] + b"\xee" * (size + 1 - room)


# --- what Python makes of the same bytes


TEXTS = st.text(max_size=8)
LAYERS = st.builds(
    LayerSpec, index=st.integers(0, 9), kv_heads=st.integers(1, 9), key_dim=st.integers(1, 64),
    value_dim=st.integers(1, 64), token_start=st.integers(0, 4), token_stop=st.integers(5, 40), kind=TEXTS,
    head_start=st.integers(0, 9), parts=st.lists(st.sampled_from(PARTS), unique=True, min_size=1).map(tuple),
)  # fmt: skip
MANIFESTS = st.builds(
    Manifest, identity=st.builds(Identity, model=TEXTS, revision=TEXTS, rope_hash=TEXTS), prompt_tokens=st.just(40),
    dtype=st.sampled_from(sorted(DTYPES)), layout=TEXTS, request_id=TEXTS, lossy=st.booleans(),
    layers=st.lists(LAYERS, min_size=1, max_size=3, unique_by=lambda x: x.index).map(tuple),
    codecs=st.lists(st.fixed_dictionaries({"id": TEXTS}), max_size=2).map(tuple),
    tables=st.lists(st.binary(min_size=16, max_size=16), max_size=2).map(tuple),
)  # fmt: skip
KEYS = st.sampled_from([
    "identity", "dtype", "layers", "codecs", "tables", "layout", "lossy", "!new", "new", "shard", "prompt_tokens",
])  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.floats() | TEXTS | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.integers(), inner, max_size=3), max_leaves=6,
)  # fmt: skip


def python_accepts(data: bytes) -> Manifest | None:
    try:
        return Manifest.from_bytes(data, Limits())
    except ProtocolError:
        return None


@settings(max_examples=400, deadline=None)
@given(manifest=MANIFESTS, changes=st.dictionaries(KEYS, VALUES, max_size=1), data=st.data())
def test_manifests_are_read_as_python_reads_them(
    manifest: Manifest, changes: dict[str, Any], data: st.DataObject
) -> None:
    content = cbor2.loads(manifest.to_bytes()) | changes
    encoded = cbor2.dumps(content)
    if data.draw(st.booleans()):  # a byte, anywhere
        at = data.draw(st.integers(0, len(encoded) - 1))
        encoded = encoded[:at] + bytes([data.draw(st.integers(0, 255))]) + encoded[at + data.draw(st.integers(0, 1)) :]
    expected, refusal = python_accepts(encoded), lib.LYNX_OK
    try:
        found, layers, _ = manifest_of(encoded, Limits())
    except Refused as refused:
        refusal = refused.args[0]
    if refusal != lib.LYNX_OK:
        # What Python takes and the library may refuse: texts in pieces, and keys that come twice (the last one counts).
        twice = expected is not None and len(cbor2.dumps(cbor2.loads(encoded))) < len(encoded)
        assert expected is None or twice or refusal == lib.LYNX_ERR_UNSUPPORTED
        return
    assert expected is not None
    assert found.cache_bytes == expected.nbytes
    assert found.prompt_tokens == expected.prompt_tokens
    assert [layer.index for layer in layers] == [layer.index for layer in expected.layers]
    assert text(found.model) == expected.identity.model


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_frames_are_refused_as_python_refuses_them(data: st.DataObject) -> None:
    tile = Tile(3, "value", 1, 2, TokenSet.of(data.draw(st.sets(st.integers(0, 40), min_size=1))), 0)
    body = Plan(layer=3, tiles=(TileKey.of(tile),), levels=(3,))
    said = [
        frames.control_frame(body, 7),
        frames.control_frame(End(layer=3, digests=(bytes(16), b"")), 7),
        b"".join(frames.data_frame(7, TileKey.of(tile), 1, memoryview(b"payload"), attempt=0, codec_id=3)),
    ]
    stream = bytearray(b"".join(said))
    for _ in range(data.draw(st.integers(0, 2))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    from lynxproto.conformance.subject import answer

    expected = answer({"op": "frames", "data": bytes(stream).hex()})
    expected.pop("status")
    assert read_frames(bytes(stream), Limits()) == expected


# --- codec configs


def codec_of(config: Any) -> Any:
    manifest = Manifest.for_cache(
        identity=Identity(model="m"),
        dtype="bfloat16",
        layers=1,
        kv_heads=1,
        head_dim=8,
        tokens=8,
        codecs=({"id": "x"}, config),
    )
    found, _, memory = manifest_of(manifest.to_bytes(), Limits())
    codec = ffi.new("lynx_codec *")
    check(lib.lynx_manifest_codec(found, 1, codec))
    assert lib.lynx_manifest_codec(found, 2, codec) == lib.LYNX_ERR_ARGUMENT
    check(lib.lynx_manifest_codec(found, 1, codec))
    return codec, memory


TABLES: list[Any] = [
    {"keys": [["01234567", "87654321"], ["3333", "4444"]], "values": ["34", "08"]},
    {"keys": [["0123"]], "values": ["34"]}, {"keys": [["9"]], "values": ["3"]},
    {"keys": [["01", "1"]], "values": ["33"]}, {"keys": [], "values": []},
    {"keys": [["01"]], "values": ["3"], "more": 1}, {"keys": [["01"]]},
    {"keys": [["01"]], "values": [3]}, {"keys": ["01"], "values": ["33"]}, "other", 3,
]  # fmt: skip
CONFIGS: list[dict[str, Any]] = [
    {"id": "raw"}, {"id": "raw", "zstd": 3}, {"id": "raw", "zstd": 20}, {"id": "raw", "level": 1},
    {"id": "raw", "!x": 1}, {"id": "bitplane"}, {"id": "bitplane", "planes": [9, 7], "zstd": 19},
    {"id": "bitplane", "planes": [4, 4, 8]}, {"id": "bitplane", "planes": [1] * 8},
    {"id": "bitplane", "planes": [9, 6]}, {"id": "bitplane", "planes": [16, 0]},
    {"id": "bitplane", "planes": [1.0, 15]}, {"id": "bitplane", "planes": "97"},
    {"id": "bitplane", "planes": []}, {"id": "hq"}, {"id": "hq", "key_bits": 3.5}, {"id": "hq", "key_bits": 3.0},
    {"id": "hq", "key_bits": 3.15, "value_bits": 3, "widths": "ranges", "fold": False, "scaling": True, "levels": 3},
    {"id": "hq", "key_bits": 7.5, "widths": "ranges"}, {"id": "hq", "value_bits": 3.5, "widths": "ranges"},
    {"id": "hq", "key_bits": 1}, {"id": "hq", "key_bits": 9}, {"id": "hq", "key_bits": float("nan")},
    {"id": "hq", "levels": 4}, {"id": "hq", "levels": 2.0}, {"id": "hq", "levels": True}, {"id": "hq", "fold": 1},
    {"id": "hq", "key_bits": 8, "value_bits": 8}, {"id": "hq", "key_bits": 8, "value_bits": 8, "levels": 2},
    {"id": "hq", "extra": None}, {"id": "zfp"}, *({"id": "hq", "widths": table, "key_bits": 4.5} for table in TABLES),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_codec_configs(config: dict[str, Any]) -> None:
    try:
        codec = get_codec(config)
    except LynxError:
        with pytest.raises(Refused) as refused:
            codec_of(config)
        assert refused.value.args[0] == lib.LYNX_ERR_UNSUPPORTED
        return
    found, _memory = codec_of(config)
    assert found.levels == codec.levels
    stated = codec.get_config()
    assert found.zstd == stated.get("zstd", 0)
    if isinstance(codec, Bitplane):
        assert list(found.planes)[: codec.levels] == stated["planes"]
    if not isinstance(codec, HQ):
        return
    for part in ("key", "value"):
        for layer, heads, head_start, dim in (
            (0, 1, 0, 8),
            (0, 2, 0, 8),
            (1, 1, 1, 4),
            (0, 1, 2, 8),
            (2, 1, 0, 8),
            (0, 1, 0, 9),
        ):
            spec = ChunkSpec(part, "bfloat16", heads, 70, dim, layer=layer, head_start=head_start)  # type: ignore[arg-type]  # parts
            widths, out = ffi.new("uint8_t[]", heads * dim), ffi.new("lynx_hq_config *")
            code = lib.lynx_codec_tile(found, 0, PARTS.index(part), layer, head_start, heads, 70, dim, widths, out)
            try:
                wanted = codec._job(spec)
            except LynxError:
                assert code == lib.LYNX_ERR_UNSUPPORTED
                continue
            assert code == lib.LYNX_OK
            assert (out.levels, out.fold, out.scaling) == (
                wanted.config.levels,
                wanted.config.fold,
                wanted.config.scaling,
            )
            assert (out.heads, out.tokens, out.head_dim, out.part) == (heads, 70, dim, PARTS.index(part))
            if wanted.widths is None:
                assert out.widths == ffi.NULL
                assert out.range_bits == wanted.config.range_bits
            else:
                assert np.array_equal(np.frombuffer(ffi.buffer(widths), np.uint8).reshape(heads, dim), wanted.widths)
    assert lib.lynx_codec_tile(found, 2, 0, 0, 0, 1, 1, 1, ffi.NULL, ffi.NULL) == lib.LYNX_ERR_UNSUPPORTED


def test_texts_in_pieces_are_named() -> None:
    encoded = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=1, head_dim=8, tokens=8
    ).to_bytes()
    pieces = encoded.replace(b"\x68bfloat16", b"\x7f\x64bflo\x64at16\xff")
    assert python_accepts(pieces) == python_accepts(encoded) is not None
    with pytest.raises(Refused) as refused:
        manifest_of(pieces, Limits())
    assert refused.value.args[0] == lib.LYNX_ERR_UNSUPPORTED


def test_deep_nesting_is_refused() -> None:
    for depth in (16, 17, 100_000):
        value: bytes = b"\x81" * (depth - 1) + b"\x80"
        manifest = Manifest.for_cache(
            identity=Identity(model="m"), dtype="uint8", layers=1, kv_heads=1, head_dim=8, tokens=8
        )
        plain = manifest.to_bytes()
        encoded = bytes([plain[0] + 1]) + b"\x63new" + value + plain[1:]
        if depth == 16:
            assert python_accepts(encoded) is not None
            manifest_of(encoded, Limits())
        else:
            assert depth > 1000 or python_accepts(encoded) is None
            with pytest.raises(Refused):
                manifest_of(encoded, Limits())
