"""The compiled walk over token bytes is the simple one: byte strings cut, compared and counted with Python's own."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.dialogues.token_bytes import TokenBytes
from fusion.dialogues.token_spelling import EVERY_SEGMENT, FIRST_SEGMENT, NOWHERE

WHITE_SPACE = b" \t\n\r\x0b\x0c"
PIECES = [
    b"a",
    b" a",
    b"ab",
    b" ",
    b"  ",
    b"\n",
    b"\xc3",
    b"\xa9",
    b"",
    b"b\n",
    b"<s>",
    b"<e>",
    b"<l>",
    b"<r>",
    b"12345678",
    b"abababa",
    b"ab ab ab ab ab ab",
]
SPECIAL = [10, 11, 12, 13]
SWALLOWS = {11: (True, True), 12: (True, False), 13: (False, True)}

ids = st.lists(st.integers(0, len(PIECES) - 1), max_size=14)
places = st.sampled_from([NOWHERE, FIRST_SEGMENT, EVERY_SEGMENT])


def _table(dummy_prefix: str) -> TokenBytes:
    width = np.array([len(piece) for piece in PIECES])
    offsets = np.concatenate([[0], np.cumsum(width)])
    width[SPECIAL] = 0
    return TokenBytes(
        b"".join(PIECES), offsets, width, np.array(SPECIAL), dummy_prefix=dummy_prefix, swallows=SWALLOWS
    )


def _segments(tokens: list[int]) -> list[list[int]]:
    """Every special token alone, every run between them whole."""
    segments: list[list[int]] = []
    for n, token in enumerate(tokens):
        if n and token not in SPECIAL and tokens[n - 1] not in SPECIAL:
            segments[-1].append(token)
        else:
            segments.append([token])
    return segments


def _plain_contents(tokens: list[int], dummy_prefix: str) -> list[bytes]:
    contents, prefixed = [], {NOWHERE: 0, FIRST_SEGMENT: 1, EVERY_SEGMENT: len(tokens)}[dummy_prefix]
    for segment in _segments(tokens):
        pieces = [b"" if token in SPECIAL else PIECES[token] for token in segment]
        if segment[0] not in SPECIAL and prefixed:
            prefixed -= 1
            pieces[0] = pieces[0].removeprefix(b" ")
        contents += pieces
    return contents


def _plain_text_ends(tokens: list[int], text: bytes) -> list[int] | None:
    ends: list[int] = []
    position = 0
    for segment in _segments(tokens):
        if segment[0] in SPECIAL:
            position = _plain_event_end(segment[0], text, position)
            ends.append(position)
            continue
        said = b"".join(PIECES[token] for token in segment)
        absent = 0 if text.startswith(said, position) else 1
        if absent and not (said.startswith(b" ") and text.startswith(said[1:], position)):
            return None
        ends += (np.cumsum([len(PIECES[token]) for token in segment]) + position - absent).tolist()
        position = ends[-1]
    return ends if position == len(text) else None


def _plain_event_end(token: int, text: bytes, position: int) -> int:
    left, right = SWALLOWS.get(token, (False, False))
    begin = _skip(text, position) if left else position
    if not text.startswith(PIECES[token], begin):
        return position
    end = begin + len(PIECES[token])
    return _skip(text, end) if right else end


def _skip(text: bytes, position: int) -> int:
    while text[position : position + 1] and text[position] in WHITE_SPACE:
        position += 1
    return position


@settings(max_examples=300, deadline=None)
@given(ids, places)
def test_ends_count_the_bytes_that_were_read(tokens, dummy_prefix):
    table, contents = _table(dummy_prefix), _plain_contents(tokens, dummy_prefix)
    ends = table.ends(tokens)
    assert ends.dtype == np.int64
    assert ends.tolist() == np.cumsum([len(content) for content in contents]).tolist()
    assert table.joined(tokens) == b"".join(contents)


@settings(max_examples=600, deadline=None)
@given(ids, places, st.data())
def test_text_ends_are_those_of_the_plain_walk(tokens, dummy_prefix, data):
    table = _table(dummy_prefix)
    spelled = [table.written(tokens), table.joined(tokens), b" " + table.joined(tokens), table.written(tokens)[1:]]
    damaged = data.draw(st.lists(st.sampled_from([*PIECES[:8], *PIECES[9:]]), max_size=6).map(b"".join))
    for text in (*spelled, spelled[0].replace(b"<s>", b""), spelled[0] + b"a", damaged):
        ends, expected = table.text_ends(tokens, text), _plain_text_ends(tokens, text)
        assert (None if ends is None else ends.tolist()) == expected


@pytest.mark.parametrize("kind", [np.int32, np.int64, list])
def test_any_kind_of_integers(kind):
    tokens = [0, 1, 10, 3]
    given_ids = tokens if kind is list else np.array(tokens, dtype=kind)
    assert _table(NOWHERE).ends(given_ids).tolist() == [1, 3, 3, 4]


@pytest.mark.parametrize("token", [-1, len(PIECES)])
def test_ids_outside_of_the_table_are_refused(token):
    with pytest.raises(IndexError, match="outside of the tokeniser's table"):
        _table(NOWHERE).ends([0, token])
    with pytest.raises(IndexError, match="outside of the tokeniser's table"):
        _table(NOWHERE).text_ends([0, token], b"a")
