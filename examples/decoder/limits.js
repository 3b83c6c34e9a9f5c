// SPDX-License-Identifier: Apache-2.0
// What a reader accepts: wire-format.md, "Limits".

const KI = 1024;
const MI = 1024 * KI;
const GI = 1024 * MI;

export const DEFAULT_LIMITS = Object.freeze({
  frame_bytes: 64 * MI,
  control_bytes: 4 * MI,
  transfer_bytes: 256 * GI,
  layers: 1024,
  tokens: 2 * MI,
  tiles: 256 * KI,
  positions: 4 * MI,
  transfers: 256,
  stripes: 64,
  session_window: 16 * MI,
  transfer_window: 8 * MI,
});

/** Payloads of at most so many bytes may come before the handshake is over. */
export const HANDSHAKE_BYTES = 16 * KI;

/** All limits; those of `given` may be decimal text (conformance.md, "Values"). */
export function limitsWith(given = {}) {
  const numbers = Object.entries(given).map(([name, value]) => [
    name,
    typeof value === "string" ? BigInt(value) : value,
  ]);
  return { ...DEFAULT_LIMITS, ...Object.fromEntries(numbers) };
}
