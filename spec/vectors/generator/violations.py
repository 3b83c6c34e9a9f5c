"""Rules broken by a sender, a receiver, or a stranger; and offers that are refused."""

from __future__ import annotations

from typing import Any

from pieces import TRANSFER, File, control
from play import CODECS, HQ, RAW, SMALL, Play, cache, encoded, manifest_of, tiles_of, told_tile
from said import (
    Sessions,
    chunk_frame,
    complete,
    config,
    damaged_frame,
    end_frame,
    plan_frame,
    result_frame,
    said_by_sender,
)

from lynxproto import _cbor
from lynxproto.config import Limits
from lynxproto.errors import ErrorCode
from lynxproto.errors import ErrorCode as E
from lynxproto.frames import FrameType, TileKey
from lynxproto.manifest import Identity


def violations() -> File:
    s = Sessions("sessions-violations", "Rules broken by a sender, a receiver, or a stranger")
    words = cache(2)
    manifest = manifest_of(words)
    key_raw, key_hq, value_raw, value_hq = tiles_of(manifest, 0)
    opening = control(3, {"manifest": manifest.to_bytes(), "fetch": b""})
    plan, end = plan_frame(manifest, 0), end_frame(manifest, words, 0)
    name = TRANSFER.hex()

    def play(*said: bytes, offer: bytes = opening, accepts: bool = True, **limits: int) -> tuple[Play, int]:
        """A receiver hears OPEN and, one by one, what follows; offset of the last frame."""
        chosen = SMALL if not limits else Limits(**{"session_window": 8192, "transfer_window": 4096, **limits})
        p = Play("violation", server=config("server", limits=chosen))
        p.settle()
        p.accepts = accepts
        at = p.say("client", offer) if offer else 0
        p.answer("server")
        for one in said:
            at = p.say("client", one)
            if one is not said[-1]:
                p.answer("server")
        return p, at

    def bad(comment: str, *said: bytes, code: ErrorCode = E.PROTOCOL, flag: str = "state", **more: Any) -> None:
        p, at = play(*said, **more)
        s.bad(comment, p, "server", code, at, flag)

    def ends(comment: str, *said: bytes, code: ErrorCode, flag: str, outcome: str = "failed", **more: Any) -> None:
        """The transfer is over, the session is not."""
        p, _ = play(*said, **more)
        told: dict[str, Any] = {"outcome": outcome, "code": int(code)}
        if outcome != "rejected" or flag == "later":
            told |= {"corrupt": p.sides["server"].transfer_counters(int(name, 16)).corrupt, "restarted": 0}
        s.good(comment, p, "server", {"transfers": {name: told}}, flag)

    s.f.group("session", "wire-format.md, A transfer")
    chunk = chunk_frame(manifest, words, key_raw, 0)
    bad("DATA before ACCEPT", chunk, code=E.STATE, accepts=False)
    bad("PLAN before ACCEPT", plan, code=E.STATE, accepts=False)
    bad("END before ACCEPT", end, code=E.STATE, accepts=False)
    bad("RESULT before ACCEPT", result_frame(), code=E.STATE, accepts=False)
    for kind in (FrameType.OPEN, FrameType.PLAN, FrameType.END, FrameType.RESULT, FrameType.CLOSED, FrameType.ACCEPT):
        bodies: dict[int, dict[str, Any]] = {
            3: {"manifest": manifest.to_bytes(), "fetch": b""},
            8: _cbor.loads(plan[64:], "").raw,
            11: _cbor.loads(end[64:], "").raw,
            10: {"token": 1, "gap": None},
            17: {"level": 7, "end": True, "final": [0] * 8, "code": 0, "text": ""},
            4: {
                "layers": [],
                "result": False,
                "level": 7,
                "settled": 7,
                "urgent": False,
                "want": [],
                "credit": [0] * 8,
            },
        }
        bad(f"{kind.name} without a transfer id", control(kind, bodies[kind], transfer=bytes(16)))
    for kind, body in (
        (15, {"layers": [], "result": False, "level": 7, "settled": 7, "urgent": False, "want": []}),
        (18, {}),
        (16, {"above": -1, "code": 15, "text": ""}),
    ):
        bad(f"{FrameType(kind).name} from the sender", control(kind, body))
    for comment, one in (
        ("PLAN of a transfer that is not known", plan_frame(manifest, 0)),
        ("DATA of a transfer that is not known", chunk),
        ("CLOSED of a transfer that is not known", control(17, bodies[17])),
        ("CANCEL of a transfer that is not known", control(16, {"above": -1, "code": 15, "text": ""})),
        ("DATA without a transfer id", chunk_frame(manifest, words, key_raw, 0, transfer=bytes(16))),
        ("PING with a transfer id", control(19, {"id": 1, "probe": False})),
    ):
        p, _ = play(one, offer=b"")
        s.good(comment, p, "server", {}, "order")

    other = control(3, {"manifest": manifest_of(words, prompt_tokens=99).to_bytes(), "fetch": bytes(range(16))})
    p, _ = play(other, plan, chunk)
    found = [told_tile(manifest, words, key_raw, verified=False)]
    told = {"outcome": "receiving", "corrupt": 0, "restarted": 0, "tiles": found}
    s.good("OPEN again, with another manifest: the first counts", p, "server", {"transfers": {name: told}}, "order")
    p, _ = play(plan, chunk, offer=other)
    s.good("OPEN for a FETCH that never was", p, "server", {"transfers": {name: told}}, "order")

    s.f.group("session", "wire-format.md, PLAN")
    bad("a layer that the manifest lacks", plan_frame(manifest, 0, layer=7))
    bad("a gap between tiles", plan_frame(manifest, 0, [key_raw, value_raw, value_hq]))
    bad("a tile twice", plan_frame(manifest, 0, [key_raw, key_raw, key_hq, value_raw, value_hq]))
    bad("no tiles", plan_frame(manifest, 0, []))
    every = [[0, 0, 1, 0, 4, 0], [0, 0, 1, 4, 24, 1], [1, 0, 1, 0, 4, 0], [1, 0, 1, 4, 24, 1]]

    def tiles(i: int, j: int, value: int) -> dict[str, Any]:
        changed = [list(t) for t in every]
        changed[i][j] = value
        return {"tiles": changed}

    bad("a part that the layer lacks", plan_frame(manifest, 0, **tiles(0, 0, 4)))
    bad("heads that the layer lacks", plan_frame(manifest, 0, **tiles(0, 2, 2)))
    bad("a head that the layer lacks", plan_frame(manifest, 0, **tiles(0, 1, 1)))
    bad("tokens beyond the layer", plan_frame(manifest, 0, **tiles(1, 4, 25)))
    bad("tokens short of the layer", plan_frame(manifest, 0, **tiles(1, 4, 23)))
    bad("tiles that overlap", plan_frame(manifest, 0, **tiles(1, 3, 3)))
    bad("a codec that the manifest lacks", plan_frame(manifest, 0, **tiles(0, 5, 3)))
    bad("another number of levels than the codec's", plan_frame(manifest, 0, levels=b"\1\2\1\3"))
    bad("a second, different plan", plan, plan_frame(manifest, 0, [key_hq, key_raw, value_raw, value_hq]), code=E.STATE)
    p, _ = play(plan, plan)
    told = {"outcome": "receiving", "corrupt": 0, "restarted": 0, "tiles": []}
    s.good("the same plan twice", p, "server", {"transfers": {name: told}}, "order")
    bad(
        "bitplane of float32 words",
        plan_frame(manifest, 0, **tiles(0, 5, 2), levels=b"\2\3\1\3"),
        offer=control(3, {"manifest": manifest_of(words, dtype="float32").to_bytes(), "fetch": b""}),
    )
    bad("more tiles in one plan than the limit", plan, code=E.LIMIT, flag="hostile", tiles=3)
    ends("more tiles in two plans than the limit", plan, plan_frame(manifest, 1), code=E.LIMIT, flag="hostile", tiles=7)
    odd = [*tiles_of(manifest, 0, (((0, 2), RAW), (range(1, 2), RAW), (range(3, 24), HQ)))]
    ends(
        "more explicit positions than the limit",
        plan_frame(manifest, 0, odd),
        code=E.LIMIT,
        flag="hostile",
        positions=3,
    )
    ends("a chunk that could be larger than the window", plan, code=E.LIMIT, flag="hostile", transfer_window=300)

    ends(
        "more explicit positions than the limit, and a gap: positions are counted first",
        plan_frame(manifest, 0, odd[1:]),
        code=E.LIMIT,
        flag="hostile",
        positions=1,
    )

    s.f.group("session", "wire-format.md, DATA")
    bad("a layer that the manifest lacks", chunk_frame(manifest, words, key_raw, 0, layer=2))
    bad("another codec id than the config's", chunk_frame(manifest, words, key_raw, 0, codec_id=3))
    bad("a codec config that the manifest lacks", chunk_frame(manifest, words, key_raw, 0, codec=3))
    bad("a tile that is not in the plan", plan, chunk_frame(manifest, words, key_raw, 0, token_stop=3))
    bad("a level that the tile lacks", plan, chunk_frame(manifest, words, key_raw, 0, level=1))
    bad("a payload larger than the codec can make", plan, chunk_frame(manifest, words, key_raw, 0, payload=bytes(65)))
    bad("attempt 1 that was never asked for", plan, chunk_frame(manifest, words, key_raw, 0, attempt=1))
    bad(
        "the same chunk with another size",
        plan,
        chunk_frame(manifest, words, key_hq, 0),
        chunk_frame(manifest, words, key_hq, 0, payload=bytes(20)),
        code=E.STATE,
    )
    bad("a plan without a tile that came before it", chunk_frame(manifest, words, key_raw, 0, token_stop=3), plan)
    bad(
        "a plan that gives a chunk that came before it fewer levels",
        chunk_frame(manifest, words, key_raw, 0, level=1),
        plan,
    )
    bad(
        "a plan in which a chunk that came before it is too large",
        chunk_frame(manifest, words, key_raw, 0, payload=bytes(65)),
        plan,
    )
    damaged = damaged_frame(chunk_frame(manifest, words, key_raw, 0))
    ends("a chunk that is damaged four times", plan, *[damaged] * 4, code=E.FRAME_CORRUPT, flag="corrupt")
    p, _ = play(plan, damaged, damaged)
    told = {"outcome": "receiving", "corrupt": 2, "restarted": 0, "tiles": []}
    s.good("a chunk that is damaged twice is asked for again", p, "server", {"transfers": {name: told}}, "corrupt")
    p, _ = play(plan, chunk, chunk, chunk)
    told = {
        "outcome": "receiving",
        "corrupt": 0,
        "restarted": 0,
        "tiles": [told_tile(manifest, words, key_raw, verified=False)],
    }
    s.good("a chunk that comes three times", p, "server", {"transfers": {name: told}}, "order")

    copies = Play("two copies", server=config("server")).settle()
    copies.stripe(1)
    copies.settle()
    copies.say("client", opening)
    copies.answer("server")
    copies.say("client", plan)
    copies.say("client", chunk[:100], 1)
    copies.say("client", damaged)
    copies.say("client", chunk[100:], 1)
    told = {
        "outcome": "receiving",
        "corrupt": 0,
        "restarted": 0,
        "tiles": [told_tile(manifest, words, key_raw, verified=False)],
    }
    s.good(
        "a second copy, while the first arrives on another stripe, is dropped unread",
        copies,
        "server",
        {"transfers": {name: told}},
        "order",
    )
    refused = [chunk_frame(manifest, words, tile, 0, payload=b"\2" * 20) for tile in (key_hq, value_hq)]
    late = [chunk_frame(manifest, words, tile, 1) for tile in (key_hq, value_hq)]
    again = chunk_frame(manifest, words, key_hq, 1, attempt=1)
    room = sum(len(one) - 64 for one in (*late, again))
    for short in (0, 1):
        p, _ = play(plan, transfer_window=room - short, session_window=8 * room)
        p.answer("server")
        for one in (*refused, *late, again):
            at = p.say("client", one)
        comment = "chunks of attempt 0 that come late are charged"
        if short:
            s.bad(f"{comment}: no credit is left", p, "server", E.FLOW_CONTROL, at, "credit")
        else:
            told = {"outcome": "receiving", "corrupt": 0, "restarted": 2, "tiles": []}
            s.good(comment, p, "server", {"transfers": {name: told}}, "credit")
    p, _ = play(plan)
    p.sides["server"].cancel(int(name, 16), 0.0)
    p.answer("server")
    p.say("client", plan_frame(manifest, 0, [key_raw]) + chunk_frame(manifest, words, key_raw, 0, layer=9))
    told = {"outcome": "cancelled", "code": 15, "corrupt": 0, "restarted": 0}
    s.good("what comes after CANCEL of all is dropped", p, "server", {"transfers": {name: told}}, "cancel")
    cut = {"level": 0, "end": False, "final": [0] * 8, "code": 15, "text": ""}
    above = [chunk_frame(manifest, words, key_hq, n) for n in (2, 1)]
    cut["final"] = [0, len(above[1]) - 64, len(above[0]) - 64, *[0] * 5]
    p, _ = play(plan, *above, control(17, cut), chunk_frame(manifest, words, key_hq, 0))
    tile = told_tile(manifest, words, key_hq, 0)
    told = {"outcome": "receiving", "corrupt": 0, "restarted": 0, "level": 0, "tiles": [tile]}
    s.good("levels that came before lower ones and are cancelled", p, "server", {"transfers": {name: told}}, "cancel")

    s.f.group("session", "wire-format.md, END")
    bad("a layer that the manifest lacks", end_frame(manifest, words, 0, layer=5))
    bad("fewer digests than tiles", plan, end_frame(manifest, words, 0, digests=[bytes(16)] * 3))
    bad("more digests than tiles, before the plan", end_frame(manifest, words, 0, digests=[bytes(16)] * 5), plan)
    bad("an exact transfer without a digest", plan, end_frame(manifest, words, 0, digests=[bytes(16)] * 3 + [b""]))
    bad("a second, different END", plan, end, end_frame(manifest, words, 0, digests=[bytes(16)] * 4), code=E.STATE)
    p, _ = play(plan, end, end)
    told = {"outcome": "receiving", "corrupt": 0, "restarted": 0, "tiles": []}
    s.good("the same END twice", p, "server", {"transfers": {name: told}}, "order")
    lies = end_frame(manifest, words, 0, digests=[bytes(16)] * 4)
    again = chunk_frame(manifest, words, key_raw, 0, attempt=1)
    for comment, said, code, restarted in (
        ("words that do not match the digest twice", (plan, lies, chunk, again), E.DIGEST, 2),
        (
            "a payload that the codec refuses twice",
            (
                plan,
                chunk_frame(manifest, words, key_hq, 0, payload=b"\2" * 20),
                chunk_frame(manifest, words, key_hq, 0, payload=b"\2" * 20, attempt=1),
            ),
            E.PAYLOAD,
            2,
        ),
    ):
        p, _ = play(*said)
        told = {"outcome": "failed", "code": int(code), "corrupt": 0, "restarted": restarted}
        s.good(comment, p, "server", {"transfers": {name: told}}, "corrupt")

    s.f.group("session", "wire-format.md, Credit")
    parts = tiles_of(manifest, 0, ((range(12), RAW), (range(12, 24), RAW)))
    raw_plan = plan_frame(manifest, 0, parts)
    room = len(encoded(manifest, words, parts[0])[0])
    window = {"transfer_window": room * 2, "session_window": room * 8}

    def burst(n: int, *more: bytes, **limits: int) -> tuple[Play, int]:
        """``n`` chunks at once, for which the receiver has not given credit back yet."""
        p, at = play(raw_plan, **limits)
        p.answer("server")
        for one in [*(chunk_frame(manifest, words, t, 0) for t in parts[:n]), *more]:
            at = p.say("client", one)
        return p, at

    p, _ = burst(2, **window)
    told = {"outcome": "receiving", "corrupt": 0, "restarted": 0}
    told["tiles"] = [told_tile(manifest, words, t, verified=False) for t in parts[:2]]
    s.good("as much as the transfer's window takes", p, "server", {"transfers": {name: told}}, "credit")
    p, at = burst(3, **window)
    s.bad("one chunk more than the transfer's window takes", p, "server", E.FLOW_CONTROL, at, "credit")
    p, at = burst(3, transfer_window=room * 8, session_window=room * 2)
    s.bad("one chunk more than the session's window takes", p, "server", E.FLOW_CONTROL, at, "credit")
    p, at = play(chunk_frame(manifest, words, key_raw, 0, payload=bytes(4097)))
    s.bad("a chunk larger than the window, before the plan", p, "server", E.FLOW_CONTROL, at, "credit")
    closed = {"level": 7, "end": True, "final": [room * 2, *[0] * 7], "code": 15, "text": ""}
    for comment, final in (("less than was seen", 1), ("more than was allowed", 1 << 30)):
        p, at = burst(1, control(17, {**closed, "final": [final, *[0] * 7]}), **window)
        s.bad(f"CLOSED with a final charge of {comment}", p, "server", E.FLOW_CONTROL, at, "credit")
    p, _ = burst(1, control(17, closed), **window)
    told = {"outcome": "cancelled", "code": 15, "corrupt": 0, "restarted": 0}
    s.good("CLOSED accounts for a chunk that never came", p, "server", {"transfers": {name: told}}, "credit")
    p, _ = burst(1, control(17, {**closed, "code": 2}), **window)
    told = {"outcome": "failed", "code": 2, "corrupt": 0, "restarted": 0}
    s.good("CLOSED with an error", p, "server", {"transfers": {name: told}}, "cancel")
    p, _ = burst(1, control(17, {**closed, "code": 0}), **window)
    told = {"outcome": "failed", "code": 1, "corrupt": 0, "restarted": 0}
    s.good("CLOSED in order, before all is done", p, "server", {"transfers": {name: told}}, "cancel")
    p, at = burst(
        1, control(17, {**closed, "final": [room * 3, *[0] * 7]}), transfer_window=room * 8, session_window=room * 2
    )
    s.bad("CLOSED with a final charge that the session does not allow", p, "server", E.FLOW_CONTROL, at, "credit")
    p, _ = play(*said_by_sender(manifest, words))
    p.answer("server")
    charges = [
        sum(len(one) - 64 for one in said_by_sender(manifest, words) if one[6] == 9 and one[11] == n) for n in range(8)
    ]
    p.say("client", control(17, {**closed, "final": charges}))
    done = complete(manifest, words, [t for layer in (0, 1) for t in tiles_of(manifest, layer)])
    s.good("CLOSED with CANCELLED when all is done", p, "server", {"transfers": {name: done}}, "cancel")
    _rejections(s, words)
    _receivers(s)
    return s.f


def _rejections(s: Sessions, words: Any) -> None:
    s.f.group("session", "wire-format.md, OPEN")
    name = TRANSFER.hex()

    def rejected(
        comment: str, code: ErrorCode, *, given: dict[str, Any] | None = None, server: Any = None, **more: Any
    ) -> None:
        p = Play("reject", server=config("server", **(server or {})))
        p.settle()
        offered = more.pop("manifest", None) or manifest_of(words, **more).to_bytes()
        p.say("client", control(3, {"manifest": offered, "fetch": b""}))
        p.answer("server")
        told = {"transfers": {name: {"outcome": "rejected", "code": int(code)}}}
        s.good(comment, p, "server", told, "reject", **(given or {}))

    mine = {"model": "m", "revision": "r1"}
    identity = {"given": {"identity": mine}, "server": {"identity": Identity(**mine)}}
    rejected("another model", E.IDENTITY, identity=Identity(model="other"), **identity)
    rejected("another revision", E.IDENTITY, identity=Identity(model="m", revision="r2"), **identity)
    p = Play("identity", server=config("server", identity=Identity(**mine)))
    p.settle()
    words_ = cache(1)
    transfer = p.open("client", words_)
    p.settle()
    manifest, _ = p.sent[transfer]
    told = {f"{transfer:032x}": complete(manifest, words_, tiles_of(manifest, 0))}
    s.good("a revision that is not stated matches", p, "server", {"transfers": told}, identity=mine)
    rejected("an unknown codec", E.UNSUPPORTED, codecs=({"id": "gzip"},))
    rejected("a codec that the receiver did not name", E.UNSUPPORTED, server={"codecs": ("raw",)})
    rejected("a config that the codec refuses", E.UNSUPPORTED, codecs=({"id": "hq", "levels": 9},))
    rejected("a codec config with a critical key", E.UNSUPPORTED, codecs=({**CODECS[1], "!later": 1},))
    rejected("a codec config with a preset", E.UNSUPPORTED, codecs=({"id": "hq", "preset": "fast"},))
    rejected("a table that the receiver lacks", E.MISSING_TABLE, tables=(bytes(16),))
    rejected("no codec", E.PROTOCOL, codecs=())
    inexact = ({**CODECS[1], "levels": 1},)
    rejected("an anchor alone in a transfer that is not lossy", E.PROTOCOL, codecs=inexact)
    rejected("a manifest that is no CBOR", E.PROTOCOL, manifest=b"\xff\xff")
    rejected("a manifest without layers", E.PROTOCOL, manifest=_cbor.dumps({"layers": []}))
    small = Limits(session_window=8192, transfer_window=4096, layers=1)
    rejected("more layers than the limit", E.LIMIT, server={"limits": small})
    small = Limits(session_window=8192, transfer_window=4096, tokens=23)
    rejected("more tokens than the limit", E.LIMIT, server={"limits": small})
    small = Limits(session_window=8192, transfer_window=4096, transfer_bytes=100)
    rejected("more bytes than the limit", E.LIMIT, server={"limits": small})
    small = Limits(session_window=8192, transfer_window=4096, transfers=1)
    p = Play("many", server=config("server", limits=small))
    p.settle()
    body = {"manifest": manifest_of(words).to_bytes(), "fetch": b""}
    p.say("client", control(3, body))
    p.answer("server")
    p.say("client", control(3, body, transfer=b"\x7f" * 16))
    p.answer("server")
    told = {
        name: {"outcome": "receiving", "corrupt": 0, "restarted": 0, "tiles": []},
        "7f" * 16: {"outcome": "rejected", "code": 11},
    }
    s.good("more transfers than the limit", p, "server", {"transfers": told}, "reject", "hostile")


def _receivers(s: Sessions) -> None:
    """What a sender makes of a receiver that is played by hand."""
    s.f.group("session", "wire-format.md, Status")
    words = cache(1)
    status = {"layers": [], "result": False, "level": 7, "settled": 7, "urgent": False}
    accept = {**status, "want": [[None] * 4], "credit": [4096] * 8}
    manifest = manifest_of(words)
    key_raw = tiles_of(manifest, 0)[0]

    def play(*answers: tuple[int, dict[str, Any]]) -> tuple[Play, int, int]:
        p = Play("receiver").settle()
        transfer = p.open("client", words)
        p.answer("client")
        at = 0
        for kind, body in answers:
            at = p.say("server", control(kind, body, transfer=transfer.to_bytes(16, "big")))
            if (kind, body) is not answers[-1]:
                p.encode("client")
                p.answer("client")
        return p, at, transfer

    def bad(comment: str, *answers: tuple[int, dict[str, Any]], code: ErrorCode = E.PROTOCOL) -> None:
        p, at, _ = play(*answers)
        s.bad(comment, p, "client", code, at, "state", "sender")

    def good(comment: str, told: dict[str, Any], *answers: tuple[int, dict[str, Any]]) -> None:
        p, _, transfer = play(*answers)
        s.good(comment, p, "client", {"transfers": {f"{transfer:032x}": told}}, "sender")

    def layers(*found: list[Any]) -> dict[str, Any]:
        return {**status, "layers": list(found)}

    good("nothing is answered", {"outcome": "offered"})
    good("ACCEPT", {"outcome": "sending"}, (4, accept))
    good("ACCEPT twice", {"outcome": "sending"}, (4, accept), (4, accept))
    good("REJECT", {"outcome": "rejected", "code": 8}, (5, {"code": 8, "text": "no"}))
    good("REJECT after ACCEPT comes too late", {"outcome": "sending"}, (4, accept), (5, {"code": 8, "text": "no"}))
    good("REJECT with a code of a later version", {"outcome": "rejected", "code": 1}, (5, {"code": 999, "text": ""}))
    good("ERROR", {"outcome": "failed", "code": 18}, (4, accept), (21, {"code": 18, "text": "twice"}))
    good(
        "CANCEL of all", {"outcome": "cancelled", "code": 15}, (4, accept), (16, {"above": -1, "code": 15, "text": ""})
    )
    good("CANCEL above 0", {"outcome": "sending", "level": 0}, (4, accept), (16, {"above": 0, "code": 15, "text": ""}))
    good("a status before ACCEPT is dropped", {"outcome": "offered"}, (12, layers([9, 3, bytes(3)])))
    got = bytes((1, 1, 0)) + bytes(9)
    good("a chunk has arrived", {"outcome": "sending"}, (4, accept), (12, layers([0, 1, got])))
    good("credit that shrinks changes nothing", {"outcome": "sending"}, (4, accept), (14, {"limits": [0] * 8}))
    nack = [0, TileKey.of(key_raw).as_list(), 0, 0, 1]
    good("NACK", {"outcome": "sending"}, (4, accept), (13, {"chunks": [nack]}))
    bad("NACK of a tile that is not planned", (4, accept), (13, {"chunks": [[0, [0, 0, 1, 0, 5, 0], 0, 0, 1]]}))
    bad("NACK of a level that the tile lacks", (4, accept), (13, {"chunks": [[*nack[:2], 1, 0, 1]]}))
    bad("a status of a layer that is not planned", (4, accept), (12, layers([1, 1, bytes(3)])))
    bad("a status of too few tiles", (4, accept), (12, layers([0, 1, bytes(9)])))
    bad("a status with tiles, the plan unknown", (4, accept), (12, layers([0, 0, bytes(12)])))
    bad("a level that the tile lacks has arrived", (4, accept), (12, layers([0, 1, bytes((2, 0, 0)) + bytes(9)])))
    bad("applied and never received", (4, accept), (12, layers([0, 1, bytes((0, 1, 0)) + bytes(9)])))
    bad("a chunk that was never sent has arrived", (4, {**accept, "credit": [0] * 8}), (12, layers([0, 1, got])))
    bad("PLAN from the receiver", (4, accept), (8, _cbor.loads(plan_frame(manifest, 0)[64:], "").raw))
    bad("OPEN from the receiver, of the same transfer", (4, accept), (3, {"manifest": b"\xa0", "fetch": b""}))
