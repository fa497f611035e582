import math

import torch

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.numerics.matrices import Svd, average, is_matrix, merged_matrix, nearest_isometry
from fusion.merging.parameters import PositiveShare


def _bytes(name: str, shape: tuple[int, ...], num_targets: int) -> int:
    """Deltas in float32 and float64; at most all singular vectors of all targets, and one decomposition of them."""
    if not is_matrix(name, shape):
        return 0
    num_vectors = num_targets * min(shape)
    return 12 * num_targets * math.prod(shape) + 40 * num_vectors * sum(shape)


@merge_method(paper="https://arxiv.org/abs/2412.00081", whole=_bytes)
def tsv_m(deltas: TensorDeltas, *, rank: PositiveShare | None = None) -> MergedDelta:
    """Task singular vectors (TSV-M): each target's leading singular vectors, made orthogonal to the others'.

    Of d_j = U_j diag(s_j) V_j^T, [R, C], the first k = rank * min(R, C) components are kept (by default rank = 1 / J,
    so that those of all targets fill the space; at least one). With U = [U_1 ... U_J] and V likewise, the merged delta
    is iso(U) diag(s_1 ... s_J) iso(V)^T, where iso sets all singular values to 1 (the nearest orthonormal vectors).
    Embedding tables and tensors of other than two dimensions are averaged.
    """
    if not is_matrix(deltas.name, deltas.shape):
        return average(deltas)
    deltas_JRC = deltas.whole()
    share = 1 / deltas.num_targets if rank is None else rank
    count = max(1, int(share * min(deltas.shape) + 1e-9))
    kept = [Svd.of(delta_RC).first(count) for delta_RC in deltas_JRC]
    s_K = torch.cat([svd.s_K for svd in kept])
    if not len(s_K):
        return merged_matrix(deltas_JRC, deltas_JRC[0])
    left_RK = nearest_isometry(torch.cat([svd.u_RK for svd in kept], dim=1))
    right_KC = nearest_isometry(torch.cat([svd.vh_KC for svd in kept]))
    return merged_matrix(deltas_JRC, (left_RK * s_K) @ right_KC)
