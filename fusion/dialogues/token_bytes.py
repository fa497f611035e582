"""Which bytes of the text each token stands for: the coordinate in which two tokenisers can be compared.

Token strings are not text (byte-level BPE spells bytes as letters, SentencePiece spells a space as a marker) and the
offsets of fast tokenisers are not byte spans, so the table is read from the tokeniser's own JSON.
Legend: N tokens of a sequence, V ids of a tokeniser (special tokens and holes included).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import ArrayLike

from fusion.dialogues.byte_walk import (
    ALL_SEGMENTS,
    NO_SEGMENT,
    ONE_SEGMENT,
    ORDINARY,
    SPECIAL,
    SWALLOWS_LEFT,
    SWALLOWS_RIGHT,
    content_ends,
    spelled_ends,
)
from fusion.dialogues.token_spelling import (
    EVERY_SEGMENT,
    FIRST_SEGMENT,
    NOWHERE,
    SPACE,
    Spelling,
    byte_letters,
    read_spelling,
)

PREFIXED_SEGMENTS = {NOWHERE: NO_SEGMENT, FIRST_SEGMENT: ONE_SEGMENT, EVERY_SEGMENT: ALL_SEGMENTS}


@dataclass(frozen=True, eq=False, repr=False)
class TokenBytes:
    """Table id -> bytes of one tokeniser; special tokens are events: no width, their literal text kept apart."""

    buffer: bytes
    """The literal bytes of all ids, one after the other."""
    offsets: np.ndarray
    """int64 [V + 1]: id `i` is `buffer[offsets[i]:offsets[i + 1]]`."""
    width: np.ndarray
    """int64 [V]: bytes of content that an id stands for; 0 for special tokens and for ids that name no token."""
    special: np.ndarray
    """int64, ascending: the ids of special tokens."""
    byte_pieces: frozenset[int] = frozenset()
    """Ids that spell one byte because no other piece does (`<0xNN>`)."""
    space_marker: str = " "
    """How this tokeniser's token strings write a space."""
    dummy_prefix: str = NOWHERE
    """Where the tokeniser puts a space that is not in the text: nowhere, or before the first or every segment (run of
    tokens between special tokens)."""
    swallows: Mapping[int, tuple[bool, bool]] = field(default_factory=dict)
    """Special ids that take the white space on their (left, right) with them."""

    def __len__(self) -> int:
        return len(self.width)

    def __getitem__(self, token: int) -> bytes:
        """Content of one id; empty for special tokens, holes, and rows that a model has beyond its tokeniser."""
        known = 0 <= token < len(self.width) and self.width[token]
        return self.literal(token) if known else b""

    def literal(self, token: int) -> bytes:
        """Bytes of one id as they are written, special tokens included."""
        return self.buffer[self.offsets[token] : self.offsets[token + 1]]

    def ends(self, ids: ArrayLike) -> np.ndarray:
        """int64 [N]: bytes of content read once each token of a whole sequence is read.

        Special tokens add none, nor does a space where the tokeniser puts its dummy prefix. Some tokenisers read a
        text with and without a first space alike; where the text is at hand, `text_ends` knows which it is.
        """
        ids_N = np.asarray(ids, dtype=np.int64)
        return content_ends(ids_N, self.offsets, self._buffer_B, self._event_V, PREFIXED_SEGMENTS[self.dummy_prefix])

    def joined(self, ids: ArrayLike) -> bytes:
        """The content bytes of a whole sequence, as long as the last of `ends`."""
        ids_N = np.asarray(ids, dtype=np.int64)
        read_N = np.diff(self.ends(ids_N), prepend=0)
        return self._gather(self.offsets[ids_N + 1] - read_N, read_N)

    def written(self, ids: ArrayLike) -> bytes:
        """The literal bytes of any ids one after the other, special tokens and dummy prefixes spelled out."""
        ids_N = np.asarray(ids, dtype=np.int64)
        return self._gather(self.offsets[ids_N], self.offsets[ids_N + 1] - self.offsets[ids_N])

    def _gather(self, starts_N: np.ndarray, widths_N: np.ndarray) -> bytes:
        shift_N = starts_N - (np.cumsum(widths_N) - widths_N)
        return self._buffer_B[np.repeat(shift_N, widths_N) + np.arange(widths_N.sum())].tobytes()

    @cached_property
    def _buffer_B(self) -> np.ndarray:
        return np.frombuffer(self.buffer, dtype=np.uint8)

    @cached_property
    def _event_V(self) -> np.ndarray:
        """uint8 [V]: what every id is to the byte walk."""
        event_V = np.full(len(self.width), ORDINARY, dtype=np.uint8)
        event_V[self.special] = SPECIAL
        for token, (left, right) in self.swallows.items():
            event_V[token] |= SWALLOWS_LEFT * left | SWALLOWS_RIGHT * right
        return event_V

    def text_ends(self, ids: ArrayLike, text: bytes) -> np.ndarray | None:
        """int64 [N]: bytes of `text` (UTF-8) read once each token is read; None if the tokens do not spell `text`.

        Special tokens that stand in the text have the width of their literal, added ones (BOS, EOS) none. A space
        that is not in the text but starts a segment between special tokens (the dummy prefix) has no width.
        """
        ids_N, text_T = np.asarray(ids, dtype=np.int64), np.frombuffer(text, dtype=np.uint8)
        ends_N, spelled = spelled_ends(ids_N, self.offsets, self._buffer_B, self._event_V, text_T)
        return ends_N if spelled else None

    @cached_property
    def id_of(self) -> dict[bytes, int]:
        """Content bytes -> the first id in order that spells them: the map between vocabularies by equality.

        A byte piece stands back behind any other piece (`A` is written as `A`, never as `<0x41>`).
        """
        content = np.flatnonzero(self.width)[::-1].tolist()
        last_wins = sorted(content, key=self.byte_pieces.__contains__, reverse=True)
        bounds = self.offsets.tolist()
        return {self.buffer[bounds[token] : bounds[token + 1]]: token for token in last_wins}

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of the table's content: equal tables read equal ids as equal bytes."""
        digest = hashlib.sha256(self.buffer)
        for numbers in (self.offsets, self.width, self.special, sorted(self.byte_pieces)):
            digest.update(np.asarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]


_TABLES: "WeakKeyDictionary[Any, tuple[int, TokenBytes]]" = WeakKeyDictionary()


def token_bytes(tokenizer: Any) -> TokenBytes:
    """The byte table of a Hugging Face fast tokeniser (byte-level BPE or SentencePiece-like), built once per object.

    Raises `UserError` for tokenisers whose tokens are not pieces of the text's bytes (WordPiece and the like).
    """
    size, table = _TABLES.get(tokenizer, (-1, None))
    if table is None or size != len(tokenizer):
        table = _table(read_spelling(tokenizer))
        _TABLES[tokenizer] = len(tokenizer), table
    return table


def offset_ends(offsets: Sequence[tuple[int, int]], text: str) -> np.ndarray:
    """int64 [N]: byte ends from a fast tokeniser's character offsets, -1 where they do not prove a boundary.

    The second choice, for normalisers that rewrite the text (`text_ends` gives None). A boundary after token t is
    proven when no earlier token ends behind, and no later token begins before, the place where the next token begins;
    the last one when the text ends with it. Tokens of no width (BOS, EOS) prove and disprove nothing.
    """
    spans_N2 = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
    bytes_C = np.cumsum([0, *(len(character.encode("utf-8")) for character in text)])
    empty_N = spans_N2[:, 0] == spans_N2[:, 1]
    starts_N = np.append(np.where(empty_N, len(text), spans_N2[:, 0]), len(text))
    next_N = np.minimum.accumulate(starts_N[::-1])[::-1][1:]
    read_N = np.maximum.accumulate(np.where(empty_N, 0, spans_N2[:, 1]))
    proven_N = (read_N == next_N) | ((read_N < next_N) & (next_N < len(text)))
    return np.where(proven_N, bytes_C[next_N], -1)


def _table(spelling: Spelling) -> TokenBytes:
    literals, events, byte_pieces, kind = spelling
    literal_width = np.fromiter(map(len, literals), dtype=np.int64, count=len(literals))
    special = np.array(sorted(event["id"] for event in events), dtype=np.int64)
    width = literal_width.copy()
    width[special] = 0
    swallows = {event["id"]: (event["lstrip"], event["rstrip"]) for event in events}
    return TokenBytes(
        buffer=b"".join(literals),
        offsets=np.concatenate([[0], np.cumsum(literal_width)]),
        width=width,
        special=special,
        byte_pieces=byte_pieces,
        space_marker=kind.marker or byte_letters()[SPACE],
        dummy_prefix=kind.dummy_prefix,
        swallows={token: sides for token, sides in swallows.items() if any(sides)},
    )
