"""The distribution store: what goes in comes out by hash, damage is found, killed writers leave nothing torn."""

import hashlib
import json

import numpy as np
import pytest

from fusion.config import UserError
from fusion.teaching import DistributionStore, TeacherRows


def name_of(number):
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


def rows_of(number, rows=None, width=4):
    rng = np.random.default_rng(number)
    rows = rows or int(rng.integers(1, 9))
    return TeacherRows(
        rng.integers(0, 2**31 - 1, (rows, width), dtype=np.int32),
        -rng.exponential(3, (rows, width)).astype(np.float32),
        rng.random(rows, dtype=np.float32),
        rng.exponential(2, rows).astype(np.float32),
    )


def write(folder, shards=((0, 1, 2), (3, 4), (5,))):
    store = DistributionStore(folder)
    for number, members in enumerate(shards):
        store.append(number, [name_of(one) for one in members], [rows_of(one) for one in members])
    store.finish({"model": "tiny"})
    return DistributionStore.open(folder)


def test_rows_come_back_by_hash(tmp_path):
    store = write(tmp_path)
    assert len(store) == 6
    assert set(store) == {name_of(number) for number in range(6)}
    for number in (5, 0, 4, 1, 3, 2, 0):  # in no order
        found, given = store[name_of(number)], rows_of(number)
        assert name_of(number) in store
        assert (found.ids_RK == given.ids_RK).all()
        assert found.ids_RK.dtype == np.int32
        np.testing.assert_allclose(found.logprobs_RK, given.logprobs_RK, rtol=2**-11)  # kept in half precision
        assert found.logprobs_RK.dtype == np.float32
        assert (found.tail_R == given.tail_R).all()
        assert (found.nll_R == given.nll_R).all()
    assert "0" * 32 not in store
    with pytest.raises(KeyError):
        store["0" * 32]


def test_equal_rows_are_equal_bytes(tmp_path):
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        write(tmp_path / place)
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_an_unfinished_store_cannot_be_read(tmp_path):
    store = DistributionStore(tmp_path)
    store.append(0, [name_of(0)], [rows_of(0)])
    assert store.has_shard(0)
    assert not store.has_shard(1)
    with pytest.raises(UserError, match=r"no finished distribution store \(its index\.json is missing\)"):
        DistributionStore.open(tmp_path)


def test_an_intact_store_has_no_problems(tmp_path):
    assert write(tmp_path).verify() == []


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
    assert len(problems) == 2
    for problem, victim in zip(problems, victims, strict=True):
        assert victim.name in problem
        assert ("missing" in problem) == (damage == "missing")


def test_the_index_describes_the_shards(tmp_path):
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text("utf-8"))
    assert index["description"] == {"model": "tiny"}
    assert [shard["file"] for shard in index["shards"]] == [f"shard-{number:06d}.safetensors" for number in range(3)]
    assert index["shards"][0]["dialogues"] == [name_of(number) for number in range(3)]
    assert index["shards"][1]["rows"] == sum(len(rows_of(number).nll_R) for number in (3, 4))
    for shard in index["shards"]:
        assert shard["sha256"] == hashlib.sha256((tmp_path / shard["file"]).read_bytes()).hexdigest()


def test_a_shard_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    import os

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
