"""The last step of a merge: base + scale * delta, rounded once to the dtype of the output."""

import torch
from torch import Tensor

from fusion.config import UserError
from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import is_finite, on_cpu
from fusion.merging.operands import wide_dtype


def scaled_sum(name: str, origin_N: Tensor | None, delta_N: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """base + scale * delta in `dtype`, rounded once.

    Raises:
        UserError: the result overflows the dtype.
    """
    rounded_N = torch.empty(delta_N.shape, dtype=dtype, device=delta_N.device)
    if dtype == torch.bfloat16 and on_cpu(delta_N) and origin_N is not None:
        arrays = delta_N.reshape(-1).numpy(), origin_N.reshape(-1).float().numpy()
        finite = kernels.round_to_bfloat16(*arrays, scale, rounded_N.view(-1).view(torch.uint16).numpy())
    else:
        merged_N = delta_N.to(wide_dtype(dtype)) * scale
        if origin_N is not None:
            merged_N += origin_N.to(merged_N)
        finite = is_finite(rounded_N.copy_(merged_N))
    if not finite:
        raise UserError(f"'{name}' overflows {dtype} at scale {scale:g}: choose a smaller scale")
    return rounded_N
