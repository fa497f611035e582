"""Experiment loggers: mirrors of the local record, opened and closed by each job so that nothing leaks to the next."""

import csv
import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from fusion.config import UserError
from fusion.config.launch import Job
from fusion.config.schema import LoggerConfig


@contextmanager
def job_loggers(
    settings: LoggerConfig, job: Job, stage: str, tags: Sequence[str], fingerprint: str, first_step: int = 0
) -> Iterator[list[Logger]]:
    """Open the job's logger and close it whatever happens; prints the line that uploads an offline W&B run.

    Of an attempt that did not finish, what was logged of steps before `first_step` stays. The run of W&B is the same
    for all attempts of a job with the same `fingerprint`, as for `RunRecord`.

    Raises:
        UserError: the logger's package is not installed.
    """
    environment = os.environ.get("WANDB_MODE")
    loggers = _open(settings, job, stage, tags, run_id(job, fingerprint), first_step)
    status = "failed"
    try:
        for logger in loggers:
            logger.log_hyperparams({"command": job.command, **_plain_config(job)})
        yield loggers
        status = "success"
    finally:
        _close(loggers, settings, status)
        os.environ.pop("WANDB_MODE", None)  # W&B leaves its offline mode behind for the next job of the process
        os.environ.update({"WANDB_MODE": environment} if environment is not None else {})


def run_id(job: Job, fingerprint: str) -> str:
    """Of W&B's run: one per folder of a job and what is done in it."""
    return hashlib.sha256(f"{job.folder.resolve()}\n{fingerprint}".encode()).hexdigest()[:12]


def _plain_config(job: Job) -> dict[str, Any]:
    config = OmegaConf.to_container(OmegaConf.create(job.config_yaml))
    assert isinstance(config, dict)
    return {str(name): value for name, value in config.items()}


def _open(
    settings: LoggerConfig, job: Job, stage: str, tags: Sequence[str], name: str, first_step: int
) -> list[Logger]:
    folder = job.folder
    if settings.name == "csv":
        return [_open_csv(folder, first_step)]
    if settings.name == "tensorboard":
        try:
            return [TensorBoardLogger(folder, name=None, version="tensorboard", purge_step=first_step)]
        except ModuleNotFoundError as error:
            raise UserError(
                "logger=tensorboard: the package tensorboard is not installed; pip install 'fusion-chat[tensorboard]'"
            ) from error
    if settings.name == "wandb":
        group = settings.group or (job.sweep.name if job.sweep else None)
        return [
            WandbLogger(
                name=f"{stage} {job.name}",
                id=name,
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


def _open_csv(folder: Path, first_step: int) -> CSVLogger:
    """The logger deletes a file that is there, so the rows that stay are kept aside until it has written them."""
    written, aside = folder / "csv" / "metrics.csv", folder / ".metrics_before.csv"
    if written.is_file() and not aside.is_file():
        written.rename(aside)
    shutil.rmtree(folder / "csv", ignore_errors=True)
    logger = CSVLogger(folder, name=None, version="csv")
    for step, metrics in _logged_before(aside, first_step):
        logger.log_metrics(dict(metrics), step)
    logger.save()
    aside.unlink(missing_ok=True)
    return logger


def _logged_before(path: Path, first_step: int) -> Iterator[tuple[int, dict[str, float]]]:
    """What the training logged of steps before `first_step`; scores come after it, and are logged anew."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step = row["step"] or ""  # a kill may have torn the last row
            logged = [name for name, value in row.items() if value and name.startswith("train/")]
            if logged and step.isdigit() and int(step) < first_step:
                yield int(step), {name: float(row[name]) for name in logged}


def _close(loggers: Sequence[Logger], settings: LoggerConfig, status: str) -> None:
    for logger in loggers:
        logger.finalize(status)
        if isinstance(logger, WandbLogger):
            run = logger.experiment
            attempts = sorted(Path(run.dir).parents[1].glob(f"offline-run-*-{run.id}"))
            run.finish(exit_code=0 if status == "success" else 1)
            if settings.offline:
                append = ["--append"] if len(attempts) > 1 else []
                print(
                    "W&B recorded offline; upload with:", shlex.join(["wandb", "sync", *append, *map(str, attempts)])
                )


def log_scores(loggers: Sequence[Logger], scores: Mapping[str, float | None], nll_per_byte: float | None) -> None:
    """Write the scores of one model as metrics `score/SKILL` and `heldout/nll_per_byte`."""
    metrics = {f"score/{skill}": value for skill, value in scores.items() if value is not None}
    if nll_per_byte is not None:
        metrics["heldout/nll_per_byte"] = nll_per_byte
    for logger in loggers:
        logger.log_metrics(metrics)
