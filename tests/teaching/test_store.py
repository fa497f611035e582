"""The distribution store: what goes in comes out by hash, damage is found, killed writers leave nothing torn."""

import hashlib
import json
import os
import pickle
from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.config import UserError
from fusion.teaching import DistributionStore, TeacherRows
from fusion.teaching.compact import HIGHEST_ID, RANGE, Compact
from fusion.teaching.selection import draw, uniforms

CODINGS = ("compact", "exact")
NAMES = ("ids_RK", "logprobs_RK", "tail_R", "nll_R")


def name_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def rows_of(number, num_rows=None, width=6, vocabulary=1 << 18, ragged=True, peaked=2.0):
    """Rows of a made-up teacher: sorted candidates, a tail, mass 1."""
    rng = np.random.default_rng(number)
    num_rows = num_rows or int(rng.integers(1, 9))
    logits_RK = -rng.exponential(peaked * rng.choice([0.1, 1, 6]), (num_rows, width + 1)).cumsum(1).clip(max=80)
    counts_R = rng.integers(1, width + 1, num_rows) if ragged else np.full(num_rows, width)
    held_RK = np.arange(width) < counts_R[:, None]
    counts_R[0] = width
    held_RK[0] = True
    masses_RK = np.exp(logits_RK) / np.exp(logits_RK).sum(1, keepdims=True)
    logprobs_RK = np.log(masses_RK[:, :width]).astype(np.float32)
    logprobs_RK[~held_RK] = -np.inf
    ids_RK = np.stack([rng.choice(vocabulary, width, replace=False) for _ in range(num_rows)]).astype(np.int32)
    tail_R = np.maximum(1 - np.exp(logprobs_RK, dtype=np.float64).sum(1), 0).astype(np.float32)
    nll_R = rng.exponential(2, num_rows).astype(np.float32)
    return TeacherRows(np.where(held_RK, ids_RK, -1).astype(np.int32), logprobs_RK, tail_R, nll_R)


def write(folder, shards=((0, 1, 2), (3, 4), (5,)), coding="compact", order=None):
    store = DistributionStore(folder, coding)
    for number in order or range(len(shards)):
        store.append(number, [name_of(one) for one in shards[number]], [rows_of(one) for one in shards[number]])
    store.finish({"model": "tiny"})
    return DistributionStore.open(folder)


def _odds(rows):
    """How many nats more the candidates hold than the tail."""
    head_R = np.exp(rows.logprobs_RK, dtype=np.float64).sum(1)
    return np.log(head_R) - np.log(np.where(rows.tail_R > 0, rows.tail_R, 1), dtype=np.float64)


def check_same(found, given, coding):
    """Exact: every number; compact: ids, order and the sum of NLLs exactly, the rest within the coding's steps."""
    assert (found.ids_RK == given.ids_RK).all()
    assert [getattr(found, name).dtype for name in NAMES] == [np.int32, np.float32, np.float32, np.float32]
    assert found.total_nll == given.nll_R.sum(dtype=np.float64)
    if coding == "exact":
        assert all((getattr(found, name) == getattr(given, name)).all() for name in NAMES)
        return
    held_RK = given.ids_RK >= 0
    assert (np.isneginf(found.logprobs_RK) == ~held_RK).all()
    assert (found.logprobs_RK[:, 1:] <= found.logprobs_RK[:, :-1]).all()
    np.testing.assert_allclose(np.exp(found.logprobs_RK, dtype=np.float64).sum(1) + found.tail_R, 1, atol=1e-5)
    behind = given.logprobs_RK[:, :1] - np.where(held_RK, given.logprobs_RK, 0)
    decoded = found.logprobs_RK[:, :1] - np.where(held_RK, found.logprobs_RK, 0)
    near = held_RK & (behind < RANGE)
    assert (np.abs(behind - decoded)[near] <= 0.0075 * (1 + behind[near]) + 1e-4).all()
    some_R = given.tail_R > 0
    assert ((found.tail_R > 0) == some_R).all()
    odds, found_odds = _odds(given)[some_R], _odds(found)[some_R]
    assert (np.abs(odds - found_odds) <= 0.0147 * (1 + np.abs(odds)) + 1e-3).all()
    np.testing.assert_allclose(np.sqrt(found.nll_R), np.sqrt(given.nll_R), atol=1.3e-4)


@pytest.mark.parametrize("coding", CODINGS)
def test_rows_come_back_by_hash(tmp_path, coding):
    store = write(tmp_path, coding=coding)
    assert len(store) == 6
    assert set(store) == {name_of(number) for number in range(6)}
    for number in (5, 0, 4, 1, 3, 2, 0):  # in no order
        assert name_of(number) in store
        check_same(store[name_of(number)], rows_of(number), coding)
    assert "0" * 32 not in store
    with pytest.raises(KeyError):
        store["0" * 32]


@pytest.mark.parametrize("coding", CODINGS)
@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    width=st.integers(1, 64),
    vocabulary=st.sampled_from([64, 129, 1000, 32_000, 1 << 18]),
    ragged=st.booleans(),
    peaked=st.sampled_from([0.0, 0.01, 1.0, 9.0]),
    seed=st.integers(0, 1 << 30),
)
def test_any_rows_come_back(tmp_path_factory, coding, sizes, width, vocabulary, ragged, peaked, seed):
    rows = [rows_of(seed + place, size, width, vocabulary, ragged, peaked) for place, size in enumerate(sizes)]
    folder = tmp_path_factory.mktemp("store")
    store = DistributionStore(folder, coding)
    store.append(0, [name_of(place) for place in range(len(rows))], rows)
    store.finish({})
    store = DistributionStore.open(folder)
    for place, given_rows in enumerate(rows):
        check_same(store[name_of(place)], given_rows, coding)
    assert store.verify() == []
    assert store.num_rows == sum(sizes)


def test_many_blocks_are_one_shard(tmp_path):
    """Blocks end inside a shard, and frequent tokens are numbered over all of it."""
    rows = [rows_of(number, 300, 10, 500, ragged=number % 2 == 0) for number in range(3 * Compact.block_rows // 300)]
    names = [name_of(number) for number in range(len(rows))]
    store = DistributionStore(tmp_path)
    store.append(0, names, rows)
    store.finish({})
    store = DistributionStore.open(tmp_path)
    for place in np.random.default_rng(0).permutation(len(names)):
        check_same(store[names[place]], rows[place], "compact")
    parts = store.parts()
    assert sum(parts.values()) == store.num_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert parts["ids"] > parts["logprobs"] > parts["tail"] > 0


def test_compact_rows_are_near_the_exact_ones(tmp_path):
    """Mean divergence from the 32-bit rows, both scaled to 1."""
    given_rows = rows_of(1, 5000, 10, 32_000, ragged=False, peaked=1.0)
    store = DistributionStore(tmp_path)
    store.append(0, [name_of(0)], [given_rows])
    store.finish({})
    found = DistributionStore.open(tmp_path)[name_of(0)]
    exact, coded = (np.exp(rows.logprobs_RK, dtype=np.float64) for rows in (given_rows, found))
    exact, coded = exact / exact.sum(1, keepdims=True), coded / coded.sum(1, keepdims=True)
    assert (exact * np.log(exact / coded)).sum(1).mean() < 5e-5


@pytest.mark.parametrize(
    ("nll", "found"), [(0.0, 0.0), (1e-9, 0.0), (255.0, 255.0), (1e6, 256.0)], ids=["zero", "tiny", "high", "beyond"]
)
def test_nll_has_a_ceiling_but_its_sum_has_none(tmp_path, nll, found):
    rows = rows_of(0, 1)
    rows = TeacherRows(rows.ids_RK, rows.logprobs_RK, rows.tail_R, np.asarray([nll], np.float32))
    store = DistributionStore(tmp_path)
    store.append(0, [name_of(0)], [rows])
    store.finish({})
    read = DistributionStore.open(tmp_path)[name_of(0)]
    np.testing.assert_allclose(read.nll_R, found, rtol=1e-3, atol=1e-7)
    assert read.total_nll == float(np.float32(nll))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_equal_rows_are_equal_bytes_in_any_order_of_append(tmp_path, coding, order):
    write(tmp_path / "a", coding=coding)
    write(tmp_path / "b", coding=coding, order=order)
    files = sorted((tmp_path / "a").iterdir())
    assert len(files) == 4
    for file in files:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_store_rewritten_from_itself_keeps_its_ids_and_sums(tmp_path):
    store = write(tmp_path / "a")
    again = DistributionStore(tmp_path / "b")
    again.append(0, list(store), [store[name] for name in store])
    again.finish({})
    again = DistributionStore.open(tmp_path / "b")
    for name in store:
        assert again[name].total_nll == store[name].total_nll
        np.testing.assert_allclose(again[name].logprobs_RK, store[name].logprobs_RK, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("coding", CODINGS)
def test_draws_come_back_without_a_tail(tmp_path, coding):
    logprobs_RV = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)).mul(3).log_softmax(-1)
    drawn = draw(logprobs_RV, uniforms(name_of(0), 50, 50))
    store = DistributionStore(tmp_path, coding)
    store.append(0, [name_of(0)], [TeacherRows(*drawn, np.ones(50, np.float32))])
    store.finish({})
    found = DistributionStore.open(tmp_path)[name_of(0)]
    assert (found.ids_RK == drawn.ids_RK).all()
    assert (found.tail_R == 0).all()
    np.testing.assert_allclose(np.exp(found.logprobs_RK), np.exp(drawn.logprobs_RK), rtol=0.04)
    np.testing.assert_allclose(np.exp(found.logprobs_RK).sum(1), 1, atol=1e-5)


def test_callers_may_change_what_they_get(tmp_path):
    store = write(tmp_path)
    rows = store[name_of(0)]
    for name in NAMES:
        getattr(rows, name)[...] = 7
    check_same(store[name_of(0)], rows_of(0), "compact")


def test_an_unfinished_store_cannot_be_read(tmp_path):
    store = DistributionStore(tmp_path)
    store.append(0, [name_of(0)], [rows_of(0)])
    assert store.has_shard(0)
    assert not store.has_shard(1)
    with pytest.raises(UserError, match=r"no finished distribution store \(its index\.json is missing\)"):
        DistributionStore.open(tmp_path)


def test_another_store_is_no_distribution_store(tmp_path):
    from fusion.teaching.sparse_rows import SparseRowStore, gather_entries

    SparseRowStore.write(tmp_path, {name_of(0): gather_entries(np.zeros(1, int), np.ones(1, int), np.ones(1), 1)})
    with pytest.raises(UserError, match="this is no distribution store"):
        DistributionStore.open(tmp_path)


@pytest.mark.parametrize("coding", CODINGS)
def test_every_flipped_byte_is_told(tmp_path, coding):
    """All bytes of index and shards, one at a time: `verify` names the file; reading gives the truth or UserError."""
    write(tmp_path, ((0, 1), (2,)), coding)
    truth = {number: DistributionStore.open(tmp_path)[name_of(number)] for number in range(3)}
    for path in sorted(tmp_path.iterdir()):
        intact = path.read_bytes()
        for place in range(len(intact)):
            damaged = bytearray(intact)
            damaged[place] ^= 1 << (place % 8)
            path.write_bytes(damaged)
            (problem,) = DistributionStore(tmp_path, coding).verify()
            assert str(path) in problem
            check_reads(tmp_path, truth)
        path.write_bytes(intact)
    assert DistributionStore(tmp_path, coding).verify() == []


def check_reads(folder, truth):
    with suppress(UserError):
        store = DistributionStore.open(folder)
        for number, rows in truth.items():
            check_read(store, number, rows)


def check_read(store, number, rows):
    with suppress(UserError):
        found = store[name_of(number)]
        assert all((getattr(found, name) == getattr(rows, name)).all() for name in NAMES)
        assert found.total_nll == rows.total_nll


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "grow", "missing"])
def test_every_damaged_shard_is_named(tmp_path, damage):
    store = write(tmp_path)
    victims = [tmp_path / f"shard-{number:06d}.safetensors" for number in (0, 2)]
    for victim in victims:
        content = bytearray(victim.read_bytes())
        content[-1] ^= 1
        changed = {"flip": bytes(content), "cut": content[:-1], "empty": b"", "grow": bytes(content) + b"x"}
        if damage == "missing":
            victim.unlink()
        else:
            victim.write_bytes(changed[damage])
    problems = store.verify()
    words = {"missing": "missing", "cut": "truncated", "empty": "truncated"}
    assert len(problems) == 2
    for problem, victim in zip(problems, victims, strict=True):
        assert victim.name in problem
        assert words.get(damage, "damaged") in problem
    with pytest.raises(UserError, match=r"shard-000002\.safetensors"):
        DistributionStore.open(tmp_path)[name_of(5)]


@pytest.mark.parametrize("coding", CODINGS)
def test_the_index_describes_the_shards(tmp_path, coding):
    store = write(tmp_path, coding=coding)
    assert store.description == {"model": "tiny", "store": coding}
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    assert [shard["file"] for shard in index["shards"]] == [f"shard-{number:06d}.safetensors" for number in range(3)]
    assert index["shards"][0]["dialogues"] == [name_of(number) for number in range(3)]
    assert index["shards"][1]["rows"] == sum(len(rows_of(number).nll_R) for number in (3, 4))
    for shard in index["shards"]:
        assert shard["sha256"] == hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest()


def test_a_shard_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt

    store = DistributionStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            store.append(0, [name_of(0)], [rows_of(0)])
    assert not store.has_shard(0)
    store.append(0, [name_of(0)], [rows_of(0)])
    store.finish({})
    assert list(DistributionStore.open(tmp_path)) == [name_of(0)]


@pytest.mark.parametrize("coding", CODINGS)
def test_dialogues_without_rows_are_refused(tmp_path, coding):
    empty = TeacherRows(*(getattr(rows_of(0), name)[:0] for name in NAMES))
    store = DistributionStore(tmp_path, coding)
    with pytest.raises(UserError, match=f"dialogue {name_of(1)} has no supervised row"):
        store.append(0, [name_of(0), name_of(1)], [rows_of(0), empty])
    with pytest.raises(UserError, match=f"dialogue {name_of(1)} has no supervised row"):
        store.append(0, [name_of(1)], [empty])
    with pytest.raises(UserError, match="no dialogues to write"):
        store.append(0, [], [])
    assert not store.has_shard(0)


@pytest.mark.parametrize(
    ("field", "value", "complaint"),
    [
        ("ids_RK", [[-1, -1]], "has no candidate"),
        ("ids_RK", [[-1, 3]], "padding stands before"),
        ("ids_RK", [[1, HIGHEST_ID + 1]], f"above {HIGHEST_ID}"),
        ("logprobs_RK", [[-1.6, -0.3]], "most likely first"),
        ("logprobs_RK", [[-0.1, -0.3]], "not 1 together"),
        ("logprobs_RK", [[-0.3, np.nan]], "not 1 together"),
        ("tail_R", [-0.06], "negative"),
        ("nll_R", [np.inf], "no number"),
    ],
)
def test_rows_that_are_no_distributions_are_refused(tmp_path, field, value, complaint):
    """The compact coding could not say them, and must not say something else."""
    rows = {"ids_RK": [[1, 2]], "logprobs_RK": np.log([[0.7, 0.25]]), "tail_R": [0.05], "nll_R": [1.0]}
    dtypes = dict(zip(NAMES, (np.int32, np.float32, np.float32, np.float32), strict=True))
    columns = {name: np.asarray(column, dtypes[name]) for name, column in (rows | {field: value}).items()}
    with pytest.raises(ValueError, match=complaint):
        DistributionStore(tmp_path).append(0, [name_of(0)], [TeacherRows(**columns)])


def test_a_store_travels_to_another_process(tmp_path):
    store = write(tmp_path)
    check_same(store[name_of(0)], rows_of(0), "compact")
    check_same(pickle.loads(pickle.dumps(store))[name_of(0)], rows_of(0), "compact")
