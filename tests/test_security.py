"""Who gets in, and what happens to who does not: a named error with a remedy on both sides, nothing for strangers."""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trustme

import lynxproto
from lynxproto import frames
from lynxproto.access import TransferRequest
from lynxproto.cachefile import Cache
from lynxproto.config import Config, Limits, Secret
from lynxproto.errors import (
    AuthenticationError,
    ConfigError,
    ErrorCode,
    ExpiredSecretError,
    ForbiddenError,
    LynxError,
    NotFoundError,
    RejectedError,
    RemoteError,
    TransportError,
    VersionError,
)
from lynxproto.manifest import FetchKey, Identity, Manifest
from lynxproto.transports import client_context, open_listener, open_stream, parse_url, server_context

#: Plaintext, which these tests ask for.
connect, listen = partial(lynxproto.connect, insecure=True), partial(lynxproto.listen, insecure=True)
_names = (f"memory://security-{n}" for n in itertools.count())
KEY = b"0123456789abcdef"


def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(60):
            return await main()

    return asyncio.run(bounded())


def make_cache(tokens: int = 64, **fields: Any) -> Cache:
    manifest = Manifest.for_cache(
        identity=Identity(model="m"), dtype="bfloat16", layers=1, kv_heads=1, head_dim=64, tokens=tokens, **fields
    )
    rng = np.random.default_rng(0)
    arrays: Any = {(0, part): rng.integers(0, 1 << 16, (1, tokens, 64), np.uint16) for part in ("key", "value")}
    return Cache(manifest=manifest, arrays=arrays)


async def push(sender: Any, receiver: Any, cache: Cache) -> Any:
    """Send a cache and wait until it is exact; returns the incoming transfer."""

    async def take() -> Any:
        async for incoming in receiver:
            await incoming.exact()
            return incoming

    _, incoming = await asyncio.gather(sender.open(cache.manifest).send(cache), take())
    return incoming


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


# --- certificates


class Authority:
    """Issues PEM files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ca = trustme.CA()
        folder.mkdir()
        self.ca.cert_pem.write_to_path(folder / "ca.pem")

    def issue(self, *names: str, **options: Any) -> dict[str, Path]:
        folder = self.folder / "-".join(names).replace("/", "_").replace("@", "_")
        folder.mkdir(exist_ok=True)
        issued = self.ca.issue_cert(*names, **options)
        issued.private_key_pem.write_to_path(folder / "key.pem")
        issued.cert_chain_pems[0].write_to_path(folder / "certificate.pem")
        return {
            "ca": self.folder / "ca.pem",
            "certificate": folder / "certificate.pem",
            "key": folder / "key.pem",
        }


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "one")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority") / "another")


YESTERDAY = datetime.now(UTC) - timedelta(days=1)


def refused(
    server: ssl.SSLContext, client: ssl.SSLContext, caplog: pytest.LogCaptureFixture, host: str = "localhost"
) -> tuple[LynxError, str]:
    """What the client is told, and what the server logs, when a handshake fails."""

    async def main() -> LynxError:
        allocated: list[Manifest] = []

        def allocate(manifest: Manifest) -> Any:
            allocated.append(manifest)
            return {}

        async with lynxproto.listen("tcps://127.0.0.1:0", tls=server, allocate=allocate) as receiver:
            port = parse_url(receiver.url).port
            with pytest.raises(RemoteError) as caught:
                await lynxproto.connect(f"tcps://{host}:{port}", tls=client).__aenter__()
            await until(lambda: bool(caplog.records))
        assert not allocated
        return caught.value

    with caplog.at_level(logging.WARNING, "lynxproto"):
        error = run(main)
    assert isinstance(error, AuthenticationError), error
    return error, caplog.text


def test_both_sides_are_known_by_their_certificates(authority: Authority) -> None:
    server = server_context(**authority.issue("localhost"))
    client = client_context(**authority.issue("spiffe-less.example.org", common_name="prefill 3"))
    cache = make_cache()

    async def main() -> None:
        async with lynxproto.listen("tcps://localhost:0", tls=server) as receiver:
            url = f"tcps://localhost:{parse_url(receiver.url).port}"
            async with lynxproto.connect(url, tls=client) as sender:
                transfer = sender.open(cache.manifest)
                sending = asyncio.ensure_future(transfer.send(cache))
                incoming = await anext(receiver)
                assert incoming.principal.certificate == ("spiffe-less.example.org", "prefill 3")
                assert incoming.principal.name == "tls:spiffe-less.example.org"
                assert incoming.principal.address == "tcps://127.0.0.1"
                await asyncio.gather(sending, incoming.exact())

    run(main)


def test_a_client_certificate_is_required_unless_it_is_waived(authority: Authority) -> None:
    files = authority.issue("localhost")
    with pytest.raises(ConfigError, match="clients must show a certificate"):
        server_context(certificate=files["certificate"], key=files["key"])
    anybody = server_context(certificate=files["certificate"], key=files["key"], client_certificates=False)
    config = Config(secret=KEY)

    async def main() -> None:
        async with lynxproto.listen("tcps://localhost:0", config, tls=anybody) as receiver:
            url = f"tcps://localhost:{parse_url(receiver.url).port}"
            async with lynxproto.connect(url, config, tls=client_context(ca=files["ca"])) as sender:
                incoming = await push(sender, receiver, make_cache())
                assert incoming.principal.name == "secret:shared"

    run(main)


def test_missing_client_certificate(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    files = authority.issue("localhost")
    error, log = refused(server_context(**files), client_context(ca=files["ca"]), caplog)
    assert "give --certificate and --key" in str(error)
    assert "showed no certificate" in log
    assert "--certificate and --key" in log


def test_expired_client_certificate(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    client = authority.issue("old.example.org", not_after=YESTERDAY)
    error, log = refused(server_context(**authority.issue("localhost")), client_context(**client), caplog)
    assert "this side's certificate has expired; renew it" in str(error)
    assert "certificate has expired; renew it" in log


def test_expired_server_certificate(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    server = authority.issue("localhost", common_name="old", not_after=YESTERDAY)
    error, log = refused(server_context(**server), client_context(**authority.issue("client.example.org")), caplog)
    assert "certificate has expired; renew it" in str(error)
    assert "this side's certificate has expired" in log


def test_client_of_another_authority(
    authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    client = {**stranger.issue("client.example.org"), "ca": authority.folder / "ca.pem"}
    error, log = refused(server_context(**authority.issue("localhost")), client_context(**client), caplog)
    assert "not signed by an authority that the peer trusts" in str(error)
    assert "not signed by an authority that this side trusts" in log


def test_server_of_another_authority(
    authority: Authority, stranger: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    server = {**stranger.issue("localhost"), "ca": authority.folder / "ca.pem"}
    client = client_context(**authority.issue("client.example.org"))
    error, log = refused(server_context(**server), client, caplog)
    assert "--ca (ca=) there must name the file that signed it" in str(error)
    assert "not signed by an authority that the peer trusts" in log


def test_server_of_another_name(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    server = server_context(**authority.issue("decode.example.org"))
    error, log = refused(server, client_context(**authority.issue("client.example.org")), caplog)
    assert "localhost" in str(error)
    assert "connect by a name that the certificate holds" in str(error)
    assert "does not hold the name that the peer connected to" in log


def test_contexts_that_are_too_weak_are_refused(authority: Authority) -> None:
    files = authority.issue("localhost")
    weak = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    weak.load_cert_chain(files["certificate"], files["key"])
    blind = client_context(**files)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE

    async def main() -> None:
        with pytest.raises(ConfigError, match="minimum_version"):
            await lynxproto.listen("tcps://localhost:0", tls=weak).__aenter__()
        with pytest.raises(ConfigError, match="does not verify the server"):
            await lynxproto.connect("tcps://localhost:1", tls=blind).__aenter__()

    run(main)


def test_older_tls_is_refused(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    files = authority.issue("localhost")
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    old.load_verify_locations(files["ca"])

    async def main() -> None:
        async with lynxproto.listen("tcps://localhost:0", tls=server_context(**files)) as receiver:
            port = parse_url(receiver.url).port
            with pytest.raises(ssl.SSLError):
                await asyncio.open_connection("localhost", port, ssl=old)
            await until(lambda: bool(caplog.records))

    with caplog.at_level(logging.WARNING, "lynxproto"):
        run(main)
    assert "no TLS 1.3 with" in caplog.text


def test_keys_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    one, other = authority.issue("localhost"), authority.issue("other.example.org")
    with pytest.raises(ConfigError, match=r"key\.pem.*another certificate"):
        server_context(certificate=one["certificate"], key=other["key"], ca=one["ca"])


# --- shared secrets


def test_secrets_rotate_without_a_break() -> None:
    old, new = (
        Secret(id="2026-11", key=KEY, principal="prefill"),
        Secret(id="2026-12", key=KEY[::-1], principal="prefill"),
    )
    cache = make_cache()

    async def main() -> None:
        async with listen(next(_names), Config(secrets=(old, new))) as receiver:
            for mine in ((old,), (new,), (new, old)):
                async with connect(receiver.url, Config(secrets=mine)) as sender:
                    assert (await push(sender, receiver, cache)).principal.name == "secret:prefill"

    run(main)


def test_expired_secrets(caplog: pytest.LogCaptureFixture) -> None:
    past = time.time() - 10
    old = Secret(id="old", key=KEY, not_after=past)
    careless = Secret(id="old", key=KEY)  # does not know that it expired
    new = Secret(id="new", key=KEY[::-1])

    async def main() -> None:
        async with listen(next(_names), Config(secrets=(old, new))) as receiver:
            with pytest.raises(ExpiredSecretError, match=r"'old' expired .*both sides need one that is valid now"):
                await connect(receiver.url, Config(secrets=(careless,))).__aenter__()
            await until(lambda: bool(caplog.records))
            with pytest.raises(ExpiredSecretError, match="expired"):  # a client does not even try
                await connect(receiver.url, Config(secrets=(old,))).__aenter__()
            soon = Secret(id="new", key=KEY[::-1], not_before=time.time() + 60)
            with pytest.raises(ExpiredSecretError, match="is not valid before"):
                await connect(receiver.url, Config(secrets=(soon,))).__aenter__()
            async with connect(receiver.url, Config(secrets=(old, new))):  # it takes the first that is valid
                pass

    with caplog.at_level(logging.WARNING, "lynxproto"):
        run(main)
    assert "the secret 'old' expired" in caplog.text


def test_unknown_and_wrong_secrets(caplog: pytest.LogCaptureFixture) -> None:
    known = Config(secrets=(Secret(id="a", key=KEY),))

    async def main() -> None:
        async with listen(next(_names), known) as receiver:
            for mine, says in (
                (Config(secrets=(Secret(id="b", key=KEY),)), "the secret 'b' is not accepted here"),
                (Config(secrets=(Secret(id="a", key=KEY[::-1]),)), "did not prove"),
                (Config(), "a secret without an id is not accepted"),
            ):
                caplog.clear()
                with pytest.raises(AuthenticationError, match=says):
                    await connect(receiver.url, mine).__aenter__()
                await until(lambda: bool(caplog.records))
                assert says in caplog.text

    with caplog.at_level(logging.WARNING, "lynxproto"):
        run(main)


def test_secrets_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="at least 16 bytes"):
        Secret(key=b"short")
    with pytest.raises(ConfigError, match="same id"):
        Config(secrets=(Secret(key=KEY), Secret(key=KEY)))
    with pytest.raises(ConfigError, match="not_before"):
        Secret(key=KEY, not_before=2.0, not_after=1.0)
    with pytest.raises(ConfigError, match="either it or"):
        Config(secret=KEY, secrets=(Secret(key=KEY),))
    assert KEY.decode() not in repr(Config(secret=KEY)) + repr(Config(secrets=(Secret(key=KEY),)))


# --- who may push and pull what


def test_every_push_and_pull_is_authorised_before_anything_is_allocated() -> None:
    good, bad = make_cache(request_id="good"), make_cache(request_id="bad")
    key, other = (FetchKey(identity=bytes(16), blocks=(bytes([n]) * 8,)) for n in (1, 2))
    asked: list[TransferRequest] = []
    touched: list[Any] = []

    def authorize(request: TransferRequest) -> bool:
        asked.append(request)
        if request.action == "push":
            assert request.manifest is not None
            return request.manifest.request_id == "good"
        return request.key == key

    def allocate(manifest: Manifest) -> Any:
        touched.append(manifest.request_id)
        return lynxproto.session.allocate_arrays(manifest)

    def on_fetch(wanted: FetchKey, wants: Any) -> Cache:
        touched.append(wanted)
        return good

    config = Config(secrets=(Secret(id="team-a", key=KEY),))

    async def main() -> None:
        url = next(_names)
        async with (
            listen(url, config, authorize=authorize, allocate=allocate, on_fetch=on_fetch) as receiver,
            connect(receiver.url, config) as sender,
        ):
            await push(sender, receiver, good)
            with pytest.raises(ForbiddenError, match="secret:team-a may not push this") as refusal:
                await sender.open(bad.manifest).send(bad)
            assert refusal.value.code is ErrorCode.FORBIDDEN
            await (await sender.fetch(key)).exact()
            with pytest.raises(ForbiddenError, match="secret:team-a may not pull this"):
                await sender.fetch(other)

    run(main)
    assert touched == ["good", key]
    assert [request.action for request in asked] == ["push", "push", "pull", "pull"]
    assert {request.principal.name for request in asked} == {"secret:team-a"}


def test_a_hook_that_fails_lets_nobody_through() -> None:
    cache = make_cache()

    def authorize(request: TransferRequest) -> bool:
        raise ZeroDivisionError

    async def main() -> None:
        async with (
            listen(next(_names), authorize=authorize, on_fetch=lambda *_: cache) as receiver,
            connect(receiver.url) as sender,
        ):
            with pytest.raises(ForbiddenError):
                await sender.open(cache.manifest).send(cache)
            with pytest.raises(ForbiddenError):
                await sender.fetch(FetchKey(identity=bytes(16), blocks=()))

    run(main)


def test_without_a_rule_a_missing_cache_is_not_found() -> None:
    async def main() -> None:
        async with listen(next(_names), on_fetch=lambda *_: None) as receiver, connect(receiver.url) as sender:
            with pytest.raises(NotFoundError):
                await sender.fetch(FetchKey(identity=bytes(16), blocks=()))

    run(main)


def test_a_unix_socket_tells_the_user(tmp_path: Path) -> None:
    import os

    async def main() -> None:
        async with lynxproto.listen(f"unix://{tmp_path}/socket") as receiver:
            assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o600
            async with lynxproto.connect(receiver.url) as sender:
                incoming = await push(sender, receiver, make_cache())
                assert incoming.principal.name == f"uid:{os.getuid()}"

    run(main)


# --- other mistakes


def _hello(low: int, high: int) -> bytes:
    hello = frames.Hello(
        versions=(low, high),
        nonce=bytes(32),
        stripe=0,
        name="future",
        lease=1.0,
        limits=Limits(),
        codecs=(),
        features=(),
    )
    return frames.control_frame(hello)


def test_version_mismatch(caplog: pytest.LogCaptureFixture) -> None:
    """A peer of the future says HELLO: both sides name the versions and what to do."""

    async def main() -> bytes:
        async with listen("tcp://127.0.0.1:0") as receiver:
            async with await open_stream(receiver.url) as stream:
                await stream.send([memoryview(_hello(7, 9))])
                answer, buffer = b"", memoryview(bytearray(1 << 16))
                while count := await stream.receive_into(buffer):
                    answer += bytes(buffer[:count])
            await until(lambda: bool(caplog.records))
            return answer

    with caplog.at_level(logging.WARNING, "lynxproto"):
        answer = run(main)
    for text in (answer.decode("latin-1"), caplog.text):
        assert "versions 7 to 9, this side 1; install the same lynxproto on both" in text


def test_a_server_of_another_version_is_named() -> None:
    """Whether it says so, or only says HELLO."""
    refusal = frames.Error(code=ErrorCode.VERSION, text="this side speaks 7 to 9")

    async def answer(listener: Any, words: bytes) -> None:
        async with await listener.accept() as stream:
            await stream.receive_into(memoryview(bytearray(1 << 16)))
            await stream.send([memoryview(words)])
            await stream.receive_into(memoryview(bytearray(1 << 16)))

    async def main() -> None:
        for words, says in (
            (_hello(7, 9), "the peer speaks versions 7 to 9, this side 1; install the same lynxproto on both"),
            (frames.control_frame(refusal), "refused the handshake: this side speaks 7 to 9"),
        ):
            async with await open_listener("tcp://127.0.0.1:0") as listener:
                answering = asyncio.ensure_future(answer(listener, words))
                with pytest.raises(VersionError, match=says):
                    await connect(listener.url).__aenter__()
                await answering

    run(main)


def test_unreachable_hosts_and_wrong_schemes() -> None:
    async def main() -> None:
        for url, kind, says in (
            ("tcp://127.0.0.1:1", TransportError, "start the receiver first"),
            ("tcp://no-such-host.invalid:7411", TransportError, "check its spelling"),
            ("unix:///no/such/socket", TransportError, "check the path"),
            ("udp://127.0.0.1:7411", ConfigError, "unknown scheme 'udp'"),
        ):
            with pytest.raises(kind, match=says):
                await connect(url).__aenter__()

    run(main)


def test_announced_limits_are_kept_before_anything_is_sent() -> None:
    cache = make_cache(request_id="big")
    small = Config(limits=Limits(transfer_bytes=1000))
    allocated: list[Manifest] = []

    async def main() -> None:
        async with listen(next(_names), small, allocate=allocated.append) as receiver, connect(receiver.url) as sender:
            with pytest.raises(LynxError, match="limit"):
                await sender.open(cache.manifest).send(cache)

    run(main)
    assert not allocated


def test_another_model_shows_on_both_sides(caplog: pytest.LogCaptureFixture) -> None:
    cache = make_cache()

    async def main() -> None:
        async with (
            listen(next(_names), Config(identity=Identity(model="other"))) as receiver,
            connect(receiver.url) as sender,
        ):
            with pytest.raises(RejectedError, match="model is 'm', expected 'other'"):
                await sender.open(cache.manifest).send(cache)

    with caplog.at_level(logging.WARNING, "lynxproto"):
        run(main)
    (refusal,) = [record for record in caplog.records if record.event == "transfer_refused"]
    assert refusal.fields["reason"] == "identity"
    assert "model is 'm', expected 'other'" in refusal.getMessage()
