"""The length-controlled win rate against the published program's, and against what it is meant to remove."""

import math

import numpy as np
import pytest
from alpaca_annotations import annotations, write_gamed

from fusion.config import UserError
from fusion.evaluation.length_control import fit, length_controlled, read_gamed

# Measured with alpaca_eval 0.6.6 (get_length_controlled_winrate, length_controlled_v1) on these annotations.
# seed, items, skill, effect of length, win rate, length-controlled win rate, weights of length, difficulty and model
PUBLISHED = [
    (0, 160, -0.5, 1.0, 38.595742, 40.694712, (-0.727788, -0.392453, -0.381511)),
    (1, 200, 0.3, 0.2, 54.476322, 55.065217, (-0.225573, -0.520335, 0.176586)),
]
# Here penalties are equally good to the sixth decimal, and the program's solver, which stops earlier, takes another.
FLAT = (2, 160, -3.0, 0.8, 7.167505, 7.206527)


def controlled(tmp_path, seed, num_items, skill, effect, with_gamed=True):
    drawn = annotations(seed, num_items, skill, effect)
    write_gamed(tmp_path / "df_gamed.csv", seed + 100, drawn["difficulty"])
    gamed = read_gamed(tmp_path / "df_gamed.csv") if with_gamed else None
    columns = (drawn["preference"], drawn["lengths"], drawn["baseline_lengths"])
    return drawn, length_controlled(*columns, range(num_items), gamed)


@pytest.mark.parametrize("case", PUBLISHED, ids=lambda case: f"seed {case[0]}")
def test_as_the_published_program(tmp_path, case):
    *drawn_by, win_rate, expected, weights = case
    drawn, found = controlled(tmp_path, *drawn_by)
    assert 100 * drawn["preference"].mean() == pytest.approx(win_rate, abs=1e-5)
    assert 100 * found.win_rate == pytest.approx(expected, abs=0.002)
    assert tuple(found.weights.values()) == pytest.approx(weights, abs=2e-4)
    assert found.is_published


def test_as_the_published_program_where_penalties_are_equally_good(tmp_path):
    _, found = controlled(tmp_path, *FLAT[:4])
    assert 100 * found.win_rate == pytest.approx(FLAT[5], abs=0.05)


def test_weights_are_the_minimum_of_the_definition():
    """No small step lowers |w| + C * sum of weighted cross-entropies."""
    rng = np.random.default_rng(0)
    features, preferences, weights = rng.normal(size=(50, 3)), rng.random(50), rng.random(50)

    def loss(w, penalty):
        logits = features @ w
        return np.abs(w).sum() + penalty * (weights * (np.logaddexp(0, logits) - preferences * logits)).sum()

    for penalty in (0.3, 3.0, 300.0):
        found = fit(features, preferences, weights, penalty)
        for step in rng.normal(0, 1e-3, size=(200, 3)):
            assert loss(found + step, penalty) > loss(found, penalty)
    assert fit(features, preferences, weights, 0.01).tolist() == [0, 0, 0]


def test_one_feature_by_hand():
    """Only the model, equal preferences of 0.8, no penalty to speak of: the win rate is 80% at any length."""
    found = length_controlled(np.full(20, 0.8), np.full(20, 10), np.full(20, 10), range(20), None)
    assert found.win_rate == pytest.approx(0.8, abs=1e-4)
    assert not found.is_published


def test_it_takes_away_what_length_gives(tmp_path):
    """A model no better than the baseline, whose answers are longer, for a judge that likes length."""
    rng = np.random.default_rng(1)
    baseline = rng.integers(500, 1500, 400)
    lengths = (baseline * rng.uniform(0.8, 2.0, 400)).astype(int)
    delta = baseline - lengths
    preferences = 1 / (1 + np.exp(1.5 * np.tanh(delta / delta.std(ddof=1))))
    found = length_controlled(preferences, lengths, baseline, range(400), None)
    assert preferences.mean() > 0.6
    assert found.win_rate == pytest.approx(0.5, abs=0.01)
    assert found.interval[0] <= found.win_rate <= found.interval[1]


def test_what_has_no_preference_teaches_nothing(tmp_path):
    drawn = annotations(3, 100, 0.5, 0.5)
    lengths, baseline = drawn["lengths"].copy(), drawn["baseline_lengths"]
    preferences = drawn["preference"].copy()
    preferences[50:] = math.nan
    found = length_controlled(preferences, lengths, baseline, range(100), None)
    assert 0 < found.win_rate < 1


def test_another_table_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"other.csv: not the published df_gamed.csv"):
        read_gamed(tmp_path / "other.csv")
