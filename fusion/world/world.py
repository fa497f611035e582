"""The finished world on the disk: ordinary Hugging Face folders and JSON Lines."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from fusion.cache import cached_folder, code_version, write_json
from fusion.config import UserError, raise_problems
from fusion.config.world import PIVOT, TinyModelConfig, WorldConfig
from fusion.dialogues.dialogue import write_jsonl
from fusion.world.checks import check_world
from fusion.world.corpora import Split, fusion_corpus, strong_skills
from fusion.world.processes import train_models

STAGE = "world"
DESCRIPTION = "world.json"
MAX_WORKERS = 2


@dataclass(frozen=True)
class World:
    """Where the models and dialogues of a finished world are, and who is good at what."""

    root: Path
    skills: list[str]
    strong_skills: dict[str, list[str]]
    """Source -> the skills that it was trained to be good at."""

    @classmethod
    def open(cls, root: Path) -> "World":
        description = json.loads((root / DESCRIPTION).read_text("utf-8"))
        return cls(root, description["skills"], description["strong_skills"])

    def model_path(self, name: str) -> Path:
        """Folder of `pivot` or of a source; UserError when this world has no such model."""
        path = self.root / "models" / name
        if not path.is_dir():
            raise UserError(f"world:{name}: no such model; this world has {', '.join([PIVOT, *self.strong_skills])}")
        return path

    def dialogues_path(self, split: str) -> Path:
        """JSON Lines of `train`, `heldout` or `test`; UserError for other names."""
        if split not in list(Split):
            raise UserError(f"world:{split}: no such dialogues; a world has {', '.join(Split)}")
        return self.root / "dialogues" / f"{split}.jsonl"


def ensure_world(config: WorldConfig, cache_root: Path, workers: int | None = None) -> World:
    """Open the world of `config` below `cache_root`, building it first when it is not there.

    A build that was killed goes on where it stopped: models that were finished stay. Every model is trained on one
    thread, `workers` of them at a time (as many as there are cores, at most 2, when left out), so neither changes the
    result. Kinds of CPU and versions of PyTorch round matrix products differently, so they may still change bits.

    Raises:
        UserError: `config` cannot be built; lists every reason.
    """
    raise_problems(check_world(config))
    key = {"config": config, "code": code_version("fusion.world", "fusion.dialogues")}
    num_workers = workers or min(MAX_WORKERS, os.cpu_count() or 1)
    return World.open(cached_folder(cache_root, STAGE, key, lambda folder: _build(config, folder, num_workers)))


def read_config(root: Path) -> WorldConfig:
    """The settings that `root` is built from."""
    settings = json.loads((root / DESCRIPTION).read_text("utf-8"))["config"]
    models = {name: TinyModelConfig(**model) for name, model in settings.pop("models").items()}
    return WorldConfig(**settings, models=models)


def _build(config: WorldConfig, folder: Path, num_workers: int) -> None:
    description = {
        "config": dataclasses.asdict(config),
        "skills": config.skills,
        "strong_skills": {source: strong_skills(source, config) for source in config.sources},
    }
    write_json(folder / DESCRIPTION, description)
    for split in Split:
        write_jsonl(folder / "dialogues" / f"{split}.jsonl", fusion_corpus(split, config))
    train_models(config, folder, [PIVOT, *config.sources], num_workers)
