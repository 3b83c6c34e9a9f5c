"""What a transfer carries: identity, layers, dtype, layout, codecs. Sent in OPEN, before prefill has ended.

Encoded as a CBOR map (RFC 8949); spec/wire-format.md, "Manifest". Nothing here depends on the prefill's outcome:
tiers come in PLAN, digests in END, the first token in RESULT.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import xxhash

from lynxproto import _cbor
from lynxproto.chunk import DTYPES, PARTS, Part, Tile
from lynxproto.errors import ErrorCode, LimitError, ProtocolError, SpecError

if TYPE_CHECKING:
    from lynxproto.config import Limits

__all__ = ["FetchKey", "Identity", "LayerSpec", "Manifest", "Want"]

MAX_WANTS = 4096
_MAX_CODECS = 256
_MAX_TABLES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Whose cache this is. Two sides with different identities must not exchange caches (REJECT, IDENTITY).

    An empty field means "not stated" and matches anything; hashes are opaque texts.
    """

    model: str
    revision: str = ""
    tokenizer_hash: str = ""
    rope_hash: str = ""
    producer: str = ""
    attention_backend: str = ""

    def mismatch(self, other: Identity) -> str | None:
        """The first field that both sides state and that differs, as text for an error; None if they agree."""
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                return f"{name} is {theirs!r}, expected {mine!r}"
        return None

    def hash(self) -> bytes:
        """16 bytes that name this identity (part of a :class:`FetchKey`): xxh3-128 of its CBOR, big-endian."""
        return xxhash.xxh3_128_digest(_cbor.dumps(self._as_map()))

    def _as_map(self) -> dict[str, Any]:
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) or name == "model"}

    @classmethod
    def _from_map(cls, fields: _cbor.Fields) -> Identity:
        identity = cls(model=fields.text("model"), **{n: fields.text(n, default="") for n in cls.__slots__[1:]})
        fields.done()
        return identity


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One layer of the cache: its token range, heads, head sizes and parts.

    It carries KV heads ``[head_start, head_start + kv_heads)`` of the whole model and tokens
    ``[token_start, token_stop)`` of the prompt (a sliding-window layer keeps fewer than the prompt has).
    """

    index: int
    kv_heads: int
    key_dim: int
    value_dim: int
    token_stop: int
    token_start: int = 0
    kind: str = "full"
    parts: tuple[Part, ...] = ("key", "value")
    head_start: int = 0

    def __post_init__(self) -> None:
        for name in ("kv_heads", "key_dim", "value_dim"):
            if getattr(self, name) < 1:
                raise SpecError(f"layer {self.index}: {name} must be positive, not {getattr(self, name)}")
        if self.index < 0 or self.head_start < 0:
            raise SpecError(f"layer {self.index}: index and head_start must not be negative")
        if self.head_start + self.kv_heads > 0xFFFF:
            raise SpecError(f"layer {self.index}: heads beyond 65535 do not fit the wire format")
        if not 0 <= self.token_start < self.token_stop <= 0xFFFFFFFF:
            raise SpecError(
                f"layer {self.index}: token range [{self.token_start}, {self.token_stop}) is empty or too large"
            )
        if not self.parts or any(part not in PARTS for part in self.parts) or len(set(self.parts)) != len(self.parts):
            raise SpecError(f"layer {self.index}: parts {self.parts} must be distinct names among {', '.join(PARTS)}")

    @property
    def tokens(self) -> int:
        """How many tokens the layer holds."""
        return self.token_stop - self.token_start

    def head_dim(self, part: Part) -> int:
        """Values per token and head of ``part``: ``packed-kv`` holds a key and a value, the others follow key_dim."""
        if part == "value":
            return self.value_dim
        return self.key_dim + self.value_dim if part == "packed-kv" else self.key_dim

    def words(self) -> int:
        """Values of all parts."""
        return self.kv_heads * self.tokens * sum(self.head_dim(part) for part in self.parts)

    def _as_map(self) -> dict[str, Any]:
        return {
            "index": self.index,
            "kv_heads": self.kv_heads,
            "key_dim": self.key_dim,
            "value_dim": self.value_dim,
            "tokens": [self.token_start, self.token_stop],
            "kind": self.kind,
            "parts": list(self.parts),
            "head_start": self.head_start,
        }

    @classmethod
    def _from_map(cls, fields: _cbor.Fields) -> LayerSpec:
        start, stop = fields.integers("tokens", 2, 0, 0xFFFFFFFF)
        layer = cls(
            index=fields.integer("index", 0, 0xFFFF),
            kv_heads=fields.integer("kv_heads", 1, 0xFFFF),
            key_dim=fields.integer("key_dim", 1, 1 << 20),
            value_dim=fields.integer("value_dim", 1, 1 << 20),
            token_start=start,
            token_stop=stop,
            kind=fields.text("kind", 64),
            parts=fields.texts("parts", len(PARTS), 32),  # type: ignore[arg-type]  # __post_init__ checks the names
            head_start=fields.integer("head_start", 0, 0xFFFF),
        )
        fields.done()
        return layer


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All that both sides must know of a transfer before any data moves.

    ``codecs`` are codec configs (``{"id": ..., ...}``); a tile's ``codec`` indexes them. ``tables`` are hashes of
    codec tables that the receiver must already hold (else it refuses with MISSING_TABLE); inline tables are part of
    a codec config. ``layout`` is the producer's, in vLLM's letters; ``packing`` names an opaque page format.
    ``shard_index`` of ``shard_count``: a request may be carried by several transfers.

    Raises :class:`~lynxproto.errors.SpecError` for contradictions.
    """

    identity: Identity
    dtype: str
    layers: tuple[LayerSpec, ...]
    prompt_tokens: int
    codecs: tuple[dict[str, Any], ...] = ()
    layout: str = "LBHNC"
    packing: str = ""
    request_id: str = ""
    shard_index: int = 0
    shard_count: int = 1
    lossy: bool = False
    tables: tuple[bytes, ...] = ()
    _by_index: dict[int, LayerSpec] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(f"unknown dtype {self.dtype!r}; known: {', '.join(DTYPES)}")
        if not self.layers:
            raise SpecError("a manifest needs at least one layer")
        object.__setattr__(self, "_by_index", {layer.index: layer for layer in self.layers})
        if len(self._by_index) != len(self.layers):
            raise SpecError("two layers of the manifest have the same index")
        if self.prompt_tokens < max(layer.token_stop for layer in self.layers):
            raise SpecError(f"prompt_tokens {self.prompt_tokens} is less than a layer's last token")
        if not 0 <= self.shard_index < self.shard_count:
            raise SpecError(f"shard {self.shard_index} of {self.shard_count} does not exist")

    @classmethod
    def for_cache(
        cls, *, identity: Identity, dtype: str, layers: int, kv_heads: int, head_dim: int, tokens: int, **kw: Any
    ) -> Manifest:
        """The manifest of a uniform cache: ``layers`` full-attention layers of ``[kv_heads, tokens, head_dim]``."""
        specs = tuple(
            LayerSpec(index=i, kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim, token_stop=tokens)
            for i in range(layers)
        )
        return cls(identity=identity, dtype=dtype, layers=specs, prompt_tokens=tokens, **kw)

    def layer(self, index: int) -> LayerSpec:
        """The layer with this index. Raises :class:`~lynxproto.errors.SpecError` if the manifest has none."""
        try:
            return self._by_index[index]
        except KeyError:
            raise SpecError(f"the manifest has no layer {index}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the uncompressed cache."""
        return sum(layer.words() for layer in self.layers) * DTYPES[self.dtype].itemsize

    def to_bytes(self) -> bytes:
        """The deterministic CBOR form."""
        return _cbor.dumps(
            {
                "identity": self.identity._as_map(),
                "dtype": self.dtype,
                "layers": [layer._as_map() for layer in self.layers],
                "prompt_tokens": self.prompt_tokens,
                "codecs": [dict(config) for config in self.codecs],
                "layout": self.layout,
                "packing": self.packing,
                "request_id": self.request_id,
                "shard": [self.shard_index, self.shard_count],
                "lossy": self.lossy,
                "tables": list(self.tables),
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, limits: Limits) -> Manifest:
        """Decode and check against ``limits``.

        Raises :class:`~lynxproto.errors.ProtocolError` for a manifest that breaks the schema and
        :class:`~lynxproto.errors.LimitError` for one that is larger than this side agreed to.
        """
        fields = _cbor.loads(data, "manifest")
        layers = fields.array("layers", 0xFFFF)
        if len(layers) > limits.layers:
            raise LimitError(f"manifest: {len(layers)} layers, limit {limits.layers}")
        codecs = fields.array("codecs", _MAX_CODECS)
        shard_index, shard_count = fields.integers("shard", 2, 0, 1 << 20)
        try:
            manifest = cls(
                identity=Identity._from_map(fields.mapping("identity")),
                dtype=fields.text("dtype", 32),
                layers=tuple(LayerSpec._from_map(_cbor.Fields(m, "manifest.layers")) for m in layers),
                prompt_tokens=fields.integer("prompt_tokens", 1, 0xFFFFFFFF),
                codecs=tuple(_config(config) for config in codecs),
                layout=fields.text("layout", 64),
                packing=fields.text("packing", 256),
                request_id=fields.text("request_id"),
                shard_index=shard_index,
                shard_count=shard_count,
                lossy=fields.flag("lossy"),
                tables=fields.blobs("tables", _MAX_TABLES, (16, 32)),
            )
        except SpecError as error:
            raise ProtocolError(f"manifest: {error}") from error
        fields.done()
        if manifest.prompt_tokens > limits.tokens:
            raise LimitError(f"manifest: {manifest.prompt_tokens} tokens, limit {limits.tokens}")
        if manifest.nbytes > limits.transfer_bytes:
            raise LimitError(f"manifest: {manifest.nbytes} bytes of cache, limit {limits.transfer_bytes}")
        return manifest


def _config(config: Any) -> dict[str, Any]:
    if type(config) is not dict or type(config.get("id")) is not str:
        raise ProtocolError("manifest.codecs: a codec config must be a map with the text field 'id'")
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """A rectangle of a cache that a receiver lacks; None in a field means all of it.

    A sender sends every tile that meets some :class:`Want` of the receiver, whole, and only levels below ``levels``.
    Ranges are ``(start, stop)`` of layer indices, KV heads and token positions.
    """

    layers: tuple[int, int] | None = None
    heads: tuple[int, int] | None = None
    tokens: tuple[int, int] | None = None
    levels: int | None = None

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "tokens"):
            span = getattr(self, name)
            if span is not None and not 0 <= span[0] < span[1]:
                raise SpecError(f"Want.{name} {span} is empty or negative")
        if self.levels is not None and self.levels < 1:
            raise SpecError("Want.levels must be at least 1")

    def levels_of(self, tile: Tile, levels: int) -> int:
        """How many of the ``levels`` of ``tile`` this asks for (0: none)."""
        meets = (
            _meet(self.layers, tile.layer, tile.layer + 1)
            and _meet(self.heads, tile.head_start, tile.head_start + tile.heads)
            and _meet(self.tokens, tile.tokens.start, tile.tokens.stop)
        )
        return 0 if not meets else levels if self.levels is None else min(levels, self.levels)

    def as_list(self) -> list[Any]:
        """The wire form: ``[layers, heads, tokens, levels]``."""
        spans = [None if span is None else list(span) for span in (self.layers, self.heads, self.tokens)]
        return [*spans, self.levels]

    @classmethod
    def from_list(cls, value: Any) -> Want:
        """Decode :meth:`as_list`'s form. Raises :class:`~lynxproto.errors.ProtocolError`."""
        if type(value) is not list or len(value) != 4:
            raise ProtocolError("want: expected [layers, heads, tokens, levels]")
        spans: list[tuple[int, int] | None] = []
        for span in value[:3]:
            if span is None:
                spans.append(None)
            elif type(span) is list and len(span) == 2 and all(type(x) is int for x in span):
                spans.append((span[0], span[1]))
            else:
                raise ProtocolError(f"want: {span!r} is not a range")
        if value[3] is not None and type(value[3]) is not int:
            raise ProtocolError(f"want: levels {value[3]!r} is not an integer")
        try:
            return cls(layers=spans[0], heads=spans[1], tokens=spans[2], levels=value[3])
        except SpecError as error:
            raise ProtocolError(f"want: {error}", ErrorCode.PROTOCOL) from error


def _meet(span: tuple[int, int] | None, start: int, stop: int) -> bool:
    return span is None or (span[0] < stop and start < span[1])


def check_wants(wants: Sequence[Want]) -> None:
    """Raise :class:`~lynxproto.errors.SpecError` if there are more than a frame may hold."""
    if len(wants) > MAX_WANTS:
        raise SpecError(f"{len(wants)} wants, a frame holds {MAX_WANTS}; use larger rectangles")


#: What most receivers ask for.
_EVERYTHING: Final = (Want(),)


def wanted_levels(wants: Iterable[Want], tile: Tile, levels: int) -> int:
    """How many of the ``levels`` of ``tile`` some of ``wants`` ask for."""
    if wants == _EVERYTHING:
        return levels
    return max((want.levels_of(tile, levels) for want in wants), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchKey:
    """What FETCH asks for: ``identity`` (:meth:`Identity.hash`), the hashes of the prompt's token blocks, a salt.

    The salt separates tenants: equal prompts under different salts are different keys.
    """

    identity: bytes
    blocks: tuple[bytes, ...]
    salt: bytes = b""

    def __post_init__(self) -> None:
        if len(self.identity) != 16:
            raise SpecError("FetchKey.identity must be the 16 bytes of Identity.hash()")
        if any(not 8 <= len(block) <= 32 for block in self.blocks) or len(self.salt) > 64:
            raise SpecError("FetchKey: block hashes have 8 to 32 bytes, the salt at most 64")

    @classmethod
    def of_request(cls, request_id: str, identity: Identity, salt: bytes = b"") -> FetchKey:
        """The key of a cache that is known by its request id: one block, xxh3-128 of the id (big-endian)."""
        return cls(identity=identity.hash(), blocks=(xxhash.xxh3_128_digest(request_id.encode()),), salt=salt)
