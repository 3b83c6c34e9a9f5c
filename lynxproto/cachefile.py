"""Dumped KV caches: one safetensors file, read and written through a memory map.

A dump is a plain safetensors file (https://huggingface.co/docs/safetensors) that other tools can read: one tensor
``layers.{index}.{part}`` of shape ``[kv_heads, tokens, head_dim]`` for each part of each layer, and in its metadata:

| key | value |
|---|---|
| ``format`` | ``lynxproto.cache/1`` |
| ``manifest`` | JSON: ``identity``, ``dtype``, ``prompt_tokens``, ``layers`` (of ``LayerSpec``), ``request_id`` |
| ``result`` | JSON, optional: ``first_token``, ``logit_gap`` |

The format is read here and not with the safetensors package because a cache must not be copied: its arrays are views
of the mapped file, and a receiver decodes straight into the file it is making.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from lynxproto.chunk import DTYPES, Part
from lynxproto.errors import CacheFileError, LynxError
from lynxproto.manifest import Identity, LayerSpec, Manifest

__all__ = ["Arrays", "Cache", "CacheFileWriter", "load_cache", "remove_abandoned", "save_cache"]

#: ``(layer, part)`` -> words ``[kv_heads, tokens, head_dim]``
Arrays = dict[tuple[int, Part], NDArray[Any]]

_FORMAT: Final = "lynxproto.cache/1"
_DTYPE_CODES: Final = {
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float8_e4m3": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "uint8": "U8",
}
_LENGTH = struct.Struct("<Q")
_MAX_HEADER: Final = 100_000_000  # the safetensors package refuses larger ones too
_RESULT_ROOM: Final = 256  # spaces left in the header, so that commit can add the result in place
_ALIGN: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A whole cache: what a dump holds, and what a peer may fetch.

    ``first_token`` and ``logit_gap`` are what prefill said of the token after the prompt, if known.
    """

    manifest: Manifest
    arrays: Arrays
    first_token: int | None = None
    logit_gap: float | None = None


def _tensor_name(layer: int, part: Part) -> str:
    return f"layers.{layer}.{part}"


def _shapes(manifest: Manifest) -> dict[tuple[int, Part], tuple[int, int, int]]:
    return {
        (layer.index, part): (layer.kv_heads, layer.tokens, layer.head_dim(part))
        for layer in manifest.layers
        for part in layer.parts
    }


def load_cache(path: str | Path) -> Cache:
    """Map a dump: the arrays are read-only views of the file, which stays mapped while they live.

    Raises :class:`~lynxproto.errors.CacheFileError` if it is not one, is broken, or cannot be read."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CacheFileError(f"cannot read {path}: {reason}; name a file that `lynxproto recv` made") from error
    header, start = _read_header(path, data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != _FORMAT:
        raise CacheFileError(
            f"{path} is a safetensors file but not a KV cache: its metadata lacks format={_FORMAT!r}; "
            "make one with lynxproto.cachefile.save_cache or `lynxproto recv -o`"
        )
    manifest = _read_manifest(path, metadata)
    first_token, logit_gap = _read_result(path, metadata)
    arrays: Arrays = {}
    for (layer, part), shape in _shapes(manifest).items():
        name = _tensor_name(layer, part)
        entry = header.pop(name, None)
        if entry is None:
            raise CacheFileError(f"{path} lacks the tensor {name!r} that its manifest names")
        expected = {"dtype": _DTYPE_CODES[manifest.dtype], "shape": list(shape)}
        if not isinstance(entry, dict) or {k: entry.get(k) for k in expected} != expected:
            raise CacheFileError(
                f"{path}: tensor {name!r} is not {expected['dtype']} {list(shape)}, as its manifest says"
            )
        words = DTYPES[manifest.dtype]
        count = shape[0] * shape[1] * shape[2]
        begin, end = _offsets(path, name, entry)
        if end - begin != count * words.itemsize:
            raise CacheFileError(f"{path}: tensor {name!r} takes {end - begin} bytes, not {count * words.itemsize}")
        if start + end > len(data):
            raise CacheFileError(
                f"{path} is truncated: {name!r} ends at byte {start + end}, the file at {len(data)}; copy it again"
            )
        arrays[layer, part] = np.frombuffer(data, words, count, start + begin).reshape(shape)
    if header:
        raise CacheFileError(f"{path} holds tensors that its manifest does not name: {', '.join(sorted(header)[:3])}")
    return Cache(manifest=manifest, arrays=arrays, first_token=first_token, logit_gap=logit_gap)


def _read_header(path: Path, data: mmap.mmap | bytes) -> tuple[dict[str, Any], int]:
    """The JSON header and the offset at which the tensors' bytes start."""
    what = f"{path} is not a KV cache: "
    if len(data) < _LENGTH.size + 2:
        raise CacheFileError(f"{what}{len(data)} bytes are too few for a safetensors file")
    (length,) = _LENGTH.unpack_from(data)
    if length > _MAX_HEADER or data[_LENGTH.size : _LENGTH.size + 1] != b"{":
        raise CacheFileError(f"{what}it does not start as a safetensors file does")
    start = _LENGTH.size + length
    if start > len(data):
        raise CacheFileError(
            f"{path} is truncated: its header ends at byte {start}, the file at byte {len(data)}; copy it again"
        )
    try:
        header = json.loads(data[_LENGTH.size : start])
    except (ValueError, RecursionError) as error:
        raise CacheFileError(f"{what}its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CacheFileError(f"{what}its header is not a JSON object")
    return header, start


def _offsets(path: Path, name: str, entry: dict[str, Any]) -> tuple[int, int]:
    offsets = entry.get("data_offsets")
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(x) is int for x in offsets):
        begin, end = offsets
        if 0 <= begin <= end:
            return begin, end
    raise CacheFileError(f"{path}: tensor {name!r} has no valid data_offsets")


def _read_manifest(path: Path, metadata: dict[str, Any]) -> Manifest:
    try:
        fields = json.loads(metadata["manifest"])
        layers = tuple(LayerSpec(**{**layer, "parts": tuple(layer["parts"])}) for layer in fields["layers"])
        return Manifest(
            identity=Identity(**fields["identity"]),
            dtype=fields["dtype"],
            layers=layers,
            prompt_tokens=fields["prompt_tokens"],
            request_id=str(fields.get("request_id", "")),
        )
    except (LynxError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CacheFileError(f"{path}: its manifest is broken ({type(error).__name__}: {error})") from error


def _read_result(path: Path, metadata: dict[str, Any]) -> tuple[int | None, float | None]:
    try:
        fields = json.loads(metadata.get("result", "{}"))
        first_token, logit_gap = fields.get("first_token"), fields.get("logit_gap")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CacheFileError(f"{path}: its result is broken ({error})") from error
    if first_token is not None and type(first_token) is not int:
        raise CacheFileError(f"{path}: first_token is {first_token!r}, not an integer")
    if logit_gap is not None and type(logit_gap) not in (int, float):
        raise CacheFileError(f"{path}: logit_gap is {logit_gap!r}, not a number")
    return first_token, logit_gap


def _create_locked(path: Path) -> int:
    """A new private file under a lock, which the map of it holds until it is gone: then nobody writes to it."""
    while True:
        made = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError):  # where there are no locks, nothing is taken for abandoned either
            fcntl.flock(made, fcntl.LOCK_EX)
        if os.fstat(made).st_nlink:
            return made
        os.close(made)  # taken for abandoned before it was locked


def remove_abandoned(folder: Path) -> int:
    """Remove the unfinished dumps in ``folder`` whose writers were killed; return how many there were."""
    removed = 0
    for path in folder.glob(f".*.{'[0-9a-f]' * 8}.part"):
        with contextlib.suppress(OSError), path.open("rb+") as file:  # locked: somebody is writing it
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed += 1
    return removed


class CacheFileWriter:
    """Makes the dump of ``manifest`` at ``path``: fill :attr:`arrays`, then :meth:`commit`.

    The arrays are views of a temporary file beside ``path``, of full size from the start, so that a full disk shows
    before any work is done. ``path`` appears only with ``commit``, whole. As a context manager it discards the file
    unless it was committed; what a killed process leaves is for :func:`remove_abandoned`.

    Raises :class:`~lynxproto.errors.CacheFileError` when the file cannot be made, or ``path`` exists (with ``replace``
    the new file takes the old one's place at once).
    """

    def __init__(self, path: str | Path, manifest: Manifest, *, replace: bool = False) -> None:
        self.path = Path(path)
        self.manifest = manifest
        if self.path.exists() and not replace:
            raise CacheFileError(f"{self.path} exists; remove it, or choose another name")
        words = DTYPES[manifest.dtype]
        self._header: dict[str, Any] = {"__metadata__": {"format": _FORMAT, "manifest": _manifest_json(manifest)}}
        offset = 0
        places: dict[tuple[int, Part], tuple[int, tuple[int, int, int]]] = {}
        for (layer, part), shape in _shapes(manifest).items():
            places[layer, part] = (offset, shape)
            end = offset + shape[0] * shape[1] * shape[2] * words.itemsize
            self._header[_tensor_name(layer, part)] = {
                "dtype": _DTYPE_CODES[manifest.dtype],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        room = _LENGTH.size + len(_json(self._header)) + _RESULT_ROOM
        self._start = -(-room // _ALIGN) * _ALIGN
        self._temporary: Path | None = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            with os.fdopen(_create_locked(self._temporary), "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, self._start + offset)
                self._map = mmap.mmap(file.fileno(), self._start + offset)
        except (OSError, ValueError) as error:
            self.discard()
            reason = getattr(error, "strerror", None) or error
            size = (self._start + offset) / 1e6
            raise CacheFileError(f"cannot make {self.path} ({size:.1f} MB): {reason}; is there room?") from error
        #: Bytes of the file.
        self.nbytes = self._start + offset
        #: ``(layer, part)`` -> words ``[kv_heads, tokens, head_dim]``, writable, zero at first.
        self.arrays: Arrays = {
            key: np.frombuffer(self._map, words, shape[0] * shape[1] * shape[2], self._start + begin).reshape(shape)
            for key, (begin, shape) in places.items()
        }

    def commit(self, *, first_token: int | None = None, logit_gap: float | None = None) -> Path:
        """Complete the file, give it its name and return that. Nobody may write to :attr:`arrays` any more."""
        if self._temporary is None:
            raise CacheFileError(f"{self.path} was committed or discarded before")
        if first_token is not None:
            self._header["__metadata__"]["result"] = _json(
                {"first_token": first_token, "logit_gap": logit_gap}
            ).decode()
        header = _json(self._header).ljust(self._start - _LENGTH.size)
        self._map[: self._start] = _LENGTH.pack(len(header)) + header
        try:
            self._map.flush()
            self._temporary.rename(self.path)
        except OSError as error:
            raise CacheFileError(f"cannot write {self.path}: {error.strerror or error}") from error
        self._temporary = None
        return self.path

    def discard(self) -> None:
        """Remove the temporary file; nothing if it was committed."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
            self._temporary = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _manifest_json(manifest: Manifest) -> str:
    fields = {
        "identity": asdict(manifest.identity),
        "dtype": manifest.dtype,
        "prompt_tokens": manifest.prompt_tokens,
        **({"request_id": manifest.request_id} if manifest.request_id else {}),
        "layers": [asdict(layer) for layer in manifest.layers],
    }
    return _json(fields).decode()


def save_cache(path: str | Path, cache: Cache, *, on_progress: Callable[[int, int], object] | None = None) -> Path:
    """Dump ``cache``; return the path. ``on_progress(done, total)`` is called with bytes after each array.

    Raises :class:`~lynxproto.errors.CacheFileError` if its arrays (words) do not match its manifest, if ``path``
    exists, or if the file cannot be made.
    """
    with CacheFileWriter(path, cache.manifest) as writer:
        if set(cache.arrays) != set(writer.arrays):
            raise CacheFileError(f"the arrays given for {path} are not those that the manifest names")
        done = 0
        for key, target in writer.arrays.items():
            source = cache.arrays[key]
            if source.shape != target.shape or source.dtype.itemsize != target.dtype.itemsize:
                raise CacheFileError(f"array {key} is {source.dtype} {source.shape}, not {target.dtype} {target.shape}")
            target[...] = source.view(target.dtype)
            done += target.nbytes
            if on_progress is not None:
                on_progress(done, cache.manifest.nbytes)
        return writer.commit(first_token=cache.first_token, logit_gap=cache.logit_gap)
