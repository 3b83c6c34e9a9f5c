"""What a receiver keeps of its transfers in a folder, so that they go on after its process has ended.

A spool is one file for each transfer: the PLAN and DATA frames of spec/wire-format.md that have arrived, one after
the other. Every frame carries its checksums, so a spool tells nothing but the truth wherever a crash cut it: what
follows the last whole frame is dropped. Nothing is synced to the disk: the death of the process loses nothing, and what
the death of the machine loses is sent again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lynxproto import frames
from lynxproto.chunk import Tile
from lynxproto.config import Limits
from lynxproto.digest import crc32c
from lynxproto.errors import ProtocolError, StateError
from lynxproto.frames import HEADER_SIZE, FrameType, Header, HeldLayer, TileKey
from lynxproto.manifest import Manifest

__all__ = ["ResumeSecrets", "Spool", "StateFolder", "transfer_name"]

_log = logging.getLogger("lynxproto")
_SUFFIX: Final = ".spool"
_SECRET: Final = ".resume"
_DAY_S: Final = 86_400.0
#: A spool was made by this side of frames that had passed its limits.
_LIMITS: Final = Limits(frame_bytes=(1 << 32) - 1, control_bytes=1 << 31, tokens=1 << 32, tiles=1 << 31)


def transfer_name(principal: str, resume: bytes, manifest: Manifest) -> str:
    """The name of a transfer that survives sessions: a hash, which gives nothing of the secret away."""
    fields = (principal.encode(), resume, manifest.to_bytes())
    return hashlib.sha256(b"".join(len(item).to_bytes(8, "little") + item for item in fields)).hexdigest()


def _make_folder(path: Path, suffix: str, max_age: float) -> None:
    """Make the folder, and forget what nobody has used for so long. Raises :class:`~lynxproto.errors.StateError`."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in path.glob("*" + suffix):
            with contextlib.suppress(OSError):  # another process was faster
                if old.stat().st_mtime < time.time() - max_age:
                    old.unlink()
    except OSError as error:
        raise StateError(f"cannot use the state folder {path}: {error.strerror or error}") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StateError(f"cannot use the state folder {path}: it is not writable")


class ResumeSecrets:
    """A folder in which a sender keeps the secrets of unfinished transfers, for a process that goes on with them.

    Raises :class:`~lynxproto.errors.StateError` if it cannot be made or written.
    """

    def __init__(self, path: str | Path, *, max_age: float = 7 * _DAY_S) -> None:
        self.path = Path(path)
        _make_folder(self.path, _SECRET, max_age)

    def secret(self, *what: str) -> bytes:
        """The secret of the transfer that ``what`` tells apart from all others: the one that is kept, or a new one."""
        path = self._path(what)
        try:
            with contextlib.suppress(FileNotFoundError):
                kept = path.read_bytes()
                if len(kept) == frames.RESUME_KEY_SIZE:
                    return kept
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.touch(0o600)
            fresh.write_bytes(secrets.token_bytes(frames.RESUME_KEY_SIZE))
            fresh.rename(path)
            return path.read_bytes()
        except OSError as error:
            raise StateError(f"cannot keep {path}: {error.strerror or error}") from error

    def forget(self, *what: str) -> None:
        """The transfer is over."""
        with contextlib.suppress(OSError):
            self._path(what).unlink()

    def _path(self, what: tuple[str, ...]) -> Path:
        return self.path / (hashlib.sha256("\0".join(what).encode()).hexdigest() + _SECRET)


class StateFolder:
    """A folder of spools. ``max_bytes`` bounds all of them together; those unused for ``max_age`` seconds go.

    Several processes may share one. Raises :class:`~lynxproto.errors.StateError` if it cannot be made or written.
    """

    def __init__(self, path: str | Path, *, max_bytes: int = 64 << 30, max_age: float = 7 * _DAY_S) -> None:
        self.path = Path(path)
        self.max_bytes = max_bytes
        _make_folder(self.path, _SUFFIX, max_age)

    def open(self, name: str) -> Spool:
        """The spool of a transfer (:func:`transfer_name`): what was kept, or an empty one.

        Raises :class:`~lynxproto.errors.StateError` if it cannot be read or made, or another process has it open.
        """
        return Spool(self, self.path / (name + _SUFFIX))

    def used_bytes(self) -> int:
        """Bytes of all spools."""
        total = 0
        for path in self.path.glob("*" + _SUFFIX):
            with contextlib.suppress(OSError):  # another process removed it
                total += path.stat().st_size
        return total


@dataclass(slots=True)
class _Kept:
    """So many of the lowest levels of one tile; the payloads of those that were there when the spool was opened."""

    levels: int = 0
    payloads: list[memoryview] = field(default_factory=list)

    def next(self, level: int) -> bool:
        """Whether ``level`` comes after those that are kept. Level 0 comes again when the tile is sent again whole."""
        if level == 0:
            self.levels = 0
            self.payloads.clear()
        return level == self.levels


class Spool:
    """What was kept of one transfer, and where more is kept. Thread-safe."""

    def __init__(self, folder: StateFolder, path: Path) -> None:
        self.path = path
        self.error: StateError | None = None
        """Why nothing more is kept: the disk or the folder is full, or broke. The transfer itself goes on."""
        self._lock = threading.Lock()
        self._plans: dict[int, frames.Plan] = {}
        self._tiles: dict[TileKey, _Kept] = {}
        self._fd: int | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = self._read(os.fstat(self._fd).st_size)
            os.ftruncate(self._fd, size)
            os.utime(self._fd)
        except BlockingIOError as error:
            self.close()
            raise StateError(f"{path} is open in another process: it receives the same transfer") from error
        except OSError as error:
            self.close()
            raise StateError(f"cannot open {path}: {error.strerror or error}") from error
        self._room = folder.max_bytes - folder.used_bytes()

    # --- what was kept

    def held(self) -> list[HeldLayer]:
        """What ACCEPT says of it."""
        return [
            HeldLayer(layer, plan.digest(), bytes(self._tiles[key].levels for key in plan.tiles))
            for layer, plan in self._plans.items()
        ]

    def payloads(self, tile: Tile, levels: int) -> Sequence[memoryview]:
        """The lowest ``levels`` levels of a tile: views of the file."""
        return self._tiles[TileKey.of(tile)].payloads[:levels]

    def _read(self, size: int) -> int:
        """Take what is whole; returns where it ends."""
        assert self._fd is not None
        if not size:
            return 0
        data = memoryview(mmap.mmap(self._fd, size, access=mmap.ACCESS_READ))
        at = 0
        try:
            while at + HEADER_SIZE <= size:
                header = Header.unpack(data[at : at + HEADER_SIZE])
                header.check(_LIMITS)
                start = at + HEADER_SIZE + header.extension_length
                payload = data[start : start + header.payload_length]
                if payload.nbytes < header.payload_length or crc32c(payload) != header.payload_crc:
                    break
                bitmap = b""
                if header.extension_length:
                    bitmap = frames.parse_extension(bytearray(data[at + HEADER_SIZE : start]))
                self._take(header, bitmap, payload)
                at = start + header.payload_length
        except ProtocolError as error:
            _log.info("%s: %s; what follows byte %d is dropped", self.path, error, at)
        return at

    def _take(self, header: Header, bitmap: bytes, payload: memoryview) -> None:
        if header.type == FrameType.PLAN:
            plan = frames.parse_body(header, bytearray(payload), _LIMITS)
            assert isinstance(plan, frames.Plan)
            self._plan(plan)
        elif header.type == FrameType.DATA:
            kept = self._tiles.get(header.key(bitmap))
            if kept is None or not kept.next(header.level):
                raise ProtocolError(f"level {header.level} of layer {header.layer} is out of place")
            kept.payloads.append(payload)
            kept.levels += 1
        else:
            raise ProtocolError(f"a frame of type {header.type} does not belong here")

    def _plan(self, plan: frames.Plan) -> None:
        for key in self._plans[plan.layer].tiles if plan.layer in self._plans else ():
            del self._tiles[key]
        self._plans[plan.layer] = plan
        self._tiles.update((key, _Kept()) for key in plan.tiles)

    # --- keeping more

    def plan(self, transfer: int, plan: frames.Plan) -> None:
        """The tiles of a layer; what was kept of another plan of it is forgotten."""
        with self._lock:
            known = self._plans.get(plan.layer)
            if known is not plan and known == plan:
                self._plans[plan.layer] = plan  # compared once
            elif known is not plan and self._append([frames.control_frame(plan, transfer)]):
                self._plan(plan)

    def keep(self, transfer: int, tile: Tile, level: int, payload: memoryview, codec_id: int) -> None:
        """Append a chunk. Blocks for as long as the disk does."""
        key = TileKey.of(tile)
        with self._lock:
            kept = self._tiles.get(key)
            if kept is None or self._fd is None or self.error is not None or not kept.next(level):
                return
            if self._append(frames.data_frame(transfer, key, level, payload, attempt=0, codec_id=codec_id)):
                kept.levels += 1

    def _append(self, parts: Sequence[bytes | memoryview]) -> bool:
        if self._fd is None or self.error is not None:
            return False
        nbytes = sum(memoryview(part).nbytes for part in parts)
        self._room -= nbytes
        reason = "the folder holds as much as it may (max_bytes)"
        try:
            if self._room >= 0 and os.writev(self._fd, parts) == nbytes:
                return True
            if self._room >= 0:
                reason = "no space left"
        except OSError as error:
            reason = error.strerror or str(error)
        self.error = StateError(f"{self.path}: {reason}; from here on the transfer cannot go on after a restart")
        _log.warning("%s", self.error)
        return False

    def close(self) -> None:
        """Stop writing; the file stays. Idempotent."""
        with self._lock:
            if self._fd is not None:
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # mappings of the file hold it too, as long as someone reads them
                os.close(self._fd)
                self._fd = None

    def discard(self) -> None:
        """The transfer is over: remove the file."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        self.close()
