"""Checkpoints of a training at optimiser steps, and what a SIGTERM does to it.

A run that was killed and goes on from one ends with the same bytes on one device; on another number of devices losses
differ as floating-point sums do. Everything happens between two steps, when the metrics of the first one are written.
"""

import json
import logging
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.optim.lr_scheduler import LRScheduler

from fusion.cache import canonical_json
from fusion.processes.failures import Terminated
from fusion.training.checkpoint_folder import (
    CHECKPOINTS,
    NOTHING_DONE,
    Checkpoint,
    Digest,
    RunState,
    begin,
    clear_unfinished,
    digest_files,
    find_checkpoint,
    publish,
)
from fusion.training.data import FusionDataModule
from fusion.training.health import NotFinite
from fusion.training.random_state import load_random_state, save_random_state
from fusion.training.ranks import SharedFailure, from_all_ranks, together
from fusion.training.sharded_state import load_tensors, save_tensors, shard_pattern

log = logging.getLogger(__name__)


def find_start(data: FusionDataModule, job_folder: Path) -> Checkpoint | None:
    """Where the training of `data`, which has been set up, goes on by `trainer.resume`; None: at the beginning.

    Raises:
        UserError: `trainer.resume` is the folder of a checkpoint that cannot be used; says all that is against it.
    """
    return find_checkpoint(data.config.trainer.resume, job_folder / CHECKPOINTS, deciding_settings(data))


def deciding_settings(data: FusionDataModule) -> dict[str, Any]:
    """What decides the result of a training, by dotted name: not where it runs, nor how its steps are cut."""
    assert data.prepared is not None, "setup() comes first"
    config = data.config
    of_inputs = {
        "pivot (hash)": data.prepared.inputs[config.pivot.name],
        "dialogues (hash)": data.prepared.inputs["dialogues"],
        "targets (hash)": data.prepared.fused.folder.name,
    }
    return _flat({"seed": config.seed, **of_inputs, **json.loads(canonical_json(config.recipe()))})


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = _flat(value) if isinstance(value, dict) else {"": value}
        flat.update({f"{name}.{key}".rstrip("."): one for key, one in inner.items()})
    return flat


class Checkpoints(pl.Callback):
    """Goes on from `start`, and keeps checkpoints in the folder of the job."""

    def __init__(self, data: FusionDataModule, job_folder: Path, start: Checkpoint | None = None) -> None:
        self.data, self.start = data, start
        self.folder = job_folder / CHECKPOINTS
        self._began = time.perf_counter()
        self._kept_step = 0
        """Newest step of which there is a checkpoint."""
        self._is_told_to_end = False
        self._failure = ""
        """Why the last checkpoint could not be written."""

    @property
    def earlier(self) -> RunState:
        """What earlier attempts have done."""
        return self.start.state if self.start else NOTHING_DONE

    def on_fit_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.start = from_all_ranks(self.start)[0]
        self.data.first_step = self._kept_step = self.earlier.step
        self._handler = signal.getsignal(signal.SIGTERM)
        if trainer.is_global_zero:
            clear_unfinished(self.folder)
        if self.start is not None:
            load_tensors(module, trainer.optimizers[0], self.start.folder)
            self._restore_progress(trainer)

    def _restore_progress(self, trainer: pl.Trainer) -> None:
        schedule = _schedule(trainer)
        schedule.load_state_dict(self.earlier.schedule)
        for group, rate in zip(trainer.optimizers[0].param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        epoch = trainer.fit_loop.epoch_loop
        done = epoch.manual_optimization.optim_step_progress.total  # `trainer.global_step`
        done.ready = done.completed = epoch._batches_that_stepped = self.earlier.step
        if self.earlier.step >= trainer.max_steps:
            trainer.limit_train_batches = 0  # only what comes after the training is left

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if self.start is not None:
            self._restore_random_state(trainer)
        self._is_told_to_end = trainer.received_sigterm
        if threading.current_thread() is threading.main_thread():
            # Lightning's own handler would wait for other processes right inside it.
            signal.signal(signal.SIGTERM, self._tell_to_end)

    def _restore_random_state(self, trainer: pl.Trainer) -> None:
        assert self.start is not None
        rank, world = trainer.global_rank, trainer.world_size
        if world == self.earlier.world:
            load_random_state(self.start.folder / _random_file(rank))
        else:  # nobody's state fits; what follows must not repeat what was drawn before
            torch.manual_seed(self.data.config.seed + world * self.earlier.step + rank)

    def _tell_to_end(self, *_: object) -> None:
        self._is_told_to_end = True

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, number: int) -> None:
        self._pause(trainer, module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._pause(trainer, module)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._handler)  # moving a large model away may take a while

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """The last good state: a device may have erred, and the same run go well on another one."""
        if isinstance(exception, NotFinite) and trainer.global_step > self._kept_step:
            self._keep(trainer, module)

    def _pause(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        step, ends = trainer.global_step, self._all_end(trainer)
        if step > self._kept_step and (ends or self._is_due(step, trainer.max_steps)):
            self._keep(trainer, module)
        if ends:
            raise Terminated(self._farewell(step, trainer.max_steps))

    def _all_end(self, trainer: pl.Trainer) -> bool:
        """Whether one process was told to end: they hear of it at different times."""
        if trainer.world_size == 1:
            return self._is_told_to_end
        own = torch.tensor(float(self._is_told_to_end), device=trainer.strategy.root_device)
        return bool(trainer.strategy.reduce(own, reduce_op="max"))

    def _is_due(self, step: int, last: int) -> bool:
        every = self.data.config.trainer.checkpoint_every_steps
        return 0 < every <= step and (step % every == 0 or step == last)

    def _farewell(self, step: int, last: int) -> str:
        told = f"told to end (SIGTERM) after step {step} of {last}"
        if self._failure:
            return f"{told}; its checkpoint could not be written: {self._failure}"
        return f"{told}; its checkpoint is in {self.folder}" if step else told

    def _keep(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Write a checkpoint; the run is worth more than one, and goes on without when it cannot be written."""
        step, self._failure = trainer.global_step, ""
        try:
            (working, *_) = together(lambda: begin(self.folder, step) if trainer.is_global_zero else self.folder)
            together(lambda: save_tensors(module, trainer.optimizers[0], working))
            digests = together(lambda: _finish_own(working, trainer.global_rank))
            together(lambda: self._publish(trainer, working, digests))
        except SharedFailure as failure:
            self._failure = str(failure)
            log.error("step %d: no checkpoint, an older one stays: %s", step, failure)
            if trainer.is_global_zero:
                clear_unfinished(self.folder)
            return
        self._kept_step = step

    def _publish(self, trainer: pl.Trainer, working: Path, digests: list[dict[str, Digest]]) -> None:
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
        state = RunState(
            step=trainer.global_step,
            world=trainer.world_size,
            seconds=self.earlier.seconds + time.perf_counter() - self._began,
            metrics={**self.earlier.metrics, **metrics},
            schedule=_schedule(trainer).state_dict(),
            settings=deciding_settings(self.data),
        )
        files = {name: digest for own in digests for name, digest in own.items()}
        publish(working, state, files, self.data.config.trainer.keep_checkpoints)


def _schedule(trainer: pl.Trainer) -> LRScheduler:
    schedule = trainer.lr_scheduler_configs[0].scheduler
    assert isinstance(schedule, LRScheduler)
    return schedule


def _random_file(rank: int) -> str:
    return f"random-{rank}.json"


def _finish_own(working: Path, rank: int) -> dict[str, Digest]:
    """Write what belongs to this process alone; digests of all that it has written."""
    save_random_state(working / _random_file(rank))
    shards = [path.name for path in working.glob(shard_pattern(rank))]
    return digest_files(working, [*shards, _random_file(rank)])
