"""Builds lynxproto._native from the C library in this folder (cffi, API mode, stable ABI)."""

import re
from pathlib import Path

from cffi import FFI

_HERE = Path("native")  # setuptools runs this from the project's root and wants relative paths


def _declarations(header: str) -> str:
    """The header without what cffi's parser does not know: comments, conditionals, linkage."""
    text = re.sub(r" */\*.*?\*/", "", header, flags=re.DOTALL)
    text = text.replace("LYNX_API ", "")
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    keep = [line for line in text.splitlines() if not line.startswith("#") or re.match(r"#define \w+ \d+$", line)]
    return "\n".join(keep)


ffi = FFI()
for _name in ("include/lynxproto.h", "include/lynxproto_wire.h", "src/ucx.h"):
    ffi.cdef(_declarations((_HERE / _name).read_text()))
ffi.set_source(
    "lynxproto._native",
    '#include "lynxproto_wire.h"\n#include "ucx.h"',
    sources=sorted(str(path) for path in (_HERE / "src").glob("*.c")),
    include_dirs=[str(_HERE / "include"), str(_HERE / "src")],
    depends=sorted(str(path) for path in _HERE.glob("*/*.h")),
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-Wall"],
    py_limited_api=True,
)
