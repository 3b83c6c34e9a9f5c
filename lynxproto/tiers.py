"""Precision by token: the tiers that tokens of a model's cache can be in, and which token gets which.

SpectrumKV (arXiv 2606.08635) gives important tokens 16 bits and others 8 or 4, in fixed fractions. Here a tier is any
codec config, with measured costs and errors in each layer, and :func:`lynxproto.allocation.optimise` decides. With a
calibration the tiers are its optimal key and value widths for tokens that matter 4 times more from tier to tier (a bit
is worth a factor of 4 in squared error): a token's importance, a channel's and a layer's all move the same slider.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from lynxproto import _cbor, allocation
from lynxproto.calibration import KEY_ERROR, VALUE_ERROR, Calibration, Widths
from lynxproto.chunk import ChunkSpec, Part, TokenSet
from lynxproto.codecs import get_codec
from lynxproto.errors import BudgetError, ConfigError, SpecError
from lynxproto.frames import HEADER_SIZE
from lynxproto.importance import shares
from lynxproto.manifest import LayerSpec

if TYPE_CHECKING:
    from lynxproto.cachefile import Cache

__all__ = ["LEAST_BUDGET", "PARTS", "PLAN_ENTRY", "Rule", "Tiers", "calibrated_errors"]

#: ``optimise``: least expected error. ``ranked``: SpectrumKV's greedy, the most important tokens first.
Rule = Literal["optimise", "ranked"]
PARTS: Final[tuple[Part, Part]] = ("key", "value")
#: A budget must be above this: below it not even the cheapest tiers of a real model fit.
LEAST_BUDGET: Final = 0.12

#: log2 of the ratio of weights from one calibrated tier to the next, in a calibration's units of 1/16 octave.
_STEP: Final = 32
#: Width steps of a value head cost as many bits as it has channels, those of a key channel one.
_KEY_WIDTHS: Final = (0, 7)
_VALUE_WIDTHS: Final = (0, 6)
#: Tokens that tile costs are measured on: two sizes tell what a tile costs and what each token of it. Their last groups
#: of 64 are half full, as they are on average.
_SMALL, _LARGE = 96, 544
#: Of a PLAN entry, without its bitmap: five small integers and their frame's share.
PLAN_ENTRY: Final = 20
#: Quantiles that stand for a unit's tokens where the tokens are not known yet.
_QUANTILES: Final = 32
_LOWEST_THRESHOLD: Final = -2000


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tiers:
    """The precisions that tokens can have in a model's cache, from cheap to exact, and what each costs and spoils.

    ``configs``: codec configs, the last one raw. ``costs``: bytes of a token of all KV heads at level 0, and
    ``overheads``: bytes of a tile besides; ``errors``: nats of KL if all tokens were in the tier; all of shape
    ``[layers, 2 (key, value), tiers]``. ``typical``: quantiles of tokens' shares of importance, ``[layers, 2,
    quantiles]``, by which a budget is divided among layers before their attention is known. ``floor``: how much of
    every share is even.
    """

    configs: tuple[Mapping[str, Any], ...]
    costs: NDArray[np.float64]
    overheads: NDArray[np.float64]
    errors: NDArray[np.float64]
    typical: NDArray[np.float64]
    floor: float = 0.1

    def __post_init__(self) -> None:
        layers = self.costs.shape[0] if self.costs.ndim else 0
        shape = (layers, 2, len(self.configs))
        for name in ("costs", "overheads", "errors"):
            array = getattr(self, name)
            if array.shape != shape or not shape[0] or not shape[2]:
                raise ConfigError(f"tiers: {name} must be [layers, 2, {len(self.configs)} tiers], not {array.shape}")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ConfigError(f"tiers: {name} must be finite and not negative")
        if self.typical.ndim != 3 or self.typical.shape[:2] != shape[:2] or not self.typical.size:
            raise ConfigError(f"tiers: typical must be [{layers} layers, 2, quantiles], not {self.typical.shape}")
        if self.configs[-1].get("id") != "raw":
            raise ConfigError("tiers: the last must be raw words, which a budget of 1 and attention sinks need")
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"tiers: floor must be from 0 to 1, not {self.floor}")

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return int(self.costs.shape[0])

    @classmethod
    def uniform(cls, bits: Sequence[int], cache: Cache, errors: NDArray[np.float64] | None = None) -> Tiers:
        """Tiers of ``bits`` everywhere (16: raw words), with costs measured on ``cache``.

        ``errors`` as in :class:`Tiers`; without them all layers count alike, by the codec's squared error.
        """
        configs = tuple(
            {"id": "raw"}
            if b == 16
            else {"id": "hq", "anchor_bits": b, "levels": 2 if b == 8 else 3, "fold": True, "scaling": True}
            for b in bits
        )
        if errors is None:
            table = [[_relative(error, b) for b in bits] for error in (KEY_ERROR, VALUE_ERROR)]
            errors = np.broadcast_to(np.array(table), (len(cache.manifest.layers), 2, len(bits)))
        return cls._measured(configs, errors, cache)

    @classmethod
    def calibrated(cls, calibration: Calibration, cache: Cache, count: int = 6) -> Tiers:
        """``count`` tiers of the calibration's best widths, then 8 bits, then raw words; costs measured on ``cache``.

        Raises :class:`~lynxproto.errors.SpecError` when the calibration is of a model of another shape.
        """
        shapes = tuple((layer.kv_heads, layer.key_dim) for layer in cache.manifest.layers)
        if calibration.shapes != shapes:
            raise SpecError("the calibration does not have the cache's layers; run `lynxproto calibrate` on its model")
        dims = [layer.value_dim for layer in cache.manifest.layers]
        configs: list[Mapping[str, Any]] = []
        rows = []
        for threshold in _thresholds(calibration, dims, count):
            widths = _widths(calibration, threshold, dims)
            configs.append(
                {"id": "hq", "key_bits": 4, "value_bits": 4, "levels": 3, "widths": table_of(widths), "fold": True}
                | {"scaling": True}
            )
            rows.append(
                [
                    [_expected(c, w, KEY_ERROR) for c, w in zip(calibration.keys, widths.keys, strict=True)],
                    [_expected(c, w, VALUE_ERROR) for c, w in zip(calibration.values, widths.values, strict=True)],
                ]
            )
        configs += [{"id": "hq", "anchor_bits": 8, "levels": 2, "fold": True, "scaling": True}, {"id": "raw"}]
        rows += [_everywhere(calibration, bits) for bits in (8, 16)]
        return cls._measured(tuple(configs), np.array(rows).transpose(2, 1, 0), cache)

    @classmethod
    def _measured(cls, configs: tuple[Mapping[str, Any], ...], errors: NDArray[np.float64], cache: Cache) -> Tiers:
        costs, overheads = _measure(configs, cache)
        even = np.ones((costs.shape[0], 2, 1))
        return cls(configs=configs, costs=costs, overheads=overheads, errors=errors, typical=even)

    def observed(self, importances: Iterable[NDArray[np.float64]]) -> Tiers:
        """These tiers with ``typical`` shares from caches' importances ``[layers, kv_heads, tokens]``."""
        points = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
        rows = [np.quantile(shares(one).mean(1), points, axis=1).T for one in importances]
        typical = np.mean(rows, 0)
        return replace(self, typical=np.repeat(typical[:, None], 2, 1))

    def without(self, first: int) -> Tiers:
        """These tiers without the ``first`` ones, which a model does not tolerate."""
        return replace(
            self,
            configs=self.configs[first:],
            costs=self.costs[:, :, first:],
            overheads=self.overheads[:, :, first:],
            errors=self.errors[:, :, first:],
        )

    def anchors_only(self) -> Tiers:
        """These tiers without any residual: lossy."""
        configs = tuple(c if c["id"] == "raw" else {**c, "levels": 1} for c in self.configs)
        return replace(self, configs=configs)

    @property
    def table_bytes(self) -> int:
        """Bytes of the configs in a manifest: tables of widths travel once a transfer."""
        return _table_bytes(self)

    def divide(self, fraction: float, tokens: int) -> NDArray[np.float64]:
        """The budget ``fraction`` of raw bytes of ``tokens`` divided among layers by typical importance: fractions,
        ``[layers]``.
        """
        return _divide(self, round(fraction, 4), tokens)

    def choose(
        self, layer: LayerSpec, importance: NDArray[np.float64], nbytes: float, rule: Rule
    ) -> dict[Part, NDArray[np.int8]]:
        """The tier of each token of ``importance`` ``[kv_heads, tokens]`` in both parts, within ``nbytes``.

        Raises :class:`~lynxproto.errors.BudgetError` when they do not fit.
        """
        if layer.index >= self.layers or layer.parts != PARTS:
            raise SpecError(f"the tiers are of {self.layers} layers of key and value; layer {layer.index} is none")
        weights = shares(importance, self.floor).mean(0)
        tokens = len(weights)
        costs, overheads = self.costs[layer.index], self.overheads[layer.index] + _bitmaps(tokens)
        if rule == "ranked":
            rest = nbytes - float(overheads.sum())
            chosen = allocation.ranked(weights, [float(c) for c in costs.sum(0)], rest)
            if (chosen == allocation.DROPPED).any():
                least = (costs.sum(0)[0] * tokens + overheads.sum()) / tokens / (costs.sum(0)[-1])
                raise BudgetError(
                    f"layer {layer.index}: {nbytes:.0f} bytes do not hold {tokens} tokens in the cheapest tier; "
                    f"a budget of about {least:.3f} does"
                )
            return dict.fromkeys(PARTS, chosen)
        errors = self.errors[layer.index] / tokens
        chosen = allocation.optimise(np.stack([weights, weights]), errors, costs, nbytes, overheads=overheads)
        return dict(zip(PARTS, chosen, strict=True))

    def expected_bytes(self, layer: LayerSpec, part: Part, tier: int, tokens: TokenSet) -> float:
        """What a tile of ``tokens`` takes until its level 0 is there: payload, frame, entry in PLAN, sets of tokens."""
        index = PARTS.index(part)
        bitmaps = 0.0 if tokens.is_range else _bitmaps(tokens.stop - tokens.start)
        return float(
            self.costs[layer.index, index, tier] * len(tokens) + self.overheads[layer.index, index, tier] + bitmaps
        )


def _bitmaps(span: int) -> float:
    """Of a tile whose tokens are not a range: once in PLAN, once in the frame, where a CRC follows."""
    return 2 * ((span + 7) // 8) + 4


def table_of(widths: Widths) -> dict[str, Any]:
    """``widths`` as a config of hq has them."""
    return {
        "keys": [["".join(map(str, head)) for head in layer.tolist()] for layer in widths.keys],
        "values": ["".join(map(str, layer)) for layer in (w.tolist() for w in widths.values)],
    }


def _relative(error: Sequence[float], bits: int) -> float:
    """Squared error of ``bits``, relative to a group's squared range."""
    return 0.0 if bits == 16 else error[bits] if bits < min(8, len(error)) else 1 / (2**bits - 2) ** 2 / 12


def _gains(error: Sequence[float], bits: tuple[int, int]) -> NDArray[np.float64]:
    return 16 * np.log2(-np.diff(np.asarray(error)))[bits[0] : bits[1]]


def _widths(calibration: Calibration, threshold: float, dims: Sequence[int]) -> Widths:
    """All bits that gain at least ``threshold`` (1/16 octave of KL) for each bit of a token that they take."""
    keys, values = _gains(KEY_ERROR, _KEY_WIDTHS), _gains(VALUE_ERROR, _VALUE_WIDTHS)
    return Widths(
        tuple((k[..., None] + keys >= threshold).sum(-1).astype(np.uint8) for k in calibration.keys),
        tuple(
            (v[..., None] + values >= threshold + 16 * np.log2(dim)).sum(-1).astype(np.uint8)
            for v, dim in zip(calibration.values, dims, strict=True)
        ),
    )


def _thresholds(calibration: Calibration, dims: Sequence[int], count: int) -> list[float]:
    """Of ``count`` tiers, cheapest first, of which the third has 2 bits on average."""

    def mean(threshold: float) -> float:
        widths = _widths(calibration, threshold, dims)
        bits = sum(float(k.sum()) for k in widths.keys)
        bits += sum(float(v.sum()) * dim for v, dim in zip(widths.values, dims, strict=True))
        total = sum(k.size for k in widths.keys) + sum(v.size * dim for v, dim in zip(widths.values, dims, strict=True))
        return bits / total

    middle = next(t for t in range(_LOWEST_THRESHOLD, -_LOWEST_THRESHOLD) if mean(t) <= 2)
    return [middle + _STEP * (2 - tier) for tier in range(count)]


def _expected(importances: NDArray[np.int16], widths: NDArray[np.uint8], error: Sequence[float]) -> float:
    return float((np.exp2(importances / 16) * np.asarray(error)[widths]).sum())


def _everywhere(calibration: Calibration, bits: int) -> list[list[float]]:
    """Expected KL with ``bits`` in all channels (16: raw words) of each layer's keys, of its values."""
    sides = ((calibration.keys, KEY_ERROR), (calibration.values, VALUE_ERROR))
    return [[float(np.exp2(layer / 16).sum()) * _relative(error, bits) for layer in side] for side, error in sides]


def calibrated_errors(calibration: Calibration, bits: Sequence[int]) -> NDArray[np.float64]:
    """What :meth:`Tiers.uniform` takes as ``errors``, ``[layers, 2, tiers]``, in nats of KL."""
    return np.array([_everywhere(calibration, b) for b in bits]).transpose(2, 1, 0)


def _measure(configs: Sequence[Mapping[str, Any]], cache: Cache) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bytes of a token, and of a tile besides, at level 0, by encoding parts of ``cache``: ``[layers, 2, tiers]``."""
    manifest = cache.manifest
    tokens = min(layer.tokens for layer in manifest.layers)
    large = min(_LARGE, (tokens - _SMALL // 3) // 64 * 64 + _SMALL // 3)
    if large <= _SMALL:
        raise ConfigError(f"tiers are measured on caches of at least {_SMALL + 64} tokens, not {tokens}")
    sizes = np.zeros((2, len(manifest.layers), 2, len(configs)))
    for tier, config in enumerate(configs):
        codec = get_codec(config)
        for layer in manifest.layers:
            for index, part in enumerate(PARTS):
                for n, count in enumerate((_SMALL, large)):
                    # A tier's tokens are scattered: neighbours would be more alike, and cheaper.
                    spread = np.linspace(0, layer.tokens - 1, count).astype(np.int64)
                    words = cache.arrays[layer.index, part][:, spread]
                    spec = ChunkSpec(
                        part, manifest.dtype, layer.kv_heads, count, layer.head_dim(part), layer.index, layer.head_start
                    )
                    (payload,) = codec.encode(spec, words, levels=[0])
                    sizes[n, layer.index, index, tier] = memoryview(payload).nbytes
    costs = (sizes[1] - sizes[0]) / (large - _SMALL)
    fixed = np.maximum(sizes[0] - costs * _SMALL, 0.0)
    return costs, fixed + HEADER_SIZE + PLAN_ENTRY


@lru_cache(64)
def _table_bytes(tiers: Tiers) -> int:
    return sum(len(_cbor.dumps(get_codec(config).get_config())) for config in tiers.configs)


@lru_cache(64)
def _divide(tiers: Tiers, fraction: float, tokens: int) -> NDArray[np.float64]:
    count, points = len(tiers.configs), tiers.typical.shape[2]
    raw = tiers.costs[:, :, -1]
    costs = tiers.costs.reshape(-1, count)
    weights, errors = tiers.typical.reshape(-1, points), tiers.errors.reshape(-1, count) / points
    fixed = (tiers.overheads[:, :, 0] + _bitmaps(tokens)).sum(1) * points / tokens  # each part has a tile at least
    rest = fraction * float(raw.sum()) * points - float(fixed.sum())
    chosen = allocation.optimise(weights, errors, costs, rest)
    layers = np.take_along_axis(costs, chosen.astype(np.int64), 1).sum(1).reshape(-1, 2).sum(1)
    divided: NDArray[np.float64] = (fixed + layers / layers.sum() * rest) / points / raw.sum(1)
    return divided
