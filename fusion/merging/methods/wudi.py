import math
from typing import Annotated, Literal

import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.matrices import average, is_matrix, merged_matrix
from fusion.merging.parameters import Between

Steps = Annotated[int, Between(1, 100_000)]
Rate = Annotated[float, Between(0, 1, above=True)]
NEGLIGIBLE = 1e-10
"""Share of the largest eigenvalue below which the energy of a direction of inputs counts as zero."""


def _bytes(name: str, shape: tuple[int, ...], num_targets: int) -> int:
    """Deltas in float32 and twice in float64, the optimiser's state, and what is of the size of inputs squared."""
    if not is_matrix(name, shape):
        return 0
    return (20 * num_targets + 56) * math.prod(shape) + 40 * shape[1] ** 2


@merge_method(paper="https://arxiv.org/abs/2503.08099", whole=_bytes)
def wudi(
    deltas: TensorDeltas, *, solver: Literal["adam", "exact"] = "adam", steps: Steps = 300, rate: Rate = 0.02
) -> MergedDelta:
    """WUDI: the delta m that least disturbs what each target does to the inputs its own delta stands for.

    Minimises sum_j ||(m - d_j) d_j^T||^2 / ||d_j||^2 over m, [R, C] (Frobenius norms; a target with a zero delta has
    no term). `adam` starts at sum_j d_j and takes `steps` steps of `rate` times the root mean square of that sum, in
    float64; the paper's 300 steps of 1e-5 are about this for fine-tuned models. `exact` solves for the minimum, which
    is far cheaper for large matrices and leaves the start no influence. Embedding tables and tensors of other than
    two dimensions are averaged.
    """
    if not is_matrix(deltas.name, deltas.shape):
        return average(deltas)
    deltas_JRC = deltas.whole()
    wide_JRC = deltas_JRC.double()
    total_RC = wide_JRC.sum(dim=0)
    unit = max(_root_mean_square(total_RC), _root_mean_square(wide_JRC))
    if unit == 0:
        return merged_matrix(deltas_JRC, total_RC)
    quadratic_CC, linear_RC = _normal_equations(wide_JRC.div_(unit))
    if solver == "exact":
        merged_RC = _minimum(quadratic_CC, linear_RC)
    else:
        merged_RC = _descend(total_RC / unit, quadratic_CC, linear_RC, steps, rate)
    return merged_matrix(deltas_JRC, merged_RC * unit)


def _root_mean_square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values)) / math.sqrt(values.numel())


def _normal_equations(deltas_JRC: Tensor) -> tuple[Tensor, Tensor]:
    """A [C, C] and B [R, C] of the gradient 2 (m A - B)."""
    quadratic_CC = deltas_JRC.new_zeros(deltas_JRC.shape[2], deltas_JRC.shape[2])
    linear_RC = torch.zeros_like(deltas_JRC[0])
    for delta_RC in deltas_JRC:
        energy = delta_RC.square().sum()
        if energy > 0:
            products_CC = delta_RC.T @ delta_RC / energy
            quadratic_CC += products_CC
            linear_RC += delta_RC @ products_CC
    return quadratic_CC, linear_RC


def _minimum(quadratic_CC: Tensor, linear_RC: Tensor) -> Tensor:
    """B A^+: of all minima the smallest, zero for inputs that no target changes."""
    return linear_RC @ torch.linalg.pinv(quadratic_CC, rtol=NEGLIGIBLE, hermitian=True)


def _descend(start_RC: Tensor, quadratic_CC: Tensor, linear_RC: Tensor, steps: int, rate: float) -> Tensor:
    merged_RC = start_RC.clone()
    adam = torch.optim.Adam([merged_RC], lr=rate, foreach=False)
    for _ in range(steps):
        merged_RC.grad = 2 * (merged_RC @ quadratic_CC - linear_RC)
        adam.step()
    return merged_RC.detach()
