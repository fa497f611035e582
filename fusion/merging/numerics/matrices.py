"""What methods on whole weight matrices share: singular values in float64, and averages for all other tensors.

Products of singular vectors are the same whatever signs and rotations a library chooses for them; only such products
leave this module. Shapes: J targets, R rows, C columns, K singular values.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fusion.merging.deltas import TensorDeltas, in_blocks
from fusion.merging.layers import is_embedding
from fusion.merging.method import MergedDelta

NEGLIGIBLE = torch.finfo(torch.float32).eps
"""Singular values below this share of the largest count as zero: float32 deltas do not say more."""


class Svd(NamedTuple):
    """U diag(s) V^T in float64, without the singular values that count as zero."""

    u_RK: Tensor
    s_K: Tensor
    vh_KC: Tensor

    @classmethod
    def of(cls, matrix_RC: Tensor) -> "Svd":
        u_RK, s_K, vh_KC = torch.linalg.svd(matrix_RC.double(), full_matrices=False)
        rank = int(torch.count_nonzero(s_K > NEGLIGIBLE * s_K[0]))
        return cls(u_RK[:, :rank], s_K[:rank], vh_KC[:rank])

    def first(self, count: int) -> "Svd":
        return Svd(self.u_RK[:, :count], self.s_K[:count], self.vh_KC[:count])


def nearest_isometry(matrix_RC: Tensor) -> Tensor:
    """U V^T of U S V^T: the nearest matrix whose singular values are all 1, or 0 where they were."""
    svd = Svd.of(matrix_RC)
    return svd.u_RK @ svd.vh_KC


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor maps vectors: two dimensions, and no table that tokens are looked up in."""
    return len(shape) == 2 and not is_embedding(name)


def average(deltas: TensorDeltas) -> MergedDelta:
    """The mean of the targets."""
    shares_J = torch.full((deltas.num_targets,), 1 / deltas.num_targets, dtype=torch.float64)
    return MergedDelta.weighted(shares_J)


def merged_matrix(deltas_JRC: Tensor, merged_RC: Tensor, events: tuple[str, ...] = ()) -> MergedDelta:
    """A matrix that is no weighted sum; its coefficients are those of the weighted sum that comes closest to it."""
    flat_JN, merged_N = deltas_JRC.flatten(1).double(), merged_RC.double().flatten()
    products_JJ = flat_JN @ flat_JN.T
    coefficients_J = torch.linalg.pinv(products_JJ, rtol=1e-12, hermitian=True) @ (flat_JN @ merged_N)
    return MergedDelta(in_blocks(merged_RC), coefficients_J.cpu(), events)
