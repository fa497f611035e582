"""Units of fusion: the same text for all models, and every model's surprise at it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sparse_tables import rows_of
from tiny_models import encoder

from fusion.dialogues.dialogue import chat
from fusion.objective.units import Reading, dialogue_units, span_units, token_units
from fusion.teaching.store import TeacherRows


def reading(ends, nll, num_bytes=None):
    nll_R = np.asarray(nll, dtype=np.float32)
    ends_R = np.asarray(ends, dtype=np.int64)
    return Reading(ends_R, nll_R, float(nll_R.sum(dtype=np.float64)), ends_R.max() if num_bytes is None else num_bytes)


def test_spans_end_where_all_models_end_a_token():
    pivot = reading([2, 4, 6, 7, 8], [1, 2, 3, 4, 5])
    source = reading([1, 4, 5, 7, 8], [1, 1, 1, 1, 1])
    units = span_units([pivot, source], "byte")
    assert units.of_R.tolist() == [0, 0, 1, 1, 2]
    assert units.ce_UM.tolist() == [[3 / 4, 2 / 4], [7 / 3, 2 / 3], [5, 1]]
    by_token = span_units([pivot, source], "token")
    assert by_token.ce_UM.tolist() == [[1.5, 1], [3.5, 1], [5, 1]]
    third = reading([8], [4])
    assert span_units([pivot, source, third], "byte").ce_UM.tolist() == [[15 / 8, 5 / 8, 4 / 8]]


def test_unknown_ends_join_the_unit_around_them():
    pivot = reading([-1, 4, -1, -1, 8, -1], [1, 2, 4, 8, 16, 32], num_bytes=9)
    source = reading([4, 6, 8], [1, 1, 1])
    units = span_units([pivot, source], "token")
    assert units.of_R.tolist() == [0, 0, 1, 1, 1, 1]
    assert units.ce_UM.tolist() == [[3 / 2, 1], [60 / 4, 2 / 2]]


def test_what_is_cut_at_different_bytes_belongs_to_the_last_unit():
    long, short = reading([3, 5, 7, 20], [1, 1, 1, 7]), reading([3, 4, 5], [1, 1, 1])
    units = span_units([long, short], "byte")
    assert units.of_R.tolist() == [0, 1, 1, 1]
    assert units.ce_UM.tolist() == [[1 / 3, 1 / 3], [9 / 17, 2 / 2]]
    assert span_units([short, long], "byte").of_R.tolist() == [0, 1, 1]


def test_without_shared_boundaries_the_dialogue_is_the_unit():
    pivot, source = reading([2, 4, -1], [1, 2, 3], num_bytes=6), reading([3, 5], [1, 1])
    for unit in ("byte", "token"):
        spans, whole = (make([pivot, source], unit) for make in (span_units, dialogue_units))
        assert spans.of_R.tolist() == whole.of_R.tolist() == [0, 0, 0]
        assert spans.ce_UM.tolist() == whole.ce_UM.tolist()
    assert whole.ce_UM.tolist() == [[2, 1]]
    assert dialogue_units([pivot, source], "byte").ce_UM.tolist() == [[1, 0.4]]


ends = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(sorted)


@given(st.lists(st.tuples(ends, st.floats(0, 1)), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_spans_are_what_a_slow_search_finds(models, random):
    readings = []
    for model_ends, unknown in models:
        hidden = [-1 if random.random() < unknown * 0.5 else end for end in model_ends]
        nll = [random.randint(0, 9) for _ in hidden]
        readings.append(reading(hidden, nll, model_ends[-1]))
    units = span_units(readings, "byte")
    shared = sorted(set.intersection(*({end for end in one.ends_R.tolist() if end > 0} for one in readings)))
    bounds = shared or [12]
    for number, one in enumerate(readings):
        totals, place = [0.0] * len(bounds), 0
        for row, (_, nll) in enumerate(zip(one.ends_R.tolist(), one.nll_R.tolist(), strict=True)):
            known = [later for later in one.ends_R.tolist()[row:] if later > 0]
            place = min([u for u, bound in enumerate(bounds) if known and known[0] <= bound], default=len(bounds) - 1)
            assert number or units.of_R[row] == place
            totals[place] += nll
        starts = [0, *bounds[:-1]]
        stops = [*bounds[:-1], max(one.num_bytes, shared[-1]) if shared else one.num_bytes]
        wanted = [total / (stop - start) for total, start, stop in zip(totals, starts, stops, strict=True)]
        np.testing.assert_allclose(units.ce_UM[:, number], wanted)


def test_the_units_of_real_tokenisers_tile_the_dialogue():
    dialogue = chat("Which river?", "The answer is yes, 北京 👍🏽. " * 3, "and?", "no tokeniser agrees")
    encoded = [encoder(family, "openchat").encode(dialogue) for family in ("metaspace", "byte_level")]
    rng = np.random.default_rng(0)
    nothing = np.zeros((0, 1))
    teachers = [
        TeacherRows(nothing, nothing, nothing, rng.random(len(one.rows_R)).astype(np.float32)) for one in encoded
    ]
    readings = [Reading.of(tokens, teacher) for tokens, teacher in zip(encoded, teachers, strict=True)]
    units = span_units(readings, "token")
    count = len(units.ce_UM)
    assert 5 < count < min(len(one.rows_R) for one in encoded)
    assert np.unique(units.of_R).tolist() == list(range(count))
    assert (np.diff(units.of_R) >= 0).all()
    sizes_UM = np.column_stack([np.bincount(span_units([one, other], "token").of_R) for one, other in
                                (readings, readings[::-1])])  # fmt: skip
    np.testing.assert_allclose((units.ce_UM * sizes_UM).sum(0), [one.total_nll for one in readings], rtol=1e-6)
    # the first unit of the second turn starts where the first one's end-of-turn ends: both models agree there
    assert readings[0].ends_R[-1] == readings[1].ends_R[-1] == readings[0].num_bytes


def test_a_token_is_judged_by_the_mass_that_rows_give_to_the_reference():
    pivot = reading([1, 2, 3, 4], [0.5, 1.0, 2.0, 3.0])
    source = rows_of({7: 0.25, 1: 0.5}, {}, {2: 0.9}, {9: 0.125})
    other = rows_of({7: 1.0}, {8: 0.5}, {}, {8: 0.5})
    units = token_units(pivot, np.array([7, 8, 3, 9]), [source, other])
    assert units.of_R.tolist() == [0, 1, 2, 3]
    wanted = [[0.5, np.log(4), 0], [1, np.inf, np.log(2)], [2, np.inf, np.inf], [3, np.log(8), np.inf]]
    np.testing.assert_allclose(units.ce_UM, wanted, rtol=1e-6, atol=1e-12)


def test_a_rounded_store_does_not_decide_whole_dialogues():
    tokens = encoder("metaspace", "openchat").encode(chat("q", "yes yes"))
    nll_R = np.full(len(tokens.rows_R), 0.5, dtype=np.float32)
    nothing = np.zeros((0, 1))
    exact = Reading.of(tokens, TeacherRows(nothing, nothing, nothing, nll_R, exact_nll=1.25))
    assert dialogue_units([exact], "token").ce_UM.tolist() == [[1.25 / len(nll_R)]]
    plain = Reading.of(tokens, TeacherRows(nothing, nothing, nothing, nll_R))
    assert dialogue_units([plain], "byte").ce_UM.tolist() == [[0.5 * len(nll_R) / tokens.num_bytes]]


@pytest.mark.parametrize("make", [dialogue_units, span_units])
def test_a_likelihood_that_is_no_number_loses(make):
    broken = reading([1, 2], [np.nan, 1.0])
    units = make([broken, reading([1, 2], [9.0, 9.0])], "byte")
    assert units.ce_UM[0].tolist() == [np.inf, 9.0]
