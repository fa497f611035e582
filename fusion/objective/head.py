"""The output head: what turns hidden states into logits.

Tensor legend: V vocabulary, H hidden size, R rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


class Head(NamedTuple):
    """Logits are z = scale * (h W^T + b), and softcap * tanh(z / softcap) where there is a soft cap."""

    weight_VH: Tensor
    """Rows beyond the tokeniser's ids are tokens like the others, as they are for the model."""
    bias_V: Tensor | None = None
    scale: float = 1.0
    """Factor of the logits: Cohere multiplies them, Granite divides."""
    softcap: float | None = None
    """Bound of the logits' magnitude, for instance 30 in Gemma-2 (https://arxiv.org/abs/2408.00118)."""

    def logits(self, products_RV: Tensor) -> Tensor:
        """Logits [R, V], in float32 or better, of the products h W^T; the same tensor where nothing is to do."""
        logits_RV = products_RV.to(torch.promote_types(products_RV.dtype, torch.float32))
        if self.bias_V is not None:
            logits_RV = logits_RV + self.bias_V
        if self.scale != 1:
            logits_RV = logits_RV * self.scale
        return logits_RV if self.softcap is None else (logits_RV / self.softcap).tanh_().mul_(self.softcap)

    def back_to_products_(self, gradient_RV: Tensor, logits_RV: Tensor) -> Tensor:
        """Turn the gradient of `logits_RV` into that of the products (the bias apart), in place."""
        if self.softcap is not None:
            gradient_RV.mul_((logits_RV / self.softcap).square_().neg_().add_(1))
        return gradient_RV if self.scale == 1 else gradient_RV.mul_(self.scale)


def whole_head(head: Head) -> Head:
    """`head` with plain tensors: what is sharded over processes is gathered.

    Every process has rows of its own, and a sharded parameter gets the gradient of the sum of all their losses,
    sharded as it is. (FSDP2 gives plain tensors to what it wraps, and reduces their gradients by itself.)
    """
    bias_V = head.bias_V
    return head._replace(weight_VH=_whole(head.weight_VH), bias_V=None if bias_V is None else _whole(bias_V))


def _whole(sharded: Tensor) -> Tensor:
    if not isinstance(sharded, DTensor):
        return sharded
    dimensions = range(sharded.device_mesh.ndim)
    gathered = sharded.redistribute(placements=[Replicate() for _ in dimensions])
    return gathered.to_local(grad_placements=[Partial() for _ in dimensions])
