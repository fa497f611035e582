"""Which dialogues every optimiser step reads: a pure function of (seed, step, number of devices).

Nothing is kept between steps, so a resumed run reads on where it stopped, and the order is the same for any number of
devices and data workers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusion.config import UserError

BUCKET_BATCHES = 16
"""Batches whose dialogues are sorted by length together: little padding, still a random order."""


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run over dialogues with `lengths` tokens."""

    lengths: tuple[int, ...]
    batch_size: int
    steps_per_epoch: int
    epochs: int
    seed: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def step(self, number: int) -> np.ndarray:
        """Example numbers of optimiser step `number`, over all devices: int64."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return _epoch_batches(self, epoch)[within]

    def micro_batches(self, step: int, world: int, rank: int, per_rank: int) -> Sequence[np.ndarray]:
        """The share of `rank` in a step, in `per_rank` parts; over all ranks every example occurs once."""
        parts = np.array_split(self.step(step), world * per_rank)
        return parts[rank * per_rank : (rank + 1) * per_rank]


def make_plan(lengths: np.ndarray, batch_size: int, epochs: int, seed: int, parts: int) -> BatchPlan:
    """Plan batches; `parts` is the number of micro-batches that every step is cut into, over all devices.

    The steps of an epoch differ by at most one dialogue. They have at most `batch_size` dialogues, unless some would
    then have fewer than `parts`: an epoch has one step less in that case.

    Raises:
        UserError: there are no dialogues, or fewer than parts, so that some device would idle.
    """
    if not len(lengths):
        raise UserError(
            "no dialogue is left to train on; see `keep_pivot_won`, `max_length` and the report of the data"
        )
    steps = -(-len(lengths) // batch_size)
    if len(lengths) // steps < parts:
        steps = max(1, len(lengths) // batch_size)
    if len(lengths) // steps < parts:
        raise UserError(
            f"a step has {min(batch_size, len(lengths))} dialogues but is cut into {parts} micro-batches; "
            "raise trainer.micro_batch_size, or lower trainer.batch_size or parallel.devices"
        )
    return BatchPlan(tuple(map(int, lengths)), min(batch_size, len(lengths)), steps, epochs, seed)


@lru_cache(maxsize=2)
def _epoch_batches(plan: BatchPlan, epoch: int) -> list[np.ndarray]:
    generator = np.random.Generator(np.random.Philox(key=[plan.seed, epoch]))
    order = generator.permutation(len(plan.lengths))
    lengths = np.asarray(plan.lengths)
    window = plan.batch_size * BUCKET_BATCHES
    buckets = [order[start : start + window] for start in range(0, len(order), window)]
    arranged = np.concatenate([bucket[np.argsort(lengths[bucket], kind="stable")] for bucket in buckets])
    batches = np.array_split(arranged, plan.steps_per_epoch)
    return [batches[place] for place in generator.permutation(len(batches))]
