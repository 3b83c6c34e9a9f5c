"""Sessions end to end: real threads, real streams; a cache arrives bit for bit, or there is an error with a name."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import trustme

import lynxproto
from lynxproto import blocking
from lynxproto.cachefile import Cache
from lynxproto.chunk import Tile, TokenSet
from lynxproto.codecs import DecodeState, register_codec
from lynxproto.codecs.raw import Raw
from lynxproto.config import Config, Limits
from lynxproto.connection import Connection
from lynxproto.errors import (
    AuthenticationError,
    ConfigError,
    ConnectionClosedError,
    DeadlineError,
    DigestError,
    LocalError,
    LynxError,
    NotFoundError,
    PayloadError,
    PeerError,
    RejectedError,
    RemoteError,
    SpecError,
    StreamClosedError,
    TransferCancelledError,
    TransportError,
)
from lynxproto.manifest import FetchKey, Identity, LayerSpec, Manifest, Want
from lynxproto.policy import Policy
from lynxproto.session import Deadline, Progress
from lynxproto.transports import (
    TokenBucket,
    client_context,
    open_listener,
    open_stream,
    parse_url,
    server_context,
)
from lynxproto.transports.abc import ByteStream

#: Plaintext, which these tests ask for.
connect, listen = partial(lynxproto.connect, insecure=True), partial(lynxproto.listen, insecure=True)
IDENTITY = Identity(model="test/model", revision="r1")
_names = (f"memory://session-{n}" for n in itertools.count())


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await main()

    before = set(threading.enumerate())
    outcome = asyncio.run(bounded())
    left = [t.name for t in set(threading.enumerate()) - before if t.is_alive()]
    assert not left, f"threads outlived their session: {left}"
    return outcome


def make_cache(
    layers: int = 3, tokens: int = 300, heads: int = 2, dim: int = 64, dtype: str = "bfloat16", **manifest: Any
) -> Cache:
    described = Manifest.for_cache(
        identity=IDENTITY, dtype=dtype, layers=layers, kv_heads=heads, head_dim=dim, tokens=tokens, **manifest
    )
    rng = np.random.default_rng(layers * tokens)
    arrays: Any = {}
    for layer, part in itertools.product(range(layers), ("key", "value")):
        values = rng.standard_normal((heads, tokens, dim), np.float32) * 2
        if dtype == "float32":
            arrays[layer, part] = values.view(np.uint32)
        elif dtype == "bfloat16":
            arrays[layer, part] = (values.view(np.uint32) >> 16).astype(np.uint16)
        else:
            arrays[layer, part] = values.astype(np.float16).view(np.uint16)
    return Cache(manifest=described, arrays=arrays, first_token=42, logit_gap=1.5)


def assert_same(arrays: Any, cache: Cache) -> None:
    assert set(arrays) == set(cache.arrays)
    for key, words in cache.arrays.items():
        np.testing.assert_array_equal(np.asarray(arrays[key]), words, err_msg=str(key))


async def first(receiver: Any) -> Any:
    return await anext(receiver)


@pytest.mark.parametrize("policy", ["exact", "bf16"])
def test_a_layer_is_exact_before_the_others_are_written(policy: Any) -> None:
    cache = make_cache(layers=2)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest, Policy.named(policy))
            await outgoing.write(1, cache.arrays[1, "key"], cache.arrays[1, "value"])
            incoming = await first(receiver)
            await incoming.exact(layer=1)
            for part in ("key", "value"):
                np.testing.assert_array_equal(incoming.arrays[1, part], cache.arrays[1, part])
            with pytest.raises(SpecError, match="no layer 7"):
                await incoming.exact(layer=7)
            waiting = asyncio.create_task(incoming.exact(layer=0))
            await incoming.cancel()
            with pytest.raises(TransferCancelledError):
                await waiting

    run(main)


@pytest.mark.parametrize("url", ["tcp://127.0.0.1:0", "memory://round-trip"])
@pytest.mark.parametrize("policy", ["lynx", "bf16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_round_trip(url: str, policy: Any, dtype: str) -> None:
    cache = make_cache(dtype=dtype)

    async def main() -> None:
        async with listen(url) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest, Policy.named(policy))
            for layer in range(3):
                await outgoing.write(layer, cache.arrays[layer, "key"], cache.arrays[layer, "value"])
            outgoing.result(first_token=42, logit_gap=1.5)
            incoming = await first(receiver)
            assert incoming.manifest.identity == IDENTITY
            assert incoming.id == outgoing.id
            await incoming.ready(level=0, layer=0)
            await incoming.ready(level=0)
            assert incoming.is_ready(level=0)
            await incoming.exact()
            assert_same(incoming.arrays, cache)
            result = await incoming.result()
            assert (result.first_token, result.logit_gap) == (42, 1.5)
            await outgoing.finish()
            await outgoing.released.wait()
            assert outgoing.released.is_set()
            levels = 3 if policy == "lynx" else 1
            assert sorted(outgoing.stats.levels) == list(range(levels))
            assert {n: s.bytes for n, s in outgoing.stats.levels.items()} == {
                n: s.bytes for n, s in incoming.stats.levels.items()
            }
            for stats in incoming.stats.levels.values():
                assert stats.chunks == stats.total_chunks

    run(main)


def test_layers_are_usable_while_later_ones_do_not_exist_yet() -> None:
    cache = make_cache()

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            await outgoing.accepted()
            incoming = await first(receiver)
            for layer in (2, 0, 1):
                assert not incoming.is_ready(level=0, layer=layer)
                await outgoing.write(layer, cache.arrays[layer, "key"], cache.arrays[layer, "value"])
                await incoming.ready(level=2, layer=layer)
                for part in ("key", "value"):
                    np.testing.assert_array_equal(incoming.arrays[layer, part], cache.arrays[layer, part])
            with pytest.raises(LocalError, match="written before"):
                await outgoing.write(1, cache.arrays[1, "key"], cache.arrays[1, "value"])
            await asyncio.gather(outgoing.finish(), incoming.exact())
            with pytest.raises(StreamClosedError, match="complete"):
                outgoing.result(first_token=1)
            with pytest.raises(NotFoundError, match="no result"):
                await incoming.result()

    run(main)


def test_misuse_of_write_is_named() -> None:
    cache = make_cache()

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            with pytest.raises(SpecError, match="layer 0, value"):
                await outgoing.write(0, cache.arrays[0, "key"], cache.arrays[0, "value"][:, :5])
            with pytest.raises(SpecError, match="1 arrays were given"):
                await outgoing.write(0, cache.arrays[0, "key"])
            with pytest.raises(SpecError, match="no layer 9"):
                await outgoing.write(9, cache.arrays[0, "key"], cache.arrays[0, "value"])
            with pytest.raises(LocalError, match="missing: 0, 1, 2"):
                await outgoing.finish()
            await outgoing.cancel()

    run(main)


def test_decodes_into_the_engines_own_pages() -> None:
    """The destination may have any strides over heads and tokens: here [tokens, K|V, heads, dim] pages."""
    cache = make_cache(tokens=130)
    pages = np.zeros((3, 130, 2, 2, 64), np.uint16)

    def allocate(manifest: Manifest) -> Any:
        return {
            (layer, part): pages[layer, :, i].transpose(1, 0, 2)
            for layer in range(3)
            for i, part in enumerate(("key", "value"))
        }

    async def main() -> None:
        async with listen(next(_names), allocate=allocate) as receiver, connect(receiver.url) as sender:
            await asyncio.gather(sender.open(cache.manifest).send(cache), _exact(receiver))
        for (layer, part), words in cache.arrays.items():
            np.testing.assert_array_equal(pages[layer, :, int(part == "value")].transpose(1, 0, 2), words)

    async def _exact(receiver: Any) -> None:
        await (await first(receiver)).exact()

    run(main)


def test_torch_tensors_travel_without_conversion() -> None:
    torch = pytest.importorskip("torch")
    cache = make_cache(layers=1)
    tensors = {k: torch.from_numpy(v.view(np.int16)).view(torch.bfloat16) for k, v in cache.arrays.items()}
    targets = {k: torch.zeros_like(v) for k, v in tensors.items()}

    async def main() -> None:
        async with listen(next(_names), allocate=lambda _: targets) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            await outgoing.write(0, tensors[0, "key"], tensors[0, "value"])
            incoming = await first(receiver)
            await asyncio.gather(outgoing.finish(), incoming.exact())
        for key, tensor in tensors.items():
            assert torch.equal(targets[key].view(torch.int16), tensor.view(torch.int16))

    run(main)


def test_copy_lets_the_caller_reuse_its_memory_at_once() -> None:
    cache = make_cache()

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            for layer in range(3):
                arrays = [cache.arrays[layer, part].copy() for part in ("key", "value")]
                await outgoing.write(layer, *arrays, copy=True)
                for array in arrays:
                    array[...] = 0xFFFF
            incoming = await first(receiver)
            await asyncio.gather(outgoing.finish(), incoming.exact())
            assert_same(incoming.arrays, cache)

    run(main)


class Sparse(Policy):
    """Every third token in a tile of its own: explicit token sets."""

    def tiles(self, dtype: str, layer: LayerSpec) -> tuple[Tile, ...]:
        tokens = range(layer.token_start, layer.token_stop)
        sets = [TokenSet.of(t for t in tokens if t % 3 == 0), TokenSet.of(t for t in tokens if t % 3)]
        return tuple(
            Tile(layer.index, part, head, 1, chosen, 0)
            for part in layer.parts
            for head in range(layer.kv_heads)
            for chosen in sets
        )


def test_explicit_token_sets_are_gathered_and_scattered() -> None:
    cache = make_cache(tokens=200)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest, Sparse(sinks=0, recent=0))
            _, incoming = await asyncio.gather(outgoing.send(cache), first(receiver))
            await incoming.exact()
            assert_same(incoming.arrays, cache)

    run(main)


def test_lossy_policies_say_so() -> None:
    cache = make_cache()

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url, policy=Policy.named("int8")) as sender:
            _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
            await incoming.ready()
            assert incoming.manifest.lossy
            with pytest.raises(LocalError, match="lossy"):
                await incoming.exact()
            sent = (cache.arrays[0, "key"].astype(np.uint32) << 16).view(np.float32)
            got = (incoming.arrays[0, "key"].astype(np.uint32) << 16).view(np.float32)
            assert 0 < np.abs(sent - got).max() < 0.1

    run(main)


def test_many_transfers_share_a_session() -> None:
    caches = [make_cache(layers=1, tokens=40 + 50 * n, request_id=str(n)) for n in range(6)]

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0") as receiver, connect(receiver.url) as sender:

            async def collect() -> None:
                waiting = set(range(len(caches)))
                async for incoming in receiver:
                    await incoming.exact()
                    number = int(incoming.manifest.request_id)
                    assert_same(incoming.arrays, caches[number])
                    waiting.remove(number)
                    if not waiting:
                        return

            await asyncio.gather(collect(), *(sender.open(cache.manifest).send(cache) for cache in caches))

    run(main)


def test_progress_tells_what_arrived() -> None:
    cache = make_cache()
    seen: list[Progress] = []

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            incoming = await first(receiver)
            incoming.on_progress = seen.append
            await outgoing.send(cache)
            await incoming.exact()
            for level, stats in incoming.stats.levels.items():
                of_level = [p for p in seen if p.level == level]
                assert all(a.chunks < b.chunks and a.bytes < b.bytes for a, b in itertools.pairwise(of_level))
                assert of_level[-1].chunks == of_level[-1].total_chunks == stats.total_chunks
                assert of_level[-1].bytes == stats.bytes
        assert [p.time for p in seen] == sorted(p.time for p in seen)

    run(main)


def test_wants_are_all_that_is_sent() -> None:
    cache = make_cache(layers=4)
    wants = [Want(layers=(1, 2)), Want(layers=(3, 4), levels=1)]

    async def main() -> None:
        async with listen(next(_names), wants=lambda _: wants) as receiver, connect(receiver.url) as sender:
            _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
            await incoming.ready(level=2)
            np.testing.assert_array_equal(incoming.arrays[1, "key"], cache.arrays[1, "key"])
            whole = 2 * len(Policy().tiles("bfloat16", cache.manifest.layer(0)))
            assert incoming.stats.levels[0].chunks == whole
            assert 0 < incoming.stats.levels[1].chunks < whole

    run(main)


# --- what ends early


def test_what_was_allocated_for_a_transfer_that_is_cancelled_meanwhile_is_let_go() -> None:
    cache = make_cache()
    asked, cancelled, freed = threading.Event(), threading.Event(), threading.Event()

    class Arrays(dict[Any, Any]):
        pass

    def allocate(manifest: Manifest) -> Any:
        arrays = Arrays(lynxproto.session.allocate_arrays(manifest))
        weakref.finalize(arrays, freed.set)
        asked.set()
        cancelled.wait(30)
        return arrays

    async def main() -> None:
        async with listen(next(_names), allocate=allocate) as receiver, connect(receiver.url) as sender:
            transfer = sender.open(cache.manifest)
            await asyncio.to_thread(asked.wait, 30)
            await transfer.cancel()
            (peer,) = receiver._endpoint.peers
            while peer._offered:  # until the receiver knows
                await asyncio.sleep(0.005)
            cancelled.set()
            assert await asyncio.to_thread(freed.wait, 30)

    gc.disable()  # at once, not when the collector comes by
    try:
        run(main)
    finally:
        gc.enable()


def test_other_identities_are_refused_before_data_moves() -> None:
    cache = make_cache()
    other = Config(identity=replace(IDENTITY, revision="r2"))

    async def main() -> None:
        async with listen(next(_names), other) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            with pytest.raises(RejectedError, match="revision"):
                await outgoing.send(cache)
            await outgoing.released.wait()
            assert outgoing.stats.bytes == 0
            with pytest.raises(RejectedError):
                await outgoing.write(0, cache.arrays[0, "key"], cache.arrays[0, "value"])
        async with listen(next(_names)) as receiver, connect(receiver.url, other) as sender:
            with pytest.raises(LocalError, match="revision"):
                sender.open(cache.manifest)

    run(main)


def test_a_receiver_without_memory_refuses() -> None:
    cache = make_cache()

    def allocate(manifest: Manifest) -> Any:
        raise ConfigError("only 3 pages are free")

    async def main() -> None:
        async with listen(next(_names), allocate=allocate) as receiver, connect(receiver.url) as sender:
            with pytest.raises(RejectedError, match="only 3 pages"):
                await sender.open(cache.manifest).send(cache)
        wrong: Any = {(0, "key"): np.zeros((1, 2, 3), np.uint16)}
        async with listen(next(_names), allocate=lambda _: wrong) as receiver, connect(receiver.url) as sender:
            with pytest.raises(RejectedError, match="layer 0, key"):
                await sender.open(cache.manifest).send(cache)

    run(main)


def _twice(manifest: Manifest) -> Any:
    words = np.empty((2, 50, 64), np.uint16)
    return {(0, "key"): words, (0, "value"): words}


def _broadcast(manifest: Manifest) -> Any:
    words = np.lib.stride_tricks.as_strided(np.empty((2, 64), np.uint16), (2, 50, 64), (128, 0, 2))
    return {(0, "key"): np.empty((2, 50, 64), np.uint16), (0, "value"): words}


def _read_only(manifest: Manifest) -> Any:
    words = np.empty((2, 2, 50, 64), np.uint16)
    words.flags.writeable = False
    return {(0, "key"): words[0], (0, "value"): words[1]}


@pytest.mark.parametrize(
    ("allocate", "says"),
    [
        (_twice, "layer 0, value: the output array shares memory with layer 0, key"),
        (_broadcast, "layer 0, value: the output array is broadcast"),
        (_read_only, "layer 0, key: the output array is read-only"),
        (lambda manifest: {}, "no array for layer 0, key"),
    ],
)
def test_destinations_that_cannot_hold_a_cache_are_refused(allocate: Any, says: str) -> None:
    cache = make_cache(layers=1, tokens=50)

    async def main() -> None:
        async with listen(next(_names), allocate=allocate) as receiver, connect(receiver.url) as sender:
            with pytest.raises(RejectedError, match=says):
                await sender.open(cache.manifest).send(cache)

    run(main)


def slow(anchor_seconds: float, cache: Cache) -> TokenBucket:
    """A link on which the anchor of ``cache`` takes about so long and the rest much longer."""
    return TokenBucket(cache.manifest.nbytes * 8 / 3.5 / anchor_seconds, 4096)


def test_cancel_by_the_receiver_stops_all_writing() -> None:
    cache = make_cache(layers=4, tokens=600)

    async def main() -> None:
        async with (
            listen(next(_names)) as receiver,
            connect(receiver.url, link=slow(0.2, cache)) as sender,
        ):
            outgoing = sender.open(cache.manifest)
            sending = asyncio.ensure_future(outgoing.send(cache))
            incoming = await first(receiver)
            await incoming.ready(level=0, layer=0)
            await incoming.cancel()
            before = {k: v.copy() for k, v in incoming.arrays.items()}
            assert incoming.released.is_set()
            for waiting in (incoming.exact(), incoming.ready(level=2)):
                with pytest.raises(TransferCancelledError, match="cancelled"):
                    await waiting
            with pytest.raises(TransferCancelledError, match="cancelled"):
                await sending
            await outgoing.released.wait()
            assert outgoing.stats.bytes < 0.6 * cache.manifest.nbytes
            for key, words in before.items():
                np.testing.assert_array_equal(incoming.arrays[key], words)

    run(main)


@pytest.mark.parametrize("wait_for", [(0, 0), (0, None), (1, 0)])
def test_memory_is_the_callers_again_after_cancel(wait_for: tuple[int, int | None]) -> None:
    """Cancelled at full speed, with decoding under way: what the caller writes afterwards stays."""
    cache = make_cache(layers=6, tokens=1500)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
            incoming = await first(receiver)
            await incoming.ready(*wait_for)
            await incoming.cancel()
            for array in incoming.arrays.values():
                array[...] = 0xABCD
            with contextlib.suppress(TransferCancelledError):
                await sending  # or it was done before
        for array in incoming.arrays.values():
            assert (array == 0xABCD).all()

    run(main)


def test_cancel_by_the_sender_releases_its_memory() -> None:
    cache = make_cache(layers=4, tokens=600)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url, link=slow(0.2, cache)) as sender:
            outgoing = sender.open(cache.manifest)
            for layer in range(4):
                await outgoing.write(layer, cache.arrays[layer, "key"], cache.arrays[layer, "value"])
            incoming = await first(receiver)
            await incoming.ready(level=0, layer=0)
            await outgoing.cancel()
            assert outgoing.released.is_set()
            with pytest.raises(TransferCancelledError):
                await incoming.exact()
            await incoming.released.wait()
            with pytest.raises(TransferCancelledError):
                await outgoing.finish()

    run(main)


def test_cancel_above_a_level_completes_at_that_level() -> None:
    cache = make_cache(layers=4, tokens=600)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url, link=slow(0.2, cache)) as sender:
            outgoing = sender.open(cache.manifest)
            sending = asyncio.ensure_future(outgoing.send(cache))
            incoming = await first(receiver)
            await incoming.ready(level=0)
            await incoming.cancel(above_level=0)
            await sending
            await incoming.ready(level=0)
            for waiting in (incoming.exact(), incoming.ready(level=2)):
                with pytest.raises(TransferCancelledError, match="above 0"):
                    await waiting
            await incoming.released.wait()
            assert outgoing.stats.bytes < 0.6 * cache.manifest.nbytes

    run(main)


def test_deadlines() -> None:
    cache = make_cache(layers=4, tokens=600)

    async def attempt(deadline: Deadline, check: Callable[[Any, Awaitable[None]], Awaitable[None]]) -> None:
        link = TokenBucket(cache.manifest.nbytes * 8 / 3.5 / 0.2, 4096)
        async with (
            listen(next(_names), deadlines=[deadline]) as receiver,
            connect(receiver.url, link=link) as sender,
        ):
            sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
            await check(await first(receiver), sending)

    async def waits(incoming: Any, sending: Awaitable[None]) -> None:
        await incoming.exact()
        await sending
        assert incoming.late == {0}
        assert incoming.degraded is None
        assert_same(incoming.arrays, cache)

    async def fails(incoming: Any, sending: Awaitable[None]) -> None:
        with pytest.raises(DeadlineError, match="level 0"):
            await incoming.ready(level=0)
        with pytest.raises(DeadlineError, match="level 0"):
            await incoming.exact()
        with pytest.raises(TransferCancelledError, match="was not ready within"):
            await sending

    async def main() -> None:
        await attempt(Deadline(level=0, seconds=0.01, policy="wait"), waits)
        await attempt(Deadline(level=0, seconds=0.01, policy="fail"), fails)

    run(main)
    for nonsense in (
        {"level": -1, "seconds": 1},
        {"level": 0, "seconds": 0},
        {"level": 0, "seconds": 1, "policy": "x"},
    ):
        with pytest.raises(ConfigError):
            Deadline(**nonsense)  # type: ignore[arg-type]


def test_a_missed_deadline_can_degrade_a_transfer() -> None:
    cache = make_cache(layers=4, tokens=600)
    deadline = Deadline(level=2, seconds=2, policy="degrade")

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0", deadlines=[deadline]) as receiver:
            proxy = Proxy(receiver.url, lambda number, direction, offset, data: data)
            proxy.hold_at = int(0.45 * cache.manifest.nbytes)  # all anchors and a part of the residuals
            async with proxy as url, connect(url) as sender:
                sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
                incoming = await first(receiver)
                with pytest.raises(DeadlineError, match="degraded to level 0"):
                    await incoming.exact()
                assert incoming.degraded == 0
                assert incoming.late == frozenset()
                await incoming.ready(level=0)
                with pytest.raises(DeadlineError, match="degraded"):
                    await incoming.ready(level=2)
                proxy.gate.set()
                await sending

    run(main)


def test_closing_a_side_ends_what_is_under_way() -> None:
    cache = make_cache(layers=4, tokens=600)

    async def main(receiver_closes: bool) -> None:
        receiver = await listen(next(_names)).__aenter__()
        sender = await connect(receiver.url, link=slow(0.3, cache)).__aenter__()
        outgoing = sender.open(cache.manifest)
        sending = asyncio.ensure_future(outgoing.send(cache))
        incoming = await first(receiver)
        await incoming.ready(level=0, layer=0)
        await (receiver if receiver_closes else sender).aclose()
        if receiver_closes:
            with pytest.raises((TransferCancelledError, ConnectionClosedError)):
                await sending
        else:
            with pytest.raises((TransferCancelledError, ConnectionClosedError)):
                await incoming.exact()
            sending.cancel()
            assert outgoing.released.is_set()
        await receiver.aclose()
        await sender.aclose()
        with pytest.raises(StreamClosedError):
            sender.open(cache.manifest)

    run(lambda: main(True))
    run(lambda: main(False))


def test_a_goodbye_waits_for_the_frame_that_is_half_sent() -> None:
    """However slow the link: a peer that is not told would wait for the session to be resumed."""
    cache = make_cache(layers=1, heads=1, tokens=6000, dim=64)
    link = TokenBucket(cache.manifest.nbytes * 8 / 6, 4096)  # each of the two frames takes three seconds

    async def main() -> None:
        policy = Policy.named("bf16")
        async with listen(next(_names)) as receiver:
            async with connect(receiver.url, policy=policy, link=link) as sender:
                sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
                incoming = await first(receiver)
                while not incoming.arrays[0, "key"].any():
                    await asyncio.sleep(0.01)
            with pytest.raises((TransferCancelledError, ConnectionClosedError)):
                await incoming.exact()
            with pytest.raises(LynxError):
                await sending

    run(main)


def test_iteration_ends_with_close() -> None:
    async def main() -> None:
        async with listen(next(_names)) as receiver:

            async def count() -> int:
                return len([transfer async for transfer in receiver])

            counting = asyncio.ensure_future(count())
            await asyncio.sleep(0)
            await receiver.aclose()
            assert await counting == 0
        with pytest.raises(StreamClosedError):
            await first(receiver)

    run(main)


def test_giving_up_waiting_loses_no_transfer() -> None:
    cache = make_cache(layers=1, tokens=20)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            taken = 0
            sending = asyncio.ensure_future(_send_many(sender, cache, 20))
            for turn in itertools.count():
                waiting = asyncio.ensure_future(first(receiver))
                for _ in range(turn % 7):
                    await asyncio.sleep(0)
                waiting.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await waiting
                    taken += 1
                if sending.done():
                    break
            while taken < 20:
                await first(receiver)
                taken += 1

    run(main)


async def _send_many(sender: Any, cache: Cache, count: int) -> None:
    for _ in range(count):
        await sender.open(cache.manifest).send(cache)


def test_a_complete_transfer_can_be_cancelled_before_its_sender_says_that_it_is_done() -> None:
    cache = make_cache(layers=1, tokens=50)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            await outgoing.write(0, cache.arrays[0, "key"], cache.arrays[0, "value"])
            incoming = await first(receiver)
            await incoming.exact()
            await incoming.cancel()
            assert_same(incoming.arrays, cache)
            await outgoing.finish()
            await incoming.released.wait()

    run(main)


def test_calls_from_another_thread_while_a_session_closes_are_answered() -> None:
    cache = make_cache(layers=1, tokens=20)
    answers: list[BaseException] = []

    def hammer(sender: Any, outgoing: Any, closed: threading.Event) -> None:
        while not closed.is_set():
            for call in (lambda: outgoing.result(1), lambda: sender.open(cache.manifest)):
                try:
                    call()
                except BaseException as error:
                    answers.append(error)

    async def main() -> None:
        async with listen(next(_names)) as receiver:
            for _ in range(8):
                sender, closed = connect(receiver.url), threading.Event()
                await sender.__aenter__()
                thread = threading.Thread(target=hammer, args=(sender, sender.open(cache.manifest), closed))
                thread.start()
                await sender.aclose()
                closed.set()
                await asyncio.to_thread(thread.join)

    run(main)
    assert {type(error) for error in answers} <= {LocalError, StreamClosedError, TransferCancelledError}


# --- links and peers that misbehave


class Proxy:
    """Forwards byte streams and does to them what ``meddle(direction, offset, data)`` says; None cuts the stream."""

    def __init__(self, target: str, meddle: Callable[[int, str, int, bytearray], bytearray | None]) -> None:
        self.target = target
        self._meddle = meddle
        self._tasks: set[asyncio.Task[None]] = set()
        self.streams = 0
        self.hold_at = 1 << 60  # bytes that go up before the gate must be open
        self.gate = asyncio.Event()

    async def __aenter__(self) -> str:
        self._listener = await open_listener("tcp://127.0.0.1:0")
        self._tasks.add(asyncio.ensure_future(self._accept()))
        return self._listener.url

    async def __aexit__(self, *_: object) -> None:
        await self._listener.aclose()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self) -> None:
        while True:
            near = await self._listener.accept()
            try:
                far = await open_stream(self.target)
            except LynxError:  # nobody is there just now
                await near.aclose()
                continue
            self.streams += 1
            self._tasks.add(asyncio.ensure_future(self._forward(self.streams, "up", near, far)))
            self._tasks.add(asyncio.ensure_future(self._forward(self.streams, "down", far, near)))

    async def _forward(self, number: int, direction: str, source: ByteStream, target: ByteStream) -> None:
        offset = 0
        buffer = memoryview(bytearray(16384))
        try:
            while count := await source.receive_into(buffer):
                data = self._meddle(number, direction, offset, bytearray(buffer[:count]))
                if data is None:
                    break
                if direction == "up" and offset > self.hold_at:
                    await self.gate.wait()
                await target.send([memoryview(data)])
                offset += count
        except LynxError:
            pass
        finally:
            await source.aclose()
            await target.aclose()


@pytest.mark.parametrize("cut_at", [100, 30_000, 150_000])
def test_a_broken_link_is_resumed(cut_at: int) -> None:
    cache = make_cache(layers=4, tokens=600)
    quick = Config(retry_interval=0.01)

    def meddle(number: int, direction: str, offset: int, data: bytearray) -> bytearray | None:
        handshake = 1000 if number == 1 else 0
        return None if number <= 2 and direction == "up" and offset > cut_at + handshake else data

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0", quick) as receiver:
            proxy = Proxy(receiver.url, meddle)
            async with proxy as url, connect(url, quick) as sender:
                _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
                await incoming.exact()
                assert_same(incoming.arrays, cache)
                assert proxy.streams >= 2

    run(main)


def test_flipped_bits_are_sent_again() -> None:
    cache = make_cache(layers=4, tokens=600)
    quick = Config(retry_interval=0.01)
    flips = iter(range(4))

    def meddle(number: int, direction: str, offset: int, data: bytearray) -> bytearray | None:
        if direction == "up" and offset > 20_000 and len(data) > 8000 and next(flips, None) is not None:
            data[5000] ^= 0x10
        return data

    async def main() -> None:
        async with (
            listen("tcp://127.0.0.1:0", quick) as receiver,
            Proxy(receiver.url, meddle) as url,
            connect(url, quick) as sender,
        ):
            _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
            await incoming.exact()
            assert_same(incoming.arrays, cache)
        assert next(flips, None) is None

    run(main)


@pytest.mark.parametrize("seed", range(6))
def test_chaos(seed: int) -> None:
    """Cuts and flipped bits anywhere, both ways, for a while: the cache is exact in the end."""
    cache = make_cache(layers=3, tokens=1200)
    quick = Config(retry_interval=0.01, retry_limit=0.05, resends=100)
    random = Random(seed)
    faults = 12

    def meddle(number: int, direction: str, offset: int, data: bytearray) -> bytearray | None:
        nonlocal faults
        if number == 1 and offset < 4000:
            return data  # a first handshake that fails is the caller's to try again
        if faults and random.random() < 0.25:
            faults -= 1
            if random.random() < 0.4:
                return None
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        return data

    async def main() -> None:
        async with (
            listen("tcp://127.0.0.1:0", quick) as receiver,
            Proxy(receiver.url, meddle) as url,
            connect(url, quick) as sender,
        ):
            outgoing = sender.open(cache.manifest)
            sending = asyncio.ensure_future(outgoing.send(cache))
            incoming = await first(receiver)
            await incoming.exact()
            assert_same(incoming.arrays, cache)
            await sending
        assert faults == 0

    run(main)


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_codec_threads_that_are_gone_end_the_transfer_with_an_error(side: str) -> None:
    """As where the system allows no more threads; and closing must not wait for work that nobody does."""
    cache = make_cache(layers=4, tokens=3000)

    async def main() -> None:
        little = Config(encode_ahead=1 << 15)
        async with listen(next(_names)) as receiver, connect(receiver.url, little, link=slow(0.5, cache)) as sender:
            sending = asyncio.ensure_future(sender.open(cache.manifest, Policy(tile_bytes=1 << 17)).send(cache))
            incoming = await first(receiver)
            await incoming.ready(level=0, layer=0)
            session = sender if side == "sender" else receiver
            session._endpoint.workers._executor.shutdown()
            both = await asyncio.gather(sending, incoming.exact(), return_exceptions=True)
            mine, theirs = both if side == "sender" else both[::-1]
            assert isinstance(mine, LocalError), both
            assert isinstance(theirs, RemoteError), both
            await incoming.released.wait()

    run(main)


@pytest.mark.parametrize("interrupted", [False, True])
def test_closing_twice_at_once_closes_once_and_wholly(interrupted: bool) -> None:
    """Whoever comes second waits for the first; whoever gives up waiting leaves no thread behind."""
    cache = make_cache(layers=4, tokens=600)

    async def main() -> None:
        receiver = await listen(next(_names)).__aenter__()
        sender = await connect(receiver.url, link=slow(0.3, cache)).__aenter__()
        sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
        await first(receiver)
        closing = asyncio.ensure_future(receiver.aclose())
        await asyncio.sleep(0)
        if interrupted:
            closing.cancel()
        await receiver.aclose()
        assert receiver._endpoint.io is None
        await asyncio.gather(closing, sending, return_exceptions=True)
        await sender.aclose()

    run(main)


def test_a_restarted_receiver_is_offered_the_transfer_again() -> None:
    cache = make_cache(layers=4, tokens=600)
    impatient = Config(retry_interval=0.01)
    dead = False

    def meddle(number: int, direction: str, offset: int, data: bytearray) -> bytearray | None:
        return None if dead and number == 1 else data

    async def main() -> None:
        nonlocal dead
        async with listen("tcp://127.0.0.1:0") as after:
            receiver = await listen("tcp://127.0.0.1:0").__aenter__()
            proxy = Proxy(receiver.url, meddle)
            async with proxy as url, connect(url, impatient, link=slow(0.3, cache)) as sender:
                outgoing = sender.open(cache.manifest)
                sending = asyncio.ensure_future(outgoing.send(cache))
                await (await first(receiver)).ready(level=0, layer=0)
                dead, proxy.target = True, after.url  # not even its goodbye gets through
                await receiver.aclose()
                incoming = await first(after)
                await incoming.exact()
                assert incoming.id == outgoing.id
                assert_same(incoming.arrays, cache)
                await sending
                again = sender.open(cache.manifest)  # the session is as good as new
                await asyncio.gather(again.send(cache), (await first(after)).exact())
            assert proxy.streams > 2

    run(main)


@register_codec
class Unsound(Raw):
    """Stores words, and gets the next ``wrong`` tiles wrong when it decodes; refuses the next ``refused`` payloads."""

    codec_id = "unsound"
    wire_id = 0x8001
    verbatim = False
    wrong = 0
    refused = 0

    def decode(self, spec: Any, levels: Any, out: Any, *, threads: int = 1) -> DecodeState:
        state = super().decode(spec, levels, out, threads=threads)
        if Unsound.refused > 0:
            Unsound.refused -= 1
            raise PayloadError("unsound: refused")
        if Unsound.wrong > 0:
            Unsound.wrong -= 1
            out[0, 0, 0] ^= 1
        return state


@pytest.mark.parametrize("fault", ["wrong", "refused"])
def test_a_tile_that_decodes_wrong_is_sent_again_once(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make_cache(layers=2)
    policy = Policy(body={"id": "unsound"}, sinks=0, recent=0)
    config = Config(codecs=("raw", "unsound"))

    async def main() -> None:
        async with listen(next(_names), config) as receiver, connect(receiver.url, config, policy=policy) as sender:
            monkeypatch.setattr(Unsound, fault, 1)
            _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
            await incoming.exact()
            assert_same(incoming.arrays, cache)
            monkeypatch.setattr(Unsound, fault, 1000)
            sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
            incoming = await first(receiver)
            with pytest.raises(DigestError if fault == "wrong" else RemoteError, match="even after it was sent again"):
                await incoming.exact()
            with pytest.raises(PeerError, match="failed at the receiver"):
                await sending

    run(main)


def test_a_peer_that_is_gone_for_good_is_a_named_error() -> None:
    cache = make_cache(layers=4, tokens=600)
    impatient = Config(session_timeout=0.3, retry_interval=0.01)

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0", impatient) as receiver:
            gone = False

            def meddle(number: int, direction: str, offset: int, data: bytearray) -> bytearray | None:
                return None if gone else data

            async with Proxy(receiver.url, meddle) as url, connect(url, impatient, link=slow(0.3, cache)) as sender:
                outgoing = sender.open(cache.manifest)
                sending = asyncio.ensure_future(outgoing.send(cache))
                incoming = await first(receiver)
                await incoming.ready(level=0, layer=0)
                gone = True
                with pytest.raises(RemoteError):
                    await sending
                await outgoing.released.wait()
                with pytest.raises(RemoteError):
                    await incoming.exact()
                with pytest.raises(RemoteError):
                    sender.open(cache.manifest)

    run(main)


def test_peers_that_are_something_else() -> None:
    async def hang_up(listener: Any, words: bytes) -> None:
        async with await listener.accept() as stream:
            await stream.receive_into(memoryview(bytearray(1000)))
            await stream.send([memoryview(words)])

    async def main() -> None:
        for words in (b"", b"HTTP/1.1 400 Bad Request\r\n\r\n" + bytes(100)):
            async with await open_listener("tcp://127.0.0.1:0") as listener:
                serving = asyncio.ensure_future(hang_up(listener, words))
                with pytest.raises(RemoteError):
                    await connect(listener.url).__aenter__()
                await serving
        # A stranger at the door does not keep others out.
        async with listen("tcp://127.0.0.1:0") as receiver:
            for words in (b"", b"GET / HTTP/1.1\r\n\r\n" * 10):
                async with await open_stream(receiver.url) as stranger:
                    await stranger.send([memoryview(words)] if words else [])
            async with connect(receiver.url):
                pass

    run(main)


def test_nobody_there() -> None:
    async def main() -> None:
        async with listen("tcp://127.0.0.1:0") as receiver:
            url = receiver.url
            with pytest.raises(TransportError, match="another program listens"):
                await listen(url).__aenter__()
        with pytest.raises(TransportError, match="start the receiver first"):
            await connect(url).__aenter__()
        with pytest.raises(ConfigError, match="unknown scheme"):
            await connect("http://127.0.0.1:1").__aenter__()
        listener = await open_listener("tcp://127.0.0.1:0")
        with pytest.raises(ConfigError, match="certificate"):
            await listen("tcps://127.0.0.1:0").__aenter__()
        await listener.aclose()

    run(main)


def test_peers_that_say_nothing() -> None:
    async def main() -> None:
        async with await open_listener("tcp://127.0.0.1:0") as listener:  # the kernel accepts, nobody answers
            with pytest.raises(DeadlineError, match="no handshake"):
                await connect(listener.url, Config(peer_timeout=0.1)).__aenter__()
            with pytest.raises(TransportError, match=r"no answer within 0\.1 s"):
                await connect(listener.url.replace("tcp", "tcps"), connect_timeout=0.1).__aenter__()
        async with listen("tcp://127.0.0.1:0", Config(peer_timeout=0.1)) as receiver:
            async with await open_stream(receiver.url) as stranger:
                assert await stranger.receive_into(memoryview(bytearray(1))) == 0  # it is not kept for ever
            async with await open_stream(receiver.url) as stranger:
                await stranger.send([memoryview(b"L")])
                assert await stranger.receive_into(memoryview(bytearray(1))) == 0

    run(main)


def test_tls_with_both_sides_known(tmp_path: Path) -> None:
    authority = trustme.CA()
    files: dict[str, dict[str, Path]] = {}
    for name in ("localhost", "client@example.org"):
        folder = tmp_path / name
        folder.mkdir()
        issued = authority.issue_cert(name)
        issued.private_key_pem.write_to_path(folder / "key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        authority.cert_pem.write_to_path(folder / "ca.pem")
        files[name] = {k: folder / f"{k}.pem" for k in ("key", "certificate", "ca")}
    server = server_context(**files["localhost"])
    cache = make_cache()

    async def main() -> None:
        async with listen("tcps://localhost:0", tls=server) as receiver:
            url = f"tcps://localhost:{parse_url(receiver.url).port}"
            with pytest.raises(AuthenticationError, match="not trusted"):
                await connect(url).__aenter__()
            with pytest.raises((AuthenticationError, TransportError)):
                await connect(url, tls=client_context(ca=files["localhost"]["ca"])).__aenter__()
            async with connect(url, tls=client_context(**files["client@example.org"])) as sender:
                _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
                await incoming.exact()
                assert_same(incoming.arrays, cache)

    run(main)


def test_shared_secrets() -> None:
    right, wrong = Config(secret=b"0123456789abcdef"), Config(secret=b"fedcba9876543210")
    cache = make_cache(layers=1)

    async def main() -> None:
        async with listen(next(_names), right) as receiver:
            for stranger in (wrong, Config()):
                with pytest.raises(RemoteError):
                    await connect(receiver.url, stranger).__aenter__()
            async with connect(receiver.url, right) as sender:
                _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
                await incoming.exact()
        async with listen(next(_names)) as receiver:
            with pytest.raises(AuthenticationError):
                await connect(receiver.url, right).__aenter__()

    run(main)


def test_plaintext_must_be_asked_for(tmp_path: Path) -> None:
    secret = Config(secret=b"0123456789abcdef")

    async def main() -> None:
        for url, config in (
            ("tcp://0.0.0.0:0", None),
            ("tcp://0.0.0.0:0", secret),
            ("tcp://decode:1", secret),
            ("ucx://127.0.0.1:1", secret),
        ):
            for make in (lynxproto.listen, lynxproto.connect):
                with pytest.raises(ConfigError, match=r"plaintext.*tcps://.*--insecure"):
                    await make(url, config).__aenter__()
        # Nobody else is on the way.
        for url in ("tcp://127.0.0.1:0", "tcp://[::1]:0", f"unix://{tmp_path}/socket", "memory://kept-inside"):
            async with lynxproto.listen(url) as receiver, lynxproto.connect(receiver.url):
                pass

    run(main)


def test_limits_are_enforced_before_allocation() -> None:
    cache = make_cache()
    allocated: list[Manifest] = []

    def allocate(manifest: Manifest) -> Any:
        allocated.append(manifest)
        return {}

    async def main() -> None:
        small = Config(limits=Limits(transfer_bytes=1000))
        async with listen(next(_names), small, allocate=allocate) as receiver, connect(receiver.url) as sender:
            with pytest.raises(LynxError, match=r"1000|limit|bytes"):
                await sender.open(cache.manifest).send(cache)
        assert not allocated

    run(main)


# --- priorities


def test_a_new_anchor_overtakes_queued_residuals() -> None:
    large, small = make_cache(layers=4, tokens=1500, request_id="large"), make_cache(layers=1, tokens=100)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url, link=slow(0.3, large)) as sender:
            first_out = sender.open(large.manifest)
            first_sending = asyncio.ensure_future(first_out.send(large))
            first_in = await first(receiver)
            await first_in.ready(level=0)
            before = first_in.stats.bytes
            second_sending = asyncio.ensure_future(sender.open(small.manifest).send(small))
            second_in = await first(receiver)
            await second_in.ready(level=0)
            # Besides what was under way, little of the first one's residual went before the new anchor.
            assert first_in.stats.bytes - before < 0.3 * large.manifest.nbytes
            assert not first_in.is_ready(level=2)
            first_in.urgent()
            await asyncio.gather(first_in.exact(), second_in.exact(), first_sending, second_sending)
            assert_same(first_in.arrays, large)
            assert_same(second_in.arrays, small)

    run(main)


# --- fetch


def test_fetch() -> None:
    cache = make_cache()
    key = FetchKey(identity=IDENTITY.hash(), blocks=(b"block-01", b"block-02"))
    asked: list[Any] = []

    def on_fetch(wanted: FetchKey, wants: Any) -> Cache | None:
        asked.append(wanted)
        return cache if wanted == key else None

    async def main() -> None:
        async with listen(next(_names), on_fetch=on_fetch) as server, connect(server.url) as client:
            incoming = await client.fetch(key)
            await incoming.exact()
            assert_same(incoming.arrays, cache)
            assert (await incoming.result()).first_token == 42
            with pytest.raises(NotFoundError):
                await client.fetch(replace(key, salt=b"other tenant"))
        assert [k.salt for k in asked] == [b"", b"other tenant"]

    run(main)


def test_a_fetched_cache_of_float32() -> None:
    """Its policy follows from its dtype; with one that cannot code it the peer is told, and does not wait."""
    cache = make_cache(dtype="float32")
    key = FetchKey(identity=IDENTITY.hash(), blocks=())

    async def main() -> None:
        async with listen(next(_names), on_fetch=lambda *_: cache) as server, connect(server.url) as client:
            incoming = await client.fetch(key)
            await incoming.exact()
            assert_same(incoming.arrays, cache)
        unfit = Policy()
        async with (
            listen(next(_names), on_fetch=lambda *_: cache, policy=unfit) as server,
            connect(server.url) as client,
            asyncio.timeout(20),
        ):
            with pytest.raises(TransferCancelledError):
                await (await client.fetch(key)).exact()

    run(main)


def test_fetch_from_a_peer_that_serves_nothing() -> None:
    key = FetchKey(identity=IDENTITY.hash(), blocks=())

    async def main() -> None:
        async with listen(next(_names)) as server, connect(server.url) as client:
            with pytest.raises(NotFoundError):
                await client.fetch(key)

    run(main)


# --- stripes, threads, blocking


def test_several_stripes() -> None:
    cache = make_cache(layers=6, tokens=500)

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0") as receiver, connect(receiver.url, stripes=3) as sender:
            _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), first(receiver))
            await incoming.exact()
            assert_same(incoming.arrays, cache)

    run(main)


def test_blocking() -> None:
    cache = make_cache()
    with (
        blocking.listen("tcp://127.0.0.1:0", insecure=True) as receiver,
        blocking.connect(receiver.url, insecure=True) as sender,
    ):
        outgoing = sender.open(cache.manifest)
        outgoing.accepted(timeout=30)
        incoming = next(receiver)
        with pytest.raises(DeadlineError, match="not done"):
            incoming.ready(level=0, timeout=0.01)
        for layer in range(3):
            outgoing.write(layer, cache.arrays[layer, "key"], cache.arrays[layer, "value"])
        outgoing.result(first_token=3)
        incoming.urgent()
        outgoing.finish(timeout=30)
        incoming.exact(timeout=30)
        assert incoming.result(timeout=30).first_token == 3
        assert_same(incoming.arrays, cache)
        outgoing.wait_released(timeout=30)
        assert outgoing.released
        with pytest.raises(NotFoundError):
            sender.fetch(FetchKey(identity=IDENTITY.hash(), blocks=()), timeout=30)
    with pytest.raises(StreamClosedError):
        sender.open(cache.manifest)
    with pytest.raises(TransportError), blocking.connect(receiver.url, insecure=True):
        pass


def test_transfers_may_be_awaited_on_any_loop() -> None:
    """The session is made on one event loop, the transfer is used on another one, in another thread."""
    cache = make_cache()

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            outgoing = sender.open(cache.manifest)
            sending = asyncio.to_thread(asyncio.run, outgoing.send(cache))
            incoming = await first(receiver)
            receiving = asyncio.to_thread(asyncio.run, incoming.exact())
            await asyncio.gather(sending, receiving)
            assert_same(incoming.arrays, cache)

    run(main)


def test_an_offer_that_is_taken_back_at_once_is_never_seen() -> None:
    """OPEN and its end may come in one piece: nobody is to get a transfer that is over."""
    cache = make_cache()

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0") as receiver:
            host, _, port = receiver.url.removeprefix("tcp://").rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            client = Connection(Config(), client=True)
            client.open_stripe(0.0)

            async def until(condition: Callable[[], bool]) -> None:
                while not condition():
                    writer.writelines(client.data_to_send(0.0))
                    client.receive_data(await reader.read(1 << 16), 0.0)

            await until(lambda: client.session is not None)
            manifest = replace(cache.manifest, codecs=({"id": "raw"},))
            gone = client.open(manifest, 0.0)
            client.cancel(gone, 0.0)
            kept = client.open(manifest, 0.0)
            writer.write(b"".join(client.data_to_send(0.0)))
            incoming = await first(receiver)
            assert incoming.id == kept
            client.close(0.0)
            writer.writelines(client.data_to_send(0.0))
            writer.close()

    run(main)


def test_who_asks_for_progress_late_is_told_what_had_arrived() -> None:
    cache = make_cache(layers=2, tokens=70)

    async def main() -> None:
        async with listen(next(_names)) as receiver, connect(receiver.url) as sender:
            sending = asyncio.ensure_future(sender.open(cache.manifest).send(cache))
            incoming = await first(receiver)
            await incoming.exact()
            await sending
            told: asyncio.Queue[Progress] = asyncio.Queue()
            loop = asyncio.get_running_loop()
            incoming.on_progress = lambda progress: loop.call_soon_threadsafe(told.put_nowait, progress)
            levels = [await told.get() for _ in range(3)]
            assert [progress.level for progress in levels] == [0, 1, 2]
            assert all(progress.chunks == progress.total_chunks > 0 for progress in levels)
        incoming.on_progress = None  # the session is over

    run(main)
