"""Engines for adapters' tests: stubs of what is used of them, or (in an environment that has them) the real ones."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

STUBS = Path(__file__).parent / "stubs"
#: Set by the make targets that run the same tests on the real packages.
REAL = "LYNXPROTO_REAL_ENGINES"


def use_engine(name: str) -> None:
    """Make ``import name`` find the stub; with the environment variable, the package that is installed."""
    if os.environ.get(REAL):
        if name in sys.modules:
            return
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{REAL} is set, and {name} is not installed"
        if name == "sglang":
            _open_sglang(spec)
    elif str(STUBS) not in sys.path:
        sys.path.insert(0, str(STUBS))


def _open_sglang(spec: ModuleSpec) -> None:
    """SGLang's package without its __init__, which wants kernels for GPUs; the modules that are used here do not.

    They import torchvision, whose build for CPUs is not on PyPI, for pictures only: an empty one takes its place.
    """
    import transformers

    assert transformers.AutoProcessor  # finds out now that there is no torchvision
    package = types.ModuleType("sglang")
    package.__path__ = list(spec.submodule_search_locations or ())
    package.__spec__ = spec
    sys.modules["sglang"] = package
    sys.meta_path.append(_Empty("torchvision"))


class _EmptyModule(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Empty(MetaPathFinder, Loader):
    """Finds a package in which there is nothing that works."""

    def __init__(self, name: str) -> None:
        self._name = name

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.partition(".")[0] == self._name else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass
