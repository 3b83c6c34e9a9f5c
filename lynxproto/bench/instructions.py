"""``lynxproto bench instructions``: instructions a value of the codecs' kernels, counted by callgrind.

A count does not depend on what else the machine does, so it shows a regression of one percent that no clock would.
Valgrind runs this module as a program. It counts while the C library's entry points run, and writes a profile each
time the program calls ``lynx_strerror``, which serves as a mark between operations.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import click
import numpy as np
from numpy.typing import NDArray

from lynxproto.bench.contestants import Contestant, Ours, own_names, select
from lynxproto.bench.outputs import json_option, write_json
from lynxproto.chunk import ChunkSpec, Part
from lynxproto.errors import BenchmarkError, ConfigError, MissingDependencyError

__all__ = ["instructions"]

SCHEMA: Final = "lynxproto.bench.instructions/1"
#: Functions that are counted, with all that they call. None of them may call another: counting would stop there.
_ENTRY_POINTS: Final = (
    "lynx_hq_encode_tile",
    "lynx_hq_decode_tile",
    "lynx_bitplane_pack",
    "lynx_bitplane_unpack",
)
_MARK: Final = "lynx_strerror"
_SHAPE: Final = (2, 512, 64)
_PARTS: Final[tuple[Part, Part]] = ("key", "value")


@click.command()
@click.option("--codec", "codecs", multiple=True, help="Codec id, or codec config as JSON; default: all.")
@click.option("--preset", "presets", multiple=True, help="Preset of hq; default: all.")
@json_option("counts")
@click.option(
    "--baseline",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON of an earlier run; exit with an error if a count has grown.",
)
@click.option("--tolerance", default=0.02, show_default=True, help="Growth that is let pass.")
def instructions(
    *,
    codecs: Sequence[str],
    presets: Sequence[str],
    json_path: str | None,
    baseline: Path | None,
    tolerance: float,
) -> None:
    """Count the instructions that kernels take for a value.

    Needs valgrind, under which AVX-512 kernels do not run.
    """
    from rich.console import Console
    from rich.table import Table

    _chosen(codecs, presets)  # a mistake shows here, and not inside valgrind
    expected = {} if baseline is None else _read_baseline(baseline)
    counted = _count(codecs, presets)
    if json_path != "-":
        table = Table(title=f"instructions a value, {counted['instruction_set']} kernels")
        for name in ("codec", "part", "operation", "instructions"):
            table.add_column(name, justify="right" if name == "instructions" else "left")
        for r in counted["results"]:
            label = f"{r['codec']} {r['preset'] or ''}"
            table.add_row(label, r["part"], r["operation"], f"{r['instructions_per_value']:.2f}")
        Console(width=None if sys.stdout.isatty() else 100).print(table)
    if json_path is not None:
        write_json(json_path, counted)
    grown = [
        f"{' '.join(filter(None, key))}: {now:.2f} instead of {before:.2f}"
        for r in counted["results"]
        if (before := expected.get(key := _key(r))) is not None
        and (now := r["instructions_per_value"]) > before * (1 + tolerance)
    ]
    if grown:
        raise BenchmarkError(f"more instructions than {baseline} allows: " + "; ".join(grown))


def _key(result: dict[str, Any]) -> tuple[str, str, str, str]:
    return result["codec"], result["preset"] or "", result["part"], result["operation"]


def _read_baseline(path: Path) -> dict[tuple[str, str, str, str], float]:
    try:
        baseline = json.loads(path.read_text(encoding="utf-8"))
        if baseline["schema"] != SCHEMA:
            raise ValueError(f"its schema is {baseline['schema']!r}")
        return {_key(r): float(r["instructions_per_value"]) for r in baseline["results"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not the JSON of `bench instructions` ({error})") from error


def _count(codecs: Sequence[str], presets: Sequence[str]) -> dict[str, Any]:
    if shutil.which("valgrind") is None:
        raise MissingDependencyError("counting instructions needs valgrind; apt-get install valgrind")
    with tempfile.TemporaryDirectory(prefix="lynxproto-") as folder:
        profile = Path(folder) / "callgrind"
        command = [
            "valgrind",
            "--tool=callgrind",
            f"--callgrind-out-file={profile}",
            *(f"--toggle-collect={name}" for name in _ENTRY_POINTS),
            f"--dump-before={_MARK}",
            sys.executable,
            "-m",
            __name__,
            json.dumps({"codecs": list(codecs), "presets": list(presets)}),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"counting under valgrind failed: {done.stderr.strip().splitlines()[-1]}")
        report = json.loads(done.stdout)
        # callgrind.1 is what ran before the first mark, callgrind.2 the first operation...
        for number, result in enumerate(report["results"], 2):
            match = re.search(r"^totals: (\d+)", profile.with_suffix(f".{number}").read_text(), re.MULTILINE)
            result["instructions_per_value"] = round(int(match[1] if match else 0) / np.prod(_SHAPE), 3)
    return {"schema": SCHEMA, **report}


def _tile(part: Part) -> NDArray[np.uint16]:
    """Words like those of a cache: channels with their own mean and spread. The same on every machine."""
    random = np.random.RandomState(1)  # its streams never change, unlike those of default_rng
    heads, _, head_dim = _SHAPE
    spread = np.exp(random.standard_normal((heads, 1, head_dim)))
    mean = random.standard_normal((heads, 1, head_dim)) * (2 if part == "key" else 0)
    values = (random.standard_normal(_SHAPE) + mean) * spread
    return ((values.astype(np.float32).view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def _operations(ours: Ours, spec: ChunkSpec, words: NDArray[Any]) -> Iterator[str]:
    """Runs each operation, after its name was taken."""
    out = np.empty_like(words)
    yield "encode"
    payloads = ours.encode(spec, words)
    yield "anchor_encode"
    ours.encode(spec, words, [0])
    yield "anchor_decode"
    state = ours.start(spec, payloads[0], out)
    for level in range(1, ours.levels):
        yield f"refine_{level}"
        state = ours.refine(spec, state, level, payloads[level], out)
    if ours.exact:
        yield "exact_decode"
        ours.decode(spec, payloads, out)
        if not np.array_equal(out, words):
            raise BenchmarkError(f"{ours.label} does not restore the words")


def _main(options: dict[str, Any]) -> dict[str, Any]:
    from lynxproto.codecs._library import instruction_set, lib

    results = []
    for contestant in _chosen(options["codecs"], options["presets"]):
        for part in _PARTS:
            spec = ChunkSpec(part=part, dtype="bfloat16", heads=_SHAPE[0], tokens=_SHAPE[1], head_dim=_SHAPE[2])
            words = _tile(part)
            for operation in _operations(contestant, spec, words):
                lib.lynx_strerror(lib.LYNX_OK)
                results.append(_named(contestant, part, operation))
    lib.lynx_strerror(lib.LYNX_OK)  # ends the last operation
    return {"instruction_set": instruction_set(), "results": results}


def _named(contestant: Contestant, part: Part, operation: str) -> dict[str, Any]:
    return {"codec": contestant.codec, "preset": contestant.preset, "part": part, "operation": operation}


def _chosen(codecs: Sequence[str], presets: Sequence[str]) -> list[Ours]:
    chosen, _ = select(codecs or own_names(presets), presets)
    ours = [contestant for contestant in chosen if isinstance(contestant, Ours)]
    if len(ours) < len(chosen) or not ours:
        raise ConfigError("instructions are counted for lynxproto's own codecs; name one of them")
    return ours


if __name__ == "__main__":
    print(json.dumps(_main(json.loads(sys.argv[1]))))
