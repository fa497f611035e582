"""Line search for a merge's scale: the loss as a function of one number."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fusion.config import UserError, raise_problems

GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class ScaleSearch:
    """`best` scale, and every (scale, loss) that was evaluated, in that order."""

    best: float
    evaluations: list[tuple[float, float]]


def search_scale(
    loss: Callable[[float], float],
    *,
    start: float = 1.0,
    lowest: float = 0.05,
    highest: float = 64.0,
    tolerance: float = 0.02,
) -> ScaleSearch:
    """Minimise `loss` over a scale in [lowest, highest]: bracket from `start`, then golden section.

    Doubling and halving go on as long as they help, so a minimum is found between the neighbours of the best of
    those points; other dips outside are not looked for. The section works on the logarithm, until the bracket is
    narrower than the relative `tolerance`. The best scale seen wins, of equal ones the nearest to `start`. A loss
    that is not finite counts as the worst. Deterministic; each scale is evaluated once.

    Raises:
        UserError: limits that make no sense, or no scale with a finite loss.
    """
    raise_problems(_limit_problems(start, lowest, highest, tolerance))
    seen: dict[float, float] = {}

    def at(scale: float) -> float:
        if scale not in seen:
            value = loss(scale)
            seen[scale] = value if math.isfinite(value) else math.inf
        return seen[scale]

    low, high = _bracket(at, start, lowest, highest)
    _golden_section(lambda log_scale: at(math.exp(log_scale)), math.log(low), math.log(high), math.log1p(tolerance))
    best = min(seen, key=lambda scale: (seen[scale], abs(math.log(scale / start)), scale))
    if math.isinf(seen[best]):
        raise UserError(f"scale search: the loss is not finite at any scale from {min(seen):g} to {max(seen):g}")
    return ScaleSearch(best, list(seen.items()))


def _limit_problems(start: float, lowest: float, highest: float, tolerance: float) -> list[str]:
    problems = []
    if not 0 < lowest <= start <= highest < math.inf:
        problems.append(
            f"scale search needs 0 < lowest <= start <= highest, got lowest {lowest}, start {start}, highest {highest}"
        )
    if not 0 < tolerance < math.inf:
        problems.append(f"scale search: tolerance must be above 0, got {tolerance}")
    return problems


def _bracket(at: Callable[[float], float], start: float, lowest: float, highest: float) -> tuple[float, float]:
    """The neighbours of the best point on the grid start * 2^n that doubling and halving reach."""
    up, down = min(2 * start, highest), max(start / 2, lowest)
    if at(up) < at(start):
        step: Callable[[float], float] = lambda scale: min(2 * scale, highest)  # noqa: E731
        before, best = start, up
    elif at(down) < at(start):
        step = lambda scale: max(scale / 2, lowest)  # noqa: E731
        before, best = start, down
    else:
        return down, up
    while at(step(best)) < at(best):
        before, best = best, step(best)
    return min(before, step(best)), max(before, step(best))


def _golden_section(at: Callable[[float], float], low: float, high: float, width: float) -> None:
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    while high - low > width:
        if at(left) <= at(right):
            high, right = right, left
            left = high - GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
