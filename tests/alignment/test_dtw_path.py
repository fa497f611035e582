"""The fast path is the published path."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from fusion.alignment import dtw_path
from fusion.alignment.pieces import Pieces

pieces = st.lists(st.text("abĠ▁ 京", max_size=4), min_size=1, max_size=14)


def _cost(source: str, pivot: str) -> int:
    bare = source.replace("Ġ", ""), pivot.replace("▁", "")
    return Levenshtein.distance(*(bare if all(bare) else (source, pivot)))


def _plain_path(source: list[str], pivot: list[str]) -> list[list[int]]:
    """Dynamic time warping as a textbook has it, and the back-trace with the published order of ties."""
    total = np.full((len(pivot) + 1, len(source) + 1), np.inf)
    total[0, 0] = 0
    for i, ours in enumerate(pivot):
        for j, theirs in enumerate(source):
            total[i + 1, j + 1] = _cost(theirs, ours) + min(total[i, j], total[i, j + 1], total[i + 1, j])
    images: list[list[int]] = [[] for _ in pivot]
    i, j = len(pivot), len(source)
    while i and j:
        images[i - 1].insert(0, j - 1)
        steps = [(i - 1, j - 1), (i - 1, j), (i, j - 1)]
        i, j = steps[int(np.argmin([total[step] for step in steps]))]
    return images


@settings(max_examples=300, deadline=None)
@given(source=pieces, pivot=pieces)
def test_equals_the_textbook(source, pivot):
    lo, hi = dtw_path(source, pivot)
    assert lo.dtype == hi.dtype == np.int32
    assert [list(range(a, b + 1)) for a, b in zip(lo, hi, strict=True)] == _plain_path(source, pivot)


@settings(max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False))
def test_equals_the_textbook_on_long_ties(random):
    source, pivot = (random.choices(["a", "b", "ab", "京", "京都", "abc"], k=80) for _ in range(2))
    lo, hi = dtw_path(source, pivot)
    assert [list(range(a, b + 1)) for a, b in zip(lo, hi, strict=True)] == _plain_path(source, pivot)


@settings(max_examples=15, deadline=None)
@given(random=st.randoms(use_true_random=False), ahead=st.integers(0, 120), cut=st.integers(0, 60))
def test_equals_the_textbook_far_from_the_diagonal(random, ahead, cut):
    """One side says much that the other does not: the first bound comes from a poor path."""
    words = random.choices(["the", "Ġthe", "▁the", "x", "京都", "abcdefgh", "1", " "], k=150)
    source, pivot = ["qq"] * ahead + words, words[cut:] + ["zzz"] * random.randrange(1, 90)
    lo, hi = dtw_path(source, pivot)
    assert [list(range(a, b + 1)) for a, b in zip(lo, hi, strict=True)] == _plain_path(source, pivot)


def test_one_piece_against_many():
    assert [ends.tolist() for ends in dtw_path(["a"], ["a"] * 300)] == [[0] * 300] * 2
    assert [ends.tolist() for ends in dtw_path(["a"] * 300, ["a"])] == [[0], [299]]
    assert [ends.tolist() for ends in dtw_path(["b"] * 300, ["a", "b"])] == [[0, 1], [0, 299]]


def test_every_golden_path(golden, real_pair):
    pivot_pieces, source_pieces = map(Pieces, real_pair)
    assert len(golden["dialogues"]) == 36
    for dialogue in golden["dialogues"]:
        lo, hi = dtw_path(source_pieces(dialogue["source_ids"]), pivot_pieces(dialogue["pivot_ids"]))
        assert [list(range(a, b + 1)) for a, b in zip(lo, hi, strict=True)] == dialogue["path"]


def test_empty_sides():
    lo, hi = dtw_path([], [])
    assert len(lo) == len(hi) == 0
    with pytest.raises(ValueError, match="both sides"):
        dtw_path(["a"], [])
