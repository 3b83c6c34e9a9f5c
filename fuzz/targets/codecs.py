"""Payloads of every codec: C on each instruction set and plain torch agree on bytes, words and refusals.

The input picks one of the specification's vectors, or a codec, a tile and what its words are like; then it changes
bytes of the payloads. Whatever these are then, each implementation ends with words or with a PayloadError, and all
with the same. Unchanged payloads give the words back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fuzz.targets.bytesource import ByteSource
from lynxproto import ChunkSpec, get_codec
from lynxproto.codecs._library import ISAS, instruction_set, lib, select_instruction_set
from lynxproto.codecs.abc import Codec
from lynxproto.conformance.vectors import default_vectors, load
from lynxproto.errors import LynxError, PayloadError

try:
    from lynxproto.codecs.bitplane_torch import TorchBitplane
    from lynxproto.codecs.hq_torch import TorchHQ
except ImportError:  # torch is an extra: without it C is compared with itself
    _TWINS: dict[str, Any] = {}
else:
    _TWINS = {"hq": TorchHQ.of, "bitplane": TorchBitplane.of}

_HERE = instruction_set()
_ISAS = [name for name, number in ISAS.items() if lib.lynx_isa_select(number) == lib.LYNX_OK]
select_instruction_set(_HERE)

_CONFIGS: tuple[dict[str, Any], ...] = (
    {"id": "hq", "preset": "fast"},
    {"id": "hq", "preset": "balanced"},
    {"id": "hq", "preset": "dense"},
    {"id": "hq", "anchor_bits": 8, "levels": 2},
    {"id": "hq", "key_bits": 2, "value_bits": 2, "fold": True, "scaling": True},
    {"id": "hq", "key_bits": 3, "value_bits": 2, "levels": 2, "fold": True},
    {"id": "hq", "anchor_bits": 4, "levels": 1},
    {"id": "bitplane", "planes": [9, 7]},
    {"id": "bitplane", "planes": [1, 2, 5, 8]},
    {"id": "bitplane", "planes": [8, 8], "zstd": 1},
    {"id": "raw"},
    {"id": "raw", "zstd": 1},
)
#: Inputs that begin with this byte are about a vector.
VECTORS = 255
_TOKENS = (1, 7, 8, 33, 64, 65, 130)
_DIMS = (8, 16, 40, 64, 72)
#: One decode in so many runs through torch too: it is a hundred times slower on tiles of this size.
_TORCH_EVERY = 16

Words = NDArray[np.uint16]
Outcome = bytes | type[PayloadError]


def run(data: bytes) -> None:
    """One tile, or vector, damaged and decoded."""
    script = ByteSource(data)
    if data[:1] == bytes([VECTORS]):
        _vector(script)
    else:
        _tile(script)


@cache
def _vectors() -> list[dict[str, Any]]:
    return [case.input for case in load(default_vectors()) if case.op == "decode"]


def _vector(script: ByteSource) -> None:
    """A vector's payloads, damaged or not; what they must give is `lynxproto conformance`'s to say."""
    case = _vectors()[script.number(3) // 256 % len(_vectors())]
    heads, tokens, dim = case["shape"]
    levels = [bytearray.fromhex(payload) for payload in case["payloads"]]
    try:
        codec = get_codec(case["codec"])
        spec = ChunkSpec(
            part=case["part"], dtype=case["dtype"], heads=heads, tokens=tokens, head_dim=dim, layer=case.get("layer", 0)
        )
        codec.decode(spec, levels, None)
    except PayloadError:
        pass
    except LynxError:  # some vectors are of configs and tiles that are refused
        return
    if not levels or spec.nbytes > 1 << 16:
        return
    _damage(levels, script)
    _decode(codec, spec, [bytes(level) for level in levels], with_torch=False)


def _tile(script: ByteSource) -> None:
    codec = get_codec(_CONFIGS[script.below(len(_CONFIGS))])
    spec = ChunkSpec(
        part=("key", "value")[script.below(2)],
        dtype=("bfloat16", "float16")[script.below(2)],
        heads=1 + script.below(2),
        tokens=_TOKENS[script.below(len(_TOKENS))],
        head_dim=_DIMS[script.below(len(_DIMS))],
        layer=0,
    )
    words = _words(spec, script)
    with_torch = script.below(_TORCH_EVERY) == 0 and codec.codec_id in _TWINS and "zstd" not in codec.get_config()
    levels = _encode(codec, spec, words, with_torch=with_torch)
    if script:
        count = 1 + script.below(len(levels))
        damaged = [bytearray(level) for level in levels[:count]]
        changed = _damage(damaged, script)
        outcome = _decode(codec, spec, [bytes(level) for level in damaged], with_torch=with_torch)
        if changed:
            return
        assert outcome is not PayloadError, "a genuine payload was refused"
        levels = levels[:count]
    if len(levels) == codec.levels and codec.exact:
        assert _decode(codec, spec, levels, with_torch=False) == words.tobytes(), "not exact"


def _words(spec: ChunkSpec, script: ByteSource) -> Words:
    """Words around a few that the input names."""
    kind, seed = script.below(5), script.number(2)
    rng = np.random.default_rng(seed)
    shape = spec.shape
    if kind == 0:
        words = rng.integers(0, 1 << 16, shape)
    elif kind == 1:
        centre = script.number(2)
        words = (centre + rng.integers(-40, 40, shape)) & 0xFFFF
    elif kind == 2:
        words = rng.choice(np.frombuffer(script.take(16).ljust(16, b"\0"), "<u2"), shape)
    else:
        sign = rng.integers(0, 2, shape) << 15
        words = (rng.normal(0x3E80, 60 if kind == 3 else 400, shape).astype(np.int64) & 0x7FFF) | sign
    return np.ascontiguousarray(words).astype(np.uint16)


def _damage(levels: list[bytearray], script: ByteSource) -> bool:
    """Change, cut or lengthen; whether anything is different."""
    before = [bytes(level) for level in levels]
    for _ in range(script.below(5)):
        level = levels[script.below(len(levels))]
        what = script.below(8)
        if what == 0:
            del level[script.number(2) % (len(level) + 1) :]
        elif what == 1:
            level += script.take(1 + script.below(16))
        elif level:
            # Headers and tables stand at the beginning: half of the changes go there.
            at = script.number(1) % len(level) if what < 5 else script.number(3) % len(level)
            level[at] = script.number(1)
    return before != [bytes(level) for level in levels]


def _on_each_isa(function: Callable[[], Any]) -> list[Any]:
    results = []
    try:
        for name in _ISAS:
            select_instruction_set(name)
            results.append(function())
    finally:
        select_instruction_set(_HERE)
    return results


def _encode(codec: Codec, spec: ChunkSpec, words: Words, *, with_torch: bool) -> list[bytes]:
    first, *others = _on_each_isa(lambda: [bytes(level) for level in codec.encode(spec, words)])
    for other in others:
        assert other == first, "instruction sets encode differently"
    if with_torch:
        import torch

        tensor = torch.from_numpy(words.view(np.int16))
        assert [level.numpy().tobytes() for level in _twin(codec).encode(spec, tensor)] == first, "torch differs"
    for level, payload in enumerate(first):
        assert len(payload) <= codec.max_encoded_size(spec, level)
    return first  # type: ignore[no-any-return]  # the list is of what the lambda gives


def _decode(codec: Codec, spec: ChunkSpec, levels: Sequence[bytes], *, with_torch: bool) -> Outcome:
    def numpy() -> Outcome:
        out = np.zeros(spec.shape, spec.word_dtype)
        try:
            codec.decode(spec, levels, out)
        except PayloadError:
            return PayloadError
        return out.tobytes()

    first, *others = _on_each_isa(numpy)
    for other in others:
        assert other == first, "instruction sets decode differently"
    if with_torch:
        import torch

        out = torch.zeros(spec.shape, dtype=torch.int16)
        found: Outcome
        try:
            _twin(codec).decode(spec, levels, out)
            found = out.numpy().tobytes()
        except PayloadError:
            found = PayloadError
        assert found == first, "torch decodes differently"
    return first  # type: ignore[no-any-return]  # the list is of what the function gives


def _twin(codec: Codec) -> Any:
    return _TWINS[codec.codec_id](codec)
