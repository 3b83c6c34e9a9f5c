// SPDX-License-Identifier: Apache-2.0
// Codec configs. They are decoded CBOR, in which integers (BigInt) and floats (Number) stay apart: see ../cbor.js.

import { UNSUPPORTED, check } from "../errors.js";

/** A config from JSON, as if it had come as CBOR. JSON does not tell 1.0 from 1: that is an integer here. */
export function fromJson(value) {
  if (Number.isInteger(value)) return BigInt(value);
  if (Array.isArray(value)) return value.map(fromJson);
  if (value === null || typeof value !== "object") return value;
  return new Map(Object.entries(value).map(([key, item]) => [key, fromJson(item)]));
}

/** Refuses keys that are not in `known`. */
export function checkKeys(config, known) {
  for (const key of config.keys()) check(known.includes(key), UNSUPPORTED, "an unknown key of a codec config");
}

export function integerOf(value, low, high) {
  check(typeof value === "bigint" && value >= low && value <= high, UNSUPPORTED, "a number of a codec config");
  return Number(value);
}

/** The key `zstd` of raw and bitplane. */
export function zstdOf(config) {
  return config.has("zstd") ? integerOf(config.get("zstd"), 1, 19) : null;
}
