"""What the demo measured: medians, tables, checks, and the JSON that others read (docs/demo.md lists its keys)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from statistics import median
from typing import Any, Final

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

__all__ = ["METHODS", "Measurement", "Report", "Table", "level_names"]

#: In the order in which they are shown.
METHODS: Final = ("bf16", "int8", "int4", "lynxproto")
_SCHEMA: Final = "lynxproto.demo/1"
#: The link may carry this much at once (burst), beyond its rate: 5 ms worth, at least 16 KiB.
_BURST_S: Final = 5e-3
_BURST_BYTES: Final = 16 << 10


class Table(Enum):
    """When a method may start sending, and over what."""

    SENT_WHOLE = "methods"
    STREAMED = "streamed"
    FAST_LINK = "fast_link"


def level_names(method: str) -> dict[int, str]:
    """What the levels of a method are called."""
    if method != "lynxproto":
        return {0: "cache"}
    return {0: "anchor", 1: "residual 1", 2: "residual 2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One run of one method: what the prefill process (``sent``) and the decode process (``decode``) reported."""

    method: str
    link: float | None
    sent: Mapping[str, Any]
    decode: Mapping[str, Any]

    def since_complete(self, time: float) -> float:
        """Seconds since the KV cache was complete at the sender."""
        return time - float(self.sent["complete"])

    @property
    def first_provisional(self) -> float:
        """Until the first token that needed the transferred cache was shown (and stayed)."""
        return self.since_complete(self.decode["shown"][0])

    @property
    def first_verified(self) -> float:
        """Until that token was committed."""
        return self.since_complete(self.decode["committed"][0])

    @property
    def last_provisional(self) -> float:
        """The same for the last token asked for."""
        return self.since_complete(self.decode["shown"][-1])

    @property
    def last_verified(self) -> float:
        """The same for the last token asked for."""
        return self.since_complete(self.decode["committed"][-1])

    def level_bytes(self) -> dict[int, int]:
        """Bytes of each level's frames."""
        return {int(level): stats["bytes"] for level, stats in sorted(self.decode["levels"].items())}

    @property
    def total_bytes(self) -> int:
        """Bytes of all levels."""
        return sum(self.level_bytes().values())

    @property
    def earliest(self) -> float:
        """Seconds after sending began before which the first level cannot have passed the link."""
        if self.link is None:
            return 0.0
        burst = max(_BURST_BYTES, self.link / 8 * _BURST_S)
        return max(0.0, (self.level_bytes()[0] - burst) * 8 / self.link)

    @property
    def fits(self) -> bool:
        """Whether the first decoded token came no sooner than the link allows."""
        return float(self.decode["shown"][0]) - float(self.sent["started"]) >= self.earliest

    @property
    def step_s(self) -> float:
        """Seconds of a decode step: the quickest, since a busy moment of the machine says nothing about the engine."""
        times = self.decode["committed"]
        steps = [after - before for before, after in pairwise(times)]
        return min(steps) if steps else self.first_provisional

    def line(self) -> str:
        """The run in one line."""
        text = f"first {self.first_provisional:6.3f} s, last {self.last_verified:6.3f} s"
        if self.decode["drafted"]:
            text += f"; accepted {self.decode['accepted']} of {self.decode['drafted']}"
        if self.decode["redecided"]:
            text += f"; again: {', '.join(map(str, self.decode['redecided']))}"
        return text


@dataclass(slots=True, kw_only=True)
class Report:
    """All runs, and what they have in common."""

    model: str
    revision: str
    prompt_tokens: int
    values: int
    digest: str
    prefill_s: float | None
    runs: int
    decode: int
    link: float = 0.0
    step_s: float = 0.0
    noise: float = 0.0
    reference: tuple[int, ...] = ()
    text: str = ""
    measurements: dict[Table, dict[str, list[Measurement]]] = field(default_factory=dict)

    def add(self, table: Table, measurement: Measurement) -> None:
        """One more run."""
        self.measurements.setdefault(table, {}).setdefault(measurement.method, []).append(measurement)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the BF16 cache."""
        return 2 * self.values

    @property
    def link_steps(self) -> float:
        """Decode steps that the BF16 cache takes on the link."""
        return self.cache_bytes * 8 / self.link / self.step_s

    @property
    def ceiling(self) -> float:
        """How much sooner than INT8's whole cache the anchor can be there, by its bytes alone."""
        methods = self.measurements[Table.SENT_WHOLE]
        return methods["int8"][0].total_bytes / methods["lynxproto"][0].level_bytes()[0]

    @property
    def speedup(self) -> float:
        """How much sooner than with INT8 the first decoded token is there (medians)."""
        methods = self.measurements[Table.SENT_WHOLE]
        return _median(methods["int8"], "first_provisional") / _median(methods["lynxproto"], "first_provisional")

    def bit_exact(self, run: Measurement) -> bool:
        """Whether the decode process ended with the very words that prefill computed, by digest."""
        return bool(run.decode["digest"] == self.digest)

    def tokens_identical(self, run: Measurement) -> bool:
        """Whether the tokens are those that BF16 decode gives."""
        return tuple(run.decode["tokens"]) == self.reference

    def checks(self) -> dict[str, bool]:
        """What must hold in every run, whatever the machine."""
        runs = [run for table in self.measurements.values() for method in table.values() for run in method]
        exact = [run for run in runs if not run.decode["lossy"]]
        return {
            "lynxproto and bf16 are bit-exact": all(map(self.bit_exact, exact)),
            "lynxproto's tokens are those of BF16 decode": all(map(self.tokens_identical, exact)),
            "no first token before its bytes fit the link": all(run.fits for run in runs),
        }

    def facts(self) -> Iterator[str]:
        """What the runs have in common, in lines."""
        yield (
            f"[bold]{self.model}[/bold], {self.prompt_tokens:,} prompt tokens of prose, "
            f"BF16 cache {self.cache_bytes / 1e6:.1f} MB"
            + (f", prefill {self.prefill_s:.1f} s" if self.prefill_s is not None else ", prefilled by an earlier run")
        )
        yield (
            f"link {self.link / 1e6:.0f} Mbit/s: the BF16 cache takes {self.cache_bytes * 8 / self.link:.2f} s, "
            f"or {self.link_steps:.0f} decode steps of {self.step_s * 1e3:.0f} ms"
        )

    def tables(self) -> Iterator[RichTable]:
        """What to print."""
        rate = f"{self.link / 1e6:.0f} Mbit/s"
        titles = {
            Table.SENT_WHOLE: f"Sent once the KV cache is complete, {rate} ({_runs(self.runs)})",
            Table.STREAMED: f"Streamed by layer while prefill runs, {rate} (one run)",
            Table.FAST_LINK: "Link not shaped: here the network does not matter (one run)",
        }
        for table, title in titles.items():
            if table in self.measurements:
                yield self._table(table, title)

    def _table(self, table: Table, title: str) -> RichTable:
        rich = RichTable(
            title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
        )
        rich.add_column("method", no_wrap=True)
        for column in (
            "MB: first\n/all levels",
            "token 1, s\nshown/final",
            f"token {self.decode}, s\nshown/final",
            "accepted\n/drafted",
            "bit-\nexact",
            "BF16's\ntokens",
        ):
            rich.add_column(column, justify="right", no_wrap=True)
        for method in METHODS:
            runs = self.measurements[table][method]
            drafted, lossy = _count(runs, "drafted"), runs[0].decode["lossy"]

            def times(kind: str, runs: Sequence[Measurement] = runs, lossy: bool = lossy) -> str:
                verified = "never" if lossy else f"{_median(runs, f'{kind}_verified'):.2f}"
                return f"{_median(runs, f'{kind}_provisional'):.2f} / {verified}"

            rich.add_row(
                method,
                f"{runs[0].level_bytes()[0] / 1e6:.1f} / {runs[0].total_bytes / 1e6:.1f}",
                times("first"),
                times("last"),
                f"{_count(runs, 'accepted')} / {drafted}" if drafted else "",
                "yes" if all(map(self.bit_exact, runs)) else "no",
                "yes" if all(map(self.tokens_identical, runs)) else "no",
            )
        return rich

    def conclusions(self) -> Iterator[str]:
        """What follows from the tables, in lines."""
        yield (
            f"First decoded token: [bold]{self.speedup:.2f} times[/bold] sooner than INT8 (ceiling by bytes "
            f"{self.ceiling:.2f}: INT8's bytes over the anchor's; {self.speedup / self.ceiling:.2f} of it)."
        )
        ours, theirs = (self.measurements[Table.SENT_WHOLE][method] for method in ("lynxproto", "bf16"))
        yield (
            f"All {self.decode} tokens final after {_median(ours, 'last_verified'):.2f} s; BF16's bytes alone take "
            f"{self.cache_bytes * 8 / self.link:.2f} s, and its token {self.decode} comes after "
            f"{_median(theirs, 'last_verified'):.2f} s."
        )
        runs = [r for table in self.measurements.values() for r in table["lynxproto"]]
        again = sorted({position for run in runs for position in run.decode["redecided"]})
        wrong = sorted({position for run in runs for position in run.decode["mismatches"]})
        yield (
            f"Batched and stepwise logits differ by at most {self.noise:.3f}; near ties decided again step by step: "
            f"{', '.join(map(str, again)) or 'none'}; batched choices that were wrong: "
            f"{', '.join(map(str, wrong)) or 'none'}."
        )
        for check, good in self.checks().items():
            yield f"{'[green]ok[/green]' if good else '[bold red]FAILED[/bold red]'}  {check}"

    def as_json(self) -> dict[str, Any]:
        """The stable form; docs/demo.md."""
        return {
            "schema": _SCHEMA,
            "model": self.model,
            "revision": self.revision,
            "prompt_tokens": self.prompt_tokens,
            "decoded_tokens": self.decode,
            "runs": self.runs,
            "values": self.values,
            "cache_bytes": self.cache_bytes,
            "prefill_s": self.prefill_s,
            "decode_step_s": self.step_s,
            "link_bits_per_second": self.link,
            "link_decode_steps": self.link_steps,
            "byte_ratio_ceiling": self.ceiling,
            "speedup_first_token_over_int8": self.speedup,
            "logit_noise": self.noise,
            "text": self.text,
            "checks": self.checks(),
            **{
                table.value: {method: self._method(runs) for method, runs in methods.items()}
                for table, methods in self.measurements.items()
            },
        }

    def _method(self, runs: Sequence[Measurement]) -> dict[str, Any]:
        levels = runs[0].level_bytes()
        names = {0: "anchor"} | {level: f"residual_{level}" for level in levels if level}
        return {
            "bytes": {names[level]: count for level, count in levels.items()} | {"total": runs[0].total_bytes},
            "wire_bytes": runs[0].sent["wire_bytes"],
            "frames": sum(stats["frames"] for stats in runs[0].decode["levels"].values()),
            "first_decoded_s": {
                "provisional": _median(runs, "first_provisional"),
                "verified": _median(runs, "first_verified"),
            },
            "decoded_32_s": {
                "provisional": _median(runs, "last_provisional"),
                "verified": _median(runs, "last_verified"),
            },
            "earliest_first_decoded_s": runs[0].earliest,
            "drafted": _count(runs, "drafted"),
            "accepted": _count(runs, "accepted"),
            "redecided": sorted({position for run in runs for position in run.decode["redecided"]}),
            "mismatches": sorted({position for run in runs for position in run.decode["mismatches"]}),
            "anchor_bits_per_value": 8 * levels[0] / self.values,
            "lossy": runs[0].decode["lossy"],
            "bit_exact": all(map(self.bit_exact, runs)),
            "tokens_identical": all(map(self.tokens_identical, runs)),
        }


def _runs(count: int) -> str:
    return "one run" if count == 1 else f"medians of {count} runs"


def _median(runs: Sequence[Measurement], name: str) -> float:
    return median(float(getattr(run, name)) for run in runs)


def _count(runs: Sequence[Measurement], name: str) -> int:
    return round(median(int(run.decode[name]) for run in runs))
