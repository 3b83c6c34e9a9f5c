// SPDX-License-Identifier: Apache-2.0
// Configuration of codec hq: codec-hq.md, section 2.

import { PROTOCOL, UNSUPPORTED, check } from "../errors.js";
import { checkKeys, integerOf } from "./config.js";
import { xxh3of128 } from "../xxh3.js";

const DEFAULTS = new Map([
  ["key_bits", 4n],
  ["value_bits", 4n],
  ["levels", 3n],
  ["widths", "uniform"],
  ["fold", false],
  ["scaling", false],
]);
const KEYS = ["id", ...DEFAULTS.keys()];

const refuseUnless = (condition, message) => check(condition, UNSUPPORTED, message);

function bitsOf(value) {
  refuseUnless(typeof value === "bigint" || typeof value === "number", "bits that are no number");
  const bits = Number(value);
  refuseUnless(bits >= 2 && bits <= 8, "bits out of their range");
  return bits;
}

function booleanOf(value) {
  refuseUnless(typeof value === "boolean", "no boolean");
  return value;
}

const isDigits = (text) => typeof text === "string" && /^[0-8]+$/.test(text);

/** A table of widths: `keys[layer][head]` and `values[layer]` are texts of digits. */
function tableOf(table) {
  refuseUnless(table instanceof Map, "widths");
  checkKeys(table, ["keys", "values", "hash"]);
  const keys = table.get("keys");
  const values = table.get("values");
  refuseUnless(Array.isArray(keys) && Array.isArray(values), "a table without keys or values");
  refuseUnless(keys.length === values.length && keys.length > 0, "a table with another number of layers");
  keys.forEach((heads, layer) => {
    refuseUnless(Array.isArray(heads) && heads.length > 0 && heads.every(isDigits), "widths of keys");
    refuseUnless(
      heads.every((text) => text.length === heads[0].length),
      "heads of other sizes",
    );
    refuseUnless(isDigits(values[layer]) && values[layer].length === heads.length, "widths of values");
  });
  const texts = [...keys.map((heads) => heads.join(",")), ...values].join("/");
  const hash = xxh3of128(Buffer.from(texts)).toString("hex");
  refuseUnless(!table.has("hash") || table.get("hash") === hash, "a table with another hash");
  return { keys, values };
}

export function parseConfig(config) {
  checkKeys(config, KEYS);
  config = new Map([...DEFAULTS, ...config]);
  const keyBits = bitsOf(config.get("key_bits"));
  const valueBits = bitsOf(config.get("value_bits"));
  const levels = integerOf(config.get("levels"), 1, 3);
  const fold = booleanOf(config.get("fold"));
  const scaling = booleanOf(config.get("scaling"));
  const widths = config.get("widths");
  const ranges = widths === "ranges";
  const table = ranges || widths === "uniform" ? null : tableOf(widths);
  if (!table) {
    refuseUnless(Number.isInteger(valueBits), "value_bits");
    refuseUnless(ranges ? keyBits <= 7 : Number.isInteger(keyBits), "key_bits");
  }
  refuseUnless(levels < 3 || keyBits < 8 || valueBits < 8, "a level that would be empty");
  return { keyBits, valueBits, levels, fold, scaling, ranges, table };
}

/** The tile that a config cannot hold is refused; `widthsOf` relies on it. */
export function checkTile(config, { dtype, part, shape: [heads, , headDim], layer, head_start }) {
  check(dtype === "bfloat16" || dtype === "float16", PROTOCOL, "a dtype that hq cannot hold");
  check(part === "key" || part === "value", PROTOCOL, "a part that hq cannot hold");
  if (!config.table) return;
  const texts = config.table.keys[layer];
  check(texts !== undefined && head_start + heads <= texts.length, PROTOCOL, "a layer or heads that the table lacks");
  check(part === "value" || headDim === texts[0].length, PROTOCOL, "another number of channels than the table's");
}

/** The widths of all heads and channels that the config gives, or null if the tile carries them. */
export function widthsOf(config, { part, shape: [heads, , headDim], layer, head_start }) {
  const isKey = part === "key";
  if (isKey && config.ranges) return null;
  const widths = new Uint8Array(heads * headDim);
  if (!config.table) return widths.fill(isKey ? config.keyBits : config.valueBits);
  for (let head = 0; head < heads; head++) {
    for (let channel = 0; channel < headDim; channel++) {
      const digit = isKey
        ? config.table.keys[layer][head_start + head][channel]
        : config.table.values[layer][head_start + head];
      widths[head * headDim + channel] = Number(digit);
    }
  }
  return widths;
}
