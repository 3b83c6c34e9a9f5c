// SPDX-License-Identifier: Apache-2.0
// Codec raw: codec-raw.md. Zstandard is not in this program.

import { PAYLOAD, Unsupported, check } from "../errors.js";
import { WORD_BYTES } from "../manifest.js";
import { checkKeys, zstdOf } from "./config.js";

/** The number of values of a tile. */
export const valuesOf = ({ shape: [heads, tokens, headDim] }) => heads * tokens * headDim;

/** The largest payload of `size` bytes, with Zstandard or without. */
export const largestRaw = (size, zstd) =>
  zstd ? size + Math.floor(size / 256) + Math.floor(Math.max(0, 131072 - size) / 2048) : size;

export function raw(config) {
  checkKeys(config, ["id", "zstd"]);
  const zstd = zstdOf(config);
  const sizeOf = (tile) => valuesOf(tile) * WORD_BYTES[tile.dtype];
  return {
    id: 1,
    levels: 1,
    exact: true,
    zstd,
    checkTile() {},
    largestPayload: (tile) => largestRaw(sizeOf(tile), zstd),
    decoder: (tile) => ({
      decode(level, payload) {
        if (zstd) throw new Unsupported("Zstandard");
        check(payload.length === sizeOf(tile), PAYLOAD, "words of another size");
        return payload;
      },
    }),
  };
}
