"""The demo's prefill process: computes the KV cache, or takes it from the cache folder, and sends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

import lynxproto
from lynxproto.cachefile import Arrays, Cache, load_cache, save_cache
from lynxproto.calibration import Calibration
from lynxproto.config import Config
from lynxproto.demo.model import (
    CALIBRATION,
    MAX_TOKENS,
    MODEL,
    cache_folder,
    load_model,
    load_tokenizer,
    prepare_model,
    prose,
)
from lynxproto.demo.pipe import Pipe, serve
from lynxproto.errors import CacheFileError, ConfigError
from lynxproto.manifest import Manifest
from lynxproto.policy import Policy, PolicyName
from lynxproto.quality import QUERIES
from lynxproto.transports import TokenBucket

__all__ = ["Prefill", "main"]


class MeteredLink(TokenBucket):
    """A link that counts what it carries."""

    def __init__(self, bits_per_second: float) -> None:
        super().__init__(bits_per_second)
        self.carried_bytes = 0

    def reserve(self, nbytes: int) -> float:
        """See :meth:`TokenBucket.reserve`."""
        self.carried_bytes += nbytes
        return super().reserve(nbytes)


class Prefill:
    """The commands of the prefill process. ``folder`` and ``revision`` come from :meth:`prepare`."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe
        self._model: Any = None
        self._tokenizer: Any = None
        self._prompt: list[int] = []
        self._cache: Cache | None = None
        self._tiered: Policy | None = None
        self._attention: NDArray[np.float64] | None = None

    def _policy(self, method: PolicyName) -> Policy:
        """The policy of a method; lynx is a policy file's, or calibrated by ``lynxproto calibrate``."""
        if method != "lynx":
            return Policy.named(method)
        return self._tiered or Policy.lynx(calibration=Calibration.load(CALIBRATION))

    async def prepare(self) -> Mapping[str, Any]:
        """Convert the model, unless that was done before; where it is."""
        self._pipe.send("stage", text="converting the model (once)")
        folder, revision = prepare_model()
        return {"folder": str(folder), "revision": revision}

    async def load(
        self, *, folder: str, revision: str, tokens: int, room: int, threads: int, policy_file: str | None = None
    ) -> Mapping[str, Any]:
        """Load the model and prefill ``tokens`` tokens, or find the cache of an earlier run.

        ``room`` is how many tokens will be decoded at most.
        """
        if not 64 <= tokens <= MAX_TOKENS - room:
            raise ConfigError(f"{MODEL} takes 64 to {MAX_TOKENS - room} prompt tokens here, not {tokens}")
        import torch

        from lynxproto.integrations.hf import make_identity, make_manifest

        torch.set_num_threads(threads)
        self._pipe.send("stage", text="loading the model")
        self._tokenizer = load_tokenizer(Path(folder))
        self._prompt = prose(self._tokenizer, tokens)
        self._model = load_model(Path(folder))
        identity = make_identity(self._model, self._tokenizer, name=MODEL, revision=revision)
        manifest = make_manifest(self._model, tokens, identity)
        if policy_file is not None:
            self._tiered = Policy.from_file(policy_file)
            self._tiered.require(identity)
        key = xxhash.xxh3_128(identity.hash())
        key.update(np.asarray(self._prompt, "<u4").tobytes())
        path = cache_folder() / "prefilled" / f"{MODEL}-{tokens}-{key.hexdigest()}.safetensors"
        prefill_s = None
        beside = path.with_suffix(f".attention-{QUERIES}.npy")
        cache = _load(path)
        if cache is None or not beside.exists():
            path.unlink(missing_ok=True)
            cache, attention, prefill_s = self._prefill(manifest)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_cache(path, cache)
            np.save(beside, attention)
        self._attention = np.load(beside)
        # Off the disk and into memory, so that the first method does not pay for reading the file.
        arrays: Arrays = {place: np.array(words) for place, words in cache.arrays.items()}
        self._cache = Cache(manifest=manifest, arrays=arrays, first_token=cache.first_token, logit_gap=cache.logit_gap)
        return {
            "prompt_tokens": tokens,
            "first_token": cache.first_token,
            "values": sum(array.size for array in arrays.values()),
            "layers": len(manifest.layers),
            "digest": digest(arrays),
            "prefill_s": prefill_s,
        }

    async def send(self, url: str, method: PolicyName, link: float | None) -> Mapping[str, Any]:
        """Send the prefilled cache. ``complete`` is when the sender began: the KV was complete then."""
        cache = self._cache
        assert cache is not None
        assert cache.first_token is not None
        bucket = None if link is None else MeteredLink(link)
        async with lynxproto.connect(url, _config(cache.manifest), link=bucket, insecure=True) as sender:
            complete = time.monotonic()
            transfer = sender.open(cache.manifest, self._policy(method))
            transfer.result(cache.first_token, cache.logit_gap)
            for layer in cache.manifest.layers:
                keys, values = cache.arrays[layer.index, "key"], cache.arrays[layer.index, "value"]
                mass = None if self._attention is None else self._attention[layer.index]
                await transfer.write(layer.index, keys, values, importance=mass)
            await transfer.finish()
        return {"complete": complete, "started": complete, "wire_bytes": bucket.carried_bytes if bucket else None}

    async def stream(self, url: str, method: PolicyName, link: float | None) -> Mapping[str, Any]:
        """Prefill again, for real, and send each layer as it is made. ``complete`` is when the last layer existed."""
        from lynxproto.integrations.hf import LynxCache

        assert self._cache is not None
        manifest = self._cache.manifest
        bucket = None if link is None else MeteredLink(link)
        times: list[float] = []

        def on_layer(layer: int) -> None:
            times.append(time.monotonic())
            self._pipe.send("prefill", layer=layer + 1, layers=len(manifest.layers))

        async with lynxproto.connect(url, _config(manifest), link=bucket, insecure=True) as sender:
            started = time.monotonic()
            await LynxCache.aprefill(
                self._model,
                self._prompt,
                sender,
                dtype=manifest.dtype,
                identity=manifest.identity,
                policy=self._policy(method),
                on_layer=on_layer,
            )
        return {
            "complete": times[-1],
            "started": started,
            "wire_bytes": bucket.carried_bytes if bucket else None,
        }

    async def text(self, tokens: list[int]) -> Mapping[str, Any]:
        """What tokens say."""
        return {"text": self._tokenizer.decode(tokens)}

    def _prefill(self, manifest: Manifest) -> tuple[Cache, NDArray[np.float32], float]:
        from lynxproto.integrations.attention import AttentionMass, watch_attention
        from lynxproto.integrations.hf import HFEngine, WordCache

        def on_layer(layer: int, keys: NDArray[Any], values: NDArray[Any]) -> None:
            self._pipe.send("prefill", layer=layer + 1, layers=len(manifest.layers))

        cache = WordCache(self._model.config, len(self._prompt), on_layer=on_layer)
        mass = AttentionMass(QUERIES)
        started = time.monotonic()
        with watch_attention(self._model, mass):
            first_token, logit_gap = _first_token(HFEngine(self._model, cache).prefill(self._prompt))
        seconds = time.monotonic() - started
        arrays: Arrays = {
            (layer.index, part): cache.words(layer.index, part) for layer in manifest.layers for part in layer.parts
        }
        attention = np.stack([mass.mass[layer.index] for layer in manifest.layers]).astype(np.float32)
        return Cache(manifest=manifest, arrays=arrays, first_token=first_token, logit_gap=logit_gap), attention, seconds


def digest(arrays: Arrays) -> str:
    """xxh3-128 of all words, in the order of layers and parts: whether two caches are the same, bit for bit."""
    state = xxhash.xxh3_128()
    for _, words in sorted(arrays.items()):
        for head in words:
            state.update(np.ascontiguousarray(head).data)
    return state.hexdigest()


def _config(manifest: Manifest) -> Config:
    return Config(identity=manifest.identity, name="lynxproto demo")


def _first_token(logits: NDArray[Any]) -> tuple[int, float]:
    second, best = np.partition(logits, -2)[-2:]
    return int(np.argmax(logits)), float(best - second)


def _load(path: Path) -> Cache | None:
    """The dump at ``path``; None if there is none. A broken one is removed: it is a cache, and can be made again."""
    try:
        cache = load_cache(path)
    except CacheFileError:
        path.unlink(missing_ok=True)
        return None
    return cache if cache.first_token is not None else None


def main() -> None:
    """Run the process."""
    pipe = Pipe()
    prefill = Prefill(pipe)
    commands = {name: getattr(prefill, name) for name in ("prepare", "load", "send", "stream", "text")}
    asyncio.run(serve(pipe, commands))


if __name__ == "__main__":
    main()
