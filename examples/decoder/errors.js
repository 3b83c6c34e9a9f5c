// SPDX-License-Identifier: Apache-2.0
// Error codes: wire-format.md, "Error codes".

export const NO_ERROR = 0;
export const INTERNAL = 1;
export const PROTOCOL = 2;
export const VERSION = 3;
export const FRAME_CORRUPT = 4;
export const FRAME_TOO_LARGE = 5;
export const UNKNOWN_CRITICAL = 6;
export const AUTHENTICATION = 7;
export const IDENTITY = 8;
export const UNSUPPORTED = 9;
export const MISSING_TABLE = 10;
export const LIMIT = 11;
export const FLOW_CONTROL = 12;
export const DIGEST = 13;
export const CANCELLED = 15;
export const NOT_FOUND = 16;
export const SHUTDOWN = 17;
export const PAYLOAD = 18;
export const STATE = 19;

const LAST_KNOWN = 21;

/** A code as its reader takes it: unknown ones are INTERNAL. */
export function knownCode(code) {
  return code <= LAST_KNOWN ? code : INTERNAL;
}

/** Input that must be refused. `details` are further keys of the answer: `offset`, `level`, ... */
export class Refusal extends Error {
  constructor(code, message, details = {}) {
    super(message);
    this.code = code;
    this.details = details;
  }
}

/** Something that this program does not do, and says so. */
export class Unsupported extends Error {}

/** Refuses with `code` unless `condition` holds. */
export function check(condition, code, message, details) {
  if (!condition) throw new Refusal(code, message, details);
}
