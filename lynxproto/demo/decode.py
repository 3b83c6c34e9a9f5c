"""The demo's decode process: receives the cache into the engine's own buffers, drafts, verifies, decodes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import lynxproto
from lynxproto.config import MAX_LEVELS, Config
from lynxproto.demo.model import load_model
from lynxproto.demo.pipe import Pipe, serve
from lynxproto.demo.prefill import digest
from lynxproto.manifest import Manifest
from lynxproto.speculation import Event, Provisional, Speculation, Verified, measure_noise

__all__ = ["Decode", "main"]

_LAST_LEVEL = MAX_LEVELS - 1
_WARM_STEPS = 4
_EVENT_S = 0.05  # how often progress is told to the screen


class Decode:
    """The commands of the decode process."""

    def __init__(self, pipe: Pipe, stack: AsyncExitStack) -> None:
        self._pipe = pipe
        self._stack = stack
        self._engine: Any = None
        self._model: Any = None
        self._tokens = 0
        self._transfers: Any = None
        self._arrive: Callable[[int], None] = _no_wait

    async def load(self, folder: str, tokens: int, room: int, threads: int) -> Mapping[str, Any]:
        """Load the model, and listen."""
        import torch

        from lynxproto.integrations.hf import HFEngine, WordCache

        torch.set_num_threads(threads)
        self._tokens = tokens
        self._model = load_model(Path(folder))
        cache = WordCache(self._model.config, tokens + room, before_layer=self._before_layer)
        self._engine = HFEngine(self._model, cache)

        def allocate(manifest: Manifest) -> Any:
            self._engine.crop(0)
            return cache.allocate(manifest, self._model)

        receiver = await self._stack.enter_async_context(
            lynxproto.listen("tcp://127.0.0.1:0", Config(name="lynxproto demo"), allocate=allocate, insecure=True)
        )
        self._transfers = aiter(receiver)
        return {"url": receiver.url}

    def _before_layer(self, layer: int) -> None:
        self._arrive(layer)  # another function for each transfer

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
        transfer = await anext(self._transfers)
        run = _Run(self._pipe, count)
        transfer.on_progress = run.on_progress
        layers = [layer.index for layer in transfer.manifest.layers]
        result = await transfer.result()
        self._arrive = self._import_layers(transfer, layers, run)
        speculation = Speculation(
            self._engine,
            [0] * self._tokens,  # the engine holds their KV; their values matter to logits processors only
            result.first_token,
            max_draft=max_draft if progressive else 0,
            max_tokens=count + 1,
            noise=noise,
        )
        if progressive:
            await self._draft(transfer, layers, speculation, run)
        run.mark("verify_start")
        await asyncio.to_thread(run.take, speculation.verify())
        run.mark("verify_end")
        await asyncio.to_thread(run.take, speculation.decode())
        run.mark("end")
        if not transfer.manifest.lossy:
            await transfer.exact()
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

    def _import_layers(self, transfer: Any, layers: list[int], run: _Run) -> Callable[[int], None]:
        """For the first step: wait for a layer, in the middle of the forward that needs it.

        The sender starts with layer 0 too, so when the last layer is there, little is left of the step.
        """
        loop = asyncio.get_running_loop()
        missing = set(layers)
        self._engine.cache.expect(self._tokens)

        def arrive(layer: int) -> None:
            if layer in missing:
                asyncio.run_coroutine_threadsafe(transfer.ready(level=0, layer=layer), loop).result()
                self._engine.cache.refresh(layer, self._tokens)
                missing.remove(layer)
                if not missing:
                    run.mark("anchor")

        return arrive

    async def calibrate(self, tokens: list[int], batches: list[int]) -> Mapping[str, Any]:
        """How much batched and stepwise logits differ, on the cache that was received last."""
        return {"noise": await asyncio.to_thread(measure_noise, self._engine, self._tokens, tokens, batches)}

    async def _draft(self, transfer: Any, layers: list[int], speculation: Speculation, run: _Run) -> None:
        exact = threading.Event()
        improved: deque[int] = deque()

        async def watch(layer: int) -> None:
            await transfer.ready(level=_LAST_LEVEL, layer=layer)
            improved.append(layer)

        async def finish() -> None:
            await asyncio.gather(transfer.exact(), *watches)
            run.mark("exact")
            exact.set()

        def refresh() -> bool:
            # Layers become exact in place between two steps: later drafts gain, and little is left to do at the end.
            while improved:
                self._engine.cache.refresh(improved.popleft(), self._tokens)
            return exact.is_set()

        watches = [asyncio.create_task(watch(layer)) for layer in layers]
        finishing = asyncio.create_task(finish())
        try:
            run.mark("draft_start")
            await asyncio.to_thread(run.take, speculation.draft(until=refresh))
            run.mark("draft_end")
            if not exact.is_set():
                transfer.urgent()  # out of drafts: this request waits for its residual
            await finishing
            refresh()
        finally:
            for task in (finishing, *watches):
                task.cancel()


def _no_wait(layer: int) -> None:
    """All layers are there."""


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

    def take(self, events: Iterable[Event]) -> None:
        """Run a phase of speculation, and time its events. Index 0 is prefill's own token, and free."""
        for event in events:
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
    async with AsyncExitStack() as stack:
        decode = Decode(pipe, stack)
        await serve(pipe, {name: getattr(decode, name) for name in ("load", "warm_up", "receive", "calibrate")})


def main() -> None:
    """Run the process."""
    asyncio.run(_main())


if __name__ == "__main__":
    main()
