"""One training run: Lightning's trainer from the settings, and the trained copy of the pivot."""

import logging
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from transformers import PreTrainedModel

from fusion.config.schema import TrainConfig
from fusion.training.checkpoint_folder import NOTHING_DONE, Checkpoint
from fusion.training.checkpoints import Checkpoints
from fusion.training.data import FusionDataModule
from fusion.training.gather import whole_model
from fusion.training.health import Health
from fusion.training.memory import OutOfMemory
from fusion.training.module import FusionModule
from fusion.training.packing import PackingCheck
from fusion.training.parallel import accelerator, check_devices, cluster, lightning_precision, make_strategy
from fusion.training.progress import TrainingProgress
from fusion.training.throughput import Throughput


@dataclass(frozen=True)
class Fitted:
    model: PreTrainedModel | None
    """In one piece; of several processes only the first one has it."""
    steps: int
    seconds: float
    """Over all attempts, but for what was lost in a kill."""
    metrics: dict[str, float]
    """Last logged training metrics; rates are those of the whole run, without its warm-up."""


def fit(
    config: TrainConfig,
    data: FusionDataModule,
    loggers: list[Logger],
    folder: Path | None = None,
    start: Checkpoint | None = None,
) -> Fitted:
    """Train a copy of the pivot on `data` and return it; the data module must have been set up.

    Determined by the settings and the seed on the same device count, however often the run was killed and went on.

    Args:
        folder: the job's, for checkpoints; without it there are none.
        start: the checkpoint to go on from (`find_start`), if any; needs `folder`.

    Raises:
        UserError: the devices are not there, the model cannot be trained so, the loss or the gradient is not finite,
            or the device has not enough memory.
        Terminated: the job was told to end, and there is a checkpoint.
    """
    assert start is None or folder is not None, "a run that goes on keeps checkpoints"
    parallel = config.parallel
    check_devices(parallel)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own call of a torch function
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its advertisements, not its warnings
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = FusionModule(config, data.total_steps, data.form)
    throughput, memory = Throughput(data), OutOfMemory(config)
    checkpoints = [Checkpoints(data, folder, start)] if folder is not None else []
    trainer = pl.Trainer(
        accelerator=accelerator(parallel),
        devices=parallel.devices,
        num_nodes=parallel.num_nodes,
        strategy=make_strategy(config),
        plugins=[cluster(parallel)],
        precision=lightning_precision(config),  # type: ignore[arg-type]
        max_epochs=1,  # the plan of batches holds all epochs
        max_steps=data.total_steps,
        logger=loggers or False,
        log_every_n_steps=config.trainer.log_every_steps,
        callbacks=[throughput, memory, *_callbacks(config, data), *checkpoints],
        enable_progress_bar=False,  # `TrainingProgress` says more
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    started = time.perf_counter()
    with memory.explained():
        trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.logged_metrics.items()}
    earlier = start.state if start else NOTHING_DONE
    metrics = {**earlier.metrics, **logged, **throughput.summary}
    seconds = earlier.seconds + time.perf_counter() - started
    return Fitted(whole_model(trainer, module), trainer.global_step, seconds, metrics)


def _callbacks(config: TrainConfig, data: FusionDataModule) -> list[Callback]:
    chosen = [PackingCheck()] if config.trainer.packing else []
    return [Health(data), *chosen, *([TrainingProgress(data)] if config.trainer.progress_bar else [])]
