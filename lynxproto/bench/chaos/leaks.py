"""What a transfer may leave behind: nothing. Counted before and after each, in a process that does nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lynxproto._incoming import Incoming
from lynxproto._io import IOThread, Workers
from lynxproto._outgoing import Outgoing
from lynxproto._peer import Peer
from lynxproto.connection import Connection

__all__ = ["Census", "census"]

_OBJECTS = (Incoming, Outgoing, Peer, Connection, IOThread, Workers)


@dataclass(frozen=True, slots=True)
class Census:
    """Names of what is alive."""

    threads: tuple[str, ...]
    tasks: tuple[str, ...]
    descriptors: tuple[str, ...]
    objects: tuple[str, ...]
    """Sessions, transfers and what belongs to them: who holds none of these holds no buffer of a transfer either."""

    def leaks(self, before: Census) -> list[str]:
        """What is there now and was not before."""
        found = []
        for kind in self.__slots__:
            rest = list(getattr(before, kind))
            for name in getattr(self, kind):
                if name in rest:
                    rest.remove(name)
                else:
                    found.append(f"{kind[:-1]}: {name}")
        return found


def census() -> Census:
    """Count, after the collector has run. To be called on the event loop."""
    gc.collect()
    objects: list[Any] = [item for item in gc.get_objects() if isinstance(item, _OBJECTS)]
    return Census(
        threads=tuple(sorted(thread.name for thread in threading.enumerate())),
        tasks=tuple(sorted(task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task())),
        descriptors=_descriptors(),
        objects=tuple(sorted(type(item).__name__ for item in objects)),
    )


def _descriptors() -> tuple[str, ...]:
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the one that lists the folder is gone
            found.append(str(link.readlink()).split(":[")[0])
    return tuple(sorted(found))
