"""One of the processes that train together: `torch.distributed.run ... -m fusion.training.distributed FOLDER`."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from fusion.cache import write_json
from fusion.processes.member import take_part
from fusion.teaching.causal_lm import stored_dtype
from fusion.training.checkpoint_folder import Checkpoint
from fusion.training.export import export_model
from fusion.training.fit import fit
from fusion.training.parallel import world_size
from fusion.training.processes import Metrics, Task, Trained


class MetricsLogger(Logger):
    """Tells the starter; its loggers write the same as if the training had happened there."""

    @property
    def name(self) -> str:
        return "starter"

    @property
    def version(self) -> None:
        return None

    def __init__(self, handover: Path) -> None:
        super().__init__()
        self._metrics = Metrics(handover)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._metrics.write(metrics, step)

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The starter has logged them."""


def main(handover: Path) -> None:
    """Train what the task in `handover` says; a failure is told in a file there."""
    task = Task.load(handover)
    take_part(handover, world_size(task.config.parallel), lambda: train(task, handover))


def train(task: Task, handover: Path) -> None:
    """This process's part; the first one writes the model into the job's folder. Every starter reads `result.json`."""
    torch.set_num_threads(task.config.threads)
    data = task.data()
    start = Checkpoint.read(task.start) if task.start else None
    fitted = fit(task.config, data, [MetricsLogger(handover)], task.folder, start)
    if fitted.model is not None:
        assert data.prepared is not None
        dtype = stored_dtype(task.config.pivot)
        export_model(fitted.model, data.prepared.tokenizer, task.folder / "model", dtype, task.card)
    if int(os.environ["LOCAL_RANK"]) == 0:
        write_json(handover / "result.json", asdict(Trained(fitted.steps, fitted.seconds, fitted.metrics)))
    torch.distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
