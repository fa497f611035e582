from typing import Annotated

import torch

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method
from fusion.merging.parameters import Between


@merge_method(paper="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001", num_targets=1)
def nearswap(deltas: TensorDeltas, *, t: Annotated[float, Between(0, 1e6, above=True)] = 1e-3) -> MergedDelta:
    """NearSwap: the base is moved towards the target by at most `t` per element, d * min(1, t / |d|)."""
    one = torch.ones(1, dtype=torch.float64)
    return MergedDelta(lambda block: block.deltas_JN[0].clamp(-t, t), one)
