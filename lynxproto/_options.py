"""What a session does for its user: callbacks, deadlines, threads. The arguments of ``connect`` and ``listen``."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lynxproto._journal import Observe
from lynxproto.access import Authorize
from lynxproto.cachefile import Cache
from lynxproto.capture import CaptureWriter
from lynxproto.chunk import DTYPES, Part
from lynxproto.config import MAX_LEVELS
from lynxproto.errors import ConfigError
from lynxproto.linkpolicy import AutoPolicy
from lynxproto.manifest import FetchKey, Manifest, Want
from lynxproto.policy import Policy
from lynxproto.spool import StateFolder
from lynxproto.transports import Link

__all__ = ["Allocate", "Deadline", "OnFetch", "Options", "Wants", "allocate_arrays"]

Allocate = Callable[[Manifest], Mapping[tuple[int, Part], Any]]
Wants = Callable[[Manifest], Sequence[Want] | None]
OnFetch = Callable[[FetchKey, Sequence[Want]], Cache | None]


def allocate_arrays(manifest: Manifest) -> dict[tuple[int, Part], Any]:
    """The default ``allocate``: NumPy arrays of words, ``[kv_heads, tokens, head_dim]``."""
    words = DTYPES[manifest.dtype]
    return {
        (layer.index, part): np.empty((layer.kv_heads, layer.tokens, layer.head_dim(part)), words)
        for layer in manifest.layers
        for part in layer.parts
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """``level`` of all layers must be ready ``seconds`` after the transfer was accepted; ``policy`` says what if not.

    ``wait``: go on, and add the level to ``transfer.late``. ``fail``: cancel the transfer; its waiters get
    :class:`~lynxproto.errors.DeadlineError`. ``degrade``: cancel what is above the highest level that is ready and go
    on with that, with ``transfer.degraded`` set; as ``fail`` if not even level 0 is ready.
    """

    level: int
    seconds: float
    policy: Literal["wait", "fail", "degrade"] = "fail"

    def __post_init__(self) -> None:
        if not 0 <= self.level < MAX_LEVELS:
            raise ConfigError(f"Deadline.level must be in [0, {MAX_LEVELS}), not {self.level!r}")
        if not self.seconds > 0:
            raise ConfigError(f"Deadline.seconds must be positive, not {self.seconds!r}")
        if self.policy not in ("wait", "fail", "degrade"):
            raise ConfigError(f"Deadline.policy must be wait, fail or degrade, not {self.policy!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Everything of a session that is not protocol; :func:`lynxproto.listen` and ``connect`` say what each means."""

    policy: Policy | AutoPolicy | None = None
    allocate: Allocate = allocate_arrays
    wants: Wants | None = None
    on_fetch: OnFetch | None = None
    authorize: Authorize | None = None
    observe: Observe | None = None
    deadlines: Sequence[Deadline] = ()
    intermediate: bool = False
    tls: ssl.SSLContext | None = None
    insecure: bool = False
    link: Link | None = None
    stripes: int = 1
    threads: int | None = None
    connect_timeout: float = 10.0
    state: StateFolder | None = None
    capture: CaptureWriter | None = None

    def __post_init__(self) -> None:
        for name in ("stripes", "threads", "connect_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be positive, not {value!r}")
