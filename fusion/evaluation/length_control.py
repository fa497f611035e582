"""The length-controlled win rate of AlpacaEval 2 (https://arxiv.org/abs/2404.04475).

A logistic regression explains the judge's preference by three things: the model, the difference in length to the
baseline, and how hard the instruction is. The win rate is what it predicts where lengths are equal. As published: an
L1 penalty whose strength is chosen by five-fold cross-validation, and two "gamed" baselines (answers made longer and
shorter on purpose), at a tenth of the weight each, that hold the effect of length in place.

Array legend: I items, F features, A annotations (items and gamed ones).
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import expit

from fusion.config import UserError

GAMED_WEIGHT = 0.2 / 2
INVERSE_PENALTIES = np.logspace(-4, 4, 10)
NUM_FOLDS = 5
FEWEST_ITEMS = 20
"""Preferences with which the regression is worth its name."""
NUM_DRAWS = 200
MOST_ROUNDS, MOST_INNER_ROUNDS, MOST_HALVINGS = 200, 100, 40
TOLERANCE, TINY = 1e-12, 1e-12
GAMED_COLUMNS = ("preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline")


@dataclass(frozen=True)
class Gamed:
    """What is published beside the regression: annotations of the gamed baselines, and difficulties."""

    preferences_A: np.ndarray
    """float64 from 0 (the baseline is better) to 1; NaN where there is none."""
    deltas_A: np.ndarray
    """float64: differences in length over their standard deviation."""
    difficulties_A: np.ndarray
    not_gamed_A: np.ndarray
    """bool: the annotation's second feature, the model, is present."""
    difficulty: Mapping[int, float]
    """By the instruction's place in the benchmark."""


@dataclass(frozen=True)
class LengthControlled:
    win_rate: float
    """Share of 1."""
    interval: tuple[float, float]
    """95%, by a bootstrap over items that fits anew with the chosen penalty."""
    weights: Mapping[str, float]
    inverse_penalty: float
    is_published: bool
    """Difficulties and gamed baselines took part; else lengths alone."""


def read_gamed(path: Path) -> Gamed:
    """Read `df_gamed.csv`; raises UserError where columns or numbers are missing."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [row[name] for row in rows] for name in GAMED_COLUMNS}
        numbers = {name: np.array([float(one or "nan") for one in columns[name]]) for name in GAMED_COLUMNS[:4]}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not the published df_gamed.csv: {error!r}; a table with {GAMED_COLUMNS}") from error
    difficulties = numbers["instruction_difficulty"]
    difficulty: dict[int, float] = {}
    for index, value in zip(numbers["index"].astype(int).tolist(), difficulties.tolist(), strict=True):
        difficulty.setdefault(index, value)
    not_gamed_A = np.array([one == "True" for one in columns["not_gamed_baseline"]])
    return Gamed(numbers["preference"], numbers["std_delta_len"], difficulties, not_gamed_A, difficulty)


def length_controlled(
    preferences_I: np.ndarray,
    lengths_I: np.ndarray,
    baseline_lengths_I: np.ndarray,
    indices_I: Sequence[int],
    gamed: Gamed | None,
    seed: int = 0,
) -> LengthControlled:
    """Win rate at equal lengths. Preferences go from 0 (baseline) to 1 (model); NaN ones teach nothing.

    Without `gamed`, or for questions that it does not know, the regression is on lengths alone: not the published one.
    """
    deltas_I = baseline_lengths_I.astype(np.float64) - lengths_I
    spread = float(deltas_I.std(ddof=1)) if len(deltas_I) > 1 else 0.0
    features_IF = [np.tanh(deltas_I / spread if spread else deltas_I)]
    names = ["length"]
    known = gamed if gamed is not None and all(index in gamed.difficulty for index in indices_I) else None
    if known is not None:
        features_IF.append(np.array([known.difficulty[index] for index in indices_I]))
        names.append("difficulty")
    own_IF = np.stack([*features_IF, np.ones(len(deltas_I))], axis=1)
    names.append("model")
    equal_IF = own_IF.copy()
    equal_IF[:, 0] = 0.0
    features_AF, preferences_A, weights_A = _training(own_IF, preferences_I, known)
    inverse_penalty = _chosen_penalty(features_AF, preferences_A, weights_A)
    fitted_F = fit(features_AF, preferences_A, weights_A, inverse_penalty)
    win_rate = float(expit(equal_IF @ fitted_F).mean())
    interval = _interval(own_IF, equal_IF, preferences_I, known, inverse_penalty, seed)
    fitted = dict(zip(names, fitted_F.tolist(), strict=True))
    return LengthControlled(win_rate, interval, fitted, inverse_penalty, known is not None)


def _training(
    own_IF: np.ndarray, preferences_I: np.ndarray, gamed: Gamed | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, preferences and weights of all annotations that have a preference; the gamed ones first."""
    features, preferences, weights = [own_IF], [preferences_I], [np.ones(len(own_IF))]
    if gamed is not None:
        model_A = gamed.not_gamed_A.astype(np.float64)
        features.insert(0, np.stack([np.tanh(gamed.deltas_A), gamed.difficulties_A, model_A], axis=1))
        preferences.insert(0, gamed.preferences_A)
        weights.insert(0, np.where(gamed.not_gamed_A, 1.0, GAMED_WEIGHT))
    features_AF, preferences_A, weights_A = map(np.concatenate, (features, preferences, weights))
    known_A = ~np.isnan(preferences_A)
    return features_AF[known_A], preferences_A[known_A], weights_A[known_A]


def fit(
    features_AF: np.ndarray, preferences_A: np.ndarray, weights_A: np.ndarray, inverse_penalty: float
) -> np.ndarray:
    """Weights [F] that minimise |w| + C * sum of weighted cross-entropies, without intercept.

    Proximal Newton steps: the cross-entropy is replaced by its parabola, whose minimum with the penalty is found, and
    the step is halved until the loss falls (https://doi.org/10.1137/130921428).
    """
    weights_A = weights_A * inverse_penalty
    fitted_F = np.zeros(features_AF.shape[1])
    loss = _loss(fitted_F, features_AF, preferences_A, weights_A)
    for _ in range(MOST_ROUNDS):
        chances_A = expit(features_AF @ fitted_F)
        slope_F = features_AF.T @ (weights_A * (chances_A - preferences_A))
        curvature_FF = (features_AF.T * (weights_A * chances_A * (1 - chances_A))) @ features_AF
        curvature_FF += (1e-9 * np.trace(curvature_FF) + TINY) * np.eye(len(fitted_F))
        step_F = _penalised_minimum(fitted_F, slope_F, curvature_FF) - fitted_F
        for halvings in range(MOST_HALVINGS):
            next_F = fitted_F + step_F / 2**halvings
            next_loss = _loss(next_F, features_AF, preferences_A, weights_A)
            if next_loss <= loss:
                break
        if next_loss > loss:
            break
        fitted_F, gain, loss = next_F, loss - next_loss, next_loss
        if gain <= TOLERANCE * loss:  # not by the weights: where features say the same, many are equally good
            break
    return fitted_F


def _penalised_minimum(start_F: np.ndarray, slope_F: np.ndarray, curvature_FF: np.ndarray) -> np.ndarray:
    """Where |w| plus the parabola of this slope and curvature at `start_F` is smallest, weight after weight."""
    found = start_F.tolist()
    slope, curvature = slope_F.tolist(), curvature_FF.tolist()
    for _ in range(MOST_INNER_ROUNDS):
        largest = 0.0
        for place, row in enumerate(curvature):
            aim = found[place] - slope[place] / row[place]
            new = math.copysign(max(0.0, abs(aim) - 1 / row[place]), aim)
            moved = new - found[place]
            slope = [one + moved * curved for one, curved in zip(slope, row, strict=True)]
            found[place], largest = new, max(largest, abs(moved))
        if largest < 1e-10:
            break
    return np.array(found)


def _loss(fitted_F: np.ndarray, features_AF: np.ndarray, preferences_A: np.ndarray, weights_A: np.ndarray) -> float:
    logits_A = features_AF @ fitted_F
    return float(np.abs(fitted_F).sum() + weights_A @ (np.logaddexp(0, logits_A) - preferences_A * logits_A))


def _chosen_penalty(features_AF: np.ndarray, preferences_A: np.ndarray, weights_A: np.ndarray) -> float:
    """The inverse penalty with the lowest mean loss on annotations that a fit has not seen; the smallest of equals."""
    fold_A = np.arange(len(preferences_A)) % NUM_FOLDS
    losses = []
    for inverse_penalty in INVERSE_PENALTIES:
        by_fold = []
        for fold in range(NUM_FOLDS):
            out_A = fold_A == fold
            if out_A.all() or not out_A.any():
                continue
            found_F = fit(features_AF[~out_A], preferences_A[~out_A], weights_A[~out_A], inverse_penalty)
            logits_A = features_AF[out_A] @ found_F
            losses_A = np.logaddexp(0, logits_A) - preferences_A[out_A] * logits_A
            by_fold.append(float((losses_A * weights_A[out_A]).mean()))
        losses.append(float(np.mean(by_fold)) if by_fold else 0.0)
    return float(INVERSE_PENALTIES[int(np.argmin(losses))])


def _interval(
    own_IF: np.ndarray,
    equal_IF: np.ndarray,
    preferences_I: np.ndarray,
    gamed: Gamed | None,
    inverse_penalty: float,
    seed: int,
) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    rates = []
    for _ in range(NUM_DRAWS):
        drawn_I = rng.integers(0, len(own_IF), len(own_IF))
        training = _training(own_IF[drawn_I], preferences_I[drawn_I], gamed)
        rates.append(float(expit(equal_IF[drawn_I] @ fit(*training, inverse_penalty)).mean()))
    low, high = np.quantile(rates, [0.025, 0.975])
    return float(low), float(high)
