"""Experiment loggers: mirrors of the local record, opened and closed by each job so that nothing leaks to the next."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from fusion.config import UserError
from fusion.config.launch import Job
from fusion.config.schema import LoggerConfig


@contextmanager
def job_loggers(settings: LoggerConfig, job: Job, stage: str, tags: Sequence[str]) -> Iterator[list[Logger]]:
    """Open the job's logger and close it whatever happens; prints the line that uploads an offline W&B run.

    Raises:
        UserError: the logger's package is not installed.
    """
    environment = os.environ.get("WANDB_MODE")
    loggers = _open(settings, job, stage, tags)
    status = "failed"
    try:
        for logger in loggers:
            logger.log_hyperparams({"command": job.command})
        yield loggers
        status = "success"
    finally:
        _close(loggers, settings, status)
        os.environ.pop("WANDB_MODE", None)  # W&B leaves its offline mode behind for the next job of the process
        os.environ.update({"WANDB_MODE": environment} if environment is not None else {})


def _open(settings: LoggerConfig, job: Job, stage: str, tags: Sequence[str]) -> list[Logger]:
    folder = job.folder
    if settings.name == "csv":
        shutil.rmtree(folder / "csv", ignore_errors=True)  # of an attempt that did not finish
        return [CSVLogger(folder, name=None, version="csv")]
    if settings.name == "tensorboard":
        try:
            return [TensorBoardLogger(folder, name=None, version="tensorboard")]
        except ModuleNotFoundError as error:
            raise UserError(
                "logger=tensorboard: the package tensorboard is not installed; pip install 'fusion-chat[tensorboard]'"
            ) from error
    if settings.name == "wandb":
        group = settings.group or (job.sweep.name if job.sweep else None)
        return [
            WandbLogger(
                name=f"{stage} {job.name}",
                save_dir=str(folder),
                offline=settings.offline,
                project=settings.project,
                entity=settings.entity,
                group=group,
                job_type=stage,
                tags=list(tags),
                reinit="finish_previous",
            )
        ]
    return []


def _close(loggers: Sequence[Logger], settings: LoggerConfig, status: str) -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            folder = Path(logger.experiment.dir).parent
            logger.experiment.finish(exit_code=0 if status == "success" else 1)
            if settings.offline:
                print(f"W&B recorded offline; upload with: wandb sync {folder}")


def log_scores(loggers: Sequence[Logger], scores: Mapping[str, float | None], nll_per_byte: float | None) -> None:
    """Write the scores of one model as metrics `score/SKILL` and `heldout/nll_per_byte`."""
    metrics = {f"score/{skill}": value for skill, value in scores.items() if value is not None}
    if nll_per_byte is not None:
        metrics["heldout/nll_per_byte"] = nll_per_byte
    for logger in loggers:
        logger.log_metrics(metrics)
