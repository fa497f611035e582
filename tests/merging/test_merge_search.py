"""The line search over a merge's scale."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.config import UserError
from fusion.merging import search_scale


@given(minimum=st.floats(0.06, 60), start=st.floats(0.05, 64))
def test_the_minimum_of_a_valley_is_found(minimum: float, start: float) -> None:
    search = search_scale(lambda scale: math.log(scale / minimum) ** 2, start=start)
    assert abs(math.log(search.best / minimum)) < 0.03
    assert len(search.evaluations) < 30


@pytest.mark.parametrize(("slope", "end"), [(-1, 64.0), (1, 0.05)])
def test_a_slope_ends_at_the_limit(slope: int, end: float) -> None:
    assert search_scale(lambda scale: slope * scale).best == end


def test_every_scale_is_evaluated_once_within_the_limits_and_again_alike() -> None:
    calls: list[float] = []

    def loss(scale: float) -> float:
        calls.append(scale)
        return abs(scale - 1.7)

    search = search_scale(loss, lowest=0.5, highest=3.0)
    assert len(set(calls)) == len(calls)
    assert all(0.5 <= scale <= 3.0 for scale in calls)
    assert search.evaluations == [(scale, abs(scale - 1.7)) for scale in calls]
    assert search_scale(loss, lowest=0.5, highest=3.0) == search


def test_the_best_scale_seen_wins_even_when_the_curve_has_two_valleys() -> None:
    search = search_scale(lambda scale: min(abs(scale - 1), abs(scale - 1.5) + 0.1))
    assert search.best == 1.0


def test_a_flat_loss_keeps_the_start() -> None:
    assert search_scale(lambda scale: 1.0, start=1.5).best == 1.5


def test_a_loss_that_is_not_finite_counts_as_the_worst() -> None:
    assert search_scale(lambda scale: float("nan") if scale > 1 else -scale).best == 1.0
    with pytest.raises(UserError, match="not finite at any scale"):
        search_scale(lambda scale: math.inf)


def test_limits_that_make_no_sense() -> None:
    with pytest.raises(UserError) as caught:
        search_scale(lambda scale: scale, start=0, tolerance=0)
    assert len(caught.value.problems) == 2
