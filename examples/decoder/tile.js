// SPDX-License-Identifier: Apache-2.0
// One tile at its receiver: wire-format.md, "Tiles, chunks and levels", "DATA", "NACK" and "Digests".

import { DIGEST, FRAME_CORRUPT, PAYLOAD, Refusal } from "./errors.js";
import { xxh3of128 } from "./xxh3.js";

const DAMAGED_AT_MOST = 4;

/** The transfer has failed; it costs the transfer, not the session. */
export class TransferFailure extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

/** `wanted`: how many of its levels are. `plan` is null until the plan is known: { codec, shaped, levels }. */
export class Tile {
  constructor(place, wanted, transfer) {
    this.place = place;
    this.wanted = wanted;
    this.transfer = transfer;
    this.plan = null;
    this.attempt = 0;
    this.charged = [new Map(), new Map()]; // by attempt: level to length
    this.digest = null;
    this.#forget();
  }

  #forget() {
    this.payloads = new Map(); // received and not decoded
    this.arriving = new Map(); // level to stripe
    this.damaged = new Map();
    this.applied = 0; // levels decoded
    this.words = null;
    this.decoder = null;
    this.verified = false;
  }

  has(level) {
    return level < this.applied || this.payloads.has(level) || this.arriving.has(level);
  }

  /** What came of levels above `level` and is not decoded. */
  forgetAbove(level) {
    for (const above of this.payloads.keys()) if (above > level) this.payloads.delete(above);
    for (const above of this.arriving.keys()) if (above > level) this.arriving.delete(above);
  }

  /** A payload with a wrong CRC32C. */
  damage(level) {
    const times = (this.damaged.get(level) ?? 0) + 1;
    this.damaged.set(level, times);
    if (times >= DAMAGED_AT_MOST) throw new TransferFailure(FRAME_CORRUPT, "a chunk was damaged four times");
  }

  /** Decodes what can be, then compares with the digest. */
  advance() {
    const { plan } = this;
    if (!plan) return;
    try {
      while (this.payloads.has(this.applied)) {
        this.decoder ??= plan.codec.decoder(plan.shaped);
        this.words = this.decoder.decode(this.applied, this.payloads.get(this.applied));
        this.payloads.delete(this.applied++);
      }
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      this.#restart(PAYLOAD);
      return;
    }
    if (this.applied === plan.levels && this.digest?.length && !this.verified) {
      if (xxh3of128(this.words).equals(this.digest)) this.verified = true;
      else this.#restart(DIGEST);
    }
  }

  /** All levels are asked for again, once. */
  #restart(code) {
    this.transfer.restarted++;
    if (this.attempt === 1) throw new TransferFailure(code, "a tile was refused twice");
    this.attempt = 1;
    this.#forget();
  }

  /** Whether it lacks nothing, levels up to `highest` being wanted of those that were asked for. */
  isDone(highest) {
    const wanted = Math.min(this.wanted, highest + 1);
    if (this.applied < wanted) return false;
    return wanted < this.plan.levels || !this.digest?.length || this.verified;
  }
}
