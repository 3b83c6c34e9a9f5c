"""What stores of engines have in common: cache objects by name, in a folder that several processes may share."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from lynxproto.errors import ObjectError, StateError
from lynxproto.manifest import Manifest
from lynxproto.objects import ObjectCodec, Views

__all__ = ["ObjectFolder", "ObjectStore", "StoreCounters", "object_name", "word_type"]

_log = logging.getLogger("lynxproto")

_SUFFIX: Final = ".lynx"
_INCOMING: Final = "incoming"
_LOCK: Final = "lock"
#: Of a bounded folder, eviction leaves so much.
_KEPT: Final = 0.9
#: Seconds after which an unfinished file belongs to nobody.
_ABANDONED: Final = 3600.0
#: Buffers of one writev; below Linux's IOV_MAX of 1024.
_IOV: Final = 512

#: torch's name of a dtype -> the wire's. Words of all others travel as bytes.
_WORD_TYPES: Final = {
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.float32": "float32",
    "torch.float8_e4m3fn": "float8_e4m3",
    "torch.float8_e5m2": "float8_e5m2",
    "torch.uint8": "uint8",
}


def word_type(dtype: Any) -> str | None:
    """The wire's name of a torch dtype; None for one whose tensors have to be viewed as bytes (``uint8``)."""
    return _WORD_TYPES.get(str(dtype))


def object_name(*fields: object) -> str:
    """32 hexadecimal digits that stand for these fields (their ``repr``), collision-resistant."""
    return hashlib.blake2b("\0".join(map(repr, fields)).encode(), digest_size=16).hexdigest()


class ObjectFolder:
    """Files by name (hexadecimal digits) below ``path``. They appear whole or not at all, readable by their owner only.

    ``max_bytes`` bounds all files together; those not used for the longest time go first. Any number of threads and
    processes may use a folder at once, on one machine or on a shared file system with working ``flock``; all should
    give the same bound. Files are not synced: after a power failure one may be broken, which its CRC32C tells.

    Raises :class:`~lynxproto.errors.StateError` when the folder cannot be made.
    """

    def __init__(self, path: str | Path, *, max_bytes: int | None = None) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        self._thread_lock = threading.Lock()
        try:
            (self.path / _INCOMING).mkdir(mode=0o700, parents=True, exist_ok=True)
            self._tidy()
            if max_bytes is not None:
                with self._locked() as lock:
                    self._set_used(lock, self._evict(0))
        except OSError as error:
            raise StateError(f"cannot use {self.path} for cache objects: {error.strerror or error}") from error

    def _file(self, name: str) -> Path:
        return self.path / name[:2] / (name + _SUFFIX)

    def exists(self, name: str) -> bool:
        """Whether an object of this name is here."""
        return self._file(name).exists()

    def read(self, name: str) -> bytes | None:
        """An object's bytes, which now counts as used; None if there is none."""
        path = self._file(name)
        try:
            data = path.read_bytes()
            os.utime(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StateError(f"cannot read {path}: {error.strerror or error}") from error
        return data

    def touch(self, name: str) -> bool:
        """Count an object as used; False if there is none."""
        try:
            os.utime(self._file(name))
        except OSError:
            return False
        return True

    def write(self, name: str, pieces: Sequence[memoryview]) -> bool:
        """Keep an object, in place of an older one; False if it is larger than the whole folder may be.

        Raises :class:`~lynxproto.errors.StateError`, when the disk is full, for example.
        """
        size = sum(piece.nbytes for piece in pieces)
        if self.max_bytes is not None and size > self.max_bytes:
            return False
        path = self._file(name)
        temporary = self.path / _INCOMING / f"{name}.{secrets.token_hex(4)}"
        try:
            _write_file(temporary, pieces)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            if self.max_bytes is None:
                temporary.replace(path)
                return True
            with self._locked() as lock:
                used = self._used(lock)
                if used + size > self.max_bytes:
                    used = self._evict(size)
                used += size - _size(path)
                temporary.replace(path)
                self._set_used(lock, used)
        except OSError as error:
            raise StateError(f"cannot store {path}: {error.strerror or error}") from error
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def remove(self, name: str) -> int:
        """Forget an object; returns how many bytes it had (0: there was none).

        Raises :class:`~lynxproto.errors.StateError` where that is not allowed.
        """
        path = self._file(name)
        try:
            with contextlib.ExitStack() as stack:
                lock = None if self.max_bytes is None else stack.enter_context(self._locked())
                size = _size(path)
                path.unlink(missing_ok=True)
                if lock is not None:
                    self._set_used(lock, self._used(lock) - size)
        except OSError as error:
            raise StateError(f"cannot remove {path}: {error.strerror or error}") from error
        return size

    def clear(self) -> None:
        """Forget all objects."""
        with contextlib.ExitStack() as stack:
            lock = None if self.max_bytes is None else stack.enter_context(self._locked())
            for path in self._files():
                path.unlink(missing_ok=True)
            if lock is not None:
                self._set_used(lock, 0)

    def used(self) -> int:
        """Bytes of all objects."""
        return sum(_size(path) for path in self._files())

    def _files(self) -> Iterator[Path]:
        return self.path.glob(f"[0-9a-f][0-9a-f]/*{_SUFFIX}")

    def _tidy(self) -> None:
        """Remove what processes that died were writing."""
        for path in (self.path / _INCOMING).iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The lock's file, which holds the bytes in use; other threads and processes wait."""
        with self._thread_lock:
            lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield lock
            finally:
                os.close(lock)

    def _used(self, lock: int) -> int:
        return int.from_bytes(os.pread(lock, 8, 0), "little")

    def _set_used(self, lock: int, used: int) -> None:
        os.pwrite(lock, max(0, used).to_bytes(8, "little"), 0)

    def _evict(self, coming: int) -> int:
        """Count all objects, and remove the oldest until ``coming`` bytes fit; returns the bytes that stay."""
        assert self.max_bytes is not None
        found = []
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_size, path))
        used = sum(size for _, size, _ in found)
        if used + coming <= self.max_bytes:
            return used
        aim = min(_KEPT * self.max_bytes, self.max_bytes - coming)
        for _, size, path in sorted(found):
            if used <= aim:
                break
            path.unlink(missing_ok=True)
            used -= size
        return used


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _write_file(path: Path, pieces: Sequence[memoryview]) -> None:
    views = list(pieces)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        while views:
            written = os.writev(file, views[:_IOV])
            while views and written >= views[0].nbytes:
                written -= views.pop(0).nbytes
            if written:
                views[0] = views[0][written:]
    finally:
        os.close(file)


@dataclass(slots=True)
class StoreCounters:
    """What a store did. Bytes: ``raw`` of caches, ``stored`` of the objects that they became."""

    written: int = 0
    present: int = 0
    """Objects that were to be written and already there."""
    read: int = 0
    missing: int = 0
    broken: int = 0
    """Objects that could not be used, and were removed."""
    raw_bytes: int = 0
    stored_bytes: int = 0


class ObjectStore:
    """Caches in an :class:`ObjectFolder`, each under its manifest's ``request_id``. May be shared by threads."""

    def __init__(self, folder: ObjectFolder, codec: ObjectCodec) -> None:
        self.folder = folder
        self.codec = codec
        self._counters = StoreCounters()
        self._lock = threading.Lock()

    @property
    def counters(self) -> dict[str, int]:
        """:class:`StoreCounters` so far."""
        with self._lock:
            return asdict(self._counters)

    def _count(self, **changes: int) -> None:
        with self._lock:
            for name, change in changes.items():
                setattr(self._counters, name, getattr(self._counters, name) + change)

    def put(self, manifest: Manifest, views: Views) -> int | None:
        """Keep a cache; returns the bytes written: 0 if it was there, None if it is larger than the folder.

        Raises :class:`~lynxproto.errors.StateError` and :class:`~lynxproto.errors.SpecError`.
        """
        name = manifest.request_id
        if self.folder.touch(name):
            self._count(present=1)
            return 0
        pieces = self.codec.encode(manifest, views)
        if not self.folder.write(name, pieces):
            return None
        size = sum(piece.nbytes for piece in pieces)
        self._count(written=1, raw_bytes=manifest.nbytes, stored_bytes=size)
        return size

    def get(self, manifest: Manifest, views: Views) -> bool:
        """Restore a cache into ``views``, bit for bit; False if it is not here.

        An object that is broken or of something else is logged and removed: it is not here either, and what was
        written into ``views`` means nothing.
        """
        name = manifest.request_id
        data = self.folder.read(name)
        if data is None:
            self._count(missing=1)
            return False
        try:
            self.codec.decode(data, manifest, views)
        except ObjectError as error:
            _log.warning("cache object %s is removed from %s: %s", name, self.folder.path, error)
            self.folder.remove(name)
            self._count(broken=1)
            return False
        self._count(read=1)
        return True
