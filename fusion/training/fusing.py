"""Fused targets of a corpus, through the cache: what every model says of a dialogue becomes what training reads."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fusion.alignment.pair import AlignedStore
from fusion.cache import cached_folder, code_version, fingerprint
from fusion.config.schema import FusionConfig, TrainConfig
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.objective.fuse import FusedDialogue, FusionFunction, Vote, fuse, fusion_function, is_kept, pivot_vote
from fusion.objective.fused_store import FusedStore
from fusion.objective.target_form import TargetForm
from fusion.objective.units import Reading, Units, dialogue_units, span_units, token_units
from fusion.teaching.sparse_rows import SparseRows, loose_rows
from fusion.teaching.store import DistributionStore, TeacherRows

CODE = (
    "fusion.training.fusing",
    "fusion.objective",
    "fusion.teaching.sparse_rows",
    "fusion.alignment.target_kind",
    "fusion.dialogues.encode",
)
"""What fused stores are made by, besides the function of `fusion.name`, which may be the user's own."""
REFERENCES = "references"
"""Winner of every dialogue when nothing is fused (objective=sft)."""


@dataclass(frozen=True)
class Spoken:
    """What the models have read and said of all dialogues; the pivot stands first."""

    names: Sequence[str]
    encoded: Sequence[Mapping[str, Encoded]]
    stores: Sequence[DistributionStore]
    aligned: Sequence[AlignedStore]
    """The sources' rows on the pivot's rows, not scaled."""

    def said(self, content_hash: str) -> list[TeacherRows]:
        """What every model says of a dialogue."""
        return [store[content_hash] for store in self.stores]

    def readings(self, content_hash: str, said: Sequence[TeacherRows]) -> list[Reading]:
        """How every model reads a dialogue of which it has `said` that."""
        pairs = zip(self.encoded, said, strict=True)
        return [Reading.of(tokens[content_hash], rows) for tokens, rows in pairs]

    def is_won_by_source(self, content_hash: str, unit: str) -> bool:
        """Whether some source reads the whole dialogue with a lower cross-entropy than the pivot."""
        readings = self.readings(content_hash, self.said(content_hash))
        return int(np.argmin(dialogue_units(readings, unit).ce_UM[0])) > 0


def fused_store(config: TrainConfig, spoken: Spoken, examples: Sequence[str]) -> FusedStore:
    """Fuse the dialogues of `examples` (content hashes, repeats included), or find them in the cache.

    Raises:
        UserError: the fusion function's shares are none, or level, function or divergence do not go with the
            alignment's targets.
    """
    form = TargetForm(spoken.aligned[0].kind, config.alignment.tail)  # one strategy, so one kind
    form.refuse_level(config.fusion.level)
    if config.objective.name == "fusion":
        form.refuse_divergence(config.objective.divergence, config.objective.temperature)
    function = fusion_function(config.fusion.name)
    key = {
        **_examples_key(spoken.encoded[0], examples),
        "teachers": [store.folder.name for store in spoken.stores],
        "alignments": [rows.folder.name for rows in spoken.aligned],
        "names": list(spoken.names),
        "fusion": config.fusion,
        "fallback": config.alignment.fallback,
        "form": form.to_json(),
        "code": code_version(*CODE, function.__module__),
    }

    def build(folder: Path) -> None:
        fused = {
            name: _fused_dialogue(spoken, name, config.fusion, function, config.alignment.fallback, form)
            for name in sorted(set(examples))
        }
        share = config.fusion.keep_pivot_won
        kept = [name for name in examples if fused[name].winner != spoken.names[0] or is_kept(name, share)]
        summary = {"level": config.fusion.level, **_summary(fused, examples, kept, form)}
        FusedStore.write(folder, spoken.encoded[0], fused, kept, summary, form)

    return FusedStore(cached_folder(Path(config.paths.cache), "fusion", key, build))


def references_only(config: TrainConfig, encoded: Mapping[str, Encoded], examples: Sequence[str]) -> FusedStore:
    """The store of SFT: no fused targets, so no teacher has to run."""
    key = {**_examples_key(encoded, examples), "code": code_version(*CODE)}

    def build(folder: Path) -> None:
        fused = {name: _nothing_fused(len(encoded[name].rows_R)) for name in set(examples)}
        form = TargetForm()
        FusedStore.write(folder, encoded, fused, examples, _summary(fused, examples, examples, form), form)

    return FusedStore(cached_folder(Path(config.paths.cache), "fusion", key, build))


def _examples_key(encoded: Mapping[str, Encoded], examples: Sequence[str]) -> dict[str, object]:
    return {
        "examples": corpus_hash({name: encoded[name] for name in set(examples)}),
        "order": fingerprint({"examples": list(examples)}),
    }


def _fused_dialogue(
    spoken: Spoken, name: str, settings: FusionConfig, function: FusionFunction, fallback: str, form: TargetForm
) -> FusedDialogue:
    tokens = spoken.encoded[0][name]
    references_R = tokens.ids_N[tokens.rows_R + 1]
    rows = [store[name] for store in spoken.aligned]
    said = spoken.said(name)
    votes = [pivot_vote(spoken.names[0], said[0], form.kind)]
    votes += [Vote(model, one) for model, one in zip(spoken.names[1:], rows, strict=True)]
    units = _units(settings, spoken.readings(name, said), references_R, rows)
    return fuse(votes, units, references_R, function, fallback, form)


def _units(
    settings: FusionConfig, readings_M: Sequence[Reading], references_R: np.ndarray, aligned: Sequence[SparseRows]
) -> Units:
    if settings.level == "token":
        return token_units(readings_M[0], references_R, aligned)
    if settings.level == "span":
        return span_units(readings_M, settings.unit)
    return dialogue_units(readings_M, settings.unit)


def _nothing_fused(rows: int) -> FusedDialogue:
    nothing = np.zeros(0, dtype=np.int64)
    return FusedDialogue(loose_rows(nothing, nothing, nothing, rows), REFERENCES, rows, {REFERENCES: float(rows)})


def _summary(
    fused: Mapping[str, FusedDialogue], examples: Sequence[str], kept: Sequence[str], form: TargetForm
) -> dict[str, object]:
    """Who won: dialogues by model, and the share of rows that the fusion function gave to every model."""
    rows = sum(len(fused[name].rows) for name in examples)
    fallback = sum(fused[name].fallback_rows for name in examples)
    won: Counter[str] = Counter()  # of floats: shares of rows
    for name in examples:
        won.update(fused[name].rows_won)
    return {
        "who_won": dict(sorted(Counter(fused[name].winner for name in examples).items())),
        "rows_won": {model: round(share / rows, 6) for model, share in sorted(won.items())},
        "trained_on": len(kept),
        "supervised_rows": rows,
        "fallback_rows": fallback,
        "fallback_share": round(fallback / rows, 6),
        "targets": form.to_json(),
    }
