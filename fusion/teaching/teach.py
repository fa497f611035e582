"""The teacher pass of one model over all dialogues, cached by what it depends on and resumed by shard."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fusion.cache import cached_folder, code_version
from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.teaching.causal_lm import embedding_rows, load_causal_lm, on_device
from fusion.teaching.forward import RowReader, teacher_rows, token_batches
from fusion.teaching.store import DistributionStore

log = logging.getLogger(__name__)


def teach(
    model: ModelConfig,
    model_hash: str,
    vocab_size: int,
    encoded: Mapping[str, Encoded],
    settings: TeacherConfig,
    cache: Path,
) -> DistributionStore:
    """Return the store of what `model` says about `encoded` (content hash -> tokens), reading each dialogue once.

    `vocab_size` is the tokeniser's; `model_hash` names the weights. Shards are runs of dialogues in the order of
    (length, hash), so their bytes do not depend on the order in which dialogues came, nor on where a pass was killed.
    """
    order = sorted(encoded, key=lambda content_hash: (len(encoded[content_hash].ids_N), content_hash))
    key = {
        "model": model_hash,
        "vocab_size": vocab_size,
        "dtype": model.dtype,
        "top_k": settings.top_k,
        "temperature": settings.temperature,
        "batch_tokens": settings.batch_tokens,
        "shard_dialogues": settings.shard_dialogues,
        "threads": torch.get_num_threads(),
        "dialogues": corpus_hash(encoded),
        "code": code_version("fusion.teaching"),
    }

    def build(folder: Path) -> None:
        _write_store(folder, model, vocab_size, [(name, encoded[name]) for name in order], settings)

    return DistributionStore.open(cached_folder(cache, "teaching", key, build))


def _write_store(
    folder: Path,
    model: ModelConfig,
    vocab_size: int,
    dialogues: Sequence[tuple[str, Encoded]],
    settings: TeacherConfig,
) -> None:
    store = DistributionStore(folder)
    size = settings.shard_dialogues
    reader: RowReader | None = None
    for number, start in enumerate(range(0, len(dialogues), size)):
        if store.has_shard(number):
            continue
        reader = reader or RowReader(on_device(load_causal_lm(model), settings.device), vocab_size)
        _write_shard(store, number, reader, dialogues[start : start + size], settings, model.name)
        log.info("teacher %s: %d of %d dialogues", model.name, min(start + size, len(dialogues)), len(dialogues))
    store.finish({"model": model.name, "top_k": settings.top_k, "temperature": settings.temperature})


def _write_shard(
    store: DistributionStore,
    number: int,
    reader: RowReader,
    shard: Sequence[tuple[str, Encoded]],
    settings: TeacherConfig,
    name: str,
) -> None:
    rows = []
    for positions in token_batches([len(encoded.ids_N) for _, encoded in shard], settings.batch_tokens):
        batch = [shard[position][1] for position in positions]
        _check_ids(batch, reader, name)
        try:
            rows += teacher_rows(reader, batch, settings.top_k, settings.temperature)
        except FloatingPointError as error:
            hashes = ", ".join(shard[position][0] for position in positions)
            raise UserError(f"teacher {name}: {error}; it is in one of the dialogues {hashes}") from error
    store.append(number, [content_hash for content_hash, _ in shard], rows)


def _check_ids(batch: Sequence[Encoded], reader: RowReader, name: str) -> None:
    rows = embedding_rows(reader.model)
    highest = max(int(encoded.ids_N.max()) for encoded in batch)
    if highest >= rows:
        raise UserError(
            f"teacher {name}: its tokeniser has token {highest}, but the model embeds only {rows} tokens; "
            "the tokeniser does not belong to this model"
        )
