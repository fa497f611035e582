"""Tests and intervals keep what they promise: measured on simulated models whose true difference is known."""

import math

import numpy as np
import pytest

from fusion.evaluation.statistics import (
    bootstrap_interval,
    bootstrap_means,
    detectable_effect,
    holm,
    items_needed,
    levelled,
    measure,
    permutation_p_values,
    sample,
)

REPETITIONS = 4000
NAMES = np.arange(90) % 6


def drawn(rng, shape, kind):
    """Differences of two equally good models: of judges' marks, of right and wrong answers, of skewed losses."""
    if kind == "marks":
        return rng.normal(size=shape) + rng.normal(size=shape)
    if kind == "answers":
        ability = rng.beta(2, 2, size=shape)
        return (rng.random(shape) < ability).astype(float) - (rng.random(shape) < ability)
    return rng.exponential(size=shape) - rng.exponential(size=shape)


@pytest.mark.parametrize("kind", ["marks", "answers", "losses"])
def test_permutation_test_is_wrong_in_five_percent(kind):
    rng = np.random.default_rng(1)
    differences = drawn(rng, (REPETITIONS, 240), kind)
    p_values = permutation_p_values(differences, rng, 1000)
    assert 0.04 <= (p_values < 0.05).mean() <= 0.06


def test_models_of_other_strengths_and_one_average():
    """One model is far better in half of the categories and as much worse in the others: no difference on average."""
    rng = np.random.default_rng(9)
    effects = np.where(NAMES % 2, 0.9, -0.9)
    groups, weights = NAMES.astype(int), np.ones(90)
    level = [levelled(effects + rng.normal(0, 0.4, 90), groups, weights) / 90 for _ in range(REPETITIONS)]
    assert 0.04 <= (permutation_p_values(np.stack(level), rng, 500) < 0.05).mean() <= 0.06
    better = [levelled(effects + 0.2 + rng.normal(0, 0.4, 90), groups, weights) / 90 for _ in range(200)]
    assert (permutation_p_values(np.stack(better), rng, 500) < 0.05).mean() > 0.95


def test_interval_and_p_value_agree():
    """The interval leaves 0 out when the test finds a difference, and else not, but for draws."""
    rng = np.random.default_rng(10)
    effects = np.where(NAMES % 2, 0.9, -0.9)
    found = [measure(sample([effects + 0.1 + rng.normal(0, 0.4, 90)], [NAMES]), num_draws=500) for _ in range(300)]
    outside = [one for one in found if not one.interval[0] <= 0 <= one.interval[1]]
    inside = [one for one in found if one.interval[0] <= 0 <= one.interval[1]]
    assert min(len(outside), len(inside)) > 50
    assert max(one.p_value for one in outside) < 0.15
    assert min(one.p_value for one in inside) > 0.01


def test_permutation_test_finds_what_it_should_find():
    """With a true difference as large as the detectable effect, four of five repetitions are significant."""
    rng = np.random.default_rng(2)
    effect = detectable_effect(math.sqrt(2 / 100))
    differences = drawn(rng, (2000, 100), "marks") + effect
    assert (permutation_p_values(differences, rng, 1000) < 0.05).mean() == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("kind", ["marks", "answers", "losses"])
def test_bootstrap_intervals_hold_the_truth(kind):
    rng = np.random.default_rng(3)
    weights = rng.uniform(0.5, 2, 90)
    hits = []
    for _ in range(2000):
        values = drawn(rng, 90, kind)
        mean = sample([values], [NAMES], [weights]).mean
        low, high = bootstrap_interval(bootstrap_means(values, NAMES, weights, rng, 1000), mean, 84)
        hits.append(low <= 0 <= high)
    assert 0.93 <= np.mean(hits) <= 0.97


def seeds_and_items(rng, seed_sd, item_sd, noise_sd, num_seeds, num_items, crossed):
    items = rng.normal(0, item_sd, (1 if crossed else num_seeds, num_items))
    noise = rng.normal(0, noise_sd, (num_seeds, num_items))
    return rng.normal(0, seed_sd, (num_seeds, 1)) + items + noise


@pytest.mark.parametrize("crossed", [True, False], ids=["crossed", "nested"])
@pytest.mark.parametrize("spreads", [(0.0, 1.0, 0.5), (0.1, 1.0, 1.0), (0.3, 0.7, 0.7), (0.05, 0.0, 1.0)], ids=str)
@pytest.mark.parametrize("num_seeds", [3, 8])
def test_intervals_over_seeds_and_items_hold_the_truth(spreads, crossed, num_seeds):
    rng = np.random.default_rng(4)
    hits, wrong = [], []
    for _ in range(2000):
        values = seeds_and_items(rng, *spreads, num_seeds, 60, crossed)
        result = measure(sample(values, [NAMES[:60]] * num_seeds, crossed=crossed))
        hits.append(result.interval[0] <= 0 <= result.interval[1])
        wrong.append(result.p_value < 0.05)
    too_wide = crossed and not spreads[1]  # where items are all alike, the few seeds decide, and caution remains
    assert 0.93 <= np.mean(hits) <= (0.99 if too_wide else 0.97)
    assert np.mean(hits) == pytest.approx(1 - np.mean(wrong))


@pytest.mark.parametrize("num_items", [10, 60])
def test_seeds_that_agree_by_chance_prove_nothing(num_items):
    """Of rare differences two seeds often have equally many; their spread is not 0 for that."""
    rng = np.random.default_rng(11)
    sparse = (rng.random((2000, 2, num_items)) < 0.05) * 1.0 - (rng.random((2000, 2, num_items)) < 0.05)
    found = [measure(sample(values, crossed=False)) for values in sparse]
    agreed = [one for one in found if one.mean and one.p_value < 1e-9]
    assert not agreed
    assert np.mean([one.p_value < 0.05 for one in found]) <= 0.06


def test_items_alone_would_be_far_too_sure_of_seeds():
    """Why seeds count: the same data, read as if every seed were more questions."""
    rng = np.random.default_rng(5)
    values = [seeds_and_items(rng, 0.3, 0.7, 0.7, 3, 60, True) for _ in range(1000)]
    as_items = permutation_p_values(np.stack([one.mean(0) for one in values]), rng, 500)
    assert (as_items < 0.05).mean() > 0.3


def test_one_seed_by_hand():
    """Four items, all better: 2 of the 16 choices of signs are as extreme, none more; they count half."""
    result = measure(sample([[1.0, 2.0, 3.0, 4.0]]))
    assert result.mean == 2.5
    assert result.p_value == pytest.approx(1 / 16, abs=0.01)
    assert result.interval[0] > 0


def test_categories_weigh_alike_and_items_by_weight():
    result = measure(sample([[1.0, 1.0, 1.0, 0.0, 2.0]], [[0, 0, 0, 1, 1]], [[1.0, 1.0, 1.0, 3.0, 1.0]]))
    assert result.mean == pytest.approx((1 + 0.5) / 2)


def test_seeds_that_agree_leave_the_noise_of_items():
    values = np.random.default_rng(6).normal(0.3, 1, 80)
    one, three = measure(sample([values])), measure(sample([values] * 3))
    assert three.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(80))
    assert three.interval == pytest.approx(one.interval, abs=0.02)
    assert three.p_value == pytest.approx(one.p_value, abs=0.02)


def test_the_seed_decides_every_draw():
    data = sample([np.random.default_rng(7).normal(size=50)])
    assert measure(data, seed=3) == measure(data, seed=3) != measure(data, seed=4)


def test_no_difference_at_all():
    assert measure(sample([[0.0] * 5])).p_value == 1.0
    assert measure(sample([[0.0] * 5] * 3)).p_value == 1.0


def test_too_few_items_are_refused():
    with pytest.raises(ValueError, match="at least two items"):
        sample([[1.0]])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.2]) == pytest.approx([0.04, 0.09, 0.09, 0.2])
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_claim():
    p_values = np.random.default_rng(8).random((4000, 10))
    assert np.mean([min(holm(one)) < 0.05 for one in p_values]) == pytest.approx(0.05, abs=0.01)


def test_items_needed_is_the_inverse_of_the_detectable_effect():
    assert items_needed(0.1, 1.0) == 785  # (1.96 + 0.84)^2 / 0.1^2, the textbook's number
    assert detectable_effect(1 / math.sqrt(785)) == pytest.approx(0.1, abs=1e-4)
