"""Codecs and their registry.

Built in: ``raw``, ``bitplane``, ``hq``. Others register through the entry point group ``lynxproto.codecs``
(name = codec id, value = the :class:`Codec` subclass); a class is imported when it is first asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from lynxproto.codecs.abc import Buffer, Codec, DecodeState
from lynxproto.errors import ConfigError, UnknownCodecError

__all__ = ["Buffer", "Codec", "DecodeState", "codec_ids", "get_codec", "register_codec"]

_BUILT_IN = {"raw": "raw:Raw", "bitplane": "bitplane:Bitplane", "hq": "hq:HQ"}
#: The same codecs for torch tensors of any device.
_TORCH = {"bitplane": "bitplane_torch:TorchBitplane", "hq": "hq_torch:TorchHQ"}
_BACKENDS = ("native", "torch")
_classes: dict[str, type[Codec]] = {}


def codec_ids() -> list[str]:
    """All ids that :func:`get_codec` knows, installed plug-ins included."""
    found = {e.name for e in entry_points(group="lynxproto.codecs")}
    return sorted(found | set(_BUILT_IN) | set(_classes))


def register_codec(cls: type[Codec]) -> type[Codec]:
    """Register ``cls`` under ``cls.codec_id`` (usable as a decorator); refuses to replace another class."""
    known = _classes.get(cls.codec_id)
    if known is not None and known is not cls:
        raise ConfigError(f"codec id {cls.codec_id!r} is taken by {known.__qualname__}")
    _classes[cls.codec_id] = cls
    return cls


def _load(codec_id: str) -> type[Codec]:
    if codec_id in _classes:
        return _classes[codec_id]
    if codec_id in _BUILT_IN:
        return register_codec(_imported(_BUILT_IN[codec_id]))
    for entry in entry_points(group="lynxproto.codecs"):
        if entry.name == codec_id:
            return register_codec(entry.load())
    raise UnknownCodecError(f"no codec {codec_id!r}; known: {', '.join(codec_ids())}")


def _imported(place: str) -> type[Codec]:
    module, name = place.split(":")
    cls: type[Codec] = getattr(import_module(f"lynxproto.codecs.{module}"), name)
    return cls


def get_codec(codec: str | Mapping[str, Any], /, *, backend: str = "native", **config: Any) -> Codec:
    """Build a codec from its id and keyword arguments, or from a config dict with the key ``id``.

    ``backend="torch"`` (``hq`` and ``bitplane``) works on tensors of any device, without a copy to the host, and makes
    the same bytes; its payloads are uint8 tensors on that device.

    Raises :class:`~lynxproto.errors.UnknownCodecError` for an unknown id,
    :class:`~lynxproto.errors.ConfigError` for arguments the codec does not take, and
    :class:`~lynxproto.errors.MissingDependencyError` when torch is asked for and not installed.
    """
    if isinstance(codec, Mapping):
        config = {**codec, **config}
        codec_id = config.pop("id", None)
        if not isinstance(codec_id, str):
            raise ConfigError("a codec config needs the key 'id'")
    else:
        codec_id = codec
    if backend not in _BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; known: {', '.join(_BACKENDS)}")
    cls = _load(codec_id)
    if backend == "torch":
        if codec_id not in _TORCH:
            raise ConfigError(f"codec {codec_id!r} has no torch backend; {' and '.join(_TORCH)} have one")
        cls = _imported(_TORCH[codec_id])
    try:
        return cls.from_config(config)
    except TypeError as error:
        raise ConfigError(f"codec {codec_id!r}: {error}") from error
