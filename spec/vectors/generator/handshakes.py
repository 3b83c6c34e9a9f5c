"""Handshakes: new sessions, joining, versions, proofs, and what strangers send."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pieces import File, control, data_frame, frame
from play import Play, cut
from said import Sessions, config, damaged_frame, patched

from lynxproto import _cbor
from lynxproto.config import Limits, Secret
from lynxproto.errors import ErrorCode as E
from lynxproto.frames import FrameType

_SECRET = b"sixteen bytes or more"


def handshakes() -> File:
    s = Sessions("sessions-handshake", "Handshakes")
    s.f.group("session", "wire-format.md, Handshake")
    for role in ("client", "server"):
        s.good(f"a new session, seen by the {role}", Play("plain").settle(), role, {})
        secret = {"client": config("client", secret=_SECRET), "server": config("server", secret=_SECRET)}
        s.good(
            f"with a secret, seen by the {role}", Play("secret", **secret).settle(), role, {}, "proof", secret=_SECRET
        )
        named = Secret(key=_SECRET, id="a")
        play = Play("named", config("client", secrets=(named,)), config("server", secrets=(named,))).settle()
        s.good(f"with a named secret, seen by the {role}", play, role, {}, "proof", secret=_SECRET, secret_id="a")
    for n in range(3):
        greased = Play(f"grease {n}", config("client", grease=True), config("server", grease=True))
        for side in ("client", "server"):
            greased.sides[side]._ctx.random.random = lambda: 0.0  # type: ignore[method-assign]  # always, not at times
        s.good(f"greased, seed {n}", greased.settle(), "server", {}, "grease")
    hello = Play("by hand").collect("client")

    def client(*first: bytes, **more: Any) -> tuple[Play, int]:
        """A server hears these frames from a client that is played by hand; offset of the last."""
        play = Play("by hand", server=config("server", **more))
        at = 0
        for one in first:
            at = play.say("client", one)
            play.answer("server")
        return play, at

    def bad(comment: str, *first: bytes, code: E, flags: tuple[str, ...] = (), **more: Any) -> None:
        play, at = client(*first)
        s.bad(comment, play, "server", code, at, *flags, **more)

    for low, high in ((1, 1), (0, 1), (0, 255), (1, 2), (1, 255)):
        play, _ = client(patched(hello, versions=[low, high]))
        s.good(f"versions {low} to {high}: 1 is chosen", play, "server", {"state": "connecting"}, "version")
    for low, high in ((0, 0), (2, 2), (2, 255), (255, 255), (2, 1)):
        bad(f"versions {low} to {high}", patched(hello, versions=[low, high]), code=E.VERSION, flags=("version",))
    bad(
        "HELLO in a frame of version 2",
        control(1, _cbor.loads(hello[64:], "HELLO").raw, version=2, transfer=bytes(16)),
        code=E.VERSION,
        flags=("version",),
    )
    ping = control(19, {"id": 1, "probe": False}, transfer=bytes(16))
    for kind in FrameType:
        if kind not in (FrameType.HELLO, FrameType.HELLO_ACK, FrameType.ERROR, FrameType.GOAWAY):
            one = data_frame(b"x") if kind == FrameType.DATA else frame(kind, b"\xa0")
            bad(f"{kind.name} before HELLO", one, code=E.STATE, flags=("state",))
    bad(
        "HELLO_ACK before HELLO",
        control(2, {"version": 1, "mac": bytes(32)}, transfer=bytes(16)),
        code=E.STATE,
        flags=("state",),
    )
    bad("PING before the proof", hello, ping, code=E.STATE, flags=("state",))
    play, _ = client(hello, hello)
    s.good("HELLO twice, the same", play, "server", {"state": "connecting"}, "order")
    bad("a second, other HELLO", hello, patched(hello, nonce=bytes(32)), code=E.STATE, flags=("state",))
    bad(
        "a proof of zeros",
        hello,
        control(2, {"version": 1, "mac": bytes(32)}, transfer=bytes(16)),
        code=E.AUTHENTICATION,
        flags=("proof",),
    )
    for comment, one, given in (
        ("a secret that the server does not have", patched(hello, secret="b"), {"secret": _SECRET, "secret_id": "a"}),
        ("no secret, where the server has one", hello, {"secret": _SECRET, "secret_id": "a"}),
        ("a secret, where the server has none", patched(hello, secret="b"), {}),
    ):
        play, at = client(one, secrets=(Secret(key=_SECRET, id="a"),) if given else ())
        s.bad(comment, play, "server", E.AUTHENTICATION, at, "proof", **given)
    bad(
        "HTTP",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n",
        code=E.FRAME_CORRUPT,
    )
    bad("HELLO with a damaged payload", damaged_frame(hello), code=E.FRAME_CORRUPT, flags=("corrupt",))
    bad(
        "HELLO of 16385 bytes, header alone",
        control(1, {}, payload_length=16385)[:64],
        code=E.FRAME_TOO_LARGE,
        flags=("hostile",),
    )
    bad(
        "an ignorable frame of 16385 bytes, header alone",
        frame(0x8001, payload_length=16385)[:64],
        code=E.FRAME_TOO_LARGE,
        flags=("hostile",),
    )
    bad("an unknown session", patched(hello, session=bytes(16)), code=E.NOT_FOUND, flags=("resume",))
    bad("HELLO without a nonce", control(1, {"versions": [1, 1]}, transfer=bytes(16)), code=E.PROTOCOL)
    error = control(21, {"code": 17, "text": "no"}, transfer=bytes(16))
    play, _ = client(error)
    s.f.valid("ERROR in place of HELLO", play.case("server"), {"ended": 17, "transfers": {}})

    def server(change: Callable[[bytes, bytes], bytes], **more: Any) -> tuple[Play, int]:
        """A client hears what ``change`` makes of the server's HELLO and HELLO_ACK; offset of the first changed."""
        play = Play("other server", client=config("client", **more))
        play.say("client", play.collect("client"))
        first, ack = cut(play.collect("server"))
        changed = change(first, ack)
        play.say("server", changed)
        return play, 0 if not changed.startswith(first) else len(first)

    for comment, change, code, flag in (
        ("the server's proof is wrong", lambda h, a: h + patched(a, mac=bytes(32)), E.AUTHENTICATION, "proof"),
        ("the server chose version 2", lambda h, a: h + patched(a, version=2), E.VERSION, "version"),
        ("the server speaks versions 2 to 3", lambda h, a: patched(h, versions=[2, 3]) + a, E.VERSION, "version"),
        ("the server gave no session", lambda h, a: patched(h, session=b"") + a, E.PROTOCOL, "state"),
        ("the server gave no token", lambda h, a: patched(h, token=b"") + a, E.PROTOCOL, "state"),
        ("the server answers for another stripe", lambda h, a: patched(h, stripe=1) + a, E.PROTOCOL, "state"),
        ("HELLO_ACK before HELLO, from the server", lambda h, a: a + h, E.STATE, "state"),
    ):
        play, at = server(change)
        s.bad(comment, play, "client", code, at, flag)
    play, at = server(lambda h, a: h + a, secret=_SECRET)
    s.bad("a server that does not know the secret", play, "client", E.AUTHENTICATION, at, "proof", secret=_SECRET)

    joined = Play("two stripes").settle()
    joined.stripe(1)
    s.good("a second stripe", joined.settle(), "server", {}, "resume")
    stranger = Play("a stranger joins").settle()
    stranger.stripe(1)
    joining = stranger.collect("client", 1)
    stranger.say("client", joining, 1)
    stranger.answer("server", 1)
    proof = control(2, {"version": 1, "mac": bytes(32)}, transfer=bytes(16))
    at = stranger.say("client", proof, 1)
    s.bad(
        "a stranger joins: its stripe is closed, the session lives",
        stranger,
        "server",
        E.AUTHENTICATION,
        at,
        "proof",
        scope="stripe",
        stripe=1,
    )
    for comment, ends, limit in (
        ("a stripe that the client does not list any more is closed", True, 64),
        ("a stripe that is not listed does not count for the limit", True, 1),
        ("one stripe more than the limit", False, 1),
    ):
        play = Play(comment, server=config("server", limits=Limits(stripes=limit))).settle()
        if ends:  # the server does not know
            play.sides["client"].stripe_lost(play.stripes[0]["client"], 0.0)
            play.events("client")
        play.stripe(1)
        play.say("client", play.collect("client", 1), 1)
        play.say("server", play.collect("server", 1), 1)
        at = play.say("client", play.collect("client", 1), 1)
        if not ends:
            s.bad(comment, play, "server", E.LIMIT, at, "hostile", scope="stripe", stripe=1)
            continue
        play.lose(1)
        s.good(comment, play, "server", {"state": "suspended"}, "resume")
    other = Play("hello again").settle()
    at = other.say("client", patched(hello, nonce=bytes(32)))
    s.bad("another HELLO after the handshake", other, "server", E.STATE, at, "state")
    broken = Play("broken").settle()
    at = broken.say("client", bytes(64))
    s.bad(
        "framing is lost: the stripe is closed, the session waits for another",
        broken,
        "server",
        E.FRAME_CORRUPT,
        at,
        "corrupt",
        scope="stripe",
    )
    gone = Play("goaway").settle()
    gone.say("client", control(22, {"code": 0, "text": "bye"}, transfer=bytes(16)))
    s.f.valid("GOAWAY", gone.case("server"), {"ended": 0, "transfers": {}})
    failed = Play("error").settle()
    failed.say("client", control(21, {"code": 1, "text": "broken"}, transfer=bytes(16)))
    s.f.valid("ERROR of the session", failed.case("server"), {"ended": 1, "transfers": {}})
    skipped = Play("skipped").settle()
    skipped.say("client", frame(0x801B, b"abc") + ping + frame(0xFFFF, bytes(100), flags=0xFF))
    skipped.answer("server")
    s.good("unknown frames around a PING", skipped, "server", {}, "grease")
    lost = Play("lost").settle()
    lost.lose(0)
    s.good("the last stripe is lost", lost, "server", {"state": "suspended"}, "resume")
    return s.f
