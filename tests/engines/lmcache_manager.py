"""LMCache's own storage manager, with L2 adapters as its server makes them; used by e2e_lmcache.py and a benchmark."""

from __future__ import annotations

import argparse
import json
import time

import torch
from lmcache.v1.distributed.api import GroupedObjectKeys, MemoryLayoutDesc, ObjectKey, PrefetchTaskSpec
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import add_l2_adapters_args, parse_args_to_l2_adapters_config
from lmcache.v1.distributed.storage_manager import StorageManager

PLUGIN = {"type": "plugin", "module_path": "lynxproto.integrations.lmcache"}


def manager(*adapters, megabytes=256):
    """A manager with an L1 of ``megabytes`` and the adapters of these settings, as --l2-adapter has them."""
    arguments = [word for adapter in adapters for word in ("--l2-adapter", json.dumps(adapter))]
    l2 = parse_args_to_l2_adapters_config(add_l2_adapters_args(argparse.ArgumentParser()).parse_args(arguments))
    memory = L1MemoryManagerConfig(megabytes << 20, use_lazy=False, shm_name="")
    return StorageManager(StorageManagerConfig(L1ManagerConfig(memory), EvictionConfig("LRU"), l2))


def key(number, model="a/model", salt=""):
    """The key of a chunk of the one rank that there is."""
    return ObjectKey(number.to_bytes(16, "big"), model, ObjectKey.ComputeKVRank(1, 0, 1, 0), 0, salt)


def layout_of(shape, dtype):
    """The layout of chunks of one group."""
    return MemoryLayoutDesc([torch.Size(shape)], [dtype])


def wait(done, seconds=60):
    """Until ``done()``; fails after some time."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, "LMCache did not finish"
        time.sleep(0.002)


def store(sm, chunks, layout, stored):
    """Write chunks (key -> tensors, one a group) into L1, and wait until ``stored()``: L2 has them."""
    objects = sm.reserve_write(list(chunks), layout)
    assert len(objects) == len(chunks)
    for k, tensors in chunks.items():
        for index, tensor in enumerate(tensors):
            objects[k].get_tensor(index).copy_(tensor)
    sm.finish_write(list(chunks))
    wait(stored)


def fetch(sm, keys, layout):
    """Prefetch chunks from L2 into an L1 that lacks them, and read them: key -> tensors of those that were found."""
    handle = sm.submit_prefetch_task(PrefetchTaskSpec([GroupedObjectKeys(keys, 0, layout)]))
    assert sm.wait_prefetch_status(handle, 60)
    result = sm.query_prefetch_status(handle)
    assert result.l1_hit_count == 0
    hits = [k for place, k in enumerate(keys) if result.hit_cells[0].test(place)]
    if not hits:
        return {}
    with sm.read_prefetched_results(hits) as objects:
        assert objects is not None
        count = len(layout.shapes)
        found = {k: [o.get_tensor(i).clone() for i in range(count)] for k, o in zip(hits, objects, strict=True)}
    sm.finish_read_prefetched(hits)
    return found
