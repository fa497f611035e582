"""Sums over targets that the methods share.

Every sum is spelt out target by target, with multiplication and addition as separate steps: fused multiply-adds
would round differently inside and outside a vector register. Conditions are factors of 0.0 and 1.0, no booleans, which
are several times slower. On a CPU compiled loops do the same in one pass over a block, in float64.
Shapes: J targets, N elements of one block.
"""

import numpy as np
import torch
from torch import Tensor

from fusion.merging.numerics import kernels

UNIFORM = "all targets have zero deltas here: uniform coefficients"


def on_cpu(values_JN: Tensor) -> bool:
    """Whether the compiled loops can read it."""
    return values_JN.device.type == "cpu" and values_JN.dtype == torch.float32


def rows(values_JN: Tensor) -> np.ndarray:
    """For the compiled loops: rows one behind the other."""
    return values_JN.contiguous().numpy()


def wide(weights_J: Tensor) -> np.ndarray:
    """Weights for the compiled loops."""
    return weights_J.to(torch.float64).numpy()


def is_finite(values_N: Tensor) -> bool:
    """Sums of squares are the quickest test; only they may overflow, so that a finite one proves it."""
    norm = torch.linalg.vector_norm(
        values_N, dtype=torch.float64 if values_N.dtype == torch.float64 else torch.float32
    )
    return bool(torch.isfinite(norm)) or bool(torch.isfinite(values_N).all())


def sum_over_targets(values_JN: Tensor) -> Tensor:
    total_N = values_JN[0].clone()
    for values_N in values_JN[1:]:
        total_N += values_N
    return total_N


def weighted_sum(values_JN: Tensor, weights_J: Tensor) -> Tensor:
    """sum_j w_j v_j, float32 [N]."""
    if on_cpu(values_JN):
        total_N = torch.empty_like(values_JN[0])
        kernels.weighted_sum(rows(values_JN), wide(weights_J), total_N.numpy())
        return total_N
    weights = weights_J.tolist()
    total_N = values_JN[0] * weights[0]
    for values_N, weight in zip(values_JN[1:], weights[1:], strict=True):
        total_N += values_N * weight
    return total_N


def squared_norms(values_JN: Tensor) -> Tensor:
    """sum_n v_jn^2, [J], float64; not finite exactly when a value is not.

    Short runs are summed in float32, which is twenty times faster, and the runs in float64. Where that under- or
    overflows, everything is summed in float64.
    """
    return exact_where_needed(_squares_by_runs(values_JN), values_JN)


def are_normal(squares_J: Tensor) -> bool:
    """Whether no squared norm that was summed in runs of float32 under- or overflowed."""
    return all(0 < square < torch.inf for square in squares_J.tolist())


def exact_where_needed(squares_J: Tensor, values_JN: Tensor) -> Tensor:
    """Squared norms, [J], those anew in float64 that under- or overflowed in runs of float32."""
    for j, square in enumerate(squares_J.tolist()):
        if not 0 < square < torch.inf:
            squares_J[j] = torch.linalg.vector_norm(values_JN[j], dtype=torch.float64).square()
    return squares_J.cpu()


def _squares_by_runs(values_JN: Tensor) -> Tensor:
    if on_cpu(values_JN):
        squares_J = torch.empty(len(values_JN), dtype=torch.float64)
        kernels.squared_norms(rows(values_JN), squares_J.numpy())
        return squares_J
    num_whole = values_JN.shape[1] // kernels.SHORT * kernels.SHORT
    runs_JR = torch.linalg.vector_norm(values_JN[:, :num_whole].unflatten(1, (-1, kernels.SHORT)), dim=2)
    rest_J = torch.linalg.vector_norm(values_JN[:, num_whole:], dim=1)
    return runs_JR.double().square().sum(dim=1) + rest_J.double().square()


def shares(energies_J: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Energies divided by their sum, [J]; uniform, with an event that says so, when all are zero."""
    total = energies_J.sum()
    if total == 0:
        return torch.full_like(energies_J, 1 / len(energies_J)), (UNIFORM,)
    return energies_J / total, ()


def normalized(weights_J: Tensor, normalize: bool) -> Tensor:
    return weights_J / weights_J.sum() if normalize else weights_J
