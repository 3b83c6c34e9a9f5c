"""Policies: how a layer is cut into tiles, and which codec each tile gets.

A policy knows token positions; codecs do not. The default keeps attention sinks exact and recent tokens at
8 bits in the anchor (the idea of per-token precision is SpectrumKV's, arXiv 2606.08635) and the rest at 3 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lynxproto.chunk import DTYPES, Part, Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.errors import ConfigError
from lynxproto.manifest import LayerSpec

if TYPE_CHECKING:
    from lynxproto.calibration import Calibration

__all__ = ["GROUP_TOKENS", "Policy", "PolicyName"]

#: Tokens of a key group of the hq codec (spec/codec-hq.md): tiles are cut at multiples of it.
GROUP_TOKENS = 64

PolicyName = Literal["lynx", "bf16", "int8", "int4"]

_RAW: Mapping[str, Any] = {"id": "raw"}
_BODY: Mapping[str, Any] = {"id": "hq", "preset": "balanced"}
_FINE: Mapping[str, Any] = {"id": "hq", "anchor_bits": 8, "levels": 2}


@dataclass(frozen=True, slots=True)
class Policy:
    """Cuts layers into tiles.

    ``body``, ``fine`` and ``exact`` are codec configs: of most tokens, of the ``recent`` last tokens, and of the
    first ``sinks`` tokens of the sequence. ``tile_bytes`` bounds the uncompressed size of a tile, so that a frame
    is large enough to be cheap and small enough not to hold back a more urgent one.
    """

    body: Mapping[str, Any] = field(default_factory=lambda: dict(_BODY))
    fine: Mapping[str, Any] = field(default_factory=lambda: dict(_FINE))
    exact: Mapping[str, Any] = field(default_factory=lambda: dict(_RAW))
    sinks: int = 4
    recent: int = 32
    tile_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise ConfigError("Policy.sinks and Policy.recent must not be negative")
        if self.tile_bytes < 4096:
            raise ConfigError("Policy.tile_bytes must be at least 4096")

    @classmethod
    def named(cls, name: PolicyName) -> Policy:
        """``lynx`` (the default), or a baseline of one level: ``bf16`` (raw words), lossy ``int8`` or ``int4``."""
        if name == "lynx":
            return cls()
        if name == "bf16":
            return cls(body=dict(_RAW), sinks=0, recent=0)
        if name in ("int8", "int4"):
            body = {"id": "hq", "anchor_bits": int(name[3:]), "levels": 1}
            return cls(body=body, sinks=0, recent=0)
        raise ConfigError(f"unknown policy {name!r}; known: lynx, bf16, int8, int4")

    @classmethod
    def lynx(cls, preset: str = "balanced", calibration: Calibration | None = None) -> Policy:
        """The default tiers with a preset of hq (``fast``, ``balanced``, ``dense``) and a model's calibration."""
        return cls(body=get_codec("hq", preset=preset, calibration=calibration).get_config())

    @property
    def codecs(self) -> tuple[dict[str, Any], ...]:
        """The canonical codec configs of body, fine and exact tiles: what a tile's ``codec`` indexes."""
        configs = [self.body]
        if self.recent:
            configs.append(self.fine)
        if self.sinks:
            configs.append(self.exact)
        return tuple(get_codec(config).get_config() for config in configs)

    @property
    def lossy(self) -> bool:
        """Whether some tile never becomes exact."""
        return not all(get_codec(config).exact for config in self.codecs)

    def tiles(self, dtype: str, layer: LayerSpec) -> tuple[Tile, ...]:
        """Cut ``layer`` (words of ``dtype``) into tiles that cover each of its tokens and parts once.

        Where all of a layer is sent as its words, tiles are cut so that each is contiguous in ``[heads, tokens, dim]``:
        such tiles need no copy on either side.
        """
        if self.sinks == self.recent == 0 and get_codec(self.body).verbatim:
            return self._contiguous_tiles(dtype, layer)
        fine, exact = 1, 1 + (self.recent > 0)
        start, stop = layer.token_start, layer.token_stop
        sinks_end = min(max(start, self.sinks), stop)
        recent_start = max(sinks_end, stop - self.recent)
        tiles: list[Tile] = []

        def add(part: Part, first: int, last: int, codec: int) -> None:
            tiles.append(Tile(layer.index, part, layer.head_start, layer.kv_heads, TokenSet.range(first, last), codec))

        for part in layer.parts:
            token_bytes = layer.kv_heads * layer.head_dim(part) * DTYPES[dtype].itemsize
            step = max(1, self.tile_bytes // (token_bytes * GROUP_TOKENS)) * GROUP_TOKENS
            if start < sinks_end:
                add(part, start, sinks_end, exact)
            for first in range(sinks_end, recent_start, step):
                add(part, first, min(first + step, recent_start), 0)
            if recent_start < stop:
                add(part, recent_start, stop, fine)
        return tuple(tiles)

    def _contiguous_tiles(self, dtype: str, layer: LayerSpec) -> tuple[Tile, ...]:
        """Several whole heads a tile, or, where a head is larger than a tile, a range of tokens of one head."""
        tiles: list[Tile] = []
        for part in layer.parts:
            token_bytes = layer.head_dim(part) * DTYPES[dtype].itemsize
            heads = max(1, self.tile_bytes // (token_bytes * layer.tokens))
            step = layer.tokens
            if heads == 1 and step * token_bytes > self.tile_bytes:
                step = max(1, self.tile_bytes // (token_bytes * GROUP_TOKENS)) * GROUP_TOKENS
            for head in range(0, layer.kv_heads, heads):
                count = min(heads, layer.kv_heads - head)
                for first in range(layer.token_start, layer.token_stop, step):
                    tokens = TokenSet.range(first, min(first + step, layer.token_stop))
                    tiles.append(Tile(layer.index, part, layer.head_start + head, count, tokens, 0))
        return tuple(tiles)
