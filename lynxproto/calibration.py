"""Where the bits of an anchor matter: importances of key channels and value heads, and the widths they lead to.

The expected rise of KL when channel c of the keys is stored with b bits is about ``importance[c] * error(b)``, with
``error(b)`` the mean squared error of b-bit reconstruction relative to the squared range of a group. Minimising the sum
under a budget of bits is greedy: give the next bit to whoever gains most. Importances are measured once per model:

- within a layer by the geometric mean of E[q^2] (what a key's error does to the logits of attention, everywhere) and of
  the Fisher information (what it does to the model's prediction, but only for very small errors), times E[range^2];
- between layers by finite differences: the KL that appears when one layer alone is stored with few bits. Gradients
  cannot tell it: errors of frequent tokens repeat and add up in early layers, and attention that is saturated on a sink
  has no gradient until an error frees it.

docs/codec.md, "Calibration", has the measurements behind these choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from lynxproto._sidefile import SideFile, digest, pack, unpack
from lynxproto.errors import CalibrationError, ConfigError

__all__ = ["Calibration", "Widths", "anchor_keys", "anchor_values", "calibrate"]

OnProgress = Callable[[int, int, str], None]

_MAX_LAYERS: Final = 4096
_MAX_ENTRIES: Final = 1 << 22
#: Values that share a scale: tokens of a key channel, channels of a value token.
_GROUP: Final = 64
#: Importances are stored as round(_UNITS * log2(importance)).
_UNITS: Final = 16
_MAX_IMPORTANCE: Final = 4095

#: Mean squared error of b-bit anchors, b = 0.., relative to the squared range of a group; measured on real caches with
#: the reconstruction tables of spec/codec-hq.md.
KEY_ERROR: Final = (1 / 18.2, 1 / 45.8, 1 / 133, 1 / 600, 1 / 2731, 1 / 11221, 1 / 40000, 1 / 106600)
VALUE_ERROR: Final = (1 / 18.2, 1 / 44.6, 1 / 155, 1 / 601, 1 / 2734, 1 / 11264, 1 / 40000)
_KEY_RANGE: Final = (0, 7)
_VALUE_RANGE: Final = (2, 5)


def _gains(error: Sequence[float]) -> NDArray[np.int64]:
    """What a channel of importance 1 gains with its (b+1)-th bit, in the units of importances."""
    return np.round(_UNITS * np.log2(-np.diff(np.asarray(error)))).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Widths:
    """Anchor bits of key channels, ``keys[layer][kv_head, channel]``, and value heads, ``values[layer][kv_head]``."""

    keys: tuple[NDArray[np.uint8], ...]
    values: tuple[NDArray[np.uint8], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration(SideFile):
    """Importances of a model's key channels and value heads, from which widths for any budget follow.

    ``keys[layer]`` is ``[kv_heads, key_dim]``, ``values[layer]`` is ``[kv_heads]``; int16: 16 log2(importance).
    An importance times the relative error of a width (``KEY_ERROR``, ``VALUE_ERROR``) is an expected KL in nats.

    Raises :class:`~lynxproto.errors.CalibrationError` for importances that do not fit each other or a limit.
    """

    FORMAT: ClassVar = "lynxproto.calibration/1"
    WHAT: ClassVar = "calibration"
    COMMAND: ClassVar = "calibrate"
    MAX_BYTES: ClassVar = 16 << 20
    ERROR: ClassVar = CalibrationError

    model: str
    revision: str = ""
    method: str
    keys: tuple[NDArray[np.int16], ...]
    values: tuple[NDArray[np.int16], ...]

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= _MAX_LAYERS or len(self.keys) != len(self.values):
            raise CalibrationError(
                f"a calibration needs keys and values of the same 1 to {_MAX_LAYERS} layers, "
                f"got {len(self.keys)} and {len(self.values)}"
            )
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            if keys.ndim != 2 or not keys.size or values.shape != keys.shape[:1]:
                raise CalibrationError(
                    f"layer {layer}: keys must be [kv_heads, key_dim] and values [kv_heads], "
                    f"not {keys.shape} and {values.shape}"
                )
            if max(np.abs(keys).max(), np.abs(values).max()) > _MAX_IMPORTANCE:
                raise CalibrationError(f"layer {layer}: an importance is beyond ±{_MAX_IMPORTANCE}")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """``(kv_heads, key_dim)`` of each layer."""
        return tuple((k.shape[0], k.shape[1]) for k in self.keys)

    def widths(self, key_bits: float, value_bits: float) -> Widths:
        """Widths 0..7 of key channels and 2..5 of value heads whose means are at most ``key_bits`` and ``value_bits``.

        Integer arithmetic with ties broken by position: the same everywhere.

        Raises :class:`~lynxproto.errors.ConfigError` for a budget outside these ranges.
        """
        return Widths(
            _allot(self.keys, key_bits, KEY_ERROR, *_KEY_RANGE),
            _allot(self.values, value_bits, VALUE_ERROR, *_VALUE_RANGE),
        )

    def reaching(self, kl: float) -> Widths:
        """The widths of fewest bits whose predicted KL is at most ``kl`` nats; if there are none, the widest.

        Keys and values share the budget: a bit of a value head costs as much as one of each channel of a key head.
        """
        steps: list[tuple[NDArray[np.float64], int]] = []
        for importances, error, (low, high) in (
            (self.keys, KEY_ERROR, _KEY_RANGE),
            (self.values, VALUE_ERROR, _VALUE_RANGE),
        ):
            gains = -np.diff(np.asarray(error))[low:high]
            for layer, (_, dim) in zip(importances, self.shapes, strict=True):
                cost = 1 if layer.ndim == 2 else dim
                steps.append((np.exp2(layer.ravel()[:, None] / _UNITS) * gains / cost, cost))
        gains = np.concatenate([gain.ravel() for gain, _ in steps])
        costs = np.concatenate([np.full(gain.size, cost) for gain, cost in steps])
        order = np.argsort(-gains, kind="stable")  # a channel's next bit always gains less: no bit comes before another
        none = self.predicted_kl(
            Widths(
                tuple(np.full(k.shape, _KEY_RANGE[0], np.uint8) for k in self.keys),
                tuple(np.full(v.shape, _VALUE_RANGE[0], np.uint8) for v in self.values),
            )
        )
        left = none - np.cumsum((gains * costs)[order])
        chosen = np.zeros(gains.size, bool)
        chosen[order[: int(np.searchsorted(-left, -kl)) + 1 if none > kl else 0]] = True
        ends = np.cumsum([gain.size for gain, _ in steps])[:-1]
        counts = [
            part.reshape(gain.shape).sum(1) for part, (gain, _) in zip(np.split(chosen, ends), steps, strict=True)
        ]
        keys, values = counts[: len(self.keys)], counts[len(self.keys) :]
        return Widths(
            tuple((_KEY_RANGE[0] + n).reshape(k.shape).astype(np.uint8) for n, k in zip(keys, self.keys, strict=True)),
            tuple((_VALUE_RANGE[0] + n).astype(np.uint8) for n in values),
        )

    def predicted_kl(self, widths: Widths) -> float:
        """The error model's KL in nats: a guide for choosing, not a measurement."""
        total = 0.0
        for importances, chosen, error in (
            (self.keys, widths.keys, KEY_ERROR),
            (self.values, widths.values, VALUE_ERROR),
        ):
            for a, b in zip(importances, chosen, strict=True):
                total += float((np.exp2(a / _UNITS) * np.asarray(error)[b]).sum())
        return total

    def _as_dict(self) -> dict[str, Any]:
        return {
            "format": self.FORMAT,
            "model": self.model,
            "revision": self.revision,
            "method": self.method,
            "units": _UNITS,
            "keys": [a.tolist() for a in self.keys],
            "values": [a.tolist() for a in self.values],
        }

    @property
    def hash(self) -> bytes:
        """16 bytes: xxh3-128 of the canonical JSON without its hash, big-endian."""
        return digest(self._as_dict())

    def to_bytes(self) -> bytes:
        """The side file: canonical JSON with the field ``xxh3_128``."""
        return pack(self._as_dict())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Decode and check :meth:`to_bytes`' form. Raises :class:`~lynxproto.errors.CalibrationError`."""
        fields, intact = unpack(data, cls)
        known = {"format", "model", "revision", "method", "units", "keys", "values"}
        if set(fields) != known or fields["units"] != _UNITS:
            raise CalibrationError(f"fields must be {', '.join(sorted(known))}, with units {_UNITS}")
        if not all(isinstance(fields[name], str) for name in ("model", "revision", "method")):
            raise CalibrationError("model, revision and method must be texts")
        calibration = cls(
            model=fields["model"],
            revision=fields["revision"],
            method=fields["method"],
            keys=_arrays("keys", fields["keys"], 2),
            values=_arrays("values", fields["values"], 1),
        )
        if not intact:
            raise CalibrationError("its hash does not match its content: it was edited or damaged; calibrate again")
        return calibration


def _arrays(name: str, layers: Any, ndim: int) -> tuple[NDArray[np.int16], ...]:
    if not isinstance(layers, list) or not 1 <= len(layers) <= _MAX_LAYERS:
        raise CalibrationError(f"{name} must be a list of 1 to {_MAX_LAYERS} layers")
    arrays = []
    for index, layer in enumerate(layers):
        try:
            array = np.asarray(layer)
        except ValueError as error:  # ragged
            raise CalibrationError(f"{name}[{index}] is not a rectangle of integers") from error
        if array.ndim != ndim or array.dtype != np.int64 or array.size > _MAX_ENTRIES:
            raise CalibrationError(f"{name}[{index}] is not a rectangle of integers")
        if array.size and np.abs(array).max() > _MAX_IMPORTANCE:
            raise CalibrationError(f"{name}[{index}]: an importance is beyond ±{_MAX_IMPORTANCE}")
        arrays.append(array.astype(np.int16))
    return tuple(arrays)


def _allot(
    importances: Sequence[NDArray[np.int16]], mean: float, error: Sequence[float], low: int, high: int
) -> tuple[NDArray[np.uint8], ...]:
    """Greedy: each next bit of a channel gains less than the one before, so the bits of largest gain are taken."""
    if not low <= mean <= high:
        raise ConfigError(f"a mean width of {mean} bits is outside [{low}, {high}]")
    flat = np.concatenate([a.ravel() for a in importances]).astype(np.int64)
    gains = flat[:, None] + _gains(error)[None, low:high]
    count = int((mean - low) * flat.size + 1e-9)
    chosen = np.zeros(gains.size, bool)
    chosen[np.argsort(-gains.ravel(), kind="stable")[:count]] = True
    widths = (low + chosen.reshape(gains.shape).sum(1)).astype(np.uint8)
    ends = np.cumsum([a.size for a in importances])[:-1]
    return tuple(w.reshape(a.shape) for w, a in zip(np.split(widths, ends), importances, strict=True))


def _units(importance: NDArray[np.float64]) -> NDArray[np.int16]:
    with np.errstate(divide="ignore"):
        units = np.round(_UNITS * np.log2(importance))
    return np.clip(units, -_MAX_IMPORTANCE, _MAX_IMPORTANCE).astype(np.int16)


def _square_range(groups: Any, dim: int) -> Any:
    return (groups.amax(dim) - groups.amin(dim)).square()


def _value_groups(values: Any, group: int) -> Any:
    """``[heads, tokens, dim]`` -> ``[heads, tokens, groups, group]``; a dim that does not divide is one group."""
    return values.unflatten(2, (-1, group if values.shape[2] % group == 0 else values.shape[2]))


def _key_groups(keys: Any, group: int) -> Any:
    """``[heads, tokens, dim]`` -> ``[heads, groups, group, dim]``; a last short group repeats its last token."""
    import torch

    missing = -keys.shape[1] % group
    padded = torch.cat([keys, keys[:, -1:].expand(-1, missing, -1)], 1) if missing else keys
    return padded.unflatten(1, (-1, group))


# Anchors in floating point: what calibration perturbs the model with, on any device. The codec's integers differ from
# these by the rounding of scale and zero point only.


def _reconstruct(groups: Any, widths: Any, dim: int, *, keys: bool) -> Any:
    import torch

    low = groups.amin(dim, keepdim=True)
    span = groups.amax(dim, keepdim=True) - low
    used, offset, base = (torch.tensor(t, dtype=groups.dtype, device=groups.device) for t in _tables(keys))
    step = torch.where(span > 0, span / used[widths], torch.ones_like(span))
    cell = torch.exp2((8 - widths).to(groups.dtype))
    codes = torch.floor((torch.round((groups - low) / step) + offset[widths]) / cell) * cell + base[widths]
    return low + codes * step


def _tables(keys: bool) -> tuple[list[float], list[float], list[float]]:
    """R_b, o_b and the first reconstruction integer, b = 0..8; spec/codec-hq.md, "Anchors"."""
    used = [
        254.0,
        254.0,
        211.0 if keys else 230.0,
        *((2.0**b - 1) * 2.0 ** (8 - b) for b in range(3, 7)),
        253.0,
        254.0,
    ]
    offset = [0.0, 0.0, 22.0 if keys else 12.0, *(2.0 ** (7 - b) for b in range(3, 7)), 1.0, 0.0]
    base = [127.0, 64.0, 10.0 if keys else 19.0] + [0.0] * 6
    return used, offset, base


def anchor_keys(keys: Any, widths: Any, group: int = _GROUP) -> Any:
    """What anchors make of ``keys`` ``[kv_heads, tokens, head_dim]``; ``widths``: int64, ``[kv_heads, head_dim]``."""
    groups = _key_groups(keys, group)
    out = _reconstruct(groups, widths[:, None, None, :], 2, keys=True)
    return out.flatten(1, 2)[:, : keys.shape[1]]


def anchor_values(values: Any, widths: Any, group: int = _GROUP) -> Any:
    """What anchors make of ``values`` ``[kv_heads, tokens, head_dim]``; ``widths``: int64, ``[kv_heads]``."""
    groups = _value_groups(values, group)
    return _reconstruct(groups, widths[:, None, None, None], 3, keys=False).flatten(2)


# Measuring


@dataclass(slots=True)
class _Observed:
    """One window: its exact cache and what it says of each layer. Arrays are float64, lists have one entry a layer.

    ``keys`` and ``values``: tensors ``[kv_heads, tokens, head_dim]``. ``queries``, ``key_fisher`` and ``key_ranges``:
    mean squares, ``[kv_heads, key_dim]``; ``value_fisher`` and ``value_ranges``: ``[kv_heads]``.
    """

    scored: Any
    keys: list[Any]
    values: list[Any]
    queries: list[NDArray[np.float64]]
    key_fisher: list[NDArray[np.float64]]
    value_fisher: list[NDArray[np.float64]]
    key_ranges: list[NDArray[np.float64]]
    value_ranges: list[NDArray[np.float64]]


def calibrate(
    model: Any,
    windows: Sequence[NDArray[np.int64]],
    *,
    name: str,
    revision: str = "",
    scored: int = 128,
    sinks: int = 4,
    recent: int = 32,
    samples: int = 2,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> Calibration:
    """Measure the importances of a transformers causal model whose cache a WordCache can hold.

    ``windows`` are token ids; the last ``scored`` of each are predicted from the KV of those before them, of which the
    first ``sinks`` and the last ``recent`` stay exact. ``samples``: continuations drawn a window for the Fisher
    information. Most of the time goes into ``2 * layers + 1`` forwards of ``scored`` tokens a window.

    Raises :class:`~lynxproto.errors.ConfigError` for windows that are too short, and
    :class:`~lynxproto.errors.CalibrationError` for a model whose attention cannot be observed.
    """
    import torch

    least = scored + sinks + recent + _GROUP
    shortest = min((len(w) for w in windows), default=0)
    if shortest < least or min(scored, samples) < 1:
        raise ConfigError(
            f"windows must hold at least {least} tokens ({_GROUP} to quantise, {sinks} sinks, {recent} recent, "
            f"{scored} scored); the shortest of {len(windows)} holds {shortest}"
        )
    layers = model.config.get_text_config(decoder=True).num_hidden_layers
    total, done = len(windows) * (2 * layers + 4), 0

    def progress(what: str, steps: int = 1) -> None:
        nonlocal done
        if on_progress is not None:
            on_progress(done, total, what)
        done += steps

    body = slice(sinks, -recent or None)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        observed = []
        for ids in windows:
            progress("prefill, gradients", 3)
            tokens = torch.as_tensor(np.ascontiguousarray(ids))[None].to(model.device)
            observed.append(
                _observe(model, tokens[:, :-scored], tokens[:, -scored:], body, samples=samples, generator=generator)
            )
        key_base = [
            ranges * np.sqrt(queries * fisher)
            for ranges, queries, fisher in zip(
                _mean(observed, "key_ranges"), _mean(observed, "queries"), _mean(observed, "key_fisher"), strict=True
            )
        ]
        value_base = [
            r * f for r, f in zip(_mean(observed, "value_ranges"), _mean(observed, "value_fisher"), strict=True)
        ]
        # Layers are compared by what a typical anchor of theirs does. Its key widths ignore the layers' sensitivities.
        logits = [r * q for r, q in zip(_mean(observed, "key_ranges"), _mean(observed, "queries"), strict=True)]
        pilot = Widths(
            _allot([_units(x) for x in logits], 2.5, KEY_ERROR, *_KEY_RANGE),
            tuple(np.full(base.shape, 2, np.uint8) for base in value_base),
        )
        rise = np.zeros((2, layers))
        for window in observed:
            rise += _finite_differences(model, window, pilot, body, progress) / len(observed)
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
    progress("done", 0)
    keys, values = [], []
    for layer in range(layers):
        key_error = (key_base[layer] * np.asarray(KEY_ERROR)[pilot.keys[layer]]).sum()
        value_error = (value_base[layer] * np.asarray(VALUE_ERROR)[pilot.values[layer]]).sum()
        keys.append(_units(key_base[layer] * _ratio(rise[0, layer], key_error)))
        values.append(_units(value_base[layer] * _ratio(rise[1, layer], value_error)))
    return Calibration(
        model=name,
        revision=revision,
        method=f"range^2 sqrt(q^2 fisher), layers by KL; {len(windows)} x {shortest - scored}+{scored} tokens",
        keys=tuple(keys),
        values=tuple(values),
    )


def _mean(observed: Sequence[_Observed], field: str) -> list[NDArray[np.float64]]:
    return [np.mean(layer, 0) for layer in zip(*(getattr(window, field) for window in observed), strict=True)]


def _ratio(rise: float, error: float) -> float:
    # A KL below what float32 resolves says only that the layer hardly matters.
    return max(rise, 1e-7) / error if error > 0 else 0.0


def _observe(model: Any, context: Any, scored: Any, body: slice, *, samples: int, generator: Any) -> _Observed:
    import torch
    from transformers.cache_utils import Cache, DynamicLayer

    from lynxproto.integrations.hf import WordCache

    held = WordCache(model.config, context.shape[1])
    with torch.inference_mode(False), torch.no_grad(), _queries(model) as queries:
        model(context, past_key_values=held, use_cache=True, logits_to_keep=1)
    if sorted(queries) != list(range(len(held.layers))):
        raise CalibrationError(
            f"saw the attention of layers {sorted(queries)} out of {len(held.layers)}: {type(model).__name__} does not "
            "go through transformers' attention interface"
        )
    leaves: list[list[Any]] = [[], []]
    layers = []
    for source in held.layers:
        layer = DynamicLayer()
        layer.is_sliding = source.is_sliding  # all tokens are held; the model's mask hides old ones
        pair = [states.detach().clone().requires_grad_() for states in (source.keys, source.values)]
        layer.update(*pair)
        layers.append(layer)
        for side, leaf in zip(leaves, pair, strict=True):
            side.append(leaf)
    with torch.inference_mode(False), torch.enable_grad():
        logits = model(scored, past_key_values=Cache(layers=layers), use_cache=True).logits[0]
        log_p = torch.log_softmax(logits.float(), -1)
        squares = [[torch.zeros_like(leaf[0], dtype=torch.float32) for leaf in side] for side in leaves]
        for n in range(samples):
            # Tokens drawn from the prediction make the expected square of this gradient the Fisher information.
            drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            flat = torch.autograd.grad(
                log_p.gather(1, drawn).sum(), leaves[0] + leaves[1], retain_graph=n + 1 < samples
            )
            for side, gradients in zip(squares, (flat[: len(layers)], flat[len(layers) :]), strict=True):
                for total, gradient in zip(side, gradients, strict=True):
                    total += gradient[0].float().square() / (samples * scored.shape[1])
    keys, values = ([leaf.detach()[0] for leaf in side] for side in leaves)
    return _Observed(
        scored=scored,
        keys=keys,
        values=values,
        queries=[queries[i] for i in range(len(layers))],
        key_fisher=[_numpy(x[:, body].sum(1)) for x in squares[0]],
        value_fisher=[_numpy(x[:, body].sum((1, 2))) for x in squares[1]],
        key_ranges=[_numpy(_square_range(_key_groups(k[:, body].float(), _GROUP), 2).mean(1)) for k in keys],
        value_ranges=[_numpy(_square_range(_value_groups(v[:, body].float(), _GROUP), 3).mean((1, 2))) for v in values],
    )


def _numpy(tensor: Any) -> NDArray[np.float64]:
    array: NDArray[np.float64] = tensor.double().cpu().numpy()
    return array


@contextmanager
def _queries(model: Any) -> Iterator[dict[int, NDArray[np.float64]]]:
    """Record E[q^2] after position encoding, summed over the queries that share a KV head: ``[kv_heads, key_dim]``."""
    from lynxproto.integrations.attention import watch_attention

    recorded: dict[int, NDArray[np.float64]] = {}

    def record(layer: int, query: Any, key: Any, mask: Any, options: dict[str, Any]) -> None:
        squares = query.float().square().mean(1)
        recorded[layer] = _numpy(squares.unflatten(0, (key.shape[0], -1)).sum(1))

    with watch_attention(model, record):
        yield recorded


def _finite_differences(
    model: Any, window: _Observed, pilot: Widths, body: slice, progress: Callable[[str], None]
) -> NDArray[np.float64]:
    """KL in nats when one layer's keys, or values, alone are anchors of the pilot widths: ``[2, layers]``."""
    import torch

    from lynxproto.integrations.hf import WordCache

    context, scored = window.keys[0].shape[1], window.scored.shape[1]
    held = WordCache(model.config, context + scored)
    blocks = _blocks(model, len(held.layers))
    outputs: list[Any] = []

    def predict(first: int) -> Any:
        with _skipping(blocks[:first], outputs):
            logits = model(window.scored, past_key_values=held, use_cache=True).logits[0]
        held.expect(context)
        return torch.log_softmax(logits.float(), -1)

    with torch.inference_mode():
        for layer, pair in zip(held.layers, zip(window.keys, window.values, strict=True), strict=True):
            layer.update(*(states[None] for states in pair))
        progress("exact")
        hooks = [block.register_forward_hook(lambda block, args, output: outputs.append(output)) for block in blocks]
        exact = predict(0)
        for hook in hooks:
            hook.remove()
        if blocks and not torch.equal(predict(len(blocks) - 1), exact):
            blocks = []  # a block depends on more than the one before it: every forward has to be a whole one
        probabilities = exact.exp()
        rise = np.zeros((2, len(held.layers)))
        for part, widths, anchor in ((0, pilot.keys, anchor_keys), (1, pilot.values, anchor_values)):
            for index, layer in enumerate(held.layers):
                progress(f"{('keys', 'values')[part]} of layer {index}")
                original = (window.keys, window.values)[part][index]
                target = (layer.keys, layer.values)[part][0]
                chosen = torch.as_tensor(widths[index].astype(np.int64), device=original.device)
                target[:, body] = anchor(original[:, body].float(), chosen).to(target.dtype)
                log_p = predict(index)
                rise[part, index] = float((probabilities * (exact - log_p)).sum(-1).mean())
                target[:] = original
        return rise


def _blocks(model: Any, count: int) -> list[Any]:
    """The modules of the model's layers, in order; none if they are not to be found."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return list(lists[0]) if len(lists) == 1 else []


@contextmanager
def _skipping(blocks: Sequence[Any], outputs: Sequence[Any]) -> Iterator[None]:
    """Let ``blocks`` return ``outputs`` instead of computing: what they gave before, and would give again."""

    def returning(output: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: output

    for block, output in zip(blocks, outputs, strict=False):
        block.forward = returning(output)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
