"""Sparse rows: gathered from loose entries, padded for batches, kept and found by hash."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.teaching.sparse_rows import SparseRows, SparseRowStore, gather_entries

entries = st.lists(
    st.tuples(
        st.integers(0, 5), st.sampled_from([0, 1, 2, 7, 151_645, 2**31 - 1]), st.sampled_from([0.0, 0.25, 1.0, 3.0])
    ),
    max_size=30,
)


def gathered(loose, num_rows=6):
    row_E, ids_E, weights_E = (np.asarray(column) for column in (zip(*loose, strict=True) if loose else ([], [], [])))
    return gather_entries(row_E.astype(np.int64), ids_E.astype(np.int32), weights_E.astype(np.float64), num_rows)


def as_dicts(rows):
    bounds = rows.indptr_R
    return [
        dict(zip(rows.ids_E[a:b].tolist(), rows.weights_E[a:b].tolist(), strict=True)) for a, b in pairwise(bounds)
    ]


@given(entries)
def test_masses_of_equal_ids_are_summed_and_rows_normalised(loose):
    expected = [{} for _ in range(6)]
    for row, token, weight in loose:
        if weight > 0:
            expected[row][token] = expected[row].get(token, 0.0) + weight
    rows = gathered(loose)
    assert len(rows) == 6
    for found, masses in zip(as_dicts(rows), expected, strict=True):
        assert list(found) == sorted(masses)
        total = sum(masses.values())
        assert found == pytest.approx({token: mass / total for token, mass in masses.items()})
    assert (rows.is_empty_R == [not masses for masses in expected]).all()
    assert (rows.ids_E.dtype, rows.weights_E.dtype, rows.indptr_R.dtype) == (np.int32, np.float32, np.int64)


@given(entries, st.integers(0, 3))
def test_padded_rows_hold_the_same_entries(loose, extra):
    rows = gathered(loose)
    width = int(np.diff(rows.indptr_R).max()) + extra
    ids_RK, weights_RK = rows.padded(width)
    assert ids_RK.shape == weights_RK.shape == (6, width)
    for found, ids, weights in zip(as_dicts(rows), ids_RK, weights_RK, strict=True):
        kept = weights > 0
        assert dict(zip(ids[kept].tolist(), weights[kept].tolist(), strict=True)) == found
        assert (ids[~kept] == 0).all()


def test_entries_that_are_no_mass_go():
    rows = gathered([(0, 1, float("nan")), (0, 2, -1.0), (1, 3, 1e-300), (2, 4, float("nan"))])
    assert as_dicts(rows)[:3] == [{}, {3: 1.0}, {}]


@settings(max_examples=25)
@given(st.lists(entries, min_size=1, max_size=5))
def test_a_store_finds_rows_by_hash(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("rows")
    dialogues = {hashlib.md5(str(place).encode()).hexdigest(): gathered(loose) for place, loose in enumerate(corpus)}
    SparseRowStore.write(folder, dialogues)
    store = SparseRowStore(folder)
    assert list(store) == sorted(dialogues)
    assert len(store) == len(dialogues)
    for name, rows in dialogues.items():
        found = store[name]
        assert as_dicts(found) == as_dicts(rows)
        assert found.indptr_R[0] == 0
    assert "0" * 32 not in store


def test_the_order_of_a_mapping_changes_no_byte(tmp_path):
    dialogues = {"ab" * 16: gathered([(0, 1, 1.0)]), "cd" * 16: gathered([]), "01" * 16: gathered([(3, 5, 2.0)])}
    for place, mapping in (("a", dialogues), ("b", dict(reversed(dialogues.items())))):
        (tmp_path / place).mkdir()
        SparseRowStore.write(tmp_path / place, mapping)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_rows_without_entries_pad_to_nothing():
    rows = SparseRows(np.zeros(4, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
    ids_RK, weights_RK = rows.padded(0)
    assert ids_RK.shape == weights_RK.shape == (3, 0)
    assert rows.is_empty_R.all()
