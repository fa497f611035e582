"""Fusion: who speaks in which unit, with which share, and what a row learns that nobody speaks for."""

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparse_tables import as_dicts, rows_of

from fusion.alignment.target_kind import TargetKind
from fusion.config import UserError
from fusion.objective.fuse import Vote, fuse, fusion_function, is_kept, pivot_vote
from fusion.objective.target_form import TargetForm
from fusion.objective.units import Units
from fusion.teaching.store import TeacherRows

PIVOT = Vote("pivot", rows_of({1: 0.5, 2: 0.5}, {3: 1.0}, {4: 1.0}))
SOURCE = Vote("source", rows_of({1: 1.0}, {}, {5: 0.25, 6: 0.75}))
BUCKET = TargetForm(tail="bucket")
SPANS = TargetForm(TargetKind("spans", 2.0))
RANKS = TargetForm(TargetKind("ranks"))


def whole(rows, *ce_M):
    """One unit: the dialogue."""
    return Units(np.zeros(rows, dtype=np.int64), np.asarray([ce_M], dtype=np.float64))


def each(*ce_UM):
    """Every row is a unit."""
    return Units(np.arange(len(ce_UM)), np.asarray(ce_UM, dtype=np.float64))


def decided(*shares_UM):
    """A function that has decided beforehand."""
    return lambda ce_UM: np.asarray(shares_UM, dtype=np.float64)


def fused_with(function, units, fallback="gold", form=TargetForm(), votes=(PIVOT, SOURCE)):  # noqa: B008
    function = fusion_function(function) if isinstance(function, str) else function
    return fuse(votes, units, np.arange(7, 7 + len(units.of_R)), function, fallback, form)


def test_the_lowest_cross_entropy_speaks_alone():
    fused = fused_with("min_ce", whole(3, 1.0, 0.5))
    assert fused.winner == "source"
    assert as_dicts(fused.rows) == [{1: 1.0}, {8: 1.0}, {5: 0.25, 6: 0.75}]
    assert fused.fallback_rows == 1
    assert fused.rows_won == {"pivot": 0, "source": 3}
    fused = fused_with("min_ce", whole(3, 0.4, 0.5))
    assert fused.winner == "pivot"
    assert as_dicts(fused.rows) == as_dicts(PIVOT.rows)
    assert fused.fallback_rows == 0


def test_every_unit_is_decided_for_itself():
    fused = fused_with("min_ce", Units(np.array([0, 0, 1]), np.array([[1.0, 2.0], [1.0, 0.5]])))
    assert as_dicts(fused.rows) == [*as_dicts(PIVOT.rows)[:2], {5: 0.25, 6: 0.75}]
    assert fused.winner == "pivot"
    assert fused.rows_won == {"pivot": 2, "source": 1}
    fused = fused_with("min_ce", each([1.0, 0.5], [1.0, 0.5], [0.4, 0.5]))
    assert fused.winner == "source"
    assert as_dicts(fused.rows) == [{1: 1.0}, {8: 1.0}, {4: 1.0}]


@pytest.mark.parametrize(("fallback", "row"), [("gold", {8: 1.0}), ("pivot", {3: 1.0}), ("skip", {})])
def test_rows_that_nobody_speaks_for(fallback, row):
    fused = fused_with("source_only", whole(3, 1.0, 0.5), fallback)
    assert as_dicts(fused.rows)[1] == pytest.approx(row)
    assert fused.fallback_rows == 1
    assert len(fused.rows) == 3


finite = st.floats(0, 20)
entropies = st.integers(2, 5).flatmap(
    lambda models: st.lists(
        st.lists(finite | st.just(float("inf")), min_size=models, max_size=models), min_size=0, max_size=6
    ).map(lambda rows: np.asarray(rows, dtype=np.float64).reshape(len(rows), models))
)


@given(entropies)
def test_the_builtin_functions_that_choose_one_model(ce_UM):
    shares = {name: fusion_function(name)(ce_UM) for name in ("min_ce", "pivot_only", "source_only")}
    for found in shares.values():
        assert found.shape == ce_UM.shape
        assert ((found == 0) | (found == 1)).all()
        assert (found.sum(1) == 1).all()
    for unit, row in enumerate(ce_UM.tolist()):  # a tie goes to the pivot, then to the earlier source
        assert shares["min_ce"][unit].argmax() == row.index(min(row))
        assert shares["pivot_only"][unit].argmax() == 0
        assert shares["source_only"][unit].argmax() == 1 + row[1:].index(min(row[1:]))


@given(entropies)
def test_avg_ce_is_a_softmax_of_negative_cross_entropies(ce_UM):
    found = fusion_function("avg_ce")(ce_UM)
    assert found.shape == ce_UM.shape
    for ce_M, shares_M in zip(ce_UM, found, strict=True):
        if np.isinf(ce_M).all():
            assert shares_M.tolist() == [1.0, *[0.0] * (len(ce_M) - 1)]
        else:
            np.testing.assert_allclose(shares_M, np.exp(-ce_M) / np.exp(-ce_M).sum(), rtol=1e-9, atol=1e-15)


def test_avg_ce_of_huge_cross_entropies_is_no_division_by_zero():
    found = fusion_function("avg_ce")(np.array([[1e4, 1e4 + np.log(3)]]))
    np.testing.assert_allclose(found, [[0.75, 0.25]], rtol=1e-9)


def test_ties_go_to_the_pivot():
    assert fused_with("min_ce", whole(3, 1.0, 1.0)).winner == "pivot"
    assert fused_with(lambda ce_UM: np.full(ce_UM.shape, 0.5), whole(3, 1.0, 0.1)).winner == "pivot"
    assert fused_with("min_ce", each([0.5, 1.0], [1.0, 0.5]), votes=two_row_votes()).winner == "pivot"


def two_row_votes():
    return Vote("pivot", rows_of({1: 1.0}, {2: 1.0})), Vote("source", rows_of({3: 1.0}, {4: 1.0}))


def test_a_mixture_is_mixed_row_by_row():
    fused = fused_with(decided([0.25, 0.75]), whole(3, 1.0, 0.5))
    rows = as_dicts(fused.rows)
    assert rows[0] == pytest.approx({1: 0.25 * 0.5 + 0.75, 2: 0.125})
    assert rows[1] == {3: 1.0}  # the source is silent, so the pivot has the whole row
    assert rows[2] == pytest.approx({4: 0.25, 5: 0.75 * 0.25, 6: 0.75 * 0.75})
    assert fused.fallback_rows == 0
    assert fused.winner == "source"
    assert fused.rows_won == pytest.approx({"pivot": 0.75, "source": 2.25})


LOOSE = (Vote("pivot", rows_of({1: 0.5}, {3: 0.4})), Vote("source", rows_of({1: 0.2, 2: 0.2}, {})))


def test_rows_are_scaled_before_they_are_mixed_or_keep_their_tail():
    half = decided([0.5, 0.5])
    scale = as_dicts(fused_with(half, whole(2, 1, 1), votes=LOOSE).rows)
    assert scale == [pytest.approx({1: 0.5 + 0.25, 2: 0.25}), {3: 1.0}]
    bucket = as_dicts(fused_with(half, whole(2, 1, 1), form=BUCKET, votes=LOOSE).rows)
    assert bucket == [pytest.approx({1: 0.25 + 0.1, 2: 0.1}), pytest.approx({3: 0.4})]
    ranks = as_dicts(fused_with(half, whole(2, 1, 1), form=RANKS, votes=LOOSE).rows)
    assert ranks == bucket  # sorted probabilities are never scaled


masses = st.dictionaries(st.integers(0, 9), st.sampled_from([0.02, 0.1, 0.2]), max_size=4)
votes = st.integers(1, 4).flatmap(
    lambda rows: st.lists(st.lists(masses, min_size=rows, max_size=rows), min_size=1, max_size=3)
)


@given(votes, st.sampled_from(["gold", "pivot", "skip"]), st.sampled_from(["scale", "bucket"]), st.data())
def test_every_row_is_the_mixture_of_those_that_speak(tables, fallback, tail, data):
    rows, models = len(tables[0]), len(tables)
    of_R = np.asarray(data.draw(st.lists(st.integers(0, 2), min_size=rows, max_size=rows)))
    shares_UM = np.asarray(
        data.draw(
            st.lists(
                st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=models, max_size=models), min_size=3, max_size=3
            )
        )
    )
    shares_UM[shares_UM.sum(1) == 0, 0] = 1
    shares_UM /= shares_UM.sum(1, keepdims=True)
    given_votes = [Vote(str(number), rows_of(*table)) for number, table in enumerate(tables)]
    units = Units(of_R, np.ones((3, models)))
    references = np.arange(rows, dtype=np.int32)
    fused = fuse(given_votes, units, references, lambda ce_UM: shares_UM, fallback, TargetForm(tail=tail))

    def said(model, row):
        total = sum(tables[model][row].values()) if tail == "scale" else 1
        return {token: mass / total for token, mass in tables[model][row].items()}

    silent = 0
    for row, found in enumerate(as_dicts(fused.rows)):
        speakers = {model: shares_UM[of_R[row], model] for model in range(models) if tables[model][row]}
        total = sum(speakers.values())
        wanted = {}
        for model, share in speakers.items():
            for token, mass in said(model, row).items():
                wanted[token] = wanted.get(token, 0) + (mass * share / total if total else 0)
        if not total:
            silent += 1
            wanted = {"gold": {row: 1.0}, "pivot": said(0, row), "skip": {}}[fallback]
        assert found == pytest.approx({token: mass for token, mass in wanted.items() if mass > 0}, abs=1e-6)
    assert fused.fallback_rows == silent
    assert sum(fused.rows_won.values()) == pytest.approx(rows)


def teacher_rows():
    return TeacherRows(
        np.array([[4, 2], [9, -1]], dtype=np.int32),
        np.log(np.array([[0.6, 0.2], [0.5, 0.0]], dtype=np.float32), where=[[True, True], [True, False]],
               out=np.full((2, 2), -np.inf, dtype=np.float32)),
        np.array([0.2, 0.5], dtype=np.float32),
        np.array([0.5, 3.0], dtype=np.float32),
    )  # fmt: skip


def test_the_pivots_own_rows_are_its_candidates_as_they_are():
    vote = pivot_vote("pivot", teacher_rows(), TargetKind())
    assert vote.name == "pivot"
    assert as_dicts(vote.rows) == [pytest.approx({4: 0.6, 2: 0.2}), pytest.approx({9: 0.5})]
    assert as_dicts(pivot_vote("pivot", teacher_rows(), RANKS.kind).rows) == [
        pytest.approx({0: 0.6, 1: 0.2}),
        pytest.approx({0: 0.5}),
    ]
    spans = as_dicts(pivot_vote("pivot", teacher_rows(), SPANS.kind).rows)
    assert spans == [pytest.approx({0: np.exp(-0.25)}), pytest.approx({1: np.exp(-1.5)})]


SPAN_VOTES = (
    Vote("pivot", rows_of(*({row: 0.9} for row in range(5)))),
    Vote("source", rows_of({0: 0.5}, {0: 0.5}, {2: 0.6}, {}, {4: 0.7})),
)


def test_a_span_is_chosen_as_a_whole_or_not_at_all():
    fused = fused_with("source_only", whole(5, 1, 1), form=SPANS, votes=SPAN_VOTES)
    assert as_dicts(fused.rows) == [pytest.approx(row) for row in ({0: 0.5}, {0: 0.5}, {2: 0.6}, {3: 1.0}, {4: 0.7})]
    units = Units(np.array([0, 1, 1, 1, 0]), np.array([[1.0, 2.0], [2.0, 1.0]]))  # cuts the first span
    fused = fused_with("min_ce", units, form=SPANS, votes=SPAN_VOTES)
    assert as_dicts(fused.rows) == [pytest.approx(row) for row in ({0: 0.9}, {1: 1.0}, {2: 0.6}, {3: 1.0}, {4: 0.9})]
    assert fused.fallback_rows == 2


def test_spans_of_different_models_are_not_mixed():
    with pytest.raises(UserError, match=r"fusion\.name.*spans of different models cannot be mixed"):
        fused_with("avg_ce", whole(5, 1, 1), form=SPANS, votes=SPAN_VOTES)
    assert fused_with("avg_ce", whole(5, 1, np.inf), form=SPANS, votes=SPAN_VOTES).winner == "pivot"


@pytest.mark.parametrize("kind", ["ranks", "spans"])
def test_only_tokens_are_chosen_token_by_token(kind):
    TargetForm().refuse_level("token")
    form = TargetForm(TargetKind(kind))
    form.refuse_level("span")
    with pytest.raises(UserError, match=rf"fusion\.level=token .* {kind}"):
        form.refuse_level("token")


def test_a_form_comes_back_from_its_description():
    for form in (TargetForm(), BUCKET, SPANS, RANKS):
        assert TargetForm.from_json(form.to_json()) == form
    for wrong in ({}, {"kind": "spans", "tail": "scale"}, {"kind": {"name": "spans"}, "tail": "none"}):
        with pytest.raises(UserError, match="prepare them again"):
            TargetForm.from_json(wrong)


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "my_fusion.py").write_text("NUMBER = 3\ndef second(ce_UM):\n    return [[0.0, 1.0] for _ in ce_UM]\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert fused_with("my_fusion.second", whole(3, 1, 1), "skip").winner == "source"
    for name in ("my_fusion.third", "my_fusion.NUMBER", "my_fusion.second.deeper"):
        with pytest.raises(UserError, match=f"fusion.name={name}"):
            fusion_function(name)


@pytest.mark.parametrize("name", ["nope", "", ".", "..x", "min-ce", "no.such.module", "fusion_functions"])
def test_an_unknown_function_is_the_users_problem(name):
    with pytest.raises(UserError, match=r"fusion\.name="):
        fusion_function(name)


@pytest.mark.parametrize(
    "shares",
    [
        [[0.0, 0.0]], [[1.0]], [[0.5, 0.5, 0.0]], [[-0.5, 1.5]], [[float("nan"), 1.0]], [[2.0, 2.0]], None,
        [0.0, 1.0], [[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0]], "shares", [["a", "b"]],
    ],
)  # fmt: skip
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(UserError, match=r"fusion\.name"):
        fused_with(lambda ce_UM: shares, whole(3, 1.0, 0.5))


def test_the_unit_with_wrong_shares_is_named():
    with pytest.raises(UserError, match=r"\[3\.0, 0\.5\].*gave \[0\.5, 0\.0\]"):
        fused_with(decided([1, 0], [0.5, 0], [1, 0]), each([1, 2], [3.0, 0.5], [1, 2]))


def test_the_share_of_kept_dialogues():
    names = [hashlib.sha256(str(number).encode()).hexdigest()[:32] for number in range(2000)]
    kept = {share: {name for name in names if is_kept(name, share)} for share in (0.0, 0.3, 0.6, 1.0)}
    assert not kept[0.0]
    assert kept[1.0] == set(names)
    assert kept[0.3] < kept[0.6]
    assert 500 < len(kept[0.3]) < 700
    assert all(is_kept(name, 0.3) == (name in kept[0.3]) for name in reversed(names))
