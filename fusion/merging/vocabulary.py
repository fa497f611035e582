"""Targets with another vocabulary than the base's: their embeddings and heads, row by row in the base's order.

Rows belong together when their tokens do: special tokens with the same text, others that stand for the same bytes.
Shapes: V rows of the base's embedding.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from fusion.config import UserError
from fusion.config.schema import ModelConfig
from fusion.dialogues.token_bytes import TokenBytes, token_bytes
from fusion.dialogues.tokenizer import load_tokenizer
from fusion.merging.checkpoint import Checkpoint
from fusion.merging.layers import LAYER
from fusion.merging.tensor_file import TensorHome, TensorSpec, read_whole

log = logging.getLogger(__name__)

ERROR, BASE = "error", "base"
POSITIONS = re.compile(r"position|\bwpe\b")
SPECIAL, PIECE, BYTE = "special", "piece", "byte"


@dataclass(frozen=True)
class MatchedRows:
    """A target's tensor in the base's order of rows; rows that the target lacks are the base's."""

    base: TensorHome
    target: TensorHome
    name: str
    rows_V: np.ndarray
    """int64: the target's row for each of the base's, -1 where it has none."""

    @property
    def path(self) -> Path:
        return self.target.path

    @cached_property
    def spec(self) -> TensorSpec:
        return self.base.specs[self.name]

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {self.name: self.spec}

    def end(self, name: str) -> int:
        return self.target.end(name)

    def read(self, name: str) -> Tensor:
        return read_whole(self, name)

    def read_span(self, name: str, start: int, into_N: Tensor) -> None:
        """Fill `into_N` with the elements from `start` on; neighbouring rows are read together."""
        self.base.read_span(name, start, into_N)
        width = self.spec.num_elements // len(self.rows_V)
        first, last = start // width, -(-(start + len(into_N)) // width)
        rows = self.rows_V[first:last]
        edges = np.flatnonzero((np.diff(rows) != 1) | (rows[1:] < 0) | (rows[:-1] < 0)) + 1
        for run in np.split(np.arange(first, last), edges):
            row = int(self.rows_V[run[0]])
            if row < 0:
                continue
            begin = max(int(run[0]) * width, start)
            stop = min((int(run[-1]) + 1) * width, start + len(into_N))
            skipped = begin - int(run[0]) * width
            self.target.read_span(name, row * width + skipped, into_N[begin - start : stop - start])


class _Token(NamedTuple):
    kind: str
    literal: bytes


def in_vocabulary_of(base: Checkpoint, target: Checkpoint) -> Checkpoint:
    """The target with the base's tokens alone, matched through the tokenisers in both folders.

    Raises:
        UserError: a folder without tokeniser or `vocab_size`.
    """
    sizes = [_vocabulary_size(checkpoint) for checkpoint in (base, target)]
    tables = [_table(checkpoint.folder) for checkpoint in (base, target)]
    rows_V = matching_rows(tables[0], tables[1], sizes[0], sizes[1])
    known = np.flatnonzero(rows_V >= 0)
    log.info("%s: has %d of the base's %d tokens", target.folder, len(known), len(_ids_of(tables[0], sizes[0])))
    if sizes[0] == sizes[1] and tables[0].fingerprint == tables[1].fingerprint:
        return target
    homes = {
        name: MatchedRows(base.homes[name], home, name, rows_V) if _is_matched(name, base, target, sizes) else home
        for name, home in target.homes.items()
    }
    return replace(target, homes=homes)


def matching_rows(base: TokenBytes, target: TokenBytes, num_rows: int, num_target_rows: int) -> np.ndarray:
    """The target's row for each of the base's `num_rows`, int64 [V]; -1 where it has none.

    Of several tokens with the same bytes the first belongs to the first, the second to the second. A piece of one
    byte and a byte piece (`<0xNN>`) stand for each other where a tokeniser has only one of them.
    """
    rows_V = np.full(num_rows, -1, dtype=np.int64)
    others: dict[_Token, list[int]] = defaultdict(list)
    for row, token in _ids_of(target, num_target_rows).items():
        others[token].append(row)
    seen: dict[_Token, int] = defaultdict(int)
    for row, token in _ids_of(base, num_rows).items():
        twin = {PIECE: BYTE, BYTE: PIECE}.get(token.kind, token.kind)
        found = others.get(token) or others.get(_Token(twin, token.literal))
        if found:
            place = seen[token]
            rows_V[row] = found[place] if place < len(found) else found[0]
            seen[token] += 1
    return rows_V


def _ids_of(table: TokenBytes, num_rows: int) -> dict[int, _Token]:
    """What stands at every id that names a token and has a row."""
    special = set(table.special.tolist())
    found = {}
    for token in range(min(len(table), num_rows)):
        literal = table.literal(token)
        if literal:
            kind = SPECIAL if token in special else BYTE if token in table.byte_pieces else PIECE
            found[token] = _Token(kind, literal)
    return found


def _is_matched(name: str, base: Checkpoint, target: Checkpoint, sizes: list[int]) -> bool:
    """Whether a tensor has a row for each token, in both models."""
    if name not in base.homes or LAYER.match(name) or POSITIONS.search(name):
        return False
    mine, wanted = target.homes[name].specs[name], base.homes[name].specs[name]
    is_table = len(wanted.shape) == 2 or (len(wanted.shape) == 1 and name.endswith("bias"))
    fits = mine.dtype == wanted.dtype and mine.shape[1:] == wanted.shape[1:]
    return is_table and fits and [wanted.shape[0], mine.shape[0]] == sizes


def _vocabulary_size(checkpoint: Checkpoint) -> int:
    text = checkpoint.config.get("text_config")
    size = checkpoint.config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    if not isinstance(size, int):
        raise UserError(f"{checkpoint.folder}: config.json has no vocab_size, which vocabulary={BASE} needs")
    return size


def _table(folder: Path) -> TokenBytes:
    return token_bytes(load_tokenizer(ModelConfig(name=folder.name, path=str(folder))))


def vocabulary_problems(vocabulary: str, has_base: bool, is_measured: bool = False) -> list[str]:
    """What is wrong with the setting; `is_measured`: the method weighs by what dialogues showed of the targets."""
    if vocabulary not in (ERROR, BASE):
        return [f"vocabulary={vocabulary}: choose {ERROR} or {BASE}; unions and intersections are not built"]
    if vocabulary == BASE and not has_base:
        return [f"vocabulary={BASE} needs a base, whose tokens stay: give it (base=FOLDER)"]
    if vocabulary == BASE and is_measured:
        return [
            f"vocabulary={BASE}: evidence is measured in the targets' own tokens, not in the base's: "
            "merge by a method without evidence"
        ]
    return []
