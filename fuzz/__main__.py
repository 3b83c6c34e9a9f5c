"""``python -m fuzz``: builds, seeds and runs the fuzz targets, and says what they did. fuzz/README.md."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import click
from rich.console import Console
from rich.table import Table

from fuzz.seeds import write_seeds

ROOT: Final = Path(__file__).parents[1]
BUILD: Final = ROOT / "build" / "fuzz"
FINDINGS: Final = BUILD / "findings"

#: Executions of each target in a run of ``--runs 1``: about as long as each other, about three minutes in all on two
#: cores.
NATIVE: Final = {"hq_decode": 150_000, "hq_encode": 8_000, "bitplane": 20_000, "crc32c": 100_000, "wire": 120_000}
PYTHON: Final = {"frames": 200_000, "connection": 2_000, "codecs": 4_000, "capture": 10_000, "objects": 10_000}
_MAX_BYTES: Final = 2048
_MEMORY_MB: Final = 2048  # a run that needs more has allocated what its input told it to


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one target did."""

    target: str
    executions: int
    seconds: float
    coverage: int
    finding: str | None

    @property
    def rate(self) -> float:
        """Executions a second."""
        return self.executions / self.seconds if self.seconds else 0.0


def _compiler() -> str:
    names = ("clang", *(f"clang-{version}" for version in range(22, 12, -1)))
    for name in names:
        if path := shutil.which(name):
            return path
    raise click.ClickException("clang is missing: apt-get install clang libclang-rt-dev")


def build_native(target: str) -> Path:
    """The libFuzzer binary of a native target, with the whole library under ASan and UBSan."""
    compiler, library, binary = _compiler(), BUILD / "lib" / "liblynxproto.a", BUILD / "bin" / target
    binary.parent.mkdir(parents=True, exist_ok=True)
    flags = ["-g", "-O2", "-fno-sanitize-recover=all"]
    make = ["make", "-s", "-j2", "-C", "native", f"CC={compiler}", f"BUILD={library.parent}", str(library)]
    options = " ".join([*flags, "-fsanitize=fuzzer-no-link,address,undefined"])
    _run([*make, f"CFLAGS={options}"])
    source = f"fuzz/native/{target}.c"
    strict = ["-std=c11", "-Wall", "-Werror", "-Inative/include"]
    _run([compiler, *strict, *flags, "-fsanitize=fuzzer,address,undefined", source, str(library), "-o", str(binary)])
    return binary


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        needs = "it needs make, clang and libclang-rt-dev"
        raise click.ClickException(f"a fuzz target does not build ({needs}):\n{done.stdout}{done.stderr}")


def _command(target: str) -> list[str]:
    if target in NATIVE:
        return [str(build_native(target))]
    return [sys.executable, "-m", "fuzz.python_target", target]


_DONE: Final = re.compile(r"Done (\d+) runs in (\d+) second|stat::number_of_executed_units:\s*(\d+)")
_COVERAGE: Final = re.compile(r"cov: (\d+)")


def run_target(target: str, *, runs: int, seconds: float, echo: bool) -> Outcome:
    """Fuzz for ``runs`` executions (0: any number) and at most ``seconds`` (0: any time)."""
    corpus = BUILD / "corpus" / target
    corpus.mkdir(parents=True, exist_ok=True)
    FINDINGS.mkdir(parents=True, exist_ok=True)
    options = [
        f"-runs={runs or -1}", f"-max_total_time={int(seconds)}", f"-max_len={_MAX_BYTES}", "-timeout=25",
        f"-rss_limit_mb={_MEMORY_MB}", f"-artifact_prefix={FINDINGS}/{target}-", "-print_final_stats=1", "-seed=1",
        "-use_value_profile=1",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ASAN_OPTIONS": "detect_leaks=1"}
    began = time.monotonic()
    process = subprocess.Popen(
        [*_command(target), *options, str(corpus), str(BUILD / "seeds" / target)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment, cwd=ROOT,
    )  # fmt: skip
    assert process.stdout is not None
    executions = coverage = 0
    tail: list[str] = []
    for line in process.stdout:
        if echo:
            click.echo(line, nl=False, err=True)
        tail = [*tail[-60:], line]
        if found := _DONE.search(line):
            executions = int(next(group for group in (found[1], found[3]) if group))
        if found := _COVERAGE.search(line):
            coverage = int(found[1])
    failed = process.wait() != 0
    return Outcome(target, executions, time.monotonic() - began, coverage, "".join(tail) if failed else None)


def _run_all(targets: list[str], scale: float, minutes: float, echo: bool) -> Iterator[Outcome]:
    for target in targets:
        runs = 0 if minutes else max(1, int({**NATIVE, **PYTHON}[target] * scale))
        yield run_target(target, runs=runs, seconds=60 * minutes, echo=echo)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("targets", nargs=-1, type=click.Choice([*NATIVE, *PYTHON]))
@click.option("--runs", default=1.0, show_default=True, help="Times the executions that CI does.")
@click.option("--minutes", default=0.0, help="Instead: fuzz each target for so long.")
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.option("--verbose", is_flag=True, help="Show libFuzzer's own lines.")
def main(targets: tuple[str, ...], runs: float, minutes: float, as_json: bool, verbose: bool) -> None:
    """Fuzz TARGETS (default: all). Inputs that fail are kept in build/fuzz/findings; the exit code is 1 then."""
    chosen = list(targets) or [*NATIVE, *PYTHON]
    write_seeds(BUILD / "seeds")
    console = Console(stderr=as_json)
    table = Table("target", "executions", "a second", "edges", "outcome")
    outcomes = []
    with console.status("fuzzing") as status:
        for outcome in _run_all(chosen, runs, minutes, verbose):
            outcomes.append(outcome)
            status.update(f"{outcome.target} is done")
            table.add_row(
                outcome.target, f"{outcome.executions:,}", f"{outcome.rate:,.0f}", f"{outcome.coverage:,}",
                "FAILED" if outcome.finding else "clean",
            )  # fmt: skip
    console.print(table)
    if as_json:
        click.echo(json.dumps({"schema": "lynxproto.fuzz/1", "results": [asdict(outcome) for outcome in outcomes]}))
    failures = [outcome for outcome in outcomes if outcome.finding]
    for outcome in failures:
        click.echo(f"\n{outcome.target}:\n{outcome.finding}", err=True)
    if failures:
        click.echo(f"inputs that fail are in {FINDINGS}; run one again: see fuzz/README.md", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
