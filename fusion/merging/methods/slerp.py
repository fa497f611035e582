import math

import torch
from torch import Tensor

from fusion.merging.arithmetic import weighted_sum
from fusion.merging.deltas import Block, TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Share

ALMOST_PARALLEL = 0.9995


def _products(block: Block) -> Tensor:
    """Squares of both targets' norms, and their inner product, float64 [3]."""
    first_N, second_N = block.deltas_JN
    products = torch.stack([first_N * first_N, second_N * second_N, first_N * second_N])
    return products.sum(dim=1, dtype=torch.float64).cpu()


@merge_method(paper="https://doi.org/10.1145/325165.325242", needs_base=False, operands="weights", num_targets=2)
def slerp(weights: TensorDeltas, *, t: Share = 0.5) -> MergedDelta:
    """Spherical interpolation of two targets' weights, a share `t` of the way from the first to the second.

    Directions that are almost parallel, or not defined, are interpolated linearly.
    """
    first_square, second_square, product = weights.reduce(_products).tolist()
    lengths = math.sqrt(first_square * second_square)
    cosine = product / lengths if lengths > 0 else 1.0
    if abs(cosine) > ALMOST_PARALLEL:
        coefficients = [1 - t, t]
    else:
        angle = math.acos(cosine)
        coefficients = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    coefficients_J = torch.tensor(coefficients, dtype=torch.float64)
    return MergedDelta(lambda block: weighted_sum(block.deltas_JN, coefficients_J), coefficients_J)
