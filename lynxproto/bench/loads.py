"""What a connection can bear: the parser alone, many small frames, many open transfers."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from random import Random
from typing import Any, Final

import numpy as np

from lynxproto.bench.transfers import WINDOWS, child, hear, say
from lynxproto.errors import BenchmarkError

__all__ = ["ROLES", "frames", "open_transfers", "parser"]

_SECRET: Final = b"only for this benchmark"


def _config(**limits: int) -> Any:
    from lynxproto.config import Config, Limits

    return Config(secret=_SECRET, limits=Limits(**{**WINDOWS, **limits}))


def _manifest(**shape: int) -> Any:
    from lynxproto.manifest import Identity, Manifest

    return Manifest.for_cache(identity=Identity(model="benchmark"), dtype="bfloat16", **shape, codecs=({"id": "raw"},))


def _arrays(described: Any, fill: int) -> dict[Any, Any]:
    layer = described.layers[0]
    shape = (layer.kv_heads, layer.tokens, layer.key_dim)
    return {
        (index, part): np.full(shape, fill, np.uint16)
        for index in range(len(described.layers))
        for part in ("key", "value")
    }


# --- the parser


def parser(nbytes: int, runs: int) -> dict[str, Any]:
    """GB/s of DATA bytes that a connection takes in on one core: headers parsed, checksums made, words put in place.

    And of memcpy of the same bytes in the same run. One process, no sockets. Medians.
    """
    from lynxproto.policy import Policy

    words = np.frombuffer(np.random.default_rng(1).bytes(Policy.named("bf16").tile_bytes), np.uint8)
    target = np.ones(nbytes, np.uint8)
    speeds, copies = [], []
    for _ in range(runs):
        source, seconds = _parse(nbytes, words)
        speeds.append(source.nbytes / seconds / 1e9)
        started = time.perf_counter()
        np.copyto(target, source[:nbytes])
        copies.append(nbytes / (time.perf_counter() - started) / 1e9)
    speed, copy = float(np.median(speeds)), float(np.median(copies))
    return {"gb_per_s": speed, "memcpy_gb_per_s": copy, "to_memcpy": speed / copy, "runs": runs}


def _parse(nbytes: int, words: Any) -> tuple[Any, float]:
    """The byte stream of one transfer, and the seconds that a connection takes to receive it."""
    from lynxproto import events as ev
    from lynxproto.connection import Connection
    from lynxproto.policy import Policy

    policy = Policy.named("bf16")
    described = _manifest(layers=4, kv_heads=8, head_dim=128, tokens=nbytes // (4 * 2 * 8 * 128 * 2))
    places = _arrays(described, 0)

    def land(transfer: int, tile: Any) -> memoryview:
        heads = places[tile.layer, tile.part][tile.head_start : tile.head_start + tile.heads]
        return memoryview(heads[:, tile.tokens.start : tile.tokens.stop].reshape(-1).view(np.uint8))

    config = _config(session_window=2 * nbytes, transfer_window=2 * nbytes)
    client = Connection(config, client=True, random=Random(1))
    server = Connection(config, client=False, random=Random(2), land=land)
    for side in (client, server):
        side.open_stripe(0.0)
    transfer = client.open(described, 0.0)
    accepted = False
    while not accepted:
        for one, other in ((client, server), (server, client)):
            for part in one.data_to_send(0.0):
                other.receive_data(part, 0.0)
        while (event := server.next_event()) is not None:
            if isinstance(event, ev.TransferOffered):
                server.accept(event.transfer, 0.0)
        while (event := client.next_event()) is not None:
            accepted |= isinstance(event, ev.TransferAccepted)
    chunks = 0
    for layer in described.layers:
        tiles = policy.tiles(described.dtype, layer)
        client.plan(transfer, layer.index, tiles, 0.0)
        chunks += len(tiles)
    stream: list[memoryview] = []
    while True:
        while (request := client.next_chunk(0.0)) is not None:
            size = request.tile.spec("bfloat16", 128).nbytes
            client.chunk_encoded(transfer, request.tile, 0, memoryview(words[:size]), 0.0)
        parts = client.data_to_send(0.0, limit=1 << 30)
        if not parts:
            break
        stream += parts
    source = np.frombuffer(b"".join(stream), np.uint8)
    at = 0
    started = time.perf_counter()
    while at < source.nbytes:
        buffer = server.get_buffer()
        n = min(buffer.nbytes, source.nbytes - at)
        np.frombuffer(buffer, np.uint8)[:n] = source[at : at + n]
        server.buffer_updated(n, 0.0)
        at += n
        while (event := server.next_event()) is not None:
            if isinstance(event, ev.ChunkReceived):
                server.applied(transfer, event.tile, 0, 0.0)
    seconds = time.perf_counter() - started
    if server.counters.received_frames[0] != chunks or server.counters.corrupt:
        raise BenchmarkError(f"the parser took in {server.counters.received_frames[0]} of {chunks} chunks")
    return source, seconds


# --- many small frames


def frames(count: int) -> dict[str, float]:
    """Frames a second of one TCP connection between two processes: ``count`` chunks of 16 KiB (one head, 64 tokens)."""
    from lynxproto import blocking
    from lynxproto.policy import Policy

    tokens = 64 * max(1, count // (2 * 8 * 4))
    with child("frames", tokens=tokens) as peer:
        described = _manifest(layers=4, kv_heads=8, head_dim=128, tokens=tokens)
        arrays = _arrays(described, 7)
        policy = Policy(body={"id": "raw"}, sinks=0, recent=0, tile_bytes=4096)
        with blocking.connect(peer.hear(), _config(), policy=policy) as sender:
            speeds = []
            for _ in range(3):
                started = time.perf_counter()
                transfer = sender.open(described)
                for layer in described.layers:
                    transfer.write(layer.index, arrays[layer.index, "key"], arrays[layer.index, "value"])
                transfer.finish()
                speeds.append(transfer.stats.chunks / (time.perf_counter() - started))
        return {"per_s": float(np.median(speeds)), "bytes": 16384, "frames": transfer.stats.chunks}


async def _receive_frames(tokens: int) -> None:
    from lynxproto.session import listen

    described = _manifest(layers=4, kv_heads=8, head_dim=128, tokens=tokens)
    arrays = _arrays(described, 0)
    async with listen("tcp://127.0.0.1:0", _config(), allocate=lambda _: arrays) as receiver:
        say(receiver.url)
        async for transfer in receiver:
            await transfer.exact()


# --- many open transfers


def open_transfers(count: int) -> dict[str, float]:
    """``count`` transfers of two layers open at a time on one receiver, each with one layer sent; then all are ended.

    Resident memory that a transfer takes at the receiver, its arrays (8 KiB a part) apart, and the seconds from the
    first ``open`` until the last one is exact.
    """
    from lynxproto import blocking
    from lynxproto.policy import Policy

    described = _manifest(layers=2, kv_heads=1, head_dim=64, tokens=64)
    arrays = _arrays(described, 7)
    with (
        child("transfers", count=count) as peer,
        blocking.connect(peer.hear(), _config(transfers=2 * count), policy=Policy.named("bf16")) as sender,
    ):
        before = peer.hear()
        started = time.perf_counter()
        transfers = [sender.open(described) for _ in range(count)]
        for transfer in transfers:
            transfer.write(0, arrays[0, "key"], arrays[0, "value"])
        peer.say("all open")
        during = peer.hear()
        for transfer in transfers:
            transfer.write(1, arrays[1, "key"], arrays[1, "value"])
        for transfer in transfers:
            transfer.finish()
        seconds = time.perf_counter() - started
        after = peer.hear()
    kept = described.nbytes
    return {
        "open": count,
        "receiver_bytes_each": (during - before) / count - kept / 2,
        "receiver_bytes_each_afterwards": (after - before) / count - kept,
        "seconds": seconds,
    }


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


async def _receive_transfers(count: int) -> None:
    from lynxproto.session import listen

    async with listen("tcp://127.0.0.1:0", _config(transfers=2 * count)) as receiver:
        say(receiver.url)
        say(_resident())
        transfers = [await anext(receiver) for _ in range(count)]
        for transfer in transfers:
            await transfer.ready(level=0, layer=0)
        await asyncio.to_thread(hear)
        say(_resident())
        for transfer in transfers:
            await transfer.exact()
            await transfer.released.wait()
        say(_resident())
        await asyncio.to_thread(hear)


ROLES: Final[dict[str, Any]] = {
    "frames": lambda **arguments: asyncio.run(_receive_frames(**arguments)),
    "transfers": lambda **arguments: asyncio.run(_receive_transfers(**arguments)),
}
