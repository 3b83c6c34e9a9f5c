"""Runs the demo: starts the two processes, has each method carry the same cache over the same link, and compares."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from lynxproto.demo.model import MODEL
from lynxproto.demo.pipe import Worker
from lynxproto.demo.report import METHODS, Measurement, Report, Table
from lynxproto.demo.screen import Screen
from lynxproto.errors import ConfigError

__all__ = ["Settings", "run"]

#: The default link carries the BF16 cache in as many decode steps as Lynx's testbed does (about 70).
PAPER_STEPS: Final = 70
_LONGEST_S: Final = 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What to run. ``link``: bits per second, or None for the default; ``streamed``: also while prefill runs.

    ``policy_file``: what `lynxproto probe` wrote, for lynxproto's precision by token; None: the default policy.
    """

    tokens: int = 4096
    decode: int = 32
    max_draft: int = 64
    runs: int = 3
    link: float | None = None
    streamed: bool = True
    threads: int = 2
    policy_file: Path | None = None

    def __post_init__(self) -> None:
        for name, least in (("tokens", 64), ("decode", 1), ("max_draft", 1), ("runs", 1), ("threads", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.link is not None and not self.link >= 1e6:
            raise ConfigError(f"a link of {self.link:g} bit/s would take minutes; give at least 1M")


def run(settings: Settings, console: Console) -> Report:
    """Run everything; blocks. Raises :class:`~lynxproto.errors.LynxError` with what to do about it."""
    return asyncio.run(_run(settings, console))


async def _run(settings: Settings, console: Console) -> Report:
    room = max(2 * (settings.max_draft + 1), settings.decode + settings.max_draft + 2)
    with Screen(console) as screen:
        async with (
            Worker("prefill", "lynxproto.demo.prefill", screen.on_prefill) as prefill,
            Worker("decode", "lynxproto.demo.decode", screen.on_decode) as decode,
        ):
            model = await prefill.call("prepare")
            screen.stage("loading the model in both processes")
            policy_file = None if settings.policy_file is None else str(settings.policy_file.absolute())
            common = {"tokens": settings.tokens, "room": room, "threads": settings.threads}
            cache, engine = await _together(
                prefill.call("load", **model, **common, policy_file=policy_file),
                decode.call("load", folder=model["folder"], **common),
            )
            await decode.call("warm_up")
            runs = _Runs(settings, screen, prefill=prefill, decode=decode, model=model, cache=cache, engine=engine)
            return await runs.all()


class _Runs:
    """The runs over one cache; ``model``, ``cache`` and ``engine`` are what the processes said of theirs."""

    def __init__(
        self,
        settings: Settings,
        screen: Screen,
        *,
        prefill: Worker,
        decode: Worker,
        model: Mapping[str, Any],
        cache: Mapping[str, Any],
        engine: Mapping[str, Any],
    ) -> None:
        self._settings = settings
        self._screen = screen
        self._prefill = prefill
        self._decode = decode
        self._engine = engine
        self._noise: list[float] = [0.0]
        self._report = Report(
            model=MODEL,
            revision=model["revision"],
            prompt_tokens=cache["prompt_tokens"],
            values=cache["values"],
            digest=cache["digest"],
            prefill_s=cache["prefill_s"],
            runs=settings.runs,
            decode=settings.decode,
        )

    async def all(self) -> Report:
        report, settings = self._report, self._settings
        self._screen.plan(1 + len(METHODS) * (settings.runs + 1 + settings.streamed))
        # One transfer that is not counted warms up sockets, codecs and engine, and gives the reference: what this
        # engine decodes step by step on the BF16 cache. Rounding noise is measured on the same cache.
        reference = await self._once("bf16", None, "not counted")
        report.reference = tuple(reference.decode["tokens"])
        report.step_s = reference.step_s
        report.link = settings.link or _default_link(report.cache_bytes, report.step_s)
        self._screen.facts(report)
        tokens = list(report.reference)
        longest = min(settings.max_draft, settings.decode)  # a draft ends where the run would
        draw = (tokens * (longest // len(tokens) + 1))[: longest + 1]
        batches = sorted({min(9, len(draw)), len(draw)})
        self._noise = (await self._decode.call("calibrate", tokens=draw, batches=batches))["noise"]
        report.noise = self._noise[-1]
        report.text = (await self._prefill.call("text", tokens=tokens))["text"]

        for number in range(settings.runs):
            for method in METHODS:  # in turn, so that a machine that slows down slows all of them
                what = f"run {number + 1} of {settings.runs}"
                report.add(Table.SENT_WHOLE, await self._once(method, report.link, what))
        for method in METHODS:
            report.add(Table.FAST_LINK, await self._once(method, None, "link not shaped"))
        if settings.streamed:
            for method in METHODS:
                report.add(Table.STREAMED, await self._once(method, report.link, "while prefill runs", "stream"))
        return report

    async def _once(self, method: str, link: float | None, what: str, command: str = "send") -> Measurement:
        policy = "lynx" if method == "lynxproto" else method
        self._screen.begin(method, what)
        received, sent = await _together(
            self._decode.call(
                "receive",
                progressive=method == "lynxproto",
                max_draft=self._settings.max_draft,
                count=self._settings.decode,
                noise=self._noise,
            ),
            self._prefill.call(command, url=self._engine["url"], method=policy, link=link),
        )
        measurement = Measurement(method=method, link=link, sent=sent, decode=received)
        self._screen.end(measurement)
        return measurement


def _default_link(cache_bytes: int, step_s: float) -> float:
    """The speed at which the BF16 cache takes :data:`PAPER_STEPS` decode steps, to two significant digits.

    At most :data:`_LONGEST_S` seconds all the same, so that the demo of a busy machine ends too.
    """
    return float(f"{8 * cache_bytes / min(PAPER_STEPS * step_s, _LONGEST_S):.2g}")


async def _together(*calls: Any) -> list[Any]:
    """All results; the first error ends the others and is raised as it is."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
