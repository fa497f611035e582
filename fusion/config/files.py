"""Files and folders that the settings name: whether they are there is told with all other mistakes."""

from collections.abc import Iterator
from pathlib import Path

from fusion.config.evaluate import EvaluateConfig
from fusion.config.schema import MergeConfig, TrainConfig

WORLD = "world:"
DIALOGUE_FILES = (".jsonl", ".json", ".parquet")


def looks_local(path: str) -> bool:
    """Whether a model's path names a folder; OWNER/NAME is a model of the hub, unless there is such a folder."""
    return path.startswith(("/", ".", "~")) or path.count("/") != 1 or Path(path).exists()


def missing_files(settings: TrainConfig | MergeConfig | EvaluateConfig) -> list[str]:
    """Every model folder and dialogue file that is named and not there; an evaluation looks for its own."""
    if isinstance(settings, TrainConfig):
        return list(_missing(settings))
    return list(_missing_base(settings)) if isinstance(settings, MergeConfig) else []


def _missing(settings: TrainConfig) -> Iterator[str]:
    used = settings.source.members or settings.objective.name == "fusion"
    paths = {"pivot.path": settings.pivot.path}
    if settings.source.members:
        paths |= {f"source.members.{name}.path": one.get("path", "") for name, one in settings.source.members.items()}
    elif used:
        paths["source.path"] = settings.source.path
    for key, path in paths.items():
        if path and not path.startswith(WORLD) and looks_local(path) and not Path(path).is_dir():
            yield f"{key}={path}: no such folder; give the folder of a Hugging Face model or a hub id"
    for name in ("path", "heldout_path", "test_path"):
        path = getattr(settings.data, name)
        if path and Path(path).suffix in DIALOGUE_FILES and not Path(path).is_file():
            yield f"data.{name}={path}: no such file; give a JSON, JSONL or Parquet file"


def _missing_base(settings: MergeConfig) -> Iterator[str]:
    if settings.base and looks_local(settings.base) and not Path(settings.base).is_dir():
        yield f"base={settings.base}: no such folder; give the pivot that the targets were trained from: base=FOLDER"
