"""``lynxproto bench ucx``: streams over UCX beside bare ucxx, the same sizes between two processes in the same run.

Four contestants: lynxproto's stream; ucxx's lower layer in a loop that polls, which is all that UCX gives, with UCX's
defaults and with the settings that the stream has; and ucxx's coroutines, which is how programs use it. Each
measurement is a pair of new processes; contestants take turns.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection as Pipe
from typing import Any, Final

import click

from lynxproto import __version__
from lynxproto.bench import machine
from lynxproto.bench.outputs import json_option, write_json
from lynxproto.errors import BenchmarkError

__all__ = ["CONTESTANTS", "measure", "ucx"]

_SIZES: Final = (64 << 10, 1 << 20, 4 << 20)
_WARM_UP: Final = 4
#: Messages under way in the streaming measurement.
_DEPTH: Final = 4

#: For everybody: shared memory only takes part if peers' deaths are to be noticed on it; threads that NumPy starts
#: spin, in what is measured.
_ENVIRONMENT: Final = {
    "UCX_WARN_UNUSED_ENV_VARS": "n", "UCX_POSIX_ERROR_HANDLING": "y", "UCX_SYSV_ERROR_HANDLING": "y",
    "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip

Result = dict[int, dict[str, float]]


async def _polling(client: bool, pipe: Pipe, counts: Mapping[int, int]) -> Result:
    """ucxx's lower layer: tagged messages, and a loop that polls (nothing here lets another task run)."""
    import numpy as np
    from ucxx._lib import libucxx
    from ucxx._lib.arr import Array
    from ucxx.types import Tag

    context = libucxx.UCXContext({}, (libucxx.Feature.TAG, libucxx.Feature.WAKEUP))
    worker = libucxx.UCXWorker(context, False, False)
    pipe.send(bytes(worker.address))
    endpoint = libucxx.UCXEndpoint.create_from_worker_address(
        worker, libucxx.UCXAddress.create_from_buffer(pipe.recv()), True
    )
    there, back = Tag(1), Tag(2)
    if not client:
        there, back = back, there

    def finish(request: Any) -> None:
        while not request.completed:
            worker.progress()
        request.check_error()

    async def exchange(size: int, count: int) -> None:
        out, into = Array(np.ones(size, np.uint8)), Array(np.empty(size, np.uint8))
        for _ in range(count):
            if client:
                finish(endpoint.tag_send(out, there))
            finish(endpoint.tag_recv(into, back))
            if not client:
                finish(endpoint.tag_send(out, there))

    async def stream(size: int, count: int) -> None:
        buffers = [Array(np.ones(size, np.uint8)) for _ in range(_DEPTH)]
        under_way: deque[Any] = deque()
        for number in range(count):
            buffer = buffers[number % _DEPTH]
            under_way.append(endpoint.tag_send(buffer, there) if client else endpoint.tag_recv(buffer, back))
            if len(under_way) == _DEPTH:
                finish(under_way.popleft())
        for request in under_way:
            finish(request)
        await exchange(1, 1)

    results = await _timed(counts, exchange, stream)
    pipe.send(None)  # both are done before either closes
    while not pipe.poll():
        worker.progress()
    endpoint.close_blocking()
    return results


async def _timed(counts: Mapping[int, int], exchange: Any, stream: Any) -> Result:
    results: Result = {}
    for size, count in counts.items():
        await exchange(size, _WARM_UP)
        began = time.perf_counter()
        await exchange(size, count)
        there_and_back = time.perf_counter() - began
        began = time.perf_counter()
        await stream(size, count)
        results[size] = {
            "ping_pong": 2 * size * count / there_and_back / 1e9,
            "stream": size * count / (time.perf_counter() - began) / 1e9,
        }
    return results


async def _coroutines(client: bool, pipe: Pipe, counts: Mapping[int, int]) -> Result:
    """ucxx's public API, in its default mode."""
    import numpy as np
    import ucxx

    if client:
        endpoint = await ucxx.create_endpoint("127.0.0.1", await asyncio.to_thread(pipe.recv))
    else:
        accepted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        listener = ucxx.create_listener(accepted.set_result, 0)
        pipe.send(listener.port)
        endpoint = await accepted

    async def exchange(size: int, count: int) -> None:
        out, into = np.ones(size, np.uint8), np.empty(size, np.uint8)
        for _ in range(count):
            if client:
                await endpoint.send(out)
            await endpoint.recv(into)
            if not client:
                await endpoint.send(out)

    async def stream(size: int, count: int) -> None:
        buffers = [np.ones(size, np.uint8) for _ in range(_DEPTH)]
        for first in range(0, count, _DEPTH):
            some = buffers[: min(_DEPTH, count - first)]
            await asyncio.gather(*(endpoint.send(b) if client else endpoint.recv(b) for b in some))
        await exchange(1, 1)

    results = await _timed(counts, exchange, stream)
    pipe.send(None)
    await asyncio.to_thread(pipe.recv)
    await endpoint.close()
    return results


async def _lynxproto(client: bool, pipe: Pipe, counts: Mapping[int, int]) -> Result:
    """Streams of ucx:// as sessions use them."""
    import numpy as np

    from lynxproto.transports import open_listener, open_stream

    if client:
        stream_ = await open_stream(await asyncio.to_thread(pipe.recv), insecure=True)
    else:
        listener = await open_listener("ucx://127.0.0.1:0", insecure=True)
        pipe.send(listener.url)
        stream_ = await listener.accept()
        await listener.aclose()

    async def receive(view: memoryview) -> None:
        while view.nbytes:
            count = await stream_.receive_into(view)
            if count == 0:
                raise BenchmarkError("the stream ended early")
            view = view[count:]

    async def exchange(size: int, count: int) -> None:
        out, into = np.ones(size, np.uint8).data, np.empty(size, np.uint8).data
        for _ in range(count):
            if client:
                await stream_.send([out])
            await receive(into)
            if not client:
                await stream_.send([out])

    async def stream(size: int, count: int) -> None:
        buffers = [np.ones(size, np.uint8).data for _ in range(_DEPTH)]
        for first in range(0, count, _DEPTH):
            some = buffers[: min(_DEPTH, count - first)]
            if client:
                await stream_.send(some)
            else:
                for buffer in some:
                    await receive(buffer)
        await exchange(1, 1)

    results = await _timed(counts, exchange, stream)
    pipe.send(None)
    await asyncio.to_thread(pipe.recv)
    await stream_.aclose()
    return results


CONTESTANTS: Final[dict[str, Callable[..., Any]]] = {
    "lynxproto": _lynxproto,
    "ucxx polling": _polling,
    "ucxx polling, set": _polling,
    "ucxx coroutines": _coroutines,
}


def _side(name: str, *, client: bool, pipe: Pipe, report: Pipe, tls: str, counts: Mapping[int, int]) -> None:
    os.environ |= {"UCX_TLS": tls, **_ENVIRONMENT}
    if name.endswith(", set"):
        from lynxproto.transports._ucxx import SETTINGS

        os.environ |= {f"UCX_{key}": value for key, value in SETTINGS.items()}
    results = asyncio.run(CONTESTANTS[name](client, pipe, counts))
    if client:
        report.send(results)


def _run(name: str, tls: str, counts: Mapping[int, int]) -> Result:
    """One measurement. Raises :class:`~lynxproto.errors.BenchmarkError` if a side fails."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    report, reporter = context.Pipe(duplex=False)
    sides = [
        context.Process(
            target=_side,
            args=(name,),
            kwargs={"client": client, "pipe": pipe, "report": reporter, "tls": tls, "counts": counts},
        )
        for client, pipe in ((True, mine), (False, theirs))
    ]
    for side in sides:
        side.start()
    try:
        while not report.poll(1):
            if any(side.exitcode for side in sides):
                raise BenchmarkError(f"{name} over {tls} failed: see above")
        results: Result = report.recv()
        return results
    finally:
        for side in sides:
            side.join(5)
            side.kill()


def measure(
    tls: str, sizes: Sequence[int] = _SIZES, *, runs: int = 3, moved_bytes: int = 128 << 20
) -> list[dict[str, Any]]:
    """Medians of ``runs``: for each size one entry a contestant, GB/s of ``ping_pong`` (both ways) and ``stream``.

    ``moved_bytes`` go one way in each.
    """
    counts = {size: max(8, moved_bytes // size) for size in sizes}
    figures: dict[str, list[Result]] = {name: [] for name in CONTESTANTS}
    for _ in range(runs):
        for name, results in figures.items():
            results.append(_run(name, tls, counts))
    return [
        {
            "contestant": name,
            "peer": name != "lynxproto",
            "ucx_tls": tls,
            "bytes": size,
            **{
                f"{what}_gb_per_s": statistics.median(result[size][what] for result in figures[name])
                for what in ("ping_pong", "stream")
            },
        }
        for size in sizes
        for name in figures
    ]


@click.command()
@click.option(
    "--tls", "devices", multiple=True, help="UCX_TLS to measure; default: tcp; and sm,tcp (ucxx connects over TCP)."
)
@click.option(
    "--size", "sizes", type=click.IntRange(1), multiple=True, help="Bytes of a message; default: 64 KiB to 4 MiB."
)
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Rounds; medians are reported.")
@click.option("--moved", "mib", type=click.IntRange(1), default=128, show_default=True, help="MiB of a measurement.")
@json_option()
def ucx(*, devices: Sequence[str], sizes: Sequence[int], runs: int, mib: int, json_path: str | None) -> None:
    """Measure ucx:// beside bare ucxx.

    Ping-pong and one-way streams between two processes.
    """
    from lynxproto.transports._ucxx import require_ucxx

    version = require_ucxx().__version__
    results = []
    for tls in devices or ("tcp", "sm,tcp"):
        click.echo(f"UCX_TLS={tls}, {runs} rounds of {len(CONTESTANTS)} contestants...", err=True)
        results += measure(tls, sizes or _SIZES, runs=runs, moved_bytes=mib << 20)
    for entry in results:
        bare = [
            other
            for other in results
            if other["peer"] and (other["ucx_tls"], other["bytes"]) == (entry["ucx_tls"], entry["bytes"])
        ]
        entry["version"] = version if entry["peer"] else __version__
        for what in ("ping_pong", "stream"):
            entry[f"{what}_to_polling"] = entry[f"{what}_gb_per_s"] / bare[0][f"{what}_gb_per_s"]
    report = {"schema": "lynxproto.bench.ucx/1", "results": results, "environment": machine.environment()}
    if json_path is not None:
        write_json(json_path, report)
    if json_path == "-":
        return
    click.echo(
        f"{'':18}{'UCX_TLS':>8}{'bytes':>10}{'ping-pong':>12}{'':>7}{'stream':>10}   (GB/s, and to ucxx polling)"
    )
    for entry in results:
        click.echo(
            f"{entry['contestant']:18}{entry['ucx_tls']:>8}{entry['bytes']:>10}"
            f"{entry['ping_pong_gb_per_s']:>12.3f}{entry['ping_pong_to_polling']:>7.2f}"
            f"{entry['stream_gb_per_s']:>10.3f}{entry['stream_to_polling']:>7.2f}"
        )
