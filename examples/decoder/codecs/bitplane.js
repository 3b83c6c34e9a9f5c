// SPDX-License-Identifier: Apache-2.0
// Codec bitplane: codec-bitplane.md. Zstandard is not in this program.

import { PAYLOAD, PROTOCOL, UNSUPPORTED, Unsupported, check } from "../errors.js";
import { WORD_BYTES } from "../manifest.js";
import { checkKeys, integerOf, zstdOf } from "./config.js";
import { largestRaw, valuesOf } from "./raw.js";

const HEADER = 4;

function planesOf(config) {
  const planes = config.get("planes");
  check(Array.isArray(planes) && planes.length >= 1 && planes.length <= 8, UNSUPPORTED, "planes");
  const counts = planes.map((count) => integerOf(count, 1, 32));
  const bits = counts.reduce((sum, count) => sum + count, 0);
  check([8, 16, 32].includes(bits), UNSUPPORTED, "planes of another number of bits");
  return { counts, bits };
}

class Decoder {
  constructor(tile, { counts, bits }) {
    this.values = valuesOf(tile);
    this.counts = counts;
    this.bits = bits;
    this.words = null;
    this.plane = 0; // the next one
  }

  decode(level, payload) {
    const count = this.counts[level];
    const planeBytes = Math.ceil(this.values / 8);
    check(payload.length === HEADER + count * planeBytes, PAYLOAD, "planes of another size");
    check(payload[0] === level && payload[1] === count && payload[2] === 0 && payload[3] === 0, PAYLOAD, "header");
    this.words = this.words ? Buffer.from(this.words) : Buffer.alloc((this.values * this.bits) / 8);
    for (let i = 0; i < count; i++, this.plane++) {
      const start = HEADER + i * planeBytes;
      this.#setPlane(payload.subarray(start, start + planeBytes));
    }
    return this.words;
  }

  /** Puts a plane into its bit of every word; words are little-endian. */
  #setPlane(bytes) {
    const bit = this.bits - 1 - this.plane;
    const step = this.bits / 8;
    for (let i = 0; i < this.values; i++) {
      this.words[i * step + (bit >> 3)] |= ((bytes[i >> 3] >> (i & 7)) & 1) << (bit & 7);
    }
  }
}

export function bitplane(config) {
  checkKeys(config, ["id", "planes", "zstd"]);
  const zstd = zstdOf(config);
  const planes = planesOf(config);
  return {
    id: 2,
    levels: planes.counts.length,
    exact: true,
    zstd,
    checkTile: (tile) => check(8 * WORD_BYTES[tile.dtype] === planes.bits, PROTOCOL, "words of another number of bits"),
    largestPayload: (tile, level) => HEADER + largestRaw(planes.counts[level] * Math.ceil(valuesOf(tile) / 8), zstd),
    decoder(tile) {
      if (zstd) throw new Unsupported("Zstandard");
      return new Decoder(tile, planes);
    },
  };
}
