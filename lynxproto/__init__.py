"""lynxproto: a KV cache that is usable before it has arrived, and bit-exact when it has."""
from lynxproto.chunk import ChunkSpec, Tile, TokenSet
from lynxproto.codecs import Codec, get_codec

__all__ = ["ChunkSpec", "Codec", "Tile", "TokenSet", "get_codec"]
