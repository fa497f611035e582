"""Stage-1 runs on the disk: which targets belong together, what they were made from, and where their scores are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config import UserError
from fusion.tracking.record import RESULT, read_result

MODEL = "model"


@dataclass(frozen=True)
class TargetRun:
    """A finished run of train.py."""

    folder: Path
    result: Mapping[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def is_sft(self) -> bool:
        return self.result["objective"] == "sft"

    @property
    def name(self) -> str:
        return str(self.result["name"])


def finished_runs(root: Path) -> list[TargetRun]:
    """Finished stage-1 runs at or below `root` whose model is there, oldest first."""
    found = []
    for file in sorted(root.resolve().rglob(RESULT)):
        run = TargetRun(file.parent, read_result(file.parent))
        if run.result.get("stage") == "train" and run.result.get("status") == "finished" and run.model.is_dir():
            found.append(run)
    return sorted(found, key=lambda run: (run.result["time"], str(run.folder)))


def latest_targets(runs: Sequence[TargetRun], seed: int, root: Path) -> list[TargetRun]:
    """The targets that differ in nothing but their source from the newest one, of `seed` if there are any such.

    Of several runs with the same source the newest counts. They come in the order of their sources' names, so that a
    rerun of one does not change the merge.
    """
    targets = [run for run in runs if not run.is_sft]
    if not targets:
        raise UserError(
            f"targets=latest: no finished target below {root}; run `python train.py -m source=tiny_a,tiny_b,tiny_c` "
            "first, or name the targets: targets=[FOLDER,FOLDER]"
        )
    newest = ([run for run in targets if run.result["seed"] == seed] or targets)[-1]
    same = {run.name: run for run in targets if run.result["group"] == newest.result["group"]}
    return [same[name] for name in sorted(same)]


def matching_sft(runs: Sequence[TargetRun], target: TargetRun) -> TargetRun | None:
    """The newest SFT-only run on the same dialogues with the same seed and training settings as `target`."""
    same = [run for run in runs if run.is_sft and run.result["setting"] == target.result["setting"]]
    return same[-1] if same else None


def named_runs(folders: Sequence[str]) -> list[TargetRun | Path]:
    """Run folders as runs, model folders as paths; all that are neither in one UserError."""
    found: list[TargetRun | Path] = []
    problems = []
    for place, folder in enumerate(Path(folder).resolve() for folder in folders):
        result = read_result(folder)
        if result.get("stage") == "train" and (folder / MODEL).is_dir():
            found.append(TargetRun(folder, result))
        elif (folder / "config.json").is_file():
            found.append(folder)
        else:
            problems.append(
                f"targets[{place}]={folder}: neither a run of train.py nor a model folder (no config.json)"
            )
    if problems:
        raise UserError(problems)
    return found
