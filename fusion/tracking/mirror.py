"""What the loggers show of a finished job beside its curves: tables, a summary, and artifacts with their lineage.

`result.json` and `lineage.json` are the record; this is their mirror. An artifact is named by the hash of what it
holds, so that the target which one run has made is the target that a merge of another run has used.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from fusion.cache import folder_hash

SHOWN_HASH = 12
MERGE_NUMBERS = ("sign_conflicts", "bytes_read", "bytes_written", "seconds", "speed", "share_of_copy_speed")


class Table(NamedTuple):
    columns: list[str]
    rows: list[list[object]]

    def to_markdown(self) -> str:
        cells = [[_cell(value) for value in row] for row in self.rows]
        return "\n".join(f"| {' | '.join(row)} |" for row in [self.columns, ["---"] * len(self.columns), *cells])


@dataclass(frozen=True)
class Piece:
    """A model, a store of distributions or a set of dialogues, as an artifact."""

    kind: str
    name: str
    hash: str
    folder: Path | None = None
    """Where it lies; None: it is only named, such as a model of the hub."""

    @property
    def artifact_name(self) -> str:
        """W&B allows letters, digits, dots, dashes and underscores."""
        return re.sub(r"[^\w.-]", "_", f"{self.kind}-{self.name}-{self.hash[:SHOWN_HASH]}")


@dataclass(frozen=True)
class Lineage:
    """What a job has read and made."""

    used: list[Piece] = field(default_factory=list)
    made: list[Piece] = field(default_factory=list)

    @classmethod
    def of(cls, stage: str, folder: Path, result: Mapping[str, Any], lineage: Mapping[str, Any]) -> "Lineage":
        if stage == "merge":
            used = [Piece("target", name, hashed) for name, hashed in lineage["inputs"]["targets"]]
            return cls(used, _merged_piece(folder, result))
        model = folder / str(result["model"])
        hashes = dict(lineage["inputs"])
        dialogues = Piece("dialogues", "train", str(hashes.pop("dialogues", "")))
        models = [Piece("model", name, str(hashed)) for name, hashed in hashes.items()]
        kind = "sft" if result["is_baseline"] else "target"
        distributions = Piece("distributions", str(result["name"]), str(lineage["distributions"]))
        return cls([dialogues, *models, distributions], [Piece(kind, str(result["name"]), folder_hash(model), model)])


def _merged_piece(folder: Path, result: Mapping[str, Any]) -> list[Piece]:
    """Nothing when the merged model was not saved."""
    if result["model"] is None:
        return []
    model = folder / str(result["model"])
    return [Piece("merged", str(result["merge"]["method"]), folder_hash(model), model)]


def mirror_result(
    loggers: Sequence[Logger], stage: str, folder: Path, result: Mapping[str, Any], lineage: Mapping[str, Any]
) -> None:
    """Show `result` and `lineage`, as `RunRecord.finish` gets them, in every logger that can."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            _to_wandb(logger, result, Lineage.of(stage, folder, result, lineage))
        elif isinstance(logger, TensorBoardLogger):
            for name, table in tables(result).items():
                logger.experiment.add_text(name, table.to_markdown())


def tables(result: Mapping[str, Any]) -> dict[str, Table]:
    """Scores of all models of the comparison, and the coefficients of a merge by tensor and target."""
    found = {}
    if rows := result.get("comparison"):
        skills = list(dict.fromkeys(skill for row in rows for skill in row["scores"]))
        cells = [[row["model"], row["kind"], *map(row["scores"].get, skills), row["nll_per_byte"]] for row in rows]
        found["scores"] = Table(["model", "kind", *skills, "nll_per_byte"], cells)
        if any(row.get("samples") for row in rows):
            found["answers"] = _answers(rows)
    if merge := result.get("merge"):
        found |= _merge_tables(merge, result["targets"])
    return found


def _answers(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Answers that were written out, side by side: a line for each question, a column for each model."""
    models = [f"{row['model']} ({row['kind']})" for row in rows]
    lines: dict[tuple[str, str, str], list[object]] = {}
    for place, row in enumerate(rows):
        for sample in row.get("samples", ()):
            question = (sample["category"], sample["question"], sample["reference"])
            lines.setdefault(question, [None] * len(models))[place] = sample["answer"]
    return Table(["category", "question", "right answer", *models], [[*key, *cells] for key, cells in lines.items()])


def _merge_tables(merge: Mapping[str, Any], targets: Sequence[str]) -> dict[str, Table]:
    """Of `MergeReport.to_dict`: by tensor and target, between targets, and what was not as usual."""
    coefficients = [[name, *values] for name, values in merge["coefficients"].items()]
    shares = list(merge["shares"])
    norms = [f"norm of {target}" for target in targets]
    facts = [
        [name, one["elements"], *one["norms"], one["sign_conflicts"], *map(one["shares"].get, shares)]
        for name, one in merge["tensors"].items()
    ]
    cosines = [[target, *row] for target, row in zip(targets, merge["cosines"], strict=True)]
    events = [[event, name] for event, names in merge["events"].items() for name in names]
    return {
        "coefficients": Table(["tensor", *targets], coefficients),
        "deltas": Table(["tensor", "elements", *norms, "sign_conflicts", *shares], facts),
        "cosines": Table(["target", *targets], cosines),
        "events": Table(["event", "tensor"], events),
    }


def summary(result: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    """Numbers by which runs are sorted and compared."""
    if rows := result.get("comparison"):
        yield from ((f"score/{skill}", value) for skill, value in rows[-1]["scores"].items())
        yield "heldout/nll_per_byte", rows[-1]["nll_per_byte"]
    yield from ((name, result[name]) for name in ("scale", "steps", "tokens", "tokens_per_second") if name in result)
    if merge := result.get("merge"):
        names = zip(result["targets"], merge["mean_coefficients"], strict=True)
        yield from ((f"coefficient/{target}", value) for target, value in names)
        names = zip(result["targets"], merge["delta_norms"], strict=True)
        yield from ((f"delta_norm/{target}", value) for target, value in names)
        yield from ((f"merge/{name}", merge[name]) for name in MERGE_NUMBERS if name in merge)
        yield from ((f"merge/{name}", share) for name, share in merge["shares"].items())


def _to_wandb(logger: WandbLogger, result: Mapping[str, Any], lineage: Lineage) -> None:
    import wandb

    run = logger.experiment
    run.summary.update({name: value for name, value in summary(result) if value is not None})
    run.log({f"table/{name}": wandb.Table([*one.columns], one.rows) for name, one in tables(result).items()})
    used = [_artifact(piece) for piece in lineage.used]
    if not run.settings._offline:  # an offline run cannot use artifacts: what was made then names what it is made of
        for artifact in used:
            run.use_artifact(artifact)
    for piece in lineage.made:
        run.log_artifact(_artifact(piece, made_of=[artifact.name for artifact in used]))


def _artifact(piece: Piece, **metadata: object) -> Any:
    import wandb

    artifact = wandb.Artifact(piece.artifact_name, piece.kind, metadata={"hash": piece.hash, **metadata})
    if piece.folder is not None:
        artifact.add_reference(piece.folder.resolve().as_uri(), checksum=False)
    return artifact


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|")
