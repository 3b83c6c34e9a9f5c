"""lynxproto: a KV cache that is usable before it has arrived, and bit-exact when it has.

The names below are the public ones; sessions (``connect``, ``listen``) are imported when first used, so that
codecs alone stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lynxproto.chunk import ChunkSpec, Tile, TokenSet
from lynxproto.codecs import Codec, get_codec
from lynxproto.errors import LynxError

if TYPE_CHECKING:
    from lynxproto.access import Principal
    from lynxproto.cachefile import Cache
    from lynxproto.config import Admission, Config, Secret
    from lynxproto.manifest import Identity, LayerSpec, Manifest
    from lynxproto.policy import Policy
    from lynxproto.session import Deadline, Progress, connect, listen
    from lynxproto.transports import TokenBucket

__version__ = "0.1.0"

__all__ = [
    "Admission",
    "Cache",
    "ChunkSpec",
    "Codec",
    "Config",
    "Deadline",
    "Identity",
    "LayerSpec",
    "LynxError",
    "Manifest",
    "Policy",
    "Principal",
    "Progress",
    "Secret",
    "Tile",
    "TokenBucket",
    "TokenSet",
    "connect",
    "get_codec",
    "listen",
]

_LAZY = {
    "Admission": "config",
    "Cache": "cachefile",
    "Config": "config",
    "Deadline": "session",
    "Identity": "manifest",
    "LayerSpec": "manifest",
    "Manifest": "manifest",
    "Policy": "policy",
    "Principal": "access",
    "Progress": "session",
    "Secret": "config",
    "TokenBucket": "transports",
    "connect": "session",
    "listen": "session",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"lynxproto.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lynxproto' has no attribute {name!r}")
