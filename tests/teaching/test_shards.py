"""Shards: any byte that is not what was written is told, by `verify` and by whoever reads it; equal bytes whatever
the order of append."""

import hashlib
import json
import os
import pickle
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.config import UserError
from fusion.teaching import shards
from fusion.teaching.sparse_rows import SparseRows, SparseRowStore, gather_entries

NUM_SHARDS = 3


def name_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def rows_of(number):
    rng = np.random.default_rng(number)
    rows = int(rng.integers(1, 5))
    entries = int(rng.integers(0, 3 * rows))
    return gather_entries(
        np.sort(rng.integers(0, rows, entries)), rng.integers(0, 1 << 18, entries), rng.random(entries) + 0.1, rows
    )


def shard_of(number):
    return {name_of(10 * number + place): rows_of(10 * number + place) for place in range(2)}


def build(folder, order=range(NUM_SHARDS)):
    folder.mkdir(exist_ok=True)
    for number in order:
        SparseRowStore.append(folder, number, shard_of(number))
    SparseRowStore.finish(folder)
    return SparseRowStore(folder)


def same(found, given):
    return all(
        (getattr(found, field) == getattr(given, field)).all()
        and getattr(found, field).dtype == getattr(given, field).dtype
        for field in ("indptr_R", "ids_E", "weights_E")
    )


def test_shards_are_one_mapping(tmp_path):
    store = build(tmp_path / "rows")
    expected = {name: rows for number in range(NUM_SHARDS) for name, rows in shard_of(number).items()}
    assert len(store) == len(expected)
    assert set(store) == set(expected)
    assert all(same(store[name], rows) for name, rows in expected.items())
    assert store.verify() == []
    assert name_of(99) not in store
    with pytest.raises(KeyError):
        store[name_of(99)]


@given(st.permutations(range(NUM_SHARDS)))
def test_the_order_of_append_changes_no_byte(tmp_path_factory, order):
    folders = [tmp_path_factory.mktemp("rows") for _ in range(2)]
    build(folders[0])
    build(folders[1], order)
    for file in folders[0].iterdir():
        assert file.read_bytes() == (folders[1] / file.name).read_bytes()


def test_a_killed_writer_goes_on(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    build(tmp_path / "whole")
    folder = tmp_path / "resumed"
    SparseRowStore.append(folder, 0, shard_of(0))
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            SparseRowStore.append(folder, 1, shard_of(1))
    assert [SparseRowStore.has_shard(folder, number) for number in range(NUM_SHARDS)] == [True, False, False]
    with pytest.raises(UserError, match="not finished"):
        len(SparseRowStore(folder))
    for number in (2, 1):
        SparseRowStore.append(folder, number, shard_of(number))
    SparseRowStore.finish(folder)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (folder / file.name).read_bytes()


def test_every_flipped_byte_is_told(tmp_path):
    """All bytes of index and shards, one at a time: `verify` names the file; reading gives the truth or UserError."""
    store = build(tmp_path / "rows")
    expected = {name: store[name] for name in store}
    for path in sorted(store.folder.iterdir()):
        intact = path.read_bytes()
        for place in range(len(intact)):
            damaged = bytearray(intact)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            problems = store.verify()
            assert len(problems) == 1, (path, place)
            assert str(path) in problems[0]
            assert "damaged" in problems[0]
            check_reads(store.folder, expected)
        path.write_bytes(intact)
    assert store.verify() == []


def check_reads(folder, expected):
    store = SparseRowStore(folder)
    for name, rows in expected.items():
        with suppress(UserError):
            assert same(store[name], rows)


@pytest.mark.parametrize("damage", ["cut", "empty", "missing", "grown", "swapped", "stranger"])
def test_what_is_wrong_with_a_shard_is_said(tmp_path, damage):
    store = build(tmp_path / "rows")
    victim = store.folder / shards.shard_name(1)
    content = victim.read_bytes()
    words = {"cut": "truncated", "empty": "truncated", "grown": "damaged", "missing": "missing"}
    changed = {"cut": content[:-1], "empty": b"", "grown": content + b"x"}
    if damage == "missing":
        victim.unlink()
    elif damage == "stranger":
        victim = store.folder / shards.shard_name(NUM_SHARDS)
        victim.write_bytes(content)
    elif damage == "swapped":
        victim.write_bytes((store.folder / shards.shard_name(0)).read_bytes())
    else:
        victim.write_bytes(changed[damage])
    problems = SparseRowStore(store.folder).verify()
    assert len(problems) == 1
    assert str(victim) in problems[0]
    assert words.get(damage, "") in problems[0]
    if damage != "stranger":
        with pytest.raises(UserError, match=r"shard-000001\.safetensors: the shard is missing or damaged"):
            SparseRowStore(store.folder)[name_of(10)]


def test_the_index_of_another_store_is_wrong(tmp_path):
    store = build(tmp_path / "rows")
    other = tmp_path / "other"
    SparseRowStore.write(other, {name_of(7): rows_of(8), name_of(8): rows_of(7)})
    (store.folder / shards.INDEX).write_bytes((other / shards.INDEX).read_bytes())
    problems = store.verify()
    assert [shards.shard_name(number) in problem for number, problem in enumerate(problems)] == [True] * NUM_SHARDS
    with pytest.raises(UserError, match="damaged"):
        SparseRowStore(store.folder)[name_of(7)]


def test_a_rewritten_index_is_told(tmp_path):
    """A change by hand keeps the JSON valid; the index's own checksum tells."""
    store = build(tmp_path / "rows")
    path = store.folder / shards.INDEX
    content = json.loads(path.read_text("utf-8"))
    content["shards"].pop()
    path.write_text(json.dumps(content), "utf-8")
    (problem,) = store.verify()
    assert "the index is damaged" in problem


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checksum": 1, "shards": [{}], "description": {}}', "\xff"])
def test_an_index_that_is_none_is_told(tmp_path, text):
    store = build(tmp_path / "rows")
    (store.folder / shards.INDEX).write_bytes(text.encode("latin-1"))
    (problem,) = store.verify()
    assert "the index is damaged" in problem


def test_a_dialogue_comes_once(tmp_path):
    block = shards.Block([name_of(1)], [2], b"12")
    with pytest.raises(UserError, match=f"dialogue {name_of(1)} comes 2 times"):
        shards.write_shard(tmp_path, 0, [block, block])
    for number in range(2):
        shards.write_shard(tmp_path, number, [block])
    with pytest.raises(UserError, match=f"dialogues in two shards: {name_of(1)}"):
        shards.finish(tmp_path, {})


def test_dialogues_without_rows_and_shards_without_dialogues_are_refused(tmp_path):
    empty = SparseRows(np.zeros(1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    with pytest.raises(UserError, match=f"dialogue {name_of(1)} has no supervised row"):
        SparseRowStore.append(tmp_path, 0, {name_of(1): empty, name_of(2): rows_of(2)})
    with pytest.raises(UserError, match="no dialogues"):
        SparseRowStore.append(tmp_path, 0, {})
    assert not SparseRowStore.has_shard(tmp_path, 0)


def test_a_store_travels_to_another_process(tmp_path):
    store = build(tmp_path / "rows")
    before = store[name_of(0)]
    assert same(pickle.loads(pickle.dumps(store))[name_of(0)], before)
