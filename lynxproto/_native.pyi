"""The cffi extension; its functions are those of native/include/*.h and native/src/ucx.h."""

from typing import Any

ffi: Any
lib: Any
