"""What is used of LMCache 0.5.6. Held to the package by check_stubs.py."""

from __future__ import annotations

from lmcache.v1.distributed.api import MemoryLayoutDesc
from lmcache.v1.distributed.serde.base import Deserializer, SerdeProcessor, Serializer


class AsyncSerdeProcessor(SerdeProcessor):
    def __init__(
        self,
        serializer: Serializer,
        deserializer: Deserializer,
        max_workers: int = 1,
    ) -> None:
        self._serializer = serializer

    def estimate_serialized_size(self, layout_desc: MemoryLayoutDesc) -> int:
        return self._serializer.estimate_serialized_size(layout_desc)

    def close(self) -> None:
        pass
