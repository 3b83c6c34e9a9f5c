// SPDX-License-Identifier: Apache-2.0
// Frame types and the keys of their payloads: wire-format.md, "Frame types".

import { PROTOCOL, check } from "./errors.js";
import { DEFAULT_LIMITS, HANDSHAKE_BYTES } from "./limits.js";
import {
  MAX_INT63,
  array,
  arrayOf,
  boolean,
  bytes,
  bytesOf,
  code,
  float,
  heldLayer,
  integer,
  map,
  nullable,
  optional,
  statusLayer,
  text,
  tile,
  tuple,
  want,
} from "./schema.js";

export const HELLO = 1;
export const HELLO_ACK = 2;
export const OPEN = 3;
export const ACCEPT = 4;
export const REJECT = 5;
export const FETCH = 6;
export const NOT_FOUND = 7;
export const PLAN = 8;
export const DATA = 9;
export const RESULT = 10;
export const END = 11;
export const ACK = 12;
export const NACK = 13;
export const CREDIT = 14;
export const RESUME = 15;
export const CANCEL = 16;
export const CLOSED = 17;
export const URGENT = 18;
export const PING = 19;
export const PONG = 20;
export const ERROR = 21;
export const GOAWAY = 22;

const IGNORABLE = 0x8000;

export const isKnown = (type) => type >= HELLO && type <= GOAWAY;
export const isIgnorable = (type) => (type & IGNORABLE) !== 0;

const leastOfLimit = { control_bytes: HANDSHAKE_BYTES };
const cappedLimit = { frame_bytes: 2 ** 32 - 1 };
const limitOf = (name) => {
  const type = integer(leastOfLimit[name] ?? 1, MAX_INT63);
  return (value) => {
    const limit = type(value);
    return limit > cappedLimit[name] ? cappedLimit[name] : limit;
  };
};
const limits = map(
  Object.fromEntries(
    Object.entries(DEFAULT_LIMITS).map(([name, otherwise]) => [
      name,
      optional(limitOf(name), otherwise),
    ]),
  ),
);

const byClass = arrayOf(8, integer(0, MAX_INT63));
const layer = integer(0, 0xffff);
const wants = array(0, 4096, want);
const level = integer(0, 7);
const why = { code, text: text(1024) };
const status = { layers: array(0, "layers", statusLayer), result: boolean, level, settled: level, urgent: boolean };

const TABLES = {
  [HELLO]: {
    versions: arrayOf(2, integer(0, 255)),
    lease: float({ low: 0, above: true, high: 1e9 }),
    nonce: bytesOf(32),
    stripe: integer(0, 2 ** 32),
    name: text(256),
    limits,
    codecs: array(0, 256, text(256)),
    features: array(0, 256, text(256)),
    session: bytesOf(0, 16),
    token: bytesOf(0, 32),
    alive: array(0, 1024, integer(0, 2 ** 32)),
    secret: optional(text(64), ""),
  },
  [HELLO_ACK]: { version: integer(0, 255), mac: bytesOf(32) },
  [OPEN]: {
    fetch: bytesOf(0, 16),
    resume: optional(bytesOf(0, 32), Buffer.alloc(0)),
    manifest: (value, limits) => bytes(1, limits.control_bytes)(value),
  },
  [ACCEPT]: { want: wants, credit: byClass, held: optional(array(0, "layers", heldLayer), []), ...status },
  [REJECT]: why,
  [FETCH]: {
    identity: bytesOf(16),
    blocks: array(0, "tokens", bytes(8, 32)),
    salt: bytes(0, 64),
    lease: float({ low: 0, high: 1e9 }),
    want: wants,
  },
  [NOT_FOUND]: why,
  [PLAN]: { layer, tiles: array(0, "tiles", tile), levels: bytes(0, Infinity) },
  [RESULT]: { token: integer(0, 2 ** 32 - 1), gap: optional(nullable(float()), null) },
  [END]: { layer, digests: array(0, "tiles", bytesOf(0, 16)) },
  [ACK]: status,
  [NACK]: { chunks: array(0, 2 ** 16, tuple(layer, tile, level, integer(0, 1), integer(1, 255))) },
  [CREDIT]: { limits: byClass },
  [RESUME]: { want: wants, ...status },
  [CANCEL]: { above: integer(-1, 7), ...why },
  [CLOSED]: { level, end: boolean, final: byClass, ...why },
  [URGENT]: {},
  [PING]: { id: integer(0, MAX_INT63), probe: boolean },
  [PONG]: { id: integer(0, MAX_INT63) },
  [ERROR]: why,
  [GOAWAY]: why,
};

const READERS = Object.fromEntries(Object.entries(TABLES).map(([type, table]) => [type, map(table)]));

/** The keys of a control payload (a decoded CBOR map) of a known type. */
export function readBody(type, value, limits) {
  const body = READERS[type](value, limits);
  if (type === PLAN) {
    check(body.levels.length === body.tiles.length, PROTOCOL, "not one number of levels a tile");
    check(
      body.levels.every((count) => count >= 1 && count <= 8),
      PROTOCOL,
      "a number of levels out of its range",
    );
  }
  return body;
}

/** A tile as the array that it is on the wire, with an empty bitmap for a range. */
export const tileAsArray = (tile) => [
  tile.part,
  tile.head_start,
  tile.heads,
  tile.token_start,
  tile.token_stop,
  tile.codec,
  tile.bitmap,
];

/** A body as conformance.md shows it: tiles are arrays again. */
export function showBody(type, body) {
  const show = (tile) => (tile.bitmap.length ? tileAsArray(tile) : tileAsArray(tile).slice(0, 6));
  if (type === PLAN) return { ...body, tiles: body.tiles.map(show) };
  if (type === NACK) return { chunks: body.chunks.map(([layer, tile, ...rest]) => [layer, show(tile), ...rest]) };
  return body;
}
