"""A tiny training that draws random numbers, which tests break off and go on with."""

from dataclasses import replace
from pathlib import Path

import torch
from stage1_settings import settings
from tiny_models import make_llama, make_tokenizer, save

from fusion.config.launch import Job
from fusion.config.schema import LoggerConfig, ModelConfig, OptimConfig, TrainerConfig
from fusion.tracking.loggers import job_loggers
from fusion.training.checkpoint_folder import CHECKPOINTS
from fusion.training.checkpoints import find_start
from fusion.training.data import FusionDataModule
from fusion.training.fit import Fitted, fit

STEPS = 24


def prepared(folder: Path, source: ModelConfig, dropout: float) -> FusionDataModule:
    """24 steps of about four dialogues, a checkpoint after every fifth one."""
    tokenizer = make_tokenizer("metaspace", "openchat")
    model = make_llama(len(tokenizer))
    model.config.attention_dropout = dropout
    pivot = save(folder / "pivot", model, tokenizer, "pivot")
    trainer = TrainerConfig(
        epochs=6, batch_size=4, progress_bar=False, log_every_steps=1, checkpoint_every_steps=5, keep_checkpoints=2
    )
    optim = OptimConfig(lr=1e-2, grad_clip=0.5, weight_decay=0.1)
    module = FusionDataModule(settings(folder, pivot, source, trainer=trainer, optim=optim))
    module.setup()
    assert module.total_steps == STEPS
    return module


def changed(data: FusionDataModule, **changes: object) -> FusionDataModule:
    """The same fused targets under other settings; those of the trainer by their own names."""
    fields = TrainerConfig.__dataclass_fields__
    trainer = replace(data.config.trainer, **{name: one for name, one in changes.items() if name in fields})
    others = {name: one for name, one in changes.items() if name not in fields}
    module = FusionDataModule(replace(data.config, trainer=trainer, **others))
    module.prepared = data.prepared
    return module


def go_on(data: FusionDataModule, folder: Path) -> Fitted:
    """What a job in `folder` does, with its CSV file."""
    start = find_start(data, folder)
    job = Job(folder, "job", "python train.py", "", None)
    with job_loggers(LoggerConfig(name="csv"), job, "train", [], "", start.state.step if start else 0) as loggers:
        return fit(data.config, data, loggers, folder, start)


def weights(fitted: Fitted) -> dict[str, torch.Tensor]:
    return {name: one.detach().clone() for name, one in fitted.model.named_parameters()}


def kept(folder: Path) -> list[str]:
    """Names of the checkpoints of a job."""
    return sorted(path.name for path in (folder / CHECKPOINTS).glob("*"))


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], one) for name, one in wanted.items())
