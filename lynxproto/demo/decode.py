"""The demo's decode process: receives the cache into the engine's own buffers, drafts, verifies, decodes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lynxproto import blocking
from lynxproto.config import Config
from lynxproto.demo.model import load_model
from lynxproto.demo.pipe import Pipe, serve
from lynxproto.demo.prefill import digest
from lynxproto.manifest import Manifest
from lynxproto.speculation import Event, Provisional, Speculation, Verified, measure_noise

__all__ = ["Decode", "main"]

_WARM_STEPS = 4
_EVENT_S = 0.05  # how often progress is told to the screen


class Decode:
    """The commands of the decode process."""

    def __init__(self, pipe: Pipe, stack: ExitStack) -> None:
        self._pipe = pipe
        self._stack = stack
        self._engine: Any = None
        self._model: Any = None
        self._tokens = 0
        self._transfers: Any = None

    async def load(self, folder: str, tokens: int, room: int, threads: int) -> Mapping[str, Any]:
        """Load the model, and listen."""
        import torch

        from lynxproto.integrations.hf import HFEngine, WordCache

        torch.set_num_threads(threads)
        self._tokens = tokens
        self._model = load_model(Path(folder))
        cache = WordCache(self._model.config, tokens + room)
        self._engine = HFEngine(self._model, cache)

        def allocate(manifest: Manifest) -> Any:
            self._engine.crop(0)
            return cache.allocate(manifest, self._model)

        receiver = self._stack.enter_context(
            blocking.listen("tcp://127.0.0.1:0", Config(name="lynxproto demo"), allocate=allocate, insecure=True)
        )
        self._transfers = iter(receiver)
        return {"url": receiver.url}

    async def warm_up(self) -> Mapping[str, Any]:
        """Touch what the runs will use (kernels, allocator, pages) on an empty cache of the real size."""
        await asyncio.to_thread(self._warm_up)
        return {}

    def _warm_up(self) -> None:
        from lynxproto.integrations.hf import make_identity, make_manifest

        engine, tokens = self._engine, self._tokens
        engine.cache.allocate(make_manifest(self._model, tokens, make_identity(self._model)), self._model)
        for layer in range(len(engine.cache.layers)):
            engine.cache.refresh(layer, tokens)
        engine.verify([0] * _WARM_STEPS)
        engine.crop(tokens)
        for _ in range(_WARM_STEPS):
            engine.step(0)
        engine.crop(tokens)

    async def receive(self, progressive: bool, max_draft: int, count: int, noise: list[float]) -> Mapping[str, Any]:
        """Take the next transfer and decode ``count`` tokens after the one that prefill chose.

        Lists of times have one entry for each decoded token: when it was first shown, and when it was committed.
        """
        return await asyncio.to_thread(self._receive, progressive, max_draft, count, noise)

    def _receive(self, progressive: bool, max_draft: int, count: int, noise: list[float]) -> Mapping[str, Any]:
        from lynxproto.integrations.hf import decode_arriving

        transfer = next(self._transfers, None)
        if transfer is None:  # this process is told to end
            return {}
        run = _Run(self._pipe, count)
        transfer.on_progress(run.on_progress)
        speculation = Speculation(
            self._engine,
            [0] * self._tokens,  # the engine holds their KV; their values matter to logits processors only
            transfer.result().first_token,
            max_draft=max_draft if progressive else 0,
            max_tokens=count + 1,
            noise=noise,
        )
        for event in decode_arriving(
            speculation, self._engine.cache, transfer, verified=progressive, on_stage=run.mark
        ):
            run.take(event)
        run.mark("end")
        report = speculation.report
        return {
            "tokens": speculation.tokens,
            "shown": run.shown,
            "committed": run.committed,
            "marks": run.marks,
            "progress": run.progress,
            "levels": {
                level: {"bytes": stats.bytes, "frames": stats.chunks} for level, stats in transfer.stats.levels.items()
            },
            "lossy": transfer.manifest.lossy,
            "digest": digest(transfer.arrays),
            "drafted": report.drafted,
            "accepted": report.accepted,
            "redecided": report.redecided,
            "mismatches": report.mismatches,
            "noise": report.noise,
        }

    async def calibrate(self, tokens: list[int], batches: list[int]) -> Mapping[str, Any]:
        """How much batched and stepwise logits differ, on the cache that was received last."""
        return {"noise": await asyncio.to_thread(measure_noise, self._engine, self._tokens, tokens, batches)}


class _Run:
    """Times and progress of one run."""

    def __init__(self, pipe: Pipe, count: int) -> None:
        self._pipe = pipe
        self._count = count
        self._told = 0.0
        self.marks: dict[str, float] = {}
        self.shown: list[float] = []
        self.committed: list[float] = []
        self.progress: list[tuple[float, int, int]] = []

    def mark(self, name: str) -> None:
        self.marks[name] = time.monotonic()

    def on_progress(self, progress: Any) -> None:
        self.progress.append((progress.time, progress.level, progress.bytes))
        if progress.time - self._told > _EVENT_S or progress.chunks == progress.total_chunks:
            self._told = progress.time
            self._pipe.send("level", level=progress.level, chunks=progress.chunks, total=progress.total_chunks)

    def take(self, event: Event) -> None:
        """Time one event of the speculation. Index 0 is prefill's own token, and free."""
        now = time.monotonic()
        if isinstance(event, Provisional):
            self.shown.append(now)
            self._pipe.send("draft", count=len(self.shown), total=self._count)
        elif isinstance(event, Verified):
            self.committed.extend([now] * (event.count - 1 - len(self.committed)))
            self.shown.extend([now] * (len(self.committed) - len(self.shown)))
            self._pipe.send("verified", count=len(self.committed), total=self._count)


async def _main() -> None:
    pipe = Pipe()
    with ExitStack() as stack:
        decode = Decode(pipe, stack)
        await serve(pipe, {name: getattr(decode, name) for name in ("load", "warm_up", "receive", "calibrate")})


def main() -> None:
    """Run the process."""
    asyncio.run(_main())


if __name__ == "__main__":
    main()
