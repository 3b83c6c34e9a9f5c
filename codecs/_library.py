"""The native library as codecs use it: loading, error texts, instruction sets, threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import CodecError, ConfigError, MissingDependencyError

__all__ = [
    "ISAS",
    "Workspace",
    "address",
    "check",
    "error_text",
    "ffi",
    "instruction_set",
    "lib",
    "parallel",
    "part_count",
    "select_instruction_set",
    "workspace",
]

_ABI_VERSION: Final = 7
_BUILD_HINT: Final = "build it with `pip install -e .` (needs a C compiler) in the project's root"

try:
    from lynxproto._native import ffi, lib
except ImportError as error:
    raise MissingDependencyError(f"lynxproto's native library is missing ({error}); {_BUILD_HINT}") from error
if lib.lynx_abi_version() != _ABI_VERSION:
    raise MissingDependencyError(
        f"lynxproto's native library has ABI {lib.lynx_abi_version()}, this package needs {_ABI_VERSION}; {_BUILD_HINT}"
    )

_BYTES: Final = ffi.typeof("uint8_t *")

#: Instruction sets by name; not each of them exists on each machine.
ISAS: Final[dict[str, int]] = {
    "scalar": lib.LYNX_ISA_SCALAR,
    "avx2": lib.LYNX_ISA_AVX2,
    "avx512": lib.LYNX_ISA_AVX512,
    "neon": lib.LYNX_ISA_NEON,
}

_wanted = os.environ.get("LYNXPROTO_ISA")
if _wanted and ISAS.get(_wanted) != lib.lynx_isa():
    raise ConfigError(f"LYNXPROTO_ISA={_wanted}: no such kernels on this machine; known: {', '.join(ISAS)}")


def instruction_set() -> str:
    """Name of the instruction set whose kernels run (``LYNXPROTO_ISA`` in the environment sets the first choice)."""
    return next(name for name, number in ISAS.items() if number == lib.lynx_isa())


def select_instruction_set(name: str) -> None:
    """Run the kernels of ``name`` from now on, in the whole process. All make the same bytes.

    Raises :class:`~lynxproto.errors.ConfigError` when this machine or build has no such kernels.
    """
    if name not in ISAS or lib.lynx_isa_select(ISAS[name]) != lib.LYNX_OK:
        raise ConfigError(f"no kernels for instruction set {name!r} on this machine")


def error_text(code: int) -> str:
    """What a ``LYNX_ERR_*`` number means."""
    return bytes(ffi.string(lib.lynx_strerror(code))).decode()


def address(array: NDArray[Any], ctype: Any = _BYTES) -> Any:
    """The address of an array's first element as a C pointer; the caller keeps ``array`` alive."""
    if array.flags.c_contiguous:
        return ffi.cast(ctype, ffi.from_buffer(array))
    return ffi.cast(ctype, array.__array_interface__["data"][0])  # takes five times as long


def check(code: int) -> None:
    """Raise :class:`~lynxproto.errors.CodecError` for what can only be a mistake of ours."""
    if code != lib.LYNX_OK:
        raise CodecError(f"native library: {error_text(code)}")


class Workspace:
    """Working memory of a thread, for one call at a time: new pages would cost more than the call."""

    __slots__ = ("_plan", "_scratch", "fault", "levels", "plan", "plan_bytes", "scratch", "sizes", "view")

    def __init__(self) -> None:
        self._scratch = np.empty(lib.lynx_hq_scratch_size(), np.uint8)
        #: Addresses: of scratch memory for kernels, a plan, a fault, levels' payloads and their sizes, an array's view.
        self.scratch = ffi.cast("void *", address(self._scratch))
        self.fault = ffi.new("lynx_hq_fault *")
        self.levels = ffi.new("uint8_t *[3]")
        self.sizes = ffi.new("uint64_t[3]")
        self.view = ffi.new("lynx_view *")
        self._grow(1 << 15)

    def _grow(self, plan_bytes: int) -> None:
        self.plan_bytes = plan_bytes
        self._plan = np.empty(-(-plan_bytes // 8), np.uint64)
        self.plan = ffi.cast("void *", address(self._plan))


class _Threads(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


_threads = _Threads()


def workspace(plan_bytes: int = 0) -> Workspace:
    """The thread's own, with room for a plan of so many bytes."""
    own = _threads.workspace
    if plan_bytes > own.plan_bytes:
        own._grow(plan_bytes)
    return own


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="lynxproto-codec")


def part_count(count: int, threads: int) -> int:
    """How many parts :func:`parallel` makes of ``count`` things. Raises ConfigError for less than one thread."""
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    return min(threads, count)


def parallel(work: Callable[[int, int, int], None], count: int, parts: int) -> None:
    """Call ``work(part, first, last)`` on ranges that cover ``[0, count)``, each on a thread of its own.

    An error of any range is raised when all have ended.
    """
    if parts <= 1:
        work(0, 0, count)
        return
    cuts = [count * i // parts for i in range(parts + 1)]
    futures = [_pool().submit(work, i, a, b) for i, (a, b) in enumerate(pairwise(cuts[1:]), 1)]
    try:
        work(0, cuts[0], cuts[1])  # the caller's thread takes its share
    finally:
        wait(futures)  # even after an error: nobody may touch the caller's memory once this returns
    for future in futures:
        future.result()
