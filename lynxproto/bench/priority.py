"""Whether priorities hold on a link that is full: anchors of new requests under residual load, on a shaped link.

As root the link is a veth pair between two network namespaces with ``tc tbf`` (1 Gbit/s, 256 kB burst, 50 ms of queue),
which is what a router with a deep buffer does to a sender that fills it; else a token bucket inside the sender.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np

from lynxproto.bench.transfers import Child, hear, say
from lynxproto.errors import BenchmarkError, ConfigError

__all__ = ["ROLES", "measure", "show"]

_SPACES: Final = ("lynx-bench-a", "lynx-bench-b")
_HOSTS: Final = ("10.77.0.1", "10.77.0.2")
_BURST: Final = 256 << 10
_PROBE_BYTES: Final = 4 << 20  # a quarter of what the demo's small model has for 4,096 tokens
_REQUEST_BYTES: Final = 2 << 20
_LOADS: Final = (1, 8, 64)
_BLOCK: Final = 10  # probes between an idle link and a full one
_LOAD_BYTES: Final = 256 << 20
_RAW_BYTES: Final = 64 << 20
#: A body of three levels, cheap to encode: what waits is the link, not the codec.
_BODY: Final = {"id": "bitplane", "planes": [3, 5, 8]}
_SECRET: Final = b"only for this benchmark"


# --- the link


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"{' '.join(command)}: {done.stderr.strip()}")


@contextlib.contextmanager
def _namespaces(rate: str, congestion: str | None) -> Iterator[None]:
    """Two hosts and a link between them; what the first sends is shaped."""
    _remove()
    try:
        for space in _SPACES:
            _run("ip", "netns", "add", space)
        _run("ip", "link", "add", "lynx0", "netns", _SPACES[0], "type", "veth", "peer", "lynx1", "netns", _SPACES[1])
        for space, host, device in zip(_SPACES, _HOSTS, ("lynx0", "lynx1"), strict=True):
            _run("ip", "-n", space, "address", "add", f"{host}/24", "dev", device)
            _run("ip", "-n", space, "link", "set", device, "up")
            _run("ip", "-n", space, "link", "set", "lo", "up")
            if congestion is not None:
                command = ("sysctl", "-q", "-w", f"net.ipv4.tcp_congestion_control={congestion}")
                _run("ip", "netns", "exec", space, *command)
        shape = ("tbf", "rate", f"{rate.lower()}bit", "burst", str(_BURST), "latency", "50ms")
        _run("ip", "netns", "exec", _SPACES[0], "tc", "qdisc", "add", "dev", "lynx0", "root", *shape)
        yield
    finally:
        _remove()


def _remove() -> None:
    for space in _SPACES:
        subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)


# --- what is measured


def measure(
    rate: str, shaper: str, samples: int, stripes: int, note: Callable[[str], None], *, congestion: str | None
) -> Any:
    """The ``priority`` of the report. ``samples``: probes on an idle link, and as many for each number of transfers."""
    from lynxproto.commands.options import BitRate

    bits = BitRate().convert(rate, None, None)
    able = os.geteuid() == 0 and shutil.which("ip") is not None and shutil.which("tc") is not None
    if shaper == "tbf" and not able:
        raise ConfigError("--shaper tbf needs root, and ip and tc (iproute2)")
    real = able and shaper != "bucket"
    with _namespaces(rate, congestion) if real else contextlib.nullcontext():
        spaces = _SPACES if real else (None, None)
        host = _HOSTS[1] if real else "127.0.0.1"
        raw = _raw_speed(spaces, host) if real else bits / 8
        receiver = Child("priority-receive", spaces[1], host=host)
        sender = Child("priority-send", spaces[0], bits=None if real else bits, samples=samples, stripes=stripes)
        try:
            sender.say(receiver.hear())
            loads = [_load(sender, receiver, count, raw, note) for count in _LOADS]
            note("requests at 80 % load")
            arrivals = _arrivals(sender, receiver)
        finally:
            sender.close()
            receiver.close()
    idle = [value for load in loads for value in load["idle_s"]]
    loaded = [value for load in loads for value in load["loaded_s"]]
    chunk = (1 << 20) * 8 // 16 / raw
    return {
        "idle_p99_s": _p99(idle),
        "loaded_p99_s": _p99(loaded),
        "goodput_cost": max(load["goodput_cost"] for load in loads),
        "allowed_p99_s": 1.15 * _p99(idle) + chunk,
        "chunk_s": chunk,
        "probe_bytes": _PROBE_BYTES,
        "link": f"{rate}bit/s, {'veth and tc tbf, 256 KiB burst, 50 ms' if real else 'token bucket'}",
        "congestion_control": congestion,
        "stripes": stripes,
        "raw_goodput_bytes_per_s": raw,
        "loads": [{k: v for k, v in load.items() if k not in ("idle_s", "loaded_s")} for load in loads],
        "arrivals": arrivals,
        "latencies_s": {"idle": idle} | {f"beside {load['transfers']}": load["loaded_s"] for load in loads},
    }


def _p99(values: Sequence[float]) -> float:
    return float(np.quantile(values, 0.99))


def _load(sender: Child, receiver: Child, count: int, raw: float, note: Callable[[str], None]) -> dict[str, Any]:
    idle: list[float] = []
    loaded: list[float] = []
    speeds, shares, stops = [], [], []
    sender.say({"do": "load", "transfers": count})
    while (message := sender.hear())["what"] != "end":
        if message["what"] == "probe":
            arrived = receiver.hear()
            if arrived["id"] != message["id"]:
                raise BenchmarkError(f"the receiver has {arrived['id']}, not {message['id']}")
            (loaded if message["loaded"] else idle).append(arrived["at"] - message["at"])
            note(f"{count} transfers: {len(loaded)} probes under load")
        else:
            speeds.append(message["bytes"] / message["seconds"])
            shares.append(message["jain"])
            stops.append(message["bytes_after_cancel"])
    return {
        "transfers": count,
        "samples": len(loaded),
        "idle_s": idle,
        "loaded_s": loaded,
        "idle_p50_s": float(np.median(idle)),
        "idle_p99_s": _p99(idle),
        "loaded_p50_s": float(np.median(loaded)),
        "loaded_p99_s": _p99(loaded),
        "goodput_bytes_per_s": float(np.median(speeds)),
        "goodput_cost": 1 - float(np.median(speeds)) / raw,
        "jain": shares[0],
        "bytes_after_cancel": max(stops),
    }


def _arrivals(sender: Child, receiver: Child) -> dict[str, Any]:
    """Requests at random times, together 80 % of the link: each from its opening until it is verified."""
    sender.say({"do": "arrivals", "load": 0.8})
    begun, done = {}, {}
    while (message := sender.hear())["what"] != "end":
        begun[message["id"]] = message["at"]
        arrived = receiver.hear()
        done[arrived["id"]] = arrived["at"]
    seconds = [done[name] - begun[name] for name in begun]
    return {"requests": len(seconds), "p50_s": float(np.median(seconds)), "p99_s": _p99(seconds), "max_s": max(seconds)}


def _raw_speed(spaces: Sequence[str | None], host: str) -> float:
    """Bytes a second of one raw TCP connection over the link."""
    receiver = Child("raw-sink", spaces[1], host=host)
    sender = Child("raw-source", spaces[0])
    try:
        sender.say([host, receiver.hear()])
        return float(np.median([receiver.hear() for _ in range(3)]))
    finally:
        sender.close()
        receiver.close()


def _raw_sink(host: str) -> None:
    buffer = bytearray(1 << 20)
    with socket.create_server((host, 0)) as server:
        say(server.getsockname()[1])
        connection, _ = server.accept()
        for _ in range(3):
            got, started = connection.recv_into(buffer), time.monotonic()
            while got < _RAW_BYTES:
                got += connection.recv_into(buffer, min(len(buffer), _RAW_BYTES - got))
            say(_RAW_BYTES / (time.monotonic() - started))


def _raw_source() -> None:
    host, port = hear()
    with socket.create_connection((host, port)) as sock:
        for _ in range(3):
            sock.sendall(bytes(_RAW_BYTES))
        hear()


# --- the two processes


def _manifest(nbytes: int, name: str) -> Any:
    from lynxproto.manifest import Identity, Manifest

    return Manifest.for_cache(
        identity=Identity(model="benchmark"),
        dtype="bfloat16",
        layers=4,
        kv_heads=8,
        head_dim=128,
        tokens=nbytes // (4 * 2 * 8 * 128 * 2),
        request_id=name,
    )


def _config() -> Any:
    from lynxproto.config import Config, Limits

    return Config(secret=_SECRET, limits=Limits(transfers=1024))


async def _receive(host: str) -> None:
    from lynxproto._options import allocate_arrays
    from lynxproto.errors import LynxError
    from lynxproto.session import listen

    tasks = set()

    async def watch(transfer: Any) -> None:
        name = transfer.manifest.request_id
        with contextlib.suppress(LynxError):  # the load is cancelled
            await transfer.exact()
            if not name.startswith("load"):
                say({"id": name, "at": time.monotonic()})

    async with listen(f"tcp://{host}:0", _config(), allocate=allocate_arrays, insecure=True) as receiver:
        say(receiver.url)
        async for transfer in receiver:
            task = asyncio.create_task(watch(transfer))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


class _Sender:
    def __init__(self, session: Any, samples: int) -> None:
        from lynxproto.policy import Policy

        self.session = session
        self.samples = samples
        self.count = 0
        self.anchors = Policy.named("bf16")  # words as they are, in class 0: an anchor and nothing else
        self.whole = Policy(body=dict(_BODY), sinks=0, recent=0)
        self.memory: dict[int, Any] = {}

    def layer(self, described: Any) -> list[Any]:
        """Arrays for any layer."""
        tokens = described.layers[0].tokens
        if tokens not in self.memory:
            words = np.random.default_rng(tokens).integers(0, 1 << 16, (2, 8, tokens, 128), np.uint16)
            self.memory[tokens] = list(words)
        return list(self.memory[tokens])

    async def send(self, name: str, nbytes: int, policy: Any) -> Any:
        described = _manifest(nbytes, name)
        arrays = self.layer(described)
        transfer = self.session.open(described, policy)
        for layer in described.layers:
            await transfer.write(layer.index, *arrays)
        return transfer

    async def probe(self, *, loaded: bool) -> None:
        self.count += 1
        name = f"probe {self.count}"
        self.layer(_manifest(_PROBE_BYTES, name))
        at = time.monotonic()
        transfer = await self.send(name, _PROBE_BYTES, self.anchors)
        await transfer.finish()
        say({"what": "probe", "id": name, "at": at, "loaded": loaded})

    async def load(self, transfers: int) -> None:
        done, fairness = 0, None
        while done < self.samples:
            for _ in range(_BLOCK):
                await self.probe(loaded=False)
            load = [await self.send(f"load {i}", _LOAD_BYTES // transfers, self.whole) for i in range(transfers)]
            for transfer in load:
                await transfer.accepted()
            while sum(_sent(transfer, 1) for transfer in load) < _LOAD_BYTES // 8:
                await asyncio.sleep(1e-3)  # until residuals flow, and memory is there
            before = [_sent(transfer, None) for transfer in load]
            probed, started = done, time.monotonic()
            for _ in range(_BLOCK):
                await self.probe(loaded=True)
                done += 1
            seconds = time.monotonic() - started
            moved = [_sent(t, None) - b for t, b in zip(load, before, strict=True)]
            if fairness is None:
                fairness = await self._fairness(load, before)
            if any(transfer.released.is_set() for transfer in load):
                raise BenchmarkError("the load ended before the probes; use a slower link")
            total = self.session_bytes()
            await asyncio.gather(*(transfer.cancel() for transfer in load))
            after = self.session_bytes() - total
            say(
                {
                    "what": "block",
                    "bytes": sum(moved) + (done - probed) * _PROBE_BYTES,
                    "seconds": seconds,
                    "jain": fairness,
                    "bytes_after_cancel": after,
                }
            )
            await asyncio.sleep(0.05)  # the link runs dry
        say({"what": "end"})

    async def _fairness(self, load: Sequence[Any], before: Sequence[int]) -> float:
        """Jain's index of the residual bytes of transfers that share the link, once each may have several frames."""
        while True:
            shares = np.array([_sent(t, None) - b for t, b in zip(load, before, strict=True)], float)
            if shares.sum() >= _LOAD_BYTES // 4:
                return float(shares.sum() ** 2 / (len(shares) * (shares**2).sum()))
            await asyncio.sleep(1e-3)

    def session_bytes(self) -> int:
        """Bytes that the session handed to the kernel."""
        return int(self.session._endpoint.peer.bytes_sent)

    async def arrivals(self, load: float, bytes_per_s: float) -> None:
        rng = np.random.default_rng(5)
        running = set()

        async def one(name: str, nbytes: int) -> None:
            at = time.monotonic()
            transfer = await self.send(name, nbytes, self.whole)
            await transfer.finish()
            say({"what": "request", "id": name, "at": at})

        for i in range(self.samples):
            task = asyncio.create_task(one(f"request {i}", _REQUEST_BYTES))
            running.add(task)
            task.add_done_callback(running.discard)
            await asyncio.sleep(rng.exponential(_REQUEST_BYTES / (load * bytes_per_s)))
        await asyncio.gather(*running)
        say({"what": "end"})


def _sent(transfer: Any, level: int | None) -> int:
    """Bytes of a level and those above it; None: of all."""
    levels = transfer.stats.levels.items()
    return sum(stats.bytes for number, stats in levels if level is None or number >= level)


async def _send(bits: float | None, samples: int, stripes: int) -> None:
    from lynxproto.session import connect
    from lynxproto.transports import TokenBucket

    link = None if bits is None else TokenBucket(bits, _BURST)
    async with connect(hear(), _config(), link=link, insecure=True, stripes=stripes) as session:
        sender = _Sender(session, samples)
        while (order := await asyncio.to_thread(hear)) is not None:
            if order["do"] == "load":
                await sender.load(order["transfers"])
            else:
                await sender.arrivals(order["load"], (bits or 1e9) / 8)


ROLES: Final[dict[str, Any]] = {
    "priority-receive": lambda **arguments: asyncio.run(_receive(**arguments)),
    "priority-send": lambda **arguments: asyncio.run(_send(**arguments)),
    "raw-sink": _raw_sink,
    "raw-source": _raw_source,
}


def show(result: dict[str, Any], console: Any) -> None:
    """Print it."""
    from rich.table import Table

    title = (
        f"anchor latency of a new request of {_PROBE_BYTES >> 20} MiB beside other transfers, ms; {result['link']}; "
    )
    title += f"stripes: {result['stripes']}"
    table = Table(title=title)
    for heading in (
        "beside",
        "idle p50",
        "idle p99",
        "loaded p50",
        "loaded p99",
        "goodput cost",
        "Jain",
        "after cancel",
    ):
        table.add_column(heading, justify="right")
    for load in result["loads"]:
        times = (load[key] * 1e3 for key in ("idle_p50_s", "idle_p99_s", "loaded_p50_s", "loaded_p99_s"))
        table.add_row(
            str(load["transfers"]),
            *(f"{value:.1f}" for value in times),
            f"{load['goodput_cost']:.1%}",
            f"{load['jain']:.3f}",
            f"{load['bytes_after_cancel'] / 1024:.0f} KiB",
        )
    console.print(table)
    arrivals = result["arrivals"]
    console.print(
        f"p99 under load {1e3 * result['loaded_p99_s']:.1f} ms, allowed {1e3 * result['allowed_p99_s']:.1f} ms (1.15 "
        f"times idle, and a chunk); at 80 % load p99 to verified {1e3 * arrivals['p99_s']:.0f} ms, "
        f"longest {1e3 * arrivals['max_s']:.0f} ms"
    )
