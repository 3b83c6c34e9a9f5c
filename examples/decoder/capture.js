// SPDX-License-Identifier: Apache-2.0
// Capture files: capture.md.

import { FRAME_CORRUPT, Refusal } from "./errors.js";
import { crc32c } from "./crc32c.js";

const FILE_HEADER = 32;
const RECORD_HEADER = 24;
const MAGIC = Buffer.from("894c594e580d0a1a", "hex");

function readFileHeader(bytes) {
  const valid =
    bytes.length >= FILE_HEADER &&
    bytes.subarray(0, 8).equals(MAGIC) &&
    bytes.readUInt16LE(8) === 1 &&
    bytes.readUInt16LE(10) === FILE_HEADER &&
    bytes.readUInt32LE(12) === 0 &&
    bytes.readUInt32LE(28) === crc32c(bytes.subarray(0, 28));
  return valid ? { start: bytes.readBigUInt64LE(16) } : null;
}

function readRecord(bytes, offset) {
  const header = bytes.subarray(offset, offset + RECORD_HEADER);
  if (header.length < RECORD_HEADER || header.readUInt32LE(20) !== crc32c(header.subarray(0, 20))) return null;
  const length = header.readUInt32LE(0);
  const direction = header[5];
  if (direction > 1 || length > bytes.length - offset - RECORD_HEADER) return null;
  return {
    length,
    kind: header[4],
    direction,
    time: header.readBigUInt64LE(8),
    stripe: header.readUInt32LE(16),
    data: bytes.subarray(offset + RECORD_HEADER, offset + RECORD_HEADER + length),
  };
}

/** `start` and all records. A fault is refused with its `offset` and the records before it. */
export function readCapture(bytes) {
  const records = [];
  const file = readFileHeader(bytes);
  if (!file) throw new Refusal(FRAME_CORRUPT, "no capture", { offset: 0, records });
  for (let offset = FILE_HEADER; offset < bytes.length;) {
    const record = readRecord(bytes, offset);
    if (!record) throw new Refusal(FRAME_CORRUPT, "a faulty record", { offset, records });
    records.push(record);
    offset += RECORD_HEADER + record.length;
  }
  return { start: file.start, records };
}
