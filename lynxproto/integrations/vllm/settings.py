"""What a vLLM instance says about itself and its connector: settings, model, place among tensor-parallel ranks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Self

import xxhash

from lynxproto.chunk import DTYPES
from lynxproto.config import Config, Secret
from lynxproto.errors import ConfigError
from lynxproto.manifest import Identity
from lynxproto.policy import Policy
from lynxproto.transports import client_context, server_context

__all__ = ["PROTOCOL_VERSION", "Settings", "head_range", "make_identity", "prompt_hash"]

#: Version of what this connector puts into manifests; sides of different versions refuse each other.
PROTOCOL_VERSION: Final = 1
#: Of a model's config: says nothing about the values in its cache.
_VOLATILE: Final = frozenset({"_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype"})

_POLICIES: Final = ("exact", "raw", "zstd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``kv_connector_extra_config``. Times are seconds, sizes bytes."""

    listen: str = ""
    """Decode side: where rank 0 listens (default: ``tcp://127.0.0.1:kv_port``); rank n on the port that is n higher."""
    peers: tuple[str, ...] = ()
    """Prefill side: the decode URLs that requests may name (default: any)."""
    policy: str = "exact"
    """``exact``: the hq codec in two levels; ``raw``: the words; ``zstd``: bit planes through Zstandard, any dtype."""
    whole_blocks: bool = False
    """Decode side: load whole blocks only and compute the rest, as vLLM's ExampleConnector does.

    A request's kv_transfer_params may say otherwise."""
    model: str = ""
    """Name of the model, where the two sides keep it under different paths (default: vLLM's ``--model``)."""
    revision: str = ""
    """Name of the weights (default: vLLM's ``--revision``). Sides with different weights must not have the same."""
    secret_file: str = ""
    """A file with the shared secret that peers must prove to know."""
    tls: Mapping[str, str] = field(default_factory=dict)
    """For ``tcps://``: files ``ca``, ``certificate`` and ``key``."""
    insecure: bool = False
    """Allow plaintext beyond loopback addresses."""
    stripes: int = 1
    """Parallel TCP connections to each peer."""
    threads: int = 0
    """Codec threads (0: one for each CPU)."""
    idle: float = 30.0
    """Decode side: a request that waits for a cache of which nothing has been on its way for so long has failed."""
    timeout: float = 120.0
    """A transfer that takes longer than this has failed."""
    peer_timeout: float = 10.0
    """A peer that is silent or unreachable for so long is lost."""
    lease: float = 60.0
    """Decode side: what was received, and no request asks for it for so long, is dropped."""
    buffer_bytes: int = 8 << 30
    """Copies of caches on their way, in host memory: more are refused, and the decode side computes them itself."""

    def __post_init__(self) -> None:
        if self.policy not in _POLICIES:
            raise ConfigError(f"kv_connector_extra_config: policy {self.policy!r} is not one of {', '.join(_POLICIES)}")
        for name in ("stripes", "idle", "timeout", "peer_timeout", "lease", "buffer_bytes"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"kv_connector_extra_config: {name} must be positive, not {getattr(self, name)!r}")

    @classmethod
    def of(cls, extra: Mapping[str, Any]) -> Self:
        """Check vLLM's ``kv_connector_extra_config``. Raises :class:`~lynxproto.errors.ConfigError`."""
        known = {item.name: item for item in fields(cls)}
        if unknown := sorted(set(extra) - set(known)):
            raise ConfigError(
                f"kv_connector_extra_config: unknown {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        values = dict(extra)
        for name, value in values.items():
            default = getattr(cls(), name)
            kind = (
                (list, tuple)
                if isinstance(default, tuple)
                else Mapping
                if isinstance(default, Mapping)
                else type(default)
            )
            if isinstance(default, float) and type(value) is int:
                values[name] = float(value)
            elif not isinstance(value, kind) or (type(value) is bool and not isinstance(default, bool)):
                raise ConfigError(f"kv_connector_extra_config: {name} cannot be {value!r}")
        if "peers" in values:
            values["peers"] = tuple(values["peers"])
        return cls(**values)

    def config(self) -> Config:
        """Of both sides' sessions."""
        secrets = (Secret(key=Path(self.secret_file).read_bytes().strip()),) if self.secret_file else ()
        return Config(
            name="lynxproto-vllm",
            secrets=secrets,
            peer_timeout=self.peer_timeout,
            ping_interval=self.peer_timeout / 4,
            session_timeout=self.peer_timeout,
        )

    def client_options(self) -> dict[str, Any]:
        """Of ``connect``."""
        return {
            "tls": client_context(**self.tls) if self.tls else None,
            "insecure": self.insecure,
            "stripes": self.stripes,
            "threads": self.threads or None,
            "connect_timeout": self.peer_timeout,
        }

    def server_options(self) -> dict[str, Any]:
        """Of ``listen``."""
        return {
            "tls": server_context(**dict[str, Any](self.tls)) if self.tls else None,
            "insecure": self.insecure,
            "threads": self.threads or None,
        }

    def make_policy(self, dtype: str) -> Policy:
        """How words of ``dtype`` are coded: ``exact`` needs 16-bit words, others travel as bit planes."""
        if self.policy == "raw":
            return Policy.named("raw")
        if self.policy == "exact" and dtype in ("bfloat16", "float16"):
            return Policy.named("exact")
        planes = {1: (8,), 2: (9, 7), 4: (9, 23)}[DTYPES[dtype].itemsize]
        return Policy(body={"id": "bitplane", "planes": planes, "zstd": 1}, sinks=0, recent=0)


def make_identity(vllm_config: Any, version: str, settings: Settings) -> Identity:
    """Whose cache an instance makes: model, weights, and all of the model's config that its cache depends on."""
    model = vllm_config.model_config
    config = model.hf_text_config.to_dict()
    shape = {name: value for name, value in config.items() if name not in _VOLATILE}
    shape["quantization"] = getattr(model, "quantization", None)
    return Identity(
        model=settings.model or model.model,
        revision=settings.revision or model.revision or "",
        rope_hash=_hash(shape),
        producer=f"vllm {version} lynxproto {PROTOCOL_VERSION}",
    )


def prompt_hash(tokens: Any, extra: Any = None) -> str:
    """Names what a cache is of: token ids, and whatever else (adapter, images) went into it."""
    return _hash([list(tokens), extra])


def head_range(kv_heads: int, ranks: int, rank: int) -> tuple[range, bool]:
    """The KV heads of a tensor-parallel rank, and whether it is the first that has them (ranks may share a head).

    Raises :class:`~lynxproto.errors.ConfigError` for numbers that vLLM would not allow either.
    """
    if kv_heads >= ranks:
        if kv_heads % ranks:
            raise ConfigError(f"{kv_heads} KV heads cannot be divided among {ranks} tensor-parallel ranks")
        each = kv_heads // ranks
        return range(rank * each, (rank + 1) * each), True
    if ranks % kv_heads:
        raise ConfigError(f"{kv_heads} KV heads cannot be shared by {ranks} tensor-parallel ranks")
    copies = ranks // kv_heads
    return range(rank // copies, rank // copies + 1), rank % copies == 0


def _hash(value: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True, default=str).encode())
