"""What one forward pass reads, and what one optimiser step reads.

Tensor legend: B dialogues (1 when they are packed into one row), T tokens, R supervised rows of the batch, K target
entries.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    positions_BT: Tensor | None = None
    """int64: places of the tokens in their dialogues, when several stand in a row; None when each has its own row."""

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process through its pipe: as torch sends tensors, a step of many parts would ask for more file
        descriptors and shared memory than processes are often allowed."""
        return _from_arrays, tuple(None if tensor is None else tensor.numpy() for tensor in self)


def _from_arrays(*arrays: np.ndarray | None) -> FusionBatch:
    return FusionBatch(*(None if array is None else torch.from_numpy(array) for array in arrays))  # type: ignore[arg-type]


class OptimizerStep(NamedTuple):
    """This rank's share of one optimiser step; all ranks have as many micro-batches."""

    micro_batches: list[FusionBatch]
    rows: Tensor
    """int64 scalar: supervised rows of the whole step, over all ranks and micro-batches; normalises the loss."""
    names: list[str]
    """Content hashes of the rank's dialogues."""


def collate(examples: Sequence[FusedExample], form: TargetForm, packed: bool = False) -> FusionBatch:
    """Pad dialogues, or pack them one behind the other, and stack their sparse targets."""
    ids = [example.ids_N for example in examples]
    ids_BT, mask_BT, positions_BT = _pack(ids) if packed else (*pad(ids, CPU), None)
    starts = np.cumsum([0, *map(len, ids)]) if packed else np.arange(len(ids)) * ids_BT.shape[1]
    columns = max(int(np.diff(example.targets.indptr_R).max()) for example in examples)
    targets, weights = zip(*(example.targets.padded(columns) for example in examples), strict=True)
    if form.kind.name == SPANS:  # their ids count the rows of a dialogue
        firsts = np.cumsum([0, *(len(example.rows_R) for example in examples)])
        targets = tuple(first + ids for first, ids in zip(firsts, targets, strict=False))
    references = np.concatenate([example.ids_N[example.rows_R + 1] for example in examples]).astype(np.int64)
    rows = np.concatenate([start + example.rows_R for start, example in zip(starts, examples, strict=False)])
    return FusionBatch(
        ids_BT,
        mask_BT,
        torch.from_numpy(rows),
        torch.from_numpy(np.column_stack([references, np.concatenate(targets)])),
        torch.from_numpy(np.column_stack([np.ones(len(rows), np.float32), np.concatenate(weights)])),
        positions_BT,
    )


def _pack(ids: Sequence[np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, mask, positions) of dialogues in one row: int64 [1, T]; positions begin anew with every dialogue."""
    ids_1T = torch.from_numpy(np.concatenate(ids).astype(np.int64))[None]
    positions_1T = torch.from_numpy(np.concatenate([np.arange(len(one)) for one in ids]))[None]
    return ids_1T, torch.ones_like(ids_1T), positions_1T


def idle(batch: FusionBatch) -> FusionBatch:
    """`batch` without any weight: every rank has the same number of micro-batches, also when dialogues run short."""
    return batch._replace(weights_RK=torch.zeros_like(batch.weights_RK))
