"""What is used of LMCache 0.5.6. Held to the package by check_stubs.py."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod


class EventNotifier(ABC):
    @abstractmethod
    def fileno(self) -> int: ...

    @abstractmethod
    def notify(self) -> None: ...

    @abstractmethod
    def consume(self) -> None: ...

    @abstractmethod
    def close(self) -> None: ...


class _Eventfd(EventNotifier):
    def __init__(self):
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self):
        return self._fd

    def notify(self):
        os.eventfd_write(self._fd, 1)

    def consume(self):
        os.eventfd_read(self._fd)

    def close(self):
        os.close(self._fd)


def create_event_notifier() -> EventNotifier:
    return _Eventfd()
