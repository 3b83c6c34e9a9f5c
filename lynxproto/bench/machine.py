"""The machine under the benchmark: what it is, and how it is kept from disturbing the measurement."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

__all__ = ["Seconds", "Workers", "available_bytes", "calm", "cpus", "environment", "last_level_cache", "spin"]

_CPU0 = Path("/sys/devices/system/cpu/cpu0")
_DEFAULT_CACHE = 32 << 20  # where the system does not say

T = TypeVar("T")
R = TypeVar("R")


def caches() -> dict[str, int]:
    """Bytes of each cache of the first processor, by name (L1d, L1i, L2, L3...); empty where sysfs is missing."""
    found = {}
    for folder in sorted((_CPU0 / "cache").glob("index*")):
        level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{suffix}"] = int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]
    return found


def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    return max(caches().values(), default=_DEFAULT_CACHE)


def available_bytes() -> int:
    """Memory that can be used without swapping."""
    with contextlib.suppress(OSError):
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if match:
            return int(match[1]) << 10
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def cpus() -> list[int]:
    """The processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def environment() -> dict[str, Any]:
    """Processor, caches, kernels in use, versions. No date and no host name: two runs of one set-up compare equal."""
    from lynxproto.codecs._library import instruction_set

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = match[1] if match else model
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cores": len(cpus()),
        "caches_bytes": caches(),
        "instruction_set": instruction_set(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "libc": " ".join(platform.libc_ver()),
    }


@contextlib.contextmanager
def calm(*, cold_allocator: bool) -> Iterator[bool]:
    """No garbage collection, and, unless ``cold_allocator``, an allocator that keeps its memory until the process ends.

    glibc gives large blocks back to the system and gets them back as pages that the system must clear, which is charged
    to whoever allocates. A program in a steady state reuses its memory, and benchmarks of codecs warm theirs up. Yields
    whether the allocator is warm: other C libraries are left as they are.
    """
    warm = not cold_allocator and platform.libc_ver()[0] == "glibc"
    if warm:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)  # never: a large value is a limit that a working set exceeds
        libc.mallopt(mmap_threshold, 32 << 20)  # the largest that it takes
        libc.mallopt(arena_max, 1)
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield warm
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Seconds:
    """Processor time of each item, and the wall time of all: the same in sum for one worker without other load."""

    each: list[float]
    wall: float

    @property
    def processor(self) -> float:
        """Processor time of all items."""
        return sum(self.each)


class Workers:
    """``count`` threads, each pinned to a processor of its own. One worker is the calling thread."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._places = cpus()[:count]
        self._pool: ThreadPoolExecutor | None = None
        self._before: set[int] | None = None

    def __enter__(self) -> Workers:
        if not hasattr(os, "sched_setaffinity"):
            places: list[int] = []
        else:
            places = list(self._places)
            self._before = os.sched_getaffinity(0)
        if self.count == 1:
            if places:
                os.sched_setaffinity(0, places)
            return self

        def pin() -> None:
            if places:
                os.sched_setaffinity(0, {places.pop()})

        self._pool = ThreadPoolExecutor(self.count, initializer=pin)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if self._before is not None:
            os.sched_setaffinity(0, self._before)

    def run(self, work: Callable[[T], R], items: Sequence[T]) -> tuple[list[R], Seconds]:
        """Call ``work`` on each item; return the results and the time. With several workers each takes every n-th."""
        results: list[Any] = [None] * len(items)
        each = [0.0] * len(items)
        # One worker is charged what the whole process uses, so that a codec's own threads are not free.
        clock = time.process_time if self._pool is None else time.thread_time

        def share(first: int) -> None:
            for i in range(first, len(items), self.count):
                start = clock()
                results[i] = work(items[i])
                each[i] = clock() - start

        started = time.perf_counter()
        if self._pool is None:
            share(0)
        else:
            for future in [self._pool.submit(share, first) for first in range(self.count)]:
                future.result()
        return results, Seconds(each, time.perf_counter() - started)


def spin(_: object) -> None:
    """A fixed amount of arithmetic that touches no memory and runs without Python's lock: PBKDF2 of OpenSSL."""
    hashlib.pbkdf2_hmac("sha256", b"lynxproto", b"scaling", 40_000)
