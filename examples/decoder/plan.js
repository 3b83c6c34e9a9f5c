// SPDX-License-Identifier: Apache-2.0
// Plans of layers: wire-format.md, "PLAN".

import { LIMIT, PROTOCOL, check } from "./errors.js";
import { PARTS, headDim } from "./manifest.js";
import { countTokens, placesIn } from "./bitmap.js";

/** A text that two tiles share only if they are the same. */
export const tileKey = (tile) =>
  [
    tile.part,
    tile.head_start,
    tile.heads,
    tile.token_start,
    tile.token_stop,
    tile.codec,
    tile.bitmap.toString("hex"),
  ].join();

export const tokensOf = (tile) => (tile.bitmap.length ? countTokens(tile.bitmap) : tile.token_stop - tile.token_start);

/** The tile as codecs see it. */
export function codecTile(manifest, layer, tile) {
  const part = PARTS[tile.part];
  return {
    dtype: manifest.dtype,
    part,
    shape: [tile.heads, tokensOf(tile), headDim(layer, part)],
    layer: layer.index,
    head_start: tile.head_start,
  };
}

/** The tokens of a tile as ranges [start, stop). */
export function* rangesOf(tile) {
  if (!tile.bitmap.length) {
    yield [tile.token_start, tile.token_stop];
    return;
  }
  let start = null;
  let stop = null;
  for (const place of placesIn(tile.bitmap)) {
    const token = tile.token_start + place;
    if (token !== stop) {
      if (start !== null) yield [start, stop];
      start = token;
    }
    stop = token + 1;
  }
  yield [start, stop];
}

const MOST_TILES = 2 ** 20;

/**
 * Whether no two of the tiles of one part share a head of a token. Tokens are passed in order, with the heads that are taken at
 * each; an event is a number, (token, whether a tile begins, which tile), so that an explicit set of many tokens stays cheap.
 */
function areDisjoint(layer, tiles) {
  const events = new Float64Array(2 * tiles.reduce((sum, tile) => sum + countRanges(tile), 0));
  let count = 0;
  tiles.forEach((tile, i) => {
    for (const [start, stop] of rangesOf(tile)) {
      events[count++] = (2 * start + 1) * MOST_TILES + i;
      events[count++] = 2 * stop * MOST_TILES + i; // before those that begin there
    }
  });
  events.sort();
  const taken = new Uint8Array(layer.kv_heads);
  for (const event of events) {
    const place = Math.floor(event / MOST_TILES);
    const { head_start, heads } = tiles[event - place * MOST_TILES]; // % would be slow
    const begins = place - 2 * Math.floor(place / 2);
    const first = head_start - layer.head_start;
    if (begins && anyOf(taken, first, first + heads)) return false;
    taken.fill(begins, first, first + heads);
  }
  return true;
}

function anyOf(flags, start, stop) {
  for (let i = start; i < stop; i++) if (flags[i]) return true;
  return false;
}

function countRanges(tile) {
  let count = 0;
  for (const range of rangesOf(tile)) count += range.length / 2;
  return count;
}

/** Refuses tiles that do not cover each token, head and part of the layer exactly once. */
function checkCover(layer, tiles) {
  check(tiles.length < MOST_TILES, LIMIT, "more tiles than this program can compare");
  const [start, stop] = layer.tokens;
  const lastHead = layer.head_start + layer.kv_heads;
  const byPart = new Map(layer.parts.map((part) => [part, []]));
  let area = 0;
  for (const tile of tiles) {
    const ofPart = byPart.get(PARTS[tile.part]);
    check(ofPart, PROTOCOL, "a part that the layer lacks");
    check(
      tile.head_start >= layer.head_start && tile.head_start + tile.heads <= lastHead,
      PROTOCOL,
      "heads that the layer lacks",
    );
    check(tile.token_start >= start && tile.token_stop <= stop, PROTOCOL, "tokens that the layer lacks");
    ofPart.push(tile);
    area += tile.heads * tokensOf(tile);
  }
  check(
    area === layer.parts.length * layer.kv_heads * (stop - start),
    PROTOCOL,
    "tiles that do not cover the layer once",
  );
  for (const ofPart of byPart.values()) check(areDisjoint(layer, ofPart), PROTOCOL, "tiles that overlap");
}

/** The checks of a plan that cost the session, but for those of chunks that came before. */
export function checkPlan({ manifest, codecs }, layer, { tiles, levels }) {
  checkCover(layer, tiles);
  tiles.forEach((tile, i) => {
    const codec = codecs[tile.codec];
    check(codec, PROTOCOL, "a codec config that the manifest lacks");
    check(levels[i] === codec.levels, PROTOCOL, "levels that are not what the codec has");
    codec.checkTile(codecTile(manifest, layer, tile));
  });
}

/** The bytes of an ACK with the status of one layer of so many tiles, as "PLAN" counts them. */
const statusSize = (tiles) => 3 * tiles + 1024;

/**
 * What costs the transfer and must be known before anything is done for each position of an explicit set. `planned` counts
 * tiles and positions of all plans of the transfer.
 */
export function countPlan({ tiles }, planned, limits, peerLimits) {
  check(statusSize(tiles.length) <= peerLimits.control_bytes, LIMIT, "a status that the peer would not take");
  planned.tiles += tiles.length;
  planned.positions += tiles.reduce((sum, tile) => sum + (tile.bitmap.length ? tokensOf(tile) : 0), 0);
  check(planned.tiles <= limits.tiles, LIMIT, "more tiles than the limit");
  check(planned.positions <= limits.positions, LIMIT, "more explicit positions than the limit");
}

/** What else costs the transfer. */
export function checkPlanLimits({ manifest, codecs }, layer, { tiles }, limits) {
  const most = [limits.frame_bytes, limits.session_window, limits.transfer_window].reduce((a, b) => (a < b ? a : b));
  for (const tile of tiles) {
    const codec = codecs[tile.codec];
    const shaped = codecTile(manifest, layer, tile);
    for (let level = 0; level < codec.levels; level++) {
      check(codec.largestPayload(shaped, level) <= most, LIMIT, "a chunk that could be larger than a window");
    }
  }
}
