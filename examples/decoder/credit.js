// SPDX-License-Identifier: Apache-2.0
// Windows of a receiver: wire-format.md, "Credit". Numbers of bytes are BigInts: a limit may be as large as 2^63 - 1.

import { FLOW_CONTROL, check } from "./errors.js";

const CLASSES = 8;

/** What a sender may send, and what it has been charged, by class. Limits only grow. */
export class Window {
  constructor(first = 0n) {
    this.limits = Array(CLASSES).fill(BigInt(first));
    this.charged = Array(CLASSES).fill(0n);
  }

  allow(limits) {
    this.limits = this.limits.map((limit, i) => (BigInt(limits[i]) > limit ? BigInt(limits[i]) : limit));
  }

  canCharge(level, bytes) {
    return this.charged[level] + BigInt(bytes) <= this.limits[level];
  }

  charge(level, bytes) {
    this.charged[level] += BigInt(bytes);
  }
}

/** Charges a chunk to its transfer and to the session, or to neither. */
export function chargeBoth(transfer, session, level, bytes) {
  check(transfer.canCharge(level, bytes) && session.canCharge(level, bytes), FLOW_CONTROL, "more than credit allows");
  transfer.charge(level, bytes);
  session.charge(level, bytes);
}

/** CLOSED: takes `final`, of classes from `first` on, as what the sender has charged in all. */
export function settle(transfer, session, final, first) {
  for (let level = first; level < CLASSES; level++) {
    const total = BigInt(final[level]);
    check(
      total >= transfer.charged[level] && total <= transfer.limits[level],
      FLOW_CONTROL,
      "a final charge that cannot be",
    );
    check(session.canCharge(level, total - transfer.charged[level]), FLOW_CONTROL, "more than the session allows");
  }
  for (let level = first; level < CLASSES; level++) {
    const unseen = BigInt(final[level]) - transfer.charged[level];
    transfer.charge(level, unseen);
    session.charge(level, unseen);
  }
}
