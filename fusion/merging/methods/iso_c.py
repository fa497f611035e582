import math

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.matrices import Svd, average, is_matrix, merged_matrix


def _bytes(name: str, shape: tuple[int, ...], num_targets: int) -> int:
    """Deltas in float32 and float64, their sum, its singular vectors and the decomposition's own memory."""
    return (12 * num_targets + 48) * math.prod(shape) if is_matrix(name, shape) else 0


@merge_method(paper="https://arxiv.org/abs/2502.04959", whole=_bytes)
def iso_c(deltas: TensorDeltas) -> MergedDelta:
    """Isotropic merging in the common space (Iso-C): the sum of the deltas with all singular values made equal.

    sum_j d_j = U diag(s) V^T, [R, C] -> mean(s) U V^T. Directions in which the sum is zero stay zero, and the mean is
    over the others. Embedding tables and tensors of other than two dimensions are averaged.
    """
    if not is_matrix(deltas.name, deltas.shape):
        return average(deltas)
    deltas_JRC = deltas.whole()
    svd = Svd.of(deltas_JRC.double().sum(dim=0))
    merged_RC = (svd.u_RK * svd.s_K.mean()) @ svd.vh_KC if len(svd.s_K) else deltas_JRC[0]
    return merged_matrix(deltas_JRC, merged_RC)
