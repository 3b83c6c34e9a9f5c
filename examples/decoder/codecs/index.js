// SPDX-License-Identifier: Apache-2.0
// The codecs by name: wire-format.md, "Codec ids", and conformance.md, "decode".
//
// A codec has `id` (its number), `levels`, `exact` (whether the last level restores the words), `zstd`, and
// - checkTile(tile): refuses a tile that it cannot hold;
// - largestPayload(tile, level);
// - decoder(tile): an object of which decode(level, payload) is called for each level in turn and returns the words.
//
// A tile has `dtype`, `part` (a name), `shape` ([heads, tokens, head_dim]), `layer` and `head_start`.

import { PROTOCOL, Refusal, UNSUPPORTED, Unsupported, check } from "../errors.js";
import { bitplane } from "./bitplane.js";
import { fromJson } from "./config.js";
import { hq } from "./hq.js";
import { raw } from "./raw.js";

const CODECS = { raw, bitplane, hq };

/** The codec of a config; one that is not valid is refused with UNSUPPORTED. */
export function buildCodec(config) {
  const name = config.get("id");
  check(typeof name === "string" && Object.hasOwn(CODECS, name), UNSUPPORTED, "an unknown codec");
  return CODECS[name](config);
}

function atLevel(level, action) {
  try {
    return action();
  } catch (error) {
    if (error instanceof Refusal) error.details.level = level;
    throw error;
  }
}

/** conformance.md, "decode": the words after each level. */
export function decodeTile({ codec: config, dtype, part, shape, layer = 0, head_start = 0, payloads }) {
  const codec = buildCodec(fromJson(config));
  const tile = { dtype, part, shape, layer, head_start };
  atLevel(0, () => codec.checkTile(tile));
  if (codec.zstd) throw new Unsupported("Zstandard");
  check(payloads.length <= codec.levels, PROTOCOL, "more payloads than levels", { level: codec.levels });
  const decoder = codec.decoder(tile);
  return payloads.map((payload, level) => atLevel(level, () => decoder.decode(level, payload)));
}
