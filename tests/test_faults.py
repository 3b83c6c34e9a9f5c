"""Injected faults: at the bytes that the seed says, whatever the sizes of reads and writes; named when they break."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine
from itertools import takewhile
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lynxproto.errors import ConfigError, StreamClosedError, TransportError
from lynxproto.transports import Fault, Faults, memory_pair
from lynxproto.transports.faults import Direction


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(30):
            return await coroutine

    return asyncio.run(bounded())


def model(data: bytes, plan: list[Fault]) -> tuple[bytes, bool]:
    """What of ``data`` arrives, and whether the link breaks; computed on the whole at once."""
    out = bytearray()
    lose = 0
    faults = iter(plan)
    fault = next(faults, None)
    for at, byte in enumerate(data):
        flips = 0
        while fault is not None and fault.at <= at:
            if fault.kind == "reset":
                return bytes(out), True
            if fault.kind == "end":
                return bytes(out), False
            if fault.kind == "flip":
                flips ^= 1 << fault.bit
            if fault.kind == "drop":
                lose += fault.nbytes
            fault = next(faults, None)
        if lose:
            lose -= 1
        else:
            out.append(byte ^ flips)
    return bytes(out), False


async def pump(data: bytes, faults: Faults, direction: Direction, rng: Random) -> tuple[bytes, bool]:
    """Send ``data`` in random pieces and receive it in others, with the faults on one side."""
    plain, other = memory_pair()
    faulty = faults.over(plain)
    sender, receiver = (faulty, other) if direction == "send" else (other, faulty)

    async def send() -> bool:
        view = memoryview(data)
        try:
            while view.nbytes:
                cut = rng.randint(1, 300)
                await sender.send([view[: cut // 2], view[cut // 2 : cut]])
                view = view[cut:]
            await sender.send_eof()
        except TransportError:
            return True
        return False

    async def receive() -> tuple[bytes, bool]:
        got, buffer = bytearray(), memoryview(bytearray(400))
        try:
            while count := await receiver.receive_into(buffer[: rng.randint(1, 400)]):
                got += buffer[:count]
        except TransportError:
            return bytes(got), True
        finally:
            await receiver.aclose()
        return bytes(got), False

    broke, (got, lost) = await asyncio.gather(send(), receive())
    await sender.aclose()
    return got, broke if direction == "send" else lost


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    nbytes=st.integers(1, 6000),
    direction=st.sampled_from(["send", "receive"]),
    every=st.dictionaries(st.sampled_from(["flip", "drop", "stall", "reset", "end"]), st.floats(20, 3000), max_size=3),
    piece=st.sampled_from([None, 1, 100]),
)
def test_faults_strike_where_the_seed_says(
    seed: int, nbytes: int, direction: Direction, every: dict[Any, float], piece: int | None
) -> None:
    """Sizes of reads and writes, and pieces, change nothing."""
    data = Random(seed).randbytes(nbytes)
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    faults = Faults(seed, every=every, piece=piece, sleep=sleep)
    plan = list(takewhile(lambda fault: fault.at < nbytes, Faults(seed, every=every).plan(0, direction)))
    got, broke = run(pump(data, faults, direction, Random(nbytes)))
    assert (got, broke) == model(data, plan)
    struck = [fault for fault in faults.struck if fault.direction == direction and fault.at < nbytes]
    assert struck == plan[: len(struck)]
    if not every.keys() & {"reset", "end", "drop"}:
        assert struck == plan
        assert got == data or any(fault.kind == "flip" for fault in struck)
        assert len(slept) >= sum(fault.kind == "stall" for fault in struck)


def test_scripted_faults() -> None:
    data = bytes(1000)
    script = [
        Fault(kind="flip", at=0, bit=7),
        Fault(kind="flip", at=999, bit=0),
        Fault(kind="drop", at=500, nbytes=10),
        Fault(kind="flip", at=3, stream=1),
    ]
    got, broke = run(pump(data, Faults(1, script=script), "send", Random(1)))
    assert not broke
    assert got == b"\x80" + bytes(988) + b"\x01"


def test_the_limit_counts_over_all_streams() -> None:
    faults = Faults(5, every={"flip": 10}, limit=7)
    data = bytes(5000)
    for _ in range(2):
        run(pump(data, faults, "send", Random(1)))
    assert len(faults.struck) == 7
    assert run(pump(data, faults, "send", Random(1))) == (data, False)


def test_the_caller_keeps_his_bytes() -> None:
    data = os.urandom(100)
    mine = bytearray(data)

    async def main() -> None:
        a, b = memory_pair()
        faulty = Faults(3, every={"flip": 5}).over(a)
        await faulty.send([memoryview(mine)])
        await faulty.aclose()
        await b.aclose()

    run(main())
    assert mine == data


def test_both_directions_of_a_reset_stream_say_that_the_link_broke() -> None:
    async def main() -> None:
        a, b = memory_pair()
        faulty = Faults(1, script=[Fault(kind="reset", at=10)]).over(a)
        receiving = asyncio.ensure_future(faulty.receive_into(memoryview(bytearray(1))))
        with pytest.raises(TransportError, match=r"reset at byte 10 \(send\), injected"):
            await faulty.send([memoryview(bytes(20))])
        with pytest.raises(TransportError, match="injected"):
            await receiving
        await faulty.aclose()
        with pytest.raises(StreamClosedError):
            await faulty.receive_into(memoryview(bytearray(1)))
        await b.aclose()

    run(main())


def test_a_stall_ends_with_the_stream() -> None:
    async def main() -> None:
        a, b = memory_pair()
        faulty = Faults(1, script=[Fault(kind="stall", at=0)]).over(a)
        sending = asyncio.ensure_future(faulty.send([memoryview(b"x")]))
        await asyncio.sleep(0)
        await faulty.aclose()
        with pytest.raises(StreamClosedError):
            await sending
        await b.aclose()

    run(main())


def test_nonsense_is_refused() -> None:
    for bad in (
        {"every": {"explode": 5}},
        {"every": {"flip": 0}},
        {"piece": 0},
        {"drop": 0},
    ):
        with pytest.raises(ConfigError):
            Faults(1, **bad)  # type: ignore[arg-type]  # that is the point
    for fault in ({"kind": "explode", "at": 0}, {"kind": "flip", "at": -1}, {"kind": "flip", "at": 0, "bit": 8}):
        with pytest.raises(ConfigError):
            Fault(**fault)
