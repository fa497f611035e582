"""Files and folders that the settings name: whether they are there is told with all other mistakes."""

from collections.abc import Iterator
from pathlib import Path

from fusion.config.evaluate import EvaluateConfig
from fusion.config.schema import DataConfig, MergeConfig, TrainConfig

WORLD = "world:"
DIALOGUE_FILES = (".jsonl", ".json", ".parquet")
BENCHMARK_FILES = {
    "mt_bench": ("questions", "references", "prompts"),
    "alpaca_eval": ("questions", "prompts", "gamed"),
}
NO_MODEL = "no such folder; give the folder of a Hugging Face model or a hub id"


def looks_local(path: str) -> bool:
    """Whether a model's path names a folder; OWNER/NAME is a model of the hub, unless there is such a folder."""
    return path.startswith(("/", ".", "~")) or path.count("/") != 1 or Path(path).exists()


def missing_files(settings: TrainConfig | MergeConfig | EvaluateConfig) -> list[str]:
    """Every model folder and file that is named and not there."""
    if isinstance(settings, TrainConfig):
        return list(_missing(settings))
    if isinstance(settings, MergeConfig):
        return list(_missing_base(settings))
    return list(_missing_of_evaluation(settings))


def _missing(settings: TrainConfig) -> Iterator[str]:
    used = settings.source.members or settings.objective.name == "fusion"
    paths = {"pivot.path": settings.pivot.path}
    if settings.source.members:
        members = {name: one for name, one in settings.source.members.items() if isinstance(one, dict)}
        paths |= {f"source.members.{name}.path": one.get("path", "") for name, one in members.items()}
    elif used:
        paths["source.path"] = settings.source.path
    for key, path in paths.items():
        if _is_missing_model(path):
            yield f"{key}={path}: {NO_MODEL}"
    yield from _missing_dialogues(settings.data)


def _is_missing_model(path: str) -> bool:
    return bool(path) and not path.startswith(WORLD) and looks_local(path) and not Path(path).is_dir()


def _missing_dialogues(data: DataConfig) -> Iterator[str]:
    for name in ("path", "heldout_path", "test_path"):
        path = getattr(data, name)
        if path and Path(path).suffix in DIALOGUE_FILES and not Path(path).is_file():
            yield f"data.{name}={path}: no such file; give a JSON, JSONL or Parquet file"


def _missing_of_evaluation(settings: EvaluateConfig) -> Iterator[str]:
    """Models and dialogues unless runs bring them, and the files of the wanted benchmarks."""
    for place, path in enumerate(settings.models):
        if _is_missing_model(path):
            yield f"models[{place}]={path}: {NO_MODEL}"
    for place, path in enumerate(settings.runs):
        if not Path(path).is_dir():
            yield f"runs[{place}]={path}: no such folder; give a run of train.py or merge.py, or a folder above runs"
    if settings.models and settings.reads_dialogues:
        yield from _missing_dialogues(settings.data)
    for name in BENCHMARK_FILES:
        for field in BENCHMARK_FILES[name] if name in settings.scorers else ():
            path = getattr(getattr(settings, name), field)
            if Path(path).suffix and not Path(path).is_file():
                yield f"{name}.{field}={path}: no such file"


def _missing_base(settings: MergeConfig) -> Iterator[str]:
    if settings.base and looks_local(settings.base) and not Path(settings.base).is_dir():
        yield f"base={settings.base}: no such folder; give the pivot that the targets were trained from: base=FOLDER"
