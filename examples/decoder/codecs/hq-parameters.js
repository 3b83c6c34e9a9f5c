// SPDX-License-Identifier: Apache-2.0
// Scales and zero points of groups: codec-hq.md, section 7.

import { PAYLOAD, check } from "../errors.js";
import { BitReader, bytesFor } from "./bits.js";

export const PARAMETER_HEADER = 6;
const EXPLICIT = 255;
const EXPLICIT_GROUP = 4;

function readHeader(bytes) {
  const header = {
    sLow: bytes.readUInt16LE(0),
    zLow: bytes.readInt16LE(2),
    sBits: bytes[4],
    zBits: bytes[5],
    explicit: bytes.readUInt32LE(0) === 0 && bytes[4] === EXPLICIT && bytes[5] === EXPLICIT,
  };
  check(header.explicit || (header.sBits <= 13 && header.zBits <= 12), PAYLOAD, "a parameter header");
  return header;
}

/** The groups of a block: `s` as a bfloat16 word, 0 in a constant group, and `z`, or there `word`. */
function* readGroups(header, bytes, groups) {
  if (header.explicit) {
    for (let i = 0; i < groups; i++) {
      const s = bytes.readUInt16LE(EXPLICIT_GROUP * i);
      yield s === 0
        ? { s, z: 0, word: bytes.readUInt16LE(EXPLICIT_GROUP * i + 2) }
        : { s, z: bytes.readInt16LE(EXPLICIT_GROUP * i + 2) };
    }
  } else {
    const reader = new BitReader(bytes);
    for (let i = 0; i < groups; i++) {
      yield {
        s: header.sLow + 4 * reader.field(header.sBits),
        z: header.zLow + reader.field(header.zBits),
        word: null,
      };
    }
  }
}

/**
 * The groups of all blocks. `headers` are the bytes of the parameter headers, `section` those of the parameters, which must be
 * exactly as long as the headers say.
 */
export function readParameters(blocks, headers, section, numbers) {
  const layout = blocks.map((block, i) => {
    const header = readHeader(headers.subarray(PARAMETER_HEADER * i, PARAMETER_HEADER * (i + 1)));
    const size = header.explicit
      ? EXPLICIT_GROUP * block.groups
      : bytesFor(block.groups * (header.sBits + header.zBits));
    return { header, size };
  });
  const total = layout.reduce((sum, { size }) => sum + size, 0);
  check(total === section.length, PAYLOAD, "parameters of another size");
  let offset = 0;
  return layout.map(({ header, size }, i) => {
    const groups = [...readGroups(header, section.subarray(offset, offset + size), blocks[i].groups)];
    offset += size;
    for (const group of groups) {
      if (group.s === 0 && header.explicit) continue;
      check(group.s >= numbers.leastScale && group.s <= numbers.largestScale, PAYLOAD, "a scale out of its range");
      check(Math.abs(group.z) <= 1024, PAYLOAD, "a zero point out of its range");
    }
    return groups;
  });
}
