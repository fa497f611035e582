"""One source aligned to the pivot over a corpus: statistics, then every supervised row, through the cache."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
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
from fusion.teaching.store import DistributionStore, TeacherRows

REPORT = "report.json"


class AlignedStore(SparseRowStore):
    """The source's distributions on the pivot's rows and tokens, and how well that went."""

    @cached_property
    def report(self) -> dict[str, float]:
        """Supervised rows; the shares that a source row speaks for (`aligned`) and that got mass (`covered`)."""
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
        "path": settings.path,
        "options": settings.options,
        "code": code_version("fusion.alignment", "fusion.dialogues", *_own_code(settings.name)),
    }

    def build(folder: Path) -> None:
        texts = {name: _Text(pivot_tokens[name], source_tokens[name]) for name in sorted(names)}
        alignment = _build(pivot, source, settings, texts)
        tally = _Tally()
        mapped = {name: _map(alignment, text, teacher[name], tally) for name, text in texts.items()}
        SparseRowStore.write(folder, mapped)
        write_json(folder / REPORT, tally.report())

    return AlignedStore(cached_folder(cache, "alignment", key, build))


def _own_code(strategy: str) -> list[str]:
    """The module of a strategy that is the user's own: its changes count as those of our code do."""
    try:
        return [strategy] if "." in strategy and find_spec(strategy) else []
    except (ImportError, ValueError):  # told in the user's words when the strategy is built
        return []


@dataclass(frozen=True)
class _Text:
    """One dialogue as both models read it."""

    pivot: Encoded
    source: Encoded

    def all_rows(self) -> tuple[Rows, Rows]:
        return _rows(self.pivot), _rows(self.source)

    def supervised_rows(self) -> tuple[Rows, Rows]:
        return _rows(self.pivot, self.pivot.rows_R), _rows(self.source, self.source.rows_R)


def _rows(encoded: Encoded, rows_R: np.ndarray | None = None) -> Rows:
    return Rows.of(encoded.ids_N, encoded.ends_N, rows_R)


def _build(pivot: Reader, source: Reader, settings: AlignmentConfig, texts: Mapping[str, _Text]) -> Alignment:
    """The strategy with its statistics: over supervised rows, or, as the authors count, over the whole path."""
    pivot_end, source_end = pivot.end_of_turn_id, source.end_of_turn_id
    statistics = MappingStatistics(
        pivot.tokenizer,
        source.tokenizer,
        settings.path,
        pivot_end_of_turn=pivot_end,
        source_end_of_turn=source_end,
    )
    for text in texts.values():
        statistics.add_rows(*(text.supervised_rows() if settings.path == "bytes" else text.all_rows()))
    return build_alignment(
        settings.name,
        pivot.tokenizer,
        source.tokenizer,
        statistics,
        pivot_end_of_turn=pivot_end,
        source_end_of_turn=source_end,
        **settings.options,
    )


def _map(alignment: Alignment, text: _Text, spoken: TeacherRows, tally: "_Tally") -> SparseRows:
    """Distributions on the pivot's supervised rows; the strategy sees whole dialogues, the store supervised rows."""
    stored_N = np.full(len(text.source.ids_N) + 1, -1, dtype=np.int64)  # the extra place stands for "no row"
    stored_N[text.source.rows_R] = np.arange(len(spoken.nll_R))
    aligned_N = alignment.align(*text.all_rows())
    source_row_R = stored_N[np.maximum(aligned_N[text.pivot.rows_R], -1)]
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
