// SPDX-License-Identifier: Apache-2.0
// Streams of bits, the least significant bit of a byte first: codec-hq.md, section 1.

export class BitReader {
  constructor(bytes) {
    this.bytes = bytes;
    this.position = 0; // in bits
  }

  bit() {
    const bit = (this.bytes[this.position >> 3] >> (this.position & 7)) & 1;
    this.position++;
    return bit;
  }

  /** A field of up to 31 bits, its least significant bit first. Callers have checked that it is there. */
  field(width) {
    let value = 0;
    for (let i = 0; i < width; i++) value |= this.bit() << i;
    return value;
  }
}

export const bytesFor = (bits) => Math.ceil(bits / 8);
