// SPDX-License-Identifier: Apache-2.0
// The last level, which words of a code: codec-hq.md, section 8.

import { PAYLOAD, check } from "../errors.js";
import { BitReader, bytesFor } from "./bits.js";
import { fromBfloat16, moveBack } from "./hq-numbers.js";

export const RANK_ENTRY = 4;
const RAW = 0xffff;
const WORD = 2;
const W_BITS = 12;
const W_ZERO = 2046;
const W_ESCAPE = 2047;

/** Cuts the ranks into blocks by their table; the sizes must add up to all of them. */
function layoutOf(blocks, table, ranks) {
  let offset = 0;
  const layout = blocks.map((block, i) => {
    const sizeOfA = table.readUInt16LE(RANK_ENTRY * i);
    const sizeOfOthers = table.readUInt16LE(RANK_ENTRY * i + 2);
    const words = WORD * block.tokens * block.channels;
    const raw = sizeOfA === RAW && sizeOfOthers === 0;
    const size = raw ? words : sizeOfA + sizeOfOthers;
    check(raw || size < words, PAYLOAD, "an entry of the rank table");
    const bytes = ranks.subarray(offset, offset + size);
    offset += size;
    return { block, raw, sizeOfA, bytes };
  });
  check(offset === ranks.length, PAYLOAD, "ranks of another size");
  return layout;
}

/** Writes the exact words of all blocks. */
export function readRanks(tile, table, ranks, words) {
  for (const part of layoutOf(tile.blocks, table, ranks)) {
    if (part.raw) readRawBlock(part, words);
    else readCodedBlock(tile, part, words);
  }
}

function readRawBlock({ block, bytes }, words) {
  let offset = 0;
  for (let token = 0; token < block.tokens; token++) {
    for (let channel = 0; channel < block.channels; channel++, offset += WORD) {
      words[block.at(token, channel)] = bytes.readUInt16LE(offset);
    }
  }
}

/** Section 8: the cell of an integer of magnitude a >= 1. */
function cellOf(a, half, numbers) {
  const low = numbers.ceilWord((2 * a - 1) * half);
  const count = numbers.ceilWord((2 * a + 1) * half) - low;
  check(count > 0, PAYLOAD, "an empty cell");
  return { low, count, bits: 31 - Math.clz32(count) };
}

/** The values of a block that have a rank or are in the zero cell, in the order of the streams. */
function cellsOf(tile, block) {
  const inCells = [];
  const inZero = [];
  for (let token = 0; token < block.tokens; token++) {
    for (let channel = 0; channel < block.channels; channel++) {
      const group = tile.groupOf(block, token, channel);
      if (group.s === 0) continue;
      const half = fromBfloat16(group.s) / 2;
      const k = tile.integerOf(block, token, channel);
      const place = block.at(token, channel);
      const exponent = tile.exponentOf(block, channel);
      if (k === 0) inZero.push({ place, exponent, top: tile.numbers.ceilWord(half) - 1 });
      else inCells.push({ place, exponent, sign: k < 0 ? 0x8000 : 0, ...cellOf(Math.abs(k), half, tile.numbers) });
    }
  }
  return { inCells, inZero };
}

function readCodedBlock(tile, { block, sizeOfA, bytes }, words) {
  const { inCells, inZero } = cellsOf(tile, block);
  let offset = 0;
  const take = (size) => {
    check(offset + size <= bytes.length, PAYLOAD, "streams of another size");
    offset += size;
    return bytes.subarray(offset - size, offset);
  };

  const bitsOfA = inCells.reduce((sum, cell) => sum + cell.bits, 0);
  check(bytesFor(bitsOfA) === sizeOfA, PAYLOAD, "stream A of another size");
  const streamA = new BitReader(take(sizeOfA));
  for (const cell of inCells) cell.rank = streamA.field(cell.bits);

  const withB = inCells.filter((cell) => cell.rank < cell.count - 2 ** cell.bits);
  const streamB = new BitReader(take(bytesFor(withB.length)));
  for (const cell of withB) cell.rank += streamB.bit() << cell.bits;
  for (const { place, exponent, sign, low, rank } of inCells) words[place] = moveBack(sign | (low + rank), exponent);

  let whole = inZero;
  if (tile.dtype === "bfloat16") {
    const streamW = new BitReader(take(bytesFor(W_BITS * inZero.length)));
    whole = [];
    for (const cell of inZero) {
      const field = streamW.field(W_BITS - 1);
      const sign = streamW.bit() << 15;
      if (field === W_ESCAPE) {
        whole.push(cell);
        continue;
      }
      check(field === W_ZERO || field < cell.top, PAYLOAD, "a field of W");
      words[cell.place] = moveBack(sign | (field === W_ZERO ? 0 : cell.top - field), cell.exponent);
    }
  }
  const streamX = take(WORD * whole.length);
  whole.forEach(({ place, exponent }, i) => (words[place] = moveBack(streamX.readUInt16LE(WORD * i), exponent)));
  check(offset === bytes.length, PAYLOAD, "streams of another size");
}
