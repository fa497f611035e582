import torch

from fusion.merging.deltas import TensorDeltas
from fusion.merging.measuring.fisher_coefficients import fisher_coefficients
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.fisher_shares import fisher_sum, survey_of_means


@merge_method(paper="https://arxiv.org/abs/2111.09832", evidence=fisher_coefficients, survey=survey_of_means)
def fisher_learned(deltas: TensorDeltas) -> MergedDelta:
    """The parts of Fisher merging with coefficients learned for each target and tensor: sum_j c_j F_j d_j / sum_i F_i.

    The squared gradients F say position by position which target is heard, as in `fisher`, which has all c_j = 1; the
    coefficients say how loudly in each tensor, as in `learned` (https://arxiv.org/abs/2310.02575), whose deltas are
    whole. Each target's F is divided by its mean over the model.
    """
    coefficients_J = torch.stack(deltas.evidence.beside.whole(())).double()
    equal_J = torch.full_like(coefficients_J, 1 / deltas.num_targets)
    return fisher_sum(deltas, equal_J, deltas.survey, coefficients_J)
