"""SGLang: a HiCache storage backend that keeps KV pages as cache objects in a folder. docs/embedding/sglang.md.

Loaded by SGLang itself (``--hicache-storage-backend dynamic``), which must be installed. A page of a pool with a known
layout is encoded from the pool's memory and decoded into it, where SGLang asks for pages by index (``interface_v1``
and the pools beside KV); otherwise SGLang copies pages to and fro. Pages of pools that are not known travel as bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Final

from lynxproto.chunk import Part
from lynxproto.codecs import get_codec
from lynxproto.commands.settings import size as parse_size
from lynxproto.errors import ConfigError, LynxError, MissingDependencyError, SpecError
from lynxproto.integrations.stores import ObjectFolder, ObjectStore, object_name, word_type
from lynxproto.manifest import Identity, LayerSpec, Manifest
from lynxproto.objects import ObjectCodec, Views

try:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult
except ImportError as error:
    raise MissingDependencyError(
        f"lynxproto.integrations.sglang is loaded by SGLang, and its HiCacheStorage cannot be imported ({error}); "
        "pip install sglang (this adapter was written for 0.5.23)"
    ) from error
import torch  # SGLang needs it too

__all__ = ["LynxHiCache"]

_log = logging.getLogger("lynxproto")

#: SGLang's names of pools: KV, and states that are cut over tensor-parallel ranks even where KV is not.
_KV: Final = "kv"
_STATES: Final = "mamba"
#: Layout of a pool's buffer -> its dimensions: of one of K, V or latents. ``slots`` are tokens of all pages.
_LAYOUTS: Final = {
    "layer_first": ("layers", "slots", "heads", "dim"),
    "page_first": ("slots", "layers", "heads", "dim"),
    "page_first_direct": ("pages", "layers", "tokens", "heads", "dim"),
    "page_head": ("pages", "heads", "tokens", "layers", "dim"),
}


def _page(buffer: Any, layout: str, index: int, page_size: int) -> Any:
    """The page at slot ``index``: ``[layers, tokens, heads * dim]``; page_head: ``[heads, tokens, layers * dim]``."""
    if layout == "layer_first":
        return buffer[:, index : index + page_size].flatten(2)
    if layout == "page_first":
        return buffer[index : index + page_size].flatten(2).transpose(0, 1)
    return buffer[index // page_size].flatten(2)


@dataclass(frozen=True, slots=True)
class _Geometry:
    """What is the same of all pages of a pool. A page is one layer of a manifest: its heads are the pool's layers."""

    dtype: str
    layer: LayerSpec
    packing: str


def _geometry(views: Views, packing: str) -> _Geometry:
    shapes = {part: tuple(map(int, view.shape)) for (_, part), view in views.items()}
    heads, tokens, dim = next(iter(shapes.values()))
    dims = [shapes[part][2] if part in shapes else dim for part in ("key", "value")]
    dtype = word_type(next(iter(views.values())).dtype)
    assert dtype is not None
    layer = LayerSpec(
        index=0, kv_heads=heads, key_dim=dims[0], value_dim=dims[1], token_stop=tokens, parts=tuple(shapes)
    )
    return _Geometry(dtype, layer, packing)


class _Pool:
    """A host pool: its pages as views of its memory, or as flat tensors in the order that the pool has for them.

    Which one is decided by what the pool has: buffers of a known layout that hold all of its bytes a token give views.
    Raises :class:`~lynxproto.errors.ConfigError` for a pool that gives no pages at all.
    """

    def __init__(self, name: str, pool: Any) -> None:
        self._pool = pool
        self.page_size = int(getattr(pool, "page_size", 1) or 1)
        self.logical = hasattr(pool, "kv_buffer") and pool.kv_buffer is None
        """Whether the pool is an anchor for others and holds nothing."""
        if self.logical:
            return
        self._layout = str(getattr(pool, "layout", None))
        self._buffers = self._known()
        if self._buffers:
            views = self.views(0)
            kind = "heads" if self._layout == "page_head" else "layers"
        else:
            try:
                views = self.flat_views(pool.get_dummy_flat_data_page())
                self.saved(0)
            except (NotImplementedError, AttributeError, ValueError) as error:
                raise ConfigError(
                    f"SGLang's host pool {name!r} ({type(pool).__name__}, layout {self._layout}) gives no pages that a "
                    f"storage backend could keep: {error}; try --hicache-mem-layout page_first"
                ) from error
            form = getattr(pool, "storage_format_tag", None) or type(pool).__name__
            kind = f"bytes.{form}.{self._layout}.{getattr(pool, 'dtype', '')}"
        self.geometry = _geometry(views, f"sglang.page.{kind}")

    def _known(self) -> dict[Part, Any]:
        dims = len(_LAYOUTS.get(self._layout, ()))
        key, value = getattr(self._pool, "k_buffer", None), getattr(self._pool, "v_buffer", None)
        if isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor):
            found: dict[Part, Any] = {"key": key, "value": value}
        else:
            found = {"key": getattr(self._pool, "kv_buffer", None)}  # latents are multiplied with queries, as keys are
        for buffer in found.values():
            if not isinstance(buffer, torch.Tensor) or buffer.dim() != dims or buffer.device.type != "cpu":
                return {}
            if word_type(buffer.dtype) is None:
                return {}
        pages = [_page(buffer, self._layout, 0, self.page_size) for buffer in found.values()]
        size = sum(page.numel() * page.element_size() for page in pages)
        return found if size == self.page_size * getattr(self._pool, "size_per_token", 0) else {}

    def views(self, index: int) -> Views:
        """Of a page in the pool; empty if the pool only gives flat pages."""
        return {(0, part): _page(buffer, self._layout, index, self.page_size) for part, buffer in self._buffers.items()}

    def flat_views(self, flat: Any) -> Views:
        """Of a page that SGLang copied: flat, in the pool's order."""
        if not self._buffers:
            return {(0, "opaque"): flat.view(torch.uint8).reshape(1, -1, 1)}
        names, one = _LAYOUTS[self._layout], {"slots": self.page_size, "pages": 1}
        shapes = [[one.get(name, n) for name, n in zip(names, b.shape, strict=True)] for b in self._buffers.values()]
        sizes = [prod(shape) for shape in shapes]
        if flat.numel() != sum(sizes):
            raise SpecError(f"a page of {flat.numel()} values; the pool's have {sum(sizes)}")
        pieces = zip(self._buffers, flat.split(sizes), shapes, strict=True)
        return {(0, part): _page(piece.view(shape), self._layout, 0, self.page_size) for part, piece, shape in pieces}

    def load(self, index: int, read: Callable[[Views], bool]) -> bool:
        """Let ``read`` fill the page at ``index``."""
        views = self.views(index)
        if views:
            return read(views)
        flat = self._pool.get_dummy_flat_data_page()
        if not read(self.flat_views(flat)):
            return False
        self._pool.set_from_flat_data_page(index, flat)
        return True

    def saved(self, index: int) -> Views:
        """Views of the page at ``index``, or of a copy."""
        return self.views(index) or self.flat_views(self._pool.get_data_page(index, flat=True).contiguous())


class LynxHiCache(HiCacheStorage):  # type: ignore[misc]  # SGLang has no types
    """Pages as cache objects below ``path``. Instantiated by SGLang, one for each rank; ranks may share ``path``.

    Settings, in ``--hicache-storage-backend-extra-config``: ``path`` (required), ``max_size`` (``"200G"``: bound of the
    folder, least recently used pages go), ``preset`` of ``hq`` (default ``balanced``), ``threads`` (default 4: pages
    encoded and decoded at a time). Raises :class:`~lynxproto.errors.ConfigError` for settings that make no sense.

    A page that is missing, broken or of something else counts as a miss, and SGLang computes it; a page that cannot be
    stored counts as not stored. Both are logged.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:
        options = {**(getattr(storage_config, "extra_config", None) or {}), **(kwargs or {})}
        path, threads, size = options.get("path"), options.get("threads", 4), options.get("max_size")
        if not isinstance(path, str) or not path:
            raise ConfigError("lynxproto needs the setting 'path', a folder; others are max_size, preset and threads")
        if type(threads) is not int or threads < 1:
            raise ConfigError(f"lynxproto: 'threads' must be a positive integer, not {threads!r}")
        try:
            bound = None if size is None else parse_size(str(size))
        except ValueError as error:
            raise ConfigError(f"lynxproto: 'max_size': {error}") from error
        codec = ObjectCodec(get_codec("hq", preset=options.get("preset", "balanced")))
        self.store = ObjectStore(ObjectFolder(path, max_bytes=bound), codec)
        self._identity = Identity(model=getattr(storage_config, "model_name", None) or "")
        self._config = storage_config
        self._threads = ThreadPoolExecutor(threads, "lynxproto-hicache")
        self._pools: dict[str, _Pool] = {}

    # --- pools

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The pool of KV pages."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[_KV] = _Pool(_KV, mem_pool_host)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """A pool of pages that go along with KV (indexers, states, drafts)."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._pools[str(host_pool_name)] = _Pool(str(host_pool_name), host_pool)

    def _pool(self, name: str) -> _Pool:
        try:
            return self._pools[name]
        except KeyError:
            raise ConfigError(f"SGLang has registered no host pool {name!r}") from None

    def _manifest(self, pool: str, key: str) -> Manifest:
        """What the page is. Its name covers all of it: pages that do not fit this server are missing to it."""
        config, geometry = self._config, self._pool(pool).geometry
        ranks = ["pp_rank", "pp_size", "attn_cp_rank", "attn_cp_size", "dcp_rank", "dcp_size"]
        if not getattr(config, "is_mla_model", False) or pool == _STATES:  # latents are the same on all these ranks
            ranks += ["tp_rank", "tp_size"]
        rank = [getattr(config, name, None) for name in ranks]
        return Manifest(
            identity=self._identity,
            dtype=geometry.dtype,
            layers=(geometry.layer,),
            prompt_tokens=geometry.layer.token_stop,
            packing=geometry.packing,
            request_id=object_name("sglang", self._identity.model, rank, pool, key, geometry),
        )

    # --- one page

    def _guarded(self, what: str, work: Callable[[], bool]) -> bool:
        try:
            return work()
        except LynxError as error:
            _log.warning("HiCache page not %s: %s", what, error)
            return False

    def _exists(self, pool: str, key: str) -> bool:
        return self._pool(pool).logical or self.store.folder.exists(self._manifest(pool, key).request_id)

    def _load(self, pool: str, key: str, index: int) -> bool:
        handle = self._pool(pool)
        return handle.logical or self._guarded(
            "read", lambda: handle.load(index, lambda views: self.store.get(self._manifest(pool, key), views))
        )

    def _save(self, pool: str, key: str, index: int) -> bool:
        handle = self._pool(pool)
        return handle.logical or self._guarded(
            "stored", lambda: self.store.put(self._manifest(pool, key), handle.saved(index)) is not None
        )

    def _pages(self, work: Callable[[str, str, int], bool], pool: str, keys: Sequence[str], indices: Any) -> list[bool]:
        """``work`` for each key and the page that begins at its slot, several at a time."""
        step = self._pool(pool).page_size
        if indices is None or len(indices) != len(keys) * step:
            count = None if indices is None else len(indices)
            _log.error("HiCache: %d pages of %d slots of pool %s, but %s indices", len(keys), step, pool, count)
            return [False] * len(keys)
        starts = [int(slot) for slot in indices[::step]]
        return list(self._threads.map(work, [pool] * len(keys), keys, starts))

    # --- pages by index (interface_v1, and the pools beside KV)

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Read KV pages into the pool; which of them are there."""
        return self._pages(self._load, _KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store KV pages of the pool; which of them are stored now."""
        return self._pages(self._save, _KV, keys, host_indices)

    def batch_get_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """:meth:`batch_get_v1` for each of several pools."""
        return {t.name: self._pages(self._load, str(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_set_v2(self, transfers: list[Any], extra_info: Any = None) -> dict[str, list[bool]]:
        """:meth:`batch_set_v1` for each of several pools."""
        return {t.name: self._pages(self._save, str(t.name), t.keys or [], t.host_indices) for t in transfers}

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many of the first keys are there."""
        return next((place for place, key in enumerate(keys) if not self._exists(_KV, key)), len(keys))

    def batch_exists_v2(self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any = None) -> Any:
        """The longest prefix that every pool can serve: whole, or (``trailing_pages``) in its last pages.

        Raises :class:`~lynxproto.errors.ConfigError` for another hit policy.
        """
        pages = self.batch_exists(keys)
        hits: dict[Any, int] = {_KV: pages} if pages else {}
        possible = list(range(1, pages + 1))
        for transfer in pool_transfers or []:
            policy = getattr(transfer.hit_policy, "value", transfer.hit_policy)
            if policy not in ("all_pages", "trailing_pages"):
                raise ConfigError(f"lynxproto: the hit policy {policy!r} of pool {transfer.name} is not supported")
            there = [self._exists(str(transfer.name), key) for key in keys[:pages]]
            if policy == "all_pages":
                served = [n for n in range(1, pages + 1) if all(there[:n])]
            else:
                window = max(1, len(transfer.keys or ()))
                served = [n for n in range(1, pages + 1) if all(there[max(0, n - window) : n])]
            if served:
                hits[transfer.name] = served[-1]
            possible = [n for n in possible if n in set(served)]
        result = PoolTransferResult(possible[-1] if possible else 0, hits)
        if "restorable_prefix_pages" in {field.name for field in fields(PoolTransferResult)}:
            result.restorable_prefix_pages = possible
        return result

    # --- pages that SGLang copies

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Read a page into ``target_location``, a flat tensor, and return that; None if it is not there."""
        if target_location is None:
            raise ConfigError("lynxproto reads pages into memory that is given: get(key, target_location)")
        pool = self._pool(_KV)

        def read() -> bool:
            return self.store.get(self._manifest(_KV, key), pool.flat_views(target_location))

        return target_location if self._guarded("read", read) else None

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        """:meth:`get` of several."""
        return list(self._threads.map(self.get, keys, target_locations or [None] * len(keys)))

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a page, a flat tensor."""
        pool = self._pool(_KV)

        def write() -> bool:
            return self.store.put(self._manifest(_KV, key), pool.flat_views(value)) is not None

        return self._guarded("stored", write)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        """:meth:`set` of several; True if all are stored."""
        return all(self._threads.map(self.set, keys, values))

    def exists(self, key: str) -> bool:
        """Whether a KV page is there."""
        return self._exists(_KV, key)

    # --- the rest

    def clear(self) -> bool:
        """Forget all pages in the folder, also those of other ranks."""
        self.store.folder.clear()
        return True

    def close(self) -> None:
        """Stop the threads; pages stay."""
        self._threads.shutdown()
