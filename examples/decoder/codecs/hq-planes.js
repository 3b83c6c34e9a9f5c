// SPDX-License-Identifier: Apache-2.0
// Planes of codes, and folding: codec-hq.md, section 6.

import { PAYLOAD, check } from "../errors.js";
import { BitReader, bytesFor } from "./bits.js";

const UNFOLDED = 0xffff;
const D2_PAIRS = 1 << 13;
const D3_PAIRS = 1 << 14;
const SIZE = (1 << 13) - 1;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

/** Section 6.1, orders of the two most significant bits. */
const ORDERS_OF_KEYS = [
  [1, 2, 0, 3],
  [2, 1, 3, 0],
];
const ORDERS_OF_VALUES = [null, [0, 1, 2, 3], [1, 0, 2, 3], [1, 2, 0, 3], [2, 1, 3, 0], [2, 3, 1, 0], [3, 2, 1, 0]];

/** Whether the top planes of a channel are folded in the section ("anchor" or "rest"). */
const isFolded = (section, width) => (section === "anchor" ? width >= 2 : width <= 1);

/** What is in the place of each plane of a channel: null for nothing, a plane's number, "S" or "D1". */
function planesOf(section, width, folded) {
  const inAnchor = section === "anchor";
  const planes = [0, 1, 2, 3, 4, 5, 6, 7].map((plane) => (inAnchor === plane < width ? plane : null));
  if (folded && isFolded(section, width)) {
    if (width === 2) return ["D1", null, null, null, null, null, null, null];
    if (width !== 1) planes[0] = "S";
    planes[1] = "D1";
    planes[2] = null;
  }
  return planes;
}

const countBytes = (planes) => planes.filter((plane) => plane !== null).length;

/** The parts of one section of a tile, block by block, and their sizes. */
function layoutOf(section, tile, foldTable) {
  return tile.blocks.map((block, i) => {
    const widths = tile.widthsOf(block);
    const octets = Math.ceil(block.tokens / 8);
    const sizeWhen = (folded) => {
      let bytes = 0;
      for (const width of widths) bytes += countBytes(planesOf(section, width, folded));
      return octets * bytes;
    };
    const entry = foldTable ? foldTable.readUInt16LE(2 * i) : UNFOLDED;
    if (entry === UNFOLDED) return { block, widths, octets, folded: false, size: sizeWhen(false) };
    const planesSize = sizeWhen(true);
    const size = planesSize + (entry & SIZE);
    check(entry < 0x8000 && size < sizeWhen(false), PAYLOAD, "an entry of a fold table");
    return { block, widths, octets, folded: true, entry, planesSize, size };
  });
}

/** A section: knows its size before a byte of it is read. */
export class PlaneSection {
  constructor(section, tile, foldTable) {
    this.section = section;
    this.tile = tile;
    this.layout = layoutOf(section, tile, foldTable);
    this.size = this.layout.reduce((sum, part) => sum + part.size, 0);
  }

  /** Puts the section's bits into the tile's codes. */
  read(bytes) {
    let offset = 0;
    for (const part of this.layout) {
      this.#readBlock(part, bytes.subarray(offset, offset + part.size));
      offset += part.size;
    }
  }

  #readBlock(part, bytes) {
    const { block, widths, octets, folded } = part;
    const { codes } = this.tile;
    const signs = folded ? new Uint8Array(block.tokens * block.channels) : null;
    const distances = folded ? new Uint8Array(block.tokens * block.channels) : null;
    const planes = Array.from(widths, (width) => planesOf(this.section, width, folded));
    let offset = 0;
    for (let octet = 0; octet < octets; octet++) {
      const tokens = Math.min(8, block.tokens - 8 * octet);
      for (let place = 0; place < 8; place++) {
        for (let channel = 0; channel < block.channels; channel++) {
          const plane = planes[channel][place];
          if (plane === null) continue;
          const byte = bytes[offset++];
          for (let t = 0; t < tokens; t++) {
            const bit = (byte >> t) & 1;
            const token = 8 * octet + t;
            if (plane === "S") signs[token * block.channels + channel] = bit;
            else if (plane === "D1") distances[token * block.channels + channel] = bit;
            else codes[block.at(token, channel)] |= bit << (7 - plane);
          }
        }
      }
    }
    if (folded) {
      readDistances(part, bytes.subarray(part.planesSize), distances);
      this.#unfold(part, signs, distances);
    }
  }

  /** Makes the top bits of codes of signs and distances. */
  #unfold({ block, widths }, signs, distances) {
    for (let channel = 0; channel < block.channels; channel++) {
      const width = widths[channel];
      if (!isFolded(this.section, width)) continue;
      let before = -1; // the code of the token before, none
      for (let token = 0; token < block.tokens; token++) {
        const place = block.at(token, channel);
        const i = token * block.channels + channel;
        const code =
          this.tile.codes[place] | this.#topBits(block, token, channel, width, before, signs[i], distances[i]);
        this.tile.codes[place] = before = code;
      }
    }
  }

  #topBits(block, token, channel, width, before, sign, distance) {
    const { isKey, codes } = this.tile;
    if (width === 2) {
      const order = isKey
        ? ORDERS_OF_KEYS[before < 128 ? 0 : 1]
        : ORDERS_OF_VALUES[clamp(Math.floor(this.tile.zeroOf(block, token, channel) / 32), 1, 6)];
      return order[distance] << 6;
    }
    let centre;
    if (width === 1) {
      centre = 4;
      sign = codes[block.at(token, channel)] >> 7; // the anchor section has it
    } else if (isKey) {
      centre = before < 0 ? 4 : 2 + (((before >> 5) + 1) >> 1);
    } else {
      centre = clamp(Math.floor((this.tile.zeroOf(block, token, channel) + 16) / 32), 1, 7);
    }
    const folded = sign ? distance + 4 : 3 - distance;
    return ((folded + centre + 4) & 7) << 5;
  }
}

/** Reads D2 and D3 and adds them to the distances, in which D1 is. */
function readDistances({ block, widths, octets, entry }, bytes, distances) {
  const places = [];
  for (let octet = 0; octet < octets; octet++) {
    const stop = Math.min(8 * octet + 8, block.tokens);
    for (let channel = 0; channel < widths.length; channel++) {
      for (let token = 8 * octet; token < stop; token++) {
        const i = token * block.channels + channel;
        if (distances[i]) places.push(i);
      }
    }
  }
  const second = readStream(bytes, places.length, entry & D2_PAIRS);
  const further = places.filter((_, i) => second.bits[i]);
  for (const i of further) distances[i]++;
  const third = readStream(bytes.subarray(second.size), further.length, entry & D3_PAIRS);
  further.forEach((place, i) => (distances[place] += third.bits[i]));
  check(second.size + third.size === bytes.length, PAYLOAD, "D2 and D3 of another size");
}

/** `count` bits, plain or in pairs, and how many bytes they take. */
function readStream(bytes, count, pairs) {
  const reader = new BitReader(bytes);
  const take = (bits) => {
    check(reader.position + bits <= 8 * bytes.length, PAYLOAD, "D2 or D3 ends early");
    return Array.from({ length: bits }, () => reader.bit());
  };
  let bits;
  if (pairs) {
    const half = Math.ceil(count / 2);
    const either = take(half);
    const places = [...either.keys()].filter((i) => either[i]);
    const first = take(places.length);
    const both = places.filter((_, i) => first[i]);
    const last = take(both.length);
    bits = new Uint8Array(2 * half); // with the last y of an odd number, which nothing reads
    places.forEach((place, i) => {
      bits[place] = first[i];
      bits[half + place] = 1 - first[i];
    });
    both.forEach((place, i) => (bits[half + place] = last[i]));
  } else {
    bits = take(count);
  }
  return { bits, size: bytesFor(reader.position) };
}
