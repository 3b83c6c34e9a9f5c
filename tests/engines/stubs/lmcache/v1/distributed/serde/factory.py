"""What is used of LMCache 0.5.6. Held to the package by check_stubs.py."""

from __future__ import annotations

from collections.abc import Callable

from lmcache.v1.distributed.serde.base import SerdeProcessor

_REGISTRY: dict[str, Callable[[dict[str, object]], SerdeProcessor]] = {}


def register_serde_factory(name: str, factory: Callable[[dict[str, object]], SerdeProcessor]) -> None:
    if name in _REGISTRY:
        raise ValueError(f"Serde type already registered: {name!r}")
    _REGISTRY[name] = factory


def get_registered_serde_types() -> list[str]:
    return list(_REGISTRY)


def create_serde_processor(config: SerdeConfig) -> SerdeProcessor:  # noqa: F821  # duck-typed here
    return _REGISTRY[config.type](config.kwargs)
