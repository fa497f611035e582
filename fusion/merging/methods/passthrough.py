import torch

from fusion.merging.deltas import TensorDeltas
from fusion.merging.method import MergedDelta, merge_method


@merge_method(paper="https://github.com/arcee-ai/mergekit", needs_base=False, num_targets=1)
def passthrough(deltas: TensorDeltas) -> MergedDelta:
    """The target as it is; with a scale, the base and so much of its delta (of its weights without a base)."""
    return MergedDelta(lambda block: block.deltas_JN[0].clone(), torch.ones(1, dtype=torch.float64))
