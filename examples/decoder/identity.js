// SPDX-License-Identifier: Apache-2.0
// Which model a cache is of: wire-format.md, "Identity".

import { encodeTexts } from "./cbor.js";
import { xxh3of128 } from "./xxh3.js";

export const IDENTITY_KEYS = ["model", "revision", "tokenizer_hash", "rope_hash", "producer", "attention_backend"];

/** The hash of `model` and of the other fields that are stated: those that are not empty. */
export function identityHash(identity) {
  const stated = IDENTITY_KEYS.filter((key) => key === "model" || identity[key]);
  return xxh3of128(encodeTexts(stated.map((key) => [key, identity[key]])));
}

/** Whether no field that both state differs. */
export function sameIdentity(ours, theirs) {
  return IDENTITY_KEYS.every((key) => !ours[key] || !theirs[key] || ours[key] === theirs[key]);
}
