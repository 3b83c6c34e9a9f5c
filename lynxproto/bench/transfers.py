"""Two processes and what goes between them: this project's transfers, raw sockets, and other transfer engines.

Each contestant is a receiving and a sending function, each in a process of its own, which talk to this one in lines of
JSON. Every contestant moves the same bytes from one process's memory to the other's, again and again; the receiver
compares them once, after the clock has stopped. Processes whose turn it is not are stopped: some poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import BenchmarkError

if TYPE_CHECKING:
    from lynxproto.policy import PolicyName

__all__ = [
    "CONTESTANTS",
    "Child",
    "Contestant",
    "Running",
    "cache_arrays",
    "certificates",
    "child",
    "hear",
    "manifest",
    "missing",
    "say",
]

_HEADS: Final = 8
_DIM: Final = 128
_LAYERS: Final = 16
_TIMEOUT_S: Final = 120
_PIECE: Final = 1 << 20
#: Of ``raw+checksums``: what a core's cache holds while it is summed, then sent; and the bytes of the sums behind it.
_FRAME: Final = 1 << 20
_TOLD: Final = 20
#: Windows of a benchmark session: a fast link is not to wait for credit.
WINDOWS: Final = {"session_window": 256 << 20, "transfer_window": 128 << 20}


def manifest(nbytes: int, layers: int = _LAYERS) -> Any:
    """A cache of about ``nbytes`` bytes with the shape of a model of eight KV heads of 128."""
    from lynxproto.manifest import Identity, Manifest

    tokens = max(64, nbytes // (layers * 2 * _HEADS * _DIM * 2))
    return Manifest.for_cache(
        identity=Identity(model="benchmark"),
        dtype="bfloat16",
        layers=layers,
        kv_heads=_HEADS,
        head_dim=_DIM,
        tokens=tokens,
    )


def cache_arrays(described: Any, *, seed: int | None, policy: str = "bf16") -> dict[Any, NDArray[np.uint16]]:
    """Its arrays, or for ``seed`` None memory that is there (no page faults) and holds none of its words.

    Random words; for a ``policy`` that codes them normal ones, of channels that differ as those of a model do.
    """
    layer = described.layers[0]
    shape = (layer.kv_heads, layer.tokens, layer.key_dim)
    rng = np.random.default_rng(seed)

    def words() -> NDArray[np.uint16]:
        if seed is None:
            return np.full(shape, 0xFFFF, np.uint16)
        if policy == "bf16":
            return np.frombuffer(rng.bytes(2 * int(np.prod(shape))), np.uint16).reshape(shape).copy()
        values = rng.standard_normal(shape, np.float32)
        values *= rng.lognormal(0.0, 1.0, (layer.kv_heads, 1, layer.key_dim)).astype(np.float32)
        return np.ascontiguousarray(values.view(np.uint16)[..., 1::2])

    return {(index, part): words() for index in range(len(described.layers)) for part in ("key", "value")}


class Child:
    """A process that runs one function of this module, and the lines that it and its parent exchange."""

    def __init__(self, role: str, namespace: str | None = None, **arguments: Any) -> None:
        command = [sys.executable, "-m", "lynxproto.bench.transfers", role, json.dumps(arguments)]
        if namespace is not None:
            command = ["ip", "netns", "exec", namespace, *command]
        environment = {**os.environ, "UCX_WARN_UNUSED_ENV_VARS": "n", "UCX_TLS": "tcp,self"}
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- closed by close()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )

    def hear(self) -> Any:
        """The next line. Raises :class:`~lynxproto.errors.BenchmarkError` when the child is gone."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return json.loads(line[2:])
        self._process.wait(10)
        self._log.seek(0)
        tail = self._log.read()[-600:]
        raise BenchmarkError(f"a process of the benchmark ended with code {self._process.returncode}: {tail}")

    def say(self, message: Any) -> None:
        """Send a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def pause(self) -> None:
        """Stop it for now."""
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Let it run again."""
        self._process.send_signal(signal.SIGCONT)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self.go_on()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


@contextlib.contextmanager
def child(role: str, namespace: str | None = None, **arguments: Any) -> Iterator[Child]:
    """A child for the time of the ``with``."""
    process = Child(role, namespace, **arguments)
    try:
        yield process
    finally:
        process.close()


def say(message: Any) -> None:
    """A child speaks to its parent."""
    print("> " + json.dumps(message), flush=True)


def hear() -> Any:
    """A child listens to its parent; None once that is gone."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def certificates(folder: Path) -> dict[str, str]:
    """A certificate authority and a certificate for this machine, made by openssl: paths by name."""
    paths = {name: str(folder / f"{name}.pem") for name in ("certificate", "key")}
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "1",
        "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost",
        "-out", paths["certificate"], "-keyout", paths["key"],
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise BenchmarkError(f"cannot make certificates for tcps:// with openssl: {error}") from error
    return paths


# --- raw sockets


def _raw_receive(nbytes: int, congestion: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        if congestion:
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        words = np.full(nbytes // 2, 0xFFFF, np.uint16)
        view = words.view(np.uint8).data
        say(server.getsockname()[1])
        connection, _ = server.accept()
        while hear() == "again":
            got = 0
            while got < nbytes:
                n = connection.recv_into(view[got : got + _PIECE])
                if n == 0:
                    raise BenchmarkError("the sender hung up")
                got += n
            connection.sendall(b".")
        say(bool((words != 0xFFFF).mean() > 0.99))


def _raw_send(nbytes: int, congestion: str) -> None:
    words = np.frombuffer(np.random.default_rng(1).bytes(nbytes), np.uint8).copy()
    view = words.data
    with socket.socket() as sock:
        if congestion:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        sock.connect(("127.0.0.1", hear()))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while hear() == "again":
            started = time.perf_counter()
            sent = 0
            while sent < nbytes:
                sent += sock.send(view[sent : sent + _PIECE])
            sock.recv(1)
            say(time.perf_counter() - started)


def _summed_receive(nbytes: int) -> None:
    from lynxproto.digest import Sums

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        words = np.full(nbytes // 2, 0xFFFF, np.uint16)
        view = words.view(np.uint8).data
        say(server.getsockname()[1])
        connection, _ = server.accept()
        while hear() == "again":
            for at in range(0, nbytes, _FRAME):
                frame = view[at : at + _FRAME]
                sums, told = Sums(frame), bytearray(_TOLD)
                while sums.there < frame.nbytes:
                    select.select((connection,), (), ())
                    if sums.receive(connection.fileno()) == 0:
                        raise BenchmarkError("the sender hung up")
                connection.recv_into(told, _TOLD, socket.MSG_WAITALL)
                if bytes(told) != sums.crc.to_bytes(4, "little") + sums.digest():
                    raise BenchmarkError("the checksums differ")
            connection.sendall(b".")
        say(bool((words != 0xFFFF).mean() > 0.99))


def _summed_send(nbytes: int) -> None:
    from lynxproto.digest import checksums

    words = np.frombuffer(np.random.default_rng(1).bytes(nbytes), np.uint8).copy()
    view = words.data
    with socket.socket() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")
        sock.connect(("127.0.0.1", hear()))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while hear() == "again":
            started = time.perf_counter()
            for at in range(0, nbytes, _FRAME):
                frame = view[at : at + _FRAME]
                crc, digest = checksums(frame)
                sock.sendall(frame)
                sock.sendall(crc.to_bytes(4, "little") + digest)
            sock.recv(1)
            say(time.perf_counter() - started)


# --- this project


def _config() -> Any:
    from lynxproto.config import Config, Limits

    return Config(secret=b"only for this benchmark", limits=Limits(**WINDOWS), peer_timeout=3600.0)


def _lynx_receive(nbytes: int, url: str, tls: dict[str, str] | None, policy: str = "bf16") -> None:
    asyncio.run(_lynx_receive_all(nbytes, url, tls, policy))


async def _lynx_receive_all(nbytes: int, url: str, tls: dict[str, str] | None, policy: str) -> None:
    from lynxproto.session import listen
    from lynxproto.transports import server_context

    described = manifest(nbytes)
    arrays = cache_arrays(described, seed=None)
    context = (
        None if tls is None else server_context(certificate=tls["certificate"], key=tls["key"], ca=tls["certificate"])
    )
    async with listen(url, _config(), allocate=lambda _: arrays, tls=context, insecure=True) as receiver:
        say(receiver.url)
        while await asyncio.to_thread(hear) == "again":
            transfer = await anext(receiver)
            await transfer.exact()
    expected = cache_arrays(described, seed=1, policy=policy)
    say(all(np.array_equal(arrays[key], expected[key]) for key in arrays))


def _lynx_send(nbytes: int, url: str, tls: dict[str, str] | None, policy: PolicyName = "bf16") -> None:
    from lynxproto import blocking
    from lynxproto.cachefile import Cache
    from lynxproto.policy import Policy
    from lynxproto.transports import client_context

    described = manifest(nbytes)
    cache = Cache(manifest=described, arrays=cache_arrays(described, seed=1, policy=policy))
    context = (
        None if tls is None else client_context(ca=tls["certificate"], certificate=tls["certificate"], key=tls["key"])
    )
    with blocking.connect(hear(), _config(), policy=Policy.named(policy), tls=context, insecure=True) as sender:
        while hear() == "again":
            started = time.perf_counter()
            sender.open(described).send(cache)
            say(time.perf_counter() - started)


# --- Mooncake's Transfer Engine and NIXL: one-sided writes into registered memory


def _mooncake(nbytes: int) -> tuple[Any, NDArray[np.uint8], str]:
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise BenchmarkError("Mooncake's engine did not start")
    memory = np.zeros(nbytes, np.uint8)
    memory[:] = 1
    if engine.register_memory(memory.ctypes.data, nbytes) != 0:
        raise BenchmarkError("Mooncake's engine did not register memory")
    return engine, memory, f"127.0.0.1:{engine.get_rpc_port()}"


def _mooncake_receive(nbytes: int) -> None:
    _engine, memory, session = _mooncake(nbytes)
    say([session, memory.ctypes.data])
    while hear() == "again":
        pass
    say(bool((memory != 1).mean() > 0.9))


def _mooncake_send(nbytes: int) -> None:
    engine, memory, _ = _mooncake(nbytes)
    memory[:] = np.frombuffer(np.random.default_rng(1).bytes(nbytes), np.uint8)
    session, address = hear()
    while hear() == "again":
        started = time.perf_counter()
        if engine.transfer_sync_write(session, memory.ctypes.data, address, nbytes) != 0:
            raise BenchmarkError("Mooncake's transfer failed")
        say(time.perf_counter() - started)


def _nixl(name: str, nbytes: int) -> tuple[Any, NDArray[np.uint8], Any]:
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    memory = np.zeros(nbytes, np.uint8)
    memory[:] = 1
    piece = 8 << 20
    spans = [(memory.ctypes.data + at, min(piece, nbytes - at), 0, "") for at in range(0, nbytes, piece)]
    agent.register_memory([(memory.ctypes.data, nbytes, 0, "")], "DRAM")
    return agent, memory, agent.get_xfer_descs([span[:3] for span in spans], "DRAM")


def _nixl_receive(nbytes: int) -> None:
    agent, memory, descriptions = _nixl("receiver", nbytes)
    say([agent.get_agent_metadata().hex(), agent.get_serialized_descs(descriptions).hex()])
    while hear() == "again":
        while not agent.get_new_notifs():
            time.sleep(0)
    say(bool((memory != 1).mean() > 0.9))


def _nixl_send(nbytes: int) -> None:
    agent, memory, mine = _nixl("sender", nbytes)
    memory[:] = np.frombuffer(np.random.default_rng(1).bytes(nbytes), np.uint8)
    metadata, descriptions = (bytes.fromhex(text) for text in hear())
    name = agent.add_remote_agent(metadata)
    theirs = agent.deserialize_descs(descriptions)
    while hear() == "again":
        handle = agent.initialize_xfer("WRITE", mine, theirs, name, b"done")
        started = time.perf_counter()
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        if state != "DONE":
            raise BenchmarkError(f"NIXL's transfer ended as {state}")
        say(time.perf_counter() - started)
        agent.release_xfer_handle(handle)


# --- who there is


@dataclass(frozen=True, slots=True)
class Contestant:
    """``kind`` names the functions of its two processes; ``peer`` tells other people's from this project's."""

    name: str
    kind: str
    peer: bool
    package: str
    """The distribution whose version is reported; "" for the standard library."""
    what: str
    scheme: str = ""
    """Of this project's: of its URL."""
    policy: PolicyName = "bf16"
    """Of this project's: of its sender."""

    @property
    def version(self) -> str:
        """Its version. Raises :class:`importlib.metadata.PackageNotFoundError` if it is not installed."""
        return importlib.metadata.version(self.package) if self.package else sys.version.split()[0]


_RAW = "socket.send and recv_into, 1 MiB a call, no checksums"
_LYNX = "policy bf16, CRC32C of frames, xxh3-128 of tiles"
CONTESTANTS: Final = (
    Contestant("raw", "raw", True, "", f"{_RAW}, the system's congestion control"),
    Contestant("raw-reno", "raw", True, "", f"{_RAW}, reno, as tcp:// on loopback"),
    Contestant(
        "raw+checksums", "summed", True, "", "raw-reno, with the checksums of lynxproto in the same native calls"
    ),
    Contestant("tcp", "lynx", False, "lynxproto", _LYNX, "tcp"),
    Contestant(
        "tcp-coded",
        "lynx",
        False,
        "lynxproto",
        "policy lynx, coded and decoded on the way; GB/s of words",
        "tcp",
        "lynx",
    ),
    Contestant("tcps", "lynx", False, "lynxproto", f"{_LYNX}, TLS 1.3", "tcps"),
    Contestant("unix", "lynx", False, "lynxproto", _LYNX, "unix"),
    Contestant("ucx", "lynx", False, "lynxproto", f"{_LYNX}, UCX chooses the device (UCX_TLS)", "ucx"),
    Contestant("mooncake-tcp", "mooncake", True, "mooncake-transfer-engine-non-cuda", "one write, no checksums"),
    Contestant("nixl-ucx-tcp", "nixl", True, "nixl-cu12", "8 MiB descriptors, no checksums"),
)


def missing(contestant: Contestant) -> str | None:
    """Why it cannot run here; None if it can."""
    if contestant.package and not list(importlib.metadata.distributions(name=contestant.package)):
        return f"not installed (pip install {contestant.package})"
    if contestant.scheme == "ucx":
        return None if importlib.util.find_spec("ucxx") else "not installed (pip install 'lynxproto[ucx]')"
    module = {"mooncake": "mooncake.engine", "nixl": "nixl_cu12._api"}.get(contestant.kind)
    if module is None:
        return None
    tried = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True, check=False)
    if tried.returncode == 0:
        return None
    reason = tried.stderr.strip().splitlines()[-1:] or ["it cannot be imported"]
    return f"{reason[0]} (it needs Debian's libibverbs1, librdmacm1 and libnuma1)"


class Running:
    """A contestant's two processes, stopped until their turn."""

    def __init__(self, kind: str, **arguments: Any) -> None:
        self.receiver = Child(f"{kind}-receive", **arguments)
        self.sender = Child(f"{kind}-send", **arguments)
        self.sender.say(self.receiver.hear())

    def turn(self) -> float:
        """One transfer; its seconds."""
        self.receiver.say("again")
        self.sender.say("again")
        seconds: float = self.sender.hear()
        return seconds

    def pause(self) -> None:
        """Stop both."""
        self.sender.pause()
        self.receiver.pause()

    def go_on(self) -> None:
        """Let both run."""
        self.receiver.go_on()
        self.sender.go_on()

    def same(self) -> bool:
        """Whether the receiver holds what was sent; ends it."""
        self.receiver.say("stop")
        return self.receiver.hear() is True

    def close(self) -> None:
        """End both."""
        self.sender.close()
        self.receiver.close()


_ROLES: Final[dict[str, Callable[..., None]]] = {
    "raw-receive": _raw_receive,
    "raw-send": _raw_send,
    "summed-receive": _summed_receive,
    "summed-send": _summed_send,
    "lynx-receive": _lynx_receive,
    "lynx-send": _lynx_send,
    "mooncake-receive": _mooncake_receive,
    "mooncake-send": _mooncake_send,
    "nixl-receive": _nixl_receive,
    "nixl-send": _nixl_send,
}

if __name__ == "__main__":
    from lynxproto.bench import loads, priority

    {**_ROLES, **loads.ROLES, **priority.ROLES}[sys.argv[1]](**json.loads(sys.argv[2]))
