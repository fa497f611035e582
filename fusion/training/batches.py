"""What one forward pass reads, and what one optimiser step reads.

Tensor legend: B dialogues, T tokens, R supervised rows of the batch, K target entries.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusion.alignment.target_kind import SPANS
from fusion.objective.fused_store import FusedExample
from fusion.objective.target_form import TargetForm
from fusion.teaching.forward import pad

CPU = torch.device("cpu")


class FusionBatch(NamedTuple):
    """A micro-batch: dialogues that go through the model together."""

    ids_BT: Tensor
    """int64, padded on the right."""
    mask_BT: Tensor
    """int64: 1 where a token stands."""
    rows_R: Tensor
    """int64 positions of the supervised rows in the flattened [B * T]."""
    targets_RK: Tensor
    """int64: column 0 is the reference token; the others are the fused target, whose ids are what the kind of the
    targets says. The id of a span is the place of its first row in this batch."""
    weights_RK: Tensor
    """float32: column 0 is 1, the others are fused weights (all 0: no fusion term in this row)."""


class OptimizerStep(NamedTuple):
    """This rank's share of one optimiser step; all ranks have as many micro-batches."""

    micro_batches: list[FusionBatch]
    rows: Tensor
    """int64 scalar: supervised rows of the whole step, over all ranks and micro-batches; normalises the loss."""
    names: list[str]
    """Content hashes of the rank's dialogues."""


def collate(examples: list[FusedExample], form: TargetForm) -> FusionBatch:
    """Pad dialogues and stack their sparse targets."""
    ids_BT, mask_BT = pad([example.ids_N for example in examples], CPU)
    width = ids_BT.shape[1]
    columns = max(int(np.diff(example.targets.indptr_R).max()) for example in examples)
    targets, weights = zip(*(example.targets.padded(columns) for example in examples), strict=True)
    if form.kind.name == SPANS:  # their ids count the rows of a dialogue
        firsts = np.cumsum([0, *(len(example.rows_R) for example in examples)])
        targets = tuple(first + ids for first, ids in zip(firsts, targets, strict=False))
    references = np.concatenate([example.ids_N[example.rows_R + 1] for example in examples]).astype(np.int64)
    rows = np.concatenate([number * width + example.rows_R for number, example in enumerate(examples)])
    return FusionBatch(
        ids_BT,
        mask_BT,
        torch.from_numpy(rows),
        torch.from_numpy(np.column_stack([references, np.concatenate(targets)])),
        torch.from_numpy(np.column_stack([np.ones(len(rows), np.float32), np.concatenate(weights)])),
    )


def idle(batch: FusionBatch) -> FusionBatch:
    """`batch` without any weight: every rank has the same number of micro-batches, also when dialogues run short."""
    return batch._replace(weights_RK=torch.zeros_like(batch.weights_RK))
