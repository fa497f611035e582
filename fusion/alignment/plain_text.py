"""A plain text as two tokenisers read it, and what a strategy makes of it, row by row.

The text is read as one turn of an assistant whose end stands behind it. Another end of turn stands before it, so that
there is a row that predicts its first token. Hence row r predicts token r of the text, and the last row the end.
Legend: N tokens of a sequence, R rows of the pivot and S rows of the source that predict a token.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fusion.alignment.alignment import Alignment, Spoken
from fusion.alignment.glyphs import apart, visible
from fusion.alignment.relations import relations
from fusion.alignment.rows import Rows
from fusion.alignment.sequence import BytePath, DtwPath
from fusion.alignment.vocabularies import UNMAPPED
from fusion.dialogues.token_bytes import TokenBytes, offset_ends, token_bytes
from fusion.teaching.store import TeacherRows

if TYPE_CHECKING:
    from fusion.dialogues.template import ChatFormat  # loads transformers, which takes seconds

START = apart("start")
ABSENT_SPACE = apart(visible(b" "))


@dataclass(frozen=True, eq=False)
class Reading:
    """One tokeniser's tokens of the text, between two ends of turn."""

    chat: "ChatFormat"
    content: bytes
    """The text in UTF-8; the end of turn behind it counts as one byte more."""
    ids_N: np.ndarray
    """int64."""
    ends_N: np.ndarray
    """int64: bytes read once each token is read; -1 where no cut is proven."""
    exact: bool
    """False: the tokens do not spell the text, and the ends come from the tokeniser's character offsets."""

    @classmethod
    def of(cls, chat: "ChatFormat", text: str) -> "Reading":
        batch = chat.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, content = np.asarray(batch["input_ids"], dtype=np.int64), text.encode("utf-8")
        ends = token_bytes(chat.tokenizer).text_ends(ids, content)
        exact = ends is not None
        if ends is None:
            ends = _proven_ends(batch["offset_mapping"], text)
        end = [chat.end_of_turn_id]
        return cls(
            chat,
            content,
            np.concatenate([end, ids, end]),
            np.concatenate([[0], ends, [len(content) + 1]]),
            exact,
        )

    def __len__(self) -> int:
        """Tokens of the text, without its end."""
        return len(self.ids_N) - 2

    @property
    def table(self) -> TokenBytes:
        return token_bytes(self.chat.tokenizer)

    @cached_property
    def rows(self) -> Rows:
        return Rows.of(self.ids_N, self.ends_N)

    def adds_space(self, position: int) -> bool:
        """Whether the token at `position` begins with a space that is not in the text."""
        token, start, end = int(self.ids_N[position]), self.ends_N[position - 1], self.ends_N[position]
        known = min(start, end) >= 0 and position > 0
        return bool(known and self.table[token].startswith(b" ") and end - start == self.table.width[token] - 1)

    def special_tokens(self) -> list[str]:
        """Special tokens that the text spells."""
        inner_N = self.ids_N[1:-1]
        found = np.unique(inner_N[np.isin(inner_N, self.table.special)]).tolist()
        return [self.table.literal(token).decode("utf-8", "replace") for token in found]

    def written(self, position: int) -> str:
        """The token at `position` made visible."""
        if position == 0:
            return START
        token = int(self.ids_N[position])
        if self.adds_space(position):
            return ABSENT_SPACE + visible(self.table[token][1:])
        return written_id(self.table, token)


def written_id(table: TokenBytes, token: int) -> str:
    """A token of the vocabulary made visible."""
    return visible(table[token]) if table[token] else apart(visible(table.literal(token)))


def _proven_ends(offsets: list[tuple[int, int]], text: str) -> np.ndarray:
    """int64 [N]: byte ends from character offsets, -1 where these prove no boundary (see `offset_ends`)."""
    bytes_C = np.cumsum([0, *(len(character.encode("utf-8")) for character in text)])
    ends_N = np.maximum.accumulate(np.asarray(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
    return np.where(offset_ends(offsets, text) >= 0, bytes_C[ends_N], -1)


@dataclass(frozen=True)
class PathShares:
    """The published path against exact bytes, in rows; as the alignment's report counts them."""

    known: int
    """Rows to which bytes give a source row."""
    another: int
    """Of these: the path names another row."""
    none: int
    """Of these: the path names none."""
    unknown: int
    """All other rows."""
    unread: int
    """Of these: the path names a row although no row has read the same."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a strategy makes of one text if the source is certain of its own next token everywhere."""

    pivot: Reading
    source: Reading
    alignment: Alignment

    def __len__(self) -> int:
        """Rows of the pivot."""
        return len(self.pivot.ids_N) - 1

    @property
    def text(self) -> str:
        return self.pivot.content.decode("utf-8")

    @cached_property
    def relation_R(self) -> np.ndarray:
        """int8: places in `RELATIONS`."""
        return relations(self.pivot.rows, self.source.rows)[:-1]

    @cached_property
    def spoken(self) -> Spoken:
        """The strategy's targets; each row has one at most, unless the strategy splits masses."""
        reference_S1 = self.source.ids_N[1:, None].astype(np.int32)
        stored_S, nothing_S = np.arange(len(reference_S1)), np.zeros(len(reference_S1), dtype=np.float32)
        certain = TeacherRows(reference_S1, np.zeros(reference_S1.shape, dtype=np.float32), nothing_S, nothing_S)
        return self.alignment.speak(self.pivot.rows, self.source.rows, certain, np.arange(len(self)), stored_S)

    @cached_property
    def speaker_R(self) -> np.ndarray:
        """int64: the source row that speaks for each row, -1 where none does or it predicts nothing."""
        rows_R = self.spoken.rows_R.astype(np.int64)
        return np.where((rows_R >= 0) & (rows_R < len(self.source.ids_N) - 1), rows_R, -1)

    @cached_property
    def target_R(self) -> np.ndarray:
        """int64: what the source's next token becomes (by the kind of the targets), -1 where it is dropped."""
        targets, target_R = self.spoken.targets, np.full(len(self), UNMAPPED, dtype=np.int64)
        order = np.argsort(targets.weights_E, kind="stable")
        target_R[targets.row_of_E[order]] = targets.ids_E[order]
        return target_R

    @cached_property
    def is_reference_R(self) -> np.ndarray:
        """bool: the source's next token becomes the token that the row predicts."""
        return self.target_R == self.pivot.ids_N[1:]

    @cached_property
    def is_related_R(self) -> np.ndarray:
        """bool: the pivot token that the source's becomes begins like it, or like what of it is still to come."""
        return np.array([self._is_related(row) for row in range(len(self))], dtype=bool)

    def _is_related(self, row: int) -> bool:
        speaker, target = int(self.speaker_R[row]), int(self.target_R[row])
        if speaker < 0 or target < 0:
            return False
        pair, said = self.alignment.pair, int(self.source.ids_N[speaker + 1])
        if pair.share_bytes(target, said) or pair.pivot.literal(target) == pair.source.literal(said):
            return True
        lead = b" " if self.pivot.adds_space(row + 1) else b""
        ours, rest = pair.pivot[target].removeprefix(lead), b"".join(self.said_parts(row)[1:])
        return bool(ours and rest) and (ours.startswith(rest) or rest.startswith(ours))

    def said_parts(self, row: int) -> list[bytes]:
        """The text of the speaking row's next token: what the pivot has read of it, and the rest.

        Empty where the row's place is not at, or inside, that token.
        """
        speaker = int(self.speaker_R[row])
        if speaker < 0:
            return []
        place = int(self.pivot.ends_N[row])
        start, end = self.source.ends_N[speaker : speaker + 2].tolist()
        content = self.source.content
        return [content[start:place], content[place:end]] if 0 <= start <= place < end else []

    @cached_property
    def walked_R(self) -> tuple[np.ndarray, np.ndarray]:
        """The source row, or -1, by exact bytes and by the published path; int32 [R] each."""
        both = self.pivot.rows, self.source.rows
        by_bytes, by_path = (path.walk(*both).rows_R[:-1] for path in (BytePath(), DtwPath(self.alignment.pair)))
        return by_bytes, by_path

    @cached_property
    def path_shares(self) -> PathShares:
        by_bytes_R, by_path_R = self.walked_R
        known_R, named_R = by_bytes_R >= 0, by_path_R >= 0
        return PathShares(
            known=int(known_R.sum()),
            another=int((known_R & named_R & (by_path_R != by_bytes_R)).sum()),
            none=int((known_R & ~named_R).sum()),
            unknown=int((~known_R).sum()),
            unread=int((~known_R & named_R).sum()),
        )
