"""Which dialogues every optimiser step reads: a pure function of (seed, step, number of devices).

Nothing is kept between steps, so a resumed run reads on where it stopped, and the order is the same for any number of
devices and data workers.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fusion.config import UserError
from fusion.training.micro_batches import Limits, deal

BUCKET_BATCHES = 16
"""Batches whose dialogues are sorted by length together: little padding, still a random order."""


@dataclass(frozen=True)
class BatchPlan:
    """The batches of a run over dialogues with `lengths` tokens."""

    lengths: tuple[int, ...]
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def step(self, number: int) -> np.ndarray:
        """Example numbers of optimiser step `number`, over all devices: int64."""
        epoch, within = divmod(number, self.steps_per_epoch)
        return _epoch_batches(self, epoch)[within]

    def micro_batches(self, step: int, world: int, rank: int, limits: Limits) -> list[np.ndarray]:
        """The share of `rank` in a step: example numbers of its micro-batches, int64.

        Over all ranks every example occurs once, and all ranks have as many parts; where a step has fewer examples
        than parts, some are empty.
        """
        examples = self.step(step)
        places = deal([self.lengths[example] for example in examples], world, limits)[rank]
        return [examples[part] for part in places]


def make_plan(lengths: np.ndarray, batch_size: int, epochs: int, seed: int, world: int) -> BatchPlan:
    """Plan batches for `world` devices: at most `batch_size` dialogues per step, and as many in all, give or take one.

    Raises:
        UserError: there are no dialogues, or fewer in a step than devices.
    """
    if not len(lengths):
        raise UserError(
            "no dialogue is left to train on; see `keep_pivot_won`, `max_length` and the report of the data"
        )
    plan = BatchPlan(tuple(map(int, lengths)), min(batch_size, len(lengths)), epochs, seed)
    smallest = len(lengths) // plan.steps_per_epoch
    if smallest < world:
        raise UserError(
            f"a step has {smallest} dialogues for {world} devices; raise trainer.batch_size, or lower parallel.devices"
        )
    return plan


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
