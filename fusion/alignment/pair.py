"""One source aligned to the pivot over a corpus, shard by shard and through the cache.

A shard is a run of dialogues in the order of their content hashes. Its rows and the counts behind the report are
written when it is done, so a killed alignment goes on behind its last shard, and no more than a shard is in memory.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from fusion.alignment.alignment import Alignment, build_alignment, strategy_builder
from fusion.alignment.categories import TokenCategories
from fusion.alignment.corpus import Corpus, Text
from fusion.alignment.counting import corpus_statistics
from fusion.alignment.disagreement import disagreement
from fusion.alignment.relations import relations
from fusion.alignment.report import RowFacts, Tally
from fusion.alignment.target_kind import DISTRIBUTION, TargetKind
from fusion.cache import cached_folder, code_version, write_json
from fusion.config import UserError
from fusion.config.schema import AlignmentConfig
from fusion.dialogues.encode import Encoded
from fusion.dialogues.reader import Reader
from fusion.teaching.shards import INDEX
from fusion.teaching.sparse_rows import SparseRows, SparseRowStore
from fusion.teaching.store import DistributionStore, TeacherRows

STAGE = "alignment"
REPORT = "report.json"


class AlignedStore(SparseRowStore):
    """The source's targets on the pivot's supervised rows, not scaled, and how well that went."""

    def __init__(self, folder: Path, paths: Mapping[str, Any] | None = None) -> None:
        """`paths` says how far the authors' path is from exact bytes; it depends on the dialogues alone."""
        super().__init__(folder)
        self._paths = paths

    @property
    def kind(self) -> TargetKind:
        """What the weights mean."""
        return TargetKind.from_json(self._written["targets"])

    @property
    def report(self) -> dict[str, Any]:
        """What `Tally.report` says, the kind of `targets`, `bytes_per_row` of the source's and of this store, and
        `dtw` (see `disagreement`; None when that was not asked for). Raises UserError when the file is damaged.
        """
        return {**self._written, "dtw": self._paths}

    @cached_property
    def _written(self) -> dict[str, Any]:
        return _read_json(self.folder / REPORT)

    def verify(self) -> list[str]:
        """Re-hash everything; one sentence per file that is missing, truncated or damaged."""
        try:
            self._written["targets"]
        except UserError as error:
            return [*super().verify(), *error.problems]
        return super().verify()


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
    """Align the source's rows of the dialogues `names` (content hashes); statistics are taken over the same ones.

    What becomes of rows without targets (`fallback`) and of mass without a token (`tail`) is decided later.

    Raises:
        UserError: an unknown strategy or option, a tokeniser without a byte table, or damaged files in the cache.
    """
    corpus = Corpus(pivot, source, pivot_tokens, source_tokens, sorted(set(names)))
    key = {
        **corpus.key(),
        "teacher": teacher.folder.name,
        "strategy": settings.name,
        "path": settings.path,
        "options": settings.options,
        "shard_dialogues": settings.shard_dialogues,
        "code": code_version("fusion.alignment", "fusion.dialogues", *_own_code(settings.name)),
    }

    def build(folder: Path) -> None:
        _build(folder, corpus, teacher, settings, cache)

    folder = cached_folder(cache, STAGE, key, build)
    return AlignedStore(folder, disagreement(corpus, settings.dtw_sample, cache))


def _own_code(strategy: str) -> list[str]:
    """The module of a strategy that is the user's own: its changes count as those of our code do."""
    try:
        return [strategy] if "." in strategy and find_spec(strategy) else []
    except (ImportError, ValueError):  # told in the user's words when the strategy is built
        return []


def _build(folder: Path, corpus: Corpus, teacher: DistributionStore, settings: AlignmentConfig, cache: Path) -> None:
    """Align the shards that are missing, then write what stands over all."""
    alignment = _alignment(corpus, settings, cache)
    writer = _Shards(folder, alignment, TokenCategories(alignment.pair.pivot))
    total = Tally()
    for number, names in enumerate(corpus.shards(settings.shard_dialogues)):
        if not writer.has(number):
            writer.write(number, {name: (corpus[name], teacher[name]) for name in names})
        total.merge(Tally.from_json(_read_json(writer.tally_file(number))))
    SparseRowStore.finish(folder)
    rows = max(int(total.rows_LC.sum()), 1)
    size = sum(file.stat().st_size for file in (*folder.glob("*.safetensors"), folder / INDEX))
    report = {
        **total.report(alignment.kind.name == DISTRIBUTION),
        "targets": alignment.kind.to_json(),
        "bytes_per_row": {
            "teacher": round(teacher.num_bytes / max(teacher.num_rows, 1), 2),
            "aligned": round(size / rows, 2),
        },
    }
    write_json(folder / REPORT, report)


def _alignment(corpus: Corpus, settings: AlignmentConfig, cache: Path) -> Alignment:
    """The strategy, with statistics of the corpus if it uses any."""
    pivot, source = corpus.pivot, corpus.source
    counts = uses_statistics(settings.name, settings.options)
    return build_alignment(
        settings.name,
        pivot.tokenizer,
        source.tokenizer,
        corpus_statistics(corpus, settings.path, settings.shard_dialogues, cache) if counts else None,
        pivot_end_of_turn=pivot.end_of_turn_id,
        source_end_of_turn=source.end_of_turn_id,
        path=settings.path,
        **settings.options,
    )


def uses_statistics(strategy: str, options: Mapping[str, Any]) -> bool:
    """False where the strategy's module says `USES_STATISTICS = False`, so that nothing has to be counted for it."""
    module = inspect.getmodule(strategy_builder(strategy, options))
    return bool(getattr(module, "USES_STATISTICS", True))


@dataclass(frozen=True)
class _Shards:
    """Writes the shards of one alignment."""

    folder: Path
    alignment: Alignment
    categories: TokenCategories

    def tally_file(self, number: int) -> Path:
        return self.folder / f"tally-{number:06d}.json"

    def has(self, number: int) -> bool:
        """The tally is written last."""
        return SparseRowStore.has_shard(self.folder, number) and self.tally_file(number).is_file()

    def write(self, number: int, dialogues: Mapping[str, tuple[Text, TeacherRows]]) -> None:
        tally = Tally()
        rows = {name: self._map(text, said, tally) for name, (text, said) in dialogues.items()}
        SparseRowStore.append(self.folder, number, rows)
        write_json(self.tally_file(number), tally.to_json())

    def _map(self, text: Text, said: TeacherRows, tally: Tally) -> SparseRows:
        """Targets on the pivot's supervised rows; the strategy sees whole dialogues."""
        pivot, source = text.all_rows()
        wanted_R, stored_S = text.pivot.rows_R, text.source.rows_R
        spoken = self.alignment.speak(pivot, source, said, wanted_R, stored_S)
        mass_R = np.bincount(spoken.targets.row_of_E, spoken.targets.weights_E, len(wanted_R))
        facts = RowFacts(
            relations(pivot, source)[wanted_R],
            self.categories(pivot.next[wanted_R]),
            (spoken.rows_R >= 0) & np.isin(spoken.rows_R, stored_S),
            ~spoken.targets.is_empty_R,
            mass_R,
        )
        tally.add(facts, text.pivot.exact, text.source.exact)
        return spoken.targets


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        problem = f"{file}: this file is missing or damaged ({error}); delete {file.parent} to align again"
        raise UserError(problem) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: this file is damaged; delete {file.parent} to align again")
    return content
