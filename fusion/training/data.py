"""The alignment data pipeline as a LightningDataModule: dialogues in, optimiser steps of sparse batches out."""

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from fusion.config.schema import TrainConfig
from fusion.objective.fused_store import FusedStore
from fusion.objective.target_form import TargetForm
from fusion.training.batches import FusionBatch, OptimizerStep, collate, idle
from fusion.training.micro_batches import Limits
from fusion.training.prepare import Prepared, prepare
from fusion.training.sampler import BatchPlan, make_plan


class Steps(Dataset):
    """Item i is this rank's share of optimiser step `first + i`, whatever was read before."""

    def __init__(
        self, store: FusedStore, plan: BatchPlan, world: int, rank: int, limits: Limits, first: int = 0
    ) -> None:
        self.store, self.plan = store, plan
        self.world, self.rank, self.limits = world, rank, limits
        self.first = first

    def __len__(self) -> int:
        return self.plan.total_steps - self.first

    def __getitem__(self, number: int) -> OptimizerStep:
        step = self.first + number
        shares = self.plan.micro_batches(step, self.world, self.rank, self.limits)
        rows = int(self.store.num_rows[self.plan.step(step)].sum())
        names = [self.store.examples[int(example)] for share in shares for example in share]
        return OptimizerStep([self._batch(step, share) for share in shares], torch.tensor(rows), names)

    def _batch(self, step: int, share: np.ndarray) -> FusionBatch:
        numbers = share if len(share) else self.plan.step(step)[:1]
        examples = [self.store[int(number)] for number in numbers]
        batch = collate(examples, self.store.form, self.limits.packed)
        return batch if len(share) else idle(batch)


class FusionDataModule(pl.LightningDataModule):
    """Teacher pass, alignment and fusion through the cache, then batches for the pivot's copy.

    `prepare_data` does the work once, in one process; `setup` only opens what is in the cache. The settings' model and
    data paths must be real ones: `fusion.world.with_world` resolves `world:NAME`.
    """

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        self.config = config
        self.prepared: Prepared | None = None
        self.first_step = 0
        """Optimiser step to begin with; a resumed run sets it."""

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
        trainer = self.config.trainer
        limits = Limits(trainer.micro_batch_size, trainer.micro_batch_tokens, trainer.packing)
        steps = Steps(self.prepared.fused, self.plan, self.world_size, rank, limits, self.first_step)
        return DataLoader(
            steps,
            batch_size=None,
            shuffle=False,
            num_workers=trainer.data_workers,
            persistent_workers=trainer.data_workers > 0,
            pin_memory=self._is_on_cuda(),
        )

    def _is_on_cuda(self) -> bool:
        return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
