"""The inner loops of a merge on a CPU, compiled: one pass over a block instead of one per operation.

They hold no lock, so the threads of a merge run at the same time. Sums over targets are taken in float64 and rounded
once; the Torch expressions that stand beside their calls serve other devices, in float32. Only sums of squares may be
reassociated, within runs of `SHORT` elements. Whole numbers are widened first, since NumPy's rules would turn them
into float64.
They are in one file, since Numba notices no change of what another file's function calls.
Shapes: K rows (targets or keys), N elements of a block, S of a short run.
"""

from typing import Any

import numpy as np
from numba import njit

SHORT = 1024
"""Elements that are summed in float32; what is beyond is summed in float64."""
TILE = 1024
"""Elements that stay in a core's nearest cache while all targets are added to them."""
UPPER = np.uint32(16)
FEW = 3
"""One position of so many is few: to put those together takes less than to compute with all."""
SIGN_OFF = np.uint32(0x7FFF_FFFF)
INFINITE = np.uint32(0x7F80)
ZERO, ONE = np.float32(0), np.float32(1)


@njit(cache=True, nogil=True, inline="always")
def _widened(half: Any) -> Any:
    """float32 of a bit pattern of bfloat16: exact."""
    return np.uint32(np.uint32(half) << UPPER).view(np.float32)


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _load_run(raw_S: Any, origin_S: Any, operands_S: Any) -> Any:
    """Widen, subtract, and return the sum of squares, float32."""
    total = ZERO
    for n in range(len(raw_S)):
        value = _widened(raw_S[n]) - origin_S[n]
        operands_S[n] = value
        total += value * value
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _square(values_N: Any) -> Any:
    total = ZERO
    for n in range(len(values_N)):
        total += values_N[n] * values_N[n]
    return total


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _product(values_N: Any, others_N: Any) -> float:
    total = 0.0
    for n in range(len(values_N)):
        total += np.float64(values_N[n]) * np.float64(others_N[n])
    return total


@njit(cache=True, nogil=True)
def load_bfloat16(
    base_N: Any, targets_KN: Any, subtracts: bool, origin_N: Any, operands_KN: Any, squares_K: Any
) -> float:
    """Widen bit patterns of bfloat16 (uint16) to float32, which is exact, and subtract the base.

    Fills `origin_N`, `operands_KN` and the squared norms of the operands, float64; returns that of the base. Without
    a base `base_N` and `origin_N` are empty.
    """
    zeros_S = np.zeros(SHORT, dtype=np.float32)
    origin_square = 0.0
    squares_K[:] = 0.0
    for start in range(0, targets_KN.shape[1], SHORT):
        stop = min(start + SHORT, targets_KN.shape[1])
        origin_S = origin_N[start:stop]
        origin_square += np.float64(_load_run(base_N[start:stop], zeros_S, origin_S))
        subtrahend_S = origin_S if subtracts else zeros_S
        for k in range(len(targets_KN)):
            operands_S = operands_KN[k, start:stop]
            squares_K[k] += np.float64(_load_run(targets_KN[k, start:stop], subtrahend_S, operands_S))
    return origin_square


@njit(cache=True, nogil=True)
def squared_norms(values_KN: Any, squares_K: Any) -> None:
    """Sums of squares of float32 rows: runs of `SHORT` in float32, their sum in float64."""
    squares_K[:] = 0.0
    for k in range(len(values_KN)):
        values_N = values_KN[k]
        for start in range(0, len(values_N), SHORT):
            squares_K[k] += np.float64(_square(values_N[start : start + SHORT]))


@njit(cache=True, nogil=True)
def inner_products(values_KN: Any, products_KK: Any) -> None:
    """Between float32 rows, summed in float64."""
    products_KK[:] = 0.0
    for start in range(0, values_KN.shape[1], SHORT):
        for k in range(len(values_KN)):
            for m in range(k + 1):
                stop = start + SHORT
                products_KK[k, m] += _product(values_KN[k, start:stop], values_KN[m, start:stop])
    for k in range(len(values_KN)):
        for m in range(k):
            products_KK[m, k] = products_KK[k, m]


@njit(cache=True, nogil=True)
def count_conflicts(values_KN: Any) -> int:
    """Positions at which one row is above zero and another below."""
    count = 0
    lowest_T, highest_T = np.empty(TILE, dtype=np.float32), np.empty(TILE, dtype=np.float32)
    for start in range(0, values_KN.shape[1], TILE):
        lowest_T[:] = ZERO
        highest_T[:] = ZERO
        for k in range(len(values_KN)):
            values_T = values_KN[k, start : start + TILE]
            for n in range(len(values_T)):
                lowest_T[n] = min(lowest_T[n], values_T[n])
                highest_T[n] = max(highest_T[n], values_T[n])
        for n in range(TILE):
            count += (lowest_T[n] < ZERO) & (highest_T[n] > ZERO)
    return count


@njit(cache=True, nogil=True)
def weighted_sum(values_KN: Any, weights_K: Any, total_N: Any) -> None:
    """sum_k w_k v_k, row by row, in float64, rounded once to float32."""
    sum_T = np.empty(TILE, dtype=np.float64)
    for start in range(0, len(total_N), TILE):
        total_T = total_N[start : start + TILE]
        sum_T[:] = 0.0
        for k in range(len(values_KN)):
            values_T, weight = values_KN[k, start : start + TILE], weights_K[k]
            for n in range(len(total_T)):
                sum_T[n] += np.float64(values_T[n]) * weight
        for n in range(len(total_T)):
            total_T[n] = np.float32(sum_T[n])


@njit(cache=True, nogil=True)
def _add_votes(deltas_T: Any, weight: Any, signs_T: Any, sum_T: Any, divisor_T: Any) -> None:
    for n in range(len(deltas_T)):
        voted = np.float64(deltas_T[n]) * weight * np.float64(signs_T[n])
        sum_T[n] += max(voted, 0.0)
        divisor_T[n] += weight if voted > 0.0 else 0.0


@njit(cache=True, nogil=True, error_model="numpy")
def agreed_sum(
    deltas_KN: Any, weights_K: Any, signs_N: Any, renormalize: bool, least_divisor: float, total_N: Any
) -> None:
    """As `fusion.merging.numerics.arithmetic.agreed_sum`, in float64, rounded once to float32."""
    sum_T, divisor_T = np.empty(TILE, dtype=np.float64), np.empty(TILE, dtype=np.float64)
    for start in range(0, len(total_N), TILE):
        total_T, signs_T = total_N[start : start + TILE], signs_N[start : start + TILE]
        sum_T[:] = 0.0
        divisor_T[:] = 0.0
        for k in range(len(deltas_KN)):
            _add_votes(deltas_KN[k, start : start + TILE], weights_K[k], signs_T, sum_T, divisor_T)
        if not renormalize:
            divisor_T[:] = 1.0
        for n in range(len(total_T)):
            divisor = max(divisor_T[n], least_divisor) if least_divisor > 0.0 else divisor_T[n]
            divisor_T[n] = divisor if divisor != 0.0 else 1.0
        for n in range(len(total_T)):
            total_T[n] = np.float32(sum_T[n] * np.float64(signs_T[n]) / divisor_T[n])


@njit(cache=True, nogil=True)
def count_erased(deltas_KN: Any, weights_K: Any, signs_N: Any) -> tuple[int, int]:
    """How many deltas that are not zero have the sign against the majority (or no weight), and how many there are."""
    agreeing, nonzero = 0, 0
    for k in range(len(deltas_KN)):
        deltas_N, weight = deltas_KN[k], weights_K[k]
        for n in range(len(signs_N)):
            nonzero += deltas_N[n] != ZERO
            agreeing += np.float64(deltas_N[n]) * weight * np.float64(signs_N[n]) > 0.0
    return nonzero - agreeing, nonzero


@njit(cache=True, nogil=True, error_model="numpy")
def variance(deltas_KN: Any, variance_N: Any) -> None:
    """As `fusion.merging.numerics.selection.variance`, float32."""
    sum_T = np.empty(TILE, dtype=np.float32)
    count = np.float32(len(deltas_KN))
    for start in range(0, len(variance_N), TILE):
        first_T, squares_T = deltas_KN[0, start : start + TILE], variance_N[start : start + TILE]
        sum_T[:] = ZERO
        squares_T[:] = ZERO
        for k in range(1, len(deltas_KN)):
            deltas_T = deltas_KN[k, start : start + TILE]
            for n in range(len(squares_T)):
                difference = deltas_T[n] - first_T[n]
                sum_T[n] += difference
                squares_T[n] += difference * difference
        for n in range(len(squares_T)):
            mean = sum_T[n] / count
            squares_T[n] = squares_T[n] / count - mean * mean


@njit(cache=True, nogil=True)
def round_to_bfloat16(delta_N: Any, origin_N: Any, scale: float, rounded_N: Any) -> bool:
    """origin + scale * delta as bit patterns of bfloat16 (uint16), to the nearest, ties to even.

    Returns whether all are finite; NaN needs no care, since the caller refuses it.
    """
    factor, largest = np.float32(scale), np.uint32(0)
    for n in range(len(delta_N)):
        pattern = np.float32(delta_N[n] * factor + origin_N[n]).view(np.uint32)
        half = np.uint32(pattern + np.uint32(0x7FFF) + (pattern >> UPPER & np.uint32(1))) >> UPPER
        half = pattern >> UPPER if pattern & SIGN_OFF >= np.uint32(0x7F80_0000) else half
        largest = max(largest, half & INFINITE)
        rounded_N[n] = np.uint16(half)
    return bool(largest < INFINITE)


@njit(cache=True, nogil=True)
def keep_largest(values_KN: Any, keys_LN: Any, levels_L: Any, rests_L: Any, kept_KN: Any) -> None:
    """The values where a key's magnitude is above the level, and the first `rests_L` of those where it equals it; else
    zero. A row of keys for each row of values, or one for all."""
    for k in range(len(values_KN)):
        row = min(k, len(keys_LN) - 1)
        values_N, keys_N, kept_N, level, rest = values_KN[k], keys_LN[row], kept_KN[k], levels_L[row], rests_L[row]
        if rest >= len(values_N):
            for n in range(len(values_N)):
                kept_N[n] = values_N[n] if abs(keys_N[n]) >= level else ZERO
            continue
        for n in range(len(values_N)):
            kept_N[n] = values_N[n] if abs(keys_N[n]) > level else ZERO
        for n in range(len(values_N)):
            if rest <= 0:
                break
            if abs(keys_N[n]) == level:
                kept_N[n] = values_N[n]
                rest -= 1


@njit(cache=True, nogil=True)
def merge_bfloat16(
    base_N: Any, targets_KN: Any, weights_K: Any, scale: float, rounded_N: Any, squares_K: Any
) -> tuple[float, bool]:
    """`load_bfloat16`, `weighted_sum` and `round_to_bfloat16` run by run, to the same bits: deltas stay in the cache.

    Returns the squared norm of the base, and whether the result is finite.
    """
    zeros_S, origin_S = np.zeros(SHORT, dtype=np.float32), np.empty(SHORT, dtype=np.float32)
    deltas_S, total_S, sum_S = np.empty(SHORT, np.float32), np.empty(SHORT, np.float32), np.empty(SHORT, np.float64)
    origin_square, is_finite = 0.0, True
    squares_K[:] = 0.0
    for start in range(0, len(rounded_N), SHORT):
        stop = min(start + SHORT, len(rounded_N))
        origin_square += np.float64(_load_run(base_N[start:stop], zeros_S, origin_S))
        sum_S[:] = 0.0
        for k in range(len(targets_KN)):
            squares_K[k] += np.float64(_load_run(targets_KN[k, start:stop], origin_S, deltas_S))
            weight = weights_K[k]
            for n in range(stop - start):
                sum_S[n] += np.float64(deltas_S[n]) * weight
        for n in range(stop - start):
            total_S[n] = np.float32(sum_S[n])
        is_finite &= round_to_bfloat16(total_S[: stop - start], origin_S, scale, rounded_N[start:stop])
    return origin_square, is_finite


@njit(cache=True, nogil=True)
def _load_deltas(base_N: Any, targets_KN: Any, start: int, origin_S: Any, deltas_KS: Any, squares_K: Any) -> float:
    """A run from `start` on: its squared norms are added to those of the rows; that of the base is returned."""
    stop = start + deltas_KS.shape[1]
    origin_square = _load_run(base_N[start:stop], np.zeros(stop - start, dtype=np.float32), origin_S)
    for k in range(len(targets_KN)):
        squares_K[k] += np.float64(_load_run(targets_KN[k, start:stop], origin_S, deltas_KS[k]))
    return float(origin_square)


@njit(cache=True, nogil=True)
def _keep_from(deltas_KS: Any, bounds_L: Any, by_spread: bool, spread_S: Any) -> None:
    """Zero what is below the bounds: of each row's own magnitudes, or of `spread_S`, the variance across rows."""
    for k in range(len(deltas_KS)):
        deltas_S = deltas_KS[k]
        if by_spread:
            for n in range(len(deltas_S)):
                deltas_S[n] = deltas_S[n] if abs(spread_S[n]) >= bounds_L[0] else ZERO
        else:
            bound = bounds_L[k]
            for n in range(len(deltas_S)):
                deltas_S[n] = deltas_S[n] if abs(deltas_S[n]) >= bound else ZERO


@njit(cache=True, nogil=True)
def kept_squares_bfloat16(
    base_N: Any, targets_KN: Any, bounds_L: Any, by_spread: bool, kept_K: Any, squares_K: Any
) -> float:
    """Load, select and sum the squares of what is selected, run by run, to the bits of `squared_norms`.

    Fills those squared norms and the ones of the deltas, float64; returns that of the base.
    """
    origin_S, spread_S = np.empty(SHORT, dtype=np.float32), np.empty(SHORT, dtype=np.float32)
    deltas_KS = np.empty((len(targets_KN), SHORT), dtype=np.float32)
    origin_square, selects = 0.0, not by_spread or bounds_L[0] > ZERO
    squares_K[:] = 0.0
    kept_K[:] = 0.0
    for start in range(0, len(base_N), SHORT):
        size = min(SHORT, len(base_N) - start)
        if size < SHORT:
            deltas_KS = np.empty((len(targets_KN), size), dtype=np.float32)
        origin_square += _load_deltas(base_N, targets_KN, start, origin_S, deltas_KS, squares_K)
        if by_spread and selects:
            variance(deltas_KS, spread_S[:size])
        if selects:
            _keep_from(deltas_KS, bounds_L, by_spread, spread_S)
        for k in range(len(targets_KN)):
            kept_K[k] += np.float64(_square(deltas_KS[k]))
    return origin_square


@njit(cache=True, nogil=True)
def _places_from(bound: Any, spread_S: Any, places_S: Any) -> int:
    """Put the places where the variance reaches the bound at the beginning of `places_S`; returns their number."""
    count = 0
    for n in range(len(spread_S)):  # without a branch, which would be guessed wrong again and again
        places_S[count] = n
        count += int(abs(spread_S[n]) >= bound)
    return count


@njit(cache=True, nogil=True)
def _elect(
    deltas_KS: Any, votes_K: Any, weights_K: Any, renormalize: bool, least_divisor: float, signs_S: Any, total_S: Any
) -> None:
    weighted_sum(deltas_KS, votes_K, signs_S)
    for n in range(len(signs_S)):
        signs_S[n] = ONE if signs_S[n] >= ZERO else -ONE
    agreed_sum(deltas_KS, weights_K, signs_S, renormalize, least_divisor, total_S)


@njit(cache=True, nogil=True)
def elect_bfloat16(
    base_N: Any,
    targets_KN: Any,
    bounds_L: Any,
    by_spread: bool,
    votes_K: Any,
    weights_K: Any,
    renormalize: bool,
    least_divisor: float,
    scale: float,
    rounded_N: Any,
    squares_K: Any,
) -> tuple[float, bool]:
    """Load, select, elect, sum and round, run by run: what `Election` does loop by loop, to the same bits.

    Where few positions are selected they are put together, and no others take part: these get zero anyway.
    """
    origin_S, spread_S = np.empty(SHORT, dtype=np.float32), np.empty(SHORT, dtype=np.float32)
    total_S, signs_S = np.empty(SHORT, dtype=np.float32), np.empty(SHORT, dtype=np.float32)
    places_S = np.empty(SHORT, dtype=np.int64)
    num_rows = len(targets_KN)
    deltas_KS = np.empty((num_rows, SHORT), dtype=np.float32)
    few = np.empty(num_rows * SHORT, dtype=np.float32)
    origin_square, is_finite = 0.0, True
    squares_K[:] = 0.0
    for start in range(0, len(rounded_N), SHORT):
        size = min(SHORT, len(rounded_N) - start)
        if size < SHORT:
            deltas_KS = np.empty((num_rows, size), dtype=np.float32)  # a part would lie in pieces, and be slow
        origin_square += _load_deltas(base_N, targets_KN, start, origin_S, deltas_KS, squares_K)
        count = size
        if by_spread and bounds_L[0] > ZERO:
            variance(deltas_KS, spread_S[:size])
            count = _places_from(bounds_L[0], spread_S[:size], places_S)
        if count * FEW < size:
            few_KM = few[: num_rows * count].reshape(num_rows, count)
            for k in range(num_rows):
                for m in range(count):
                    few_KM[k, m] = deltas_KS[k, places_S[m]]
            _elect(few_KM, votes_K, weights_K, renormalize, least_divisor, signs_S[:count], spread_S[:count])
            total_S[:] = ZERO
            for m in range(count):
                total_S[places_S[m]] = spread_S[m]
        else:
            if count < size or not by_spread:
                _keep_from(deltas_KS, bounds_L, by_spread, spread_S)
            _elect(deltas_KS, votes_K, weights_K, renormalize, least_divisor, signs_S[:size], total_S[:size])
        is_finite &= round_to_bfloat16(total_S[:size], origin_S, scale, rounded_N[start : start + size])
    return origin_square, is_finite
