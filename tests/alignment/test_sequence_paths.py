"""Rows side by side by exact bytes or by the published path."""

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_pairs import PAIRS, make_pairs

from fusion.alignment import Rows, build_alignment
from fusion.alignment.pieces import Pieces
from fusion.alignment.rows import inner_rows
from fusion.alignment.statistics import published_path


@pytest.fixture(scope="module")
def pairs(pivot, source):
    return make_pairs(pivot, source)


def build(pair, name, path="dtw"):
    return build_alignment(name, pair.pivot_tokenizer, pair.source_tokenizer, path=path)


def bare(piece, marker):
    return piece.replace(marker, "").removeprefix(" ")


@pytest.mark.parametrize("kind", PAIRS)
@settings(max_examples=30, deadline=None)
@given(turns=st.lists(texts, min_size=1, max_size=2))
def test_the_last_piece_of_the_image_speaks_if_one_ends_the_other(pairs, kind, turns):
    pair = pairs[kind]
    pivot, source = pair.rows(*encode(pair, turns))
    pieces = Pieces(pair.pivot_tokenizer), Pieces(pair.source_tokenizer)
    _, hi = published_path(pair, pivot, source, *pieces)
    rows = build(pair, "ms").align(pivot, source)
    ends = pair.pivot_end_of_turn, pair.source_end_of_turn
    for row, last in enumerate(hi.tolist()):
        ours = bare(pieces[0][int(pivot.read[row])], pair.pivot.space_marker)
        theirs = bare(pieces[1][int(source.read[last])], pair.source.space_marker)
        fits = ours == theirs or (ours and theirs and (ours.endswith(theirs) or theirs.endswith(ours)))
        fits = fits or (pivot.read[row], source.read[last]) == ends
        assert rows[row] == (last if fits else -1)


@pytest.mark.parametrize("kind", PAIRS)
def test_both_paths_agree_on_plain_text(pairs, kind):
    pair = pairs[kind]
    pivot, source = pair.rows(*encode(pair, ["The ratio of poles and wires is 1:3."]))
    exact, published = (build(pair, "ms", path).align(pivot, source) for path in ("bytes", "dtw"))
    assert np.mean(exact[exact >= 0] == published[exact >= 0]) > 0.5
    one_to_one = [build(pair, "em", path).align(pivot, source) for path in ("bytes", "dtw")]
    both = (one_to_one[0] >= 0) & (one_to_one[1] >= 0)
    assert both.sum() >= 2
    assert np.array_equal(one_to_one[0][both], one_to_one[1][both])


@pytest.mark.parametrize("name", ["bpm", "canonical"])
def test_the_published_path_has_no_rows_inside_tokens(pairs, name):
    pair = pairs["pieces<-bytes"]
    rows = pair.rows(*encode(pair, ["The ratio of poles", "calculated"]))
    assert np.array_equal(build(pair, name).align(*rows), build(pair, "ms").align(*rows))
    assert np.sum(build(pair, name, "bytes").align(*rows) >= 0) > np.sum(build(pair, "ms", "bytes").align(*rows) >= 0)


def test_one_to_one_on_the_path_means_equal_pieces_that_stand_alone(pairs):
    pair = pairs["pieces<-bytes"]
    pivot, source = pair.rows(*encode(pair, ["The poles, 1:3", "poles"]))
    ours = [pair.pivot[int(token)] for token in pivot.read]
    theirs = [pair.source[int(token)] for token in source.read]
    assert ours == [b" ", b"Th", b"e", b" ", b"poles", b",", b" ", b"1:", b"3", b"", b" ", b"poles", b""]
    assert theirs == [b"The", b" poles", b",", b" 1", b":", b"3", b"", b"poles", b""]
    em, strict = (build(pair, name).align(pivot, source).tolist() for name in ("em", "strict"))
    assert em == [-1, -1, -1, -1, 1, 2, -1, -1, 5, 6, -1, -1, 8]
    assert strict == [-1, -1, -1, -1, 1, -1, -1, 4, 5, -1, -1, 7, -1]
    em, strict = (build(pair, name, "bytes").align(pivot, source).tolist() for name in ("em", "strict"))
    assert em == [-1, -1, -1, -1, -1, 2, -1, -1, 5, 6, -1, 7, 8]
    assert strict == [-1, -1, -1, -1, 1, -1, -1, 4, 5, -1, 6, 7, -1]


def test_inner_rows_stand_before_the_token_under_way():
    assert inner_rows([0, 1, 2, 3, 4, 6, 9, -1], [0, 0, 2, 5, 5, 8]).tolist() == [-1, 1, -1, 2, 2, 4, -1, -1]
    assert inner_rows([1, 4], [0, -1, 5]).tolist() == [-1, -1]
    assert inner_rows([1], []).tolist() == [-1]


@pytest.mark.parametrize("path", ["bytes", "dtw"])
@pytest.mark.parametrize("name", ["em", "mined", "ms", "strict", "bpm", "canonical", "uld", "random", "alm"])
def test_nothing_aligns_with_nothing(pairs, name, path):
    pair = pairs["pieces<-bytes"]
    alignment = build(pair, name, path)
    nothing = Rows.of([], [])
    pivot = Rows.of([300, 301], [2, 4])
    assert alignment.align(pivot, nothing).tolist() == [-1, -1]
    assert alignment.align(nothing, pivot).tolist() == []
    assert alignment.map_rows([], [], np.zeros((0, 4)), np.zeros((0, 4))).indptr.tolist() == [0]
