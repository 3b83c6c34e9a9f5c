"""Policies: how a layer is cut into tiles, and which codec each tile gets.

A policy knows token positions; codecs do not. The default keeps attention sinks exact and recent tokens at
8 bits in the anchor (the idea of per-token precision is SpectrumKV's, arXiv 2606.08635) and the rest at 3 bits. With
:class:`~lynxproto.tiers.Tiers` and a budget each token gets its own precision, by how important it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lynxproto import importance as importance_
from lynxproto.chunk import DTYPES, ChunkSpec, Part, Tile, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.errors import BudgetError, ConfigError, PolicyError, SpecError
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.tiers import LEAST_BUDGET, PARTS, Rule, Tiers

if TYPE_CHECKING:
    from lynxproto.calibration import Calibration
    from lynxproto.linkpolicy import AutoPolicy

__all__ = ["GROUP_TOKENS", "Importance", "LayerPlan", "Policy", "PolicyName"]

#: Tokens of a key group of the hq codec (spec/codec-hq.md): tiles are cut at multiples of it.
GROUP_TOKENS = 64

#: Fewer tokens than this in a tier of a layer are sent as they are.
LEAST_TOKENS = 16
_ATTEMPTS = 4

PolicyName = Literal["lynx", "exact", "raw", "bf16", "int8", "int4"]
#: What a tiered policy takes a token's importance from.
Importance = Literal["attention", "even", "key-norms", "position"]
_Positions = range | NDArray[np.int64]

#: Frames take so long on the link at most, and have so many bytes.
_FRAME_S = 3e-3
_FRAME_BYTES = 8 << 20
#: A coded tile's largest level is about a third of it; larger ones than this would leave threads without work.
_LEVELS = 3
_CODED_BYTES = 4 << 20

_RAW: Mapping[str, Any] = {"id": "raw"}
_BODY: Mapping[str, Any] = {"id": "hq", "preset": "balanced"}
_FINE: Mapping[str, Any] = {"id": "hq", "anchor_bits": 8, "levels": 2}


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The tiles of a layer, and the bytes that its level 0 is expected to take.

    Payloads, headers, sets of tokens, and the layer's share of the codecs' tables in the manifest.
    """

    tiles: tuple[Tile, ...]
    expected_bytes: float


@dataclass(frozen=True, slots=True)
class Policy:
    """Cuts layers into tiles.

    ``body``, ``fine`` and ``exact`` are codec configs: of most tokens, of the ``recent`` last tokens, and of the
    first ``sinks`` tokens of the sequence. ``tile_bytes`` bounds the uncompressed size of a tile, so that a frame
    is large enough to be cheap and small enough not to hold back a more urgent one. With ``grow`` that is its bound
    on slow links, and tiles grow with the link's speed (:meth:`for_link`).

    With ``tiers`` tokens other than sinks and recent ones get the precisions that ``rule`` chooses by ``importance``,
    so that level 0 takes ``budget`` of the uncompressed cache, all bytes counted. Importance by attention is given to
    ``write``; each layer's plan waits for it. With ``even`` all tokens are alike, and only channels and layers differ.
    ``decay``: how fast importance falls with a token's age.
    ``model`` and ``revision`` say whose tiers they are; a cache of another is refused.

    Raises :class:`~lynxproto.errors.BudgetError` for a budget that no plan can keep.
    """

    body: Mapping[str, Any] = field(default_factory=lambda: dict(_BODY))
    fine: Mapping[str, Any] = field(default_factory=lambda: dict(_FINE))
    exact: Mapping[str, Any] = field(default_factory=lambda: dict(_RAW))
    sinks: int = 4
    recent: int = 32
    tile_bytes: int = 1 << 20
    grow: bool = False
    tiers: Tiers | None = None
    budget: float = 0.25
    rule: Rule = "optimise"
    importance: Importance = "attention"
    decay: float = 0.0
    model: str = ""
    revision: str = ""

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 0:
            raise ConfigError("Policy.sinks and Policy.recent must not be negative")
        if self.tile_bytes < 4096:
            raise ConfigError("Policy.tile_bytes must be at least 4096")
        if not LEAST_BUDGET < self.budget <= 1:
            raise BudgetError(
                f"a budget of {self.budget} is outside ({LEAST_BUDGET}, 1]: it is the share of the uncompressed bytes"
            )
        for name, value, known in (
            ("rule", self.rule, get_args(Rule)),
            ("importance", self.importance, get_args(Importance)),
        ):
            if value not in known:
                raise ConfigError(f"Policy.{name} must be one of {', '.join(known)}, not {value!r}")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"Policy.decay must be in [0, 1), not {self.decay}")

    @classmethod
    def named(cls, name: PolicyName) -> Policy:
        """``lynx`` (the default); ``exact``: coded without an anchor, 8 bits and then the rest; or of one level.

        Of one level are ``raw`` or ``bf16`` (the words) and, lossy, the baselines ``int8`` and ``int4``.
        """
        if name == "lynx":
            return cls(grow=True)
        if name == "exact":
            return cls(body=dict(_FINE), sinks=0, recent=0, grow=True)
        if name in ("raw", "bf16"):
            return cls(body=dict(_RAW), sinks=0, recent=0, tile_bytes=2 << 20, grow=True)
        if name in ("int8", "int4"):
            body = {"id": "hq", "anchor_bits": int(name[3:]), "levels": 1}
            return cls(body=body, sinks=0, recent=0, grow=True)
        raise ConfigError(f"unknown policy {name!r}; known: lynx, exact, raw, bf16, int8, int4")

    @classmethod
    def lynx(cls, preset: str = "balanced", calibration: Calibration | None = None, *, levels: int = 3) -> Policy:
        """The default tiers with a preset of hq (``fast``, ``balanced``, ``dense``) and a model's calibration.

        ``levels``: 3 with an 8-bit level between the anchor and the exact words, 2 without.
        """
        return cls(body=get_codec("hq", preset=preset, calibration=calibration, levels=levels).get_config(), grow=True)

    @classmethod
    def progressive(cls, dtype: str) -> Policy:
        """The default for caches of ``dtype``: the default tiers for 16-bit types; 12 bit planes of float32 first.

        8-bit types travel as they are: an anchor of theirs would save little.
        """
        if dtype == "float32":
            return cls(body={"id": "bitplane", "planes": [12, 20]}, sinks=0, recent=0, grow=True)
        return cls.named("lynx") if DTYPES[dtype].itemsize == 2 else cls.named("raw")

    @classmethod
    def auto(cls, calibration: Calibration | None = None, *, exact_weight: float = 1.0) -> AutoPolicy:
        """The best policy for each transfer, by the link's measured goodput and the codecs' measured speed.

        See :class:`~lynxproto.linkpolicy.AutoPolicy` for ``exact_weight``.
        """
        from lynxproto.linkpolicy import AutoPolicy, default_candidates

        return AutoPolicy(default_candidates(calibration), exact_weight)

    @classmethod
    def from_file(
        cls, path: str | Path, *, budget: float | None = None, importance: Importance | None = None
    ) -> Policy:
        """What `lynxproto probe` found good for a model; ``budget`` and ``importance`` instead of the file's.

        Raises :class:`~lynxproto.errors.PolicyError` for a file that is no policy or was damaged.
        """
        from lynxproto.policyfile import PolicyFile

        policy = PolicyFile.load(path).policy
        return replace(policy, budget=budget or policy.budget, importance=importance or policy.importance)

    def anchors_only(self) -> Policy:
        """This policy without any residual: what level 0 holds is all that is ever sent, and manifests say lossy."""
        body, fine = ({**c, "levels": 1} if c["id"] == "hq" else c for c in (self.body, self.fine))
        return replace(self, body=body, fine=fine, tiers=None if self.tiers is None else self.tiers.anchors_only())

    def require(self, identity: Identity) -> None:
        """Raise :class:`~lynxproto.errors.PolicyError` if the policy was made for another model or revision."""
        mismatch = Identity(model=self.model or identity.model, revision=self.revision).mismatch(identity)
        if mismatch is not None:
            raise PolicyError(
                f"the policy is of {self.model} {self.revision}, the cache of {identity.model} {identity.revision}; "
                "run `lynxproto probe` on the cache's model"
            )

    @property
    def codecs(self) -> tuple[dict[str, Any], ...]:
        """The canonical codec configs that a tile's ``codec`` indexes: body or tiers, then fine, then exact."""
        configs = [self.body] if self.tiers is None else [*self.tiers.configs]
        if self.recent:
            configs.append(self.fine)
        if self.sinks or self.tiers is not None:
            configs.append(self.exact)
        return tuple(get_codec(config).get_config() for config in configs)

    def supports(self, manifest: Manifest) -> bool:
        """Whether its codecs can code all parts of this cache."""
        shapes = {(part, layer.kv_heads, layer.head_dim(part)) for layer in manifest.layers for part in layer.parts}
        return all(
            get_codec(config).supports(
                ChunkSpec(part=part, dtype=manifest.dtype, heads=heads, tokens=GROUP_TOKENS, head_dim=dim)
            )
            for config in self.codecs
            for part, heads, dim in shapes
        )

    @property
    def lossy(self) -> bool:
        """Whether some tile never becomes exact."""
        return not all(get_codec(config).exact for config in self.codecs)

    def attention(self, layer: LayerSpec, importance: Any) -> NDArray[np.float64] | None:
        """``importance`` as given to ``write``, checked: ``[kv_heads, tokens]`` or ``[tokens]``; None if not needed.

        Raises :class:`~lynxproto.errors.SpecError` when the policy ranks tokens by attention and there is none.
        """
        if self.tiers is None or self.importance != "attention":
            return None
        if importance is None:
            raise SpecError(
                f"layer {layer.index}: this policy ranks tokens by attention; give it to write(importance=...), "
                "or take importance from 'key-norms' or 'position', or 'even' for all alike"
            )
        return importance_.checked(importance, layer.tokens)

    def score(
        self, dtype: str, layer: LayerSpec, words: Mapping[Part, NDArray[Any]], attention: Any = None
    ) -> NDArray[np.float64] | None:
        """Importances of the layer's tokens, ``[kv_heads, tokens]``; None where the policy needs none.

        ``words``: the layer's, ``[kv_heads, tokens, head_dim]`` by part. ``attention``: see :meth:`attention`.
        """
        if self.tiers is None:
            return None
        found = self.attention(layer, attention)
        if self.importance == "key-norms":
            found = importance_.from_key_norms(importance_.key_norms(words["key"], dtype))
        elif self.importance == "position":
            found = importance_.by_position(layer.tokens)
        elif found is None:
            found = np.ones(layer.tokens)
        return importance_.decayed(np.broadcast_to(found, (layer.kv_heads, layer.tokens)), self.decay)

    def tiles(self, dtype: str, layer: LayerSpec, importance: NDArray[np.float64] | None = None) -> tuple[Tile, ...]:
        """Cut ``layer`` (words of ``dtype``) into tiles that cover each of its tokens and parts once.

        Where all of a layer is sent as its words, tiles are cut so that each is contiguous in ``[heads, tokens, dim]``:
        such tiles need no copy on either side. ``importance``: see :meth:`score`; needed with tiers.
        """
        return self.plan(dtype, layer, importance).tiles

    def for_link(self, bytes_per_second: float, most: int) -> Policy:
        """With ``grow``, larger tiles for a faster link: frames of what it carries in 3 ms, tiles of ``most`` bytes.

        Words that go as they are travel in tiles of up to 8 MiB, coded ones, a frame for each level, of up to 4 MiB.
        What a frame costs hardly depends on its size, and some of it is done by one thread for all.
        """
        nbytes = bytes_per_second * _FRAME_S
        if get_codec(self.body).verbatim:
            nbytes = min(nbytes, _FRAME_BYTES, most)
        else:
            nbytes = min(_LEVELS * nbytes, _CODED_BYTES, most)
        if not self.grow or nbytes < 2 * self.tile_bytes:
            return self
        return replace(self, tile_bytes=1 << (int(nbytes).bit_length() - 1))

    def plan(self, dtype: str, layer: LayerSpec, importance: NDArray[np.float64] | None = None) -> LayerPlan:
        """:meth:`tiles`, and what their level 0 is expected to take (0 without tiers: nothing is promised)."""
        if self.tiers is None and self.sinks == self.recent == 0 and get_codec(self.body).verbatim:
            return LayerPlan(self._contiguous_tiles(dtype, layer), 0.0)
        start, stop = layer.token_start, layer.token_stop
        sinks_end = min(max(start, self.sinks), stop)
        recent_start = max(sinks_end, stop - self.recent)
        cut = _Cut(self, dtype, layer)
        if self.tiers is None:
            for part in layer.parts:
                cut.add(part, range(start, sinks_end), cut.exact)
                cut.add(part, range(sinks_end, recent_start), 0)
                cut.add(part, range(recent_start, stop), cut.fine)
            return LayerPlan(tuple(cut.tiles), 0.0)
        if importance is None:
            raise SpecError(f"layer {layer.index}: a policy with tiers needs the tokens' importance")
        if dtype not in ("bfloat16", "float16"):
            raise SpecError(f"tiers are measured on 16-bit words; the cache has {dtype}")
        fixed = self.tiers.table_bytes / self.tiers.layers
        for part in layer.parts:
            for at, codec in ((range(start, sinks_end), cut.exact), (range(recent_start, stop), cut.fine)):
                cut.add(part, at, codec)
                fixed += cut.expected(part, at, codec)
        rest = np.arange(sinks_end, recent_start)
        if not rest.size:
            return LayerPlan(tuple(cut.tiles), fixed)
        raw = layer.words() * DTYPES[dtype].itemsize
        body = raw * rest.size / layer.tokens
        share = (self.budget * raw - fixed) / body
        if share <= 0:
            raise BudgetError(
                f"layer {layer.index}: a budget of {self.budget} does not hold {self.sinks} sinks and {self.recent} "
                f"recent tokens of {layer.tokens}; ask for more, or for fewer of them"
            )
        nbytes = self.tiers.divide(share, rest.size)[layer.index] * body
        importance = importance[:, sinks_end - start : recent_start - start]
        target, excess = nbytes, 0.0
        for _ in range(_ATTEMPTS):
            chosen = self.tiers.choose(layer, importance, nbytes, self.rule)
            groups = [
                (part, rest[chosen[part] == tier], int(tier)) for part in PARTS for tier in np.unique(chosen[part])
            ]
            groups = [(part, at, tier if len(at) >= LEAST_TOKENS else cut.exact) for part, at, tier in groups]
            excess = sum(cut.expected(part, at, codec) for part, at, codec in groups) - target
            if excess <= 0:
                break
            nbytes -= excess  # few tokens in a tier are sent raw, which takes more than the tier
        for part, at, codec in groups:
            cut.add(part, at, codec)
        return LayerPlan(tuple(cut.tiles), fixed + target + excess)

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


class _Cut:
    """Collects a layer's tiles."""

    def __init__(self, policy: Policy, dtype: str, layer: LayerSpec) -> None:
        self.tiles: list[Tile] = []
        self.fine = 1 if policy.tiers is None else len(policy.tiers.configs)
        self.exact = self.fine + (policy.recent > 0)
        self._policy, self._dtype, self._layer = policy, dtype, layer

    def add(self, part: Part, positions: _Positions, codec: int) -> None:
        """Tiles of ``positions``, cut at groups."""
        layer = self._layer
        self.tiles += [
            Tile(layer.index, part, layer.head_start, layer.kv_heads, tokens, codec)
            for tokens in self._token_sets(part, positions)
        ]

    def expected(self, part: Part, positions: _Positions, codec: int) -> float:
        """The bytes that level 0 of these tiles is expected to take."""
        tiers = self._policy.tiers
        assert tiers is not None
        # What is exact costs what raw words do, and ``fine`` about what the tier before them does.
        tier = min(codec, len(tiers.configs) - 1) if codec != self.fine else max(0, len(tiers.configs) - 2)
        return sum(
            tiers.expected_bytes(self._layer, part, tier, tokens) for tokens in self._token_sets(part, positions)
        )

    def _token_sets(self, part: Part, positions: _Positions) -> list[TokenSet]:
        token_bytes = self._layer.kv_heads * self._layer.head_dim(part) * DTYPES[self._dtype].itemsize
        step = max(1, self._policy.tile_bytes // (token_bytes * GROUP_TOKENS)) * GROUP_TOKENS
        pieces = [positions[n : n + step] for n in range(0, len(positions), step)]
        return [TokenSet.range(p.start, p.stop) if isinstance(p, range) else TokenSet.of(p.tolist()) for p in pieces]
