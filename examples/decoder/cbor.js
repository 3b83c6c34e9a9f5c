// SPDX-License-Identifier: Apache-2.0
// The CBOR of control payloads and manifests: wire-format.md, "Control payloads", and RFC 8949.
//
// Integers become BigInts and floats become Numbers, so that 1 and 1.0 stay apart. Maps become Maps, byte strings Buffers.

import { PROTOCOL, check } from "./errors.js";

const MAX_DEPTH = 16;
const MIN_INTEGER = -(2n ** 63n);
const INDEFINITE = 31;
const BREAK = Symbol("break");
const UTF8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

/** Integers of one byte, which need no object of their own. */
const SMALL = Array.from({ length: 24 }, (_, value) => BigInt(value));

class Reader {
  constructor(bytes) {
    this.bytes = bytes;
    this.offset = 0;
  }

  get left() {
    return this.bytes.length - this.offset;
  }

  take(size) {
    check(size <= this.left, PROTOCOL, "an item ends early");
    const taken = this.bytes.subarray(this.offset, this.offset + size);
    this.offset += size;
    return taken;
  }

  byte() {
    return this.take(1)[0];
  }

  /** The number that follows an initial byte. */
  argument(info) {
    if (info < 24) return SMALL[info];
    check(info < 28, PROTOCOL, "a reserved length");
    const size = 1 << (info - 24);
    let value = 0n;
    for (const byte of this.take(size)) value = (value << 8n) | BigInt(byte);
    return value;
  }

  /** How many items follow: never more than there are bytes for, so a count can be trusted. */
  count(info, bytesPerItem) {
    const count = this.argument(info);
    check(count * BigInt(bytesPerItem) <= BigInt(this.left), PROTOCOL, "an item ends early");
    return Number(count);
  }

  item(depth, mayBreak = false) {
    check(depth <= MAX_DEPTH, PROTOCOL, "nested too deep");
    const initial = this.byte();
    const info = initial & 31;
    switch (initial >> 5) {
      case 0:
        return this.argument(info);
      case 1: {
        const value = -1n - this.argument(info);
        check(value >= MIN_INTEGER, PROTOCOL, "an integer below -2^63");
        return value;
      }
      case 2:
        return this.string(2, info);
      case 3:
        return this.string(3, info);
      case 4:
        return this.array(info, depth);
      case 5:
        return this.map(info, depth);
      case 7:
        return this.simple(info, mayBreak);
      default:
        check(false, PROTOCOL, "a tag");
    }
  }

  string(type, info) {
    if (info !== INDEFINITE) return this.stringPiece(type, info);
    const pieces = [];
    for (let initial; (initial = this.byte()) !== 0xff;) {
      check(initial >> 5 === type, PROTOCOL, "a piece of another type");
      pieces.push(this.stringPiece(type, initial & 31));
    }
    return type === 2 ? Buffer.concat(pieces) : pieces.join("");
  }

  stringPiece(type, info) {
    const bytes = this.take(this.count(info, 1));
    if (type === 2) return bytes;
    try {
      return UTF8.decode(bytes);
    } catch {
      check(false, PROTOCOL, "text that is no UTF-8");
    }
  }

  array(info, depth) {
    const items = [];
    if (info === INDEFINITE) {
      for (let item; (item = this.item(depth + 1, true)) !== BREAK;) items.push(item);
    } else {
      for (let left = this.count(info, 1); left > 0; left--) items.push(this.item(depth + 1));
    }
    return items;
  }

  map(info, depth) {
    const map = new Map();
    const indefinite = info === INDEFINITE;
    for (let left = indefinite ? Infinity : this.count(info, 2); left > 0; left--) {
      const key = this.item(depth + 1, indefinite);
      if (key === BREAK) break;
      check(typeof key === "string", PROTOCOL, "a key that is no text");
      check(!map.has(key), PROTOCOL, "a key twice");
      map.set(key, this.item(depth + 1));
    }
    return map;
  }

  simple(info, mayBreak) {
    switch (info) {
      case 20:
        return false;
      case 21:
        return true;
      case 22:
        return null;
      case 25:
        return half(this.take(2));
      case 26:
        return this.take(4).readFloatBE();
      case 27:
        return this.take(8).readDoubleBE();
      case INDEFINITE:
        check(mayBreak, PROTOCOL, "a break that ends nothing");
        return BREAK;
      default:
        check(false, PROTOCOL, "a simple value");
    }
  }
}

function half(bytes) {
  const word = bytes.readUInt16BE();
  const exponent = (word >> 10) & 31;
  const fraction = word & 0x3ff;
  let magnitude;
  if (exponent === 0) magnitude = fraction * 2 ** -24;
  else if (exponent === 31) magnitude = fraction ? NaN : Infinity;
  else magnitude = (1 + fraction / 1024) * 2 ** (exponent - 15);
  return word & 0x8000 ? -magnitude : magnitude;
}

/** The one map that `bytes` must be. */
export function decodeMap(bytes) {
  const reader = new Reader(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
  check(bytes.length > 0 && bytes[0] >> 5 === 5, PROTOCOL, "not a map");
  const map = reader.item(0);
  check(reader.left === 0, PROTOCOL, "bytes after the map");
  return map;
}

function encodeText(text) {
  const bytes = Buffer.from(text, "utf-8");
  const length = bytes.length;
  let head;
  if (length < 24) head = [0x60 | length];
  else if (length < 0x100) head = [0x78, length];
  else head = [0x79, length >> 8, length & 0xff]; // texts of an identity are short
  return Buffer.concat([Buffer.from(head), bytes]);
}

/** The deterministic map (RFC 8949, section 4.2) of at most 23 short texts. */
export function encodeTexts(entries) {
  const encoded = entries.map(([key, value]) => [encodeText(key), encodeText(value)]);
  encoded.sort(([a], [b]) => Buffer.compare(a, b));
  return Buffer.concat([Buffer.from([0xa0 | encoded.length]), ...encoded.flat()]);
}
