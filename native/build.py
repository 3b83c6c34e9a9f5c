"""Builds lynxproto._native from the C library in this folder (cffi, API mode, stable ABI)."""

from cffi import FFI

ffi = FFI()
ffi.cdef("int lynx_abi_version(void);")
ffi.set_source("lynxproto._native", "static int lynx_abi_version(void) { return 1; }", py_limited_api=True)
