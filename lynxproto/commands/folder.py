"""A folder of dumped caches: where received ones land, and what FETCH finds."""

from __future__ import annotations

import asyncio
import os
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import xxhash
from numpy.typing import NDArray

from lynxproto.cachefile import Cache, CacheFileWriter, load_cache, remove_abandoned
from lynxproto.chunk import Part
from lynxproto.config import MAX_LEVELS
from lynxproto.errors import CacheFileError, LimitError, LynxError, NotFoundError
from lynxproto.manifest import FetchKey, Identity, Manifest, Want
from lynxproto.session import IncomingTransfer

__all__ = ["Folder", "find_caches"]

_SUFFIX = ".safetensors"


class _Landing(dict[tuple[int, Part], NDArray[Any]]):
    """The arrays of a file that is being made; ``forgotten`` is called when nobody holds them any more."""

    def __init__(self, writer: CacheFileWriter, forgotten: Callable[[CacheFileWriter], None]) -> None:
        super().__init__(writer.arrays)
        self.writer = writer
        weakref.finalize(self, forgotten, writer)


def find_caches(path: Path, suffixes: Sequence[str] = (_SUFFIX,)) -> list[Path]:
    """``path`` itself, or the caches in the directory ``path``, by name. Raises CacheFileError if there are none."""
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.iterdir() if one.suffix in suffixes and not one.name.startswith("."))
    if not found:
        raise CacheFileError(f"{path} holds no caches ({', '.join(suffixes)})")
    return found


class Folder:
    """Caches in a directory, one file each, named by request id.

    With ``quota`` (bytes), a cache that would go beyond it is refused, or (``evict``) the least recently used are
    removed. A file appears whole, or not at all. ``replace``: a cache takes the place of an older one of its id.
    ``limit``: how many may come. ``abandoned`` is called, from any thread, when a transfer ends before it is accepted.
    """

    def __init__(
        self,
        path: Path,
        *,
        quota: int | None = None,
        evict: bool = False,
        replace: bool = False,
        limit: int | None = None,
        abandoned: Callable[[], object] | None = None,
    ) -> None:
        self.path = path
        self._quota = quota
        self._evict = evict
        self._replace = replace
        self._left = limit
        self._abandoned = abandoned
        self._lock = threading.Lock()
        self._landing: set[CacheFileWriter] = set()
        self._index: dict[bytes, Path] = {}
        if path.is_dir():
            remove_abandoned(path)  # what a process that was killed left here

    @property
    def empty(self) -> bool:
        """Whether nothing came that this folder had room for."""
        return not self._landing and not self._index

    def scan(self) -> int:
        """Learn what the directory holds, for :meth:`find`; returns how many caches. What is broken is left out."""
        self._index.clear()
        if self.path.is_dir():
            for path in sorted(self.path.glob(f"*{_SUFFIX}"), key=lambda p: p.stat().st_mtime):
                try:
                    self._remember(path, load_cache(path).manifest.request_id)
                except LynxError:
                    continue
        return len(self._index)

    def _remember(self, path: Path, request_id: str) -> None:
        self._index[xxhash.xxh3_128_digest((request_id or path.stem).encode())] = path

    def allocate(self, manifest: Manifest) -> _Landing:
        """For a session's ``allocate``: a file of the cache's size, mapped.

        Raises :class:`~lynxproto.errors.CacheFileError` or, beyond the quota, :class:`~lynxproto.errors.LimitError`.
        """
        with self._lock:
            if self._left is not None:
                if self._left == 0:
                    raise CacheFileError("this receiver takes one cache and has it")
                self._left -= 1
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CacheFileError(f"cannot make {self.path}: {error.strerror or error}") from error
            self._make_room(manifest.nbytes)
            writer = CacheFileWriter(self._name(manifest.request_id), manifest, replace=self._replace)
            self._landing.add(writer)
            return _Landing(writer, self._forget)

    def _forget(self, writer: CacheFileWriter) -> None:
        """Nobody holds the arrays any more. If nobody ever waited for them, their sender left before it began."""
        if writer in self._landing:
            self._close(writer)
            if self._abandoned is not None:
                self._abandoned()

    def _close(self, writer: CacheFileWriter) -> None:
        self._landing.discard(writer)
        writer.discard()

    def _make_room(self, nbytes: int) -> None:
        if self._quota is None:
            return
        files = [(stat.st_atime, stat.st_size, path) for path in self.path.glob(f"*{_SUFFIX}") if (stat := path.stat())]
        kept, landing = sum(size for _, size, _ in files), sum(writer.nbytes for writer in self._landing.copy())
        if landing + nbytes > self._quota:  # nothing is evicted for what will not fit even so
            raise LimitError(
                f"{nbytes} bytes do not fit into the quota of {self._quota}, of which {landing} are being received; "
                "raise --quota" + (", or try again later" if landing else "")
            )
        if self._evict:
            for _, size, path in sorted(files):
                if kept + landing + nbytes <= self._quota:
                    break
                path.unlink(missing_ok=True)
                kept -= size
        if kept + landing + nbytes > self._quota:
            raise LimitError(
                f"{nbytes} bytes do not fit: {kept + landing} of the quota of {self._quota} are in use; remove caches, "
                "raise --quota, or let --evict make room"
            )

    def _name(self, request_id: str) -> Path:
        """The id comes from the peer: what is unusual in it is dropped, and told apart by a hash."""
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", request_id).strip("-")[:80] or "cache"
        if not self._replace:
            path, number = self.path / f"{stem}{_SUFFIX}", 1
            taken = {writer.path for writer in self._landing.copy()}
            while path.exists() or path in taken:
                number += 1
                path = self.path / f"{stem}-{number}{_SUFFIX}"
            return path
        if stem != request_id:
            stem += "-" + xxhash.xxh3_64_hexdigest(request_id.encode())
        return self.path / f"{stem}{_SUFFIX}"

    async def land(self, transfer: IncomingTransfer) -> Path:
        """Wait until the cache is complete, and give its file its name. Raises why it will not be."""
        landing = transfer.arrays
        assert isinstance(landing, _Landing)
        try:
            if transfer.manifest.lossy:
                await transfer.ready(level=MAX_LEVELS - 1)
            else:
                await transfer.exact()
            try:
                result = await transfer.result()
                commit = partial(landing.writer.commit, first_token=result.first_token, logit_gap=result.logit_gap)
            except NotFoundError:  # the sender knew none
                commit = partial(landing.writer.commit)
            path = await asyncio.to_thread(commit)
        finally:
            self._close(landing.writer)
        with self._lock:
            self._remember(path, transfer.manifest.request_id)
        return path

    def find(self, key: FetchKey, wants: Sequence[Want]) -> Cache | None:
        """For a session's ``on_fetch``: the cache whose id and identity a :meth:`FetchKey.of_request` states.

        The identity may be stated whole, by model and revision, or by the model alone.
        """
        if len(key.blocks) != 1 or key.salt:
            return None
        with self._lock:
            path = self._index.get(key.blocks[0])
        if path is None or not path.exists():
            return None
        cache = load_cache(path)
        identity = cache.manifest.identity
        known = (
            identity,
            Identity(model=identity.model, revision=identity.revision),
            Identity(model=identity.model),
        )
        if key.identity not in {one.hash() for one in known}:
            return None
        os.utime(path)  # it was used just now
        return cache
