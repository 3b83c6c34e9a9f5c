"""Manifests: the schema, the limits, the contradictions."""

from __future__ import annotations

import copy
from typing import Any

from pieces import File

from lynxproto import _cbor
from lynxproto.errors import ErrorCode

_NOTES = {
    "missing": "a required key is not there",
    "type": "a key holds a value of another type",
    "boundary": "the first or the last value that is allowed, or the next one",
    "unknown": "keys that version 1 does not define",
    "contradiction": "each value is allowed, not all together",
    "hostile": "counts and sizes chosen to make a reader allocate or overflow",
}
_LAYER: dict[str, Any] = {
    "index": 0,
    "kv_heads": 2,
    "key_dim": 64,
    "value_dim": 64,
    "tokens": [0, 100],
    "kind": "full",
    "parts": ["key", "value"],
    "head_start": 0,
}
_MANIFEST: dict[str, Any] = {
    "identity": {"model": "m"},
    "dtype": "bfloat16",
    "layers": [_LAYER, {**_LAYER, "index": 1}],
    "prompt_tokens": 100,
    "codecs": [{"id": "hq", "levels": 3}, {"id": "raw"}],
    "layout": "LBHNC",
    "packing": "",
    "request_id": "r-1",
    "shard": [0, 1],
    "lossy": False,
    "tables": [],
}


def manifests() -> File:
    f = File("manifests", "Manifests", _NOTES)
    f.group("manifest", "wire-format.md, Manifest")

    def good(comment: str, changed: dict[str, Any], size: int, *flags: str, drop: str = "", **more: Any) -> None:
        sent = {**_MANIFEST, **changed}
        told = copy.deepcopy(sent)
        told.pop(drop, None)
        f.valid(comment, {"data": _cbor.dumps(sent), **more}, {"manifest": told, "bytes": size}, *flags)

    def bad(
        comment: str, changed: dict[str, Any], *flags: str, code: ErrorCode = ErrorCode.PROTOCOL, **more: Any
    ) -> None:
        f.invalid(comment, {"data": _cbor.dumps({**_MANIFEST, **changed}), **more}, code, *flags)

    def layer(**changed: Any) -> dict[str, Any]:
        return {"layers": [{**_LAYER, **changed}]}

    one = 2 * 100 * 128 * 2
    good("two layers", {}, 2 * one)
    good("unknown keys", {"later": [1]}, 2 * one, "unknown", drop="later")
    for dtype, size in (("float16", 2), ("float32", 4), ("float8_e4m3", 1), ("float8_e5m2", 1), ("uint8", 1)):
        good(f"dtype {dtype}", {"dtype": dtype}, one * size)
    full = {"model": "m", "revision": "r", "tokenizer_hash": "t", "rope_hash": "o", "producer": "p"}
    good("the whole identity", {"identity": {**full, "attention_backend": "a"}}, 2 * one)
    good("lossy, a shard, tables", {"lossy": True, "shard": [2, 3], "tables": [bytes(16), bytes(32)]}, 2 * one)
    good("a window layer of the last tokens", layer(tokens=[90, 100], kind="sliding"), one // 10)
    good("packed parts", layer(parts=["packed-kv"]), one)
    good("a latent", layer(parts=["latent"], key_dim=576, kv_heads=1), 100 * 576 * 2)
    good("an opaque part and its packing", {**layer(parts=["opaque"]), "packing": "amx"}, one // 2)
    good(
        "layers with other indices, in any order", {"layers": [{**_LAYER, "index": 65535}, _LAYER]}, 2 * one, "boundary"
    )
    good("heads of a shard", layer(head_start=65533), one, "boundary")
    good("more prompt tokens than any layer", {"prompt_tokens": 2000}, 2 * one)
    good("no codecs", {"codecs": []}, 2 * one, "boundary")
    for key in _MANIFEST:
        without = {k: v for k, v in _MANIFEST.items() if k != key}
        f.invalid(f"{key} is missing", {"data": _cbor.dumps(without)}, ErrorCode.PROTOCOL, "missing")
        bad(f"{key} of another type", {key: 1.5}, "type")
    for key in _LAYER:
        lacking = {k: v for k, v in _LAYER.items() if k != key}
        bad(f"layers.{key} is missing", {"layers": [lacking]}, "missing")
        bad(f"layers.{key} of another type", layer(**{key: None}), "type")
    bad("the model is missing", {"identity": {}}, "missing")
    bad("an unknown dtype", {"dtype": "float4"}, "unknown")
    bad("no layers", {"layers": []}, "boundary")
    bad("a layer twice", {"layers": [_LAYER, _LAYER]}, "contradiction")
    for name, value in {
        "index": 65536,
        "kv_heads": 0,
        "key_dim": 0,
        "value_dim": 0,
        "tokens": [100, 100],
        "parts": [],
        "head_start": -1,
    }.items():
        bad(f"layers.{name} = {value}", layer(**{name: value}), "boundary")
    bad("key_dim beyond 2^20", layer(key_dim=(1 << 20) + 1), "boundary")
    bad("an unknown part", layer(parts=["keys"]), "unknown")
    bad("a part twice", layer(parts=["key", "key"]), "contradiction")
    bad("tokens backwards", layer(tokens=[50, 20]), "contradiction")
    bad("tokens of three", layer(tokens=[0, 1, 2]), "boundary")
    bad("heads beyond 65535", layer(head_start=65534), "boundary")
    bad("fewer prompt tokens than a layer", {"prompt_tokens": 99}, "contradiction")
    bad("prompt_tokens 0", {"prompt_tokens": 0}, "boundary")
    bad("shard 1 of 1", {"shard": [1, 1]}, "contradiction")
    bad("shard 0 of 0", {"shard": [0, 0]}, "boundary")
    bad("a codec without id", {"codecs": [{"levels": 3}]}, "missing")
    bad("a codec that is a text", {"codecs": ["raw"]}, "type")
    bad("a table hash of 20 bytes", {"tables": [bytes(20)]}, "boundary")
    critical = ErrorCode.UNKNOWN_CRITICAL
    bad("an unknown critical key", {"!later": 1}, "unknown", code=critical)
    bad("an unknown critical key of a layer", layer(**{"!later": 1}), "unknown", code=critical)
    bad("an unknown critical key of the identity", {"identity": {"model": "m", "!l": 1}}, "unknown", code=critical)
    over = ErrorCode.LIMIT
    good("as many layers as the limit", {}, 2 * one, "boundary", limits={"layers": 2})
    bad("one layer too many", {}, "hostile", code=over, limits={"layers": 1})
    good("as many tokens as the limit", {}, 2 * one, "boundary", limits={"tokens": 100})
    bad("one token too many", {}, "hostile", code=over, limits={"tokens": 99})
    good("as many bytes as the limit", {}, 2 * one, "boundary", limits={"transfer_bytes": 2 * one})
    bad("one byte too many", {}, "hostile", code=over, limits={"transfer_bytes": 2 * one - 1})
    huge = {"kv_heads": 65535, "key_dim": 1 << 20, "value_dim": 1 << 20, "tokens": [0, 1 << 20]}
    bad("a cache of 2^58 bytes", {**layer(**huge), "prompt_tokens": 1 << 20}, "hostile", code=over)
    bad("257 codecs", {"codecs": [{"id": "raw"}] * 257}, "hostile", code=over)
    for comment, data in (
        ("no bytes", b""),
        ("an array", b"\x80"),
        ("bytes that follow", _cbor.dumps(_MANIFEST) + b"\0"),
        ("half a manifest", _cbor.dumps(_MANIFEST)[:100]),
    ):
        f.invalid(comment, {"data": data}, ErrorCode.PROTOCOL, "hostile")
    return f
