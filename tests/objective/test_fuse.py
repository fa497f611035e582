"""Fusion: who speaks, with which share, and what a row learns that nobody speaks for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.config import UserError
from fusion.objective.fuse import Vote, fuse, fusion_function, is_kept, pivot_vote
from fusion.teaching.sparse_rows import gather_entries
from fusion.teaching.store import TeacherRows


def rows_of(*rows):
    """Sparse rows from one {id: mass} per row."""
    loose = [(number, token, mass) for number, row in enumerate(rows) for token, mass in row.items()]
    columns = [np.asarray(column) for column in zip(*loose, strict=True)] if loose else [np.zeros(0, int)] * 3
    return gather_entries(columns[0], columns[1], columns[2], len(rows))


def as_dicts(rows):
    ids, weights = rows.padded(max(1, int(np.diff(rows.indptr_R).max())))
    return [{int(i): float(w) for i, w in zip(*row, strict=True) if w > 0} for row in zip(ids, weights, strict=True)]


PIVOT = Vote("pivot", rows_of({1: 0.5, 2: 0.5}, {3: 1.0}, {4: 1.0}), 1.0)
SOURCE = Vote("source", rows_of({1: 1.0}, {}, {5: 0.25, 6: 0.75}), 0.5)
REFERENCES = np.array([7, 8, 9], dtype=np.int32)


def test_the_lowest_cross_entropy_speaks_alone():
    function = fusion_function("min_ce")
    fused = fuse([PIVOT, SOURCE], REFERENCES, function, "gold")
    assert fused.winner == "source"
    assert as_dicts(fused.rows) == [{1: 1.0}, {8: 1.0}, {5: 0.25, 6: 0.75}]
    assert fused.fallback_rows == 1
    fused = fuse([Vote("pivot", PIVOT.rows, 0.4), SOURCE], REFERENCES, function, "gold")
    assert fused.winner == "pivot"
    assert as_dicts(fused.rows) == as_dicts(PIVOT.rows)
    assert fused.fallback_rows == 0


@pytest.mark.parametrize(("fallback", "row"), [("gold", {8: 1.0}), ("pivot", {3: 1.0}), ("skip", {})])
def test_rows_that_nobody_speaks_for(fallback, row):
    fused = fuse([PIVOT, SOURCE], REFERENCES, fusion_function("source_only"), fallback)
    assert as_dicts(fused.rows)[1] == pytest.approx(row)
    assert fused.fallback_rows == 1
    assert len(fused.rows) == 3


@given(st.lists(st.floats(0, 20), min_size=2, max_size=5))
def test_the_builtin_functions_choose_one_model(ces):
    ce_M = np.asarray(ces)
    shares = {name: fusion_function(name)(ce_M) for name in ("min_ce", "pivot_only", "source_only")}
    for share in shares.values():
        assert sorted(share)[-1] == share.sum() == 1
    assert ce_M[shares["min_ce"].argmax()] == ce_M.min()
    assert shares["min_ce"].argmax() == ces.index(min(ces))  # a tie goes to the pivot, then to the earlier source
    assert shares["pivot_only"].argmax() == 0
    assert shares["source_only"].argmax() == 1 + ces[1:].index(min(ces[1:]))


def test_ties_go_to_the_pivot():
    tied = Vote("source", SOURCE.rows, PIVOT.ce)
    assert fuse([PIVOT, tied], REFERENCES, fusion_function("min_ce"), "gold").winner == "pivot"
    half = lambda ce_M: np.full(len(ce_M), 1 / len(ce_M))  # noqa: E731
    assert fuse([PIVOT, tied], REFERENCES, half, "gold").winner == "pivot"


def test_a_mixture_is_mixed_row_by_row():
    mix = lambda ce_M: np.array([0.25, 0.75])  # noqa: E731
    fused = fuse([PIVOT, SOURCE], REFERENCES, mix, "gold")
    rows = as_dicts(fused.rows)
    assert rows[0] == pytest.approx({1: 0.25 * 0.5 + 0.75, 2: 0.125})
    assert rows[1] == {3: 1.0}  # the source is silent, so the pivot has the whole row
    assert rows[2] == pytest.approx({4: 0.25, 5: 0.75 * 0.25, 6: 0.75 * 0.75})
    assert fused.fallback_rows == 0
    assert fused.winner == "source"


masses = st.dictionaries(st.integers(0, 9), st.sampled_from([0.1, 1.0, 5.0]), max_size=4)
votes = st.integers(1, 4).flatmap(
    lambda rows: st.lists(st.lists(masses, min_size=rows, max_size=rows), min_size=1, max_size=3)
)


@given(votes, st.sampled_from(["gold", "pivot", "skip"]), st.data())
def test_the_masses_of_a_row_sum_to_one_or_there_are_none(tables, fallback, data):
    shares = np.asarray([data.draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in tables])
    shares = shares / shares.sum() if shares.sum() else np.eye(len(tables))[0]
    given_votes = [Vote(str(number), rows_of(*table), 1.0) for number, table in enumerate(tables)]
    references = np.arange(len(tables[0]), dtype=np.int32)
    fused = fuse(given_votes, references, lambda ce_M: shares, fallback)
    spoken = [any(share and table[row] for share, table in zip(shares, tables, strict=True)) for row in references]
    for row, masses in enumerate(as_dicts(fused.rows)):
        if spoken[row] or fallback == "gold" or (fallback == "pivot" and tables[0][row]):
            assert sum(masses.values()) == pytest.approx(1, abs=1e-6)
        else:
            assert masses == {}
    assert fused.fallback_rows == spoken.count(False)


def test_the_pivots_own_row_is_its_candidates_renormalised():
    teacher = TeacherRows(
        np.array([[4, 2], [9, 0]], dtype=np.int32),
        np.log(np.array([[0.6, 0.2], [0.5, 0.5]], dtype=np.float32)),
        np.array([0.2, 0.0], dtype=np.float32),
        np.zeros(2, dtype=np.float32),
    )
    vote = pivot_vote("pivot", teacher, 0.3)
    assert (vote.name, vote.ce) == ("pivot", 0.3)
    assert as_dicts(vote.rows) == [pytest.approx({4: 0.75, 2: 0.25}), pytest.approx({9: 0.5, 0: 0.5})]


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_fusion.py").write_text("NUMBER = 3\ndef second(ce_M):\n    return [0.0, 1.0]\n")
    monkeypatch.syspath_prepend(tmp_path)
    fused = fuse([PIVOT, SOURCE], REFERENCES, fusion_function("my_fusion.second"), "skip")
    assert fused.winner == "source"
    for name in ("my_fusion.third", "my_fusion.NUMBER", "my_fusion.second.deeper"):
        with pytest.raises(UserError, match=f"fusion.name={name}"):
            fusion_function(name)


@pytest.mark.parametrize("name", ["nope", "", ".", "..x", "min-ce", "no.such.module", "fusion_functions"])
def test_an_unknown_function_is_the_users_problem(name):
    with pytest.raises(UserError, match=r"fusion\.name="):
        fusion_function(name)


@pytest.mark.parametrize(
    "shares", [[0.0, 0.0], [1.0], [0.5, 0.5, 0.0], [-0.5, 1.5], [float("nan"), 1.0], [2.0, 2.0], None]
)
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(UserError, match=r"fusion\.name"):
        fuse([PIVOT, SOURCE], REFERENCES, lambda ce_M: shares, "gold")


def test_the_share_of_kept_dialogues():
    names = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(2000)]
    kept = {share: {name for name in names if is_kept(name, share)} for share in (0.0, 0.3, 0.6, 1.0)}
    assert not kept[0.0]
    assert kept[1.0] == set(names)
    assert kept[0.3] < kept[0.6]
    assert 500 < len(kept[0.3]) < 700
    assert all(is_kept(name, 0.3) == (name in kept[0.3]) for name in reversed(names))
