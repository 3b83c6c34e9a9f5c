"""Words that travel as they are: sent from the caller's memory, received in the caller's memory, and never late."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import numpy as np
import pytest
from links import World, cache, small_config, tile_words
from test_session import _names, assert_same, connect, first, listen, make_cache, run

from lynxproto import events as ev
from lynxproto.config import Limits
from lynxproto.errors import LocalError, TransferCancelledError
from lynxproto.frames import HEADER_SIZE, FrameType, Header
from lynxproto.policy import Policy
from lynxproto.transports import TokenBucket

RAW = ({"id": "raw"}, {"id": "raw"})


def landing_world() -> tuple[World, dict[Any, Any], dict[Any, Any]]:
    """Two connections; the server's raw tiles land in contiguous memory, here by tile."""
    config = small_config(limits=Limits())
    world = World(config, config)
    world.settle()
    words = cache(tokens=600, dim=64)
    places: dict[Any, Any] = {}

    def land(transfer: int, tile: Any) -> memoryview | None:
        if not tile.tokens.is_range:
            return None
        place = places.setdefault(tile, np.zeros(tile_words(words, tile).shape, np.uint16))
        return memoryview(place.reshape(-1).view(np.uint8))

    world.server.land = land
    return world, words, places


def landed(world: World) -> list[ev.ChunkReceived]:
    return [event for event in world.server.seen(ev.ChunkReceived) if event.landed is not None]


def exchange(world: World) -> bool:
    """Everybody works, and some bytes move each way, frames or not; False when nothing moves any more."""
    for shell in world.shells:
        shell.handle_events(0.0)
        shell.encode(0.0)
    moved = False
    for side in (0, 1):
        for part in world.shells[side].connection.data_to_send(0.0, limit=4096):
            world.shells[1 - side].connection.receive_data(part, 0.0)
            moved = True
    return moved


def test_words_land_where_the_shell_says() -> None:
    world, words, places = landing_world()
    world.client.send(words, 0.0, codecs=RAW, step=200)
    world.settle()
    assert places
    for tile, place in places.items():
        np.testing.assert_array_equal(place, tile_words(words, tile))
    assert {event.tile for event in landed(world)} == set(places)
    assert len(world.server.received) == 1


def test_a_corrupt_chunk_that_landed_is_not_delivered_and_lands_again() -> None:
    world, words, places = landing_world()
    deliver, hit = world.pipes[0].deliver, []

    def corrupt(side: int, frame: bytes) -> None:
        header = Header.unpack(frame[:HEADER_SIZE])
        if header.type == FrameType.DATA and header.payload_length > 10_000 and not hit:
            hit.append(header)
            frame = frame[:-5] + bytes([frame[-5] ^ 4]) + frame[-4:]
        deliver(side, frame)

    world.pipes[0].deliver = corrupt
    world.client.send(words, 0.0, codecs=RAW, step=200)
    world.settle()
    assert hit
    assert world.server.connection.counters.corrupt == 1
    assert len(landed(world)) == len(places)
    for tile, place in places.items():
        np.testing.assert_array_equal(place, tile_words(words, tile))


def test_a_cancelled_transfer_is_not_written_to_any_more() -> None:
    """In the middle of a payload: the rest is read over, and the stream goes on."""
    world, words, places = landing_world()
    client, server = world.client, world.server
    transfer = client.send(words, 0.0, codecs=RAW, step=200)
    while not server.connection.landing():
        exchange(world)
    assert server.connection.landing() == transfer
    server.connection.cancel(transfer, 0.0)
    server.handle_events(0.0)
    for place in places.values():
        place[...] = 0xDEAD
    world.server.land = lambda transfer, tile: None
    while exchange(world):
        pass
    assert all((place == 0xDEAD).all() for place in places.values())
    second = client.send(cache(seed=1, tokens=600, dim=64), 0.0, codecs=RAW, step=200)
    while exchange(world):
        pass
    assert server.received[second].complete


def test_a_released_payload_is_not_read_any_more() -> None:
    """Cancelled in the middle of a frame: the frame goes on from a copy."""
    world, words, _ = landing_world()
    client = world.client.connection
    world.client.lazy = True
    transfer = world.client.send(words, 0.0, codecs=RAW, step=200)
    world.settle()
    request = client.next_chunk(0.0)
    assert request is not None
    payload = bytearray(np.ascontiguousarray(tile_words(words, request.tile)).tobytes())
    sent = bytes(payload)
    client.chunk_encoded(transfer, request.tile, 0, memoryview(payload), 0.0)
    got = b"".join(client.data_to_send(0.0, limit=HEADER_SIZE + 10))
    assert client.lent() == {transfer}
    client.cancel(transfer, 0.0)
    payload[:] = bytes(len(payload))
    while data := client.data_to_send(0.0):
        assert client.lent() == frozenset()
        got += b"".join(data)
    assert got[HEADER_SIZE : HEADER_SIZE + len(sent)] == sent


def test_cancel_stops_bytes_within_one_chunk() -> None:
    """What goes out after it is the rest of the frame that had begun, and control frames."""
    world, words, _ = landing_world()
    transfer = world.client.send(words, 0.0, codecs=RAW, step=200)
    client = world.client.connection
    while client.counters.sent_frames[0] < 2:  # in the middle of the third
        exchange(world)
    before = client.counters.sent_bytes[0]
    client.cancel(transfer, 0.0)
    world.client.handle_events(0.0)
    while client.data_to_send(0.0):
        pass
    largest = max(tile_words(words, tile).nbytes for tile in world.server.received[transfer].plan)
    assert client.counters.sent_bytes[0] - before <= largest + HEADER_SIZE


def test_a_landing_of_the_wrong_size_is_a_bug_of_the_shell() -> None:
    world, words, _ = landing_world()
    world.server.land = lambda transfer, tile: memoryview(bytearray(3))
    world.client.send(words, 0.0, codecs=RAW, step=200)
    with pytest.raises(LocalError, match="gave 3"):
        world.settle()


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:0", "memory://"])
def test_memory_can_be_reused_as_soon_as_cancel_returns(url: str) -> None:
    """On both sides, with frames under way; what is sent afterwards is intact."""
    cache_ = make_cache(layers=2, tokens=8000)
    policy = Policy.named("bf16")
    pages: dict[Any, Any] = {}

    def allocate(manifest: Any) -> dict[Any, Any]:
        pages.clear()
        pages.update({key: np.zeros_like(array) for key, array in cache_.arrays.items()})
        return dict(pages)

    async def main(receiver_cancels: bool) -> None:
        link = TokenBucket(cache_.manifest.nbytes * 8 / 2.0, 4096)
        name = next(_names) if url == "memory://" else url
        async with (
            listen(name, allocate=allocate, insecure=True) as receiver,
            connect(receiver.url, policy=policy, link=link, insecure=True) as sender,
        ):
            lent = {key: array.copy() for key, array in cache_.arrays.items()}
            outgoing = sender.open(cache_.manifest)
            for layer in range(2):
                await outgoing.write(layer, lent[layer, "key"], lent[layer, "value"])
            incoming = await first(receiver)
            while not any(array.any() for array in pages.values()):  # something has landed
                await asyncio.sleep(0)
            await (incoming if receiver_cancels else outgoing).cancel()
            mine = dict(pages)
            if receiver_cancels:
                for array in mine.values():
                    array[...] = 0xDEAD
            else:
                for array in lent.values():
                    array[...] = 0xDEAD
            with pytest.raises(TransferCancelledError):
                await (outgoing.finish() if receiver_cancels else incoming.exact())
            link.bytes_per_second *= 100
            _, again = await asyncio.gather(sender.open(cache_.manifest).send(cache_), first(receiver))
            await again.exact()
            assert_same(again.arrays, cache_)
            if receiver_cancels:
                assert all((array == 0xDEAD).all() for array in mine.values())

    run(lambda: main(True))
    run(lambda: main(False))


def test_words_right_behind_their_plan_land_in_place() -> None:
    """Plan and chunk may come in the same read: nothing of the size of a tile is allocated for its payload."""
    cache_ = make_cache(layers=4, tokens=4096)
    pages = {key: np.zeros_like(array) for key, array in cache_.arrays.items()}
    peaks: list[int] = []

    async def main() -> None:
        async with (
            listen(next(_names), allocate=lambda _: pages, insecure=True) as receiver,
            connect(receiver.url, policy=Policy.named("bf16"), insecure=True) as sender,
        ):
            for _ in range(3):
                tracemalloc.start()
                _, incoming = await asyncio.gather(sender.open(cache_.manifest).send(cache_), first(receiver))
                await incoming.exact()
                peaks.append(tracemalloc.get_traced_memory()[1])
                tracemalloc.stop()

    run(main)
    smallest = min(array.nbytes for array in cache_.arrays.values())
    assert max(peaks) < smallest, f"{peaks} bytes beside tiles of {smallest}"
