"""What earlier frames say about later ones: manifests give a DATA frame its codec's name and uncompressed size."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Final

from lynxproto import frames
from lynxproto.chunk import DTYPES, PARTS
from lynxproto.config import MAX_LEVELS, Limits
from lynxproto.errors import LynxError
from lynxproto.inspect.model import Frame, printable
from lynxproto.manifest import Manifest

__all__ = ["CODEC_NAMES", "LIMITS", "MAX_CONTROL", "MAX_EXTENSION", "Context", "describe", "plural"]

#: What is kept of one frame at most; what is longer is checked and not decoded.
MAX_CONTROL: Final = 16 << 20
MAX_EXTENSION: Final = 1 << 20
#: Sessions negotiate limits; an inspector judges by the widest that it can hold.
LIMITS: Final = Limits(
    frame_bytes=(1 << 32) - 1,
    control_bytes=MAX_CONTROL,
    transfer_bytes=1 << 62,
    layers=1 << 16,
    tokens=(MAX_EXTENSION - 4) * 8,
    tiles=1 << 20,
    positions=1 << 24,
)

#: Wire ids of the codecs that version 1 defines; spec/wire-format.md, "Codecs".
CODEC_NAMES: Final = {1: "raw", 2: "bitplane", 3: "hq"}
#: Manifests that are remembered, and bytes of them.
_MAX_MANIFESTS: Final = 256
_MAX_MANIFEST_BYTES: Final = 16 << 20


class Context:
    """Looks at frames in order and completes them."""

    def __init__(self) -> None:
        self._manifests: OrderedDict[int, tuple[Manifest, int]] = OrderedDict()
        self._bytes = 0

    def observe(self, frame: Frame) -> None:
        """Fill in what the frame alone does not tell."""
        if frame.is_data:
            self._data(frame)
        elif frame.body is not None:
            manifest = None
            if isinstance(frame.body, frames.Open):
                manifest = self._open(frame, frame.body)
            frame.note = describe(frame.body, manifest)
        elif not frame.header.known:
            frame.note = "reserved type, to be skipped" if frame.header.type & frames.IGNORABLE_TYPE else ""

    def _open(self, frame: Frame, body: frames.Open) -> Manifest | None:
        try:
            manifest = Manifest.from_bytes(body.manifest, LIMITS)
        except LynxError as error:
            frame.problem = frame.problem or str(error)
            return None
        transfer, size = frame.header.transfer, len(body.manifest)
        if transfer in self._manifests:
            self._bytes -= self._manifests.pop(transfer)[1]
        self._manifests[transfer] = (manifest, size)
        self._bytes += size
        while len(self._manifests) > 1 and (len(self._manifests) > _MAX_MANIFESTS or self._bytes > _MAX_MANIFEST_BYTES):
            self._bytes -= self._manifests.popitem(last=False)[1][1]
        return manifest

    def _data(self, frame: Frame) -> None:
        header = frame.header
        if frame.bitmap:
            frame.tokens = int.from_bytes(frame.bitmap, "little").bit_count()
        elif not header.extension_length:
            frame.tokens = max(0, header.token_stop - header.token_start)
        frame.codec = CODEC_NAMES.get(header.codec_id) or f"{header.codec_id:#06x}"
        known = self._manifests.get(header.transfer)
        if known is None:
            return
        manifest = known[0]
        if header.codec < len(manifest.codecs):
            frame.codec = printable(str(manifest.codecs[header.codec]["id"]), 16)
        try:
            dim = manifest.layer(header.layer).head_dim(PARTS[header.part])
        except (LynxError, IndexError):
            frame.problem = frame.problem or f"the manifest has no layer {header.layer}, part {header.part}"
            return
        frame.uncompressed = header.heads * frame.tokens * dim * DTYPES[manifest.dtype].itemsize


def plural(n: int, what: str) -> str:
    """``1 stripe``, ``2 stripes``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _megabytes(n: int) -> str:
    return f"{n / 1e6:.1f} MB" if n >= 1e5 else f"{n} B"


def _status(body: Any) -> str:
    applied = sum(tile.applied.bit_count() for layer in body.layers for tile in layer.tiles)
    verified = sum(tile.verified for layer in body.layers for tile in layer.tiles)
    parts = []
    if body.layers:
        first, last = body.layers[0].layer, body.layers[-1].layer
        parts.append(f"layer {first}" if first == last else f"layers {first} to {last}")
        parts.append(f"{plural(applied, 'chunk')} applied, {plural(verified, 'tile')} verified")
    if body.result:
        parts.append("has the result")
    if body.level < MAX_LEVELS - 1:
        parts.append(f"wants levels up to {body.level}")
    if body.urgent:
        parts.append("urgent")
    return ", ".join(parts) or "nothing yet"


def describe(body: frames.Body, manifest: Manifest | None = None) -> str:
    """What a control frame says, in a few words."""
    match body:
        case frames.Hello():
            joins = f", session {body.session.hex()[:8]}" if body.session else ""
            low, high = body.versions
            versions = f"version {low}" if low == high else f"versions {low} to {high}"
            codecs = " ".join(printable(c, 16) for c in body.codecs[:8])
            return f"{printable(body.name, 32)}, {versions}, stripe {body.stripe}{joins}, codecs {codecs}"
        case frames.HelloAck():
            return f"version {body.version}"
        case frames.Open():
            if manifest is None:
                return "a manifest that cannot be read"
            name = printable(manifest.identity.model, 40)
            layers = plural(len(manifest.layers), "layer")
            return f"{name}, {layers}, {manifest.prompt_tokens} tokens, {manifest.dtype}, {_megabytes(manifest.nbytes)}"
        case frames.Accept():
            return f"credit {' '.join(map(_megabytes, body.credit[:3]))}..."
        case frames.Resume() | frames.Ack():
            return _status(body)
        case frames.Plan():
            levels = sum(body.levels)
            return f"{plural(len(body.tiles), 'tile')}, {plural(levels, 'chunk')}"
        case frames.End():
            vouched = sum(bool(digest) for digest in body.digests)
            return f"{vouched} of {plural(len(body.digests), 'digest')}"
        case frames.Result():
            gap = "" if body.logit_gap is None else f", logit gap {body.logit_gap:.4g}"
            return f"first token {body.first_token}{gap}"
        case frames.Nack():
            again = sum(item.attempt for item in body.items)
            whole = f", {plural(again, 'tile')} whole" if again else ""
            return f"{plural(len(body.items), 'chunk')} to send again{whole}"
        case frames.Credit():
            return f"limits {' '.join(map(_megabytes, body.limits[:3]))}..."
        case frames.Cancel():
            which = "everything" if body.above < 0 else f"levels above {body.above}"
            return f"{which}: {body.code.name} {printable(body.text)}".rstrip()
        case frames.Closed():
            what = "the transfer" if body.end else f"levels above {body.level}"
            return f"{what}: {body.code.name} {printable(body.text)}".rstrip()
        case frames.Reject() | frames.Error() | frames.GoAway() | frames.NotFound():
            return f"{body.code.name} {printable(body.text)}".rstrip()
        case frames.Fetch():
            return f"{plural(len(body.key.blocks), 'token block')} of identity {body.key.identity.hex()[:8]}"
        case frames.Ping():
            return f"id {body.id}{', probe' if body.probe else ''}"
        case frames.Pong():
            return f"id {body.id}"
        case _:
            return ""
