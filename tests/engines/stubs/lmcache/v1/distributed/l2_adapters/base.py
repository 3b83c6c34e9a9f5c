"""What is used of LMCache 0.5.6. Held to the package by check_stubs.py."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.internal_api import L2StoreResult

L2TaskId = int


class L2AdapterInterface(ABC):
    def __init__(self, max_capacity_bytes: int = 0) -> None:
        self.events: list[tuple[str, list[ObjectKey], list[int]]] = []

    @abstractmethod
    def get_store_event_fd(self) -> int: ...

    @abstractmethod
    def get_lookup_and_lock_event_fd(self) -> int: ...

    @abstractmethod
    def get_load_event_fd(self) -> int: ...

    @abstractmethod
    def submit_store_task(
        self,
        keys: list[ObjectKey],
        objects: list[MemoryObj],  # noqa: F821  # duck-typed here
    ) -> L2TaskId: ...

    @abstractmethod
    def pop_completed_store_tasks(self) -> dict[L2TaskId, L2StoreResult]: ...

    @abstractmethod
    def submit_lookup_and_lock_task(
        self,
        keys: list[ObjectKey],
        group_layout_descs: dict[int, MemoryLayoutDesc],
    ) -> L2TaskId: ...

    @abstractmethod
    def query_lookup_and_lock_result(self, task_id: L2TaskId) -> Bitmap | None: ...

    @abstractmethod
    def submit_unlock(
        self,
        keys: list[ObjectKey],
    ) -> None: ...

    @abstractmethod
    def submit_load_task(
        self,
        keys: list[ObjectKey],
        objects: list[MemoryObj],  # noqa: F821  # duck-typed here
    ) -> L2TaskId: ...

    @abstractmethod
    def query_load_result(self, task_id: L2TaskId) -> Bitmap | None: ...

    def delete(self, keys: list[ObjectKey]) -> None:
        return None

    @abstractmethod
    def close(self) -> None: ...

    def report_status(self) -> dict:
        return {}

    def _notify_keys_stored(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.events.append(("stored", keys, sizes))

    def _notify_keys_accessed(self, keys: list[ObjectKey]) -> None:
        self.events.append(("accessed", keys, []))

    def _notify_keys_deleted(self, keys: list[ObjectKey], sizes: list[int]) -> None:
        self.events.append(("deleted", keys, sizes))
