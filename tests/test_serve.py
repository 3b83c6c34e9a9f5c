"""`lynxproto serve`, `fetch`, `config`, and what operators see: outcome lines, logs, metrics, signals, settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from test_cli import make_cache

from lynxproto.cachefile import load_cache
from lynxproto.cli import main
from lynxproto.commands.folder import Folder
from lynxproto.errors import LimitError
from lynxproto.manifest import Identity, Manifest

SECRET = "0123456789abcdef0123456789abcdef"


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lynxproto", *map(str, arguments)]


@contextmanager
def serving(root: Path, *arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`lynxproto serve` on loopback with a secret, in a process of its own, and its URL."""
    secret = root.parent / "secret"
    secret.write_text(SECRET)
    run = command("serve", "tcp://127.0.0.1:0", "--root", root, "--secret-file", secret, "--log-level", "warning")
    with subprocess.Popen(
        [*run, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            while "serving " not in line:
                assert line, process.communicate()
                line = process.stderr.readline()
            yield process, json.loads(line)["url"] if line.startswith("{") else line.split()[-1]
        finally:
            process.kill()


def invoke(*arguments: object, env: dict[str, str] | None = None) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)), env=env)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGTERM)
    return process.communicate(timeout=60)


def test_push_a_folder_and_fetch_from_it(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "in" / "one.safetensors") if (tmp_path / "in").mkdir() is None else None
    make_cache(tmp_path / "in" / "two.safetensors", tokens=300)
    secret = ("--secret-file", tmp_path / "secret")
    with serving(tmp_path / "store", "--json", "--log-level", "info", "--log-format", "json") as (server, url):
        sent = invoke("send", tmp_path / "in", url, *secret, "--json", "--quiet")
        assert sent.exit_code == 0, sent.stderr
        assert [line["request_id"] for line in lines(sent.stdout)] == ["one", "two"]
        again = invoke(
            "send", tmp_path / "in" / "one.safetensors", url, *secret, "--quiet"
        )  # takes the old one's place
        assert again.exit_code == 0
        got = invoke("fetch", url, "one", "-o", tmp_path / "out", "--model", "test/model", *secret, "--json")
        assert got.exit_code == 0, got.stderr
        (fetched,) = lines(got.stdout)
        assert (fetched["schema"], fetched["peer"], fetched["exact"]) == ("lynxproto.fetch/1", "secret:shared", True)
        for absent, model in (("three", "test/model"), ("one", "other/model")):
            missing = invoke("fetch", url, absent, "-o", tmp_path / "out", "--model", model, *secret)
            assert (missing.exit_code, "holds no cache under this key" in missing.stderr) == (1, True)
        stranger = invoke("send", tmp_path / "in" / "one.safetensors", url, "--insecure")
        assert (stranger.exit_code, "did not prove that it knows the secret" in stranger.stderr) == (1, True)
        out, err = end(server)
    assert server.returncode == 0
    assert cache is not None
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["one.safetensors", "two.safetensors"]
    for key, words in cache.arrays.items():
        np.testing.assert_array_equal(load_cache(fetched["path"]).arrays[key], words)
    told = lines(out)
    assert {line["schema"] for line in told} == {"lynxproto.serve/1"}
    assert [(line["outcome"], line["request_id"]) for line in told] == [
        ("received", "one"), ("received", "two"), ("received", "one"), ("sent", "one"),
    ]  # fmt: skip
    logged = lines(err)
    assert {line["event"] for line in logged} >= {
        "session_opened", "transfer_opened", "transfer_closed", "session_closed", "handshake_failed",
    }  # fmt: skip
    closed = [line for line in logged if line["event"] == "transfer_closed"]
    assert [line["transfer"] for line in closed] == [line["transfer"] for line in told]
    assert all(line["time"].endswith("Z") and line["outcome"] == "complete" and line["exact"] for line in closed)
    assert sum(level["bytes"] for level in closed[0]["levels"]) == closed[0]["bytes"] > 0
    (failed,) = [line for line in logged if line["event"] == "handshake_failed"]
    assert (failed["reason"], failed["level"]) == ("authentication", "warning")
    assert SECRET not in out + err


def test_rules_say_who_may_push_and_pull(tmp_path: Path) -> None:
    make_cache(tmp_path / "one.safetensors")
    secret = ("--secret-file", tmp_path / "secret")
    rules = ("--allow-push", "tls:*", "--allow-pull", "secret:sha?ed")
    with serving(tmp_path / "store", *rules) as (server, url):
        pushed = invoke("send", tmp_path / "one.safetensors", url, *secret)
        assert (pushed.exit_code, "secret:shared may not push this" in pushed.stderr) == (1, True)
        pulled = invoke("fetch", url, "one", "-o", tmp_path, "--model", "m", *secret)
        assert (pulled.exit_code, "holds no cache" in pulled.stderr) == (1, True)
        _, err = end(server)
    assert "is refused: secret:shared may not push this" in err
    assert not list((tmp_path / "store").glob("*")) if (tmp_path / "store").exists() else True


def test_an_open_door_is_told(tmp_path: Path) -> None:
    run = command("serve", f"unix://{tmp_path}/socket", "--root", tmp_path / "store")
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        told = ""
        while "serving " not in told:
            told = server.stderr.readline()
            assert told
            if "whoever can connect to" in told:
                break
        server.send_signal(signal.SIGINT)
        _, err = server.communicate(timeout=60)
    assert "whoever can connect to unix://" in told
    assert (server.returncode, "SIGINT: finishing" in err) == (0, True)


def test_metrics_are_scraped(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    make_cache(tmp_path / "one.safetensors")
    with serving(tmp_path / "store", "--metrics", address) as (server, url):
        sent = invoke("send", tmp_path / "one.safetensors", url, "--secret-file", tmp_path / "secret", "--json", "-q")
        (outcome,) = lines(sent.stdout)
        invoke("send", tmp_path / "one.safetensors", url, "--insecure")
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        end(server)
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))

    def value(name: str) -> float:
        return float(values[name])

    for level in outcome["levels"]:
        kind = "anchor" if level["level"] == 0 else f"residual_{level['level']}"
        assert value(f'lynxproto_bytes_total{{class="{kind}",direction="in"}}') == level["bytes"]
        assert value(f'lynxproto_frames_total{{class="{kind}",direction="in"}}') == level["chunks"]
    assert value('lynxproto_bytes_total{class="control",direction="out"}') > 0
    assert value('lynxproto_transfers_total{direction="in",outcome="complete"}') == 1
    assert value("lynxproto_time_to_anchor_seconds_count") == 1
    assert value('lynxproto_time_to_exact_seconds_count{direction="in"}') == 1
    assert value('lynxproto_handshake_failures_total{reason="authentication"}') == 1
    assert value('lynxproto_open_transfers{direction="in"}') == 0
    documented = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    names = {
        line.split()[2] for line in text.splitlines() if line.startswith("# TYPE lynxproto") and "_created" not in line
    }
    assert [name for name in sorted(names) if f"`{name}" not in documented] == []


def _started(store: Path) -> None:
    while not list(store.glob(".*.part")):
        time.sleep(0.01)


def test_sigterm_lets_transfers_finish(tmp_path: Path) -> None:
    make_cache(tmp_path / "one.safetensors", tokens=600)
    secret = ("--secret-file", tmp_path / "secret")
    with serving(tmp_path / "store") as (server, url):
        run = command("send", tmp_path / "one.safetensors", url, *secret, "--link", "2M", "-q")
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sender:
            _started(tmp_path / "store")
            server.send_signal(signal.SIGTERM)
            assert server.stderr is not None
            assert "SIGTERM: finishing what is under way" in server.stderr.readline()
            late = invoke("send", tmp_path / "one.safetensors", url, *secret)
            assert (late.exit_code, "shutting down" in late.stderr) == (1, True), late.stderr
            sender.communicate(timeout=60)
        server.communicate(timeout=60)
    assert (sender.returncode, server.returncode) == (0, 0)
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["one.safetensors"]


@pytest.mark.parametrize(("signals", "code"), [(1, 75), (2, 143)])
def test_what_does_not_finish_in_time_is_handed_back(tmp_path: Path, signals: int, code: int) -> None:
    make_cache(tmp_path / "one.safetensors", tokens=2000)
    patience = "0.2" if signals == 1 else "60"
    with serving(tmp_path / "store", "--json", "--drain-timeout", patience) as (server, url):
        run = command("send", tmp_path / "one.safetensors", url, "--secret-file", tmp_path / "secret", "--link", "500k")
        with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as sender:
            _started(tmp_path / "store")
            server.send_signal(signal.SIGTERM)
            if signals == 2:
                assert server.stderr is not None
                assert "once more stops at once" in server.stderr.readline()
                server.send_signal(signal.SIGTERM)
            out, _ = server.communicate(timeout=60)
            _, err = sender.communicate(timeout=60)
    assert server.returncode == code
    assert sender.returncode == 1
    assert "was cancelled by" in err if signals == 1 else "closed the session" in err
    assert "Traceback" not in err
    assert list((tmp_path / "store").iterdir()) == []
    if signals == 1:
        (line,) = lines(out)
        assert (line["outcome"], line["path"]) == ("failed", None)
        assert line["error"]


# --- the folder


def manifest(request_id: str, tokens: int = 100) -> Manifest:
    return Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=1, head_dim=64, tokens=tokens,
        request_id=request_id,
    )  # fmt: skip


def commit(folder: Folder, request_id: str) -> Path:
    landing = folder.allocate(manifest(request_id))
    return landing.writer.commit()


def test_the_quota_counts_what_is_there_and_what_is_coming(tmp_path: Path) -> None:
    folder = Folder(tmp_path, quota=60_000, replace=True)
    first = folder.allocate(manifest("a"))  # 25.6 kB
    second = folder.allocate(manifest("b"))
    with pytest.raises(LimitError, match="quota of 60000"):
        folder.allocate(manifest("c"))
    del second  # the transfer failed, and everybody forgot its arrays
    assert list(tmp_path.glob(".b*")) == []
    commit(folder, "c")
    first.writer.discard()
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["c.safetensors"]


def test_eviction_removes_the_least_recently_used(tmp_path: Path) -> None:
    folder = Folder(tmp_path, quota=60_000, evict=True, replace=True)
    for age, name in ((30, "old"), (10, "new")):
        path = commit(folder, name)
        os.utime(path, (time.time() - age, time.time() - age))
    commit(folder, "more")
    assert sorted(path.stem for path in tmp_path.glob("*.safetensors")) == ["more", "new"]


def test_nothing_is_evicted_for_what_would_not_fit_even_so(tmp_path: Path) -> None:
    folder = Folder(tmp_path, quota=60_000, evict=True, replace=True)
    commit(folder, "old")
    with pytest.raises(LimitError, match="256000 bytes do not fit into the quota of 60000"):
        folder.allocate(manifest("huge", tokens=1000))
    landing = folder.allocate(manifest("first"))
    with pytest.raises(LimitError, match="try again later"):
        folder.allocate(manifest("second", tokens=150))
    landing.writer.discard()
    assert [path.stem for path in tmp_path.glob("*.safetensors")] == ["old"]


def test_what_a_killed_receiver_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from test_serve import Folder, manifest\n"
        "landing = Folder(Path(sys.argv[1])).allocate(manifest('gone'))\n"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        Folder(tmp_path)
        assert len(list(tmp_path.glob(".gone*.part"))) == 1  # its writer lives
        process.kill()
    mine = Folder(tmp_path).allocate(manifest("mine"))
    Folder(tmp_path)
    assert [path.name.split(".")[1] for path in tmp_path.glob(".*.part")] == ["mine"]
    mine.writer.discard()


def test_ids_of_peers_make_distinct_names_inside_the_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path, replace=True)
    for request_id in ("../../etc/passwd", "-..-..-etc-passwd", "a b", "a/b", "", ".hidden"):
        path = commit(folder, request_id)
        assert path.parent == tmp_path
        assert not path.name.startswith(".")
    assert len(list(tmp_path.iterdir())) == 6
    assert Folder(tmp_path).scan() == 6


def test_a_server_goes_on_when_nobody_reads_its_outcomes(tmp_path: Path) -> None:
    make_cache(tmp_path / "one.safetensors")
    secret = ("--secret-file", tmp_path / "secret")
    with serving(tmp_path / "store", "--json") as (server, url):
        assert server.stdout is not None
        server.stdout.close()
        for request_id in ("a", "b"):
            sent = invoke("send", tmp_path / "one.safetensors", url, *secret, "--quiet", "--request-id", request_id)
            assert sent.exit_code == 0, sent.stderr
        fetched = invoke("fetch", url, "a", "-o", tmp_path / "out", "--model", "test/model", *secret, "--quiet")
        assert fetched.exit_code == 0, fetched.stderr
        assert server.stderr is not None
        server.send_signal(signal.SIGTERM)
        told = server.stderr.read()
        assert server.wait(60) == 0
    assert told.count("cannot write the outcome to standard output: Broken pipe") == 3
    assert "Traceback" not in told
    assert sorted(path.stem for path in (tmp_path / "store").glob("*.safetensors")) == ["a", "b"]


# --- settings


def effective(*arguments: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    result = invoke("config", "--json", *arguments, env=env)
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_flags_win_over_the_environment_over_the_file_over_defaults(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET)
    file = tmp_path / "lynxproto.toml"
    file.write_text(
        """
        log-level = "error"
        drain-timeout = 5
        [serve]
        url = "tcps://0.0.0.0:7411"
        root = "store"
        quota = "2G"
        [send]
        log-level = "debug"
        [limits]
        transfers = 7
        layers = 9
        [session]
        peer_timeout = 3
        [[secrets]]
        id = "2026-12"
        file = "key"
        principal = "prefill"
        not_after = 2099-01-01T00:00:00Z
        """
    )
    env = {"LYNXPROTO_QUOTA": "3G", "LYNXPROTO_LIMITS_LAYERS": "10", "LYNXPROTO_SESSION_LEASE": "33"}
    found = effective("serve", "--config", file, "--quota", "4G", "--set", "limits.layers=11", env=env)
    assert found["quota"] == {"value": 4 << 30, "source": "flag"}
    assert found["limits.layers"] == {"value": 11, "source": "flag --set limits.layers"}
    found = effective("serve", "--config", file, env=env)
    assert found["quota"] == {"value": 3 << 30, "source": "environment"}
    assert found["limits.layers"] == {"value": 10, "source": "environment LYNXPROTO_LIMITS_LAYERS"}
    assert found["session.lease"]["value"] == 33.0
    found = effective("serve", env={"LYNXPROTO_CONFIG": str(file)})
    assert found["quota"] == {"value": 2 << 30, "source": "file"}
    assert found["url"]["value"] == "tcps://0.0.0.0:7411"
    assert found["drain-timeout"]["value"] == 5.0
    assert found["log-level"]["value"] == "error"
    assert found["limits.transfers"] == {"value": 7, "source": f"file {file}"}
    assert found["session.peer_timeout"]["value"] == 3.0
    assert found["secrets.2026-12"]["value"]["principal"] == "prefill"
    assert SECRET not in json.dumps(found)
    assert effective("send", "--config", file)["log-level"]["value"] == "debug"
    assert effective("serve")["quota"] == {"value": None, "source": "default"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("quotta = 1", "unknown key 'quotta'; did you mean 'quota'?"),
        ("[serve]\nroot-dir = 'x'", "unknown key [serve] 'root-dir'; did you mean 'root'?"),
        ("[limits]\ntransfer = 1", "did you mean 'transfers'?"),
        ("[limits]\ntransfers = 'many'", "limits.transfers: 'many' is not of type int"),
        ("[limits]\ntransfers = 0", "Limits.transfers must be a positive integer"),
        ("[[secrets]]\nfil = 'x'", "did you mean 'file'?"),
        ("[[secrets]]\nid = 'x'", "needs file = PATH"),
        ("[[secrets]]\nfile = 'absent'", "cannot read the secret in"),
        ("[[secrets]]\nid = 5\nfile = 'x'", "[[secrets]] id is a text, not 5"),
        ("[[secrets]]\nfile = 5", "[[secrets]] file is a text, not 5"),
        ("secrets = 1", "[[secrets]]"),
        ("[serve]\nroot = 3", "[serve] root is a text, not 3"),
        ("json = 'yes'", "json is true or false, not 'yes'"),
        ("quota = true", "quota is a text or a number, not True"),
        ("allow-push = 3", "allow-push is a text or a list of texts, not 3"),
        ("allow-push = ['uid:1', 3]", "allow-push is a text or a list of texts"),
        ("serve = 1", "[serve] is a table"),
        ("quota = ", "is not TOML"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "lynxproto.toml"
    file.write_text(text)
    result = invoke("config", "serve", "--config", file)
    assert result.exit_code == 1
    assert says in result.stderr


def test_a_secret_ends_however_its_key_is_spelled(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(SECRET)
    file = tmp_path / "lynxproto.toml"
    for key in ("not_after", "not-after"):
        file.write_text(f"allow-push = 'uid:*'\n[[secrets]]\nid = 'old'\nfile = 'key'\n{key} = 2020-01-01T00:00:00Z")
        found = effective("serve", "--config", file)
        assert found["secrets.old"]["value"]["not_after"] == 1577836800.0
        assert found["allow-push"]["value"] == ["uid:*"]
    file.write_text("[[secrets]]\nid = 'one'\nfile = 'key'\n[[secrets]]\nid = 'one'\nfile = 'key'")
    assert "same id" in invoke("config", "serve", "--config", file).stderr


def test_mistakes_in_flags_and_the_environment_are_named(tmp_path: Path) -> None:
    for arguments, env, says in (
        (("serve",), {"LYNXPROTO_QUOTTA": "1"}, "did you mean 'LYNXPROTO_QUOTA'?"),
        (("serve", "--set", "limits=3"), {}, "expected session|limits|admission.NAME=VALUE"),
        (("serve", "--set", "limits.layer=3"), {}, "did you mean 'layers'?"),
        (("serve", "--config", tmp_path / "absent"), {}, "does not exist"),
        (("inspect",), {}, "has no settings"),
    ):
        result = invoke("config", *arguments, env=env)
        assert result.exit_code in (1, 2), arguments
        assert says in result.stderr, (arguments, result.stderr)
    pytest.importorskip("prometheus_client")
    for address in ("9411", ":9411", "127.0.0.1:99999"):
        result = invoke("serve", "tcp://127.0.0.1:0", "--root", tmp_path, "--metrics", address)
        assert (result.exit_code, "expected HOST:PORT" in result.stderr) == (1, True), address
    result = invoke("serve", "tcp://127.0.0.1:0", "--root", tmp_path, "--evict")
    assert (result.exit_code, "--evict needs a --quota" in result.stderr) == (2, True)
    result = invoke("serve", "tcp://0.0.0.0:0", "--root", tmp_path)
    assert (result.exit_code, "--insecure" in result.stderr) == (1, True)
