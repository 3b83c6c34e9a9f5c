"""The cffi extension; its functions are those of native/include/lynxproto.h."""

from typing import Any

ffi: Any
lib: Any
