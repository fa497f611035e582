"""From settings to fused targets: read, encode, teach, align, fuse; a step that was done before is not done again."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from fusion.alignment.alignment import strategy_builder
from fusion.alignment.pair import align_pair
from fusion.cache import cached_folder, code_version, fingerprint
from fusion.config import UserError
from fusion.config.schema import ModelConfig, TrainConfig
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.dialogues.load import load_splits
from fusion.dialogues.reader import Reader, encode_all, make_readers
from fusion.objective.fuse import FusedDialogue, Vote, fuse, fusion_function, is_kept, pivot_vote
from fusion.objective.fused_store import FusedStore
from fusion.teaching.sparse_rows import SparseRows, SparseRowStore
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import teach

log = logging.getLogger(__name__)

CODE = ("fusion.training.prepare", "fusion.objective", "fusion.teaching.sparse_rows", "fusion.dialogues.encode")
"""What fused stores are made by, besides the function of `fusion.name`, which may be the user's own."""
REFERENCES = "references"
"""Winner of every dialogue when nothing is fused (objective=sft)."""


@dataclass(frozen=True)
class Prepared:
    """What stage 1 trains on, and what it knows about the dialogues."""

    fused: FusedStore
    heldout: list[Dialogue]
    heldout_won: list[Dialogue]
    """Held-out dialogues that a source won: the scale search of stage 2 reads them."""
    report: dict[str, object]
    inputs: dict[str, str]
    """Hashes of what went in: models by name, and the tokenised dialogues."""
    tokenizer: PreTrainedTokenizerFast
    """The pivot's; targets keep it, chat template included."""


def sources(config: TrainConfig) -> list[ModelConfig]:
    """The source, or the members of a many-to-one source, as model settings."""
    members = config.source.members or {config.source.name: vars(config.source)}
    known = set(ModelConfig.__dataclass_fields__)
    return [
        ModelConfig(**{"name": name, **{key: value for key, value in member.items() if key in known}})
        for name, member in members.items()
    ]


def prepare(config: TrainConfig) -> Prepared:
    """Run or look up every step before training.

    Raises:
        UserError: dialogues, models or settings cannot be used; nothing is half-written.
    """
    fusion_function(config.fusion.name)  # wrong names are told before the teachers start
    strategy_builder(config.alignment.name, config.alignment.options)
    train, heldout = load_splits(config.data)
    needs_teachers = config.objective.name == "fusion" or config.fusion.keep_pivot_won < 1
    models = [config.pivot, *(sources(config) if needs_teachers else [])]
    readers = make_readers(models, config.template, config.data.max_length)
    encoded, dropped = encode_all(readers, [*train, *heldout])
    train = [dialogue for dialogue in train if dialogue.content_hash in encoded[0]]
    heldout = [dialogue for dialogue in heldout if dialogue.content_hash in encoded[0]]
    if not train:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common(5)) or "all are held out"
        raise UserError(f"data.path={config.data.path}: no dialogue is left to train on ({reasons})")
    if not needs_teachers:
        fused = _references_only(config, encoded[0], train)
        report = {"dialogues": _counts(train, heldout, dropped), **fused.summary}
        return Prepared(fused, heldout, [], report, _inputs(readers, encoded[0]), readers[0].tokenizer)
    return _prepare_fused(config, readers, encoded, train, heldout, dropped)


def _prepare_fused(
    config: TrainConfig,
    readers: Sequence[Reader],
    encoded: Sequence[Mapping[str, Encoded]],
    train: list[Dialogue],
    heldout: list[Dialogue],
    dropped: Counter[str],
) -> Prepared:
    cache = Path(config.paths.cache)
    stores = [
        teach(reader.model, reader.identity, reader.vocab_size, tokens, config.teacher, cache)
        for reader, tokens in zip(readers, encoded, strict=True)
    ]
    names = sorted({dialogue.content_hash for dialogue in train})
    aligned = [
        align_pair(readers[0], reader, encoded[0], tokens, store, names, config.alignment, cache)
        for reader, tokens, store in zip(readers[1:], encoded[1:], stores[1:], strict=True)
    ]
    scores = {name: _cross_entropies(name, encoded, stores, config.fusion.unit) for name in encoded[0]}
    fused = _fused_store(config, readers, encoded[0], scores, stores, aligned, train)
    heldout_won = [dialogue for dialogue in heldout if int(np.argmin(scores[dialogue.content_hash])) > 0]
    report = {
        "dialogues": _counts(train, heldout, dropped),
        "alignment": {reader.model.name: rows.report for reader, rows in zip(readers[1:], aligned, strict=True)},
        "heldout_won": len(heldout_won),
        **fused.summary,
    }
    return Prepared(fused, heldout, heldout_won, report, _inputs(readers, encoded[0]), readers[0].tokenizer)


def _inputs(readers: Sequence[Reader], encoded: Mapping[str, Encoded]) -> dict[str, str]:
    return {**{reader.model.name: reader.identity for reader in readers}, "dialogues": corpus_hash(encoded)}


def _counts(train: Sequence[Dialogue], heldout: Sequence[Dialogue], dropped: Counter[str]) -> dict[str, object]:
    for reason, count in dropped.items():
        log.warning("%d dialogues are left out: %s", count, reason)
    return {"train": len(train), "heldout": len(heldout), "dropped": dict(dropped)}


def _cross_entropies(
    name: str, encoded: Sequence[Mapping[str, Encoded]], stores: Sequence[DistributionStore], unit: str
) -> np.ndarray:
    """Nats per byte or per token of every model on dialogue `name`: float64 [M]."""
    totals = [float(store[name].nll_R.sum(dtype=np.float64)) for store in stores]
    units = [tokens[name].num_bytes if unit == "byte" else len(tokens[name].rows_R) for tokens in encoded]
    return np.asarray(totals) / np.maximum(units, 1)


def _fused_store(
    config: TrainConfig,
    readers: Sequence[Reader],
    encoded: Mapping[str, Encoded],
    scores: Mapping[str, np.ndarray],
    stores: Sequence[DistributionStore],
    aligned: Sequence[SparseRowStore],
    train: Sequence[Dialogue],
) -> FusedStore:
    examples = [dialogue.content_hash for dialogue in train]
    function = fusion_function(config.fusion.name)
    key = {
        "teachers": [store.folder.name for store in stores],
        "alignments": [rows.folder.name for rows in aligned],
        "names": [reader.model.name for reader in readers],
        "examples": corpus_hash({name: encoded[name] for name in set(examples)}),
        "order": fingerprint({"examples": examples}),
        "fusion": config.fusion,
        "fallback": config.alignment.fallback,
        "code": code_version(*CODE, function.__module__),
    }

    def build(folder: Path) -> None:
        fused: dict[str, FusedDialogue] = {}
        for name in sorted(set(examples)):
            ce_M = scores[name]
            votes = [pivot_vote(readers[0].model.name, stores[0][name], ce_M[0])]
            votes += [
                Vote(reader.model.name, rows[name], ce)
                for reader, rows, ce in zip(readers[1:], aligned, ce_M[1:], strict=True)
            ]
            references_R = encoded[name].ids_N[encoded[name].rows_R + 1]
            fused[name] = fuse(votes, references_R, function, config.alignment.fallback)
        pivot = readers[0].model.name
        kept = [
            name for name in examples if fused[name].winner != pivot or is_kept(name, config.fusion.keep_pivot_won)
        ]
        FusedStore.write(folder, encoded, fused, kept, _summary(fused, examples, kept))

    return FusedStore(cached_folder(Path(config.paths.cache), "fusion", key, build))


def _summary(fused: Mapping[str, FusedDialogue], examples: Sequence[str], kept: Sequence[str]) -> dict[str, object]:
    rows = sum(len(fused[name].rows) for name in examples)
    fallback = sum(fused[name].fallback_rows for name in examples)
    return {
        "who_won": dict(sorted(Counter(fused[name].winner for name in examples).items())),
        "trained_on": len(kept),
        "supervised_rows": rows,
        "fallback_rows": fallback,
        "fallback_share": round(fallback / rows, 6),
    }


def _references_only(config: TrainConfig, encoded: Mapping[str, Encoded], train: Sequence[Dialogue]) -> FusedStore:
    """The store of SFT: no fused distributions, so no teacher has to run."""
    examples = [dialogue.content_hash for dialogue in train]
    key = {
        "examples": corpus_hash({name: encoded[name] for name in set(examples)}),
        "order": fingerprint({"examples": examples}),
        "code": code_version(*CODE),
    }

    def build(folder: Path) -> None:
        nothing = np.zeros(0, dtype=np.int64)
        fused = {}
        for name in set(examples):
            rows = len(encoded[name].rows_R)
            empty = SparseRows(np.zeros(rows + 1, np.int64), nothing.astype(np.int32), nothing.astype(np.float32))
            fused[name] = FusedDialogue(empty, REFERENCES, rows)
        FusedStore.write(folder, encoded, fused, examples, _summary(fused, examples, examples))

    return FusedStore(cached_folder(Path(config.paths.cache), "fusion", key, build))
