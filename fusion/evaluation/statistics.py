"""Is one model better than another, or is it noise? Paired tests and 95% intervals over items and seeds.

Items are the questions that both models answered; a seed is one repetition of whatever is drawn (training, sampling,
the world). Three designs, told apart by the data:

- one seed: permutation test (signs of the items' differences) and bootstrap over items, within categories;
- several seeds, the same items in each (crossed): variance components of seeds and items, Student's t with
  Satterthwaite's degrees of freedom (https://doi.org/10.2307/3002019). A bootstrap over a handful of seeds would be
  far too narrow;
- several seeds with items of their own (nested): Student's t over the seeds' means, which vary by items as well.

Array legend: S seeds, I items, N draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import stdtr, stdtrit

LEVEL = 0.05
POWER = 0.8
NUM_DRAWS = 10_000
DRAWS_AT_ONCE = 1_000
ROUNDING = 1e-12
"""Sums of the same numbers in another order differ by this share at most."""
"""Bounds the memory of resampling: so many draws exist at the same time."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Sample:
    """What one model scored, or by how much one scored more than another, per seed and item."""

    values: tuple[np.ndarray, ...]
    """Per seed float64 [I]."""
    categories: tuple[np.ndarray, ...]
    """Per seed the integer category of every item [I]. The mean weighs categories alike; give one for a plain mean."""
    weights: tuple[np.ndarray, ...]
    """Per seed float64 [I], above 0: what an item counts within its category (bytes, say)."""
    crossed: bool
    """Every seed has the same items in the same order."""

    @property
    def num_seeds(self) -> int:
        return len(self.values)

    @property
    def num_items(self) -> int:
        """Items per seed, on average."""
        return round(sum(map(len, self.values)) / self.num_seeds)

    @property
    def mean(self) -> float:
        """Mean over seeds of the mean over categories of the weighted mean over items."""
        return float(np.mean([_contributions(*one).sum() for one in self._seeds()]))

    def _seeds(self) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return list(zip(self.values, self.categories, self.weights, strict=True))


@dataclass(frozen=True)
class Result:
    """A mean that may be 0 in truth."""

    mean: float
    interval: Interval
    """95%."""
    p_value: float
    """Two-sided; of a mean as far from 0 as this if the truth is 0."""
    standard_error: float
    freedom: float
    """Degrees of freedom of the standard error; infinite where resampling gave interval and p-value."""
    num_items: int
    num_seeds: int

    @property
    def detectable(self) -> float:
        """The smallest true mean that a test at 5% finds in 80% of all repetitions of this measurement."""
        return detectable_effect(self.standard_error, self.freedom)


def sample(
    values: Sequence[Sequence[float]],
    categories: Sequence[Sequence[int]] | None = None,
    weights: Sequence[Sequence[float]] | None = None,
    *,
    crossed: bool = True,
) -> Sample:
    """A `Sample` of lists, one per seed; without `categories` the mean is the plain one over items."""
    arrays = tuple(np.asarray(one, dtype=np.float64) for one in values)
    if not arrays or any(len(one) < 2 for one in arrays):
        raise ValueError("at least two items per seed are needed to tell a difference from noise")
    if crossed and len({len(one) for one in arrays}) > 1:
        raise ValueError("crossed seeds have the same items")
    groups = categories if categories is not None else [np.zeros(len(one), dtype=np.int64) for one in arrays]
    counts = weights if weights is not None else [np.ones(len(one)) for one in arrays]
    codes = tuple(np.unique(np.asarray(one), return_inverse=True)[1] for one in groups)
    return Sample(arrays, codes, tuple(np.asarray(one, dtype=np.float64) for one in counts), crossed)


def measure(one: Sample, *, seed: int = 0, num_draws: int = NUM_DRAWS) -> Result:
    """Mean of `one` with its interval and the p-value of "it is 0"; `seed` decides the draws of resampling."""
    if one.num_seeds == 1:
        return _by_resampling(one, seed, num_draws)
    variance, freedom = _crossed_variance(one) if one.crossed else _nested_variance(one)
    mean, error = one.mean, math.sqrt(variance)
    half = float(stdtrit(freedom, 1 - LEVEL / 2)) * error
    p_value = 2 * float(stdtr(freedom, -abs(mean) / error)) if error else float(mean == 0)
    return Result(mean, (mean - half, mean + half), p_value, error, freedom, one.num_items, one.num_seeds)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of many comparisons: below 5% means significant among all of them (Holm 1979).

    https://www.jstor.org/stable/4615733. Keeps the chance of one false claim or more below the level.
    """
    order = np.argsort(p_values, kind="stable")
    steps = np.arange(len(order), 0, -1)
    raised = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values, dtype=np.float64)[order] * steps))
    adjusted = np.empty(len(order))
    adjusted[order] = raised
    return adjusted.tolist()


def detectable_effect(standard_error: float, freedom: float = math.inf, power: float = POWER) -> float:
    """The smallest true difference that a two-sided test at 5% finds with probability `power`."""
    return standard_error * (_quantile(1 - LEVEL / 2, freedom) + _quantile(power, freedom))


def items_needed(effect: float, deviation: float, power: float = POWER) -> int:
    """Items for which `effect` is the detectable effect, if differences per item deviate by `deviation`."""
    return math.ceil((detectable_effect(deviation, power=power) / effect) ** 2)


def _quantile(probability: float, freedom: float) -> float:
    if math.isinf(freedom):
        return NormalDist().inv_cdf(probability)
    return float(stdtrit(freedom, probability))


def _contributions(values_I: np.ndarray, categories_I: np.ndarray, weights_I: np.ndarray) -> np.ndarray:
    """What every item adds to the mean: float64 [I]."""
    totals = np.bincount(categories_I, weights_I)
    return values_I * weights_I / totals[categories_I] / len(totals)


def _influences(values_I: np.ndarray, categories_I: np.ndarray, weights_I: np.ndarray) -> np.ndarray:
    """Values whose plain mean per category is the weighted one, and varies as it does to first order: float64 [I]."""
    totals, counts = np.bincount(categories_I, weights_I), np.bincount(categories_I)
    means = np.bincount(categories_I, weights_I * values_I) / totals
    share_I = weights_I * (counts / totals)[categories_I]
    return means[categories_I] + share_I * (values_I - means[categories_I])


def _by_resampling(one: Sample, seed: int, num_draws: int) -> Result:
    values_I, categories_I, weights_I = one.values[0], one.categories[0], one.weights[0]
    rng = np.random.default_rng(seed)
    means_N = bootstrap_means(values_I, categories_I, weights_I, rng, num_draws)
    level_I = levelled(values_I, categories_I, weights_I)
    added_I = _contributions(level_I, categories_I, weights_I)
    p_value = float(permutation_p_values(added_I[None], rng, num_draws)[0])
    freedom = max(1, len(values_I) - len(np.unique(categories_I)))
    interval = bootstrap_interval(means_N, one.mean, freedom)
    return Result(one.mean, interval, p_value, float(means_N.std(ddof=1)), math.inf, one.num_items, 1)


def bootstrap_interval(means_N: np.ndarray, mean: float, freedom: float) -> Interval:
    """The middle 95% of `means_N`, stretched about `mean` as Student's t is wider than a normal distribution."""
    low, high = np.quantile(means_N, [LEVEL / 2, 1 - LEVEL / 2])
    stretch = _quantile(1 - LEVEL / 2, freedom) / _quantile(1 - LEVEL / 2, math.inf)
    return mean + stretch * (float(low) - mean), mean + stretch * (float(high) - mean)


def levelled(values_I: np.ndarray, categories_I: np.ndarray, weights_I: np.ndarray) -> np.ndarray:
    """Values with the mean of every category moved to the common mean: float64 [I].

    Two models may be equally good on average and very different in each category; flipping signs of such differences
    would test whether they are alike in every category. Deviations are widened as in `bootstrap_means`.
    """
    mean = float(_contributions(values_I, categories_I, weights_I).sum())
    level_I = values_I.copy()
    if len(np.unique(categories_I)) == 1:
        return level_I
    for name in np.unique(categories_I):
        chosen_I = categories_I == name
        values, weights = values_I[chosen_I], weights_I[chosen_I]
        level_I[chosen_I] = mean + _widening(weights) * (values - np.average(values, weights=weights))
    return level_I


def _widening(weights_I: np.ndarray) -> float:
    """sqrt(n / (n - 1)) for as many items as the weights are worth: deviations from one's own mean are too small."""
    worth = float(weights_I.sum() ** 2 / (weights_I**2).sum())
    return math.sqrt(worth / (worth - 1)) if worth > 1 + 1e-9 else 1.0


def bootstrap_means(
    values_I: np.ndarray, categories_I: np.ndarray, weights_I: np.ndarray, rng: np.random.Generator, num_draws: int
) -> np.ndarray:
    """Means of `num_draws` samples of items, drawn with replacement within categories: float64 [N].

    Deviations are widened, without which small categories look too sure.
    """
    means_N = np.zeros(num_draws)
    names = np.unique(categories_I)
    for name in names:
        chosen_I = categories_I == name
        values, weights = values_I[chosen_I], weights_I[chosen_I]
        centre, num = float(np.average(values, weights=weights)), len(values)
        for start in range(0, num_draws, DRAWS_AT_ONCE):
            size = min(DRAWS_AT_ONCE, num_draws - start)
            chosen_NI = rng.integers(0, num, size=(size, num))
            drawn_N = (weights * values)[chosen_NI].sum(1) / weights[chosen_NI].sum(1)
            means_N[start : start + size] += (centre + _widening(weights) * (drawn_N - centre)) / len(names)
    return means_N


def permutation_p_values(added_BI: np.ndarray, rng: np.random.Generator, num_draws: int) -> np.ndarray:
    """p-values of B sets of paired differences, whose signs are flipped at random: float64 [B].

    `added_BI` holds what every item adds to the mean difference. If the models are alike, either could have had either
    score, so every choice of signs is equally likely. Choices as extreme as what was seen count half (mid-p): right
    and wrong answers leave many of them, and counted whole they make the test too shy
    (https://doi.org/10.1186/1471-2288-13-91).
    """
    observed_B = np.abs(added_BI.sum(1))
    close_B = 1e-9 * np.abs(added_BI).sum(1)  # sums in another order differ in the last bits
    beyond_B, equal_B = np.zeros((2, len(added_BI)))
    for start in range(0, num_draws, DRAWS_AT_ONCE):
        size = min(DRAWS_AT_ONCE, num_draws - start)
        signs_NI = rng.integers(0, 2, size=(size, added_BI.shape[1])) * 2.0 - 1.0
        over_BN = np.abs(added_BI @ signs_NI.T) - observed_B[:, None]
        beyond_B += (over_BN > close_B[:, None]).sum(1)
        equal_B += (np.abs(over_BN) <= close_B[:, None]).sum(1)
    mid_B = (beyond_B + (1 + equal_B) / 2) / (1 + num_draws)
    return np.where(observed_B <= close_B, 1.0, mid_B)


def _nested_variance(one: Sample) -> tuple[float, float]:
    """Variance of the mean over seeds, and its degrees of freedom.

    Few right and wrong answers often give every seed the very same mean; that is chance, and the spread of the items
    within the seeds takes its place.
    """
    between = _seeds_variance(one)
    within = sum(_items_variance(*seed) for seed in one._seeds()) / one.num_seeds**2
    return between or within, one.num_seeds - 1


def _seeds_variance(one: Sample) -> float:
    """Variance of the mean by the spread of the seeds' means; what differs by rounding alone is equal."""
    means_S = np.array([_contributions(*seed).sum() for seed in one._seeds()])
    return (
        0.0 if np.ptp(means_S) <= ROUNDING * np.abs(means_S).max() else float(np.var(means_S, ddof=1)) / len(means_S)
    )


def _items_variance(values_I: np.ndarray, categories_I: np.ndarray, weights_I: np.ndarray) -> float:
    """Variance of one seed's mean by the spread of its items within categories."""
    influences_I = _influences(values_I, categories_I, weights_I)
    names = np.unique(categories_I)
    blocks = [influences_I[categories_I == name] for name in names]
    return sum(float(block.var(ddof=1)) / len(block) for block in blocks if len(block) > 1) / len(names) ** 2


def _crossed_variance(one: Sample) -> tuple[float, float]:
    """Variance of the mean if seeds and items are both drawn at random, and its degrees of freedom.

    The variance of the seeds' means and that of the items' means hold the noise that is left; it is counted once.
    """
    categories_I, num_seeds = one.categories[0], one.num_seeds
    values_SI = np.stack([_influences(*seed) for seed in one._seeds()])
    seeds = _seeds_variance(one)
    items = noise = items_square = noise_square = 0.0
    names = np.unique(categories_I)
    for name in names:
        block_SI = values_SI[:, categories_I == name]
        num = block_SI.shape[1]
        if num < 2:
            continue
        share = 1 / (num * len(names) ** 2)
        rest_SI = block_SI - block_SI.mean(0) - block_SI.mean(1, keepdims=True) + block_SI.mean()
        own_items = float(block_SI.mean(0).var(ddof=1)) * share
        own_noise = float((rest_SI**2).sum()) / ((num_seeds - 1) * (num - 1)) * share / num_seeds
        items, noise = items + own_items, noise + own_noise
        items_square += own_items**2 / (num - 1)
        noise_square += own_noise**2 / ((num_seeds - 1) * (num - 1))
    variance = max(seeds + items - noise, noise)  # below the noise that is left there is no variance
    spread = seeds**2 / (num_seeds - 1) + items_square + noise_square
    return variance, max(1.0, variance**2 / spread) if spread else math.inf
