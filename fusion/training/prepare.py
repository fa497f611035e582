"""From settings to fused targets: read, encode, teach, align, fuse; a step that was done before is not done again."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from fusion.alignment.alignment import strategy_builder
from fusion.alignment.pair import align_pair
from fusion.config import UserError
from fusion.config.schema import ModelConfig, TrainConfig
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.dialogues.load import load_splits
from fusion.dialogues.reader import Reader, encode_all, make_readers
from fusion.dialogues.splitting import split_long
from fusion.objective.fuse import fusion_function
from fusion.objective.fused_store import FusedStore
from fusion.teaching.teach import Share, teach, teach_share
from fusion.training.fusing import Spoken, fused_store, references_only

log = logging.getLogger(__name__)


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
    return config.source.models()


@dataclass(frozen=True)
class Corpus:
    """The dialogues as the models read them, the pivot first; models that do not teach are left out."""

    readers: list[Reader]
    encoded: list[Mapping[str, Encoded]]
    """Of every reader: content hash -> tokens."""
    train: list[Dialogue]
    heldout: list[Dialogue]
    dropped: Counter[str]
    """Why dialogues were left out, and how many."""


def prepare(config: TrainConfig) -> Prepared:
    """Run or look up every step before training.

    Raises:
        UserError: dialogues, models or settings cannot be used; nothing is half-written.
    """
    corpus = _read_corpus(config)
    if config.is_baseline:
        fused = references_only(config, corpus.encoded[0], _hashes(corpus.train))
        report = {"dialogues": _counts(corpus), **fused.summary}
        return Prepared(fused, corpus.heldout, [], report, _inputs(corpus), corpus.readers[0].tokenizer)
    return _prepare_fused(config, corpus)


def prepare_share(config: TrainConfig) -> list[Share]:
    """Read the shards of worker `teacher.worker` of every teacher, and nothing else; raises as `prepare` does."""
    corpus = _read_corpus(config)
    cache = Path(config.paths.cache)
    return [
        teach_share(reader.model, reader.identity, reader.vocab_size, tokens, config.teacher, cache)
        for reader, tokens in zip(corpus.readers, corpus.encoded, strict=True)
        if not config.is_baseline
    ]


def _read_corpus(config: TrainConfig) -> Corpus:
    fusion_function(config.fusion.name)  # wrong names are told before the teachers start
    strategy_builder(config.alignment.name, config.alignment.options)
    train, heldout = load_splits(config.data)
    models = [config.pivot, *(sources(config) if not config.is_baseline else [])]
    readers = make_readers(models, config.template, config.data.max_length)
    if config.data.long == "split":
        train, heldout = (split_long(some, readers[0].encoder, config.data.max_length) for some in (train, heldout))
    encoded, dropped = encode_all(readers, [*train, *heldout])
    train = [dialogue for dialogue in train if dialogue.content_hash in encoded[0]]
    heldout = [dialogue for dialogue in heldout if dialogue.content_hash in encoded[0]]
    if not train:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common(5)) or "all are held out"
        raise UserError(f"data.path={config.data.path}: no dialogue is left to train on ({reasons})")
    return Corpus(readers, encoded, train, heldout, dropped)


def _prepare_fused(config: TrainConfig, corpus: Corpus) -> Prepared:
    cache = Path(config.paths.cache)
    readers, encoded = corpus.readers, corpus.encoded
    stores = [
        teach(reader.model, reader.identity, reader.vocab_size, tokens, config.teacher, cache)
        for reader, tokens in zip(readers, encoded, strict=True)
    ]
    names = sorted(set(_hashes(corpus.train)))
    aligned = [
        align_pair(readers[0], reader, encoded[0], tokens, store, names, config.alignment, cache)
        for reader, tokens, store in zip(readers[1:], encoded[1:], stores[1:], strict=True)
    ]
    spoken = Spoken([reader.model.name for reader in readers], encoded, stores, aligned)
    fused = fused_store(config, spoken, _hashes(corpus.train))
    heldout_won = [one for one in corpus.heldout if spoken.is_won_by_source(one.content_hash, config.fusion.unit)]
    report = {
        "dialogues": _counts(corpus),
        "alignment": {reader.model.name: rows.report for reader, rows in zip(readers[1:], aligned, strict=True)},
        "heldout_won": len(heldout_won),
        **fused.summary,
    }
    return Prepared(fused, corpus.heldout, heldout_won, report, _inputs(corpus), readers[0].tokenizer)


def _hashes(dialogues: Sequence[Dialogue]) -> list[str]:
    return [dialogue.content_hash for dialogue in dialogues]


def _inputs(corpus: Corpus) -> dict[str, str]:
    models = {reader.model.name: reader.identity for reader in corpus.readers}
    return {**models, "dialogues": corpus_hash(corpus.encoded[0])}


def _counts(corpus: Corpus) -> dict[str, object]:
    for reason, count in corpus.dropped.items():
        log.warning("%d dialogues are left out: %s", count, reason)
    return {"train": len(corpus.train), "heldout": len(corpus.heldout), "dropped": dict(corpus.dropped)}
