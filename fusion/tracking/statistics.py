"""How sure a score is: intervals over the scored items, spread over seeds. All intervals are two-sided 95%."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Interval = tuple[float, float]

NORMAL_QUANTILE = NormalDist().inv_cdf(0.975)
# Student's t at 0.975 for 1 to 10 degrees of freedom, where the series of `student_quantile` is not exact enough.
_STUDENT_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


@dataclass(frozen=True)
class Estimate:
    """One number measured once per seed: its mean, the standard deviation over seeds and an interval of the mean.

    `mean` is None where no seed has a value, `sd` with fewer than two values, the interval where nothing bounds it.
    """

    values: tuple[float | None, ...]  # one per seed
    mean: float | None = None
    sd: float | None = None
    interval: Interval | None = None


def wilson_interval(share: float, num_items: int) -> Interval:
    """Interval of a share of right answers among `num_items`, by Wilson (https://doi.org/10.2307/2276774)."""
    square = NORMAL_QUANTILE**2 / num_items
    centre = (share + square / 2) / (1 + square)
    variance = max(0.0, share * (1 - share)) / num_items + square / (4 * num_items)
    half = NORMAL_QUANTILE / (1 + square) * math.sqrt(variance)
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def average_interval(shares: Mapping[str, float], num_items: Mapping[str, int]) -> Interval | None:
    """Normal interval of the unweighted mean of `shares` (by skill); None if a skill's number of items is unknown."""
    if not shares or any(num_items.get(skill, 0) < 1 for skill in shares):
        return None
    variance = math.fsum(share * (1 - share) / num_items[skill] for skill, share in shares.items()) / len(shares) ** 2
    mean, half = fmean(shares.values()), NORMAL_QUANTILE * math.sqrt(max(variance, 0.0))
    return max(0.0, mean - half), min(1.0, mean + half)


def student_quantile(freedom: int) -> float:
    """Student's t at 0.975, by the series in Abramowitz and Stegun, 26.7.5 (error below 1e-4)."""
    if freedom <= len(_STUDENT_QUANTILES):
        return _STUDENT_QUANTILES[freedom - 1]
    z = NORMAL_QUANTILE
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + math.fsum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def estimate(values: Sequence[float | None], items: Interval | None = None, *, share: bool = False) -> Estimate:
    """Summarise one value per seed (None: not measured); `items` is the interval that the scored items alone give.

    With several seeds the interval is Student's over seeds, but never inside `items`: seeds that all agree (a merge
    without randomness, say) are asked the same questions and do not make those questions more. The interval of a
    `share` stays within 0 and 1.
    """
    known = [value for value in values if value is not None]
    if not known:
        return Estimate(tuple(values))
    mean = fmean(known)
    if len(known) == 1:
        return Estimate(tuple(values), mean, None, items)
    sd = stdev(known)
    half = student_quantile(len(known) - 1) * sd / math.sqrt(len(known))
    low, high = items or (mean, mean)
    low, high = min(low, mean - half), max(high, mean + half)
    return Estimate(tuple(values), mean, sd, (max(0.0, low), min(1.0, high)) if share else (low, high))


def overlap(first: Estimate, second: Estimate) -> bool:
    """Whether the intervals meet; an unknown interval meets everything."""
    if first.interval is None or second.interval is None:
        return True
    return first.interval[0] <= second.interval[1] and second.interval[0] <= first.interval[1]
