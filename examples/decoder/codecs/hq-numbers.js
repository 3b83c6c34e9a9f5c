// SPDX-License-Identifier: Apache-2.0
// Numbers of codec hq: codec-hq.md, sections 4, 4.3, 5 and 8.

const view = new DataView(new ArrayBuffer(4));

/** The bits of a number in binary32. */
function bitsOf(value) {
  view.setFloat32(0, value);
  return view.getUint32(0);
}

/** The number that a bfloat16 word is. */
export function fromBfloat16(word) {
  view.setUint32(0, word << 16);
  return view.getFloat32(0);
}

/** Section 4: R, o and A(0) of a width; A(u) = A(0) + u * 2^(8 - b). */
export function rowOf(width, isKey) {
  switch (width) {
    case 0:
      return { range: 254, offset: 0, first: 127 };
    case 1:
      return { range: 254, offset: 0, first: 64 };
    case 2:
      return isKey ? { range: 211, offset: 22, first: 10 } : { range: 230, offset: 12, first: 19 };
    case 7:
      return { range: 253, offset: 1, first: 0 };
    case 8:
      return { range: 254, offset: 0, first: 0 };
    default:
      return { range: (2 ** width - 1) * 2 ** (8 - width), offset: 2 ** (7 - width), first: 0 };
  }
}

/** Section 5, "Reconstruction", and section 8, for one dtype. */
const bfloat16 = {
  leastScale: 0x0580, // 2^-116
  largestScale: 0x7e00, // 2^125
  toWord(value) {
    return (bitsOf(value) + 0x8000) >>> 16;
  },
  ceilWord(value) {
    return (bitsOf(value) + 0xffff) >>> 16;
  },
};

const float16 = {
  leastScale: 0x3380, // 2^-24
  largestScale: 0x4480, // 2^10
  toWord(value) {
    const sign = value < 0 ? 0x8000 : 0;
    const magnitude = Math.min(Math.abs(value), 65504);
    if (magnitude < 2 ** -14) return sign | roundToEven(magnitude * 2 ** 24);
    const exponent = (bitsOf(magnitude) >>> 23) - 127;
    // 1024 + fraction; a carry goes into the exponent by itself.
    const significand = roundToEven(magnitude * 2 ** (10 - exponent));
    return sign | (((exponent + 14) << 10) + significand);
  },
  ceilWord(value) {
    if (value < 2 ** -14) return Math.ceil(value * 2 ** 24);
    return Math.min((bitsOf(value) - 0x38000000 + 0x1fff) >>> 13, 0x7c00);
  },
};

export const NUMBERS = { bfloat16, float16 };

function roundToEven(value) {
  const floor = Math.floor(value);
  const rest = value - floor;
  if (rest === 0.5) return floor + (floor & 1);
  return rest > 0.5 ? floor + 1 : floor;
}

const MOVED_FIRST = 0x0800;
const MOVED_STOP = 0x7e80;
const MOVED_SPAN = MOVED_STOP - MOVED_FIRST;

/** Section 4.3: the tile's word of a moved one, of a channel with exponent `exponent`. */
export function moveBack(word, exponent) {
  const magnitude = word & 0x7fff;
  if (magnitude < MOVED_FIRST || magnitude >= MOVED_STOP) return word;
  const moved = (magnitude - MOVED_FIRST + 128 * exponent + MOVED_SPAN) % MOVED_SPAN;
  return (word & 0x8000) | (MOVED_FIRST + moved);
}
