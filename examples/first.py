"""Both sides of a transfer in one program, with made-up words. It leaves cache.safetensors for `lynxproto send`.

python examples/first.py
"""

import asyncio
import time
from pathlib import Path

import numpy as np

from lynxproto import connect, listen
from lynxproto.cachefile import Cache, save_cache
from lynxproto.manifest import Identity, Manifest
from lynxproto.session import Receiver
from lynxproto.transports import TokenBucket

LAYERS, HEADS, TOKENS, DIM = 8, 4, 1024, 64

# Whose cache it is, and its shape. Words may be uint16 as here, ml_dtypes or torch tensors.
manifest = Manifest.for_cache(
    identity=Identity(model="made-up/model"),
    dtype="bfloat16",
    layers=LAYERS,
    kv_heads=HEADS,
    head_dim=DIM,
    tokens=TOKENS,
)
rng = np.random.default_rng(0)
words = {
    (layer, part): (rng.standard_normal((HEADS, TOKENS, DIM), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    for layer in range(LAYERS)
    for part in ("key", "value")
}


async def prefill(url: str) -> None:
    async with connect(url, link=TokenBucket(40e6)) as sender:  # a link of 40 Mbit/s
        transfer = sender.open(manifest)  # before prefill has computed anything
        for layer in range(LAYERS):
            await transfer.write(layer, words[layer, "key"], words[layer, "value"])
        transfer.result(first_token=11)
        await transfer.finish()  # the other side has every word
    share = transfer.stats.bytes / manifest.nbytes
    print(f"sent {transfer.stats.bytes / 1e6:.2f} MB for a cache of {manifest.nbytes / 1e6:.2f} MB: {share:.2f}")


async def decode(receiver: Receiver) -> None:
    transfer = await anext(receiver)
    started = time.perf_counter()
    await transfer.ready(level=0)
    off = max(error(transfer.arrays[place], expected) for place, expected in words.items())
    print(f"usable after {time.perf_counter() - started:.2f} s: values up to 5 are off by {off:.2f} at most")
    await transfer.exact()
    assert all(np.array_equal(transfer.arrays[place], expected) for place, expected in words.items())
    token = (await transfer.result()).first_token
    print(f"exact after {time.perf_counter() - started:.2f} s: every word is as it was; the first token is {token}")


def error(arrived: np.ndarray, expected: np.ndarray) -> float:
    values = [(array.astype(np.uint32) << 16).view(np.float32) for array in (arrived, expected)]
    return float(np.abs(values[0] - values[1]).max())


async def main() -> None:
    async with listen("tcp://127.0.0.1:0") as receiver:
        await asyncio.gather(decode(receiver), prefill(receiver.url))
    Path("cache.safetensors").unlink(missing_ok=True)
    save_cache("cache.safetensors", Cache(manifest=manifest, arrays=words, first_token=11))


if __name__ == "__main__":
    asyncio.run(main())
