"""What both sides of a seed are made of, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from lynxproto.bench.chaos.proxy import ChaosProxy, describe
from lynxproto.bench.chaos.scenario import Scenario
from lynxproto.cachefile import Cache
from lynxproto.chunk import ChunkSpec
from lynxproto.codecs import register_codec
from lynxproto.codecs.abc import DecodeState
from lynxproto.codecs.raw import Raw
from lynxproto.config import Config, Limits
from lynxproto.manifest import Identity, Manifest
from lynxproto.policy import Policy

__all__ = ["IDENTITY", "Dying", "Outcome", "config_of", "make_cache", "policy_of", "url_of"]

IDENTITY: Final = Identity(model="chaos")


@dataclass(slots=True)
class Outcome:
    """What became of a seed. ``sender`` and ``receiver``: ``exact``, the name of an error, ``nothing``, or ``hung``."""

    seed: int
    fault: str
    expected: tuple[tuple[str, ...], tuple[str, ...]]
    sender: str = "hung"
    receiver: str = "hung"
    said: list[str] = field(default_factory=list)
    """The errors' messages."""
    wrong: list[str] = field(default_factory=list)
    """Words that differ, late writes, errors without a name, and a sender that was told what is not true."""
    leaks: list[str] = field(default_factory=list)
    seconds: float = 0.0
    stalled: float = 0.0
    """The longest time that the process was not given the CPU when it was due, seconds."""
    starved: int = 0
    """How often the seed was run before this, and proved nothing because of that."""
    struck: list[dict[str, Any]] = field(default_factory=list)
    frames_hit: int = 0
    streams: int = 0

    @property
    def hung(self) -> bool:
        """Whether a side never ended."""
        return "hung" in (self.sender, self.receiver)

    @property
    def exact(self) -> bool:
        """Whether both sides ended with equal words."""
        return self.sender == self.receiver == "exact" and not self.wrong

    @property
    def as_expected(self) -> bool:
        """Whether each side ended as the seed had stated."""
        sender, receiver = self.expected
        return self.sender in (sender or ("exact",)) and self.receiver in (receiver or ("exact",))

    @property
    def good(self) -> bool:
        """Nothing to complain of."""
        return self.as_expected and not (self.hung or self.wrong or self.leaks)

    def note(self, proxy: ChaosProxy) -> None:
        """What the link suffered."""
        self.struck = describe(proxy.struck)
        self.frames_hit = proxy.frames_hit
        self.streams = proxy.streams


@register_codec
class Dying(Raw):
    """Stores words, until it dies of a bug, encoding or decoding, at its third call."""

    codec_id = "chaos-dying"
    wire_id = 0xC0DE

    def __init__(self, dies: str = "") -> None:
        super().__init__()
        self._dies = dies
        self._calls = 0

    @property
    def verbatim(self) -> bool:
        """False: the words must pass through :meth:`encode` and :meth:`decode`."""
        return False

    def get_config(self) -> dict[str, Any]:
        """See :class:`~lynxproto.codecs.abc.Codec`."""
        return {"id": self.codec_id, "dies": self._dies}

    def encode(self, spec: ChunkSpec, array: Any, *, levels: Any = None, threads: int = 1) -> list[Any]:
        """See :class:`~lynxproto.codecs.abc.Codec`."""
        self._die("encoding")
        return list(super().encode(spec, array, levels=levels, threads=threads))

    def decode(self, spec: ChunkSpec, levels: Any, out: Any, *, threads: int = 1) -> DecodeState:
        """See :class:`~lynxproto.codecs.abc.Codec`."""
        self._die("decoding")
        return super().decode(spec, levels, out, threads=threads)

    def _die(self, what: str) -> None:
        self._calls += what == self._dies
        if self._calls == 3:
            self._calls = 0
            raise RuntimeError(f"a bug in {what}")


def config_of(s: Scenario) -> Config:
    """Timeouts that pass quickly, and windows that are smaller than the caches."""
    return Config(
        codecs=("raw", "hq", "bitplane", Dying.codec_id),
        ping_interval=0.2 * s.patience,
        peer_timeout=0.8 * s.patience,
        session_timeout=3.0 * s.patience,
        retry_interval=0.02,
        retry_limit=0.2,
        lease=15.0 * s.patience,
        encode_ahead=1 << 17,
        limits=Limits(session_window=1 << 19, transfer_window=1 << 18),
    )


def policy_of(s: Scenario) -> Policy:
    """The policy that the seed chose, with small tiles."""
    if s.fault in ("decoder dies", "encoder dies"):
        return Policy(body={"id": Dying.codec_id, "dies": s.fault.replace("er dies", "ing")}, sinks=0, recent=0)
    raw = {"id": "raw"}
    if s.policy == "bf16":
        return Policy(body=raw, sinks=0, recent=0, tile_bytes=s.tile_bytes)
    return Policy(body={"id": "hq", "preset": s.policy}, tile_bytes=s.tile_bytes)


def make_cache(s: Scenario) -> Cache:
    """Words that look like a cache's: normal values, as bfloat16."""
    manifest = Manifest.for_cache(
        identity=IDENTITY, dtype="bfloat16", layers=s.layers, kv_heads=s.heads, head_dim=64, tokens=s.tokens
    )
    rng = np.random.default_rng(s.seed)
    arrays: Any = {
        (layer, part): (rng.standard_normal((s.heads, s.tokens, 64), np.float32).view(np.uint32) >> 16).astype("<u2")
        for layer in range(s.layers)
        for part in ("key", "value")
    }
    return Cache(manifest=manifest, arrays=arrays, first_token=s.seed, logit_gap=0.5)


def url_of(s: Scenario, folder: Path, name: str) -> str:
    """Where to listen: any free port, or a socket in ``folder``."""
    return f"unix://{folder}/{name}" if s.scheme == "unix" else "tcp://127.0.0.1:0"
