"""What a person sees of a training: a bar with numbers beside it on a terminal, plain lines in a log file."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from fusion.training.data import FusionDataModule
from fusion.training.throughput import is_log_step


class TrainingProgress(pl.Callback):
    """Step, time left, losses, speed, learning rate, gradient norm, and who won the step's dialogues; rank 0 alone.

    The numbers change every `log_every_steps`, when they are known anyway; the bar moves with every step.
    """

    def __init__(self, data: FusionDataModule, console: Console | None = None) -> None:
        self.data = data
        self.console = console or Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._plan = self.data.plan
        self._first, self._started = trainer.global_step, time.perf_counter()
        if trainer.is_global_zero and self.console.is_terminal:
            self._bar = _bar(self.console)
            self._task = self._bar.add_task("training", total=trainer.max_steps, completed=self._first, numbers="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, number: int
    ) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step)
        if trainer.is_global_zero and is_log_step(trainer, self.data.config.trainer):
            self._tell(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _tell(self, trainer: pl.Trainer) -> None:
        metrics = {name.removeprefix("train/"): float(value) for name, value in trainer.callback_metrics.items()}
        numbers = ", ".join([*_numbers(metrics), f"won by {self._winners(trainer.global_step - 1)}"])
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
            return
        step, steps = trainer.global_step, trainer.max_steps
        left = (time.perf_counter() - self._started) / (step - self._first) * (steps - step)
        line = f"step {step}/{steps}, {timedelta(seconds=round(left))} left: {numbers}"
        self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _winners(self, step: int) -> str:
        assert self.data.prepared is not None
        store = self.data.prepared.fused
        examples = self._plan.step(step)
        counts = Counter(store.winners[store.examples[int(example)]] for example in examples)
        return " ".join(f"{name} {count / len(examples):.0%}" for name, count in sorted(counts.items()))


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(ratio=1)),
        console=console,
        expand=True,
    )


def _numbers(metrics: Mapping[str, float]) -> Iterator[str]:
    """What is known of `metrics`, in words: speed is not, before the warm-up is over."""
    yield f"loss {metrics['loss']:.4f} (CE {metrics['ce']:.4f}, fusion {metrics['fusion']:.4f})"
    if "tokens_per_second" in metrics:
        supervised = f"{metrics['supervised_tokens_per_second']:,.0f} supervised"
        yield f"{metrics['tokens_per_second']:,.0f} tokens/s ({supervised})"
    if "mfu" in metrics:
        yield f"MFU {metrics['mfu']:.1%}"
    yield f"lr {metrics['lr']:.3g}"
    yield f"gradient norm {metrics['grad_norm']:.3g}"
    yield f"peak {metrics['peak_memory_gib']:.2f} GiB"
