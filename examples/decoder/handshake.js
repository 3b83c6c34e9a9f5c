// SPDX-License-Identifier: Apache-2.0
// How a stripe begins: wire-format.md, "Handshake".

import { AUTHENTICATION, FRAME_CORRUPT, LIMIT, NOT_FOUND, PROTOCOL, STATE, VERSION, check } from "./errors.js";
import { HELLO, HELLO_ACK } from "./bodies.js";
import { proof, sameMac } from "./proof.js";

const OUR_VERSIONS = [1, 1];

/** The highest version that both allow. */
function chooseVersion(ours, theirs) {
  const version = Math.min(ours[1], theirs[1]);
  check(version >= Math.max(ours[0], theirs[0]), VERSION, "no common version");
  return version;
}

/** One stripe's handshake, seen by `role`. `session` says what is known of the session. */
export class Handshake {
  constructor(session) {
    this.session = session;
    this.role = session.role;
    this.state = "hello"; // what the peer must send next: "hello", "proof", or "ready"
    this.own = null; // { body, payload } of our HELLO
    this.peer = null; // of the peer's
    this.ack = null; // payload of the peer's HELLO_ACK
  }

  get ready() {
    return this.state === "ready";
  }

  ownHello(body, payload) {
    this.own ??= { body, payload };
  }

  /** HELLO or HELLO_ACK of the peer, before the handshake is over or after it. */
  take(frame, body) {
    const taken = frame.type === HELLO ? this.peer?.payload : this.ack;
    if (taken) {
      check(frame.intact || this.ready, FRAME_CORRUPT, "a damaged payload");
      check(!frame.intact || taken.equals(frame.payload), STATE, "another HELLO or HELLO_ACK");
      return;
    }
    check(
      frame.type === (this.state === "hello" ? HELLO : HELLO_ACK),
      STATE,
      "another frame in place of HELLO or HELLO_ACK",
    );
    check(frame.intact, FRAME_CORRUPT, "a damaged payload");
    if (frame.type === HELLO) this.#takeHello(body(), frame.payload);
    else this.#takeAck(body(), frame.payload);
  }

  #takeHello(body, payload) {
    this.version = chooseVersion(this.own?.body.versions ?? OUR_VERSIONS, body.versions);
    if (this.role === "server") this.#checkClient(body);
    else this.#checkServer(body);
    this.peer = { body, payload };
    this.state = "proof";
  }

  #checkClient(body) {
    check(body.secret === this.session.secretId, AUTHENTICATION, "a secret that this side does not accept");
    if (body.session.length) check(this.session.id?.equals(body.session), NOT_FOUND, "an unknown session");
  }

  #checkServer(body) {
    check(this.own, STATE, "the server speaks first");
    const asked = this.own.body.session;
    check(body.stripe === this.own.body.stripe, PROTOCOL, "an answer for another stripe");
    check(body.session.length > 0, PROTOCOL, "no session");
    if (asked.length) check(asked.equals(body.session), PROTOCOL, "another session");
    else check(body.token.length > 0, PROTOCOL, "no token");
  }

  #takeAck(body, payload) {
    check(body.version === this.version, VERSION, "another version");
    check(this.own, STATE, "a proof before both HELLOs");
    const [client, server] = this.role === "client" ? [this.own, this.peer] : [this.peer, this.own];
    const joins = client.body.session.length > 0;
    const expected = proof({
      side: this.role === "client" ? "server" : "client",
      secret: this.session.secret,
      token: joins ? this.session.token : Buffer.alloc(0),
      clientHello: client.payload,
      serverHello: server.payload,
    });
    check(sameMac(expected, body.mac), AUTHENTICATION, "a wrong proof");
    if (this.role === "server") {
      const others = this.session.liveStripes() - this.session.stripesGivenUp(client.body).length;
      check(others < this.session.limits.stripes, LIMIT, "more stripes than the limit");
    }
    this.ack = payload;
    this.state = "ready";
    this.client = client.body;
    this.server = server.body;
  }
}
