"""Which rows of several models' embeddings and heads belong together: those whose tokens do.

Special tokens belong together by their text, others by the bytes that they stand for.
Shapes: I inputs, the base (or, without one, the first target) first; V rows of the merged model.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fusion.dialogues.token_bytes import TokenBytes

ERROR, BASE, UNION, INTERSECT = VOCABULARIES = ("error", "base", "union", "intersect")
CHOOSE = "choose vocabulary=base (the base's tokens alone), union (the targets' too) or intersect (common ones)"
SPECIAL, PIECE, BYTE = "special", "piece", "byte"
TWINS = {PIECE: BYTE, BYTE: PIECE}
NONE = -1


class Token(NamedTuple):
    kind: str
    literal: bytes

    @property
    def names(self) -> "tuple[Token, Token]":
        """What it goes by: a piece of one byte and a byte piece (`<0xNN>`) stand for each other."""
        return self, Token(TWINS.get(self.kind, self.kind), self.literal)


Tokens = Mapping[int, Token]
"""What stands at every id that names a token and has a row."""


class NewToken(NamedTuple):
    """A token that the first input lacks."""

    row: int
    """Of the merged model."""
    source: int
    """The first input that has it."""
    own_row: int


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The rows of the merged model."""

    rows_IV: np.ndarray
    """int64: each input's own row for each merged one; -1 where it has none."""
    new: tuple[NewToken, ...] = ()
    kept: tuple[int, ...] | None = None
    """The first input's rows that are left, in order; None: all of them."""

    @property
    def size(self) -> int:
        return self.rows_IV.shape[1]

    @property
    def new_ids(self) -> dict[int, int]:
        """Row of the first input -> merged row, of those that are left."""
        kept = range(self.size) if self.kept is None else self.kept
        return {row: place for place, row in enumerate(kept)}


def match(mode: str, tables: Sequence[TokenBytes], sizes: Sequence[int]) -> Vocabulary:
    """Match the rows of inputs with so many rows (`sizes`) by the tables of their tokenisers.

    - base: the first input's rows, in its order.
    - union: the same, then, behind its last token, those of the others that it lacks, by inputs and ids.
    - intersect: the first input's rows, in its order, of tokens that all have, and of its special tokens.
    """
    first, *others = (tokens_of(table, size) for table, size in zip(tables, sizes, strict=True))
    own_V = np.arange(sizes[0])
    like_first = [table.fingerprint == tables[0].fingerprint for table in tables[1:]]
    same = [alike and size == sizes[0] for alike, size in zip(like_first, sizes[1:], strict=True)]

    def rows_IV(wanted: Tokens, own_V: np.ndarray) -> np.ndarray:
        found = [own_V if same[i] else rows_of(wanted, other, len(own_V)) for i, other in enumerate(others)]
        return np.stack([own_V, *found])

    if mode == INTERSECT:
        found_IV = rows_IV(first, own_V)
        kept = [r for r, one in first.items() if one.kind == SPECIAL or bool((found_IV[:, r] != NONE).all())]
        return Vocabulary(found_IV[:, kept], kept=tuple(kept))
    new = _new_tokens(first, others, len(tables[0])) if mode == UNION else []
    merged = {**first, **{one.row: others[one.source - 1][one.own_row] for one in new}}
    own_V = np.pad(own_V, (0, max([0, *(one.row + 1 - sizes[0] for one in new)])), constant_values=NONE)
    own_V[[one.row for one in new]] = NONE
    return Vocabulary(rows_IV(merged, own_V), tuple(new))


def tokens_of(table: TokenBytes, num_rows: int) -> dict[int, Token]:
    special = set(table.special.tolist())
    found = {}
    for token in range(min(len(table), num_rows)):
        literal = table.literal(token)
        if literal:
            kind = SPECIAL if token in special else BYTE if token in table.byte_pieces else PIECE
            found[token] = Token(kind, literal)
    return found


def rows_of(wanted: Tokens, own: Tokens, num_rows: int) -> np.ndarray:
    """The row of `own` for each of `num_rows` rows of the `wanted` tokens, int64 [V]; -1 where it has none.

    Of several tokens with the same bytes the first belongs to the first, the second to the second.
    """
    rows_V = np.full(num_rows, NONE, dtype=np.int64)
    places: dict[Token, list[int]] = defaultdict(list)
    for row, token in own.items():
        places[token].append(row)
    seen: dict[Token, int] = defaultdict(int)
    for row, token in wanted.items():
        found = next((places[name] for name in token.names if name in places), None)
        if found:
            rows_V[row] = found[seen[token] if seen[token] < len(found) else 0]
            seen[token] += 1
    return rows_V


def _new_tokens(first: Tokens, others: Sequence[Tokens], first_free: int) -> list[NewToken]:
    known = {name for token in first.values() for name in token.names}
    new: list[NewToken] = []
    for source, own in enumerate(others, start=1):
        for row, token in own.items():
            if token not in known:
                known |= set(token.names)
                new.append(NewToken(first_free + len(new), source, row))
    return new


def vocabulary_problems(vocabulary: str, has_base: bool, is_measured: bool = False) -> list[str]:
    """What is wrong with the setting; `is_measured`: the method weighs by what dialogues showed of the targets."""
    if vocabulary not in VOCABULARIES:
        return [f"vocabulary={vocabulary}: choose one of {', '.join(VOCABULARIES)}"]
    if vocabulary == BASE and not has_base:
        return [f"vocabulary={BASE} needs a base, whose tokens stay: give it (base=FOLDER)"]
    if vocabulary != ERROR and is_measured:
        return [
            f"vocabulary={vocabulary}: evidence is measured in the targets' own tokens, not in the merged model's: "
            "merge by a method without evidence"
        ]
    return []
