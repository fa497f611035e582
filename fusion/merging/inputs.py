"""The inputs of a merge, opened and fitted to each other: adapters on their base, tied heads, vocabularies."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fusion.config import UserError, raise_problems
from fusion.merging.checkpoints.checkpoint import (
    CONFIG_FILE,
    Checkpoint,
    is_adapter,
    links_outside,
    open_checkpoint,
    read_json,
)
from fusion.merging.checkpoints.companions import Changes, model_files
from fusion.merging.checkpoints.tied_heads import TIED, blocks, without_copies
from fusion.merging.operands import not_finite
from fusion.merging.plan import SHOWN, input_labels, input_roles
from fusion.merging.targets import open_target
from fusion.merging.vocabularies.fit_vocabularies import Fitted, fit_vocabularies
from fusion.merging.vocabularies.vocabulary import ERROR, VOCABULARIES


@dataclass(frozen=True)
class Inputs:
    """What a merge reads, by roles: `base`, `target 0`, `target 1`, ...; those that could be read."""

    checkpoints: Mapping[str, Checkpoint]
    vocabulary: str
    changes: Changes = field(default_factory=Changes)
    """How the merged model's companions differ from the reference's."""
    missing_rows: Mapping[str, int] = field(default_factory=dict)
    """With other vocabularies than `error`: how many of the merged model's rows each input lacks."""
    num_new_tokens: int = 0
    """Tokens that the reference lacks."""

    @classmethod
    def open(
        cls, base: Path | None, targets: Sequence[Path], vocabulary: str = ERROR, problems: list[str] | None = None
    ) -> "Inputs":
        """Open all and fit them to each other; what is wrong goes to `problems`, or is raised where there is no list.

        Raises:
            UserError: an input cannot be read, or does not fit the others, and no `problems` are given.
        """
        found: list[str] = [] if problems is None else problems
        opened = _open_all(base, targets, found)
        found += _architecture_problems(opened)
        inputs = cls(opened, vocabulary)
        if opened and vocabulary in VOCABULARIES and (base is None or "base" in opened):
            try:
                inputs = _fitted(opened, vocabulary)
            except UserError as error:
                found += error.problems
                if vocabulary != ERROR:  # shapes that would have been fitted are no further mistakes
                    inputs = cls(dict(list(opened.items())[:1]), vocabulary)
        if problems is None:
            raise_problems(found)
        return inputs

    @property
    def base(self) -> Checkpoint | None:
        return self.checkpoints.get("base")

    @property
    def targets(self) -> list[Checkpoint]:
        return [checkpoint for role, checkpoint in self.checkpoints.items() if role != "base"]

    @property
    def reference(self) -> Checkpoint:
        """Whose layout and companions the merged model gets."""
        return next(iter(self.checkpoints.values()))

    @property
    def files(self) -> list[Path]:
        """Weights and companions of all, each once."""
        return list(
            dict.fromkeys(path for checkpoint in self.checkpoints.values() for path in model_files(checkpoint))
        )

    def spoilt(self) -> list[str]:
        """All tensors that hold NaN or infinities; the first few of each input in full."""
        problems: list[str] = []
        for label, checkpoint in zip(input_labels(self.checkpoints), self.checkpoints.values(), strict=True):
            names = [name for name in checkpoint if not _is_finite(checkpoint, name)]
            problems += [not_finite(label, name) for name in names[:SHOWN]]
            if len(names) > SHOWN:
                problems.append(f"{label}: and {len(names) - SHOWN} more tensors with NaN or infinities")
        return problems


def _fitted(opened: Mapping[str, Checkpoint], vocabulary: str) -> Inputs:
    tied = without_copies(opened)
    fitted = fit_vocabularies(tied, vocabulary)
    first = next(iter(opened))
    changes = _with_tie(fitted, opened[first]) if len(tied[first]) < len(opened[first]) else fitted.changes
    return Inputs(fitted.checkpoints, vocabulary, changes, fitted.missing, fitted.num_new)


def _with_tie(fitted: Fitted, reference: Checkpoint) -> Changes:
    """The reference's copy of the head is not written, so the merged model's config must say that it is tied."""
    changes, config = fitted.changes, read_json(reference.folder / CONFIG_FILE)
    config = {**config, **changes.written.get(CONFIG_FILE, {})}
    if not config or config.get(TIED) is True:
        return changes
    return replace(changes, written={**changes.written, CONFIG_FILE: {**config, TIED: True}})


def _open_all(base: Path | None, targets: Sequence[Path], problems: list[str]) -> dict[str, Checkpoint]:
    opened: dict[str, Checkpoint] = {}
    for role, folder in input_roles(base and Path(base), [Path(target) for target in targets]).items():
        if role != "base" and base is not None and "base" not in opened and is_adapter(folder):
            continue  # what is wrong with its base has been said
        try:
            checkpoint = open_checkpoint(folder) if role == "base" else open_target(folder, opened.get("base"))
            raise_problems(links_outside(checkpoint.folder, model_files(checkpoint)))
            opened[role] = checkpoint
        except UserError as error:
            problems += [f"{role}: {problem}" for problem in error.problems]
    return opened


def _architecture_problems(inputs: Mapping[str, Checkpoint]) -> list[str]:
    problems = []
    configs = [checkpoint.config for checkpoint in inputs.values()]
    labels = input_labels(inputs)
    for label, config in zip(labels, configs, strict=True):
        for key in ("model_type", "architectures"):
            mine, wanted = config.get(key), configs[0].get(key)
            if mine is not None and wanted is not None and mine != wanted:
                problems.append(f"{label}: {key} is {mine}, but {wanted} in {labels[0]}: merge one architecture only")
    return problems


def _is_finite(checkpoint: Checkpoint, name: str) -> bool:
    if not checkpoint.homes[name].specs[name].dtype.is_floating_point:
        return True
    return all(bool(block_N.isfinite().all()) for block_N in blocks(checkpoint, name))
