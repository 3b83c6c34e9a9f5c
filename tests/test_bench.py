"""The benchmark: what it reads, what it reports, and that a wrong word is an error and not a result."""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lynxproto.bench.codec import codec as codec_command
from lynxproto.bench.contestants import PEERS, Contestant, Ours, SplitZip, select
from lynxproto.bench.machine import cpus
from lynxproto.bench.measure import Run, policy_bits
from lynxproto.bench.sources import Source, WorkingSet, read_source
from lynxproto.cachefile import Cache, save_cache
from lynxproto.chunk import DTYPES, ChunkSpec
from lynxproto.cli import main
from lynxproto.codecs import get_codec
from lynxproto.codecs.hq import HQ
from lynxproto.errors import BenchmarkError, CacheFileError, ConfigError
from lynxproto.manifest import Identity, Manifest

HQ_CONFIG = {"id": "hq", "key_bits": 4, "value_bits": 3}
# The allocator's settings would outlive the test: one test, in a process of its own, changes them.
SMALL = ["--working-set", "1", "--runs", "1", "--threads", "1", "--cold-allocator"]


def words(*shape: int) -> np.ndarray:
    values = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


@pytest.fixture
def npy(tmp_path):
    path = tmp_path / "small.npy"
    np.save(path, words(2, 2, 2, 96, 16))
    return path


def run(*args: object, fails: bool = False):
    result = CliRunner().invoke(main, ["bench", *map(str, args)])
    assert (result.exit_code == 1) is fails, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_json_says_what_was_measured(npy, tmp_path):
    out = tmp_path / "out.json"
    config = json.dumps(HQ_CONFIG)
    run(
        "codec",
        "--source",
        npy,
        *SMALL,
        "--codec",
        config,
        "--codec",
        "zstd-1",
        "--codec",
        "splitzip-scheme",
        "--json",
        out,
    )
    report = json.loads(out.read_text())
    assert report["schema"] == "lynxproto.bench.codec/1"
    assert report["memcpy_gb_per_s"] > 0
    hq, zstd, splitzip = report["results"]
    keys = {"codec", "preset", "source", "bits_per_value", "ratio", "encode_gb_per_s", "anchor_decode_gb_per_s"}
    assert all(keys | {"exact_decode_gb_per_s", "threads"} <= r.keys() for r in report["results"])
    assert [r["codec"] for r in report["results"]] == ["hq", "zstd-1", "splitzip-scheme"]
    assert [r["peer"] for r in report["results"]] == [False, True, True]
    assert all(r["source"] == "small" and r["threads"] == 1 for r in report["results"])

    # Sizes are those of the codec's payloads, headers included.
    cache = np.load(npy)
    sizes = np.zeros(3)
    for layer in cache:
        for part, array in zip(("key", "value"), layer, strict=True):
            spec = ChunkSpec(part=part, dtype="bfloat16", heads=2, tokens=96, head_dim=16)
            sizes += [len(payload) for payload in get_codec(HQ_CONFIG).encode(spec, array)]
    np.testing.assert_allclose(hq["bits_per_value"], 8 * sizes / cache.size, rtol=1e-4)
    assert hq["ratio"] == pytest.approx(sum(sizes) / cache.nbytes, rel=1e-3)
    assert len(hq["refine_gb_per_s"]) == 2
    assert all(hq[f"{name}_gb_per_s"] > 0 for name in ("encode", "anchor_encode", "anchor_decode", "exact_decode"))
    assert set(hq["parts"]) == {"key", "value"}
    assert len(hq["policy_bits_per_value"]) == 3

    assert zstd["anchor_decode_gb_per_s"] is None
    assert zstd["exact_decode_gb_per_s"] > 0
    assert splitzip["encode_gb_per_s"] is None
    assert 0.75 <= splitzip["ratio"] < 0.8
    assert report["environment"]["instruction_set"] in ("scalar", "avx2", "avx512", "neon")
    assert report["sources"][0]["copies"] * report["sources"][0]["bytes"] >= 1 << 20


def test_table(npy):
    args = ["codec", "--source", npy, *SMALL, "--codec", "bitplane"]
    table = run(*args).output
    assert "bitplane" in table
    assert "every word checked" in table


def test_json_on_standard_output_of_a_process(npy):
    command = [sys.executable, "-m", "lynxproto", "bench", "codec", "--source", npy, *SMALL[:-1], "--codec", "bitplane"]
    done = subprocess.run([*command, "--json", "-"], capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert report["results"][0]["codec"] == "bitplane"
    assert report["settings"]["warm_allocator"] is (platform.libc_ver()[0] == "glibc")


@pytest.mark.skipif(len(cpus()) < 2, reason="needs two processors")
def test_scaling_is_set_against_arithmetic(npy, tmp_path):
    out = tmp_path / "out.json"
    args = [
        "--working-set",
        1,
        "--runs",
        1,
        "--threads",
        2,
        "--cold-allocator",
        "--codec",
        "bitplane",
        "--codec",
        "zstd-1",
        "--json",
        out,
    ]
    run("codec", "--source", npy, *args)
    results = json.loads(out.read_text())["results"]
    assert [(r["codec"], r["threads"]) for r in results] == [("bitplane", 1), ("zstd-1", 1), ("bitplane", 2)]
    assert set(results[2]["scaling"]) == {"encode", "anchor_encode", "anchor_decode", "refine_1", "exact_decode"}
    assert all(scaling["to_arithmetic"] > 0 for scaling in results[2]["scaling"].values())


def test_affinity_is_given_back(npy):
    before = cpus()
    run("codec", "--source", npy, *SMALL, "--codec", "bitplane")
    assert cpus() == before


# --- a wrong word is an error -----------------------------------------------------------------------------------------


def small_set() -> WorkingSet:
    array = words(2, 96, 16)
    source = Source("small", "bfloat16", {(0, "key"): array, (0, "value"): array[:, ::-1]})
    return WorkingSet(source, target=1 << 16, chunk_bytes=4096)


class Forgetful(Contestant):
    """Loses the lowest bit of one word."""

    codec = "forgetful"

    def encode(self, spec, data, levels=None):
        damaged = data.copy()
        damaged[0, -1, 0] &= 0xFFFE
        return [damaged]

    def decode(self, spec, payloads, out):
        out[...] = payloads[0]


class Idle(Forgetful):
    """Writes nothing: a right answer that was left over from before must not count."""

    codec = "idle"

    def decode(self, spec, payloads, out):
        pass


class Short(Forgetful):
    """Returns too few words."""

    codec = "short"

    def decode(self, spec, payloads, out):
        return payloads[0].tobytes()[:-2]


class Moody(HQ):
    """An anchor that differs from one decode to the next."""

    calls = 0

    def decode(self, spec, levels, out, *, threads=1):
        state = super().decode(spec, levels, out, threads=threads)
        Moody.calls += 1
        out[0, 0, 0] = Moody.calls if len(levels) == 1 else out[0, 0, 0]
        return state


class TwoFaced(HQ):
    """An anchor that differs when it is made alone."""

    def encode(self, spec, array, *, levels=None, threads=1):
        payloads = super().encode(spec, array, levels=levels, threads=threads)
        return payloads if levels is None else [bytes(payloads[0]) + b"\0", *payloads[1:]]


@pytest.mark.parametrize(
    ("contestant", "what"),
    [
        (Forgetful(), "does not restore"),
        (Idle(), "does not restore"),
        (Short(), "does not restore"),
        (Ours(Moody(anchor_bits=4), None), "different words"),
        (Ours(TwoFaced(anchor_bits=4), None), "made alone"),
    ],
)
def test_a_wrong_result_is_an_error(contestant, what):
    with pytest.raises(BenchmarkError, match=what):
        Run(small_set(), [contestant], [1]).measure(1, lambda _: None)


def test_working_set_holds_distinct_copies():
    held = small_set()
    assert held.nbytes >= 1 << 16
    assert sum(chunk.spec.nbytes for chunk in held.chunks) == held.nbytes == held.copies * held.source.nbytes
    assert max(chunk.spec.nbytes for chunk in held.chunks) <= 4096
    addresses = {chunk.words.ctypes.data for chunk in held.chunks} | {chunk.out.ctypes.data for chunk in held.chunks}
    assert len(addresses) == 2 * len(held.chunks)
    for part in ("key", "value"):
        chunks = [chunk.words for chunk in held.originals if chunk.spec.part == part]
        np.testing.assert_array_equal(np.concatenate(chunks, axis=1), held.source.arrays[0, part])


def test_a_cache_larger_than_memory_is_thinned_out():
    array = words(2, 64, 16)
    source = Source("small", "bfloat16", {(layer, part): array for layer in range(10) for part in ("key", "value")})
    assert source.fitting(source.nbytes) == source
    half = source.fitting(source.nbytes // 2)
    assert {layer for layer, _ in half.arrays} == {0, 2, 4, 6, 8}
    assert half.layers_left_out == 5
    assert len(source.fitting(1).arrays) == 2


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3", "float32"])
def test_other_dtypes(dtype, tmp_path):
    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype=dtype, layers=1, kv_heads=2, head_dim=16, tokens=70
    )
    rng = np.random.default_rng(5)
    arrays = {
        (0, part): rng.integers(0, 256, (2, 70, 16 * DTYPES[dtype].itemsize), np.uint8).view(DTYPES[dtype])
        for part in ("key", "value")
    }
    path = save_cache(tmp_path / "dump.safetensors", Cache(manifest=manifest, arrays=arrays))
    out = tmp_path / "out.json"
    names = [arg for name in ["bitplane", *PEERS] for arg in ("--codec", name)]
    run("codec", "--source", path, *SMALL, *names, "--json", out)
    report = json.loads(out.read_text())
    done = {r["codec"] for r in report["results"]}
    left = {s["codec"] for s in report["skipped"]}
    assert done | left == {"bitplane", *PEERS}
    assert ("bitplane" in done) is (dtype == "float16")
    assert {"zipnn", "splitzip-scheme"} <= left
    assert "zstd-1" in done


def test_policy_bits_count_sinks_and_recent_tokens():
    source = Source("small", "bfloat16", {(0, "key"): words(2, 256, 16), (0, "value"): words(2, 256, 16)})
    ours = Ours(get_codec(HQ_CONFIG), None)
    measured = Run(WorkingSet(source, target=1, chunk_bytes=1 << 20), [ours], [1])
    measured.measure(1, lambda _: None)
    # 4 tokens at 16 bits and 32 at 8 instead of about 4, of 256
    assert policy_bits(source, ours)[0] > measured.cases[0].bits()[0]


# --- peers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PEERS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 5), (2, 64, 64)])
def test_peers_restore_words(name, shape):
    chosen, skipped = select([name], [])
    if skipped:
        pytest.skip(skipped[0].reason)
    array = words(*shape)
    spec = ChunkSpec("key", "bfloat16", *shape)
    payloads = chosen[0].encode(spec, chosen[0].prepare(array))
    out = np.zeros_like(array)
    decoded = chosen[0].decode(spec, payloads, out)
    restored = out if decoded is None else np.frombuffer(decoded, np.uint16).reshape(shape)
    np.testing.assert_array_equal(restored, words(*shape))


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.uint16, st.integers(1, 200)))
def test_splitzip_scheme_restores_any_words(array):
    array = array.reshape(1, 1, -1)
    spec = ChunkSpec("key", "bfloat16", *array.shape)
    payloads = SplitZip().encode(spec, array)
    out = np.zeros_like(array)
    SplitZip().decode(spec, payloads, out)
    np.testing.assert_array_equal(out, array)
    escapes = len(np.unique(array >> 7 & 0xFF)) > 16
    assert (payloads[3].nbytes > 0) is escapes


def test_absent_peers_are_named(npy, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lz4.block", None)  # as if it were not installed
    out = tmp_path / "out.json"
    run("codec", "--source", npy, *SMALL, "--codec", "lz4", "--codec", "bitplane", "--json", out)
    assert json.loads(out.read_text())["skipped"] == [{"codec": "lz4", "reason": "not installed: pip install lz4"}]
    assert "lz4: not installed" in run("codec", "--source", npy, *SMALL, "--codec", "lz4", fails=True).output


# --- sources and arguments --------------------------------------------------------------------------------------------


def test_sources(tmp_path):
    np.save(tmp_path / "one.npy", words(2, 5, 8))
    one = read_source(tmp_path / "one.npy")
    assert (one.name, one.dtype, list(one.arrays), one.tokens) == ("one", "bfloat16", [(0, "key")], 5)
    np.save(tmp_path / "half.npy", np.ones((3, 2, 2, 5, 8), np.float16))
    half = read_source(tmp_path / "half.npy")
    assert (half.dtype, len(half.arrays), half.nbytes) == ("float16", 6, 3 * 2 * 2 * 5 * 8 * 2)

    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=2, head_dim=8, tokens=5
    )
    arrays = {(0, "key"): words(2, 5, 8), (0, "value"): words(2, 5, 8)}
    path = save_cache(tmp_path / "dump.safetensors", Cache(manifest=manifest, arrays=arrays))
    dump = read_source(path)
    assert set(dump.arrays) == set(arrays)
    assert [spec.parts for spec in dump.layer_specs()] == [("key", "value")]


@pytest.mark.parametrize(
    ("array", "what"),
    [
        (np.zeros((2, 3, 4)), "float64"),
        (np.zeros((2, 3), np.uint16), "shape"),
        (np.zeros((1, 3, 2, 3, 4), np.uint16), "shape"),
        (np.zeros((2, 0, 4), np.uint16), "shape"),
    ],
)
def test_bad_arrays_are_named(tmp_path, array, what):
    np.save(tmp_path / "bad.npy", array)
    with pytest.raises(CacheFileError, match=what):
        read_source(tmp_path / "bad.npy")


def test_bad_files_are_named(tmp_path, npy):
    (tmp_path / "text.npy").write_text("no array")
    with pytest.raises(CacheFileError, match="cannot read"):
        read_source(tmp_path / "text.npy")
    (tmp_path / "text.safetensors").write_text("no cache, and long enough to look at")
    with pytest.raises(CacheFileError, match="not a KV cache"):
        read_source(tmp_path / "text.safetensors")
    quality = tmp_path / "quality.json"
    quality.write_text('{"schema": "something"}')
    assert "lynxproto.bench.quality/1" in run("codec", "--source", npy, "--quality", quality, fails=True).output


def test_bad_arguments_are_named(npy):
    for name in ("nonsense", "{", '{"id": "nonsense"}', "[]"):
        with pytest.raises((ConfigError, LookupError)):
            select([name], [])
    with pytest.raises(ConfigError):
        select(["hq"], ["no such preset"])
    assert "processors" in run("codec", "--source", npy, "--threads", 100_000, fails=True).output
    assert {p.name for p in codec_command.params} >= {"json_path", "plot_path", "quick", "runs", "threads"}


def test_without_a_model_the_built_in_sources_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as if it were not installed
    output = run("codec", "--built-in", "smollm2-prose-1792", *SMALL, "--codec", "bitplane", fails=True).output
    assert "pip install" in output
    assert "--source" in output


def test_plots(npy, tmp_path):
    pytest.importorskip("matplotlib")
    quality = tmp_path / "quality.json"
    result = {"method": "hq fast", "bits_per_value": 3.3, "budget": None, "top1": 0.97, "top1_se": 0.004}
    quality.write_text(json.dumps({"schema": "lynxproto.bench.quality/1", "windows": 12, "results": [result]}))
    plot = tmp_path / "plot.png"
    args = ["codec", "--source", npy, *SMALL, "--codec", "bitplane", "--codec", "zstd-1"]
    run(*args, "--plot", plot, "--quality", quality)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["chaos", "codec", "instructions", "link", "quality", "transport", "ucx"])
def test_what_cannot_be_written_is_refused_before_the_work(name, tmp_path, monkeypatch):
    assert "is not a folder" in run(name, "--json", tmp_path / "no" / "out.json", fails=True).output
    if name in ("codec", "link", "quality", "transport"):
        assert "is not a folder" in run(name, "--plot", tmp_path / "no" / "out.png", fails=True).output
        if importlib.util.find_spec("matplotlib"):
            assert "use one of ." in run(name, "--plot", tmp_path / "out.nonsense", fails=True).output
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
        assert "pip install 'lynxproto[plot]'" in run(name, "--plot", tmp_path / "out.png", fails=True).output


def test_nothing_to_draw_is_told_before_the_work(tmp_path):
    pytest.importorskip("matplotlib")
    output = run("transport", "--only", "frames", "--plot", tmp_path / "plot.png", fails=True).output
    assert "nothing to draw" in output


def test_a_quick_run_takes_the_source_that_is_named(npy, tmp_path):
    out = tmp_path / "out.json"
    run("codec", "--quick", "--source", npy, "--codec", "bitplane", "--threads", 1, "--working-set", 1, "--json", out)
    assert [source["source"] for source in json.loads(out.read_text())["sources"]] == [npy.stem]


# --- instruction counts -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
def test_instruction_counts_and_their_baseline(tmp_path):
    baseline, out = tmp_path / "baseline.json", tmp_path / "out.json"
    before = {"codec": "bitplane", "preset": None, "part": "key", "operation": "encode", "instructions_per_value": 0.01}
    baseline.write_text(json.dumps({"schema": "lynxproto.bench.instructions/1", "results": [before]}))
    result = run("instructions", "--codec", "bitplane", "--json", out, "--baseline", baseline, fails=True)
    assert "bitplane key encode" in result.output
    counts = {(r["part"], r["operation"]): r["instructions_per_value"] for r in json.loads(out.read_text())["results"]}
    assert len(counts) == 10
    assert all(0.1 < count < 1000 for count in counts.values())
    assert counts["key", "encode"] > counts["key", "anchor_encode"]


def test_only_own_codecs_are_counted():
    assert "lynxproto's own codecs" in run("instructions", "--codec", "splitzip-scheme", fails=True).output
