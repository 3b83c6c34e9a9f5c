// SPDX-License-Identifier: Apache-2.0
// Types of the values in control payloads and manifests: wire-format.md, "Control payloads".
//
// A type is a function of a decoded CBOR value and of the reader's limits. It returns the value as the rest of the
// program uses it or refuses it. Integers become Numbers where that is exact, else they stay BigInts; comparisons in
// JavaScript work for a mixture of both.

import { LIMIT, PROTOCOL, UNKNOWN_CRITICAL, check, knownCode } from "./errors.js";
import { checkBitmap } from "./bitmap.js";

export const MAX_INT63 = 2n ** 63n - 1n;

const toNumber = (value) =>
  value <= Number.MAX_SAFE_INTEGER && value >= Number.MIN_SAFE_INTEGER ? Number(value) : value;

export const integer =
  (low, high = Infinity) =>
  (value) => {
    check(typeof value === "bigint", PROTOCOL, "no integer");
    check(value >= low && value <= high, PROTOCOL, "an integer out of its range");
    return toNumber(value);
  };

export const boolean = (value) => {
  check(typeof value === "boolean", PROTOCOL, "no boolean");
  return value;
};

export const text = (most) => (value) => {
  check(typeof value === "string", PROTOCOL, "no text");
  // Characters are code points, of which each is one or two units of a JavaScript string.
  check(value.length <= 2 * most && [...value].length <= most, PROTOCOL, "a text that is too long");
  return value;
};

export const oneOf = (names) => (value) => {
  check(names.includes(value), PROTOCOL, "not one of the names");
  return value;
};

/** Bytes of `least` to `most`. */
export const bytes = (least, most) => (value) => {
  check(value instanceof Uint8Array, PROTOCOL, "no bytes");
  check(value.length >= least && value.length <= most, PROTOCOL, "bytes of another size");
  return value;
};

/** Bytes of one of the sizes. */
export const bytesOf =
  (...sizes) =>
  (value) => {
    check(value instanceof Uint8Array, PROTOCOL, "no bytes");
    check(sizes.includes(value.length), PROTOCOL, "bytes of another size");
    return value;
  };

/** A float of at least `low` (or more, if `above`) and below `high`. NaN is in no range. */
export const float =
  ({ low = -Infinity, above = false, high = Infinity } = {}) =>
  (value) => {
    check(typeof value === "number", PROTOCOL, "no float");
    const anything = low === -Infinity && high === Infinity;
    check(anything || ((above ? value > low : value >= low) && value < high), PROTOCOL, "a float out of its range");
    return value;
  };

export const nullable = (type) => (value, limits) => (value === null ? null : type(value, limits));

/** An array of `least` items to `most`, a number or the name of a limit. */
export const array = (least, most, type) => (value, limits) => {
  check(Array.isArray(value), PROTOCOL, "no array");
  check(value.length <= (typeof most === "string" ? limits[most] : most), LIMIT, "an array that is too long");
  check(value.length >= least, PROTOCOL, "an array that is too short");
  return value.map((item) => type(item, limits));
};

export const arrayOf = (size, type) => (value, limits) => {
  check(Array.isArray(value) && value.length === size, PROTOCOL, "no array of the size");
  return value.map((item) => type(item, limits));
};

export const tuple =
  (...types) =>
  (value, limits) => {
    check(Array.isArray(value) && value.length === types.length, PROTOCOL, "no array of the size");
    return value.map((item, i) => types[i](item, limits));
  };

/** A key that may be absent. */
export const optional = (type, otherwise) => Object.assign((value, limits) => type(value, limits), { otherwise });

/** A map of the keys of `table`: unknown ones are ignored, but for those that begin with `!`. */
export const map = (table) => (value, limits) => {
  check(value instanceof Map, PROTOCOL, "no map");
  for (const key of value.keys()) {
    check(!key.startsWith("!") || Object.hasOwn(table, key), UNKNOWN_CRITICAL, "an unknown critical key");
  }
  const result = {};
  for (const [key, type] of Object.entries(table)) {
    if (value.has(key)) {
      result[key] = type(value.get(key), limits);
    } else {
      check("otherwise" in type, PROTOCOL, "a key is missing");
      if (type.otherwise !== undefined) result[key] = type.otherwise;
    }
  }
  return result;
};

export const code = (value) => knownCode(integer(0, 0xffff)(value));

/** wire-format.md, "Control payloads": `[part, head_start, heads, token_start, token_stop, codec, bitmap]`. */
const tileNumbers = [
  integer(0, 4),
  integer(0, 0xffff),
  integer(1, 0xffff),
  integer(0, 0xffffffff),
  integer(0, 0xffffffff),
  integer(0, 0xffff),
];

export const tile = (value) => {
  check(Array.isArray(value) && (value.length === 6 || value.length === 7), PROTOCOL, "no tile");
  const [part, head_start, heads, token_start, token_stop, codec] = tileNumbers.map((type, i) => type(value[i]));
  check(token_stop > token_start, PROTOCOL, "a tile without tokens");
  let bitmap = Buffer.alloc(0);
  if (value.length === 7) {
    bitmap = bytes(1, Infinity)(value[6]);
    checkBitmap(bitmap, token_stop - token_start);
  }
  return { part, head_start, heads, token_start, token_stop, codec, bitmap };
};

const range = (value) => {
  const [start, stop] = arrayOf(2, integer(0))(value);
  check(start < stop, PROTOCOL, "an empty range");
  return [start, stop];
};

export const want = tuple(nullable(range), nullable(range), nullable(range), nullable(integer(1)));

/** `[layer, plan, levels]`. */
export const heldLayer = tuple(integer(0, 0xffff), bytesOf(16), (value) => {
  const levels = bytes(0, Infinity)(value);
  check(
    levels.every((count) => count <= 8),
    PROTOCOL,
    "a number of held levels out of its range",
  );
  return levels;
});

const STATUS_FLAGS = 3;
const statusTiles = (value) => {
  check(value instanceof Uint8Array && value.length % 3 === 0, PROTOCOL, "no tiles of a status");
  return value;
};
export const statusLayer = tuple(
  integer(0, 0xffff),
  (value) => integer(0, 255)(value) & STATUS_FLAGS,
  statusTiles,
);
