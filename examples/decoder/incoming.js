// SPDX-License-Identifier: Apache-2.0
// A transfer at its receiver: wire-format.md, "A transfer", "Manifest", "PLAN", "DATA", "END", "CLOSED".

import { CANCELLED, IDENTITY, INTERNAL, LIMIT, MISSING_TABLE, PROTOCOL, Refusal, STATE, UNSUPPORTED, Unsupported, check } from "./errors.js";
import { Tile, TransferFailure } from "./tile.js";
import { Window, chargeBoth, settle } from "./credit.js";
import { buildCodec } from "./codecs/index.js";
import { checkPlan, checkPlanLimits, codecTile, countPlan, tileKey } from "./plan.js";
import { parseManifest } from "./manifest.js";
import { sameIdentity } from "./identity.js";
import { tileAsArray } from "./bodies.js";

const HIGHEST_LEVEL = 7;
const NOTED_TILES = 1024;

/** What must be rejected before any data moves, in the order that "Manifest" gives. */
function judgeManifest(bytes, session) {
  check(session.openTransfers() < session.limits.transfers, LIMIT, "more transfers than the limit");
  const manifest = parseManifest(bytes, session.limits);
  check(sameIdentity(session.identity, manifest.identity), IDENTITY, "another model");
  for (const hash of manifest.tables)
    check(session.tables.has(hash.toString("hex")), MISSING_TABLE, "a table that is not held");
  check(manifest.codecs.length > 0, PROTOCOL, "no codec");
  const codecs = manifest.codecs.map((config) => {
    check(session.codecs.includes(config.get("id")), UNSUPPORTED, "a codec that was not named");
    const codec = buildCodec(config);
    check(codec.exact || manifest.lossy, PROTOCOL, "an inexact codec");
    return codec;
  });
  return { manifest, codecs };
}

/** A refusal that does not cost the session. */
function atCostOfTransfer(action) {
  try {
    action();
  } catch (error) {
    throw error instanceof Refusal ? new TransferFailure(error.code, error.message) : error;
  }
}

const meets = (range, start, stop) => range === null || (range[0] < stop && start < range[1]);

export class Incoming {
  constructor(session) {
    this.session = session;
    this.state = "offered";
    this.corrupt = 0;
    this.restarted = 0;
    this.level = HIGHEST_LEVEL; // the highest that is not cancelled
    this.settled = HIGHEST_LEVEL; // of CLOSED
    this.result = null;
    this.layers = new Map(); // by index: { plan, end, tiles }; tiles by key
    this.planned = { tiles: 0, positions: 0 };
    this.window = new Window();
  }

  /** Nothing more is made of its frames, but for a CLOSED that is still to come. */
  get over() {
    return ["rejected", "cancelled", "failed", "closed"].includes(this.state);
  }

  /** Whether it counts as one that the peer has open. */
  get open() {
    return !this.ended && this.state !== "rejected";
  }

  judge(manifestBytes) {
    try {
      Object.assign(this, judgeManifest(manifestBytes, this.session));
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      this.reject(error.code);
      return;
    }
    for (const layer of this.manifest.layers) {
      this.layers.set(layer.index, { layer, plan: null, end: null, tiles: new Map() });
    }
  }

  #end(state, code) {
    this.state = state;
    this.code = code;
    this.layers = new Map();
  }

  /** What the receiver does to a transfer that cannot go on: ERROR, and the session lives. */
  #orFail(action) {
    try {
      return action();
    } catch (error) {
      if (!(error instanceof TransferFailure)) throw error;
      this.#end("failed", error.code);
    }
  }

  // What this side has said.

  reject(code) {
    if (this.state === "offered") this.#end("rejected", code);
  }

  accept({ want, credit, held }) {
    // What was kept of another session is not in the script.
    if (held.length) throw new Unsupported("a transfer that goes on from another session");
    if (this.state === "offered") {
      this.state = "receiving";
      this.want = want;
    }
    this.window.allow(credit);
    this.#checkComplete();
  }

  cancel({ above, code }) {
    if (this.state !== "receiving") return;
    if (above < 0) this.#end("cancelled", code);
    else this.#lowerTo(above);
  }

  giveUp(code) {
    if (!this.over) this.#end("failed", code);
  }

  #lowerTo(level) {
    if (this.state !== "receiving") return;
    this.level = Math.min(this.level, level);
    for (const { tiles } of this.layers.values()) for (const tile of tiles.values()) tile.forgetAbove(this.level);
    this.#checkComplete();
  }

  // What the peer says.

  #layerOf(index) {
    check(this.state !== "offered", STATE, "before ACCEPT");
    const layer = this.layers.get(index);
    check(layer, PROTOCOL, "a layer that the manifest lacks");
    return layer;
  }

  takePlan(plan) {
    const layer = this.#layerOf(plan.layer);
    const keys = plan.tiles.map(tileKey);
    if (layer.plan) {
      const same = layer.plan.keys.join(" ") === keys.join(" ") && layer.plan.levels.equals(plan.levels);
      check(same, STATE, "a second plan");
      return;
    }
    this.#orFail(() => {
      atCostOfTransfer(() => countPlan(plan, this.planned, this.session.limits, this.session.peerLimits));
      checkPlan(this, layer.layer, plan);
      this.#checkNoted(layer, plan, keys);
      if (layer.end) this.#checkEnd(layer.end, plan.tiles.length);
      atCostOfTransfer(() => checkPlanLimits(this, layer.layer, plan, this.session.limits));
      this.#adoptPlan(layer, plan, keys);
      for (const tile of layer.tiles.values()) tile.advance();
      this.#checkComplete();
    });
  }

  /** Chunks that came before the plan must be of its tiles, and must be such as these can have. */
  #checkNoted(layer, plan, keys) {
    const places = new Map(keys.map((key, i) => [key, i]));
    for (const [key, tile] of layer.tiles) {
      check(places.has(key), PROTOCOL, "a plan without a tile that came before it");
      const i = places.get(key);
      const codec = this.codecs[plan.tiles[i].codec];
      const shaped = codecTile(this.manifest, layer.layer, plan.tiles[i]);
      for (const [level, length] of tile.charged[0]) {
        check(level < codec.levels, PROTOCOL, "a plan with fewer levels than came before it");
        check(length <= codec.largestPayload(shaped, level), PROTOCOL, "a plan in which a chunk is too large");
      }
    }
  }

  #adoptPlan(layer, plan, keys) {
    const noted = layer.tiles;
    layer.plan = { keys, levels: plan.levels };
    layer.tiles = new Map();
    plan.tiles.forEach((place, i) => {
      const tile = noted.get(keys[i]) ?? this.#tileAt(layer, place);
      const codec = this.codecs[place.codec];
      tile.plan = { codec, shaped: codecTile(this.manifest, layer.layer, place), levels: codec.levels };
      layer.tiles.set(keys[i], tile);
    });
    if (layer.end) this.#adoptDigests(layer);
  }

  #tileAt(layer, place) {
    return new Tile(place, this.#wantedLevels(layer.layer, place, this.codecs[place.codec].levels), this);
  }

  /** How many levels of a tile are wanted: the largest number, of the wants that it meets. */
  #wantedLevels(layer, place, levels) {
    let wanted = 0;
    for (const [layers, heads, tokens, most] of this.want) {
      const met =
        meets(layers, layer.index, layer.index + 1) &&
        meets(heads, place.head_start, place.head_start + place.heads) &&
        meets(tokens, place.token_start, place.token_stop);
      if (met) wanted = Math.max(wanted, Math.min(Number(most ?? levels), levels));
    }
    return wanted;
  }

  takeEnd(end) {
    const layer = this.#layerOf(end.layer);
    if (layer.end) {
      const same =
        layer.end.length === end.digests.length && layer.end.every((digest, i) => digest.equals(end.digests[i]));
      check(same, STATE, "a second END");
      return;
    }
    if (layer.plan) this.#checkEnd(end.digests, layer.tiles.size);
    layer.end = end.digests;
    if (!layer.plan) return;
    this.#adoptDigests(layer);
    this.#orFail(() => {
      for (const tile of layer.tiles.values()) tile.advance();
      this.#checkComplete();
    });
  }

  #checkEnd(digests, tiles) {
    check(digests.length === tiles, PROTOCOL, "another number of digests than tiles");
    check(this.manifest.lossy || digests.every((digest) => digest.length), PROTOCOL, "no digest");
  }

  #adoptDigests(layer) {
    [...layer.tiles.values()].forEach((tile, i) => (tile.digest = layer.end[i]));
  }

  takeResult({ token, gap }) {
    check(this.state !== "offered", STATE, "RESULT before ACCEPT");
    this.result ??= { token, gap };
  }

  /** "DATA", steps 1 to 8: whether the payload is wanted. It is then expected on this stripe. */
  place(header, stripe) {
    const layer = this.#layerOf(header.layer);
    const codec = this.codecs[header.codec];
    check(codec && codec.id === header.codec_id, PROTOCOL, "another codec than the manifest's");
    const key = tileKey(header);
    let tile = layer.tiles.get(key);
    if (!tile) {
      check(!layer.plan, PROTOCOL, "a tile that is not in the plan");
      if (this.#notedTiles() >= NOTED_TILES) return false;
      tile = this.#tileAt(layer, header);
      layer.tiles.set(key, tile);
    }
    const { level, attempt, payload_length: length } = header;
    if (tile.plan) {
      check(level < tile.plan.levels, PROTOCOL, "a level that the tile lacks");
      check(
        length <= codec.largestPayload(tile.plan.shaped, level),
        PROTOCOL,
        "a payload larger than the codec can make it",
      );
    }
    check(attempt <= tile.attempt, PROTOCOL, "an attempt that was not asked for");
    if (level > this.settled) return false;
    this.#charge(tile, level, attempt, length);
    const wanted = level < tile.wanted && level <= this.level;
    if (attempt < tile.attempt || !wanted || tile.has(level)) return false;
    tile.arriving.set(level, stripe);
    return true;
  }

  #notedTiles() {
    let count = 0;
    for (const layer of this.layers.values()) if (!layer.plan) count += layer.tiles.size;
    return count;
  }

  #charge(tile, level, attempt, length) {
    const charged = tile.charged[attempt];
    if (charged.has(level)) {
      check(attempt < tile.attempt || charged.get(level) === length, STATE, "the same chunk with another length");
      return;
    }
    chargeBoth(this.window, this.session.window, level, length);
    charged.set(level, length);
  }

  /** The payload of a chunk that place() has let in. */
  takeChunk(frame, stripe) {
    const tile = this.layers.get(frame.layer)?.tiles.get(tileKey(frame));
    if (!tile || tile.attempt !== frame.attempt || tile.arriving.get(frame.level) !== stripe) return;
    tile.arriving.delete(frame.level);
    this.#orFail(() => {
      if (frame.intact) {
        tile.payloads.set(frame.level, frame.payload);
        tile.advance();
        this.#checkComplete();
      } else {
        this.corrupt++;
        tile.damage(frame.level);
      }
    });
  }

  takeClosed({ level, end, final, code }) {
    check(this.state !== "offered" || end, STATE, "CLOSED before ACCEPT");
    settle(this.window, this.session.window, final, end ? 0 : level + 1);
    if (!this.over) {
      this.settled = Math.min(this.settled, level);
      this.#lowerTo(level);
    }
    if (!end) return;
    this.ended = true;
    if (this.over || this.state === "complete") return;
    this.#end(code === CANCELLED ? "cancelled" : "failed", code || INTERNAL);
  }

  /** A stripe is over: what was arriving on it has not come. */
  forgetStripe(stripe) {
    for (const { tiles } of this.layers.values()) {
      for (const { arriving } of tiles.values()) {
        for (const [level, of] of arriving) if (of === stripe) arriving.delete(level);
      }
    }
  }

  /** Every layer is planned, ended and done. */
  #checkComplete() {
    if (this.state !== "receiving") return;
    for (const { plan, end, tiles } of this.layers.values()) {
      if (!plan || !end) return;
      for (const tile of tiles.values()) if (!tile.isDone(this.level)) return;
    }
    this.state = "complete";
  }

  /** conformance.md, "session". */
  show() {
    const shown = { outcome: this.state };
    if (this.over) shown.code = this.code;
    if (this.state === "rejected") return shown;
    Object.assign(shown, { corrupt: this.corrupt, restarted: this.restarted });
    if (this.level < HIGHEST_LEVEL) shown.level = this.level;
    if (this.result) shown.result = this.result;
    if (this.state === "receiving" || this.state === "complete") shown.tiles = this.#showTiles();
    return shown;
  }

  #showTiles() {
    const shown = [];
    for (const index of [...this.layers.keys()].sort((a, b) => a - b)) {
      const { plan, tiles } = this.layers.get(index);
      if (!plan) continue;
      for (const tile of tiles.values()) {
        if (!tile.applied) continue;
        shown.push({
          tile: [index, ...tileAsArray(tile.place)],
          level: tile.applied - 1,
          verified: tile.verified,
          words: tile.words,
        });
      }
    }
    return shown;
  }
}
