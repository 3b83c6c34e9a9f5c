"""The codecs: payloads to decode, level by level, words to encode, and payloads to refuse.

Payloads come from this repository's codecs; tests/test_codec_hq.py compares those with a decoder and an encoder that
were written from the specification alone.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import xxhash
from pieces import File, rng
from tiles import KINDS, WORD, even, noise, tile

from lynxproto.chunk import ChunkSpec, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.codecs.hq import PRESETS
from lynxproto.errors import ErrorCode, PayloadError

_NOTES = {
    "shape": "blocks, octets or bytes that are not full",
    "values": "infinities, NaN, -0, subnormals, constants, extremes",
    "stored": "the tile would grow, so its words are sent as they are",
    "size": "a payload that is too short or too long",
    "header": "a payload's own header is wrong",
    "table": "a table inside a payload contradicts it",
    "range": "a parameter or a code beyond what may occur",
    "mutated": "one byte was changed at random; what a decoder makes of it is determined all the same",
    "config": "a codec config that must be refused",
    "zstd": "needs a Zstandard decoder",
}
Shape = tuple[int, int, int]
_PAYLOAD = ErrorCode.PAYLOAD


def _spec(dtype: str, part: str, shape: Shape, layer: int = 0, head_start: int = 0) -> ChunkSpec:
    heads, tokens, dim = shape
    return ChunkSpec(
        part=part,
        dtype=dtype,
        heads=heads,
        tokens=tokens,
        head_dim=dim,
        layer=layer,
        head_start=head_start,
        token_set=TokenSet.range(0, tokens),
    )


class _Codec:
    """Cases of one configuration on one kind of tile."""

    def __init__(self, f: File, section: str, config: dict[str, Any], dtype: str, part: str, shape: Shape) -> None:
        self.f, self.section = f, section
        self.codec = get_codec(config)
        self.spec = _spec(dtype, part, shape)
        self.tile = {"codec": config, "dtype": dtype, "part": part, "shape": list(shape)}

    def encoded(self, words: bytes) -> list[bytes]:
        array = np.frombuffer(words, self.spec.word_dtype).reshape(self.spec.shape)
        return [bytes(payload) for payload in self.codec.encode(self.spec, array)]

    def decoded(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Words after each level. Raises PayloadError with the level as its second argument."""
        levels = []
        for level in range(len(payloads)):
            out = np.zeros(self.spec.shape, self.spec.word_dtype)
            try:
                self.codec.decode(self.spec, payloads[: level + 1], out)
            except PayloadError as error:
                raise PayloadError(str(error), level) from error
            levels.append(out.tobytes())
        return levels

    def both(self, comment: str, words: bytes, *flags: str, encode: bool = True) -> list[bytes]:
        """The words encoded and decoded."""
        payloads = self.encoded(words)
        levels = self.decoded(payloads)
        assert not self.codec.exact or levels[-1] == words
        self.f.group("decode", self.section).valid(
            comment, {**self.tile, "payloads": payloads}, {"levels": levels}, *flags
        )
        if encode:
            given = {**self.tile, "words": words}
            self.f.group("encode", self.section).valid(comment, given, {"payloads": payloads}, *flags)
        return payloads

    def reads(self, comment: str, payloads: Sequence[bytes], levels: Sequence[bytes], *flags: str) -> None:
        """Payloads that this encoder would not make."""
        assert self.decoded(payloads) == list(levels), comment
        self.f.group("decode", self.section).valid(
            comment, {**self.tile, "payloads": payloads}, {"levels": levels}, *flags
        )

    def refused(self, comment: str, payloads: Sequence[bytes], level: int, *flags: str, section: str = "") -> None:
        group = self.f.group("decode", section or self.section)
        group.invalid(comment, {**self.tile, "payloads": payloads}, _PAYLOAD, *flags, level=level)

    def mutated(self, payloads: list[bytes], count: int, section: str = "") -> None:
        """Payloads with one byte changed, whatever comes of it."""
        random = rng("mutated", *map(len, payloads))
        for _ in range(count):
            level = random.getrandbits(8) % len(payloads)
            changed = bytearray(payloads[level])
            at = random.getrandbits(16) % len(changed)
            changed[at] ^= 1 + random.getrandbits(8) % 255
            broken = [*payloads[:level], bytes(changed), *payloads[level + 1 :]]
            comment = f"level {level}, byte {at} is {changed[at]:#04x}"
            try:
                levels = self.decoded(broken)
            except PayloadError as error:
                self.refused(comment, broken, error.args[1], "mutated", section=section)
            else:
                given = {**self.tile, "payloads": broken}
                self.f.group("decode", section or self.section).valid(comment, given, {"levels": levels}, "mutated")


def _config(f: File, section: str, part: str, dtype: str, config: dict[str, Any], comment: str) -> None:
    given = {"codec": config, "dtype": dtype, "part": part, "shape": [1, 8, 4], "payloads": [bytes(8)]}
    f.group("decode", section).invalid(comment, given, ErrorCode.UNSUPPORTED, "config")


# --- raw and bitplane


def zstd_frame(content: bytes, *, block: int = 1 << 17, size: int | None = None, checksum: bool = False) -> bytes:
    """A Zstandard frame of raw blocks (RFC 8878), made by hand so that it never depends on a library."""
    said = len(content) if size is None else size
    out = struct.pack("<IB", 0xFD2FB528, 0xA0 | checksum << 2) + struct.pack("<I", said)
    pieces = [content[i : i + block] for i in range(0, len(content), block)] or [b""]
    for i, piece in enumerate(pieces):
        out += (len(piece) << 3 | (i == len(pieces) - 1)).to_bytes(3, "little") + piece
    return out + (xxhash.xxh64_intdigest(content) & 0xFFFFFFFF).to_bytes(4, "little") * checksum


#: What zstd 1.5 makes of ``even("bfloat16", (1, 64, 8))`` at level 3.
_COMPRESSED = bytes.fromhex(
    "28b52ffd60000345010012c405832221d8822dd8822dd8822dd8822dd8822dd8822dd80a409810f0070010fec40f55172005"
)


def raw() -> File:
    f = File("codec-raw", "Codec raw", _NOTES)
    for dtype in WORD:
        for shape in ((1, 1, 1), (2, 7, 5)):
            _Codec(f, "codec-raw.md", {"id": "raw"}, dtype, "value", shape).both(
                f"{dtype}, {shape}", noise(dtype, shape), "shape"
            )
    for part in ("key", "packed-kv", "latent", "opaque"):
        _Codec(f, "codec-raw.md", {"id": "raw"}, "uint8", part, (1, 3, 5)).both(part, noise("uint8", (1, 3, 5)))
    c = _Codec(f, "codec-raw.md", {"id": "raw"}, "bfloat16", "key", (1, 5, 3))
    words = noise("bfloat16", (1, 5, 3))
    for comment, payload in (("empty", b""), ("one byte short", words[:-1]), ("one byte long", words + b"\0")):
        c.refused(comment, [payload], 0, "size")
    shape = (1, 64, 8)
    words = even("bfloat16", shape)
    z = _Codec(f, "codec-raw.md", {"id": "raw", "zstd": 3}, "bfloat16", "key", shape)
    for comment, payload in (
        ("a raw block", zstd_frame(words)),
        ("many raw blocks", zstd_frame(words, block=100)),
        ("a frame with a checksum", zstd_frame(words, checksum=True)),
        ("compressed by zstd", _COMPRESSED),
    ):
        z.reads(comment, [payload], [words], "zstd")
    zeros = bytes(1024)
    run = struct.pack("<IBI", 0xFD2FB528, 0xA0, 1024) + (1024 << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\0"
    z.reads("a block of one byte repeated", [run], [zeros], "zstd")
    unsized = struct.pack("<IBB", 0xFD2FB528, 0x00, 0x50) + (1024 << 3 | 1).to_bytes(3, "little") + words
    bad_sum = bytearray(zstd_frame(words, checksum=True))
    bad_sum[-1] ^= 1
    for comment, payload in (
        ("no frame", b""),
        ("the words as they are", words),
        ("no content size", unsized),
        ("a content size one too small", zstd_frame(words, size=1023)),
        ("a content size one too large", zstd_frame(words, size=1025)),
        ("a content size of 4 GiB", zstd_frame(words, size=0xFFFFFFFF)),
        ("content shorter than it says", zstd_frame(words[:-1], size=1024)),
        ("content longer than it says", zstd_frame(words + b"\0", size=1024)),
        ("half a frame", zstd_frame(words)[:500]),
        ("a byte after the frame", zstd_frame(words) + b"\0"),
        ("two frames", zstd_frame(words) * 2),
        ("a wrong checksum", bytes(bad_sum)),
        ("a reserved block type", struct.pack("<IBI", 0xFD2FB528, 0xA0, 1024) + b"\x07\0\0"),
    ):
        z.refused(comment, [payload], 0, "zstd", "size" if "content" in comment else "header")
    for comment, config in (
        ("zstd 0", {"id": "raw", "zstd": 0}),
        ("zstd 20", {"id": "raw", "zstd": 20}),
        ("zstd is a text", {"id": "raw", "zstd": "3"}),
        ("an unknown key", {"id": "raw", "level": 3}),
        ("an unknown codec", {"id": "rawer"}),
    ):
        _config(f, "codec-raw.md", "key", "bfloat16", config, comment)
    return f


def bitplane() -> File:
    f = File("codec-bitplane", "Codec bitplane", _NOTES)
    section = "codec-bitplane.md"
    for dtype, planes in (
        ("bfloat16", [9, 7]),
        ("bfloat16", [16]),
        ("bfloat16", [1] * 8 + [8]),
        ("float16", [6, 10]),
        ("float16", [1, 15]),
        ("float32", [9, 7, 16]),
        ("float32", [31, 1]),
        ("float8_e4m3", [5, 3]),
        ("float8_e5m2", [6, 2]),
        ("uint8", [1] * 8),
    ):
        config = {"id": "bitplane", "planes": planes}
        if len(planes) > 8:
            config["planes"] = planes = [1, 1, 1, 1, 1, 1, 1, 9]
        for shape in ((1, 1, 1), (2, 3, 5), (1, 16, 8)):
            _Codec(f, section, config, dtype, "value", shape).both(
                f"{dtype}, {planes}, {shape}", noise(dtype, shape), "shape"
            )
    for part in ("key", "packed-kv", "latent", "opaque"):
        config = {"id": "bitplane", "planes": [4, 4]}
        _Codec(f, section, config, "uint8", part, (1, 3, 5)).both(part, noise("uint8", (1, 3, 5)))
    config = {"id": "bitplane", "planes": [9, 7]}
    c = _Codec(f, section, config, "bfloat16", "key", (1, 5, 3))
    payloads = c.encoded(noise("bfloat16", (1, 5, 3)))
    padded = bytearray(payloads[0])
    padded[5] |= 0x80
    words = c.decoded(payloads)
    c.reads("bits beyond the last word are ignored", [bytes(padded), payloads[1]], words, "shape")
    for i, comment in ((0, "level"), (1, "number of planes"), (2, "reserved"), (3, "reserved")):
        broken = bytearray(payloads[0])
        broken[i] ^= 1
        c.refused(f"another {comment}, byte {i}", [bytes(broken)], 0, "header")
    for comment, payload in (
        ("empty", b""),
        ("half a header", payloads[0][:3]),
        ("one byte short", payloads[0][:-1]),
        ("one byte long", payloads[0] + b"\0"),
    ):
        c.refused(comment, [payload], 0, "size")
    c.refused("level 1 is level 0 again", [payloads[0], payloads[0]], 1, "header")
    c.refused("level 1 one byte short", [payloads[0], payloads[1][:-1]], 1, "size")
    z = _Codec(f, section, {**config, "zstd": 3}, "bfloat16", "key", (1, 5, 3))
    packed = [payload[:4] + zstd_frame(payload[4:]) for payload in payloads]
    z.reads("levels as Zstandard frames", packed, words, "zstd")
    z.refused("level 1 without its frame", [packed[0], payloads[1]], 1, "zstd", "header")
    z.refused(
        "planes of another size", [packed[0], payloads[1][:4] + zstd_frame(payloads[1][4:] + b"\0")], 1, "zstd", "size"
    )
    for comment, wrong in (
        ("no planes", []),
        ("planes of 15", [8, 7]),
        ("a level without planes", [16, 0]),
        ("a negative level", [17, -1]),
        ("planes that are texts", ["9", "7"]),
    ):
        _config(f, section, "key", "bfloat16", {"id": "bitplane", "planes": wrong}, comment)
    return f


# --- hq


def _hq(key: float = 4, value: float = 4, levels: int = 3, widths: Any = "uniform", **more: bool) -> dict[str, Any]:
    config = {"id": "hq", "key_bits": key, "value_bits": value, "levels": levels, "widths": widths}
    return {**config, "fold": False, "scaling": False, **more}


def _preset(name: str, levels: int = 3) -> dict[str, Any]:
    return {"id": "hq", "levels": levels, **PRESETS[name]}


def _hashed(keys: Any, values: Any) -> dict[str, Any]:
    """A table with its hash."""
    texts = [",".join(layer) for layer in keys] + list(values)
    return {"keys": keys, "values": values, "hash": xxhash.xxh3_128_hexdigest("/".join(texts).encode())}


def _table(dim: int) -> dict[str, Any]:
    """Widths of two layers of two heads, every width in each."""
    keys = [["".join(str((h + l + c) % 9) for c in range(dim)) for h in range(2)] for l in range(2)]  # noqa: E741
    return _hashed(keys, ["36", "82"])


def hq(dtype: str) -> File:
    f = File(f"codec-hq-{dtype}", f"Codec hq, {dtype}", _NOTES)

    def case(
        comment: str, config: dict[str, Any], part: str, shape: Shape, *flags: str, kind: str = "usual"
    ) -> list[bytes]:
        c = _Codec(f, "codec-hq.md", config, dtype, part, shape)
        return c.both(comment, tile(kind, dtype, part, shape), *flags)

    shapes: dict[str, Shape] = {"key": (1, 30, 12), "value": (1, 12, 30)}
    for bits in range(2, 9):
        for part, shape in shapes.items():
            case(f"{part} of {bits} bits", _hq(bits, bits, 3 if bits < 8 else 2), part, shape)
    for levels in (1, 2):
        for part, shape in shapes.items():
            case(f"{part} of 3 bits in {levels} levels", _hq(3, 3, levels), part, shape)
    for name in PRESETS:
        for part, shape in {"key": (2, 30, 7), "value": (2, 7, 30)}.items():
            case(f"{part}, preset {name}", _preset(name), part, shape)
    for kind in KINDS[1:]:
        flags = ["stored"] if kind == "noise" else ["values"]
        for part, shape in shapes.items():
            if kind == "special":
                shape = (1, 66, 7)
            case(f"{part}: {kind}, widths uniform", _hq(3, 3), part, shape, *flags, kind=kind)
            case(f"{part}: {kind}, balanced", _preset("balanced"), part, shape, *flags, kind=kind)
    for shape in ((1, 1, 1), (1, 17, 21), (3, 23, 9), (1, 66, 7), (1, 7, 66)):
        for part in ("key", "value"):
            case(f"{part}, {shape}", _hq(4, 4), part, shape, "shape")
            case(f"{part}, {shape}, folded", _preset("balanced"), part, shape, "shape")
    for bits in (2, 3, 4, 6):
        for part, shape in shapes.items():
            case(f"{part} of {bits} bits, folded", _hq(bits, bits, fold=True), part, shape)
    for fold in (False, True):
        for part, shape in {"key": (2, 24, 9), "value": (2, 8, 30)}.items():
            table = _hq(4, 4, 3, _table(shape[2]), fold=fold)
            case(f"{part}, widths by a table{', folded' * fold}", table, part, shape)
    given = {
        "codec": _hq(4, 4, 3, _table(9)),
        "dtype": dtype,
        "part": "key",
        "shape": [1, 24, 9],
        "layer": 1,
        "head_start": 1,
    }
    words = tile("usual", dtype, "key", (1, 24, 9))
    array = np.frombuffer(words, "<u2").reshape(1, 24, 9)
    payloads = [bytes(p) for p in get_codec(given["codec"]).encode(_spec(dtype, "key", (1, 24, 9), 1, 1), array)]
    anchors = np.zeros((1, 24, 9), np.uint16)
    get_codec(given["codec"]).decode(_spec(dtype, "key", (1, 24, 9), 1, 1), payloads[:1], anchors)
    f.group("decode", "codec-hq.md, Widths").valid(
        "a table's second layer and head", {**given, "payloads": payloads[:1]}, {"levels": [anchors.tobytes()]}
    )
    f.group("encode", "codec-hq.md, Widths").valid(
        "a table's second layer and head", {**given, "words": words}, {"payloads": payloads}
    )
    return f


def hq_refused(dtype: str) -> File:
    """Payloads and configurations to refuse, and some that look as if they were."""
    f = File(f"codec-hq-{dtype}-limits", f"Codec hq, {dtype}: what to refuse, and what not", _NOTES)
    _refusals(f, dtype)
    _configs(f, dtype)
    return f


def _edit(payload: bytes, at: int, new: bytes) -> bytes:
    return payload[:at] + new + payload[at + len(new) :]


def _refusals(f: File, dtype: str) -> None:
    shape = (1, 64, 8)
    c = _Codec(f, "codec-hq.md, Payloads to refuse", _hq(3, 3), dtype, "key", shape)
    zero, one, two = good = c.encoded(tile("usual", dtype, "key", shape))
    assert zero[0] == 0, "the example must be coded"
    planes = 8 + 8 * 8 * 3  # where the parameter header begins
    stored = struct.pack("<BBHI", 1, 0, 0, 0) + tile("usual", dtype, "key", shape)
    for level, payload in enumerate(good):
        before = good[:level]
        for comment, broken, flag in (
            ("empty", b"", "size"),
            ("7 bytes", payload[:7], "size"),
            ("its header alone", payload[:8], "size"),
            ("one byte short", payload[:-1], "size"),
            ("one byte long", payload + b"\0", "size"),
            ("mode 2", _edit(payload, 0, b"\2"), "header"),
            ("mode 255", _edit(payload, 0, b"\xff"), "header"),
            ("another level", _edit(payload, 1, bytes([level + 1])), "header"),
            ("reserved byte 2 set", _edit(payload, 2, b"\1"), "header"),
            ("reserved byte 3 set", _edit(payload, 3, b"\1"), "header"),
            ("a section of one byte more", _edit(payload, 4, (payload[4] + 1 & 255).to_bytes(1, "little")), "table"),
            ("a section of 4 GiB", _edit(payload, 4, b"\xff\xff\xff\xff"), "table"),
        ):
            c.refused(f"level {level}: {comment}", [*before, broken], level, flag)
    c.reads("stored", [stored], [stored[8:]], "stored")
    c.reads("stored, all levels", [stored, b"\1\1" + bytes(6), b"\1\2" + bytes(6)], [stored[8:]] * 3, "stored")
    c.refused("stored, one byte short", [stored[:-1]], 0, "stored", "size")
    c.refused("stored, one byte long", [stored + b"\0"], 0, "stored", "size")
    c.refused("stored, a size that is not 0", [_edit(stored, 4, b"\1")], 0, "stored", "header")
    c.refused("stored, level 1 with a byte", [stored, b"\1\1" + bytes(7)], 1, "stored", "size")
    c.refused("level 0 coded, level 1 stored", [zero, b"\1\1" + bytes(6)], 1, "stored", "header")
    c.refused("level 0 stored, level 1 coded", [stored, one], 1, "stored", "header")
    for comment, header in (
        ("s_bits 14", struct.pack("<HhBB", 0x3F80, 0, 14, zero[planes + 5])),
        ("z_bits 13", struct.pack("<HhBB", 0x3F80, 0, zero[planes + 4], 13)),
        ("s_bits 255 alone", struct.pack("<HhBB", 0, 0, 255, 0)),
    ):
        c.refused(comment, [_edit(zero, planes, header)], 0, "table")
    low, high = ((0x0580, 0x7E00), (0x3380, 0x4480))[dtype == "float16"]

    def with_scale(word: int, z: int = 0) -> bytes:
        """Level 0 whose groups all have this s and z."""
        return struct.pack("<BBHI", 0, 0, 0, 0) + zero[8:planes] + struct.pack("<HhBB", word, z, 0, 0)

    for comment, word in (
        ("s = 0", 0),
        ("s below the least", low - 4),
        ("s above the largest", high + 4),
        ("s negative", 0xBF80),
    ):
        c.refused(comment, [with_scale(word)], 0, "range")
    infinite = 0x7F80
    c.refused("s infinite", [with_scale(infinite)], 0, "range")
    for comment, word in (("the least s", low), ("the largest s", high)):
        payload = with_scale(word)
        c.reads(comment, [payload], c.decoded([payload]), "range")
    for z in (1024, -1024):
        payload = with_scale(0x3F80, z)
        c.reads(f"z = {z}", [payload], c.decoded([payload]), "range")
    for z in (1025, -1025, 32767, -32768):
        c.refused(f"z = {z}", [with_scale(0x3F80, z)], 0, "range")
    nothing = zero[:8] + bytes(planes - 8) + zero[planes:]
    c.refused("codes of 0, which is below o", [nothing, one[:8] + bytes(len(one) - 8)], 1, "range")
    everything = zero[:8] + b"\xff" * (planes - 8) + zero[planes:]
    c.refused("codes of 255, which is above o + R + 1", [everything, one[:8] + b"\xff" * (len(one) - 8)], 1, "range")
    a, others = struct.unpack_from("<HH", two, 8)
    for comment, table in (
        ("A one byte larger, the others smaller", (a + 1, others - 1)),
        ("A one byte smaller, the others larger", (a - 1, others + 1)),
        ("all empty", (0, 0)),
        ("65534 bytes", (0xFFFE, others)),
        ("a raw block with streams", (0xFFFF, 1)),
        ("a raw block that is not there", (0xFFFF, 0)),
    ):
        c.refused(f"rank table: {comment}", [zero, one, _edit(two, 8, struct.pack("<HH", *table))], 2, "table")
    words = tile("usual", dtype, "key", shape)
    rawed = struct.pack("<BBHI", 0, 2, 0, len(words)) + struct.pack("<HH", 0xFFFF, 0) + words
    c.reads("a raw block", [zero, one, rawed], [*c.decoded([zero, one]), words], "stored")
    c.mutated(list(good), 24)

    constant = _Codec(f, "codec-hq.md, Payloads to refuse", _hq(3, 3), dtype, "key", shape)
    words = np.frombuffer(tile("usual", dtype, "key", shape), "<u2").reshape(shape).copy()
    words[:, :, 3] = words[0, 0, 3]
    zero, one, two = constant.encoded(words.tobytes())
    assert zero[planes : planes + 6] == b"\0\0\0\0\xff\xff", "the example must have a constant group"
    constant.refused("s_low in a block with a constant group", [_edit(zero, planes, b"\4")], 0, "table")
    constant.refused("z_low in a block with a constant group", [_edit(zero, planes + 2, b"\1")], 0, "table")
    constant.refused("a code of a constant group below o", [zero, _edit(one, 8 + 3, bytes([one[11] ^ 0xFF])), two], 1)
    d = _Codec(f, "codec-hq.md, Payloads to refuse", _preset("balanced"), dtype, "key", (1, 64, 9))
    zero, *_ = good = d.encoded(tile("usual", dtype, "key", (1, 64, 9)))
    d.refused("a width of 9", [_edit(zero, 8, b"\x99")], 0, "table")
    d.refused("padding of the widths is not 0", [_edit(zero, 12, bytes([zero[12] | 0x10]))], 0, "table")
    entry = struct.unpack_from("<H", zero, 13)[0]
    assert entry != 0xFFFF, "the example must be folded"
    for comment, value in (
        ("one byte more", entry + 1),
        ("one byte less", entry - 1),
        ("no bytes", entry & 0xE000),
        ("D2 in pairs or not", entry ^ 0x2000),
        ("D3 in pairs or not", entry ^ 0x4000),
        ("bit 15", entry | 0x8000),
        ("0xfffe", 0xFFFE),
        ("not folded", 0xFFFF),
    ):
        broken = [_edit(zero, 13, struct.pack("<H", value))]
        try:  # another form of the stream may happen to have the same size
            d.reads(f"fold table: {comment}", broken, d.decoded(broken), "table")
        except PayloadError:
            d.refused(f"fold table: {comment}", broken, 0, "table")
    narrow = _Codec(f, "codec-hq.md, Payloads to refuse", _preset("dense"), dtype, "key", (1, 64, 9))
    one = narrow.encoded(tile("usual", dtype, "key", (1, 64, 9)))
    entry = struct.unpack_from("<H", one[1], 8)[0]
    for comment, value in (("one byte more", entry + 1), ("one byte less", entry - 1), ("bit 15", entry | 0x8000)):
        broken = [one[0], _edit(one[1], 8, struct.pack("<H", value & 0xFFFF))]
        narrow.refused(f"fold table of the rest section: {comment}", broken, 1, "table")
    narrow.mutated(list(one), 24)
    d.mutated(list(good), 24)
    g = _Codec(f, "codec-hq.md, Payloads to refuse", _preset("balanced"), dtype, "value", (1, 40, 20))
    g.mutated(list(g.encoded(tile("usual", dtype, "value", (1, 40, 20)))), 24)


def _configs(f: File, dtype: str) -> None:
    section = "codec-hq.md, Configuration"
    table = _table(4)
    for comment, config in (
        ("key_bits 1", _hq(1, 4)),
        ("key_bits 9", _hq(9, 4)),
        ("value_bits 0", _hq(4, 0)),
        ("key_bits a text", {**_hq(), "key_bits": "4"}),
        ("key_bits 2.5 with widths uniform", _hq(2.5, 4)),
        ("value_bits 2.5 with widths by ranges", _hq(4, 2.5, 3, "ranges")),
        ("key_bits 7.5 with widths by ranges", _hq(7.5, 4, 3, "ranges")),
        ("no level", _hq(levels=0)),
        ("4 levels", _hq(levels=4)),
        ("3 levels of 8 bits", _hq(8, 8)),
        ("unknown widths", _hq(widths="best")),
        ("fold a number", {**_hq(), "fold": 1}),
        ("scaling a text", {**_hq(), "scaling": "yes"}),
        ("an unknown key", {**_hq(), "groups": 64}),
        ("a table without values", _hq(widths={"keys": table["keys"], "hash": table["hash"]})),
        ("a table with another hash", _hq(widths={**table, "hash": "0" * 32})),
        ("a table with a digit of 9", _hq(widths=_hashed([["9012"]], ["3"]))),
        ("a table with heads of other sizes", _hq(widths=_hashed([["0123", "012"]], ["33"]))),
        ("a table with another number of layers", _hq(widths=_hashed([["0123"]], ["3", "3"]))),
        ("a table without layers", _hq(widths=_hashed([], []))),
        ("a table whose heads are not those of its values", _hq(widths=_hashed([["0123"]], ["33"]))),
        ("a table with a hash in upper case", _hq(widths={**table, "hash": table["hash"].upper()})),
        ("a preset", {"id": "hq", "preset": "fast"}),
        ("levels true", _hq(levels=True)),
        ("an unknown critical key", {**_hq(), "!later": 1}),
    ):
        _config(f, section, "key", dtype, config, comment)
    shape = (1, 9, 4)
    words = tile("usual", dtype, "key", shape)
    for comment, config in (
        ("all keys but `id` absent", {"id": "hq"}),
        ("a table without a hash", _hq(widths={key: table[key] for key in ("keys", "values")})),
    ):
        c = _Codec(f, section, config, dtype, "key", shape)
        c.both(comment, words)
    c = _Codec(f, section, _hq(widths=table), dtype, "key", shape)
    payloads = c.encoded(words)
    for comment, changed, level in (
        ("more payloads than levels", {"payloads": [*payloads, payloads[2]]}, 3),
        ("a layer that the table lacks", {"layer": 2}, 0),
        ("a head that the table lacks", {"head_start": 2}, 0),
        ("fewer key channels than the table's", {"shape": [1, 9, 3]}, 0),
        ("more key channels than the table's", {"shape": [1, 9, 5]}, 0),
        ("float32", {"dtype": "float32"}, 0),
        ("a latent part", {"part": "latent"}, 0),
    ):
        given = {**c.tile, "payloads": payloads, **changed}
        f.group("decode", section).invalid(comment, given, ErrorCode.PROTOCOL, "config", level=level)


def hq_large() -> File:
    """Whole blocks, and tiles of several."""
    f = File("codec-hq-large", "Codec hq, whole blocks", _NOTES)
    for dtype in ("bfloat16", "float16"):
        for part in ("key", "value"):
            c = _Codec(f, "codec-hq.md", _preset("balanced"), dtype, part, (1, 64, 64))
            c.both(
                f"{dtype} {part}, one whole block", tile("usual", dtype, part, (1, 64, 64)), encode=dtype == "bfloat16"
            )
    for part in ("key", "value"):
        c = _Codec(f, "codec-hq.md", _preset("dense"), "bfloat16", part, (2, 65, 66))
        c.both(
            f"bfloat16 {part}, 8 blocks of 4 sizes", tile("usual", "bfloat16", part, (2, 65, 66)), "shape", encode=False
        )
    return f


def codec_files() -> list[File]:
    dtypes = ("bfloat16", "float16")
    return [raw(), bitplane(), *map(hq, dtypes), *map(hq_refused, dtypes), hq_large()]
