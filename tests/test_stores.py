"""Folders of cache objects: atomic, bounded, shared by threads and processes."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_objects import assert_same, empty, layer_of, manifest_of, realistic, views_of

from lynxproto.errors import StateError
from lynxproto.integrations.stores import ObjectFolder, ObjectStore, object_name, word_type
from lynxproto.objects import ObjectCodec


def names(count):
    return [object_name("test", number) for number in range(count)]


def put(folder, name, size):
    return folder.write(name, [memoryview(bytes(size))])


def age(folder, name, seconds):
    """As if the object had been used so long ago."""
    path = folder.path / name[:2] / f"{name}.lynx"
    stat = path.stat()
    os.utime(path, (stat.st_atime, stat.st_mtime - seconds))


def test_objects_come_and_go(tmp_path):
    folder = ObjectFolder(tmp_path / "a" / "b")
    one, two = names(2)
    assert folder.read(one) is None
    assert not folder.exists(one)
    assert not folder.touch(one)
    assert folder.write(one, [memoryview(b"ab"), memoryview(b"c")])
    assert folder.write(one, [memoryview(b"again")])
    assert put(folder, two, 7)
    assert folder.read(one) == b"again"
    assert folder.used() == 12
    assert folder.remove(one) == 5
    assert folder.remove(one) == 0
    folder.clear()
    assert not folder.exists(two)
    assert {path.stat().st_mode & 0o77 for path in folder.path.rglob("*")} == {0}


def test_many_pieces(tmp_path):
    folder = ObjectFolder(tmp_path)
    pieces = [memoryview(bytes([number % 256]) * (number % 7)) for number in range(3000)]
    assert folder.write("ab01", pieces)
    assert folder.read("ab01") == b"".join(pieces)


def test_the_bound_holds_and_the_least_used_go_first(tmp_path):
    folder = ObjectFolder(tmp_path, max_bytes=1000)
    first = names(10)
    for number, name in enumerate(first):
        assert put(folder, name, 100)
        age(folder, name, 100 - number)
    assert folder.used() == 1000
    assert folder.read(first[0]) is not None  # used now
    new = object_name("new")
    assert put(folder, new, 100)
    assert folder.used() <= 1000
    assert folder.exists(first[0])
    assert folder.exists(new)
    assert not folder.exists(first[1])
    assert not put(folder, object_name("large"), 1001)


def test_a_bound_that_shrank_is_kept_at_once(tmp_path):
    folder = ObjectFolder(tmp_path)
    for name in names(10):
        put(folder, name, 100)
    assert ObjectFolder(tmp_path, max_bytes=500).used() <= 500


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 400), st.sampled_from("wwwrc")), max_size=40))
def test_what_is_counted_is_what_is_there(tmp_path_factory, steps):
    folder = ObjectFolder(tmp_path_factory.mktemp("folder"), max_bytes=1000)
    for number, size, step in steps:
        if step == "w":
            assert put(folder, names(10)[number], size)
        elif step == "r":
            folder.remove(names(10)[number])
        else:
            folder.clear()
        counted = int.from_bytes((folder.path / "lock").read_bytes(), "little")
        assert counted == folder.used() <= 1000


def _fill(path, seed):
    folder = ObjectFolder(path, max_bytes=20_000)
    random = np.random.default_rng(seed)
    for number in random.integers(0, 60, 150):
        name = names(60)[number]
        data = folder.read(name)
        assert data is None or set(data) == {int(number)}
        folder.write(name, [memoryview(bytes([number]) * int(random.integers(1, 1500)))])
    return True


def test_processes_and_threads_share_a_folder(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.starmap(_fill, [(tmp_path, seed) for seed in range(2)]) == [True, True]
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(_fill, [tmp_path] * 4, range(4)))
    folder = ObjectFolder(tmp_path, max_bytes=20_000)
    assert 0 < folder.used() <= 20_000
    assert not list((tmp_path / "incoming").iterdir())


def test_what_a_dead_process_left_is_removed_in_time(tmp_path):
    ObjectFolder(tmp_path)
    old, new = tmp_path / "incoming" / "old", tmp_path / "incoming" / "new"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    ObjectFolder(tmp_path)
    assert not old.exists()
    assert new.exists()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StateError, match=r"cannot use .*file"):
        ObjectFolder(tmp_path / "file")


def test_names_tell_fields_apart():
    assert object_name("a", "b") != object_name("ab")
    assert object_name("1") != object_name(1)
    assert len(object_name()) == 32


def test_words_of_tensors():
    torch = pytest.importorskip("torch")
    assert word_type(torch.bfloat16) == "bfloat16"
    assert word_type(torch.float8_e4m3fn) == "float8_e4m3"
    assert word_type(torch.int64) is None


def test_caches_are_stored_once_and_restored(tmp_path):
    store = ObjectStore(ObjectFolder(tmp_path), ObjectCodec())
    manifest = manifest_of([layer_of(tokens=64)], request_id=object_name("page"))
    views = views_of(manifest, realistic)
    out = empty(manifest)
    assert not store.get(manifest, out)
    size = store.put(manifest, views)
    assert size == store.folder.used()
    assert store.put(manifest, views) == 0
    assert store.get(manifest, out)
    assert_same(out, views)
    assert store.counters == {
        "written": 1,
        "present": 1,
        "read": 1,
        "missing": 1,
        "broken": 0,
        "raw_bytes": manifest.nbytes,
        "stored_bytes": size,
    }


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_a_broken_object_is_removed_and_missing(tmp_path, caplog, damage):
    store = ObjectStore(ObjectFolder(tmp_path), ObjectCodec())
    manifest = manifest_of([layer_of(tokens=64)], request_id=object_name("page"))
    other = replace(manifest, request_id=object_name("other"))
    for one in (manifest, other):
        store.put(one, views_of(one, realistic))
    path = next(tmp_path.rglob(f"{manifest.request_id}.lynx"))
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    elif damage == "cut":
        del data[len(data) // 2 :]
    else:
        data = bytearray(next(tmp_path.rglob(f"{other.request_id}.lynx")).read_bytes())
    path.write_bytes(data)
    assert not store.get(manifest, empty(manifest))
    assert "is removed" in caplog.text
    assert not path.exists()
    assert store.counters["broken"] == 1


def test_what_is_larger_than_the_folder_is_not_stored(tmp_path):
    store = ObjectStore(ObjectFolder(tmp_path, max_bytes=100), ObjectCodec())
    manifest = manifest_of([layer_of()], request_id=object_name("page"))
    assert store.put(manifest, views_of(manifest, realistic)) is None
