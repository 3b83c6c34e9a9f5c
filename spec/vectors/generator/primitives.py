"""Checksums, digests, proofs: what everything else stands on."""

from __future__ import annotations

import hashlib
import hmac

import xxhash
from pieces import File, rng

from lynxproto import _cbor
from lynxproto.digest import crc32c


def primitives() -> File:
    f = File("primitives", "CRC32C, XXH3-128, identity hashes and proofs", {"known": "a published check value"})
    f.group("crc32c", "invariants.md, CRC32C")
    f.valid("the usual check value", {"data": b"123456789"}, {"crc32c": "e3069283"}, "known")
    f.valid("no bytes", {"data": b""}, {"crc32c": "00000000"}, "known")
    f.valid("32 zero bytes, RFC 3720 B.4", {"data": bytes(32)}, {"crc32c": "8a9136aa"}, "known")
    f.valid("32 bytes of ff, RFC 3720 B.4", {"data": b"\xff" * 32}, {"crc32c": "62a8ab43"}, "known")
    f.valid("bytes 0 to 31, RFC 3720 B.4", {"data": bytes(range(32))}, {"crc32c": "46dd794e"}, "known")
    for size in (1, 60, 1000):
        data = rng("crc", size).getrandbits(8 * size).to_bytes(size, "little")
        f.valid(f"{size} bytes", {"data": data}, {"crc32c": f"{crc32c(data):08x}"})
    f.group("xxh3-128", "wire-format.md, Digests")
    for size in (0, 1, 3, 4, 8, 9, 16, 17, 100, 128, 129, 240, 241, 512, 1024, 1025, 3000):
        data = rng("xxh3", size).getrandbits(8 * size or 8).to_bytes(size or 1, "little")[:size]
        f.valid(f"{size} bytes", {"data": data}, {"digest": xxhash.xxh3_128_hexdigest(data)})
    f.group("identity", "wire-format.md, Identity")
    stated = {"model": "llama", "revision": "r1", "tokenizer_hash": "t", "producer": "p"}
    for comment, identity in (("model alone", {"model": "m"}), ("an empty model", {"model": ""}), ("all", stated)):
        digest = xxhash.xxh3_128_hexdigest(_cbor.dumps({k: v for k, v in identity.items() if v or k == "model"}))
        f.valid(comment, {"identity": identity}, {"hash": digest})
    padded = {**stated, "rope_hash": "", "attention_backend": ""}
    f.valid("fields that are not stated do not count", {"identity": padded}, {"hash": digest})
    f.group("proof", "wire-format.md, Handshake")
    client, server = bytes(range(40)), bytes(range(40, 90))
    for comment, secret, token in (
        ("new session, no secret", b"", b""),
        ("new session, a secret", b"a shared secret of the two", b""),
        ("joining, no secret", b"", bytes(range(32))),
        ("joining, a secret", b"a shared secret of the two", bytes(range(32))),
    ):
        key = hmac.new(secret, b"lynxproto 1 key" + token, hashlib.sha256).digest()
        for side in ("client", "server"):
            message = b"lynxproto 1 " + side.encode() + len(client).to_bytes(4, "little") + client + server
            given = {"side": side, "secret": secret, "token": token, "client_hello": client, "server_hello": server}
            mac = hmac.new(key, message, hashlib.sha256).digest()
            f.valid(f"{comment}, by the {side}", given, {"mac": mac})
    return f
