"""The inner loops of `TokenBytes`, compiled: one step per token, one comparison per byte.

Legend: N tokens of a sequence, V ids of a tokeniser, B bytes of its table, T bytes of a text.
"""

import numpy as np
from numba import njit

ORDINARY, SPECIAL, SWALLOWS_LEFT, SWALLOWS_RIGHT = 0, 1, 2, 4
"""What an id is: a piece of text, or an event with the sides on which it takes white space with it."""

NO_SEGMENT, ONE_SEGMENT, ALL_SEGMENTS = 0, 1, 1 << 62
"""How many segments (runs of tokens between special ones) may start with a dummy prefix."""

WORD = 8


@njit(cache=True, nogil=True)
def _require_known(ids_N: np.ndarray, size: int) -> None:
    """Compiled loops read memory without looking."""
    for token in ids_N:
        if token < 0 or token >= size:
            raise IndexError("a token id is outside of the tokeniser's table")


@njit(cache=True, nogil=True)
def content_ends(
    ids_N: np.ndarray, offsets: np.ndarray, buffer_B: np.ndarray, event_V: np.ndarray, prefixed_segments: int
) -> np.ndarray:
    """int64 [N]: bytes read once each token is read; the dummy prefix of the first segments has no width."""
    _require_known(ids_N, len(event_V))
    ends_N, position, starts_segment = np.empty(len(ids_N), dtype=np.int64), 0, True
    for n in range(len(ids_N)):
        token = ids_N[n]
        if event_V[token]:
            starts_segment = True
        else:
            start = offsets[token]
            width = offsets[token + 1] - start
            if starts_segment and prefixed_segments > 0:
                prefixed_segments -= 1
                if width > 0 and buffer_B[start] == 0x20:
                    width -= 1
            position += width
            starts_segment = False
        ends_N[n] = position
    return ends_N


@njit(cache=True, nogil=True)
def spelled_ends(
    ids_N: np.ndarray, offsets: np.ndarray, buffer_B: np.ndarray, event_V: np.ndarray, text_T: np.ndarray
) -> tuple[np.ndarray, bool]:
    """int64 [N]: bytes of the text read once each token is read, and whether the tokens spell the whole text."""
    _require_known(ids_N, len(event_V))
    ends_N, position, start = np.empty(len(ids_N), dtype=np.int64), 0, 0
    while start < len(ids_N):
        event = event_V[ids_N[start]]
        if event:
            position = _event_end(ids_N[start], event, position, offsets, buffer_B, text_T)
            ends_N[start] = position
            start += 1
        else:
            stop = _segment_ends(ids_N, start, position, 0, offsets, buffer_B, event_V, text_T, ends_N)
            if stop < 0:
                stop = _segment_ends(ids_N, start, position, 1, offsets, buffer_B, event_V, text_T, ends_N)
            if stop < 0:
                return ends_N, False
            position, start = ends_N[stop - 1], stop
    return ends_N, position == len(text_T)


@njit(cache=True, nogil=True)
def _segment_ends(
    ids_N: np.ndarray,
    start: int,
    position: int,
    absent: int,
    offsets: np.ndarray,
    buffer_B: np.ndarray,
    event_V: np.ndarray,
    text_T: np.ndarray,
    ends_N: np.ndarray,
) -> int:
    """Where the segment that begins at `start` stops, or -1 if it does not spell the text from `position` on.

    `absent` first bytes of the segment, which must be a space, are not in the text.
    """
    place, n, missing = position - absent, start, absent
    while n < len(ids_N) and not event_V[ids_N[n]]:
        first, width = offsets[ids_N[n]], offsets[ids_N[n] + 1] - offsets[ids_N[n]]
        if missing and width:
            if buffer_B[first] != 0x20:
                return -1
            first, width, place, missing = first + 1, width - 1, place + 1, 0
        if not _same_bytes(buffer_B, first, text_T, place, width):
            return -1
        place += width
        ends_N[n] = place
        n += 1
    return -1 if missing else n


@njit(cache=True, nogil=True)
def _same_bytes(buffer_B: np.ndarray, first: int, text_T: np.ndarray, place: int, width: int) -> bool:
    """Whether `width` bytes are alike; most tokens are short, and eight bytes are compared at once."""
    if place + width > len(text_T):
        return False
    if 0 < width <= WORD and place + WORD <= len(text_T) and first + WORD <= len(buffer_B):
        difference = _word(buffer_B, np.uint64(first)) ^ _word(text_T, np.uint64(place))
        return difference << np.uint64(8 * (WORD - width)) == 0
    at = 0
    while at < width and buffer_B[first + at] == text_T[place + at]:
        at += 1
    return at == width


@njit(cache=True, nogil=True)
def _word(bytes_B: np.ndarray, first: np.uint64) -> np.uint64:
    """Eight bytes as a number; written out, for the compiler then reads them at once."""
    return (
        np.uint64(bytes_B[first])
        | np.uint64(bytes_B[first + np.uint64(1)]) << np.uint64(8)
        | np.uint64(bytes_B[first + np.uint64(2)]) << np.uint64(16)
        | np.uint64(bytes_B[first + np.uint64(3)]) << np.uint64(24)
        | np.uint64(bytes_B[first + np.uint64(4)]) << np.uint64(32)
        | np.uint64(bytes_B[first + np.uint64(5)]) << np.uint64(40)
        | np.uint64(bytes_B[first + np.uint64(6)]) << np.uint64(48)
        | np.uint64(bytes_B[first + np.uint64(7)]) << np.uint64(56)
    )


@njit(cache=True, nogil=True)
def _event_end(
    token: int, event: int, position: int, offsets: np.ndarray, buffer_B: np.ndarray, text_T: np.ndarray
) -> int:
    begin = _after_white_space(text_T, position) if event & SWALLOWS_LEFT else position
    first, width = offsets[token], offsets[token + 1] - offsets[token]
    if not _same_bytes(buffer_B, first, text_T, begin, width):
        return position
    end = begin + width
    return _after_white_space(text_T, end) if event & SWALLOWS_RIGHT else end


@njit(cache=True, nogil=True)
def _after_white_space(text_T: np.ndarray, position: int) -> int:
    while position < len(text_T) and (text_T[position] == 0x20 or 0x09 <= text_T[position] <= 0x0D):
        position += 1
    return position
