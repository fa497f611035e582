"""The built-in world as a folder: made once from its settings, kept in the cache."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from fusion.cache import cached_folder, code_version, write_json
from fusion.config.world import PIVOT, WorldConfig
from fusion.dialogues.dialogue import write_jsonl
from fusion.world.corpora import Split, fusion_corpus, strong_skills

DESCRIPTION = "world.json"


@dataclass(frozen=True)
class World:
    """Models as Hugging Face folders in `models/`, dialogues as JSONL in `dialogues/`."""

    root: Path

    def model_path(self, name: str) -> Path:
        """Folder of `pivot` or of a source."""
        return self.root / "models" / name

    def dialogues_path(self, split: str) -> Path:
        """File of `train`, `heldout` or `test`."""
        return self.root / "dialogues" / f"{split}.jsonl"

    @property
    def skills(self) -> list[str]:
        return self._description["skills"]

    @property
    def strong_skills(self) -> Mapping[str, list[str]]:
        """Source -> the skills it was taught well."""
        return self._description["strong_skills"]

    @cached_property
    def _description(self) -> dict[str, Any]:
        return json.loads((self.root / DESCRIPTION).read_text("utf-8"))


def ensure_world(config: WorldConfig, cache_root: Path) -> World:
    """The world of `config`, built on the first call; a killed build goes on with the models that are not finished."""
    key = {"world": config, "code": code_version("fusion.world", "fusion.config.world", "fusion.dialogues")}
    return World(cached_folder(cache_root, "world", key, lambda folder: _build(config, folder)))


def _build(config: WorldConfig, folder: Path) -> None:
    from fusion.world.building import build_models

    world = World(folder)
    for split in Split:
        write_jsonl(world.dialogues_path(split), fusion_corpus(split, config))
    build_models(config, world.model_path(PIVOT).parent)
    description = {
        "config": json.loads(json.dumps(config, default=vars)),
        "skills": list(config.skills),
        "strong_skills": {source: strong_skills(source, config) for source in config.sources},
    }
    write_json(folder / DESCRIPTION, description)
