"""`alm`: likelihoods of spans; `uld`: sorted probabilities."""

from itertools import pairwise

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_pairs import CORPUS, PAIRS, make_pairs, read_sides, teacher_of, wrap
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fusion.alignment import Rows, TargetKind, build_alignment
from fusion.config import UserError
from fusion.teaching.store import TeacherRows

dialogues = st.lists(texts, min_size=1, max_size=2)


@pytest.fixture(scope="module")
def built(pivot, source):
    return {
        (name, kind): build_alignment(name, pair.pivot_tokenizer, pair.source_tokenizer)
        for kind, pair in make_pairs(pivot, source).items()
        for name in ("alm", "uld")
    }


def nlls(rows: Rows, seed: int) -> TeacherRows:
    return teacher_of(rows, 300, seed, width=2)


@pytest.mark.parametrize("kind", PAIRS)
@settings(max_examples=30, deadline=None)
@given(turns=dialogues, seed=st.integers(0, 99))
def test_spans_hold_all_that_lies_between_shared_places(built, kind, turns, seed):
    alignment = built["alm", kind]
    ids = encode(alignment.pair, turns)
    sides = read_sides(alignment.pair, *ids, turns)
    assume(sides is not None)
    pivot, source = alignment.pair.rows(*ids)
    assume(min(pivot.ends) >= 0)
    teacher, wanted, stored = nlls(source, seed), np.arange(len(pivot) - 1), np.arange(len(source) - 1)
    spoken = alignment.speak(pivot, source, teacher, wanted, stored)
    ours, theirs = (side.read for side in sides)
    shared = sorted({*ours} & {*theirs}, key=len)
    span_of = {}
    for begin, end in pairwise(shared):
        rows = [r for r in wanted.tolist() if len(begin) <= len(ours[r]) < len(end)]
        others = [s for s in stored.tolist() if len(begin) <= len(theirs[s]) < len(end)]
        span_of |= {row: (rows[0], float(np.exp(-teacher.nll_R[others].sum() / 100.0))) for row in rows}
    ids, weights = (side[:, 0] for side in spoken.targets.padded(1))
    assert np.flatnonzero(~spoken.targets.is_empty_R).tolist() == sorted(span_of)
    assert np.flatnonzero(spoken.rows_R >= 0).tolist() == sorted(span_of)
    for row, (first, likelihood) in span_of.items():
        assert ids[row] == first
        assert weights[row] == pytest.approx(likelihood, rel=1e-5)


def test_nll_sums_are_those_of_both_sides(built):
    """What the spans say of the source, and what the pivot's rows of a span sum to, are the whole of both."""
    alignment = built["alm", "pieces<-bytes"]
    rows, others = alignment.pair.rows(*encode(alignment.pair, ["The ratio of poles", "is 1:3. 北京"]))
    own, teacher = nlls(rows, 1), nlls(others, 2)
    wanted, stored = np.arange(2, len(rows) - 1), np.arange(len(others) - 1)
    spoken = alignment.speak(rows, others, teacher, wanted, stored)
    assert not spoken.targets.is_empty_R.any()
    spans, first = np.unique(spoken.targets.ids_E, return_index=True)
    assert np.array_equal(spans, first)
    assert len(spans) < len(wanted)
    told = -100.0 * np.log(spoken.targets.weights_E[first].astype(np.float64))
    assert told.sum() == pytest.approx(teacher.nll_R.sum(), rel=1e-4)
    sums = np.bincount(spoken.targets.ids_E, own.nll_R[wanted])
    assert sums[spans].sum() == pytest.approx(own.nll_R[wanted].sum())


def test_a_twin_has_one_span_per_token(pivot):
    alignment = build_alignment("alm", pivot, pivot, temperature=2.0)
    ids = pivot("The ratio of 北京 poles").input_ids
    rows, others = alignment.pair.rows(ids, ids)
    teacher, every = nlls(others, 1), np.arange(len(ids) - 1)
    spoken = alignment.speak(rows, others, teacher, every, every)
    assert spoken.targets.ids_E.tolist() == spoken.rows_R.tolist() == every.tolist()
    assert spoken.targets.weights_E == pytest.approx(np.exp(-teacher.nll_R / 2.0), rel=1e-5)
    own = alignment.kind.own(teacher)
    assert np.allclose(spoken.targets.weights_E, own.weights_E)
    assert alignment.kind == TargetKind("spans", 2.0)


def test_spans_with_text_that_one_side_does_not_supervise_are_empty():
    """Places 0 2 4 6 are shared; the template's tokens have no width and need not be supervised."""
    alignment = _alm()
    pivot = Rows.of([9, 9, 9, 9, 9, 9, 9], [0, 0, 1, 2, 4, 5, 6])
    source = Rows.of([9, 9, 9, 9, 9, 9], [0, 0, 2, 3, 4, 6])
    nll = np.array([1.0, 2.0, 4.0, 8.0])

    for wanted, stored, ids, sums in (
        ([1, 2, 3, 4, 5], [1, 2, 3, 4], [0, 0, 2, 3, 3], [1, 1, 6, 8, 8]),
        ([2, 3, 4, 5], [1, 2, 3, 4], [1, 2, 2], [6, 8, 8]),
        ([1, 2, 3, 4, 5], [1, 3, 4], [0, 0, 3, 3], [1, 1, 8, 8]),
        ([1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 2], [1, 1, 6]),
        ([], [1, 2], [], []),
        ([1, 2], [], [], []),
    ):
        rows = np.array(stored, dtype=np.int64)
        teacher = TeacherRows(np.zeros((len(rows), 1)), np.zeros((len(rows), 1)), nll[rows - 1], nll[rows - 1])
        targets = alignment.speak(pivot, source, teacher, np.array(wanted, dtype=np.int64), rows).targets
        assert targets.ids_E.tolist() == ids
        assert -np.log(targets.weights_E) == pytest.approx(sums, rel=1e-5)


def _alm():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=50, special_tokens=["<end>"]))
    tokenizer = wrap(backend, "<end>")
    return build_alignment("alm", tokenizer, tokenizer, temperature=1.0)


def test_unlikely_spans_keep_a_weight():
    alignment = _alm()
    rows = Rows.of([9, 9, 9], [0, 1, 2])
    teacher = TeacherRows(np.zeros((2, 1)), np.zeros((2, 1)), np.zeros(2), np.array([5000.0, 1.0]))
    targets = alignment.speak(rows, rows, teacher, np.arange(2), np.arange(2)).targets
    assert targets.ids_E.tolist() == [0, 1]
    assert targets.weights_E[0] > 0


def test_what_follows_the_last_shared_place_is_no_span():
    """As where one side is cut off: the last tokens end where the other has no row."""
    pivot, source = Rows.of([9, 9, 9, 9], [0, 1, 2, 3]), Rows.of([9, 9, 9, 9], [0, 1, 2, 4])
    teacher = TeacherRows(np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(3), np.ones(3))
    spoken = _alm().speak(pivot, source, teacher, np.arange(3), np.arange(3))
    assert spoken.rows_R.tolist() == [0, 1, -1]
    assert spoken.targets.is_empty_R.tolist() == [False, False, True]


def test_temperatures_are_above_zero(pivot):
    for wrong in (0, -1.0, "warm", float("nan")):
        with pytest.raises(UserError, match="temperature="):
            build_alignment("alm", pivot, pivot, temperature=wrong)


@pytest.mark.parametrize("kind", PAIRS)
@settings(max_examples=20, deadline=None)
@given(turns=dialogues, seed=st.integers(0, 99))
def test_ranks_are_the_sorted_probabilities(built, kind, turns, seed):
    alignment = built["uld", kind]
    pivot, source = alignment.pair.rows(*encode(alignment.pair, turns))
    teacher = teacher_of(source, len(alignment.pair.source), seed)
    wanted, stored = np.arange(len(pivot) - 1), np.arange(len(source) - 1)
    spoken = alignment.speak(pivot, source, teacher, wanted, stored)
    assert alignment.kind == TargetKind("ranks")
    _, weights = spoken.targets.padded(6)
    for row, other in enumerate(spoken.rows_R.tolist()):
        count = int(np.diff(spoken.targets.indptr_R)[row])
        if other < 0 or other == len(source) - 1:
            assert count == 0
            continue
        masses = np.sort(np.exp(teacher.logprobs_RK[other]))[::-1]
        assert count == int((masses > 0).sum())
        assert weights[row] == pytest.approx(masses, rel=1e-5)
        start = spoken.targets.indptr_R[row]
        assert spoken.targets.ids_E[start : start + count].tolist() == list(range(count))
