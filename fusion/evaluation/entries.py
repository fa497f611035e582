"""Which models are evaluated on which dialogues: named by the user, or found in runs over several seeds."""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fusion.cache import file_hash
from fusion.config import UserError
from fusion.config.evaluate import EvaluateConfig
from fusion.config.schema import DataConfig, ModelConfig
from fusion.evaluation.choosing import choose, lines, unique_names
from fusion.tracking.grouping import summarise
from fusion.tracking.record import LINEAGE, RESULT, read_result
from fusion.tracking.rows import read_runs
from fusion.world.resolve import with_world_paths

ONLY_TRAINING = ("path", "heldout_fraction", "limit", "long")
"""Settings of dialogues that decide nothing but the training, where held-out dialogues have a file of their own."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repetition:
    """One model on its dialogues; `seeds` repeat the generation."""

    model: ModelConfig
    data: DataConfig
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A line of the table: one model, or the same recipe under several seeds."""

    name: str
    repetitions: tuple[Repetition, ...]


def find_entries(config: EvaluateConfig) -> list[Entry]:
    """The models of `config`, the reference first. Raises UserError where there is nothing to evaluate."""
    if config.models:
        return _named_models(config)
    folders = [Path(folder) for folder in config.runs] or [_newest_run(Path(config.paths.runs))]
    missing = [f"runs: {folder}: no such folder" for folder in folders if not folder.is_dir()]
    if missing:
        raise UserError(missing)
    return _models_of_runs(folders, config)


def _named_models(config: EvaluateConfig) -> list[Entry]:
    cache = Path(config.paths.cache)
    given = replace(config.data, heldout_path=config.data.heldout_path or config.data.path)  # nothing trains here
    read = config.reads_dialogues
    data = given if read else DataConfig(path="", max_length=config.data.max_length)  # no world for nothing
    paths, data = with_world_paths(config.models, data, config.world, cache)
    names = unique_names([short_name(path) for path in config.models])
    return [
        Entry(name, (Repetition(_model(name, path, config), data, tuple(config.seeds)),))
        for name, path in zip(names, (model_folder(path) for path in paths), strict=True)
    ]


def short_name(path: str) -> str:
    """What a model is called where the user gave only its folder."""
    parts = path.removeprefix("world:").rstrip("/").split("/")
    return parts[-2] if parts[-1] == "model" and len(parts) > 1 else parts[-1]


def model_folder(path: str) -> str:
    """The model of a run, where a run is named."""
    inside = Path(path) / "model"
    return str(inside) if (Path(path) / RESULT).is_file() and inside.is_dir() else path


def _model(name: str, path: str, config: EvaluateConfig) -> ModelConfig:
    return ModelConfig(name=name, path=path, dtype=config.dtype, trust_remote_code=config.trust_remote_code)


def _newest_run(root: Path) -> Path:
    found = [(result.get("time", 0), file.parent) for file, result in _finished(root) if result.get("comparison")]
    if not found:
        raise UserError(f"{root}: there is no finished run; give models=[FOLDER,FOLDER] or runs=[FOLDER]")
    return max(found)[1]


def _finished(root: Path) -> list[tuple[Path, dict]]:
    files = sorted(root.rglob(RESULT)) if root.is_dir() else []
    results = [(file, read_result(file.parent)) for file in files]
    return [(file, result) for file, result in results if result.get("status") == "finished"]


def _models_of_runs(folders: Sequence[Path], config: EvaluateConfig) -> list[Entry]:
    """The models that the runs compared and `only` names: one repetition per seed that measured it.

    A seed whose model is gone is left out, and a warning says so.
    """
    rows, _ = read_runs(folders)
    by_seed = _dialogues_by_seed(folders)
    entries = []
    for line in choose(lines(summarise(rows)), config.only):
        known = {row.seed: row for row in line.rows if row.seed in by_seed and Path(row.path).is_dir()}
        gone = {row.seed: row for row in line.rows if row.seed not in known}
        for seed, row in gone.items():
            log.warning("%s: seed %s is left out: there is no model at %s", line.name, seed, row.path or "(no path)")
        repetitions = tuple(
            Repetition(_model(line.name, row.path, config), by_seed[seed], (seed,)) for seed, row in known.items()
        )
        if repetitions:
            entries.append(Entry(line.name, repetitions))
    if not entries:
        named = ", ".join(map(str, folders))
        raise UserError(f"{named}: no finished run whose models and dialogues are still there; run it again")
    return entries


def _dialogues_by_seed(folders: Sequence[Path]) -> dict[int, DataConfig]:
    """Test and held-out dialogues of the runs. Raises UserError where runs of one seed have different ones."""
    found: dict[int, DataConfig] = {}
    for folder in folders:
        for file, result in _finished(folder):
            data = _dialogues(file.parent)
            if data is None:
                continue
            if _content(found.setdefault(int(result["seed"]), data)) != _content(data):
                raise UserError(
                    f"{file.parent}: other test or held-out dialogues than another run of seed {result['seed']} has "
                    "(or other data.max_length, form, clean); evaluate these runs apart"
                )
    return found


def _content(data: DataConfig) -> dict[str, Any]:
    """`data` with hashes for its files, without what only training reads: equal where the scores can be compared."""
    files = {name: _hash_of_file(getattr(data, name)) for name in ("path", "heldout_path", "test_path")}
    content = {**asdict(data), **files, "name": "", "num_dialogues": None}
    return {**content, **dict.fromkeys(ONLY_TRAINING)} if data.heldout_path else content


def _hash_of_file(path: str | None) -> str | None:
    return file_hash(Path(path)) if path and Path(path).is_file() else path


def _dialogues(run: Path) -> DataConfig | None:
    try:
        lineage = json.loads((run / LINEAGE).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    lineages = [lineage, *lineage.get("stage1", {}).values()]
    data = next((one["data"] for one in lineages if "data" in one), None)
    return DataConfig(**data) if data else None
