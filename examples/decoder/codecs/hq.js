// SPDX-License-Identifier: Apache-2.0
// Codec hq: codec-hq.md. This file has blocks (section 3), reconstruction (section 5) and payloads (section 9).

import { PAYLOAD, check } from "../errors.js";
import { NUMBERS, fromBfloat16, moveBack, rowOf } from "./hq-numbers.js";
import { PARAMETER_HEADER, readParameters } from "./hq-parameters.js";
import { PlaneSection } from "./hq-planes.js";
import { RANK_ENTRY, readRanks } from "./hq-ranks.js";
import { checkTile, parseConfig, widthsOf } from "./hq-config.js";
import { valuesOf } from "./raw.js";

const HEADER = 8;
const CODED = 0;
const STORED = 1;
const BLOCK = 64;
const WORD = 2;

/** Section 3: the blocks of a tile. `at(token, channel)` is the place of a value among the tile's. */
function blocksOf({ shape: [heads, tokens, headDim] }, isKey) {
  const blocks = [];
  for (let head = 0; head < heads; head++) {
    for (let token = 0; token < tokens; token += BLOCK) {
      for (let channel = 0; channel < headDim; channel += BLOCK) {
        const blockTokens = Math.min(BLOCK, tokens - token);
        const channels = Math.min(BLOCK, headDim - channel);
        const first = (head * tokens + token) * headDim + channel;
        blocks.push({
          number: blocks.length,
          tokens: blockTokens,
          channels,
          groups: isKey ? channels : blockTokens,
          firstChannel: head * headDim + channel, // among those of all heads
          at: (t, c) => first + t * headDim + c,
        });
      }
    }
  }
  return blocks;
}

const blockCount = ({ shape: [heads, tokens, headDim] }) =>
  heads * Math.ceil(tokens / BLOCK) * Math.ceil(headDim / BLOCK);

/** Cuts a payload from its start; a section that is not there is refused before it is made. */
class Cutter {
  constructor(bytes, offset) {
    this.bytes = bytes;
    this.offset = offset;
  }

  get left() {
    return this.bytes.length - this.offset;
  }

  take(size) {
    check(size <= this.left, PAYLOAD, "a payload that ends early");
    this.offset += size;
    return this.bytes.subarray(this.offset - size, this.offset);
  }

  end() {
    check(this.left === 0, PAYLOAD, "a payload that is too long");
  }
}

function readHeader(level, payload) {
  check(payload.length >= HEADER, PAYLOAD, "no header");
  const mode = payload[0];
  check(mode === CODED || mode === STORED, PAYLOAD, "an unknown mode");
  check(payload[1] === level && payload.readUInt16LE(2) === 0, PAYLOAD, "a header");
  return { mode, variable: payload.readUInt32LE(4) };
}

/** Fields of 4 bits, one for each head and channel. */
function readNibbles(cutter, count) {
  const bytes = cutter.take(Math.ceil(count / 2));
  check(count % 2 === 0 || bytes.at(-1) >> 4 === 0, PAYLOAD, "padding of a side table");
  return Int8Array.from({ length: count }, (_, i) => (bytes[i >> 1] >> (4 * (i & 1))) & 15);
}

/** What is known of one tile after the levels so far. */
class Decoder {
  constructor(config, tile) {
    this.config = config;
    this.tile = tile;
    this.dtype = tile.dtype;
    this.isKey = tile.part === "key";
    this.numbers = NUMBERS[tile.dtype];
    this.mode = null;
  }

  decode(level, payload) {
    const { mode, variable } = readHeader(level, payload);
    check(level === 0 || mode === this.mode, PAYLOAD, "levels of different modes");
    if (level === 0) this.mode = mode;
    if (mode === STORED) return this.#decodeStored(level, payload, variable);
    const cutter = new Cutter(payload, HEADER);
    return level === 0 ? this.#decodeAnchor(cutter, variable) : this.#decodeFurther(level, cutter, variable);
  }

  #decodeStored(level, payload, variable) {
    const size = level === 0 ? WORD * valuesOf(this.tile) : 0;
    check(variable === 0 && payload.length === HEADER + size, PAYLOAD, "a stored level of another size");
    if (level === 0) this.stored = payload.subarray(HEADER);
    return this.stored;
  }

  #decodeAnchor(cutter, variable) {
    const { config, tile, isKey } = this;
    const [heads, , headDim] = tile.shape;
    const channels = heads * headDim;
    // No allocation below is larger than the payload by more than the parameter headers allow for.
    check(cutter.left >= PARAMETER_HEADER * blockCount(tile), PAYLOAD, "a payload that ends early");
    this.widths = widthsOf(config, tile) ?? readNibbles(cutter, channels);
    check(
      this.widths.every((width) => width <= 8),
      PAYLOAD,
      "a width over 8",
    );
    const scaled = !isKey && config.scaling && this.dtype === "bfloat16";
    this.exponents = scaled ? readNibbles(cutter, channels).map((field) => field - 8) : null;
    this.biases = !isKey && config.fold ? readNibbles(cutter, channels).map((field) => field - 8) : null;
    const foldTable = config.fold ? cutter.take(2 * blockCount(tile)) : null;

    this.blocks = blocksOf(tile, isKey);
    const section = new PlaneSection("anchor", this, foldTable);
    const planes = cutter.take(section.size);
    const headers = cutter.take(PARAMETER_HEADER * this.blocks.length);
    const parameters = cutter.take(variable);
    cutter.end();

    this.groups = readParameters(this.blocks, headers, parameters, this.numbers);
    this.codes = new Uint8Array(valuesOf(tile));
    section.read(planes); // folded values need their zero points
    return this.#reconstruct((block, token, channel) => this.#anchorOf(block, token, channel));
  }

  #decodeFurther(level, cutter, variable) {
    const { config } = this;
    const withRest = level === 1;
    const withRanks = level === config.levels - 1;
    check(withRanks || variable === 0, PAYLOAD, "a section that this level has not");
    let section = null;
    let planes = null;
    if (withRest) {
      const folds = config.fold && this.isKey && this.widths.some((width) => width <= 1);
      section = new PlaneSection("rest", this, folds ? cutter.take(2 * this.blocks.length) : null);
      planes = cutter.take(section.size);
    }
    const table = withRanks ? cutter.take(RANK_ENTRY * this.blocks.length) : null;
    const ranks = withRanks ? cutter.take(variable) : null;
    cutter.end();

    if (withRest) {
      section.read(planes);
      this.#checkCodes();
    }
    if (!withRanks) return this.#reconstruct((block, token, channel) => this.integerOf(block, token, channel));
    return this.#exactWords(table, ranks);
  }

  #exactWords(table, ranks) {
    const words = new Uint16Array(this.codes.length);
    for (const block of this.blocks) {
      this.#forEachValue(block, (token, channel) => {
        const group = this.groupOf(block, token, channel);
        if (group.s === 0) words[block.at(token, channel)] = moveBack(group.word, this.exponentOf(block, channel));
      });
    }
    readRanks(this, table, ranks, words);
    return littleEndian(words);
  }

  #reconstruct(integerOf) {
    const words = new Uint16Array(this.codes.length);
    for (const block of this.blocks) {
      this.#forEachValue(block, (token, channel) => {
        const group = this.groupOf(block, token, channel);
        const word =
          group.s === 0 ? group.word : this.numbers.toWord(integerOf(block, token, channel) * fromBfloat16(group.s));
        words[block.at(token, channel)] = moveBack(word, this.exponentOf(block, channel));
      });
    }
    return littleEndian(words);
  }

  #checkCodes() {
    for (const block of this.blocks) {
      this.#forEachValue(block, (token, channel) => {
        const { range, offset } = this.#rowOf(block, channel);
        const code = this.codes[block.at(token, channel)];
        check(code >= offset && code <= offset + range + 1, PAYLOAD, "a code out of its range");
      });
    }
  }

  #forEachValue(block, action) {
    for (let token = 0; token < block.tokens; token++) {
      for (let channel = 0; channel < block.channels; channel++) action(token, channel);
    }
  }

  #rowOf(block, channel) {
    return rowOf(this.widths[block.firstChannel + channel], this.isKey);
  }

  /** A(u) - z */
  #anchorOf(block, token, channel) {
    const width = this.widths[block.firstChannel + channel];
    const code = this.codes[block.at(token, channel)]; // its other bits are 0: u * 2^(8 - b)
    return this.#rowOf(block, channel).first + (width === 0 ? 0 : code) - this.groupOf(block, token, channel).z;
  }

  // What the modules of planes and ranks ask for.

  widthsOf(block) {
    return this.widths.subarray(block.firstChannel, block.firstChannel + block.channels);
  }

  groupOf(block, token, channel) {
    return this.groups[block.number][this.isKey ? channel : token];
  }

  exponentOf(block, channel) {
    return this.exponents ? this.exponents[block.firstChannel + channel] : 0;
  }

  /** k = C - o - z */
  integerOf(block, token, channel) {
    const code = this.codes[block.at(token, channel)];
    return code - this.#rowOf(block, channel).offset - this.groupOf(block, token, channel).z;
  }

  /** Section 6.1: `zero` of a value. */
  zeroOf(block, token, channel) {
    const bias = this.biases[block.firstChannel + channel];
    return this.groupOf(block, token, channel).z + this.#rowOf(block, channel).offset + 4 * bias;
  }
}

function littleEndian(words) {
  const bytes = Buffer.alloc(WORD * words.length);
  words.forEach((word, i) => bytes.writeUInt16LE(word, WORD * i));
  return bytes;
}

/** Section 9, "Largest payload". */
function largestPayload(config, tile, level) {
  const size = WORD * valuesOf(tile);
  if (config.levels !== 3 || level !== 1) return HEADER + size;
  const [heads, tokens, headDim] = tile.shape;
  const table = config.fold ? 2 * blockCount(tile) : 0;
  const widths = widthsOf(config, tile)?.reduce((sum, width) => sum + width, 0) ?? 0;
  return HEADER + Math.min(size, table + Math.ceil(tokens / 8) * (8 * heads * headDim - widths));
}

export function hq(configMap) {
  const config = parseConfig(configMap);
  return {
    id: 3,
    levels: config.levels,
    exact: config.levels > 1,
    zstd: null,
    checkTile: (tile) => checkTile(config, tile),
    largestPayload: (tile, level) => largestPayload(config, tile, level),
    decoder: (tile) => new Decoder(config, tile),
  };
}
