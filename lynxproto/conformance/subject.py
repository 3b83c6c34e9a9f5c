"""This implementation as a program under test: a request in, an answer out. spec/conformance.md has the operations."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import xxhash

from lynxproto import _cbor, frames
from lynxproto._context import build_codec
from lynxproto._stripe import FrameReader, Target
from lynxproto.capture import FILE_HEADER_SIZE, RECORD_HEADER_SIZE, FileHeader, RecordHeader
from lynxproto.chunk import ChunkSpec, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.config import Limits
from lynxproto.conformance.plain import plain, unhex
from lynxproto.conformance.scripts import observe
from lynxproto.digest import crc32c
from lynxproto.errors import CaptureError, CodecError, LynxError, PayloadError, ProtocolError, SpecError
from lynxproto.frames import HEADER_SIZE, FrameType, Header
from lynxproto.manifest import Identity, Manifest

__all__ = ["OPERATIONS", "answer"]

Answer = dict[str, Any]

_CHUNK_FIELDS: Final = (
    "layer", "part", "level", "attempt", "head_start", "heads", "token_start", "token_stop", "codec_id", "codec",
)  # fmt: skip


def answer(request: dict[str, Any]) -> Answer:
    """The answer to one request: ``status`` is ``ok``, ``refused`` or ``unsupported``."""
    operation = OPERATIONS.get(request.get("op", ""))
    if operation is None:
        return {"status": "unsupported"}
    found = operation(request)
    return {"status": "refused" if "code" in found else "ok", **found}


def _limits(request: dict[str, Any]) -> Limits:
    return Limits(**request.get("limits", {}))


# --- checksums


def _crc32c(request: dict[str, Any]) -> Answer:
    return {"crc32c": f"{crc32c(unhex(request['data'])):08x}"}


def _xxh3_128(request: dict[str, Any]) -> Answer:
    return {"digest": xxhash.xxh3_128_hexdigest(unhex(request["data"]))}


def _identity(request: dict[str, Any]) -> Answer:
    return {"hash": Identity(**request["identity"]).hash().hex()}


def _proof(request: dict[str, Any]) -> Answer:
    client, server = unhex(request["client_hello"]), unhex(request["server_hello"])
    key = hmac.digest(unhex(request["secret"]), b"lynxproto 1 key" + unhex(request["token"]), "sha256")
    message = b"lynxproto 1 " + request["side"].encode() + len(client).to_bytes(4, "little") + client + server
    return {"mac": hmac.digest(key, message, "sha256").hex()}


# --- frames


class _Reading:
    """What a reader makes of a stream after the handshake, state apart."""

    def __init__(self, limits: Limits, size: int) -> None:
        self.limits = limits
        self.size = size
        self.found: list[Answer] = []
        self.offset = 0  # of the frame being read
        self._next = 0
        self._frame: Answer = {}

    def check_header(self, header: Header) -> None:
        header.check(self.limits)
        self._next = self.offset + HEADER_SIZE + header.extension_length + header.payload_length

    def begin_payload(self, header: Header, bitmap: bytes) -> Target | None:
        self._frame = {"type": header.type, "flags": header.flags, "transfer": f"{header.transfer:032x}"}
        self._frame["payload_length"] = header.payload_length
        if header.type == FrameType.DATA:
            header.key(bitmap).check("DATA frame")
            self._frame |= {name: getattr(header, name) for name in _CHUNK_FIELDS} | {"bitmap": bitmap.hex()}
        if header.known:
            return Target(memoryview(bytearray(header.payload_length)))
        if self._next <= self.size:
            self._end()
        return None

    def end_payload(self, header: Header, target: Target) -> None:
        whole = target.crc == header.payload_crc
        self._frame["payload_intact"] = whole
        if header.type != FrameType.DATA and whole:
            self._frame["body"] = plain(frames.parse_body(header, target.view, self.limits)._to_map())
        self._end()

    def _end(self) -> None:
        self.found.append(self._frame)
        self.offset = self._next


def _frames(request: dict[str, Any]) -> Answer:
    view = memoryview(unhex(request["data"]))
    reading = _Reading(_limits(request), view.nbytes)
    reader = FrameReader(reading)
    try:
        while view.nbytes:
            buffer = reader.get_buffer()
            n = min(buffer.nbytes, view.nbytes)
            buffer[:n] = view[:n]
            view = view[n:]
            reader.buffer_updated(n)
    except ProtocolError as error:
        return {"code": int(error.code), "offset": reading.offset}
    return {"frames": reading.found, "rest": reading.size - reading.offset}


def _manifest(request: dict[str, Any]) -> Answer:
    try:
        manifest = Manifest.from_bytes(unhex(request["data"]), _limits(request))
    except ProtocolError as error:
        return {"code": int(error.code)}
    return {"manifest": plain(_cbor.loads(manifest.to_bytes(), "manifest").raw), "bytes": manifest.nbytes}


# --- codecs


def _spec(request: dict[str, Any]) -> ChunkSpec:
    heads, tokens, head_dim = request["shape"]
    return ChunkSpec(
        part=request["part"],
        dtype=request["dtype"],
        heads=heads,
        tokens=tokens,
        head_dim=head_dim,
        layer=request.get("layer", 0),
        head_start=request.get("head_start", 0),
        token_set=TokenSet.range(0, tokens),
    )


def _decode(request: dict[str, Any]) -> Answer:
    spec = _spec(request)
    try:
        codec = build_codec(request["codec"])
    except LynxError:
        return {"code": 9}
    payloads = [unhex(payload) for payload in request["payloads"]]
    levels = []
    for level in range(len(payloads)):
        out = np.zeros(spec.shape, spec.word_dtype)
        try:
            codec.decode(spec, payloads[: level + 1], out)
        except PayloadError as error:
            return {"code": int(error.code), "level": level}
        except SpecError:  # a tile that the codec's config cannot describe
            return {"code": 2, "level": level}
        levels.append(out.tobytes().hex())
    return {"levels": levels}


def _encode(request: dict[str, Any]) -> Answer:
    spec = _spec(request)
    words = np.frombuffer(unhex(request["words"]), spec.word_dtype).reshape(spec.shape)
    try:
        return {"payloads": [bytes(payload).hex() for payload in get_codec(request["codec"]).encode(spec, words)]}
    except (CodecError, SpecError):
        return {"code": 9}


# --- captures


def _capture(request: dict[str, Any]) -> Answer:
    data = unhex(request["data"])
    offset, records = 0, []
    try:
        start = FileHeader.unpack(data).start
        offset = FILE_HEADER_SIZE
        while offset < len(data):
            if len(data) - offset < RECORD_HEADER_SIZE:
                raise CaptureError("the file ends inside a record's header")
            header = RecordHeader.unpack(data[offset : offset + RECORD_HEADER_SIZE])
            body = data[offset + RECORD_HEADER_SIZE : offset + RECORD_HEADER_SIZE + header.length]
            if len(body) < header.length:
                raise CaptureError("the file ends inside a record")
            records.append({**header._asdict(), "data": body.hex()})
            offset += RECORD_HEADER_SIZE + header.length
    except CaptureError:
        return {"code": 4, "offset": offset, "records": plain(records)}
    return {"start": plain(start), "records": plain(records)}


OPERATIONS: Final[dict[str, Callable[[dict[str, Any]], Answer]]] = {
    "crc32c": _crc32c,
    "xxh3-128": _xxh3_128,
    "identity": _identity,
    "proof": _proof,
    "frames": _frames,
    "manifest": _manifest,
    "decode": _decode,
    "encode": _encode,
    "capture": _capture,
    "session": observe,
}
