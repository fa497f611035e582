"""What a merge works on: targets, their base, and the models and dialogues they are scored with."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion.cache import folder_hash
from fusion.config import UserError, raise_problems
from fusion.config.schema import DataConfig, MergeConfig, ModelConfig
from fusion.dialogues.dialogue import Dialogue, read_jsonl
from fusion.tracking.hub import local_folder
from fusion.tracking.record import LINEAGE
from fusion.tracking.stage1 import TargetRun, finished_runs, latest_targets, matching_sft, named_runs

log = logging.getLogger(__name__)

LATEST = "latest"


@dataclass(frozen=True)
class Target:
    name: str
    path: Path


@dataclass(frozen=True)
class MergeInputs:
    """Targets in order, and what stage 1 recorded about them (nothing for bare model folders)."""

    targets: list[Target]
    base: Path | None
    runs: list[TargetRun]
    sft: TargetRun | None

    @property
    def identity(self) -> dict[str, object]:
        """Hashes of everything that the merge reads."""
        return {
            "targets": [[target.name, folder_hash(target.path)] for target in self.targets],
            "base": folder_hash(self.base) if self.base else None,
            "sft": folder_hash(self.sft.model) if self.sft else None,
            "runs": [run.result["fingerprint"] for run in self.runs],
        }

    @property
    def pivot(self) -> ModelConfig:
        return ModelConfig.of(self._first_lineage()["pivot"])

    @property
    def data(self) -> DataConfig | None:
        """The dialogues of the first target's run; None when no target has a run."""
        return DataConfig(**self._first_lineage()["data"]) if self.runs else None

    @property
    def sources(self) -> dict[str, list[ModelConfig]]:
        """The models that each target's run learned from; nothing when targets have no runs."""
        return {
            target.name: [ModelConfig.of(source) for source in read_lineage(run)["sources"]]
            for target, run in zip(self.targets, self.runs, strict=False)
        }

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The settings by which the targets were trained; nothing when they were trained differently, or unknown."""
        recipes = [run.recipe for run in self.runs]
        return recipes[0] if recipes and all(recipe == recipes[0] for recipe in recipes) else {}

    @property
    def heldout_won(self) -> list[Dialogue]:
        """Held-out dialogues that some source won, once each, in the order of their hashes."""
        won = {dialogue.content_hash: dialogue for dialogues in self.heldout_won_of_targets for dialogue in dialogues}
        return [won[name] for name in sorted(won)]

    @property
    def heldout_won_of_targets(self) -> list[list[Dialogue]]:
        """Held-out dialogues that a source of each target's run won; no lists when a target has no run."""
        return [list(read_jsonl(run.folder / "heldout_won.jsonl")) for run in self.runs]

    def lineage(self) -> dict[str, object]:
        """Inputs with their hashes, and the lineage of every target."""
        return {
            "inputs": self.identity,
            "base": str(self.base) if self.base else None,
            "targets": {target.name: str(target.path) for target in self.targets},
            "stage1": {run.name: read_lineage(run) for run in self.runs},
        }

    def _first_lineage(self) -> dict[str, Any]:
        return read_lineage(self.runs[0])


def find_inputs(config: MergeConfig) -> MergeInputs:
    """Find targets, base and SFT-only baseline as the settings say.

    Raises:
        UserError: a folder is missing, no stage-1 run is finished, or the targets come from several pivots.
    """
    root, download = Path(config.paths.runs), not config.plan
    known = finished_runs(root)
    found: Sequence[TargetRun | Path] = []
    problems: list[str] = []
    try:
        if config.targets == LATEST:
            found = latest_targets(known, config.seed, root)
        else:
            named = [config.targets] if isinstance(config.targets, str) else config.targets
            found = named_runs(named, download=download)
    except UserError as error:
        problems += error.problems
    runs = [one for one in found if isinstance(one, TargetRun)]
    targets = [Target(one.name, one.model) if isinstance(one, TargetRun) else Target(one.name, one) for one in found]
    try:
        base = _base(config, runs, download)
    except UserError as error:
        problems += error.problems
    raise_problems(problems)
    sft = _sft(config, known, runs)
    log.info("targets: %s", ", ".join(str(target.path) for target in targets))
    return MergeInputs(_unique(targets), base, runs if len(runs) == len(targets) else [], sft)


def _base(config: MergeConfig, runs: Sequence[TargetRun], download: bool) -> Path | None:
    if config.base:
        base: Path | None = local_folder(config.base, download=download, setting="base")
    else:
        base = _common_pivot(runs, download)
    if base is not None and not base.is_dir():
        raise UserError(f"base={base}: no such folder; give the pivot that the targets were trained from: base=FOLDER")
    return base


def _sft(config: MergeConfig, known: Sequence[TargetRun], runs: Sequence[TargetRun]) -> TargetRun | None:
    if config.sft:
        found = named_runs([config.sft], setting="sft")
        if len(found) == 1 and isinstance(found[0], TargetRun):
            return found[0]
        raise UserError(f"sft={config.sft}: not a run of train.py; give the folder of a run with objective=sft")
    return matching_sft(known, runs[0]) if runs else None


def _common_pivot(runs: Sequence[TargetRun], download: bool) -> Path | None:
    given = [read_lineage(run)["pivot"] for run in runs]
    pivots = sorted({str(pivot["path"]) for pivot in given})
    if len(pivots) > 1:
        raise UserError(
            f"the targets were trained from several pivots ({', '.join(pivots)}); merge targets of one pivot"
        )
    return local_folder(pivots[0], given[0].get("revision"), download=download) if pivots else None


def _unique(targets: Sequence[Target]) -> list[Target]:
    """Names that tell the targets apart: a number is added where two are called alike."""
    names = [target.name for target in targets]
    return [
        Target(f"{target.name}_{names[: place + 1].count(target.name)}", target.path)
        if names.count(target.name) > 1
        else target
        for place, target in enumerate(targets)
    ]


def read_lineage(run: TargetRun) -> dict[str, Any]:
    """What `train.py` recorded of the inputs of a run."""
    return json.loads((run.folder / LINEAGE).read_text("utf-8"))
