"""Stage-1 runs on the disk: which targets belong together, what they were made from, and where their scores are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.config import UserError, raise_problems
from fusion.tracking.hub import local_folder
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
    def is_baseline(self) -> bool:
        """SFT without any source; runs of before do not say so."""
        return bool(self.result.get("is_baseline", self.result["objective"] == "sft"))

    @property
    def name(self) -> str:
        return str(self.result["name"])

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings of the method by which the target was trained; runs of before have none."""
        return self.result.get("recipe", {})

    @property
    def report(self) -> Mapping[str, Any]:
        """What was recorded of alignment and fusion; runs of before have none."""
        return self.result.get("report", {})


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
    targets = [run for run in runs if not run.is_baseline]
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
    same = [run for run in runs if run.is_baseline and run.result["setting"] == target.result["setting"]]
    return same[-1] if same else None


def named_runs(folders: Sequence[str], *, download: bool = True, setting: str = "targets") -> list[TargetRun | Path]:
    """Runs of train.py, or bare model folders, in the order given; a folder above runs stands for all its targets.

    Models of the hub are downloaded, or, without `download`, must have been before. `setting` has named the folders.

    Raises:
        UserError: names every folder that is neither.
    """
    found: list[TargetRun | Path] = []
    problems: list[str] = []
    for place, name in enumerate(folders):
        label = f"{setting}[{place}]"
        try:
            folder = local_folder(name, download=download, setting=label).resolve()
        except UserError as error:
            problems += error.problems
            continue
        result = read_result(folder)
        if result.get("stage") == "train":
            problem = _run_problem(folder, result)
            found += [] if problem else [TargetRun(folder, result)]
            problems += [f"{label}={folder}: {problem}"] if problem else []
        elif any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            found.append(folder)
        elif below := sorted((run for run in finished_runs(folder) if not run.is_baseline), key=_folder_name):
            found += below
        else:
            problems.append(
                f"{label}={folder}: neither a run of train.py, nor a folder above runs, nor a model folder "
                "(no config.json)"
            )
    raise_problems(problems)
    return found


def _folder_name(run: TargetRun) -> str:
    return str(run.folder)


def _run_problem(folder: Path, result: Mapping[str, Any]) -> str:
    if result.get("status") != "finished":
        return f"this run of train.py is {result.get('status')}, not finished"
    return "" if (folder / MODEL).is_dir() else f"this run has no folder {MODEL}"
