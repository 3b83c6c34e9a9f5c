// SPDX-License-Identifier: Apache-2.0
// What a side proves: wire-format.md, "Handshake".

import { createHmac, timingSafeEqual } from "node:crypto";

const hmac = (key, ...parts) => {
  const mac = createHmac("sha256", key);
  for (const part of parts) mac.update(part);
  return mac.digest();
};

/** The MAC of `side`. `token` is empty unless the stripe joins a session. */
export function proof({ side, secret, token, clientHello, serverHello }) {
  const key = hmac(secret, "lynxproto 1 key", token);
  const length = Buffer.alloc(4);
  length.writeUInt32LE(clientHello.length);
  return hmac(key, `lynxproto 1 ${side}`, length, clientHello, serverHello);
}

export const sameMac = (a, b) => timingSafeEqual(a, b);
