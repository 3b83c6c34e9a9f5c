"""LMCache (MP mode): a serde and an L2 adapter that keep KV chunks as cache objects. docs/embedding/lmcache.md.

Importing this module registers the serde ``lynx``. LMCache imports it for adapters of type ``plugin``:

- :class:`LynxL2Adapter` keeps chunks in a folder, each in as many bytes as it needs;
- :class:`InnerL2Adapter` is any other L2 adapter of LMCache, which may then have ``"serde": {"type": "lynx"}``.

LMCache's adapters read as many bytes as the serde's estimate says, so objects of the serde come in slots of a fixed
share of the chunk (``ratio``); what does not fit is not stored.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np

from lynxproto.chunk import Part
from lynxproto.codecs import get_codec
from lynxproto.commands.settings import size as parse_size
from lynxproto.errors import ConfigError, LynxError, MissingDependencyError, SpecError
from lynxproto.integrations.stores import ObjectFolder, ObjectStore, object_name, word_type
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.objects import ObjectCodec, Views

try:
    from lmcache.lmcache_native import Bitmap
    from lmcache.v1.distributed.internal_api import L2StoreResult
    from lmcache.v1.distributed.l2_adapters import create_l2_adapter
    from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
    from lmcache.v1.distributed.l2_adapters.config import L2AdapterConfigBase, get_l2_adapter_config_class
    from lmcache.v1.distributed.serde import (
        AsyncSerdeProcessor,
        Deserializer,
        Serializer,
        get_registered_serde_types,
        register_serde_factory,
    )
    from lmcache.v1.platform import create_event_notifier
except ImportError as error:
    raise MissingDependencyError(
        f"lynxproto.integrations.lmcache is loaded by LMCache, whose MP mode cannot be imported ({error}); "
        "pip install lmcache (this adapter was written for 0.5.6)"
    ) from error
import torch  # LMCache needs it too

__all__ = ["InnerL2Adapter", "LynxDeserializer", "LynxL2Adapter", "LynxL2AdapterConfig", "LynxSerializer"]

_log = logging.getLogger("lynxproto")

SERDE: Final = "lynx"
#: Slots are whole blocks of this size, so that adapters may write them with O_DIRECT.
_BLOCK: Final = 4096
#: Share of a chunk that slots have, by dtype: caches take .65 to .71, .85 to .88, and .72 to .89 in fp8. Others have
#: room for the worst case.
_RATIOS: Final = {"bfloat16": 0.75, "float16": 0.95, "float8_e4m3": 0.95, "float8_e5m2": 0.95}
#: Bytes of a model's name that an object repeats at most; estimates are made without the name.
_MODEL_BYTES: Final = 200


# --- chunks as manifests


def _cut(tensor: Any) -> dict[Part, Any]:
    """The tiles of a group, as views ``[heads, tokens, head_dim]`` of it.

    It goes by the shape alone, for LMCache's names of formats and their shapes do not agree everywhere, and any cut is
    exact: ``[2, layers, tokens, hidden]`` (KV_2LTD), ``[1, layers, tokens, hidden]`` and ``[layers, tokens, hidden]``
    (latents, or K and V fused), ``[tokens, 2, hidden]`` (KV_T2D), ``[2, tokens, hidden]`` (KV_2TD), ``[tokens,
    hidden]``.
    """
    shape = tuple(tensor.shape)
    if len(shape) == 4 and shape[0] in (1, 2):
        planes = list(tensor)
    elif len(shape) == 3 and shape[1] == 2:
        planes = [tensor[:, :1].transpose(0, 1), tensor[:, 1:].transpose(0, 1)]
    elif len(shape) == 3:
        planes = [tensor[:1], tensor[1:]] if shape[0] == 2 else [tensor]
    elif len(shape) == 2:
        planes = [tensor[None]]
    else:
        return {"opaque": tensor.reshape(1, -1, 1)}
    parts: tuple[Part, Part] = ("key", "value")
    return dict(zip(parts, planes, strict=False))


def _views(groups: Sequence[Any]) -> Views:
    """The tiles of a chunk. If its groups differ in dtype, or have one that has no name here, all are bytes."""
    if len({group.dtype for group in groups}) > 1 or word_type(groups[0].dtype) is None:
        groups = [group.reshape(-1).view(torch.uint8) for group in groups]
    return {(index, part): view for index, group in enumerate(groups) for part, view in _cut(group).items()}


def _manifest(views: Views, model: str, name: str) -> Manifest:
    """What a chunk is: a layer for each of its groups."""
    layers, dtype = [], None
    for index in range(1 + max(index for index, _ in views)):
        group: dict[Part, Any] = {part: view for (place, part), view in views.items() if place == index}
        heads, tokens, dim = next(iter(group.values())).shape
        dtype = word_type(next(iter(group.values())).dtype)
        layers.append(
            LayerSpec(index=index, kv_heads=heads, key_dim=dim, value_dim=dim, token_stop=tokens, parts=tuple(group))
        )
    assert dtype is not None
    return Manifest(
        identity=Identity(model=model),
        dtype=dtype,
        layers=tuple(layers),
        prompt_tokens=max(layer.token_stop for layer in layers),
        packing="lmcache.chunk",
        request_id=name,
    )


def _named(key: Any) -> tuple[str, str]:
    """The model's name as objects repeat it, and a name that stands for the whole key. None: LMCache gave no key."""
    if key is None:
        return "", ""
    salt, group = getattr(key, "cache_salt", ""), getattr(key, "object_group_id", 0)
    name = object_name("lmcache", key.chunk_hash, key.model_name, key.kv_rank, group, salt)
    return key.model_name.encode()[:_MODEL_BYTES].decode(errors="ignore"), name


def _chunk(obj: Any, key: Any) -> tuple[Manifest, Views]:
    """A MemoryObj's manifest, and views of its memory."""
    count = len(obj.get_shapes())
    groups = [obj.tensor] if count == 1 else [obj.get_tensor(index) for index in range(count)]
    if any(group is None for group in groups):
        raise SpecError("LMCache gave an object that is not valid any more")
    views = _views(groups)
    return _manifest(views, *_named(key)), views


def _bytes(obj: Any) -> Any:
    """A MemoryObj's bytes, as an array: its memoryview has a format that memoryview itself cannot cast."""
    return np.frombuffer(obj.byte_array, np.uint8)


# --- serde


class LynxSerializer(Serializer):  # type: ignore[misc]  # LMCache is not installed where types are checked
    """Chunks to cache objects in slots of ``ratio`` of the chunk's bytes.

    ``ratio`` None: .75 for bfloat16, .95 for float16 and fp8, and slots for the worst case for all other dtypes.
    ``preset``: of ``hq``. ``threads``: of one chunk.
    """

    def __init__(self, *, ratio: float | None = None, preset: str = "balanced", threads: int = 1) -> None:
        if ratio is not None and not (isinstance(ratio, int | float) and 0 < ratio <= 1):
            raise ConfigError(f"lynx serde: 'ratio' must be a number between 0 and 1, not {ratio!r}")
        self._ratio = ratio
        self._codec = ObjectCodec(get_codec("hq", preset=preset), threads=threads)

    def estimate_serialized_size(self, layout_desc: Any) -> int:
        """Bytes of a slot for such chunks: no object that is serialized is larger, and all are padded to it."""
        return self._slot(layout_desc.shapes, layout_desc.dtypes)

    def _slot(self, shapes: Sequence[Any], dtypes: Sequence[Any]) -> int:
        groups = [torch.empty(s, dtype=d, device="meta") for s, d in zip(shapes, dtypes, strict=True)]
        manifest = _manifest(_views(groups), "m" * _MODEL_BYTES, object_name())
        ratio = self._ratio or _RATIOS.get(manifest.dtype)
        size = bound = self._codec.bound(manifest)
        if ratio is not None:
            size = min(bound, bound - manifest.nbytes + math.ceil(ratio * manifest.nbytes))
        return -(-size // _BLOCK) * _BLOCK

    def serialize(self, src: Any, dst: Any, key: Any = None) -> int:
        """Fill ``dst``, an object and padding; returns the slot's bytes.

        Raises :class:`~lynxproto.errors.SpecError` when the object does not fit the slot: it is then not stored.
        """
        manifest, views = _chunk(src, key)
        slot, target = self._slot(src.get_shapes(), src.get_dtypes()), _bytes(dst)
        if target.nbytes < slot:
            raise SpecError(f"LMCache gave a buffer of {target.nbytes} bytes, the estimate was {slot}")
        try:
            size = self._codec.encode_into(target[:slot], manifest, views)
        except SpecError as error:
            raise SpecError(f"a chunk of {manifest.nbytes} bytes: {error}; raise the serde's 'ratio'") from error
        target[size:slot] = 0
        return slot


class LynxDeserializer(Deserializer):  # type: ignore[misc]  # the same
    """The reverse, bit for bit, whatever the serializer's settings were."""

    def __init__(self, *, threads: int = 1) -> None:
        self._codec = ObjectCodec(threads=threads)

    def deserialize(self, src: Any, dst: Any, key: Any = None) -> None:
        """Restore ``dst``.

        Raises :class:`~lynxproto.errors.CorruptObjectError` and :class:`~lynxproto.errors.ForeignObjectError`: LMCache
        then takes the chunk for missing.
        """
        manifest, views = _chunk(dst, key)
        self._codec.decode(_bytes(src), manifest, views)


def _create_serde(kwargs: dict[str, object]) -> Any:
    settings: dict[str, Any] = {"ratio": None, "preset": "balanced", "threads": 2, "max_workers": 1}
    if set(kwargs) - set(settings):
        raise ConfigError(
            f"lynx serde: unknown settings {sorted(set(kwargs) - set(settings))}; known: {list(settings)}"
        )
    settings |= kwargs
    for name in ("threads", "max_workers"):
        if type(settings[name]) is not int or settings[name] < 1:
            raise ConfigError(f"lynx serde: {name!r} must be a positive integer, not {settings[name]!r}")
    workers, threads = settings.pop("max_workers"), settings["threads"]
    return AsyncSerdeProcessor(LynxSerializer(**settings), LynxDeserializer(threads=threads), max_workers=workers)


if SERDE not in get_registered_serde_types():
    register_serde_factory(SERDE, _create_serde)


# --- L2 adapters


class InnerL2Adapter(L2AdapterInterface):  # type: ignore[misc]  # the same
    """Not an adapter of its own: making one gives the L2 adapter that ``adapter_params`` describe.

    LMCache has no setting that imports a module with a serde, but imports this one for an adapter of type ``plugin``.
    """

    def __new__(cls, params: dict[str, Any], l1_memory_desc: Any = None) -> Any:
        """The adapter of type ``params["type"]``. Raises :class:`~lynxproto.errors.ConfigError` without one."""
        if not isinstance(params.get("type"), str):
            raise ConfigError("lynx: 'adapter_params' must be the settings of another L2 adapter, with its 'type'")
        return create_l2_adapter(get_l2_adapter_config_class(params["type"]).from_dict(params), l1_memory_desc)


class LynxL2AdapterConfig(L2AdapterConfigBase):  # type: ignore[misc]  # the same
    """``adapter_params`` of :class:`LynxL2Adapter`."""

    def __init__(
        self, path: str, max_size: str | int | None = None, preset: str = "balanced", threads: int = 4
    ) -> None:
        if not isinstance(path, str) or not path:
            raise ConfigError("lynx L2 adapter: 'path', a folder, is required")
        if type(threads) is not int or threads < 1:
            raise ConfigError(f"lynx L2 adapter: 'threads' must be a positive integer, not {threads!r}")
        try:
            self.max_bytes = None if max_size is None else parse_size(str(max_size))
        except ValueError as error:
            raise ConfigError(f"lynx L2 adapter: 'max_size': {error}") from error
        self.path, self.preset, self.threads = path, preset, threads

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> LynxL2AdapterConfig:
        """From ``adapter_params``. Raises :class:`~lynxproto.errors.ConfigError` for unknown or wrong settings."""
        known = {"path", "max_size", "preset", "threads"}
        if set(d) - known:
            raise ConfigError(f"lynx L2 adapter: unknown settings {sorted(set(d) - known)}; known: {sorted(known)}")
        return cls(**{"path": "", **d})

    @classmethod
    def help(cls) -> str:
        """What LMCache shows when a setting is wrong."""
        return (
            "lynx L2 adapter:\n- path (str): folder of cache objects (required)\n"
            "- max_size (str): bound of the folder, e.g. '200G'; the least recently used go first\n"
            "- preset (str): fast, balanced (default) or dense\n- threads (int): chunks at a time, default 4"
        )


class LynxL2Adapter(L2AdapterInterface):  # type: ignore[misc]  # the same
    """An L2 adapter that keeps chunks as cache objects in a folder, encoded from L1's memory and decoded into it.

    Servers may share the folder. It bounds itself (``max_size``); a chunk that another server evicts between lookup and
    load is a miss. Locks are not needed: objects are replaced and removed as wholes.
    """

    def __init__(self, config: LynxL2AdapterConfig, l1_memory_desc: Any = None) -> None:
        super().__init__()
        folder = ObjectFolder(config.path, max_bytes=config.max_bytes)
        self.store = ObjectStore(folder, ObjectCodec(get_codec("hq", preset=config.preset)))
        self._pool = ThreadPoolExecutor(config.threads, "lynxproto-l2")
        self._store_event, self._lookup_event, self._load_event = (create_event_notifier() for _ in range(3))
        self._lock = threading.Lock()
        self._tasks = 0
        self._stored: dict[int, Any] = {}
        self._found: dict[int, Any] = {}
        self._loaded: dict[int, Any] = {}

    # --- events and tasks

    def get_store_event_fd(self) -> int:
        """Readable when stores are over."""
        return int(self._store_event.fileno())

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when lookups are over."""
        return int(self._lookup_event.fileno())

    def get_load_event_fd(self) -> int:
        """Readable when loads are over."""
        return int(self._load_event.fileno())

    def _submit(self, work: Callable[..., Any], rows: Sequence[tuple[Any, ...]], finish: Callable[..., None]) -> int:
        """Do ``work`` for each row, several at a time; ``finish(task, results)``, a None for each that failed."""
        with self._lock:
            task = self._tasks
            self._tasks += 1
        results: list[Any] = [None] * len(rows)
        left = len(rows)

        def one(place: int, row: tuple[Any, ...]) -> None:
            nonlocal left
            try:
                results[place] = work(*row)
            except LynxError as error:
                _log.warning("LMCache chunk %s: %s", row[0], error)
            except Exception:  # a task that never ends would hang LMCache's controllers
                _log.exception("LMCache chunk %s", row[0])
            with self._lock:
                left -= 1
                last = left == 0
            if last:
                finish(task, results)

        if not rows:
            finish(task, results)
        for place, row in enumerate(rows):
            self._pool.submit(one, place, row)
        return task

    def _finish(self, done: dict[int, Any], event: Any, task: int, result: Any) -> None:
        with self._lock:
            done[task] = result
        event.notify()

    @staticmethod
    def _bitmap(results: Sequence[Any]) -> Any:
        bitmap = Bitmap(len(results))
        for place, result in enumerate(results):
            if result:
                bitmap.set(place)
        return bitmap

    # --- store

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Store chunks; those that are there already are not written again."""

        def finish(task: int, results: list[Any]) -> None:
            written = [(key, size) for key, size in zip(keys, results, strict=True) if size]
            if written:
                self._notify_keys_stored([key for key, _ in written], [size for _, size in written])
            result = L2StoreResult(None not in results, sum(size for _, size in written))
            self._finish(self._stored, self._store_event, task, result)

        return self._submit(self._put, list(zip(keys, objects, strict=True)), finish)

    def _put(self, key: Any, obj: Any) -> int | None:
        return self.store.put(*_chunk(obj, key))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """Results of the stores that are over."""
        with self._lock:
            done, self._stored = self._stored, {}
        return done

    # --- lookup

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        """Which chunks are there; they count as used now."""

        def finish(task: int, results: list[Any]) -> None:
            self._finish(self._found, self._lookup_event, task, self._bitmap(results))

        return self._submit(lambda key: self.store.folder.touch(_named(key)[1]), [(key,) for key in keys], finish)

    def query_lookup_and_lock_result(self, task_id: int) -> Any:
        """A bitmap, once; None while the lookup goes on."""
        with self._lock:
            return self._found.pop(task_id, None)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Nothing: there are no locks."""

    # --- load

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Restore chunks, bit for bit; one that is damaged is removed and missing."""

        def finish(task: int, results: list[Any]) -> None:
            loaded = [key for key, there in zip(keys, results, strict=True) if there]
            if loaded:
                self._notify_keys_accessed(loaded)
            self._finish(self._loaded, self._load_event, task, self._bitmap(results))

        return self._submit(self._get, list(zip(keys, objects, strict=True)), finish)

    def _get(self, key: Any, obj: Any) -> bool:
        return self.store.get(*_chunk(obj, key))

    def query_load_result(self, task_id: int) -> Any:
        """A bitmap, once; None while the load goes on."""
        with self._lock:
            return self._loaded.pop(task_id, None)

    # --- the rest

    def delete(self, keys: list[Any]) -> None:
        """Forget chunks."""
        sizes = list(self._pool.map(lambda key: self.store.folder.remove(_named(key)[1]), keys))
        gone = [(key, size) for key, size in zip(keys, sizes, strict=True) if size]
        if gone:
            self._notify_keys_deleted([key for key, _ in gone], [size for _, size in gone])

    def report_status(self) -> dict[str, Any]:
        """Health, and what the store did."""
        return {"is_healthy": True, "type": type(self).__name__, "path": str(self.store.folder.path)} | (
            self.store.counters
        )

    def close(self) -> None:
        """Finish what was submitted, and stop the threads; chunks stay."""
        self._pool.shutdown()
        for event in (self._store_event, self._lookup_event, self._load_event):
            event.close()
