"""What the scheduler's side of the connector tells the workers' side, each step: pickled between processes."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

__all__ = ["Load", "LynxMetadata", "Save"]


@dataclass(frozen=True, slots=True)
class Save:
    """Send KV of tokens ``[start, stop)`` of a prompt, which this step's forward completes, layer by layer."""

    request: str
    """vLLM's id of the request."""
    name: str
    """What the cache is called on the wire: key and hash of the prompt."""
    urls: tuple[str, ...]
    """The decode side's workers, by tensor-parallel rank."""
    blocks: tuple[int, ...]
    """Blocks of the prompt from its first token on."""
    start: int
    stop: int
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """Receive KV of tokens ``[start, stop)`` of a prompt into ``blocks``."""

    request: str
    name: str
    blocks: tuple[int, ...]
    """Blocks of the prompt from its first token on."""
    start: int
    stop: int


@dataclass(slots=True)
class LynxMetadata(KVConnectorMetadata):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """One step's work."""

    saves: list[Save] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    """Requests whose loads nobody waits for any more."""
    dropped: list[str] = field(default_factory=list)
    """Names of caches that no request will ask for."""
    idle: bool = False
    """Nothing is computed in this step."""
