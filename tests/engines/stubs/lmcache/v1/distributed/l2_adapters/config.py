"""What is used of LMCache 0.5.6. Held to the package by check_stubs.py."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeVar

T = TypeVar("T", bound="L2AdapterConfigBase")


class L2AdapterConfigBase(ABC):
    @classmethod
    @abstractmethod
    def from_dict(cls: type[T], d: dict) -> T:
        pass

    @classmethod
    @abstractmethod
    def help(cls) -> str:
        pass


def get_l2_adapter_config_class(type_name: str) -> type[L2AdapterConfigBase]:
    raise ValueError(f"unknown L2 adapter type {type_name!r}")
