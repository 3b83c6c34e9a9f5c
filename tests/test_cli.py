"""The command line: what a user types, what they see, and that a mistake is one line, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from lynxproto.cachefile import Cache, load_cache, save_cache
from lynxproto.calibration import Calibration
from lynxproto.cli import main
from lynxproto.manifest import Identity, Manifest


def make_cache(path: Path, tokens: int = 200, **manifest: Any) -> Cache:
    described = Manifest.for_cache(
        identity=Identity(model="test/model"),
        dtype="bfloat16",
        layers=2,
        kv_heads=2,
        head_dim=64,
        tokens=tokens,
        **manifest,
    )
    rng = np.random.default_rng(1)
    arrays: Any = {
        (layer, part): (rng.standard_normal((2, tokens, 64), np.float32).view(np.uint32) >> 16).astype(np.uint16)
        for layer in range(2)
        for part in ("key", "value")
    }
    cache = Cache(manifest=described, arrays=arrays, first_token=11, logit_gap=0.25)
    save_cache(path, cache)
    return cache


@contextmanager
def receiving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lynxproto recv` in a process of its own, and its URL."""
    command = [sys.executable, "-m", "lynxproto", "recv", "tcp://127.0.0.1:0", "--insecure", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            while "listening on " not in line:
                assert line, process.communicate()
                line = process.stderr.readline()
            yield process, json.loads(line)["url"] if line.startswith("{") else line.split()[-1]
        finally:
            process.kill()


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Run a command; `send` and `recv` with --insecure, because the links of these tests are plaintext."""
    if arguments[0] in ("send", "recv"):
        arguments = (*arguments, "--insecure")
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("policy", ["lynx", "bf16"])
def test_send_and_recv(tmp_path: Path, policy: str) -> None:
    cache = make_cache(tmp_path / "cache.safetensors")
    with receiving("-o", str(tmp_path / "out"), "--json") as (receiver, url):
        code, out, err = invoke("send", str(tmp_path / "cache.safetensors"), url, "--policy", policy, "--json")
        assert code == 0, err
        received_out, received_err = receiver.communicate(timeout=60)
    assert receiver.returncode == 0, received_err
    sent, received = json.loads(out), json.loads(received_out)
    assert (sent["schema"], received["schema"]) == ("lynxproto.send/1", "lynxproto.recv/1")
    assert sent["transfer"] == received["transfer"]
    assert sent["bytes"] == received["bytes"] == sum(level["bytes"] for level in sent["levels"])
    assert [level["level"] for level in received["levels"]] == ([0, 1, 2] if policy == "lynx" else [0])
    assert received["exact"] is True
    assert "anchor: " in err
    assert "anchor: " in received_err
    back = load_cache(received["path"])
    assert Path(received["path"]).parent == tmp_path / "out"
    assert back.manifest.layers == cache.manifest.layers
    assert back.manifest.identity == cache.manifest.identity
    assert (back.first_token, back.logit_gap) == (11, 0.25)
    for key, words in cache.arrays.items():
        np.testing.assert_array_equal(back.arrays[key], words)
    # What was received can be sent on.
    with receiving("-o", str(tmp_path / "again"), "--json") as (receiver, url):
        code, _, err = invoke("send", received["path"], url, "--quiet")
        assert code == 0, err
        again, _ = receiver.communicate(timeout=60)
    assert Path(json.loads(again)["path"]).read_bytes() == Path(received["path"]).read_bytes()


def test_names_that_peers_choose_stay_inside_the_directory(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    out = tmp_path / "out"
    for expected in ("cache.safetensors", "cache-2.safetensors"):
        with receiving("-o", str(out)) as (receiver, url):
            assert invoke("send", str(tmp_path / "cache"), url)[0] == 0
            receiver.communicate(timeout=60)
        assert (out / expected).exists()
    assert sorted(p.name for p in out.iterdir()) == ["cache-2.safetensors", "cache.safetensors"]


def test_mistakes_of_the_sender(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    (tmp_path / "text").write_text("not a cache at all")
    (tmp_path / "short").write_text("short")
    (tmp_path / "half").write_bytes((tmp_path / "cache").read_bytes()[:20_000])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nobody = f"tcp://127.0.0.1:{port}"
    for arguments, says in (
        ((str(tmp_path / "text"), nobody), "not a KV cache"),
        ((str(tmp_path / "absent"), nobody), "No such file or directory; name a file that"),
        ((str(tmp_path / "half"), nobody), "copy it again"),
        (
            (str(tmp_path / "cache"), nobody, "--secret-file", str(tmp_path / "short")),
            f"{tmp_path / 'short'}: a secret",
        ),
        ((str(tmp_path / "cache"), nobody), "start the receiver first"),
        ((str(tmp_path / "cache"), "http://127.0.0.1:1"), "unknown scheme"),
        ((str(tmp_path / "cache"), "tcp://127.0.0.1"), "HOST:PORT"),
        ((str(tmp_path / "cache"), nobody, "--link", "fast"), "not a rate"),
        ((str(tmp_path / "cache"), nobody, "--ca", str(tmp_path / "text")), "tcps://"),
        ((str(tmp_path / "cache"), nobody.replace("tcp", "tcps"), "--ca", str(tmp_path / "text")), "PEM"),
        ((str(tmp_path / "cache"), nobody, "--secret-file", str(tmp_path / "text")), "start the receiver first"),
    ):
        code, out, err = invoke("send", *arguments)
        assert code in (1, 2), arguments
        assert says in err, (arguments, err)
        assert "Traceback" not in err
        assert out == ""


def test_mistakes_of_the_receiver(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        for arguments, says in (
            ((url, "-o", str(tmp_path / "out")), "another program listens"),
            ((url,), "--output"),
            (("tcps://127.0.0.1:0", "-o", str(tmp_path / "out")), "--certificate"),
            ((url, "-o", str(tmp_path / "file")), "is a file"),
        ):
            code, _, err = invoke("recv", *arguments)
            assert code in (1, 2)
            assert says in err, (arguments, err)
    assert not (tmp_path / "out").exists()


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    with receiving("-o", str(tmp_path / "out"), "--model", "other/model") as (_, url):
        code, _, err = invoke("send", str(tmp_path / "cache"), url)
    assert code == 1
    assert "other/model" in err
    assert not (tmp_path / "out").exists()


def test_no_room_for_the_dump(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    (tmp_path / "readonly").mkdir()
    (tmp_path / "readonly" / "out").write_text("a file where the directory should be")
    with receiving("-o", str(tmp_path / "readonly" / "out" / "deeper")) as (receiver, url):
        code, _, err = invoke("send", str(tmp_path / "cache"), url)
        assert code == 1
        assert "cannot make" in err
        _, received_err = receiver.communicate(timeout=60)
    assert receiver.returncode == 1
    assert "Error: cannot make" in received_err
    assert "Traceback" not in received_err


def test_a_hung_up_sender_leaves_nothing_behind(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", tokens=2000)
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        options = ["--insecure", "--link", "1M", "-q"]
        command = [sys.executable, "-m", "lynxproto", "send", str(tmp_path / "cache"), url, *options]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sender:
            while not list((tmp_path / "out").glob(".*.part")):
                assert sender.poll() is None
            sender.send_signal(signal.SIGINT)
            _, err = sender.communicate(timeout=60)
        assert sender.returncode == 130
        assert "interrupted" in err
        assert "Traceback" not in err
        # At once after a GOAWAY; where the link was too slow for it, after peer_timeout and session_timeout.
        _, received_err = receiver.communicate(timeout=180)
    assert receiver.returncode == 1
    assert "Traceback" not in received_err
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupted_receiver_leaves_nothing_behind(tmp_path: Path) -> None:
    with receiving("-o", str(tmp_path / "out")) as (receiver, _):
        receiver.send_signal(signal.SIGINT)
        _, err = receiver.communicate(timeout=60)
    assert receiver.returncode == 130
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_receiver_interrupted_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", tokens=2000)
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        command = [sys.executable, "-m", "lynxproto", "send", str(tmp_path / "cache"), url, "--link", "1M", "-q"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sender:
            while not list((tmp_path / "out").glob(".*.part")):
                assert sender.poll() is None
            receiver.send_signal(signal.SIGINT)
            _, err = receiver.communicate(timeout=60)
            _, sender_err = sender.communicate(timeout=60)
    assert (receiver.returncode, "Traceback" in err) == (130, False), err
    assert (sender.returncode, "ended or was stopped" in sender_err) == (1, True), sender_err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_sender_whose_receiver_was_killed_says_what_it_waits_for(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache", tokens=2000)
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        command = [sys.executable, "-m", "lynxproto", "send", str(tmp_path / "cache"), url, "--link", "1M"]
        command += ["--set", "session.session_timeout=0.5"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as sender:
            while not list((tmp_path / "out").glob(".*.part")):
                assert sender.poll() is None
            receiver.kill()
            _, err = sender.communicate(timeout=60)
    assert sender.returncode == 1
    assert "goes on if it is back within 0.5 s" in err
    assert err.splitlines()[-1] == "Error: no connection to the peer for 0.5 s"


def test_a_receiver_that_is_stopped_before_anything_came_says_so(tmp_path: Path) -> None:
    with receiving("-o", str(tmp_path / "out")) as (receiver, _):
        receiver.send_signal(signal.SIGTERM)
        receiver.communicate(timeout=60)
    assert receiver.returncode == 75


def test_what_arrived_is_told_though_the_capture_is_not_whole(tmp_path: Path) -> None:
    """/dev/full takes no byte; the cache is there all the same, and its outcome line too."""
    make_cache(tmp_path / "cache")
    with receiving("-o", str(tmp_path / "out"), "--json", "--capture", "/dev/full") as (receiver, url):
        code, _, err = invoke("send", str(tmp_path / "cache"), url, "--quiet", "--stripes", "2", "--threads", "1")
        assert code == 0, err
        out, err = receiver.communicate(timeout=60)
    assert (receiver.returncode, "capture" in err) == (1, True)
    assert Path(json.loads(out)["path"]).exists()


def test_an_outcome_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    with receiving("-o", str(tmp_path / "out")) as (_, url), Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "lynxproto", "send", str(tmp_path / "cache"), url, "--quiet"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "Error: cannot write the outcome to standard output: No space left on device\n"


def test_a_policy_that_cannot_code_the_cache_is_refused_before_anybody_hears_of_it(tmp_path: Path) -> None:
    manifest = Manifest.for_cache(
        identity=Identity(model="test/model"), dtype="float32", layers=1, kv_heads=1, head_dim=64, tokens=64
    )
    arrays: Any = {(0, part): np.zeros((1, 64, 64), np.uint32) for part in ("key", "value")}
    save_cache(tmp_path / "cache", Cache(manifest=manifest, arrays=arrays))
    for policy in ("exact", "int8"):
        code, _, err = invoke("send", str(tmp_path / "cache"), "tcp://127.0.0.1:9", "--policy", policy)
        assert (code, f"--policy {policy} cannot code float32; use lynx, auto or raw" in err) == (1, True), err


def test_json_logs_are_nothing_but_json(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    with receiving("-o", str(tmp_path / "out"), "--log-format", "json") as (receiver, url):
        code, _, _ = invoke("send", str(tmp_path / "cache"), url, "--quiet")
        assert code == 0
        _, err = receiver.communicate(timeout=60)
    assert all(json.loads(line)["time"] for line in err.splitlines()), err


def test_progress_bars_for_people(tmp_path: Path) -> None:
    """On a terminal there are bars; the terminal here is a pseudo one."""
    make_cache(tmp_path / "cache")
    near, far = os.openpty()
    with receiving("-o", str(tmp_path / "out")) as (_, url):
        command = [sys.executable, "-m", "lynxproto", "send", str(tmp_path / "cache"), url, "--insecure"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        with subprocess.Popen(command, stderr=far, stdout=subprocess.PIPE, text=True, env=environment) as sender:
            out, _ = sender.communicate(timeout=60)
    os.close(far)
    shown = b""
    try:
        while data := os.read(near, 65536):
            shown += data
    except OSError:  # a pseudo terminal's way to say that its other end is closed
        pass
    os.close(near)
    assert sender.returncode == 0
    assert "sent" in out
    for level in (b"anchor", b"residual 1", b"residual 2"):
        assert level in shown


def test_help_and_version() -> None:
    code, out, _ = invoke("--help")
    assert code == 0
    assert "send" in out
    assert "recv" in out
    assert "..." not in out.split("Commands:")[1]  # what each command is for is not cut off
    assert "..." not in invoke("bench", "--help")[1].split("Commands:")[1]
    assert "0.1.0" in invoke("--version")[1]


def calibration(path: Path, model: str) -> str:
    """A calibration file of ``model``, for the shape of :func:`make_cache`."""
    keys = [np.arange(128, dtype=np.int16).reshape(2, 64)] * 2
    values = [np.array([0, 40], np.int16)] * 2
    Calibration(model=model, method="made up", keys=tuple(keys), values=tuple(values)).save(path)
    return str(path)


def test_send_with_a_calibration(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache.safetensors")
    measured = calibration(tmp_path / "widths.json", "test/model")
    with receiving("-o", str(tmp_path / "out")) as (receiver, url):
        arguments = (str(tmp_path / "cache.safetensors"), url, "--preset", "dense", "--calibration", measured)
        code, _, err = invoke("send", *arguments, "--quiet")
        assert code == 0, err
        _, err = receiver.communicate(timeout=60)
    assert receiver.returncode == 0, err
    back = load_cache(tmp_path / "out" / "cache.safetensors")
    for place, words in cache.arrays.items():
        np.testing.assert_array_equal(back.arrays[place], words)


def test_a_calibration_that_does_not_fit_is_refused_before_anything_is_sent(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache.safetensors")
    other = calibration(tmp_path / "widths.json", "another/model")
    arguments = ("send", str(tmp_path / "cache.safetensors"), "tcp://127.0.0.1:9")
    code, _, err = invoke(*arguments, "--calibration", other)
    assert (code, "another/model" in err, "test/model" in err) == (1, True, True)
    code, _, err = invoke(*arguments, "--calibration", other, "--policy", "int8")
    assert (code, "--calibration" in err) == (2, True)
