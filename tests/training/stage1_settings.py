"""Settings of a whole stage 1 on random tiny models and a handful of dialogues."""

from pathlib import Path

from fusion.config.schema import (
    DataConfig,
    LoggerConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PathsConfig,
    SourceConfig,
    TeacherConfig,
    TrainConfig,
    TrainerConfig,
)
from fusion.dialogues.dialogue import Dialogue, chat, write_jsonl

DIALOGUES = [chat(f"Which river {n}?", "yes " * (1 + n % 4), "and?", f"no {n} 北京") for n in range(20)]


def source_of(model: ModelConfig) -> SourceConfig:
    return SourceConfig(**vars(model))


def settings(
    folder: Path, pivot: ModelConfig, source: ModelConfig, dialogues: list[Dialogue] = DIALOGUES, **changes: object
) -> TrainConfig:
    """Eight dialogues per step, no clipping, everything below `folder`."""
    path = folder / "dialogues.jsonl"
    write_jsonl(path, dialogues)
    given = {
        "pivot": pivot,
        "source": source_of(source),
        "data": DataConfig(name="few", path=str(path), heldout_fraction=0.2),
        "teacher": TeacherConfig(top_k=4, device="cpu"),
        "objective": ObjectiveConfig(ce_weight=0.3),
        "optim": OptimConfig(lr=1e-2, grad_clip=0.0),
        "trainer": TrainerConfig(epochs=1, batch_size=8, progress_bar=False, log_every_steps=1),
        "logger": LoggerConfig(name="none"),
        "paths": PathsConfig(cache=str(folder / "cache"), runs=str(folder / "runs")),
    }
    return TrainConfig(**(given | changes))
