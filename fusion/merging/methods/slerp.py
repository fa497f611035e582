import math

import torch
from torch import Tensor

from fusion.merging.arithmetic import weighted_sum
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Share

ALMOST_PARALLEL = 0.9995


@merge_method(paper="https://doi.org/10.1145/325165.325242", needs_base=False, operands="weights", num_targets=2)
def slerp(weights_JN: Tensor, *, t: Share = 0.5) -> MergedDelta:
    """Spherical interpolation of two targets' weights, a share `t` of the way from the first to the second.

    Directions that are almost parallel, or not defined, are interpolated linearly.
    """
    first_N, second_N = weights_JN
    # One reduction over several rows is summed alike whatever the number of threads; a lone one is not.
    products = torch.stack([first_N * first_N, second_N * second_N, first_N * second_N])
    first_square, second_square, product = products.sum(dim=1, dtype=torch.float64).tolist()
    lengths = math.sqrt(first_square * second_square)
    cosine = product / lengths if lengths > 0 else 1.0
    if abs(cosine) > ALMOST_PARALLEL:
        coefficients = [1 - t, t]
    else:
        angle = math.acos(cosine)
        coefficients = [math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)]
    coefficients_J = torch.tensor(coefficients, dtype=torch.float64)
    return MergedDelta(weighted_sum(weights_JN, coefficients_J), coefficients_J)
