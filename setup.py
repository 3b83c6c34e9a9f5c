"""cffi's extension module is the one thing that pyproject.toml cannot name."""

from setuptools import setup

setup(cffi_modules=["native/build.py:ffi"])
