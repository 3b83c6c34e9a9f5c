"""What is used of LMCache 0.5.6. Held to the package by check_stubs.py."""

from __future__ import annotations

import abc

from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey

SerdeTaskId = int


class Serializer(abc.ABC):
    @abc.abstractmethod
    def serialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> int:  # noqa: F821  # duck-typed here
        raise NotImplementedError

    @abc.abstractmethod
    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        raise NotImplementedError


class Deserializer(abc.ABC):
    @abc.abstractmethod
    def deserialize(self, src: MemoryObj, dst: MemoryObj, key: ObjectKey) -> None:  # noqa: F821  # duck-typed here
        raise NotImplementedError


class SerdeProcessor(abc.ABC):
    @abc.abstractmethod
    def close(self) -> None:
        raise NotImplementedError
