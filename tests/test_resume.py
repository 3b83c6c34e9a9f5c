"""Transfers that go on after the sender, the receiver or both were restarted: sessions, and what a receiver keeps."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_session import Proxy, assert_same, connect, first, listen, make_cache, run, slow

from lynxproto.cachefile import load_cache, save_cache
from lynxproto.codecs import get_codec
from lynxproto.config import Config
from lynxproto.errors import StateError, TransferCancelledError
from lynxproto.policy import Policy
from lynxproto.spool import ResumeSecrets, StateFolder, transfer_name

QUICK = Config(retry_interval=0.01, retry_limit=0.05)
CACHE = make_cache(layers=4, tokens=600)
SMALL = Policy(tile_bytes=8192)
RAW = Policy(body={"id": "raw"}, sinks=0, recent=0, tile_bytes=8192)
#: Chunks that are on their way, or being decoded, when a process dies.
UNDER_WAY = 24


class Mortal(Proxy):
    """A proxy whose streams can be made to carry nothing more, as those of a killed process."""

    def __init__(self, target: str) -> None:
        self.dead = 0
        super().__init__(target, lambda number, way, offset, data: None if number <= self.dead else data)

    def kill(self) -> None:
        self.dead = 1 << 30

    def go_on(self, target: str = "") -> None:
        self.dead = self.streams
        self.target = target or self.target


async def received(incoming: Any, chunks: float) -> int:
    while incoming.stats.chunks < chunks:
        await asyncio.sleep(0.005)
    return incoming.stats.chunks


def total_chunks(policy: Policy) -> int:
    return sum(
        get_codec(policy.codecs[tile.codec]).levels
        for layer in CACHE.manifest.layers
        for tile in policy.tiles(CACHE.manifest.dtype, layer)
    )


@pytest.mark.parametrize("policy", [SMALL, RAW], ids=["hq", "raw"])
@pytest.mark.parametrize("who", ["receiver", "sender", "both"])
def test_goes_on_where_it_was(tmp_path: Path, who: str, policy: Policy) -> None:
    key, total = secrets.token_bytes(32), total_chunks(policy)

    async def main() -> None:
        receiver = await listen("tcp://127.0.0.1:0", QUICK, state=tmp_path).__aenter__()
        proxy = Mortal(receiver.url)
        async with proxy as url:
            sender = await connect(url, QUICK, policy=policy, link=slow(0.2, CACHE)).__aenter__()
            sending = asyncio.ensure_future(sender.open(CACHE.manifest, resume=key).send(CACHE))
            incoming = await first(receiver)
            had = await received(incoming, total * 0.4)
            proxy.kill()
            if who != "sender":
                await receiver.aclose()
                receiver = await listen("tcp://127.0.0.1:0", QUICK, state=tmp_path).__aenter__()
            if who != "receiver":
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
                await sender.aclose()
            proxy.go_on(receiver.url)
            if who != "receiver":
                sender = await connect(url, QUICK, policy=policy).__aenter__()
                sending = asyncio.ensure_future(sender.open(CACHE.manifest, resume=key).send(CACHE))
            if who != "sender":
                incoming = await first(receiver)
            await asyncio.gather(incoming.exact(), sending)
            assert_same(incoming.arrays, CACHE)
            assert incoming.state_error is None
            assert (await incoming.result()).first_token == 42
            sent_again = incoming.stats.chunks - total + (0 if who == "sender" else had)
            assert sent_again <= UNDER_WAY
            await sender.aclose()
            await receiver.aclose()
        assert not list(tmp_path.iterdir())

    run(main)


def test_a_sender_that_comes_back_needs_no_state_folder() -> None:
    """The receiver's process has lived on: its arrays and decoders are as they were."""
    key = secrets.token_bytes(32)

    async def main() -> None:
        async with listen("tcp://127.0.0.1:0", QUICK) as receiver:
            proxy = Mortal(receiver.url)
            async with proxy as url:
                sender = await connect(url, QUICK, policy=SMALL, link=slow(0.2, CACHE)).__aenter__()
                outgoing = sender.open(CACHE.manifest, resume=key)
                await outgoing.write(0, CACHE.arrays[0, "key"], CACHE.arrays[0, "value"])
                incoming = await first(receiver)
                await incoming.ready(level=2, layer=0)
                proxy.kill()
                await sender.aclose()
                proxy.go_on()
                async with connect(url, QUICK, policy=SMALL) as again:
                    outgoing = again.open(CACHE.manifest, resume=key)
                    await asyncio.gather(outgoing.send(CACHE), incoming.exact())
                    assert_same(incoming.arrays, CACHE)
                    assert incoming.id == outgoing.id
                    assert incoming.stats.chunks == total_chunks(SMALL)

    run(main)


def test_who_is_cut_off_by_its_own_successor_is_told() -> None:
    """Two processes send the same: the receiver goes on with the one that came last."""
    key = secrets.token_bytes(32)

    async def main() -> None:
        async with (
            listen("tcp://127.0.0.1:0", QUICK) as receiver,
            connect(receiver.url, QUICK, policy=SMALL, link=slow(0.5, CACHE)) as sender,
            connect(receiver.url, QUICK, policy=SMALL) as successor,
        ):
            sending = asyncio.ensure_future(sender.open(CACHE.manifest, resume=key).send(CACHE))
            incoming = await first(receiver)
            await received(incoming, 20)
            await asyncio.gather(successor.open(CACHE.manifest, resume=key).send(CACHE), incoming.exact())
            assert_same(incoming.arrays, CACHE)
            with pytest.raises(TransferCancelledError, match="goes on in another session"):
                await sending

    run(main)


def test_other_words_under_the_same_secret_are_found_by_their_digests(tmp_path: Path) -> None:
    key = secrets.token_bytes(32)
    other = make_cache(layers=4, tokens=600)
    for words in other.arrays.values():
        words ^= 0x0101

    async def main() -> None:
        receiver = await listen("tcp://127.0.0.1:0", QUICK, state=tmp_path).__aenter__()
        proxy = Mortal(receiver.url)
        async with proxy as url:
            async with connect(url, QUICK, policy=SMALL, link=slow(0.2, CACHE)) as sender:
                sending = asyncio.ensure_future(sender.open(CACHE.manifest, resume=key).send(CACHE))
                await received(await first(receiver), 60)
                proxy.kill()
                await receiver.aclose()
                sending.cancel()
            async with listen("tcp://127.0.0.1:0", QUICK, state=tmp_path) as receiver:
                proxy.go_on(receiver.url)
                async with connect(url, QUICK, policy=SMALL) as sender:
                    sending = asyncio.ensure_future(sender.open(other.manifest, resume=key).send(other))
                    incoming = await first(receiver)
                    await asyncio.gather(incoming.exact(), sending)
                    assert_same(incoming.arrays, other)

    run(main)


@pytest.mark.parametrize("end", ["cancel", "refuse to go on", "close"])
def test_what_is_kept_goes_with_the_transfer_and_stays_with_the_session(tmp_path: Path, end: str) -> None:
    async def main() -> None:
        async with (
            listen("tcp://127.0.0.1:0", QUICK, state=tmp_path) as receiver,
            connect(receiver.url, QUICK, policy=SMALL, link=slow(0.5, CACHE)) as sender,
        ):
            outgoing = sender.open(CACHE.manifest)
            sending = asyncio.ensure_future(outgoing.send(CACHE))
            incoming = await first(receiver)
            await received(incoming, 10)
            assert len(list(tmp_path.iterdir())) == 1
            if end == "cancel":
                await outgoing.cancel()
            elif end == "refuse to go on":
                await incoming.cancel()
            else:
                await sender.aclose()
            await asyncio.gather(sending, return_exceptions=True)
            await incoming.released.wait()
            assert len(list(tmp_path.iterdir())) == (end == "close")

    run(main)


def test_a_full_folder_is_named_and_costs_no_transfer(tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            listen("memory://resume-full", QUICK, state=StateFolder(tmp_path, max_bytes=50_000)) as receiver,
            connect(receiver.url, QUICK, policy=SMALL) as sender,
        ):
            _, incoming = await asyncio.gather(sender.open(CACHE.manifest).send(CACHE), first(receiver))
            await incoming.exact()
            assert_same(incoming.arrays, CACHE)
            assert isinstance(incoming.state_error, StateError)
            assert "max_bytes" in str(incoming.state_error)

    run(main)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_named_and_costs_no_transfer(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("this sandbox may not mount")

    async def main() -> None:
        async with (
            listen("memory://resume-disk", QUICK, state=tmp_path) as receiver,
            connect(receiver.url, QUICK, policy=SMALL) as sender,
        ):
            _, incoming = await asyncio.gather(sender.open(CACHE.manifest).send(CACHE), first(receiver))
            await incoming.exact()
            assert_same(incoming.arrays, CACHE)
            assert "no space left" in str(incoming.state_error).lower()

    try:
        run(main)
        assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"cannot use the state folder .*file"):
        listen("memory://resume-unusable", state=tmp_path / "file")


# --- what is kept


def spooled(tmp_path: Path) -> tuple[StateFolder, str, bytes]:
    """The folder, the name and the bytes of what a receiver had kept when its sender went away."""
    key = secrets.token_bytes(32)

    async def main() -> None:
        async with (
            listen("memory://resume-spool", QUICK, state=tmp_path) as receiver,
            connect(receiver.url, QUICK, policy=SMALL) as sender,
        ):
            outgoing = sender.open(CACHE.manifest, resume=key)
            await outgoing.write(0, CACHE.arrays[0, "key"], CACHE.arrays[0, "value"])
            await outgoing.write(1, CACHE.arrays[1, "key"], CACHE.arrays[1, "value"])
            incoming = await first(receiver)
            await incoming.ready(level=7, layer=0)
            await incoming.ready(level=7, layer=1)

    run(main)
    (path,) = tmp_path.iterdir()
    return StateFolder(tmp_path), path.name.removesuffix(".spool"), path.read_bytes()


def test_a_spool_cut_anywhere_tells_nothing_but_the_truth(tmp_path: Path) -> None:
    folder, name, data = spooled(tmp_path)
    path = tmp_path / f"{name}.spool"
    spool = folder.open(name)
    whole = {layer.layer: layer for layer in spool.held()}
    spool.close()
    assert {0, 1} == set(whole)
    assert all(levels for layer in whole.values() for levels in layer.levels)
    before = -1
    for size in [*range(0, len(data), 997), *range(max(0, len(data) - 200), len(data) + 1)]:
        path.write_bytes(data[:size])
        spool = folder.open(name)
        held = sum(sum(layer.levels) for layer in spool.held())
        assert held >= before
        before = held
        for layer in spool.held():
            assert layer.plan == whole[layer.layer].plan
            assert all(mine <= all_ for mine, all_ in zip(layer.levels, whole[layer.layer].levels, strict=True))
        spool.close()
        assert path.stat().st_size <= size
    assert held == sum(sum(layer.levels) for layer in whole.values())


def test_a_spool_damaged_anywhere_ends_there(tmp_path: Path) -> None:
    folder, name, data = spooled(tmp_path)
    path = tmp_path / f"{name}.spool"
    for at in range(0, len(data), 1499):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        spool = folder.open(name)
        spool.close()
        assert path.stat().st_size <= at
    path.write_bytes(b"\0" * 10_000)  # blocks that the disk never got
    spool = folder.open(name)
    assert spool.held() == []
    spool.close()


def test_a_spool_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    spool = folder.open("a")
    with pytest.raises(StateError, match="another process"):
        folder.open("a")
    spool.discard()
    folder.open("a").discard()
    assert not list(tmp_path.iterdir())


def test_names_tell_principals_secrets_and_manifests_apart() -> None:
    manifest, key = CACHE.manifest, bytes(32)
    names = {
        transfer_name("", key, manifest),
        transfer_name("alice", key, manifest),
        transfer_name("", bytes(31) + b"1", manifest),
        transfer_name("", key, make_cache(layers=3).manifest),
    }
    assert len(names) == 4
    assert all(key.hex() not in name for name in names)


def test_old_spools_go(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path)
    folder.open("old").close()
    folder.open("new").close()
    os.utime(tmp_path / "old.spool", (0, 0))
    StateFolder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["new.spool"]


# --- commands


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    line = [sys.executable, "-m", "lynxproto", *arguments, "--insecure", "--json"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_bytes(folder: Path, nbytes: int) -> None:
    """Until the receiver has kept so much."""
    for _ in range(2000):
        if sum(path.stat().st_size for path in folder.glob("*.spool")) > nbytes:
            return
        time.sleep(0.005)
    raise AssertionError("nothing was kept")


@pytest.mark.parametrize("who", ["send", "recv"])
def test_commands_that_are_killed_go_on_when_they_are_given_again(tmp_path: Path, who: str) -> None:
    save_cache(tmp_path / "cache", CACHE)
    url, state, secret = f"unix://{tmp_path}/socket", tmp_path / "state", tmp_path / "secrets"
    recv = ("recv", url, "-o", str(tmp_path / "out"), "--state", str(state))
    send = ("send", str(tmp_path / "cache"), url, "--state", str(secret))
    with ExitStack() as stack:
        receiver = stack.enter_context(command(*recv))
        assert receiver.stderr is not None
        assert receiver.stderr.readline().startswith("listening")
        sender = stack.enter_context(command(*send, "--link", "8M"))
        wait_for_bytes(state, 200_000)
        if who == "send":
            sender.kill()
            sender = stack.enter_context(command(*send))
        else:
            receiver.kill()
            receiver.wait()
            receiver = stack.enter_context(command(*recv))
        sent, error = sender.communicate(timeout=60)
        assert sender.returncode == 0, error
        got, error = receiver.communicate(timeout=60)
        assert receiver.returncode == 0, error
    if who == "send":
        assert json.loads(sent)["bytes"] < 0.9 * json.loads(got)["bytes"]
    else:
        assert json.loads(got)["bytes"] < 0.9 * json.loads(sent)["bytes"]
    assert_same(load_cache(json.loads(got)["path"]).arrays, CACHE)
    assert not list(state.iterdir())
    assert not list(secret.iterdir())


def test_secrets_are_kept_for_the_file_that_they_are_of(tmp_path: Path) -> None:
    kept = ResumeSecrets(tmp_path / "secrets")
    secret = kept.secret("file", "1")
    assert secret == ResumeSecrets(tmp_path / "secrets").secret("file", "1")
    assert secret != kept.secret("file", "2")
    assert [oct(path.stat().st_mode & 0o777) for path in (tmp_path / "secrets").iterdir()] == ["0o600", "0o600"]
    kept.forget("file", "1")
    assert secret != kept.secret("file", "1")
    with pytest.raises(StateError, match="cannot use the state folder"):
        ResumeSecrets(next((tmp_path / "secrets").iterdir()))
