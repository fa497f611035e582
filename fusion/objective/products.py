"""Products of large matrices on a CPU.

PyTorch multiplies float32 matrices by MKL, which has no AVX-512 for processors that are not Intel's: on an AMD EPYC
(Zen 5) oneDNN, which PyTorch has too, is 1.6 times as fast on them (`experiments/benchmarks/objective.py`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

LARGE = 1 << 22
"""Entries of a matrix from which on oneDNN is asked; the sums of small products keep their order."""

Product = Callable[[Tensor, Tensor], Tensor]


def product_with(matrix: Tensor) -> Product:
    """The faster way to multiply by `matrix`, or by others of its kind."""
    is_plain = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    return _onednn if is_plain and matrix.numel() >= LARGE and torch.backends.mkldnn.is_available() else torch.mm


def _onednn(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32; the operator that compiled models call for linear layers."""
    return torch.ops.mkldnn._linear_pointwise(left, right.T, None, "none", [], "")
