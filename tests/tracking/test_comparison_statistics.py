"""Intervals and spread, against published numbers."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.tracking.statistics import average_interval, estimate, student_quantile, wilson_interval


def test_wilson_interval_of_a_published_example():
    low, high = wilson_interval(0.1, 10)
    assert (low, high) == pytest.approx((0.0179, 0.4042), abs=1e-4)


@given(st.integers(1, 2000), st.floats(0, 1))
def test_wilson_interval_contains_the_share_and_stays_a_share(num_items, share):
    low, high = wilson_interval(share, num_items)
    assert 0 <= low <= share <= high <= 1
    assert high > low


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (10, 2.228), (11, 2.2010), (20, 2.0860), (120, 1.9799)]
)
def test_student_quantiles(freedom, quantile):
    assert student_quantile(freedom) == pytest.approx(quantile, abs=5e-4)


def test_average_interval_shrinks_with_skills_and_needs_every_count():
    one = average_interval({"a": 0.5}, {"a": 100})
    assert one == pytest.approx((0.402, 0.598), abs=1e-3)
    two = average_interval({"a": 0.5, "b": 0.5}, {"a": 100, "b": 100})
    assert two[1] - two[0] == pytest.approx((one[1] - one[0]) / math.sqrt(2))
    assert average_interval({"a": 0.5, "b": 0.5}, {"a": 100}) is None


def test_seeds_that_agree_do_not_shrink_the_interval_of_the_questions():
    agreeing = estimate([0.6, 0.6, 0.6], (0.5, 0.7), share=True)
    assert (agreeing.mean, agreeing.sd) == (pytest.approx(0.6), pytest.approx(0.0))
    assert agreeing.interval == pytest.approx((0.5, 0.7))
    spread = estimate([0.5, 0.9], (0.6, 0.8), share=True)
    assert spread.interval == (0.0, 1.0)  # Student's t with one degree of freedom, kept within 0 and 1
    assert estimate([None, None]).mean is None
