"""examples/c and the programs of docs/embedding/c.md, built with the installed library, and what they do."""

from __future__ import annotations

import asyncio
import random
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from installed import ROOT, examples, install, program, run
from numpy.typing import NDArray
from test_session import make_cache

from lynxproto import connect, listen
from lynxproto.capture import CaptureWriter, Direction
from lynxproto.chunk import DTYPES, Part, Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.digest import crc32c, tile_digest
from lynxproto.frames import End, Header, Open, Plan, TileKey, control_frame, data_frame
from lynxproto.manifest import Identity, LayerSpec, Manifest

PLACES = [("16", "nhd"), ("128", "hnd"), ("7", "nhd"), ("1", "hnd")]


@pytest.fixture(scope="module", params=["shared", "sanitized"])
def programs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return examples(tmp_path_factory.mktemp(request.param), sanitized=request.param == "sanitized")


def decode(programs: Path, capture: Path, page_tokens: str = "16", layout: str = "nhd") -> tuple[int, str]:
    """Exit code, and all that the program said."""
    command = [programs / "decode", capture, "--page-tokens", page_tokens, "--layout", layout]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, timeout=60)
    assert "Sanitizer" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), f"{done.returncode}: {done.stderr}"
    return done.returncode, done.stdout + done.stderr


@dataclass
class Cut:
    """A tile, and the codec config that it takes."""

    part: Part
    heads: tuple[int, int]
    tokens: TokenSet
    codec: int
    digest: bytes = b""
    levels: list[Any] = field(default_factory=list)


LAYER = LayerSpec(index=5, kv_heads=3, head_start=2, key_dim=80, value_dim=64, token_start=10, token_stop=210)


def write_capture(
    path: Path, dtype: str, codecs: list[dict[str, Any]], cuts: list[Cut], change: Any = None, *, mixed: bool = True
) -> None:
    """One layer, its frames in any order on two stripes, unless not ``mixed``; ``change(frames)`` may spoil them."""
    rng = np.random.default_rng(3)
    words: dict[Part, NDArray[Any]] = {}
    for part in ("key", "value"):
        values = rng.standard_normal((3, 200, LAYER.head_dim(part)), np.float32) * 3
        words[part] = (values.view(np.uint32) >> (32 - 8 * DTYPES[dtype].itemsize)).astype(DTYPES[dtype])
    manifest = Manifest(
        identity=Identity(model="m"), dtype=dtype, layers=(LAYER,), prompt_tokens=300, codecs=tuple(codecs)
    )
    keys = []
    for cut in cuts:
        tile = Tile(5, cut.part, cut.heads[0], cut.heads[1] - cut.heads[0], cut.tokens, cut.codec)
        spec = tile.spec(dtype, LAYER.head_dim(cut.part))
        chosen = words[cut.part][cut.heads[0] - 2 : cut.heads[1] - 2][:, [t - 10 for t in cut.tokens]]
        cut.levels = get_codec(codecs[cut.codec]).encode(spec, chosen)
        cut.digest = tile_digest(spec, np.ascontiguousarray(chosen))
        keys.append(TileKey.of(tile))
    plan = Plan(layer=5, tiles=tuple(keys), levels=tuple(len(cut.levels) for cut in cuts))
    said = {
        "open": control_frame(Open(manifest=manifest.to_bytes()), 9),
        "plan": control_frame(plan, 9),
        "end": control_frame(End(layer=5, digests=tuple(cut.digest for cut in cuts)), 9),
    }
    for i, (key, cut) in enumerate(zip(keys, cuts, strict=True)):
        for level, payload in enumerate(cut.levels):
            frame = data_frame(
                9, key, level, memoryview(payload), attempt=0, codec_id=get_codec(codecs[cut.codec]).wire_id
            )
            said[f"data {i} {level}"] = b"".join(frame)
    if change is not None:
        change(said)
    order = list(said.values())
    if mixed:
        random.Random(1).shuffle(order)
    with CaptureWriter(path) as writer:
        stripes = [writer.opened(), writer.opened()]
        for i, frame in enumerate(order):
            for part in (frame[:50], frame[50:]):  # records may cut frames
                writer.data(stripes[i % 2 if mixed else 0], Direction.TO_SERVER, [part])


def whole(part: Part, codec: int) -> list[Cut]:
    return [Cut(part, (2, 5), TokenSet.range(10, 210), codec)]


def explicit(part: Part, codecs: tuple[int, int]) -> list[Cut]:
    """Every third token apart from the others, and of heads by two."""
    some = TokenSet.of(range(10, 210, 3))
    others = TokenSet.of(sorted(set(range(10, 210)) - set(some)))
    return [
        Cut(part, heads, tokens, codec)
        for heads in ((2, 4), (4, 5))
        for tokens, codec in zip((some, others), codecs, strict=True)
    ]


HQ = {"id": "hq", "preset": "balanced"}
CAPTURES: dict[str, tuple[str, list[dict[str, Any]], list[Cut]]] = {
    "hq": ("bfloat16", [get_codec(HQ).get_config()], whole("key", 0) + whole("value", 0)),
    "hq, two levels, float16": ("float16", [{"id": "hq", "levels": 2}], whole("key", 0) + whole("value", 0)),
    "hq with a table": (
        "bfloat16",
        [{"id": "hq", "widths": {"keys": [["3" * 80] * 3 + ["4" * 40 + "2" * 40] * 2] * 6, "values": ["34533"] * 6}}],
        whole("key", 0) + whole("value", 0),
    ),
    "explicit sets": (
        "bfloat16", [get_codec(HQ).get_config(), {"id": "raw"}], explicit("key", (1, 0)) + explicit("value", (0, 1)),
    ),
    "bit planes": ("bfloat16", [{"id": "bitplane", "planes": [9, 7]}], whole("key", 0) + explicit("value", (0, 0))),
    "fp8": (
        "float8_e4m3", [{"id": "bitplane", "planes": [4, 2, 2]}, {"id": "raw"}],
        whole("key", 0) + explicit("value", (0, 1)),
    ),
    "float32": ("float32", [{"id": "bitplane", "planes": [9, 23]}, {"id": "raw"}], whole("key", 0) + whole("value", 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", CAPTURES)
def test_every_codec_lands_exactly_in_any_pages(programs: Path, case: str, tmp_path: Path) -> None:
    dtype, codecs, cuts = CAPTURES[case]
    write_capture(tmp_path / "c.lynx", dtype, codecs, cuts)
    for page_tokens, layout in PLACES:
        code, said = decode(programs, tmp_path / "c.lynx", page_tokens, layout)
        assert f"tiles: {len(cuts)} exact, 0 wrong, 0 not complete; 0 damaged" in said
        assert code == 0


def test_what_is_wrong_is_told(programs: Path, tmp_path: Path) -> None:
    dtype, codecs, cuts = CAPTURES["hq"]
    path = tmp_path / "c.lynx"

    def damage(said: dict[str, bytes]) -> None:
        said["data 0 2"] = said["data 0 2"][:-1] + bytes([said["data 0 2"][-1] ^ 1])

    def lie(said: dict[str, bytes]) -> None:
        said["end"] = control_frame(End(layer=5, digests=(cuts[0].digest, bytes(16))), 9)

    def spoil(said: dict[str, bytes]) -> None:
        header, payload = Header.unpack(said["data 0 1"][:64]), said["data 0 1"][64:-40] + bytes(40)
        said["data 0 1"] = header._replace(payload_crc=crc32c(payload)).pack() + payload

    for change, expected in (
        (damage, "1 exact, 0 wrong, 1 not complete; 1 damaged payloads"),
        (lie, "1 exact, 1 wrong, 0 not complete"),
        (lambda said: said.pop("data 1 0"), "1 exact, 0 wrong, 1 not complete"),
        (lambda said: said.pop("plan"), "belongs to no tile of the plans"),
        (spoil, r"level 1|wrong"),
    ):
        write_capture(path, dtype, codecs, cuts, change)
        code, said = decode(programs, path)
        assert code == 1
        assert re.search(expected, said), said
    for content, expected in (
        (b"", "no capture"),
        (path.read_bytes()[:1000], "no transfer|cut off"),
        (b"x" * 99, "no capture"),
    ):
        path.write_bytes(content)
        code, said = decode(programs, path)
        assert code == 1
        assert re.search(expected, said), said


def test_a_session_that_was_captured(programs: Path, tmp_path: Path) -> None:
    cache = make_cache()

    async def main() -> None:
        with CaptureWriter(tmp_path / "s.lynx") as sending, CaptureWriter(tmp_path / "r.lynx") as receiving:
            async with (
                listen("tcp://127.0.0.1:0", insecure=True, capture=receiving) as receiver,
                connect(receiver.url, insecure=True, capture=sending) as sender,
            ):
                done = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
                async for incoming in receiver:
                    await incoming.exact()
                    break
                await done

    asyncio.run(main())
    for side in ("s.lynx", "r.lynx"):
        for page_tokens, layout in PLACES[:2]:
            code, said = decode(programs, tmp_path / side, page_tokens, layout)
            assert re.search(r"tiles: \d+ exact, 0 wrong, 0 not complete", said), said
            assert code == 0


def test_a_benchmark_of_the_example(programs: Path, tmp_path: Path) -> None:
    dtype, codecs, cuts = CAPTURES["hq"]
    write_capture(tmp_path / "c.lynx", dtype, codecs, cuts)
    said = run(programs / "decode", tmp_path / "c.lynx", "--benchmark", 2)
    assert len(re.findall(r"round \d: anchor [\d.]+ GB/s, exact [\d.]+ GB/s", said)) == 2
    assert "usage" in subprocess.run([programs / "decode"], capture_output=True, text=True, check=False).stderr


@pytest.mark.parametrize(("tokens", "threads"), [(1, 1), (513, 2), (1030, 3)])
def test_a_paged_cache_goes_from_one_layout_to_another(programs: Path, tokens: int, threads: int) -> None:
    said = run(programs / "convert", tokens, threads)
    assert said.endswith("0 words differ\n")
    assert f"{tokens} tokens, {2 * -(-tokens // 512)} chunks, {threads} threads" in said


def test_there_is_no_python_in_the_process(programs: Path) -> None:
    for name in ("decode", "convert"):
        needed = set(re.findall(r"NEEDED.*\[(.*?)[.\]]", run(program("readelf", "binutils"), "-d", programs / name)))
        assert needed <= {"liblynxproto", "libxxhash", "libc", "libstdc++", "libgcc_s", "libm", "libasan", "libubsan"}


# --- the page


PAGE = (ROOT / "docs" / "embedding" / "c.md").read_text()
BLOCK = re.compile(r"^```(c|cpp)\n(.*?)^```\n+prints\n+```\n(.*?)^```", re.MULTILINE | re.DOTALL)


def test_the_programs_of_the_page(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each says what the page says, in C and in C++."""
    library = install(tmp_path_factory.mktemp("page"))
    write_capture(tmp_path / "capture.lynx", *CAPTURES["hq"], mixed=False)
    blocks = BLOCK.findall(PAGE)
    assert len(blocks) == PAGE.count("```c\n") + PAGE.count("```cpp\n") == 2
    for i, (language, source, printed) in enumerate(blocks):
        (tmp_path / f"{i}.{language}").write_text(source)
        for compiler, standard in {"c": [("gcc", "c11"), ("g++", "c++17")], "cpp": [("g++", "c++17")]}[language]:
            binary = tmp_path / f"{i}-{compiler}"
            kind = ("-x", "c++") if compiler == "g++" else ("-x", "c")
            run(
                program(compiler, compiler), *kind, f"-std={standard}", "-Wall", "-Wextra", "-Werror", "-O1",
                *library.pkg_config("--cflags", "lynxproto"), tmp_path / f"{i}.{language}", "-x", "none", "-o", binary,
                *library.pkg_config("--libs", "lynxproto"), f"-Wl,-rpath,{library.lib}",
            )  # fmt: skip
            assert run(binary, cwd=tmp_path) == printed


def test_the_page_names_every_function() -> None:
    header = "".join(path.read_text() for path in (ROOT / "native" / "include").glob("*.h"))
    functions = set(re.findall(r"LYNX_API [\w ]+?\*?(lynx_\w+)\(", header))
    assert {name for name in functions if f"`{name}`" not in PAGE} == set()
