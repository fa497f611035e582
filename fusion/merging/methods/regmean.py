import math

import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas
from fusion.merging.measuring.grams import input_products
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.arithmetic import normalized
from fusion.merging.numerics.matrices import is_matrix, merged_matrix
from fusion.merging.parameters import Importances, Share, importances, per_target

NO_PRODUCTS = "no products of inputs of this tensor: the average by weight"
NEGLIGIBLE = 1e-6
"""Share of the largest eigenvalue below which a direction of inputs counts as never seen: float32 products."""


def _bytes(name: str, shape: tuple[int, ...], num_targets: int) -> int:
    """Deltas in float32 and float64, the products of all targets, and their sum with what solving it takes."""
    if not is_matrix(name, shape):
        return 0
    return (12 * num_targets + 56) * math.prod(shape) + (4 * num_targets + 48) * shape[1] ** 2


@merge_method(
    paper="https://arxiv.org/abs/2212.09849",
    needs_base=False,
    whole=_bytes,
    evidence=input_products,
    check=importances,
)
def regmean(deltas: TensorDeltas, *, weight: Importances = 1.0, off_diagonal: Share = 0.9) -> MergedDelta:
    """RegMean: the linear layer whose outputs are nearest to each target's own on that target's inputs.

    With weights [R, C] and G_j = w_j * the mean of x x^T over target j's inputs, the merged delta is
    (sum_j d_j G_j) (sum_j G_j)^-1; the same holds for deltas as for weights, since the base cancels. Entries of G_j
    off the diagonal are multiplied by `off_diagonal` (the paper's alpha). Directions that no input has, and tensors
    that are no linear layers, are averaged by w.
    """
    weights_J = normalized(per_target(weight, deltas.num_targets), True)
    if not is_matrix(deltas.name, deltas.shape) or not deltas.evidence:
        events = (NO_PRODUCTS,) if len(deltas.shape) == 2 else ()
        return MergedDelta.weighted(weights_J, events)
    num_inputs = deltas.shape[1]
    products = deltas.evidence.whole((num_inputs, num_inputs))
    deltas_JRC = deltas.whole()
    mean_RC = torch.einsum("jrc,j->rc", deltas_JRC.double(), weights_J.to(deltas_JRC.device))
    total_CC = mean_RC.new_zeros(num_inputs, num_inputs)
    pull_RC = torch.zeros_like(mean_RC)
    for delta_RC, gram_CC, weight_j in zip(deltas_JRC, products, weights_J.tolist(), strict=True):
        shrunk_CC = _shrunk(gram_CC.to(mean_RC), off_diagonal) * weight_j
        total_CC += shrunk_CC
        pull_RC += (delta_RC.double() - mean_RC) @ shrunk_CC
    return merged_matrix(deltas_JRC, mean_RC + _solved(total_CC, pull_RC, off_diagonal < 1))


def _shrunk(gram_CC: Tensor, off_diagonal: float) -> Tensor:
    return gram_CC * off_diagonal + torch.diag(gram_CC.diagonal() * (1 - off_diagonal))


def _solved(total_CC: Tensor, pull_RC: Tensor, is_definite: bool) -> Tensor:
    """pull total^-1, zero in directions without inputs.

    With shrunk entries off the diagonal, only inputs that are always zero have such directions, and all else is well
    conditioned once the diagonal is brought to 1.
    """
    dead_C = total_CC.diagonal() <= 0
    scales_C = torch.where(dead_C, 1.0, total_CC.diagonal()).rsqrt()
    scaled_CC = total_CC * scales_C[:, None] * scales_C
    if is_definite:
        factor_CC = torch.linalg.cholesky(scaled_CC + torch.diag(dead_C.to(scaled_CC)))
        return torch.cholesky_solve((pull_RC * scales_C).T, factor_CC).T * scales_C
    return pull_RC * scales_C @ torch.linalg.pinv(scaled_CC, rtol=NEGLIGIBLE, hermitian=True) * scales_C
