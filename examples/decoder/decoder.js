#!/usr/bin/env node
// SPDX-License-Identifier: Apache-2.0
// The program that conformance.md describes: requests on standard input, answers on standard output.

import { createInterface } from "node:readline";
import { writeSync } from "node:fs";
import { DATA, isKnown, showBody } from "./bodies.js";
import { FrameReader, bodyOf } from "./frames.js";
import { Refusal, Unsupported } from "./errors.js";
import { cacheBytes, parseManifest } from "./manifest.js";
import { crc32c } from "./crc32c.js";
import { decodeTile } from "./codecs/index.js";
import { identityHash } from "./identity.js";
import { limitsWith } from "./limits.js";
import { observeSession } from "./session.js";
import { proof } from "./proof.js";
import { readCapture } from "./capture.js";
import { xxh3of128 } from "./xxh3.js";

const fromHex = (text) => Buffer.from(text, "hex");

/** conformance.md, "frames". */
function listFrames({ data, limits: given }) {
  const limits = limitsWith(given);
  const reader = new FrameReader(limits);
  const frames = [];
  try {
    for (const frame of reader.read(fromHex(data))) frames.push(showFrame(frame, limits));
  } catch (error) {
    if (error instanceof Refusal) error.details.offset = reader.start;
    throw error;
  }
  return { frames, rest: reader.received - reader.start };
}

const PLACE = [
  "layer",
  "part",
  "level",
  "attempt",
  "head_start",
  "heads",
  "token_start",
  "token_stop",
  "codec_id",
  "codec",
  "bitmap",
];

function showFrame(frame, limits) {
  const { type, flags, transfer, payload_length } = frame;
  const shown = { type, flags, transfer, payload_length };
  if (!isKnown(type)) return shown;
  shown.payload_intact = frame.intact;
  if (type === DATA) for (const key of PLACE) shown[key] = frame[key];
  else if (frame.intact) shown.body = showBody(type, bodyOf(frame, limits));
  return shown;
}

const OPERATIONS = {
  crc32c: ({ data }) => ({ crc32c: crc32c(fromHex(data)).toString(16).padStart(8, "0") }),
  "xxh3-128": ({ data }) => ({ digest: xxh3of128(fromHex(data)) }),
  identity: ({ identity }) => ({ hash: identityHash(identity) }),
  proof: ({ side, secret, token, client_hello, server_hello }) => ({
    mac: proof({
      side,
      secret: fromHex(secret),
      token: fromHex(token),
      clientHello: fromHex(client_hello),
      serverHello: fromHex(server_hello),
    }),
  }),
  frames: listFrames,
  manifest: ({ data, limits }) => {
    const manifest = parseManifest(fromHex(data), limitsWith(limits));
    return { manifest, bytes: cacheBytes(manifest) };
  },
  capture: ({ data }) => readCapture(fromHex(data)),
  decode: (request) => ({ levels: decodeTile({ ...request, payloads: request.payloads.map(fromHex) }) }),
  session: observeSession,
};

/** A value as conformance.md writes it: bytes as hexadecimal text, integers of 2^53 and more as decimal text. */
function toJson(value) {
  if (value instanceof Uint8Array) return Buffer.from(value.buffer, value.byteOffset, value.byteLength).toString("hex");
  if (typeof value === "bigint") {
    return value >= -Number.MAX_SAFE_INTEGER && value <= Number.MAX_SAFE_INTEGER ? Number(value) : String(value);
  }
  if (Array.isArray(value)) return value.map(toJson);
  if (value === null || typeof value !== "object") return value;
  const entries = value instanceof Map ? [...value] : Object.entries(value);
  const shown = Object.create(null); // a peer may name a key "__proto__"
  for (const [key, item] of entries) shown[key] = toJson(item);
  return shown;
}

function answer(request) {
  const operation = Object.hasOwn(OPERATIONS, request.op) ? OPERATIONS[request.op] : null;
  if (!operation) return { status: "unsupported" };
  try {
    return { status: "ok", ...operation(request) };
  } catch (error) {
    if (error instanceof Refusal) return { status: "refused", code: error.code, ...error.details };
    if (error instanceof Unsupported) return { status: "unsupported" };
    throw error;
  }
}

/** Writes all of `text` before it returns, also into a pipe that is full. */
function write(text) {
  let bytes = Buffer.from(text, "utf-8");
  while (bytes.length) {
    try {
      bytes = bytes.subarray(writeSync(1, bytes));
    } catch (error) {
      if (error.code !== "EAGAIN") throw error;
    }
  }
}

for await (const line of createInterface({ input: process.stdin, crlfDelay: Infinity })) {
  if (!line.trim()) continue;
  const request = JSON.parse(line);
  write(`${JSON.stringify(toJson({ id: request.id, ...answer(request) }))}\n`);
}
