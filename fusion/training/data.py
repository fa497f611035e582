"""The alignment data pipeline as a LightningDataModule: dialogues in, sparse batches out.

Tensor legend: B dialogues, T tokens, R supervised rows of the batch, K target entries.
"""

from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fusion.alignment.target_kind import SPANS
from fusion.config.schema import TrainConfig
from fusion.objective.fused_store import FusedExample, FusedStore
from fusion.objective.target_form import TargetForm
from fusion.teaching.forward import pad
from fusion.training.prepare import Prepared, prepare
from fusion.training.sampler import BatchPlan, make_plan

CPU = torch.device("cpu")


class FusionBatch(NamedTuple):
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
    step_rows: Tensor
    """int64 scalar: supervised rows of the whole optimiser step, over all devices and micro-batches."""


class MicroBatches(Dataset):
    """Item i is the i-th micro-batch of this rank, whatever was read before."""

    def __init__(self, store: FusedStore, plan: BatchPlan, world: int, rank: int, per_rank: int) -> None:
        self.store, self.plan = store, plan
        self.world, self.rank, self.per_rank = world, rank, per_rank

    def __len__(self) -> int:
        return self.plan.total_steps * self.per_rank

    def __getitem__(self, number: int) -> FusionBatch:
        step, part = divmod(number, self.per_rank)
        chosen = self.plan.micro_batches(step, self.world, self.rank, self.per_rank)[part]
        step_rows = int(self.store.num_rows[self.plan.step(step)].sum())
        if not len(chosen):
            return idle(collate([self.store[int(self.plan.step(step)[0])]], step_rows, self.store.form))
        return collate([self.store[int(example)] for example in chosen], step_rows, self.store.form)


def collate(examples: list[FusedExample], step_rows: int, form: TargetForm) -> FusionBatch:
    """Pad dialogues and stack their sparse targets; `step_rows` normalises the loss."""
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
        torch.tensor(step_rows),
    )


def idle(batch: FusionBatch) -> FusionBatch:
    """`batch` without any weight: every step has the same number of micro-batches, also when dialogues run short."""
    return batch._replace(weights_RK=torch.zeros_like(batch.weights_RK))


class FusionDataModule(pl.LightningDataModule):
    """Teacher pass, alignment and fusion through the cache, then batches for the pivot's copy.

    `prepare_data` does the work once, in one process; `setup` only opens what is in the cache. The settings' model and
    data paths must be real ones: `fusion.world.with_world` resolves `world:NAME`.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.prepared: Prepared | None = None

    def prepare_data(self) -> None:
        self.prepared = self.prepared or prepare(self.config)

    def setup(self, stage: str | None = None) -> None:
        self.prepared = self.prepared or prepare(self.config)

    @property
    def form(self) -> TargetForm:
        """What the targets say."""
        assert self.prepared is not None, "setup() comes first"
        return self.prepared.fused.form

    @property
    def world_size(self) -> int:
        return self.config.parallel.devices * self.config.parallel.num_nodes

    @property
    def accumulation(self) -> int:
        """Micro-batches per device and optimiser step."""
        assert self.prepared is not None, "setup() comes first"
        trainer = self.config.trainer
        batch_size = min(trainer.batch_size, len(self.prepared.fused))
        per_pass = (trainer.micro_batch_size or batch_size) * self.world_size
        return max(1, -(-batch_size // per_pass))

    @property
    def plan(self) -> BatchPlan:
        assert self.prepared is not None, "setup() comes first"
        trainer, lengths = self.config.trainer, self.prepared.fused.lengths
        return make_plan(lengths, trainer.batch_size, trainer.epochs, self.config.seed, self.world_size)

    @property
    def total_steps(self) -> int:
        limit = self.config.trainer.max_steps
        return self.plan.total_steps if limit < 0 else min(limit, self.plan.total_steps)

    def tokens_trained(self, steps: int) -> int:
        """Tokens that `steps` optimiser steps read, over all devices, padding not counted."""
        assert self.prepared is not None
        plan, lengths = self.plan, self.prepared.fused.lengths
        return sum(int(lengths[plan.step(step)].sum()) for step in range(steps))

    def train_dataloader(self) -> DataLoader:
        assert self.prepared is not None
        rank = self.trainer.global_rank if self.trainer is not None else 0
        batches = MicroBatches(self.prepared.fused, self.plan, self.world_size, rank, self.accumulation)
        return DataLoader(batches, batch_size=None, shuffle=False)
