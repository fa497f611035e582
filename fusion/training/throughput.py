"""How fast and how big a run is: tokens and FLOPs per second, memory, and what was seen so far, over all devices."""

import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch

from fusion.config.schema import TrainerConfig
from fusion.training.data import FusionDataModule
from fusion.training.flops import peak_flops
from fusion.training.module import FusionModule

WARMUP_STEPS = 2
"""First steps of a process that are not timed: kernels are compiled and chosen, and memory is fetched."""
GIB = 2**30
STATUS = Path("/proc/self/status")


class Work(NamedTuple):
    """What one optimiser step, or several, read over all devices; padding does not count."""

    dialogues: int = 0
    tokens: int = 0
    rows: int = 0
    """Supervised rows, which are the tokens that they predict."""
    flops: int = 0


@dataclass
class Stretch:
    """Work since a moment."""

    started: float
    """Seconds of `time.perf_counter`."""
    work: Work

    def add(self, work: Work) -> None:
        self.work = add_work(self.work, work)

    def rates(self, now: float, peak: float | None) -> dict[str, float]:
        """Tokens per second, and the share of `peak` FLOP/s that was used, where there is one; none without work."""
        if not self.work.tokens:
            return {}
        seconds = now - self.started
        rates = {
            "train/tokens_per_second": self.work.tokens / seconds,
            "train/supervised_tokens_per_second": self.work.rows / seconds,
        }
        return rates if peak is None else {**rates, "train/mfu": self.work.flops / seconds / peak}


class Throughput(pl.Callback):
    """Logs rates since the last log line, and counts since the first step; `summary` has the rates of the whole run.

    All devices know every step, so only their memory is asked for.
    """

    def __init__(self, data: FusionDataModule) -> None:
        self.data = data
        self.summary: dict[str, float] = {}
        self._seen = Work()
        self._steps = 0
        self._whole: Stretch | None = None
        self._recent: Stretch | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, FusionModule)
        settings, device = self.data.config.trainer, trainer.strategy.root_device
        self._plan, self._flops = self.data.plan, module.flops
        peak = settings.peak_tflops * 1e12 if settings.peak_tflops else peak_flops(device, settings.precision)
        self._peak = None if peak is None else peak * trainer.world_size
        self._seen = add_work(*(self._work(step) for step in range(trainer.global_step)))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, number: int
    ) -> None:
        settings = self.data.config.trainer
        now = time.perf_counter()
        self._count(self._work(trainer.global_step - 1), now)
        if is_log_step(trainer, settings):
            recent = self._recent.rates(now, self._peak) if self._recent else {}
            state = self._state(trainer)
            module.log_dict({**recent, **state}, batch_size=1)
            self.summary = {**(self._whole.rates(now, self._peak) if self._whole else {}), **state}
            self._recent = Stretch(now, Work()) if self._recent else None

    def _count(self, work: Work, now: float) -> None:
        self._steps += 1
        self._seen = add_work(self._seen, work)
        if self._whole is None or self._recent is None:
            if self._steps == WARMUP_STEPS:
                self._whole, self._recent = Stretch(now, Work()), Stretch(now, Work())
            return
        self._whole.add(work)
        self._recent.add(work)

    def _work(self, step: int) -> Work:
        assert self.data.prepared is not None
        store, examples = self.data.prepared.fused, self._plan.step(step)
        lengths, rows = store.lengths[examples].tolist(), int(store.num_rows[examples].sum())
        return Work(len(examples), sum(lengths), rows, self._flops.step(lengths, rows))

    def _state(self, trainer: pl.Trainer) -> dict[str, float]:
        device = trainer.strategy.root_device
        own = torch.tensor(peak_memory(device) / GIB, device=device)
        largest = trainer.strategy.reduce(own, reduce_op="max")
        return {
            "train/peak_memory_gib": float(largest),
            "train/dialogues": float(self._seen.dialogues),
            "train/tokens": float(self._seen.tokens),
        }


def is_log_step(trainer: pl.Trainer, settings: TrainerConfig) -> bool:
    """Whether the optimiser step that has just ended is told of: every `log_every_steps`, and the last one."""
    return trainer.global_step % settings.log_every_steps == 0 or trainer.global_step == trainer.max_steps


def add_work(*works: Work) -> Work:
    return Work(*map(sum, zip(Work(), *works, strict=True)))


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.is_file():  # `getrusage` gives a process the peak of the one that started it
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
