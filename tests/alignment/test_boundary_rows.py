"""Rows are joined exactly where both models have read the same bytes."""

import numpy as np
from dialogue_texts import encode, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment import Rows, boundary_rows, token_bytes
from fusion.alignment.sequence import BytePath

ends = st.lists(st.integers(0, 4), max_size=12).map(np.cumsum)


@given(ends, ends)
def test_last_equal_end(pivot_ends, source_ends):
    rows = boundary_rows(pivot_ends, source_ends)
    expected = [max((j for j, end in enumerate(source_ends) if end == e), default=-1) for e in pivot_ends]
    assert rows.dtype == np.int32
    assert rows.tolist() == expected


@given(ends, ends, st.randoms(use_true_random=False))
def test_unknown_ends_never_align(pivot_ends, source_ends, random):
    hidden = [end if random.random() < 0.6 else -1 for end in source_ends]
    rows = boundary_rows([-1, *pivot_ends], hidden)
    assert rows[0] == -1
    expected = [max((j for j, end in enumerate(hidden) if end == e), default=-1) for e in pivot_ends]
    assert rows[1:].tolist() == expected


def _searched(pivot_ends, source_ends):
    """The same by binary search, in whole arrays."""
    pivot_R, source_S = np.asarray(pivot_ends, dtype=np.int64), np.asarray(source_ends, dtype=np.int64)
    known = np.flatnonzero(source_S >= 0)
    if not known.size:
        return np.full(len(pivot_R), -1)
    last = np.searchsorted(source_S[known], pivot_R, side="right") - 1
    return np.where((last >= 0) & (source_S[known[last]] == pivot_R), known[last], -1)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 3), max_size=60).map(np.cumsum), st.lists(st.integers(0, 3), max_size=60), st.data())
def test_equals_the_binary_search_with_unknown_places(pivot_ends, source_steps, data):
    source_ends = np.cumsum(np.array(source_steps, dtype=np.int64))
    hidden = [data.draw(st.lists(st.booleans(), min_size=len(e), max_size=len(e))) for e in (pivot_ends, source_ends)]
    sides = [
        np.where(np.array(gone, dtype=bool), -1, ends)
        for gone, ends in zip(hidden, (pivot_ends, source_ends), strict=True)
    ]
    assert boundary_rows(*sides).tolist() == _searched(*sides).tolist()


@settings(max_examples=200, deadline=None)
@given(turns=st.lists(texts, min_size=1, max_size=3))
def test_aligned_rows_have_read_the_same_text(pair, turns):
    pivot_ids, source_ids = encode(pair, turns)
    pivot, source = pair.rows(pivot_ids, source_ids)
    rows = boundary_rows(pivot.ends, source.ends)
    said = [
        _prefixes(pair.pivot, pivot_ids, pair.pivot_end_of_turn),
        _prefixes(pair.source, source_ids, pair.source_end_of_turn),
    ]
    for t, row in enumerate(rows.tolist()):
        twins = [j for j, text in enumerate(said[1]) if _same(said[0][t], text)]
        assert row == max(twins, default=-1)


def _prefixes(table, ids, end_of_turn):
    """What was read at each row, as turns of bytes."""
    read, turns = [], [b""]
    for token in ids:
        turns = [*turns, b""] if token == end_of_turn else [*turns[:-1], turns[-1] + table[token]]
        read.append(turns)
    return read


def _same(pivot, source):
    """Equal turns, but for the pivot's dummy prefix (this test's pivot always writes one where a turn has text)."""
    bare = [turn[1:] for turn in pivot[:-1]] + [pivot[-1][1:]]
    return bare == source


def test_end_of_turn_is_an_event(pair):
    pivot_ids, source_ids = encode(pair, ["The ratio", "of poles"])
    pivot, source = pair.rows(pivot_ids, source_ids)
    rows = boundary_rows(pivot.ends, source.ends)
    for t in np.flatnonzero(pivot.next == pair.pivot_end_of_turn):
        assert source.next[rows[t]] == pair.source_end_of_turn
    for t in np.flatnonzero(pivot.read == pair.pivot_end_of_turn):
        assert source.read[rows[t]] == pair.source_end_of_turn


def test_other_text_does_not_align(pair):
    pivot_ids, source_ids = encode(pair, ["The ratio", "of poles"])
    pivot, source = pair.rows(pivot_ids, encode(pair, ["The ratio", "of wires"])[1])
    first_turn = int(np.flatnonzero(pivot.read == pair.pivot_end_of_turn)[0])
    rows = boundary_rows(pivot.ends, source.ends)
    assert rows[first_turn] >= 0
    assert np.all(rows[first_turn + 1 :] == -1)
    assert np.all(boundary_rows(*(side.ends for side in pair.rows(pivot_ids, source_ids[3:]))) == -1)


def test_one_to_one_needs_the_same_start():
    pivot = Rows.of([1, 2, 3, 4], [2, 4, 6, 8])
    source = Rows.of([5, 6, 7, 8, 9], [2, 3, 4, 6, 8])
    assert boundary_rows(pivot.ends, source.ends).tolist() == [0, 2, 3, 4]
    assert BytePath().walk(pivot, source).is_same_R.tolist() == [True, False, True, True]


def test_chosen_rows_know_their_neighbours():
    rows = Rows.of([7, 8, 9], [1, 3, 6], rows=[1, 2])
    assert (rows.starts.tolist(), rows.ends.tolist()) == ([1, 3], [3, 6])
    assert (rows.read.tolist(), rows.next.tolist()) == ([8, 9], [9, -1])


def test_empty_sequences(pair):
    pivot, source = pair.rows([], [])
    assert len(pivot) == len(source) == 0
    assert boundary_rows(pivot.ends, source.ends).tolist() == []
    assert boundary_rows([1, 2], []).tolist() == [-1, -1]


def test_tables_alone_are_enough_for_plain_texts(golden, real_pair):
    tables = [token_bytes(tokenizer) for tokenizer in real_pair]
    for dialogue in golden["dialogues"]:
        text = dialogue["text"].encode()
        ids = [tokenizer(dialogue["text"]).input_ids for tokenizer in real_pair]
        ends = [table.ends(side) for table, side in zip(tables, ids, strict=True)]
        assert [table.joined(side) for table, side in zip(tables, ids, strict=True)] == [text, text]
        rows = boundary_rows(*ends)
        shared = set(ends[0].tolist()) & set(ends[1].tolist())
        assert [row >= 0 for row in rows] == [end in shared for end in ends[0].tolist()]
        assert np.mean(rows >= 0) > 0.85
