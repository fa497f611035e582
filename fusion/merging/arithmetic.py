"""Sums over targets that the methods share.

Every sum is spelt out target by target, with multiplication and addition as separate steps: fused multiply-adds
would round differently inside and outside a vector register, hence with the number of threads. Shapes: J targets,
N elements of one tensor.
"""

import torch
from torch import Tensor

BLOCK = 1024
UNIFORM = "all targets have zero deltas here: uniform coefficients"


def sum_over_targets(values_JN: Tensor) -> Tensor:
    total_N = values_JN[0].clone()
    for values_N in values_JN[1:]:
        total_N += values_N
    return total_N


def weighted_sum(values_JN: Tensor, weights_J: Tensor) -> Tensor:
    """sum_j w_j v_j in float32, [N]."""
    weights = weights_J.tolist()
    total_N = values_JN[0] * weights[0]
    for values_N, weight in zip(values_JN[1:], weights[1:], strict=True):
        total_N += values_N * weight
    return total_N


def squared_norms(values_JN: Tensor) -> Tensor:
    """sum_n v_jn^2, [J], float64; not finite exactly when a value is not.

    Short blocks are summed in float32, which is twenty times faster, and the blocks in float64. Where that under- or
    overflows, everything is summed in float64.
    """
    num_whole = values_JN.shape[1] // BLOCK * BLOCK
    blocks_JB = torch.linalg.vector_norm(values_JN[:, :num_whole].unflatten(1, (-1, BLOCK)), dim=2)
    rest_J = torch.linalg.vector_norm(values_JN[:, num_whole:], dim=1)
    squares_J = blocks_JB.double().square().sum(dim=1) + rest_J.double().square()
    if bool(((squares_J > 0) & torch.isfinite(squares_J)).all()):
        return squares_J
    return torch.linalg.vector_norm(values_JN, dim=1, dtype=torch.float64).square()


def shares(energies_J: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Energies divided by their sum, [J]; uniform, with an event that says so, when all are zero."""
    total = energies_J.sum()
    if total == 0:
        return torch.full_like(energies_J, 1 / len(energies_J)), (UNIFORM,)
    return energies_J / total, ()


def normalized(weights_J: Tensor, normalize: bool) -> Tensor:
    return weights_J / weights_J.sum() if normalize else weights_J


def agreeing(votes_JN: Tensor) -> Tensor:
    """Where a target's sign is the majority's: the sign of the sum over targets, zero counting as plus. Bool [J, N].

    A vote of zero agrees with nobody.
    """
    positive_N = sum_over_targets(votes_JN) >= 0
    return torch.where(positive_N, votes_JN > 0, votes_JN < 0)


def agreed_sum(
    deltas_JN: Tensor, weights_J: Tensor, agree_JN: Tensor, *, renormalize: bool, least_divisor: float = 0.0
) -> Tensor:
    """sum_j w_j d_j over the targets that agree at a position, [N].

    `renormalize` divides per position by the sum of the agreeing weights; a divisor of zero counts as 1, and one
    below `least_divisor` as that.
    """
    total_N = weighted_sum(deltas_JN * agree_JN, weights_J)
    if not renormalize:
        return total_N
    divisor_N = weighted_sum(agree_JN.to(torch.float32), weights_J)
    if least_divisor:
        return total_N / divisor_N.clamp(min=least_divisor)
    return total_N / torch.where(divisor_N == 0, 1.0, divisor_N)
