// SPDX-License-Identifier: Apache-2.0
// What a transfer carries: wire-format.md, "Manifest".

import { LIMIT, PROTOCOL, check } from "./errors.js";
import { array, boolean, bytesOf, integer, map, oneOf, optional, text, tuple } from "./schema.js";
import { IDENTITY_KEYS } from "./identity.js";
import { decodeMap } from "./cbor.js";

/** Parts by their number: wire-format.md, "Tiles, chunks and levels". */
export const PARTS = ["key", "value", "packed-kv", "latent", "opaque"];

export const WORD_BYTES = { bfloat16: 2, float16: 2, float32: 4, float8_e4m3: 1, float8_e5m2: 1, uint8: 1 };

const codecConfig = (value) => {
  check(value instanceof Map, PROTOCOL, "a codec config that is no map");
  check(typeof value.get("id") === "string", PROTOCOL, "a codec config without an id");
  return value;
};

const shortText = text(1024);
const readManifest = map({
  identity: map(
    Object.fromEntries(IDENTITY_KEYS.map((key) => [key, key === "model" ? shortText : optional(shortText, undefined)])),
  ),
  dtype: oneOf(Object.keys(WORD_BYTES)),
  layers: array(
    1,
    "layers",
    map({
      index: integer(0, 0xffff),
      kv_heads: integer(1, 0xffff),
      key_dim: integer(1, 2 ** 20),
      value_dim: integer(1, 2 ** 20),
      tokens: tuple(integer(0, 0xffffffff), integer(0, 0xffffffff)),
      kind: text(64),
      parts: array(1, 5, oneOf(PARTS)),
      head_start: integer(0, 0xffff),
    }),
  ),
  prompt_tokens: integer(1, 0xffffffff),
  // The table says 1 to 256; manifests/manifest/17 wants none to pass here. Sessions refuse it: see incoming.js.
  codecs: array(0, 256, codecConfig),
  layout: text(64),
  packing: text(256),
  request_id: text(1024),
  shard: tuple(integer(0, 2 ** 20), integer(0, 2 ** 20)),
  lossy: boolean,
  tables: array(0, 1024, bytesOf(16, 32)),
});

function checkLayer(layer) {
  const [start, stop] = layer.tokens;
  check(start < stop, PROTOCOL, "a layer without tokens");
  check(layer.head_start + layer.kv_heads <= 0xffff, PROTOCOL, "heads beyond 65535");
  check(new Set(layer.parts).size === layer.parts.length, PROTOCOL, "a part twice");
}

/** Values of one head of one token in a part. */
export function headDim(layer, part) {
  if (part === "value") return layer.value_dim;
  return part === "packed-kv" ? layer.key_dim + layer.value_dim : layer.key_dim;
}

/** The bytes of the uncompressed cache: may be more than a Number holds. */
export function cacheBytes(manifest) {
  let bytes = 0n;
  for (const layer of manifest.layers) {
    const dims = layer.parts.reduce((sum, part) => sum + headDim(layer, part), 0);
    bytes += BigInt(layer.kv_heads) * BigInt(layer.tokens[1] - layer.tokens[0]) * BigInt(dims);
  }
  return bytes * BigInt(WORD_BYTES[manifest.dtype]);
}

/** Checks the schema, then the limits. */
export function parseManifest(bytes, limits) {
  const manifest = readManifest(decodeMap(bytes), limits);
  manifest.layers.forEach(checkLayer);
  const indices = new Set(manifest.layers.map((layer) => layer.index));
  check(indices.size === manifest.layers.length, PROTOCOL, "a layer twice");
  const last = manifest.layers.reduce((most, layer) => Math.max(most, layer.tokens[1]), 0);
  check(manifest.prompt_tokens >= last, PROTOCOL, "fewer prompt tokens than a layer's");
  check(manifest.shard[0] < manifest.shard[1], PROTOCOL, "shard");
  check(manifest.prompt_tokens <= limits.tokens, LIMIT, "more tokens than the limit");
  check(cacheBytes(manifest) <= limits.transfer_bytes, LIMIT, "more bytes than the limit");
  return manifest;
}
