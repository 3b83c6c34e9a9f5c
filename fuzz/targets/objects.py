"""Cache objects whose checksums are right and whose content is not: a named error, or words that have their digests."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from fuzz.targets.bytesource import ByteSource
from lynxproto.capture import FILE_HEADER_SIZE, RECORD_HEADER_SIZE, FileHeader, RecordHeader
from lynxproto.chunk import DTYPES
from lynxproto.codecs import get_codec
from lynxproto.digest import crc32c
from lynxproto.errors import ObjectError
from lynxproto.frames import HEADER_SIZE, Header
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.objects import ObjectCodec, Views, read_manifest

_START = FILE_HEADER_SIZE + RECORD_HEADER_SIZE
_DTYPES = ("bfloat16", "float16", "float32", "uint8")
#: Words of one part that are allocated for what an object says that it is.
_MAX_WORDS = 1 << 16


@lru_cache
def _genuine(number: int) -> tuple[Manifest, list[bytes]]:
    """A small object's manifest and frames: dtypes, and codecs that fold, that are plain, and that store."""
    dtype = _DTYPES[number % 4]
    layers = (
        LayerSpec(index=0, kv_heads=1, key_dim=16, value_dim=8, token_stop=70),
        LayerSpec(index=7, kv_heads=2, key_dim=3, value_dim=3, token_start=3, token_stop=20, parts=("opaque",)),
    )
    manifest = Manifest(
        identity=Identity(model="m", revision="1"), dtype=dtype, layers=layers, prompt_tokens=70, request_id="a name"
    )
    random = np.random.default_rng(number)
    views: Views = {
        key: (random.normal(size=v.shape) * 60).astype("i4").astype(v.dtype) for key, v in _out(manifest).items()
    }
    codec = get_codec("hq", preset=("balanced", "fast")[number // 4 % 2])
    data = b"".join(ObjectCodec(codec).encode(manifest, views))
    frames, at = [], _START
    while at < len(data):
        end = at + HEADER_SIZE + Header.unpack(data[at : at + HEADER_SIZE]).payload_length
        frames.append(data[at:end])
        at = end
    return manifest, frames


def _out(manifest: Manifest) -> Views:
    return {
        (layer.index, part): np.zeros((layer.kv_heads, layer.tokens, layer.head_dim(part)), DTYPES[manifest.dtype])
        for layer in manifest.layers
        for part in layer.parts
    }


def _sealed(frame: bytes) -> bytes:
    """The frame with the length and both checksums that belong to it."""
    head, payload = frame[:HEADER_SIZE], frame[HEADER_SIZE:]
    head = head[:12] + len(payload).to_bytes(4, "little") + head[16:56] + crc32c(payload).to_bytes(4, "little")
    return head + crc32c(head).to_bytes(4, "little") + payload


def run(data: bytes) -> None:
    """A genuine object by number, then edits of its frames: bytes, lengths, order."""
    source = ByteSource(data)
    manifest, genuine = _genuine(source.below(8))
    frames = list(genuine)
    while source and frames:
        place, edit = source.below(len(frames)), source.below(8)
        frame = bytearray(frames[place])
        if edit == 0:
            del frames[place]
            continue
        if edit == 1:
            frames.insert(source.below(len(frames) + 1), bytes(frame))
            continue
        if edit == 2:
            del frame[HEADER_SIZE + source.number(2) % (len(frame) - HEADER_SIZE + 1) :]
        elif edit == 3:
            frame += source.take(source.below(16))
        elif edit == 4:
            frame[source.below(HEADER_SIZE)] ^= source.below(256)
        else:
            at = HEADER_SIZE + source.number(2) % max(1, len(frame) - HEADER_SIZE)
            new = source.take(1 + source.below(4))
            frame[at : at + len(new)] = new
        frames[place] = bytes(frame)
    body = b"".join(map(_sealed, frames))
    made = FileHeader(0).pack() + RecordHeader(len(body), 0, 0, 0, 0).pack() + body
    codec = ObjectCodec()
    try:
        found = read_manifest(made)
    except ObjectError:
        found = manifest
    small = all(layer.words() <= _MAX_WORDS for layer in found.layers) and len(found.layers) <= 8
    for expected in (manifest, found) if small else (manifest,):
        try:
            assert codec.decode(made, expected, _out(expected)) == len(made)
        except ObjectError:
            pass
