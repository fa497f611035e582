"""One training run: Lightning's trainer from the settings, and the trained copy of the pivot."""

import logging
import sys
import time
import warnings
from dataclasses import dataclass

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import Logger
from transformers import PreTrainedModel

from fusion.config.schema import TrainConfig
from fusion.training.data import FusionDataModule
from fusion.training.module import FusionModule


@dataclass(frozen=True)
class Fitted:
    model: PreTrainedModel
    steps: int
    seconds: float
    metrics: dict[str, float]
    """Last logged training metrics."""


def fit(config: TrainConfig, data: FusionDataModule, loggers: list[Logger]) -> Fitted:
    """Train a copy of the pivot on `data` and return it; the data module must have been set up.

    Determined by the settings and the seed on the same device count.
    """
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # Lightning's own call of a torch function
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)  # its advertisements, not its warnings
    pl.seed_everything(config.seed, workers=True, verbose=False)
    module = FusionModule(
        config.pivot,
        config.objective,
        config.optim,
        data.total_steps,
        config.trainer.gradient_checkpointing,
        data.form,
    )
    trainer = pl.Trainer(
        accelerator=config.parallel.accelerator,
        devices=config.parallel.devices,
        num_nodes=config.parallel.num_nodes,
        precision=config.trainer.precision,  # type: ignore[arg-type]
        max_epochs=1,  # the plan of batches holds all epochs
        max_steps=data.total_steps,
        logger=loggers or False,
        log_every_n_steps=config.trainer.log_every_steps,
        callbacks=_callbacks(config),
        enable_progress_bar=_shows_progress(config),
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    started = time.perf_counter()
    trainer.fit(module, datamodule=data)
    metrics = {name: float(value) for name, value in trainer.logged_metrics.items()}
    return Fitted(module.model, trainer.global_step, time.perf_counter() - started, metrics)


def _callbacks(config: TrainConfig) -> list[Callback]:
    return [TQDMProgressBar(refresh_rate=20)] if _shows_progress(config) else []


def _shows_progress(config: TrainConfig) -> bool:
    """A progress bar is for people; in a log file it is noise."""
    return config.trainer.progress_bar and sys.stderr.isatty()
