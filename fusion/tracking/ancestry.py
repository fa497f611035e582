"""What a model was made from, as `lineage.json` of its job says: dialogues and models, distributions, targets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


class Piece(NamedTuple):
    """A node of the graph; pieces of equal content are one."""

    stage: str  # dialogues, pivot, source, distributions, target, sft or merged
    name: str
    content: str  # its hash, or the path of a model that was not kept


@dataclass(frozen=True)
class Ancestry:
    """Edges lead from what was read to what was made of it."""

    edges: tuple[tuple[Piece, Piece], ...]

    @property
    def pieces(self) -> list[Piece]:
        return list(dict.fromkeys(piece for edge in self.edges for piece in edge))


def ancestry(stage: str, name: str, path: str, lineage: Mapping[str, Any]) -> Ancestry:
    """Of the model `name` in the folder `path`, which a job of `stage` ("train", "merge") made.

    Records of earlier versions lack some keys; what they do not name is left out.
    """
    if stage == "merge":
        return Ancestry(tuple(_unique(_of_merge(Piece("merged", name, path), lineage))))
    kind = "target" if lineage.get("distributions") else "sft"
    return Ancestry(tuple(_unique(_of_target(Piece(kind, name, path), lineage))))


def _of_merge(merged: Piece, lineage: Mapping[str, Any]) -> Iterator[tuple[Piece, Piece]]:
    inputs, stage1 = lineage.get("inputs", {}), lineage.get("stage1", {})
    bases = [value.get("inputs", {}).get("pivot") for value in stage1.values()]
    for name, content in inputs.get("targets", []):
        target = Piece("target", name, str(content))
        yield from _of_target(target, stage1.get(name, {}))
        yield target, merged
    if base := inputs.get("base"):
        known = any(base == other for other in bases)
        yield Piece("pivot", "pivot" if known else str(lineage.get("base") or "base"), str(base)), merged


def _of_target(target: Piece, lineage: Mapping[str, Any]) -> Iterator[tuple[Piece, Piece]]:
    inputs = dict(lineage.get("inputs", {}))
    dialogues, pivot = (inputs.pop(name, None) for name in ("dialogues", "pivot"))
    read = [Piece("dialogues", "dialogues", str(dialogues))] if dialogues else []
    start = [Piece("pivot", "pivot", str(pivot))] if pivot else []
    sources = [Piece("source", name, str(content)) for name, content in inputs.items()]
    if made := lineage.get("distributions"):
        distributions = Piece("distributions", f"distributions of {', '.join(inputs) or 'the pivot'}", str(made))
        yield from ((piece, distributions) for piece in [*read, *start, *sources])
        read = [distributions]
    yield from ((piece, target) for piece in [*read, *start])


def _unique(edges: Iterator[tuple[Piece, Piece]]) -> Iterator[tuple[Piece, Piece]]:
    yield from dict.fromkeys(edges)
