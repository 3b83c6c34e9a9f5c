"""hq on torch tensors: the bytes and the words of the C codec, whatever the tile, and the same payloads refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from reference_hq import exponents_of, nibbles, spreads
from test_codec_hq import DTYPES, KINDS, PARTS, make, specification

from lynxproto import ChunkSpec, get_codec
from lynxproto.errors import ConfigError, PayloadError, SpecError

torch = pytest.importorskip("torch")

from lynxproto.codecs.hq_torch import TorchHQ  # noqa: E402 - after the check for torch

torch.set_num_threads(1)  # the tensors are small

Words = NDArray[np.uint16]
TABLE = {
    "keys": [["".join(map(str, row)) for row in np.random.default_rng(i).integers(0, 9, (2, 80))] for i in range(2)],
    "values": ["38", "25"],
}
CONFIGS: tuple[dict[str, Any], ...] = (
    {"anchor_bits": 4},
    {"preset": "fast"},
    {"preset": "balanced"},
    {"preset": "dense", "levels": 2},
    {"preset": "dense", "levels": 1},
    {"key_bits": 2, "value_bits": 2, "fold": True},
    {"key_bits": 7, "value_bits": 6, "levels": 2, "scaling": True},
    {"anchor_bits": 8, "levels": 2, "fold": True, "scaling": True},
    {"anchor_bits": 5, "levels": 1},
    {"key_bits": 6.4, "value_bits": 5, "widths": "ranges"},
)
shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([1, 7, 8, 17, 63, 64, 65, 130]), st.sampled_from([1, 8, 40, 64, 80, 128])
)
seeds = st.integers(0, 1 << 30)


def tensor(words: Words) -> Any:
    return torch.from_numpy(words.view(np.int16).copy())


def as_words(found: Any) -> Words:
    return found.view(torch.int16).contiguous().numpy().view(np.uint16)  # type: ignore[no-any-return]


def as_bytes(payloads: Sequence[Any]) -> list[bytes]:
    return [payload.numpy().tobytes() for payload in payloads]


def decoded(codec: Any, spec: ChunkSpec, levels: Sequence[Any]) -> Words:
    out = np.full(spec.shape, 0xDEAD, np.uint16)
    codec.decode(spec, levels, out)
    return out


def torch_decoded(codec: TorchHQ, spec: ChunkSpec, levels: Sequence[Any]) -> Words:
    out = torch.full(spec.shape, -1, dtype=torch.int16)
    codec.decode(spec, levels, out)
    return as_words(out)


def check(config: dict[str, Any], spec: ChunkSpec, words: Words) -> None:
    """Bytes of all levels, and words of each, are those of the C codec."""
    codec = get_codec("hq", **config)
    twin = TorchHQ.of(codec)
    expected = [bytes(payload) for payload in codec.encode(spec, words)]
    levels = twin.encode(spec, tensor(words))
    assert as_bytes(levels) == expected
    for count in range(1, codec.levels + 1):
        assert np.array_equal(torch_decoded(twin, spec, levels[:count]), decoded(codec, spec, expected[:count]))
    if codec.exact:
        assert np.array_equal(torch_decoded(twin, spec, levels), words)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(PARTS),
    st.sampled_from(DTYPES),
    st.tuples(shapes, st.sampled_from(KINDS), seeds),
    st.sampled_from(CONFIGS),
)
@example("key", "bfloat16", ((2, 70, 80), "channels", 1), {"preset": "balanced"})
@example("value", "bfloat16", ((2, 70, 80), "channels", 1), {"preset": "balanced"})
@example("key", "float16", ((1, 70, 128), "special", 2), {"preset": "dense"})
@example("value", "float16", ((1, 70, 128), "special", 2), {"preset": "dense"})
def test_bytes_and_words_are_those_of_the_c_codec(
    part: str, dtype: str, tile: tuple[tuple[int, int, int], str, int], config: dict[str, Any]
) -> None:
    shape, kind, seed = tile
    words = make(kind, dtype, shape, seed)
    check(config, specification(part, dtype, shape), words)


def test_spread_of_minus_zeros_is_the_references() -> None:
    """The least there is: -0 has the largest word without being large."""
    words = make("channels", "bfloat16", (2, 65, 80), 3)
    words[:, 64, :40] = 0x8000
    spec = specification("value", "bfloat16", words.shape)
    first = TorchHQ(preset="fast", levels=1).encode(spec, tensor(words))[0].numpy().tobytes()
    assert first[8:88] == nibbles(exponents_of(spreads("bfloat16", words)[1]) + 8)
    check({"preset": "fast"}, spec, words)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinds(part: str, dtype: str, kind: str) -> None:
    words = make(kind, dtype, (2, 72, 80), 5)
    for config in CONFIGS[:4]:
        check(config, specification(part, dtype, words.shape), words)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(PARTS), st.sampled_from(DTYPES), st.binary(min_size=2 * 9 * 8, max_size=2 * 9 * 8), seeds)
def test_words_of_any_bits(part: str, dtype: str, data: bytes, seed: int) -> None:
    few = np.frombuffer(data, "<u2").astype(np.uint16)
    words = np.random.default_rng(seed).choice(few, (1, 9, 72)).astype(np.uint16)
    check({"preset": "balanced"}, specification(part, dtype, words.shape), words)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_every_word_survives(part: str, dtype: str, shuffled: bool) -> None:
    words = np.arange(1 << 16).astype(np.uint16)
    if shuffled:
        words = np.random.default_rng(3).permutation(words)
    words = words.reshape(2, 512, 64)
    for config in ({"preset": "balanced"}, {"anchor_bits": 8, "levels": 2}):
        check(config, specification(part, dtype, words.shape), words)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("fold", [False, True])
def test_widths_of_a_table(part: Any, layer: int, fold: bool) -> None:
    shape = (2, 70, 80)
    spec = ChunkSpec(part=part, dtype="bfloat16", heads=2, tokens=70, head_dim=80, layer=layer)
    for kind in ("channels", "special", "exponents"):
        check({"widths": TABLE, "fold": fold, "scaling": fold}, spec, make(kind, "bfloat16", shape, layer))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(DTYPES), st.integers(0, 0x7FFF), st.integers(0, 0x7FFF), st.booleans(), st.booleans())
@example("bfloat16", 0x0B40, 0x0001, True, False)  # 192 * 2^-112, and a denormal below zero
def test_scales_of_any_range(dtype: str, low: int, high: int, below: bool, above: bool) -> None:
    extremes = np.array([low | below << 15, high | above << 15], np.uint16)
    words = np.random.default_rng(low ^ high).choice(extremes, (1, 8, 8)).astype(np.uint16)
    for part in PARTS:
        check({"anchor_bits": 2}, specification(part, dtype, words.shape), words)


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals_may_be_flushed(dtype: str) -> None:
    assert torch.set_flush_denormal(True), "this processor cannot flush denormals"
    try:
        for part, kind in itertools.product(PARTS, ("denormal", "channels", "exponents")):
            words = make(kind, dtype, (1, 64, 64), 9)
            check({"preset": "balanced"}, specification(part, dtype, words.shape), words)
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["channels", "any"])
@pytest.mark.parametrize("config", [{"preset": "balanced"}, {"preset": "fast", "levels": 2}])
def test_refine_is_decode(part: str, kind: str, config: dict[str, Any]) -> None:
    words = make(kind, "bfloat16", (2, 80, 64), 5)
    spec = specification(part, "bfloat16", words.shape)
    codec = TorchHQ(**config)
    levels = codec.encode(spec, tensor(words))
    assert [as_bytes(codec.encode(spec, tensor(words), levels=[i])) for i in range(codec.levels)] == [
        [payload] for payload in as_bytes(levels)
    ]
    out = torch.zeros(spec.shape, dtype=torch.bfloat16)
    state = codec.decode(spec, levels[:1], out)
    unread = codec.decode(spec, levels[:1], None)
    for level in range(1, codec.levels):
        state = codec.refine(spec, state, level, levels[level], out)
        unread = codec.refine(spec, unread, level, levels[level], None)
        assert (state.level, unread.level) == (level, level)
        assert np.array_equal(as_words(out), torch_decoded(codec, spec, levels[: level + 1]))
    assert state.nbytes == sum(map(len, levels))
    assert codec.decode(spec, as_bytes(levels), None).nbytes == state.nbytes
    assert np.array_equal(as_words(out), words)


@pytest.mark.parametrize("part", PARTS)
def test_strided_tensors(part: str) -> None:
    words = make("channels", "bfloat16", (3, 70, 80), 7)
    spec = specification(part, "bfloat16", words.shape)
    codec = TorchHQ(preset="balanced")
    levels = codec.encode(spec, tensor(words))
    by_token = tensor(words).transpose(0, 1).contiguous().view(torch.bfloat16)  # [tokens, heads, head_dim]
    assert as_bytes(codec.encode(spec, by_token.transpose(0, 1))) == as_bytes(levels)
    backwards = tensor(words).transpose(1, 2).contiguous().transpose(1, 2)  # not even channels are contiguous
    assert as_bytes(codec.encode(spec, backwards)) == as_bytes(levels)
    page = torch.full((80, 5, 96), 7, dtype=torch.int16)
    view = page[5:75, 1:4, 8:88].transpose(0, 1)
    codec.decode(spec, levels, view)
    assert np.array_equal(as_words(view), words)
    view.fill_(7)
    assert bool((page == 7).all()), "decode wrote beside the view"


def test_payloads_may_be_slices_of_a_buffer() -> None:
    words = make("channels", "bfloat16", (1, 70, 80), 7)
    spec = specification("value", "bfloat16", words.shape)
    codec = TorchHQ(preset="balanced")
    for source in (words, make("any", "bfloat16", words.shape, 1)):
        levels = codec.encode(spec, tensor(source))
        for shift in range(4):
            slices = [torch.cat([torch.zeros(shift, dtype=torch.uint8), payload])[shift:] for payload in levels]
            assert np.array_equal(torch_decoded(codec, spec, slices), source)
        assert np.array_equal(torch_decoded(codec, spec, as_bytes(levels)), source)


# --- hostile payloads


def outcome(decode: Any, codec: Any, spec: ChunkSpec, levels: Sequence[bytes]) -> Words | None:
    try:
        return decode(codec, spec, levels)  # type: ignore[no-any-return]
    except PayloadError as error:
        message = str(error)
    assert "byte offset" in message
    assert "level" in message
    return None


@settings(max_examples=120, deadline=None)
@given(st.data(), st.sampled_from(PARTS), st.sampled_from(DTYPES), st.sampled_from(KINDS), seeds)
def test_mutated_payloads_are_refused_as_by_the_c_codec(data: Any, part: str, dtype: str, kind: str, seed: int) -> None:
    words = make(kind, dtype, (1, 70, 72), seed)
    spec = specification(part, dtype, words.shape)
    codec = get_codec("hq", **data.draw(st.sampled_from(CONFIGS)))
    levels = [bytearray(p) for p in codec.encode(spec, words)]
    level = data.draw(st.integers(0, codec.levels - 1))
    payload = levels[level]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.one_of(st.integers(0, min(len(payload) - 1, 100)), st.integers(0, len(payload) - 1)))
        payload[at] = data.draw(st.integers(0, 255))
    for count in range(level + 1, codec.levels + 1):
        expected = outcome(decoded, codec, spec, levels[:count])
        found = outcome(torch_decoded, TorchHQ.of(codec), spec, levels[:count])
        assert (found is None) == (expected is None)
        assert found is None or np.array_equal(found, expected)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", ["channels", "any"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_truncated_and_padded_payloads_are_errors(part: str, kind: str, count: int) -> None:
    words = make(kind, "bfloat16", (1, 70, 64), 13)
    spec = specification(part, "bfloat16", words.shape)
    codec = TorchHQ(preset="balanced", levels=count)
    levels = as_bytes(codec.encode(spec, tensor(words)))
    for level, payload in enumerate(levels):
        for wrong in (payload + b"\0", payload[:-1], payload[: len(payload) // 2], payload[:8], payload[:7], b""):
            if wrong == payload:
                continue
            for out in (torch.zeros(spec.shape, dtype=torch.int16), None):
                with pytest.raises(PayloadError, match=rf"level {level}.*byte offset"):
                    codec.decode(spec, [*levels[:level], wrong], out)


def test_a_fault_names_its_block() -> None:
    words = make("channels", "bfloat16", (1, 512, 64), 31)
    spec = specification("key", "bfloat16", words.shape)
    codec = TorchHQ(anchor_bits=4)
    levels = as_bytes(codec.encode(spec, tensor(words)))
    sizes = np.frombuffer(levels[2], "<u2", count=2 * 8, offset=8).reshape(8, 2)
    for block in range(8):
        table = sizes.copy()
        table[block, 0] -= 1  # a byte of A becomes one of B: the sum stays
        table[block, 1] += 1
        broken = levels[2][:8] + table.tobytes() + levels[2][8 + table.nbytes :]
        out = torch.full(spec.shape, 7, dtype=torch.int16)
        with pytest.raises(PayloadError, match=rf"level 2.*ranks of block {block} of 8"):
            codec.decode(spec, [*levels[:2], broken], out)
        assert bool((out == 7).all()), "the output was touched"


# --- interface


def test_the_registry_knows_it() -> None:
    words = make("channels", "bfloat16", (2, 70, 64), 5)
    spec = specification("key", "bfloat16", words.shape)
    for codec_id, config in (("hq", {"preset": "dense"}), ("bitplane", {"planes": [9, 7]})):
        twin, native = (get_codec(codec_id, backend=backend, **config) for backend in ("torch", "native"))
        assert twin.get_config() == native.get_config()
        assert as_bytes(twin.encode(spec, tensor(words))) == [bytes(level) for level in native.encode(spec, words)]
    assert isinstance(get_codec({"id": "hq", "anchor_bits": 4}, backend="torch"), TorchHQ)
    with pytest.raises(ConfigError, match="no torch backend; bitplane and hq"):
        get_codec("raw", backend="torch")
    with pytest.raises(ConfigError, match="known: native, torch"):
        get_codec("hq", backend="cuda")


def test_config_is_that_of_hq() -> None:
    codec = get_codec("hq", preset="dense")
    twin = TorchHQ.of(codec)
    assert twin.get_config() == codec.get_config()
    assert twin == codec
    assert (twin.levels, twin.exact, twin.wire_id) == (codec.levels, codec.exact, codec.wire_id)
    with pytest.raises(ConfigError, match="no hq codec"):
        TorchHQ.of(get_codec("raw"))


def test_arguments_are_checked() -> None:
    codec = TorchHQ(anchor_bits=4)
    spec = specification("key", "bfloat16", (1, 8, 8))
    good = torch.zeros(spec.shape, dtype=torch.bfloat16)
    levels = codec.encode(spec, good)
    for bad in (np.zeros(spec.shape, np.uint16), torch.zeros(1, 8, 9, dtype=torch.int16), torch.zeros(spec.shape)):
        with pytest.raises(SpecError):
            codec.encode(spec, bad)
        with pytest.raises(SpecError):
            codec.decode(spec, levels, bad)
    with pytest.raises(SpecError, match="levels"):
        codec.encode(spec, good, levels=[3])
    with pytest.raises(SpecError, match="0 levels"):
        codec.decode(spec, [], good)
    with pytest.raises(SpecError, match="uint8"):
        codec.decode(spec, [good], good)
    with pytest.raises(SpecError, match="use bitplane or raw"):
        codec.encode(specification("key", "float32", (1, 8, 8)), torch.zeros(1, 8, 8))


def test_payloads_on_another_device_are_refused() -> None:
    spec = specification("key", "bfloat16", (1, 8, 8))
    codec = TorchHQ(anchor_bits=4)
    levels = codec.encode(spec, torch.zeros(spec.shape, dtype=torch.bfloat16))
    with pytest.raises(SpecError, match="meta"):
        codec.decode(spec, levels, torch.zeros(spec.shape, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize("kind", ["channels", "special"])
def test_all_work_is_on_the_tensors_device(kind: str) -> None:
    """Whatever is not made on the device of the input would land on the default one, and operations would not mix."""
    for part, config in itertools.product(PARTS, CONFIGS[:3]):
        words = make(kind, "bfloat16", (1, 70, 80), 3)
        spec, codec = specification(part, "bfloat16", words.shape), TorchHQ(**config)
        with torch.device("meta"):
            levels = codec.encode(spec, tensor(words))
            out = torch.empty(spec.shape, dtype=torch.int16, device="cpu")
            codec.decode(spec, levels, out)
        assert np.array_equal(as_words(out), words)


def test_without_torch_the_error_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from lynxproto.errors import MissingDependencyError\n"
        "try:\n    import lynxproto.codecs.hq_torch\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "lynxproto[torch]"' in done.stdout
