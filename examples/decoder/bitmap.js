// SPDX-License-Identifier: Apache-2.0
// Bitmaps of explicit token sets: wire-format.md, "Frame header", "Extension".

import { PROTOCOL, check } from "./errors.js";

export const bitmapSize = (tokens) => Math.ceil(tokens / 8);

const bit = (bitmap, i) => (bitmap[i >> 3] >> (i & 7)) & 1;

/** Refuses a bitmap that the rules for a range of `tokens` tokens do not allow. */
export function checkBitmap(bitmap, tokens) {
  check(bitmap.length === bitmapSize(tokens), PROTOCOL, "a bitmap of another size");
  check(bit(bitmap, 0) && bit(bitmap, tokens - 1), PROTOCOL, "a bitmap without the first or the last token");
  if (tokens % 8) check(bitmap.at(-1) >> (tokens % 8) === 0, PROTOCOL, "spare bits of a bitmap");
  check(countTokens(bitmap) < tokens, PROTOCOL, "a contiguous token set as bitmap");
}

export function countTokens(bitmap) {
  let count = 0;
  for (let byte of bitmap) for (; byte; byte &= byte - 1) count++;
  return count;
}

/** The places (from 0) of the tokens that belong. */
export function* placesIn(bitmap) {
  for (let i = 0; i < 8 * bitmap.length; i++) if (bit(bitmap, i)) yield i;
}
