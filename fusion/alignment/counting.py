"""Mapping statistics of a corpus, through the cache: counted shard by shard, once for all strategies that use them."""

import zipfile
from pathlib import Path

from fusion.alignment.corpus import Corpus
from fusion.alignment.statistics import MappingStatistics
from fusion.alignment.vocabularies import BYTES
from fusion.cache import cached_folder, code_version
from fusion.config import UserError

STAGE = "statistics"
COUNTING = (
    "fusion.alignment.corpus",
    "fusion.alignment.counting",
    "fusion.alignment.dtw",
    "fusion.alignment.pieces",
    "fusion.alignment.rows",
    "fusion.alignment.statistics",
    "fusion.alignment.vocabularies",
    "fusion.dialogues",
)
"""The code that counts depend on."""


def corpus_statistics(corpus: Corpus, path: str, shard_dialogues: int, cache: Path) -> MappingStatistics:
    """Counts over supervised rows (`path=bytes`), or, as the authors count, over whole dialogues (`path=dtw`).

    A killed count goes on behind its last finished shard.

    Raises:
        UserError: counts of the cache are damaged, or there is no byte table of a tokeniser.
    """
    shards = corpus.shards(shard_dialogues)
    key = {**corpus.key(), "path": path, "shard_dialogues": shard_dialogues, "code": code_version(*COUNTING)}

    def build(folder: Path) -> None:
        for number, names in enumerate(shards):
            if not (folder / _file_name(number)).is_file():
                counts = _no_counts(corpus, path)
                for name in names:
                    text = corpus[name]
                    counts.add_rows(*(text.supervised_rows() if path == BYTES else text.all_rows()))
                counts.save(folder / _file_name(number))

    folder = cached_folder(cache, STAGE, key, build)
    total = _no_counts(corpus, path)
    for number in range(len(shards)):
        total.merge(_load(_no_counts(corpus, path), folder / _file_name(number)))
    return total


def _file_name(number: int) -> str:
    return f"counts-{number:06d}.npz"


def _no_counts(corpus: Corpus, path: str) -> MappingStatistics:
    pivot, source = corpus.pivot, corpus.source
    return MappingStatistics(
        pivot.tokenizer,
        source.tokenizer,
        path,
        pivot_end_of_turn=pivot.end_of_turn_id,
        source_end_of_turn=source.end_of_turn_id,
    )


def _load(counts: MappingStatistics, file: Path) -> MappingStatistics:
    try:
        return counts.load(file)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        problem = f"{file}: these counts are missing or damaged ({error}); delete {file.parent} to count them again"
        raise UserError(problem) from error
