// SPDX-License-Identifier: Apache-2.0
// Frames of one direction of a byte stream: wire-format.md, "Frame header" and "Order of checks".

import {
  FRAME_CORRUPT,
  FRAME_TOO_LARGE,
  LIMIT,
  PROTOCOL,
  Refusal,
  STATE,
  UNKNOWN_CRITICAL,
  VERSION,
  check,
} from "./errors.js";
import { DATA, ERROR, GOAWAY, HELLO, HELLO_ACK, isIgnorable, isKnown, readBody } from "./bodies.js";
import { bitmapSize, checkBitmap } from "./bitmap.js";
import { HANDSHAKE_BYTES } from "./limits.js";
import { crc32c } from "./crc32c.js";
import { decodeMap } from "./cbor.js";

const HEADER = 64;
const MAGIC = Buffer.from("ab4c5958", "hex");
const CRITICAL_FLAGS = 0xff00;
const IN_HANDSHAKE = [HELLO, HELLO_ACK, ERROR, GOAWAY];

const STRIPE = { scope: "stripe" };
const SESSION = { scope: "session" };

/** Checks 1 to 11 of "Order of checks", of the 64 bytes of a header. */
function readHeader(bytes, limits, inHandshake) {
  check(bytes.subarray(0, 4).equals(MAGIC), FRAME_CORRUPT, "magic", STRIPE);
  check(crc32c(bytes.subarray(0, 60)) === bytes.readUInt32LE(60), FRAME_CORRUPT, "CRC32C of a header", STRIPE);
  check(bytes[4] === 1 && bytes[5] === HEADER / 8, VERSION, "another layout", STRIPE);
  const header = {
    type: bytes.readUInt16LE(6),
    flags: bytes.readUInt16LE(8),
    transfer: bytes.subarray(16, 32),
    payload_length: bytes.readUInt32LE(12),
    payload_crc: bytes.readUInt32LE(56),
    extension_length: bytes.readUInt32LE(52),
  };
  const { type, payload_length } = header;
  if (inHandshake) {
    check(IN_HANDSHAKE.includes(type) || isIgnorable(type), STATE, "a frame before the handshake is over", STRIPE);
    check(payload_length <= HANDSHAKE_BYTES, FRAME_TOO_LARGE, "a long frame before the handshake is over", STRIPE);
  }
  check(isKnown(type) || isIgnorable(type), UNKNOWN_CRITICAL, "an unknown critical type", SESSION);
  check((header.flags & CRITICAL_FLAGS) === 0, UNKNOWN_CRITICAL, "an unknown critical flag", SESSION);
  const most = type === DATA ? limits.frame_bytes : limits.control_bytes;
  check(payload_length <= most, FRAME_TOO_LARGE, "payload beyond the limit", SESSION);
  if (type === DATA) Object.assign(header, readPlace(bytes, header, limits));
  else check(header.extension_length === 0, PROTOCOL, "an extension", SESSION);
  return header;
}

/** Checks 9 to 11: what only DATA has. */
function readPlace(bytes, header, limits) {
  const place = {
    layer: bytes.readUInt16LE(32),
    part: bytes[10],
    level: bytes[11],
    attempt: bytes[34],
    head_start: bytes.readUInt16LE(36),
    heads: bytes.readUInt16LE(38),
    token_start: bytes.readUInt32LE(40),
    token_stop: bytes.readUInt32LE(44),
    codec_id: bytes.readUInt16LE(48),
    codec: bytes.readUInt16LE(50),
    bitmap: Buffer.alloc(0),
  };
  check(place.level <= 7, PROTOCOL, "level", SESSION);
  check(place.attempt <= 1, PROTOCOL, "attempt", SESSION);
  check(header.payload_length > 0, PROTOCOL, "DATA without a payload", SESSION);
  const tokens = place.token_stop - place.token_start;
  check(tokens <= limits.tokens, LIMIT, "too many tokens", SESSION);
  check(
    header.extension_length === 0 || header.extension_length === bitmapSize(tokens) + 4,
    PROTOCOL,
    "extension_length",
    SESSION,
  );
  check(place.part <= 4 && place.heads > 0 && tokens > 0, PROTOCOL, "part, heads or tokens", SESSION);
  return place;
}

/** Checks 12 and 13. */
function readExtension(bytes, header) {
  const bitmap = bytes.subarray(0, bytes.length - 4);
  check(crc32c(bitmap) === bytes.readUInt32LE(bitmap.length), FRAME_CORRUPT, "CRC32C of an extension", STRIPE);
  try {
    checkBitmap(bitmap, header.token_stop - header.token_start);
  } catch (error) {
    if (error instanceof Refusal) Object.assign(error.details, SESSION);
    throw error;
  }
  return bitmap;
}

/** Bytes that have come and are not used yet. They are joined only when there are as many as are needed. */
class Pending {
  #pieces = [];
  length = 0;

  push(bytes) {
    if (bytes.length) this.#pieces.push(bytes);
    this.length += bytes.length;
  }

  take(size) {
    const joined = this.#pieces.length === 1 ? this.#pieces[0] : Buffer.concat(this.#pieces);
    this.#pieces = size < joined.length ? [joined.subarray(size)] : [];
    this.length -= size;
    return joined.subarray(0, size);
  }

  /** Drops `size` bytes or as many as there are; returns how many. */
  drop(size) {
    const dropped = Math.min(size, this.length);
    if (dropped) this.take(dropped);
    return dropped;
  }
}

/**
 * Cuts a byte stream into frames.
 *
 * `inHandshake()` says whether the handshake is still to end. `place(header)` is asked about DATA as soon as its header and
 * extension are there (check 14); if it returns false the payload is skipped as it comes, as those of unknown types are.
 */
export class FrameReader {
  #pending = new Pending();
  #header = null;
  #toSkip = 0;

  constructor(limits, { inHandshake = () => false, place = () => true } = {}) {
    this.limits = limits;
    this.inHandshake = inHandshake;
    this.place = place;
    this.start = 0; // of the frame that is being read
    this.received = 0;
  }

  /** Takes what has come and yields the frames that are complete now: their headers with `payload`, null if skipped. */
  *read(bytes) {
    this.received += bytes.length;
    this.#pending.push(bytes);
    for (let frame; (frame = this.#next());) {
      yield frame;
      this.start += HEADER + frame.extension_length + frame.payload_length;
    }
  }

  #next() {
    if (!this.#header) {
      if (this.#pending.length < HEADER) return null;
      const header = readHeader(this.#pending.take(HEADER), this.limits, this.inHandshake());
      this.#header = { ...header, extensionRead: header.extension_length === 0, placed: false };
    }
    const header = this.#header;
    if (!header.extensionRead) {
      if (this.#pending.length < header.extension_length) return null;
      header.bitmap = readExtension(this.#pending.take(header.extension_length), header);
      header.extensionRead = true;
    }
    if (!header.placed) {
      header.skip = !isKnown(header.type) || (header.type === DATA && !this.place(header));
      header.placed = true;
      if (header.skip) this.#toSkip = header.payload_length;
    }
    let payload = null;
    if (header.skip) {
      this.#toSkip -= this.#pending.drop(this.#toSkip);
      if (this.#toSkip) return null;
    } else {
      if (this.#pending.length < header.payload_length) return null;
      payload = this.#pending.take(header.payload_length);
    }
    this.#header = null;
    const intact = payload !== null && crc32c(payload) === header.payload_crc;
    return { ...header, payload, intact };
  }
}

/** The body of an intact control frame. */
export function bodyOf(frame, limits) {
  return readBody(frame.type, decodeMap(frame.payload), limits);
}
