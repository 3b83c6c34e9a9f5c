// SPDX-License-Identifier: Apache-2.0
// A recorded conversation, seen by its receiving side: conformance.md, "session", and wire-format.md from "Handshake" on.

import {
  ACCEPT,
  ACK,
  CANCEL,
  CLOSED,
  CREDIT,
  DATA,
  END,
  ERROR,
  FETCH,
  GOAWAY,
  HELLO,
  HELLO_ACK,
  NACK,
  NOT_FOUND,
  OPEN,
  PING,
  PLAN,
  PONG,
  REJECT,
  RESULT,
  RESUME,
  URGENT,
  isKnown,
} from "./bodies.js";
import { FRAME_CORRUPT, PROTOCOL, Refusal, Unsupported, check } from "./errors.js";
import { FrameReader, bodyOf } from "./frames.js";
import { DEFAULT_LIMITS, limitsWith } from "./limits.js";
import { Handshake } from "./handshake.js";
import { Incoming } from "./incoming.js";
import { Window } from "./credit.js";

const OF_SESSION = [HELLO, HELLO_ACK, PING, PONG, GOAWAY];
const BY_RECEIVER = [ACCEPT, REJECT, FETCH, ACK, NACK, CREDIT, RESUME, CANCEL, URGENT, ERROR];
const UNLIMITED = Object.fromEntries(Object.keys(DEFAULT_LIMITS).map((name) => [name, Infinity]));

const isZero = (id) => id.every((byte) => byte === 0);

/** One byte stream of the session. */
class Stripe {
  constructor(number, session) {
    this.number = number;
    this.lost = false;
    this.handshake = new Handshake(session);
    this.own = new FrameReader(UNLIMITED);
    this.peer = new FrameReader(session.limits, {
      inHandshake: () => !this.handshake.ready,
      place: (header) => session.placeData(header, number),
    });
  }
}

class Session {
  constructor({ role, secret = "", secret_id = "", identity = {}, tables = [], limits }) {
    this.role = role;
    this.secret = Buffer.from(secret, "hex");
    this.secretId = secret_id;
    this.identity = identity;
    this.tables = new Set(tables);
    this.limits = limitsWith(limits); // until our HELLO says
    this.peerLimits = limitsWith();
    this.codecs = [];
    this.id = null;
    this.token = Buffer.alloc(0);
    this.window = null;
    this.state = "connecting";
    this.ended = null;
    this.stripes = new Map();
    this.transfers = new Map();
    this.requests = new Set();
    this.notFound = new Map();
  }

  get isOver() {
    return this.ended !== null || this.state === "closed";
  }

  stripe(number) {
    if (!this.stripes.has(number)) this.stripes.set(number, new Stripe(number, this));
    return this.stripes.get(number);
  }

  liveStripes() {
    return [...this.stripes.values()].filter((stripe) => !stripe.lost && stripe.handshake.ready).length;
  }

  openTransfers() {
    let count = 0;
    for (const transfer of this.transfers.values()) if (transfer.open) count++;
    return count;
  }

  lose(stripe) {
    if (stripe.lost) return;
    stripe.lost = true;
    for (const transfer of this.transfers.values()) transfer.forgetStripe(stripe.number);
    if (this.state === "active" && this.liveStripes() === 0) this.state = "suspended";
  }

  // What this side has said.

  readOwn(stripe, bytes) {
    for (const frame of stripe.own.read(bytes)) {
      if (!isKnown(frame.type) || frame.type === DATA) continue;
      this.#takeOwn(stripe, frame, bodyOf(frame, UNLIMITED));
      if (this.isOver) return;
    }
  }

  #takeOwn(stripe, frame, body) {
    const id = frame.transfer.toString("hex");
    const transfer = this.transfers.get(id);
    switch (frame.type) {
      case HELLO:
        return this.#takeOwnHello(stripe, body, frame.payload);
      case OPEN:
        throw new Unsupported("a side that sends");
      case ACCEPT:
        return transfer?.accept(body);
      case REJECT:
        return transfer?.reject(body.code);
      case FETCH:
        return this.requests.add(id);
      case CREDIT:
        return (isZero(frame.transfer) ? this.window : transfer?.window)?.allow(body.limits);
      case CANCEL:
        return transfer?.cancel(body);
      case ERROR:
        if (isZero(frame.transfer)) this.state = "closed";
        else transfer?.giveUp(body.code);
        return;
      case GOAWAY:
        this.state = "closed";
    }
  }

  #takeOwnHello(stripe, body, payload) {
    stripe.handshake.ownHello(body, payload);
    Object.assign(this.limits, body.limits);
    this.codecs = body.codecs;
    this.window ??= new Window(body.limits.session_window);
    if (this.role === "server" && this.id === null) {
      this.id = body.session;
      this.token = body.token;
    }
  }

  // What the peer says.

  readPeer(stripe, bytes) {
    try {
      for (const frame of stripe.peer.read(bytes)) {
        if (isKnown(frame.type)) this.#takeFrame(stripe, frame);
        if (this.isOver || stripe.lost) return;
      }
    } catch (error) {
      if (error instanceof Refusal) this.#locate(stripe, error);
      throw error;
    }
  }

  /** What a fault costs, and where it is. */
  #locate(stripe, error) {
    let scope = error.details.scope ?? "session";
    if (!stripe.handshake.ready) scope = this.state === "connecting" ? "session" : "stripe";
    error.details = { scope, stripe: stripe.number, offset: stripe.peer.start };
  }

  #takeFrame(stripe, frame) {
    const { handshake } = stripe;
    const body = () => bodyOf(frame, this.limits);
    if (frame.type === HELLO || frame.type === HELLO_ACK) {
      const before = handshake.ready;
      handshake.take(frame, body);
      if (handshake.ready && !before) this.#stripeReady(stripe);
    } else if (frame.type === DATA) {
      this.#takeData(stripe, frame);
    } else if (!frame.intact) {
      check(handshake.ready, FRAME_CORRUPT, "a damaged payload in a handshake");
    } else if (!handshake.ready) {
      this.#takeEndOfHandshake(stripe, body());
    } else {
      this.#takeControl(frame, body());
    }
  }

  /** ERROR or GOAWAY before the handshake is over. */
  #takeEndOfHandshake(stripe, { code }) {
    if (this.state === "connecting") this.ended = code;
    else this.lose(stripe);
  }

  #stripeReady(stripe) {
    const { client, server, peer } = stripe.handshake;
    if (this.role === "client") {
      if (this.id === null) {
        this.id = server.session;
        this.token = server.token;
      }
    } else {
      for (const other of this.stripesGivenUp(client)) this.lose(other);
    }
    this.peerLimits = peer.body.limits;
    this.state = "active";
  }

  /** The stripes that the client has lost, as it says in the HELLO of a later one. */
  stripesGivenUp({ stripe, alive }) {
    return [...this.stripes.values()].filter(({ lost, handshake }) => {
      const number = handshake.client?.stripe;
      return !lost && number < stripe && !alive.includes(number);
    });
  }

  /** Check 14 of "Order of checks". */
  placeData(header, stripe) {
    const transfer = this.transfers.get(header.transfer.toString("hex"));
    return transfer && !transfer.over ? transfer.place(header, stripe) : false;
  }

  #takeData(stripe, frame) {
    if (frame.payload === null) return;
    const transfer = this.transfers.get(frame.transfer.toString("hex"));
    if (transfer && !transfer.over) transfer.takeChunk(frame, stripe.number);
  }

  #takeControl(frame, body) {
    const { type } = frame;
    if (isZero(frame.transfer)) {
      check(OF_SESSION.includes(type) || type === CREDIT || type === ERROR, PROTOCOL, "no transfer id");
      if (type === ERROR || type === GOAWAY) this.ended = body.code;
      return;
    }
    if (type === GOAWAY) this.ended = body.code;
    if (OF_SESSION.includes(type)) return;
    const id = frame.transfer.toString("hex");
    if (type === OPEN) return this.#takeOpen(id, body);
    if (type === FETCH) throw new Unsupported("a side that is asked for a cache");
    if (type === NOT_FOUND) {
      if (this.requests.delete(id)) this.notFound.set(id, body.code);
      return;
    }
    const transfer = this.transfers.get(id);
    if (!transfer || transfer.ended) return;
    if (type === CLOSED) return transfer.state === "rejected" ? undefined : transfer.takeClosed(body);
    if (transfer.over) return;
    check(!BY_RECEIVER.includes(type), PROTOCOL, "a frame that only a receiver may send");
    if (type === PLAN) transfer.takePlan(body);
    if (type === END) transfer.takeEnd(body);
    if (type === RESULT) transfer.takeResult(body);
  }

  #takeOpen(id, { fetch, manifest }) {
    if (this.transfers.has(id)) return;
    const transfer = new Incoming(this);
    transfer.judge(manifest); // before it counts as open itself
    this.transfers.set(id, transfer);
    if (fetch.length) this.requests.delete(fetch.toString("hex"));
  }

  show() {
    const transfers = {};
    for (const [id, transfer] of this.transfers) transfers[id] = transfer.show();
    for (const [id, code] of this.notFound) transfers[id] = { outcome: "not found", code };
    return this.ended === null ? { state: this.state, transfers } : { ended: this.ended, transfers };
  }
}

export function observeSession(request) {
  const session = new Session(request);
  for (const step of request.script) {
    const stripe = session.stripe(step.stripe);
    if (session.isOver || stripe.lost) continue;
    if (step.event === "lost") session.lose(stripe);
    else if (step.from === session.role) session.readOwn(stripe, Buffer.from(step.data, "hex"));
    else session.readPeer(stripe, Buffer.from(step.data, "hex"));
  }
  return session.show();
}
