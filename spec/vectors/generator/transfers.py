"""Whole transfers: both directions, every codec, losses, cancellations, resumption."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pieces import TRANSFER, File, control, data_frame, frame
from play import CODECS, HQ, PLANES, RAW, Play, cache, cut, manifest_of, tiles_of, told_tile
from said import Sessions, complete, damaged_frame, place, said_by_sender

from lynxproto.manifest import FetchKey, Want


def transfers() -> File:
    s = Sessions("sessions-transfers", "Whole transfers, at their receiver and at their sender")
    s.f.group("session", "wire-format.md, A transfer")

    def whole(
        comment: str,
        *flags: str,
        words: Any = None,
        cuts: Any = None,
        sender: str = "client",
        both: bool = True,
        alter: Any = None,
        prepare: Callable[[Play], None] | None = None,
        told: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        """A transfer that completes, seen by its receiver and, if ``both``, by its sender."""
        receiver = "server" if sender == "client" else "client"
        words = words or cache()
        play = Play(comment)
        if prepare:
            prepare(play)
        play.settle()
        if alter:
            play.alter = alter
        transfer = play.open(sender, words, cuts, **more)
        play.settle()
        manifest, _ = play.sent[transfer]
        tiles = [t for spec in manifest.layers for t in tiles_of(manifest, spec.index, cuts)]
        expected = complete(manifest, words, tiles, **(told or {}))
        assert play.received[receiver][transfer].outcome == "complete", comment
        name = f"{transfer:032x}"
        s.good(comment, play, receiver, {"transfers": {name: expected}}, *flags)
        if both:
            s.good(
                f"{comment}; its sender", play, sender, {"transfers": {name: {"outcome": "complete"}}}, "sender", *flags
            )

    whole("raw tiles and hq tiles of three levels")
    whole("from the server to the client", sender="server")
    whole("two layers of two heads", words=cache(2, 2, 20, 6))
    whole("bit planes", cuts=((range(24), PLANES),))
    whole("hq in two levels", codecs=(CODECS[0], {**CODECS[1], "levels": 2}))
    whole("explicit token sets", cuts=(((0, 2, 3), RAW), ((1, 5, 23), PLANES), ((4, *range(6, 23)), HQ)), both=False)
    whole("tiles of one token", words=cache(1, 1, 4, 2), cuts=tuple(((t,), RAW) for t in range(4)))
    whole("a window of later tokens", words=cache(1, 1, 24, 8), prompt_tokens=1000)

    def twice(side: str, one: bytes) -> list[bytes]:
        return [one, one] if side == "client" else [one]

    whole("every frame twice", "order", alter=twice)

    def greased(side: str, one: bytes) -> list[bytes]:
        return [frame(0x8000 + 31 * (len(one) % 1024) + 27, b"grease", flags=0x55), one]

    whole("a reserved frame before each", "grease", alter=greased)
    damaged: list[bytes] = []

    def damage(side: str, one: bytes) -> list[bytes]:
        if side == "client" and one[6] == 9 and len(damaged) < 2:
            damaged.append(one)
            return [damaged_frame(one)]
        return [one]

    whole("two damaged chunks come again", "corrupt", alter=damage, told={"corrupt": 2})
    once: list[bytes] = []

    def wrong(side: str, one: bytes) -> list[bytes]:
        """The words of a raw tile change, and its checksum with them: the digest tells."""
        if side == "client" and one[6] == 9 and one[48] == 1 and not once:
            once.append(one)
            payload = damaged_frame(one)[64:]
            fields = dict(zip(("layer", "head_start", "heads", "token_start", "token_stop"), place(one), strict=True))
            return [data_frame(payload, part=one[10], transfer=one[16:32], codec_id=1, codec=0, **fields)]
        return [one]

    whole("a tile whose digest differs is sent again whole", "corrupt", alter=wrong, told={"restarted": 1})
    first: list[bytes] = []

    def refused(side: str, one: bytes) -> list[bytes]:
        """The payload of an hq tile's anchor says mode 2."""
        if side == "client" and one[6] == 9 and one[48] == 3 and one[11] == 0 and not first:
            first.append(one)
            payload = b"\2" + one[65:]
            fields = dict(zip(("layer", "head_start", "heads", "token_start", "token_stop"), place(one), strict=True))
            return [data_frame(payload, part=one[10], transfer=one[16:32], codec_id=3, codec=1, **fields)]
        return [one]

    whole("a tile whose payload is refused is sent again whole", "corrupt", alter=refused, told={"restarted": 1})
    _reordered(s)
    _partial(s)
    _split(s)
    _resumed(s)
    _two(s)
    _fetch(s)
    return s.f


def _reordered(s: Sessions) -> None:
    """All frames of a sender after ACCEPT, in other orders."""
    words = cache(2)
    for comment, key in (
        ("residuals before anchors", lambda one: (one[6] == 9, -one[11])),
        ("layers backwards", lambda one: (one[6] == 9, -one[32])),
        ("END and RESULT before PLAN, PLAN before DATA", lambda one: {11: 0, 10: 1, 8: 2}.get(one[6], 3)),
        ("DATA before PLAN and END", lambda one: one[6] != 9),
        ("everything backwards", None),
    ):
        play = Play(comment).settle()
        manifest = manifest_of(words)
        tiles = [t for layer in (0, 1) for t in tiles_of(manifest, layer)]
        play.say("client", control(3, {"manifest": manifest.to_bytes(), "fetch": b""}))
        play.answer("server")
        told = said_by_sender(manifest, words)
        told = sorted(told, key=key) if key else told[::-1]
        play.say("client", b"".join(told))
        play.answer("server")
        expected = complete(manifest, words, tiles)
        s.good(comment, play, "server", {"transfers": {TRANSFER.hex(): expected}}, "order", "priority")


def _partial(s: Sessions) -> None:
    """Receivers that want less, senders that give less."""
    words = cache(2)
    manifest = manifest_of(words)
    tiles = [t for layer in (0, 1) for t in tiles_of(manifest, layer)]
    for comment, wants, level in (
        ("only level 0 is wanted", [Want(levels=1)], {0: 0, 1: 0}),
        ("only levels 0 and 1 are wanted", [Want(levels=2)], {0: 1, 1: 1}),
        ("only layer 1 is wanted", [Want(layers=(1, 2))], {1: 9}),
        ("layer 0 whole, of layer 1 the anchors", [Want(layers=(0, 1)), Want(levels=1)], {0: 9, 1: 0}),
        ("nothing is wanted", [], {}),
    ):
        play = Play(comment)
        play.wants = wants
        play.settle()
        transfer = play.open("client", words)
        play.settle()
        told = [told_tile(manifest, words, t, level[t.layer]) for t in tiles if t.layer in level]
        expected = {**complete(manifest, words, ()), "tiles": told}
        s.good(comment, play, "server", {"transfers": {f"{transfer:032x}": expected}})
        s.good(
            f"{comment}; its sender",
            play,
            "client",
            {"transfers": {f"{transfer:032x}": {"outcome": "complete"}}},
            "sender",
        )
    holes = (((0, 2, 3), RAW), ((1, *range(4, 24)), HQ))
    for comment, want, cuts, met in (
        ("only tokens 1 and 2 are wanted", Want(tokens=(1, 3)), None, RAW),
        ("only tokens from 4 on are wanted", Want(tokens=(4, 99)), None, HQ),
        ("a token in the range of two explicit sets is wanted: both are met", Want(tokens=(1, 2)), holes, None),
        ("a token in the range of one explicit set is wanted", Want(tokens=(5, 6)), holes, HQ),
        ("the head is wanted", Want(heads=(0, 1)), None, None),
        ("only another head is wanted", Want(heads=(1, 9)), None, PLANES),
    ):
        play = Play(comment)
        play.wants = [want]
        play.settle()
        transfer = play.open("client", words, cuts)
        play.settle()
        planned = [t for layer in (0, 1) for t in tiles_of(manifest, layer, cuts)]
        expected = complete(manifest, words, [t for t in planned if met in (None, t.codec)])
        s.good(comment, play, "server", {"transfers": {f"{transfer:032x}": expected}})
    play = Play("RESUME wants nothing").settle()
    transfer = play.open("client", words)
    play.say("client", play.collect("client"))
    play.say("server", play.collect("server"))
    status = {"layers": [], "result": False, "level": 7, "settled": 7, "urgent": False}
    play.say("server", control(15, {**status, "want": []}, transfer=transfer.to_bytes(16, "big")))
    play.settle()
    s.good(
        "the want of RESUME changes nothing",
        play,
        "server",
        {"transfers": {f"{transfer:032x}": complete(manifest, words, tiles)}},
        "resume",
    )
    lossy = manifest_of(words, codecs=(CODECS[0], {**CODECS[1], "levels": 1}), lossy=True)
    play = Play("lossy").settle()
    transfer = play.open("client", words, codecs=lossy.codecs, lossy=True)
    play.settle()
    expected = complete(lossy, words, ())
    expected["tiles"] = [told_tile(lossy, words, t, verified=False) for t in tiles]
    s.good(
        "a lossy transfer of anchors alone, without digests",
        play,
        "server",
        {"transfers": {f"{transfer:032x}": expected}},
    )
    for by, above in (("server", 0), ("client", 0), ("server", 1)):
        play = Play(f"cancel {by} {above}").settle()
        transfer = play.open("client", words)
        play.say("client", play.collect("client"))  # OPEN
        play.say("server", play.collect("server"))  # ACCEPT
        play.sides[by].cancel(transfer, 0.0, above)
        play.say(by, play.collect(by))
        play.settle()
        expected = {**complete(manifest, words, ()), "level": above}
        expected["tiles"] = [told_tile(manifest, words, t, above) for t in tiles]
        comment = f"the {'receiver' if by == 'server' else 'sender'} cancels levels above {above}"
        s.good(comment, play, "server", {"transfers": {f"{transfer:032x}": expected}}, "cancel")
    for by in ("server", "client"):
        play = Play(f"cancel all {by}").settle()
        transfer = play.open("client", words)
        play.say("client", play.collect("client"))
        play.say("server", play.collect("server"))
        play.sides[by].cancel(transfer, 0.0)
        play.say(by, play.collect(by))
        play.settle()
        told: dict[str, Any] = {"outcome": "cancelled", "code": 15, "corrupt": 0, "restarted": 0}
        if by == "client":  # it had said its RESULT already
            told["result"] = {"token": 17, "gap": 1.5}
        comment = f"the {'receiver' if by == 'server' else 'sender'} cancels all"
        s.good(comment, play, "server", {"transfers": {f"{transfer:032x}": told}}, "cancel")
        if by == "server":
            told = {"outcome": "cancelled", "code": 15}
            s.good(
                f"{comment}; its sender", play, "client", {"transfers": {f"{transfer:032x}": told}}, "cancel", "sender"
            )


def _split(s: Sessions) -> None:
    """The same transfer, its bytes cut in other places."""
    words = cache(1, 1, 24, 8)
    for size in (1, 7, 63, 64, 65, 1000):
        play = Play("split").settle()
        transfer = play.open("client", words)
        play.settle()
        script = []
        for step in play.script:
            data = step["data"]
            few = (
                size > 1 or sum(len(other["data"]) for other in script) < 1500
            )  # bytes one by one: the handshake is enough
            pieces = [data[i : i + size] for i in range(0, len(data), size)] if few else [data]
            script += [{**step, "data": piece} for piece in pieces] if step["from"] == "client" else [step]
        play.script = script
        manifest, _ = play.sent[transfer]
        expected = complete(manifest, words, tiles_of(manifest, 0))
        s.good(f"in pieces of {size} bytes", play, "server", {"transfers": {f"{transfer:032x}": expected}}, "split")


def _resumed(s: Sessions) -> None:
    """Stripes that end in the middle."""
    words = cache(2)
    manifest = manifest_of(words)
    tiles = [t for layer in (0, 1) for t in tiles_of(manifest, layer)]
    for comment, lost, half in (
        ("between two frames", 5, False),
        ("inside a frame", 5, True),
        ("after OPEN", 0, False),
    ):
        play = Play(f"resume {comment}").settle()
        transfer = play.open("client", words)
        play.say("client", play.collect("client"))
        play.say("server", play.collect("server"))
        play.encode("client")
        frames = cut(play.collect("client"))
        heard = b"".join(frames[:lost]) + (frames[lost][:100] if half else b"")
        if heard:
            play.say("client", heard)
        play.lose(0)
        play.stripe(1)
        play.settle()
        expected = complete(manifest, words, tiles)
        s.good(
            f"a stripe ends {comment}, and another takes over",
            play,
            "server",
            {"transfers": {f"{transfer:032x}": expected}},
            "resume",
        )
    play = Play("two stripes").settle()
    play.stripe(1)
    play.settle()
    transfer = play.open("client", words)
    play.say("client", play.collect("client"))
    play.say("server", play.collect("server"))
    play.encode("client")
    frames = cut(play.collect("client")) + cut(play.collect("client", 1))
    play.say("client", b"".join(frames[::2]), 1)
    play.answer("server", 1)
    play.say("client", b"".join(frames[1::2]), 0)
    play.answer("server", 0)
    expected = complete(manifest, words, tiles)
    s.good("frames on two stripes", play, "server", {"transfers": {f"{transfer:032x}": expected}}, "resume", "order")


def _two(s: Sessions) -> None:
    play = Play("two at a time").settle()
    one, other = cache(1), cache(1, 1, 16, 4)
    first, second = play.open("client", one), play.open("server", other)
    play.settle()
    manifest, _ = play.sent[first]
    expected = {
        f"{first:032x}": complete(manifest, one, tiles_of(manifest, 0)),
        f"{second:032x}": {"outcome": "complete"},
    }
    s.good("one transfer in each direction", play, "server", {"transfers": expected}, "sender")
    urgent = Play("urgent").settle()
    transfer = urgent.open("client", one)
    urgent.say("client", urgent.collect("client"))
    urgent.sides["server"].urgent(transfer, 0.0)
    urgent.settle()
    told = {f"{transfer:032x}": complete(manifest, one, tiles_of(manifest, 0))}
    s.good("URGENT", urgent, "server", {"transfers": told}, "priority")
    probe = Play("probe").settle()
    transfer = probe.open("client", one)
    probe.settle()
    probe.say("client", control(19, {"id": 7, "probe": True}, transfer=bytes(16)))
    probe.answer("server")
    told = {f"{transfer:032x}": complete(manifest, one, tiles_of(manifest, 0))}
    s.good("a probe after the end", probe, "server", {"transfers": told})


def _fetch(s: Sessions) -> None:
    s.f.group("session", "wire-format.md, FETCH")
    key = FetchKey(identity=bytes(16), blocks=(bytes(8),), salt=b"tenant")
    words = cache(1)
    for found in (True, False):
        play = Play(f"fetch {found}").settle()
        request = play.sides["server"].fetch(key, 0.0)
        play.step()
        play.step()
        assert play.requests
        if found:
            transfer = play.open("client", words, fetch=request)
            play.settle()
            manifest, _ = play.sent[transfer]
            told: dict[str, Any] = {f"{transfer:032x}": complete(manifest, words, tiles_of(manifest, 0))}
        else:
            play.sides["client"].not_found(request, 0.0)
            play.settle()
            told = {f"{request:032x}": {"outcome": "not found", "code": 16}}
        s.good("FETCH is answered by OPEN" if found else "FETCH finds nothing", play, "server", {"transfers": told})
