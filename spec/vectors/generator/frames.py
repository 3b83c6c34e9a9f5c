"""Headers and control payloads: what a reader makes of a stream after its handshake, whatever the state."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import cbor2
from pieces import TRANSFER, File, control, data_frame, frame, header

from lynxproto import _cbor
from lynxproto.config import Limits
from lynxproto.conformance.schema import keys_of
from lynxproto.digest import crc32c
from lynxproto.errors import ErrorCode
from lynxproto.frames import FrameType

NOTES = {
    "grease": "reserved values that peers send at random",
    "unused": "bits and bytes that writers set to 0 and readers ignore",
    "unknown": "types, flags and keys that version 1 does not define",
    "hostile": "lengths and counts chosen to make a reader allocate, wait or overflow",
    "order": "two faults in one frame: the earlier check decides",
    "boundary": "the first or the last value that is allowed, or the next one",
    "checksum": "a CRC32C that does not match",
    "sequence": "more than one frame",
    "missing": "a required key is not there",
    "type": "a key holds a value of another type",
    "cbor": "the encoding, not the content",
    "version": "another version of the frame layout",
}
_SESSION = {1, 2, 6, 7, 19, 20, 22}


def shown(kind: int, payload: bytes, body: Any = None, flags: int = 0, transfer: bytes = TRANSFER) -> dict[str, Any]:
    """A frame as the ``frames`` operation tells it."""
    found = {"type": kind, "flags": flags, "transfer": transfer, "payload_length": len(payload)}
    return {**found, "payload_intact": True, **({} if body is None else {"body": body})}


def shown_data(payload: bytes, bitmap: bytes = b"", **given: Any) -> dict[str, Any]:
    """A DATA frame as the operation tells it."""
    fields = {"layer": 3, "part": 0, "level": 0, "attempt": 0, "head_start": 2, "heads": 2}
    fields |= {"token_start": 16, "token_stop": 32, "codec_id": 1, "codec": 0}
    return {**shown(9, payload), **fields, **given, "bitmap": bitmap}


def headers() -> File:
    f = File("headers", "Frame headers and extensions", NOTES)
    f.group("frames", "wire-format.md, Frame header")
    urgent = control(18, {})
    told = shown(18, b"\xa0", {})

    def good(comment: str, data: bytes, frames: list[Any], *flags: str, rest: int = 0, **more: Any) -> None:
        f.valid(comment, {"data": data, **more}, {"frames": frames, "rest": rest}, *flags)

    def bad(comment: str, data: bytes, code: ErrorCode, *flags: str, offset: int = 0, **more: Any) -> None:
        f.invalid(comment, {"data": data, **more}, code, *flags, offset=offset)

    good("no bytes", b"", [])
    good("one frame", urgent, [told])
    good("two frames", urgent + urgent, [told, told], "sequence")
    for cut in (1, 63, 64):
        good(f"{cut} bytes of a frame: more must come", urgent[:cut], [], "boundary", rest=cut)
    good("a whole frame and a part of another", urgent + urgent[:10], [told], "sequence", rest=10)
    for flags in (1, 0x80, 0xFF):
        greased = control(18, {}, flags=flags)
        good(f"ignorable flags {flags:#06x}", greased, [{**told, "flags": flags}], "unknown", "grease")
    good("reserved byte 35 is not 0", control(18, {}, reserved=0xA5), [told], "unused")
    junk = {"part": 255, "level": 255, "layer": 65535, "attempt": 255, "head_start": 1, "heads": 2}
    junk |= {"token_start": 9, "token_stop": 3, "codec_id": 77, "codec": 5}
    good("fields of DATA in another frame", control(18, {}, **junk), [told], "unused")
    good("transfer id of all ones", control(18, {}, transfer=b"\xff" * 16), [{**told, "transfer": b"\xff" * 16}])
    for n in (0, 1, 500, 1023):
        kind = 0x8000 + 31 * n + 27
        skipped = shown(kind, b"\x07" * n)
        del skipped["payload_intact"]
        good(f"reserved type {kind:#06x}", frame(kind, b"\x07" * n), [skipped], "grease", "unknown")
    for kind in (0x8000, 0xFFFF):
        skipped = shown(kind, b"abc")
        del skipped["payload_intact"]
        good(f"ignorable type {kind:#06x}", frame(kind, b"abc"), [skipped], "unknown")
        good("an unknown payload is not verified", frame(kind, b"abc", payload_crc=1), [skipped], "unknown", "checksum")
        both = urgent + frame(kind, b"abc") + urgent
        good(f"type {kind:#06x} between frames that are known", both, [told, skipped, told], "unknown", "sequence")
    broken = {**shown(18, b"\xa0"), "payload_intact": False}
    good("control payload with a wrong CRC32C", frame(18, b"\xa0", payload_crc=7), [broken], "checksum")
    good("what follows a corrupt payload", frame(18, b"\xa0", payload_crc=7) + urgent, [broken, told], "checksum")
    good("a corrupt payload is not parsed", frame(18, b"\xff", payload_crc=7), [{**broken}], "checksum", "order")

    payload = bytes(range(1, 13))
    good("DATA", data_frame(payload), [shown_data(payload)])
    good(
        "DATA with a wrong payload CRC32C",
        data_frame(payload, payload_crc=0),
        [{**shown_data(payload), "payload_intact": False}],
        "checksum",
    )
    for name, values in {
        "part": (1, 2, 3, 4),
        "level": (1, 7),
        "attempt": (1,),
        "layer": (0, 65535),
        "codec_id": (0, 2, 3, 0x8000, 65535),
        "codec": (65535,),
        "head_start": (0, 65535),
        "heads": (1, 65535),
        "token_start": (0, 31),
        "token_stop": (17,),
    }.items():
        for value in values:
            given = {name: value}
            good(f"DATA, {name} {value}", data_frame(payload, **given), [shown_data(payload, **given)], "boundary")
    far = {"token_start": 0xFFFFFFFE, "token_stop": 0xFFFFFFFF}
    good("DATA of the last token there can be", data_frame(payload, **far), [shown_data(payload, **far)], "boundary")
    for bitmap, stop in ((b"\x81", 24), (b"\x01\x80", 32), (b"\x05", 19), (b"\x55\x55\x01", 33)):
        given = {"token_stop": stop}
        comment = f"DATA of an explicit token set within {stop - 16} tokens"
        good(comment, data_frame(payload, bitmap, **given), [shown_data(payload, bitmap, **given)])
    good(
        "DATA and control frames",
        data_frame(payload) + urgent + data_frame(payload),
        [shown_data(payload), told, shown_data(payload)],
        "sequence",
    )

    e = ErrorCode
    for i in range(4):
        magic = bytearray(b"\xabLYX")
        magic[i] ^= 1
        bad(f"magic with byte {i} changed", control(18, {}, magic=bytes(magic)), e.FRAME_CORRUPT)
    bad("HTTP", b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n", e.FRAME_CORRUPT)
    bad("64 zero bytes", bytes(64), e.FRAME_CORRUPT)
    for bit in (32, 100, 300, 479, 480, 511):
        flipped = bytearray(urgent)
        flipped[bit // 8] ^= 1 << bit % 8
        bad(f"bit {bit} of a header flipped", bytes(flipped), e.FRAME_CORRUPT, "checksum")
    bad("the second header is broken", urgent + bytes(64), e.FRAME_CORRUPT, "sequence", offset=len(urgent))
    bad("bytes between two frames", urgent + b"\0" + urgent, e.FRAME_CORRUPT, "sequence", offset=len(urgent))
    for version in (0, 2, 255):
        bad(f"version {version}", control(18, {}, version=version), e.VERSION, "version")
    for units in (0, 7, 9, 255):
        bad(f"header of {units} units", control(18, {}, header_length=units), e.VERSION, "version")
    for kind in (0, 23, 24, 0x7FFF):
        bad(f"unknown critical type {kind:#06x}", frame(kind), e.UNKNOWN_CRITICAL, "unknown")
    for bit in range(8, 16):
        bad(f"critical flag {bit}", control(18, {}, flags=1 << bit), e.UNKNOWN_CRITICAL, "unknown")
    bad("critical flag of an unknown ignorable type", frame(0x8001, flags=0x100), e.UNKNOWN_CRITICAL, "unknown")
    for kind, name in ((9, "DATA"), (18, "URGENT"), (0x8001, "an ignorable type")):
        for length in (0xFFFFFFFF, (64 << 20) + 1 if kind == 9 else (4 << 20) + 1):
            given = {"payload_length": length}
            head = data_frame(b"", **given)[:64] if kind == 9 else header(kind, **given)
            bad(f"{name} of {length} bytes, header alone", head, e.FRAME_TOO_LARGE, "hostile")
    small = {"limits": {"frame_bytes": 12, "control_bytes": 16384}}
    good("DATA as large as the limit", data_frame(payload), [shown_data(payload)], "boundary", **small)
    bad("DATA one byte larger than the limit", data_frame(payload + b"4"), e.FRAME_TOO_LARGE, "boundary", **small)
    bad("URGENT with an extension", frame(18, b"\xa0", b"\x01abcd"), e.PROTOCOL, "hostile")
    bad("an extension of 4 GiB, header alone", header(18, extension_length=0xFFFFFFFF), e.PROTOCOL, "hostile")
    for name, value in {"level": 8, "attempt": 2, "part": 5, "heads": 0, "token_stop": 16}.items():
        bad(f"DATA, {name} {value}", data_frame(payload, **{name: value}), e.PROTOCOL, "boundary")
    bad("DATA, level 255", data_frame(payload, level=255), e.PROTOCOL, "hostile")
    bad("DATA, tokens backwards", data_frame(payload, token_stop=3), e.PROTOCOL, "hostile")
    bad("DATA without a payload", data_frame(b""), e.PROTOCOL, "boundary")
    wide = {"limits": {"tokens": 16}}
    good("DATA of as many tokens as the limit", data_frame(payload), [shown_data(payload)], "boundary", **wide)
    bad("DATA of one token more", data_frame(payload, token_stop=33), e.LIMIT, "boundary", **wide)
    bad("DATA of 4 Gi tokens", data_frame(payload, token_start=0, token_stop=0xFFFFFFFF), e.LIMIT, "hostile")
    for length in (1, 4, 5, 7, 0xFFFFFFFF):
        head = data_frame(payload, extension_length=length)[:64]
        bad(f"DATA of 16 tokens with an extension of {length} bytes, header alone", head, e.PROTOCOL, "hostile")
    bitmap = b"\x01\x80"
    extension = bitmap + (crc32c(bitmap) ^ 1).to_bytes(4, "little")
    chunk = {"layer": 3, "head_start": 2, "heads": 2, "token_start": 16, "token_stop": 32, "codec_id": 1}
    bad("extension with a wrong CRC32C", frame(9, payload, extension, **chunk), e.FRAME_CORRUPT, "checksum")
    for comment, bitmap, stop in (
        ("bitmap without the first token", b"\x02\x80", 32),
        ("bitmap without the last token", b"\x01\x40", 32),
        ("bitmap with a spare bit set", b"\x05\x04\x08", 35),
        ("bitmap of no token", b"\0\0", 32),
        ("bitmap of a contiguous set", b"\xff\xff", 32),
        ("bitmap of one token", b"\x01", 17),
    ):
        bad(comment, data_frame(payload, bitmap, token_stop=stop), e.PROTOCOL)
    bad("magic before CRC32C", control(18, {}, magic=b"LYNX", crc=0), e.FRAME_CORRUPT, "order")
    bad("CRC32C before version", control(18, {}, version=2, crc=0), e.FRAME_CORRUPT, "order", "version")
    bad("version before type", frame(23, version=2), e.VERSION, "order", "version")
    bad("type before flags and length", header(23, flags=0x100, payload_length=0xFFFFFFFF), e.UNKNOWN_CRITICAL, "order")
    bad("flags before length", header(18, flags=0x100, payload_length=0xFFFFFFFF), e.UNKNOWN_CRITICAL, "order")
    bad("length before place", data_frame(b"", level=9, payload_length=0xFFFFFFFF)[:64], e.FRAME_TOO_LARGE, "order")
    return f


_LIMITS = {
    "frame_bytes": 1 << 20,
    "control_bytes": 65536,
    "transfer_bytes": 1 << 30,
    "layers": 100,
    "tokens": 4096,
    "tiles": 1000,
    "positions": 5000,
    "transfers": 7,
    "stripes": 4,
    "session_window": 1 << 21,
    "transfer_window": 1 << 20,
}
_STATUS = {"layers": [[3, 3, bytes((7, 3, 2))]], "result": True, "level": 7, "settled": 7, "urgent": False}
_WANT = [[[0, 4], None, [16, 32], 2], [None, None, None, None]]
_BODIES: dict[int, dict[str, Any]] = {
    1: {
        "versions": [1, 1],
        "nonce": bytes(range(32)),
        "stripe": 0,
        "name": "example",
        "lease": 120.0,
        "limits": _LIMITS,
        "codecs": ["raw", "hq"],
        "features": [],
        "session": b"",
        "token": b"",
        "alive": [0, 2],
    },
    2: {"version": 1, "mac": bytes(range(32))},
    3: {"manifest": b"\xa0", "fetch": b""},
    4: {**_STATUS, "want": _WANT, "credit": [65536] * 8},
    5: {"code": 8, "text": "another model"},
    6: {"identity": bytes(16), "blocks": [bytes(8), bytes(32)], "salt": b"tenant", "want": _WANT, "lease": 0.0},
    7: {"code": 16, "text": ""},
    8: {
        "layer": 3,
        "tiles": [[0, 0, 2, 0, 16, 0], [1, 0, 2, 0, 16, 0], [0, 0, 2, 16, 24, 1, b"\x81"]],
        "levels": b"\3\3\1",
    },
    10: {"token": 17, "gap": 1.5},
    11: {"layer": 3, "digests": [bytes(range(16)), b""]},
    12: _STATUS,
    13: {"chunks": [[3, [0, 0, 2, 16, 32, 0], 1, 0, 1], [3, [0, 0, 2, 16, 24, 1, b"\x81"], 0, 1, 255]]},
    14: {"limits": [0, 1, 1 << 20, 1 << 53, (1 << 63) - 1, 5, 6, 7]},
    15: {**_STATUS, "want": []},
    16: {"above": -1, "code": 15, "text": ""},
    17: {"level": 7, "end": True, "final": [1, 2, 3, 0, 0, 0, 0, 0], "code": 0, "text": ""},
    18: {},
    19: {"id": 1, "probe": True},
    20: {"id": (1 << 63) - 1},
    21: {"code": 2, "text": "why"},
    22: {"code": 0, "text": ""},
}
#: Values of a key that are also valid; keys without an entry have none that matter.
_MORE: dict[tuple[int, str], list[Any]] = {
    (1, "versions"): [[0, 255], [1, 7]],
    (1, "secret"): ["", "a" * 64],
    (1, "session"): [bytes(16)],
    (1, "token"): [bytes(32)],
    (1, "stripe"): [1 << 32],
    (1, "name"): ["", "ü" * 256, "\U0001d11e" * 256],
    (1, "lease"): [0.001, 999999999.0],
    (1, "alive"): [[], [1 << 32]],
    (3, "fetch"): [bytes(range(16))],
    (4, "want"): [[], [[None, [0, 1], None, 8]]],
    (4, "credit"): [[0] * 8, [(1 << 63) - 1] * 8],
    (6, "blocks"): [[]],
    (6, "lease"): [3600.0],
    (6, "salt"): [b"", bytes(64)],
    (8, "levels"): [b"\1\x08\1"],
    (10, "gap"): [None, 0.0, -2.25, 1e300],
    (10, "token"): [0, (1 << 32) - 1],
    (11, "digests"): [[]],
    (12, "layers"): [[], [[3, 0, b""]], [[3, 1, bytes(3)], [4, 3, bytes(300)]], [[3, 3, bytes(3)]]],
    (12, "level"): [0],
    (13, "chunks"): [[]],
    (16, "above"): [7],
    (17, "code"): [19, 20, 65535],
    (19, "id"): [0],
    (21, "text"): ["é" * 1024],
}
#: Values of a key that have its type and size and are refused all the same.
_WORSE: dict[tuple[int, str], list[tuple[str, Any]]] = {
    (1, "lease"): [("0", 0.0), ("negative", -1.0), ("too long", 1e9), ("no number", float("nan"))],
    (1, "session"): [("of 15 bytes", bytes(15))],
    (1, "limits"): [
        ("with a 0", {"tokens": 0}),
        ("with a text", {"tokens": "many"}),
        ("with control_bytes below 16384", {"control_bytes": 16383}),
        ("with tokens of 2^63", {"tokens": 1 << 63}),
    ],
    (1, "versions"): [("with 256", [1, 256]), ("with a text", [1, "1"]), ("of one", [1])],
    (1, "codecs"): [("with a number", [1]), ("with a text of 257", ["x" * 257])],
    (3, "fetch"): [("of 8 bytes", bytes(8))],
    (4, "want"): [
        ("of 3 items", [[None, None, None]]),
        ("with an empty range", [[[4, 4], None, None, None]]),
        ("with a negative range", [[None, None, [-1, 4], None]]),
        ("with a range of 3", [[[0, 1, 2], None, None, None]]),
        ("of no level", [[None, None, None, 0]]),
        ("with a text", [[None, None, None, "1"]]),
    ],
    (4, "layers"): [
        ("with flags alone", [[3, 3]]),
        ("with flags of 256", [[3, 256, bytes(3)]]),
        ("with negative flags", [[3, -1, bytes(3)]]),
        ("with half a tile", [[3, 3, bytes(4)]]),
        ("with a text", [[3, 3, "abc"]]),
    ],
    (4, "credit"): [("negative", [-1] * 8), ("of texts", ["1"] * 8)],
    (6, "blocks"): [("of 7 bytes", [bytes(7)]), ("of 33 bytes", [bytes(33)]), ("of texts", ["12345678"])],
    (6, "lease"): [("negative", -1.0), ("too long", 1e9)],
    (8, "levels"): [("one too few", b"\3\3"), ("one too many", b"\3\3\1\1"), ("0", b"\0\3\1"), ("9", b"\x09\3\1")],
    (8, "tiles"): [
        ("of 5 numbers", [[0, 0, 2, 0, 16]] * 3),
        ("of 8 items", [[0, 0, 2, 0, 16, 0, b"\1", 0]] * 3),
        ("of part 5", [[5, 0, 2, 0, 16, 0]] * 3),
        ("without heads", [[0, 0, 0, 0, 16, 0]] * 3),
        ("without tokens", [[0, 0, 2, 16, 16, 0]] * 3),
        ("with a negative head", [[0, -1, 2, 0, 16, 0]] * 3),
        ("beyond 2^32 tokens", [[0, 0, 2, 0, 1 << 32, 0]] * 3),
        ("with an empty bitmap", [[0, 0, 2, 0, 16, 0, b""]] * 3),
        ("with a text as bitmap", [[0, 0, 2, 0, 16, 0, "ab"]] * 3),
        ("with a float", [[0, 0, 2.0, 0, 16, 0]] * 3),
        ("with a bitmap that is too short", [[0, 0, 2, 0, 16, 0, b"\x81"]] * 3),
        ("with a bitmap of all tokens", [[0, 0, 2, 0, 8, 0, b"\xff"]] * 3),
    ],
    (11, "digests"): [("of 15 bytes", [bytes(15)]), ("of texts", ["0123456789abcdef"])],
    (13, "chunks"): [
        ("of 4 items", [[3, [0, 0, 2, 16, 32, 0], 1, 0]]),
        ("of level 8", [[3, [0, 0, 2, 16, 32, 0], 8, 0, 1]]),
        ("of attempt 2", [[3, [0, 0, 2, 16, 32, 0], 1, 2, 1]]),
        ("0 times", [[3, [0, 0, 2, 16, 32, 0], 1, 0, 0]]),
        ("256 times", [[3, [0, 0, 2, 16, 32, 0], 1, 0, 256]]),
        ("of layer 65536", [[65536, [0, 0, 2, 16, 32, 0], 1, 0, 1]]),
    ],
}
_OTHER_TYPE = {"integer": "1", "text": 1, "bytes": "ab", "boolean": 0, "float": 1, "array": {}, "map": []}


def _expected(kind: int, body: dict[str, Any]) -> dict[str, Any]:
    """What a parser must know after it: unknown keys gone, defaults filled in, unknown codes as INTERNAL."""
    known = copy.deepcopy({key.name: body.get(key.name, key.default) for key in keys_of(FrameType(kind))})
    if "code" in known and known["code"] not in set(ErrorCode):
        known["code"] = 1
    if kind == 1:
        known["limits"] = {**asdict(Limits()), **{k: v for k, v in known["limits"].items() if k in _LIMITS}}
    return known


def bodies() -> File:
    f = File("bodies", "Control payloads: every key of every frame type", NOTES)
    for kind, body in _BODIES.items():
        f.group("frames", f"wire-format.md, {FrameType(kind).name}")
        name = FrameType(kind).name
        transfer = bytes(16) if kind in _SESSION - {6, 7} else TRANSFER

        def send(body: dict[str, Any], kind: int = kind, transfer: bytes = transfer) -> bytes:
            return control(kind, body, transfer=transfer)

        def good(comment: str, body: dict[str, Any], *flags: str, kind: int = kind, transfer: bytes = transfer) -> None:
            payload = _cbor.dumps(body)
            told = shown(kind, payload, _expected(kind, body), transfer=transfer)
            f.valid(comment, {"data": control(kind, body, transfer=transfer)}, {"frames": [told], "rest": 0}, *flags)

        def bad(
            comment: str, body: dict[str, Any], code: ErrorCode, *flags: str, kind: int = kind, **more: Any
        ) -> None:
            f.invalid(comment, {"data": control(kind, body), **more}, code, *flags, offset=0)

        good(name, body)
        good(f"{name} with unknown keys", {**body, "later": {"a": [1, None]}, "grease-0a0a": 7}, "unknown", "grease")
        bad(f"{name} with an unknown critical key", {**body, "!later": 1}, ErrorCode.UNKNOWN_CRITICAL, "unknown")
        for key in keys_of(FrameType(kind)):
            what = f"{name}.{key.name}"
            without = {k: v for k, v in body.items() if k != key.name}
            if key.required:
                bad(f"{what} is missing", without, ErrorCode.PROTOCOL, "missing")
            else:
                good(f"{what} is missing", without, "missing")
            bad(f"{what} of another type", {**body, key.name: _OTHER_TYPE[key.type]}, ErrorCode.PROTOCOL, "type")
            for value in _MORE.get((kind, key.name), ()):
                good(f"{what}, another value", {**body, key.name: value}, "boundary")
            for comment, value in _WORSE.get((kind, key.name), ()):
                bad(f"{what} {comment}", {**body, key.name: value}, ErrorCode.PROTOCOL, "boundary")
            if key.type == "integer":
                assert key.low is not None
                assert key.high is not None
                for value in (key.low - 1, key.high + 1):
                    bad(f"{what} = {value}", {**body, key.name: value}, ErrorCode.PROTOCOL, "boundary")
            elif key.type == "text" and key.high is not None:
                bad(
                    f"{what} one character too long",
                    {**body, key.name: "x" * (key.high + 1)},
                    ErrorCode.PROTOCOL,
                    "boundary",
                )
            elif key.type == "bytes" and key.high is not None and key.high <= 64 and (kind, key.name) != (8, "levels"):
                for size in {max(0, (key.low or 0) - 1), key.high + 1} - {0}:
                    bad(f"{what} of {size} bytes", {**body, key.name: bytes(size)}, ErrorCode.PROTOCOL, "boundary")
            elif key.type == "array" and key.low == key.high and key.high is not None:
                for size in (key.high - 1, key.high + 1):
                    bad(f"{what} of {size} items", {**body, key.name: [0] * size}, ErrorCode.PROTOCOL, "boundary")
    f.group("frames", "wire-format.md, HELLO")
    hello = {**_BODIES[1], "limits": {}}
    told = shown(1, _cbor.dumps(hello), _expected(1, hello), transfer=bytes(16))
    f.valid(
        "limits that are not stated have the default",
        {"data": control(1, hello, transfer=bytes(16))},
        {"frames": [told], "rest": 0},
    )
    hello = {**_BODIES[1], "limits": {"tokens": 5, "grease-1": 0, "later": "x"}}
    told = shown(1, _cbor.dumps(hello), _expected(1, hello), transfer=bytes(16))
    f.valid(
        "unknown limits are ignored",
        {"data": control(1, hello, transfer=bytes(16))},
        {"frames": [told], "rest": 0},
        "unknown",
        "grease",
    )
    hello = {**_BODIES[1], "limits": {"!later": 5}}
    f.invalid("an unknown critical limit", {"data": control(1, hello)}, ErrorCode.UNKNOWN_CRITICAL, "unknown", offset=0)
    _counts(f)
    _encodings(f)
    return f


def _counts(f: File) -> None:
    """Arrays against the limits of their reader."""
    f.group("frames", "wire-format.md, Control payloads")
    over = ErrorCode.LIMIT
    for kind, key, limit, value in (
        (12, "layers", "layers", [[i, 0, b""] for i in range(3)]),
        (8, "tiles", "tiles", [[0, i, 1, 0, 16, 0] for i in range(3)]),
        (11, "digests", "tiles", [bytes(16)] * 3),
        (6, "blocks", "tokens", [bytes(16)] * 3),
    ):
        body = {**_BODIES[kind], key: value} | ({"levels": b"\1\1\1"} if kind == 8 else {})
        name = f"{FrameType(kind).name}.{key}"
        told = shown(kind, _cbor.dumps(body), _expected(kind, body))
        f.valid(
            f"{name} of 3 items, limit 3",
            {"data": control(kind, body), "limits": {limit: 3}},
            {"frames": [told], "rest": 0},
            "boundary",
        )
        f.invalid(
            f"{name} of 3 items, limit 2",
            {"data": control(kind, body), "limits": {limit: 2}},
            over,
            "hostile",
            offset=0,
        )
    want = control(15, {**_BODIES[15], "want": [[None] * 4] * 4097})
    f.invalid("RESUME.want of 4097 items", {"data": want}, over, "hostile", offset=0)
    alive = control(1, {**_BODIES[1], "alive": [0] * 1025})
    f.invalid("HELLO.alive of 1025 items", {"data": alive}, over, "hostile", offset=0)


def _encodings(f: File) -> None:
    """PING, written in other ways."""
    f.group("frames", "wire-format.md, Control payloads")
    ping = bytes.fromhex("a262696401") + bytes.fromhex("6570726f6265f5")

    def told(payload: bytes) -> dict[str, Any]:
        return {"frames": [shown(19, payload, {"id": 1, "probe": True})], "rest": 0}

    for comment, text, result in (
        ("deterministic", "a2 626964 01 6570726f6265 f5", "valid"),
        ("keys in another order", "a2 6570726f6265 f5 626964 01", "valid"),
        ("integer in 2 bytes", "a2 626964 1801 6570726f6265 f5", "valid"),
        ("integer in 9 bytes", "a2 626964 1b0000000000000001 6570726f6265 f5", "valid"),
        ("length of the map in 2 bytes", "b802 626964 01 6570726f6265 f5", "valid"),
        ("length of a key in 2 bytes", "a2 7802 6964 01 6570726f6265 f5", "valid"),
        ("map of indefinite length", "bf 626964 01 6570726f6265 f5 ff", "valid"),
        ("a key in pieces", "a2 7f 6169 6164 ff 01 6570726f6265 f5", "valid"),
        ("the same key twice", "a3 626964 01 626964 01 6570726f6265 f5", "acceptable"),
    ):
        payload = bytes.fromhex(text)
        f.add(result, comment, {"data": frame(19, payload)}, told(payload), "cbor")
    for comment, text in (
        ("no payload", ""),
        ("the map ends early", "a2 626964 01 6570726f6265"),
        ("a map of 2 with 3 keys' bytes", "a2 626964 01 6570726f6265 f5 00"),
        ("one byte follows", ping.hex() + "00"),
        ("an array", "82 01 f5"),
        ("an integer", "01"),
        ("null", "f6"),
        ("a tagged map", "c1" + ping.hex()),
        ("a tag inside", "a2 626964 c001 6570726f6265 f5"),
        ("a big number", "a3 626964 01 6570726f6265 f5 6178 c2 49 010000000000000000"),
        ("an integer below -2^63", "a3 626964 01 6570726f6265 f5 6178 3b8000000000000000"),
        ("undefined", "a3 626964 01 6570726f6265 f5 6178 f7"),
        ("a simple value", "a3 626964 01 6570726f6265 f5 6178 f0"),
        ("a key that is a number", "a3 626964 01 6570726f6265 f5 01 02"),
        ("a key that is bytes", "a3 626964 01 6570726f6265 f5 4178 02"),
        ("text that is no UTF-8", "a3 626964 01 6570726f6265 f5 6178 61ff"),
        ("a break that ends nothing", "ff"),
        ("a reserved length", "a2 626964 1c 6570726f6265 f5"),
        ("an array that claims 2^64 - 1 items", "a1 6178 9bffffffffffffffff"),
        ("a byte string that claims 2^63 bytes", "a1 6178 5b8000000000000000"),
        ("a map that claims 2^32 keys", "ba ffffffff"),
        ("17 levels deep", "a3 626964 01 6570726f6265 f5 6178" + "81" * 17 + "00"),
        ("10000 levels deep", "a3 626964 01 6570726f6265 f5 6178" + "81" * 10000 + "00"),
        ("10000 levels of tags", "a3 626964 01 6570726f6265 f5 6178" + "c1" * 10000 + "00"),
    ):
        flag = "hostile" if "claims" in comment or "10000" in comment else "cbor"
        f.invalid(comment, {"data": frame(19, bytes.fromhex(text))}, ErrorCode.PROTOCOL, flag, offset=0)
    deep = bytes.fromhex("a3 626964 01 6570726f6265 f5 6178" + "81" * 15 + "00")
    f.valid("16 levels deep", {"data": frame(19, deep)}, told(deep), "cbor", "boundary")
    for bits, number in ((16, b"\xf9\x3e\x00"), (32, b"\xfa\x3f\xc0\x00\x00"), (64, b"\xfb\x3f\xf8" + bytes(6))):
        payload = b"\xa2\x65token\x11\x63gap" + number
        found = {"frames": [shown(10, payload, {"token": 17, "gap": 1.5})], "rest": 0}
        f.valid(f"a float of {bits} bits", {"data": frame(10, payload)}, found, "cbor")
    assert cbor2.loads(ping) == {"id": 1, "probe": True}
