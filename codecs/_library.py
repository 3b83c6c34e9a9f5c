"""The native library as codecs use it: loading, error texts, instruction sets, threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from itertools import pairwise
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from lynxproto.errors import ConfigError, MissingDependencyError

__all__ = ["ISAS", "address", "error_text", "ffi", "instruction_set", "lib", "parallel", "select_instruction_set"]

_ABI_VERSION: Final = 4
_BUILD_HINT: Final = "build it with `pip install -e .` (needs a C compiler) in the project's root"

try:
    from lynxproto._native import ffi, lib
except ImportError as error:
    raise MissingDependencyError(f"lynxproto's native library is missing ({error}); {_BUILD_HINT}") from error
if lib.lynx_abi_version() != _ABI_VERSION:
    raise MissingDependencyError(
        f"lynxproto's native library has ABI {lib.lynx_abi_version()}, this package needs {_ABI_VERSION}; {_BUILD_HINT}"
    )

#: Instruction sets by name; not each of them exists on each machine.
ISAS: Final[dict[str, int]] = {
    "scalar": lib.LYNX_ISA_SCALAR,
    "avx2": lib.LYNX_ISA_AVX2,
    "avx512": lib.LYNX_ISA_AVX512,
    "neon": lib.LYNX_ISA_NEON,
}

T = TypeVar("T")

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


def address(array: NDArray[Any], ctype: str = "uint8_t *") -> Any:
    """The address of an array's first element as a C pointer; the caller keeps ``array`` alive."""
    return ffi.cast(ctype, array.__array_interface__["data"][0])  # array.ctypes.data says the same, slower


_memory = threading.local()


def scratch() -> NDArray[np.uint8]:
    """Working memory for one call of a kernel: the thread's own, since new pages cost more than the call."""
    if not hasattr(_memory, "scratch"):
        _memory.scratch = np.empty(lib.lynx_hq_scratch_size(), np.uint8)
    scratch: NDArray[np.uint8] = _memory.scratch
    return scratch


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="lynxproto-codec")


def parallel(work: Callable[[int, int], T], count: int, threads: int) -> list[T]:
    """Call ``work(first, last)`` on up to ``threads`` ranges that cover ``[0, count)``; results in order.

    An error of any range is raised when all have ended.
    """
    if threads < 1:
        raise ConfigError(f"threads must be at least 1, not {threads}")
    parts = min(threads, count)
    if parts <= 1:
        return [work(0, count)]
    cuts = [count * i // parts for i in range(parts + 1)]
    futures = [_pool().submit(work, a, b) for a, b in pairwise(cuts[1:])]
    try:
        first = work(cuts[0], cuts[1])  # the caller's thread takes its share
    finally:
        wait(futures)  # even after an error: nobody may touch the caller's memory once this returns
    return [first, *(future.result() for future in futures)]
