"""One source aligned to the pivot over a corpus: statistics, then every supervised row, through the cache."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from fusion.alignment.alignment import Alignment, build_alignment
from fusion.alignment.rows import Rows
from fusion.alignment.statistics import MappingStatistics
from fusion.cache import cached_folder, code_version, fingerprint, write_json
from fusion.config.schema import AlignmentConfig
from fusion.dialogues.encode import Encoded, corpus_hash
from fusion.dialogues.reader import Reader
from fusion.teaching.sparse_rows import SparseRows, SparseRowStore
from fusion.teaching.store import DistributionStore

REPORT = "report.json"


class AlignedStore(SparseRowStore):
    """The source's distributions on the pivot's rows and tokens, and how well that went."""

    @cached_property
    def report(self) -> dict[str, float]:
        """Supervised rows, and the shares that some source row speaks for (`aligned`) and that got mass (`covered`)."""
        return json.loads((self.folder / REPORT).read_text("utf-8"))


def align_pair(
    pivot: Reader,
    source: Reader,
    pivot_tokens: Mapping[str, Encoded],
    source_tokens: Mapping[str, Encoded],
    teacher: DistributionStore,
    names: Sequence[str],
    settings: AlignmentConfig,
    cache: Path,
) -> AlignedStore:
    """Align the source's rows of the dialogues `names` (content hashes); statistics are taken over the same ones."""
    key = {
        "pivot": pivot.tokenizer_hash,
        "source": source.tokenizer_hash,
        "pivot_tokens": corpus_hash({name: pivot_tokens[name] for name in names}),
        "teacher": teacher.folder.name,
        "names": fingerprint({"names": sorted(names)}),
        "strategy": settings.name,
        "options": settings.options,
        "code": code_version("fusion.alignment", "fusion.dialogues"),
    }

    def build(folder: Path) -> None:
        rows = {name: (_rows(pivot_tokens[name]), _rows(source_tokens[name])) for name in sorted(names)}
        alignment = _build(pivot, source, settings, rows)
        tally = _Tally()
        mapped = {}
        for name, (pivot_rows, source_rows) in rows.items():
            mapped[name] = _map(alignment, pivot_rows, source_rows, teacher, name, tally)
        SparseRowStore.write(folder, mapped)
        write_json(folder / REPORT, tally.report())

    return AlignedStore(cached_folder(cache, "alignment", key, build))


def _rows(encoded: Encoded) -> Rows:
    return Rows.of(encoded.ids_N, encoded.ends_N, encoded.rows_R)


def _build(
    pivot: Reader, source: Reader, settings: AlignmentConfig, rows: Mapping[str, tuple[Rows, Rows]]
) -> Alignment:
    ends = {"pivot_end_of_turn": pivot.end_of_turn_id, "source_end_of_turn": source.end_of_turn_id}
    statistics = MappingStatistics(pivot.tokenizer, source.tokenizer, **ends)
    for pivot_rows, source_rows in rows.values():
        statistics.add_rows(pivot_rows, source_rows)
    return build_alignment(settings.name, pivot.tokenizer, source.tokenizer, statistics, **ends, **settings.options)


def _map(
    alignment: Alignment, pivot: Rows, source: Rows, teacher: DistributionStore, name: str, tally: "_Tally"
) -> SparseRows:
    spoken = teacher[name]
    assert len(spoken.nll_R) == len(source), f"store and tokens of {name} disagree"
    source_row_R = alignment.align(pivot, source)
    mapped = alignment.map_support(spoken.ids_RK, spoken.logprobs_RK, source_row_R)
    rows = SparseRows(mapped.indptr, mapped.ids, mapped.weights.astype(np.float32))
    tally.add(source_row_R, rows)
    return rows


class _Tally:
    """Counts behind the report."""

    def __init__(self) -> None:
        self.supervised = self.aligned = self.covered = 0

    def add(self, source_row_R: np.ndarray, rows: SparseRows) -> None:
        self.supervised += len(source_row_R)
        self.aligned += int((source_row_R >= 0).sum())
        self.covered += int((~rows.is_empty_R).sum())

    def report(self) -> dict[str, float]:
        total = max(self.supervised, 1)
        return {
            "supervised_rows": self.supervised,
            "aligned": round(self.aligned / total, 6),
            "covered": round(self.covered / total, 6),
        }
