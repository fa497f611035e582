"""What every strategy promises, and what each adds."""

import sys
from itertools import pairwise
from types import ModuleType

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein

from fusion.alignment import MappingStatistics, Rows, boundary_rows, build_alignment
from fusion.config import UserError

NAMES = ("em", "mined", "ms", "ms_released", "strict", "bpm", "canonical", "uld", "random")
DIALOGUES = [["The ratio of poles", "is 1:3."], ["calculated calculation 北京"], ["e\u0301 👍🏽\n\n two"]]


@pytest.fixture(scope="module")
def built(pair):
    tokenizers = pair.pivot_tokenizer, pair.source_tokenizer
    statistics = {path: MappingStatistics(*tokenizers, path) for path in ("bytes", "dtw")}
    for turns in DIALOGUES:
        for counts in statistics.values():
            counts.add(*encode(pair, turns))
    return {
        name: build_alignment(name, *tokenizers, statistics["dtw" if name == "ms_released" else "bytes"])
        for name in NAMES
    }


def _support(source, num_rows, seed, k=5):
    generator = np.random.default_rng(seed)
    ids = np.stack([generator.permutation(len(source) + 20)[:k] for _ in range(max(num_rows, 1))])[:num_rows]
    return ids, -generator.exponential(3.0, size=ids.shape)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(texts, min_size=1, max_size=2), seed=st.integers(0, 99))
def test_rows_are_distributions_of_known_tokens(pair, built, name, turns, seed):
    pivot_ids, source_ids = encode(pair, turns)
    indptr, ids, weights = built[name].map_rows(pivot_ids, source_ids, *_support(pair.source, len(source_ids), seed))
    assert len(indptr) == len(pivot_ids) + 1
    assert indptr[-1] == len(ids) == len(weights)
    assert np.all((ids >= 0) & (ids < len(pair.pivot)))
    for start, stop in pairwise(indptr):
        assert start == stop or weights[start:stop].sum() == pytest.approx(1.0)
        assert len(set(ids[start:stop])) == stop - start


@pytest.mark.parametrize("name", ["em", "mined", "ms"])
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(texts, min_size=1, max_size=2))
def test_rows_join_only_where_both_have_read_the_same(pair, built, name, turns):
    pivot, source = pair.rows(*encode(pair, turns))
    rows, shared = built[name].align(pivot, source), boundary_rows(pivot.ends, source.ends)
    used = rows >= 0
    assert rows.dtype == np.int32
    assert np.all(pivot.ends[used] == source.ends[rows[used]])
    if name == "ms":
        assert np.array_equal(rows, shared)
    if name == "em":
        assert np.all(pivot.starts[used] == source.starts[rows[used]])


def test_ms_maps_only_tokens_that_share_bytes(pair, built):
    targets = built["ms"].targets(np.arange(len(pair.source)))
    assert np.sum(targets >= 0) > np.sum(pair.equal_ids >= 0)
    for token in np.flatnonzero(targets >= 0).tolist():
        assert pair.share_bytes(int(targets[token]), token)


def test_equal_bytes_go_first(pair, built):
    for name in ("em", "mined", "ms"):
        targets = built[name].targets(np.arange(len(pair.source)))
        equal = pair.equal_ids >= 0
        assert np.array_equal(targets[equal], pair.equal_ids[equal])
    for token in np.flatnonzero(pair.equal_ids >= 0).tolist():
        assert pair.source[token] == pair.pivot[int(pair.equal_ids[token])]
    assert pair.equal_ids[pair.source_end_of_turn] == pair.pivot_end_of_turn


def test_ms_sums_masses_that_meet(pair, built):
    targets = built["ms"].targets(np.arange(len(pair.source)))
    meeting, other = _meeting_ids(targets)
    mapped = built["ms"].map_support([[meeting[0], other, meeting[1]]], np.log([[0.5, 0.3, 0.1]]), [0, -1, 0])
    assert mapped.indptr.tolist() == [0, 2, 2, 4]
    assert mapped.ids.tolist() == [targets[meeting[0]], targets[other]] * 2
    assert mapped.weights == pytest.approx([2 / 3, 1 / 3] * 2)


def test_released_keeps_the_first_of_masses_that_meet(pair, built):
    targets = built["ms_released"].targets(np.arange(len(pair.source)))
    meeting, other = _meeting_ids(targets)
    mapped = built["ms_released"].map_support([[meeting[0], other, meeting[1]]], np.log([[0.5, 0.3, 0.1]]), [0])
    assert mapped.weights == pytest.approx([5 / 8, 3 / 8])


def _meeting_ids(targets):
    ids, first, count = np.unique(targets, return_index=True, return_counts=True)
    shared = next(token for token, times in zip(ids, count, strict=True) if token >= 0 and times > 1)
    other = next(place for token, place in zip(ids, first, strict=True) if token >= 0 and token != shared)
    return np.flatnonzero(targets == shared)[:2], other


def test_rows_without_mass_are_empty(pair, built):
    size = len(pair.source)
    dropped = int(np.flatnonzero(pair.equal_ids < 0)[0])
    ids = [[dropped, size + 3], [-1, -1], [0, 1], [0, 1]]
    logs = [[0.0, 0.0], [0.0, 0.0], [-np.inf, -np.inf], [np.nan, np.nan]]
    mapped = built["em"].map_support(ids, logs, [0, 1, 2, 3, -1])
    assert mapped.indptr.tolist() == [0] * 6


def test_far_logits_do_not_vanish(pair, built):
    known, dropped = (int(np.flatnonzero(choice)[-1]) for choice in (pair.equal_ids >= 0, pair.equal_ids < 0))
    mapped = built["em"].map_support([[dropped, known]], [[0.0, -5000.0]], [0])
    assert mapped.weights.tolist() == [1.0]


def test_mined_takes_the_first_nearest_string(pair, built):
    special = set(pair.pivot.special.tolist())
    strings = {
        token: pair.pivot[token].decode("utf-8")
        for token in range(len(pair.pivot))
        if token not in special and token not in pair.pivot.byte_pieces
    }
    wanted = [t for t in np.flatnonzero(pair.equal_ids < 0).tolist() if pair.source[t].isascii() and pair.source[t]]
    targets = built["mined"].targets(np.array(wanted))
    for token, target in zip(wanted, targets.tolist(), strict=True):
        said = pair.source[token].decode()
        assert target == min(strings, key=lambda other: (Levenshtein.distance(said, strings[other]), other))


def test_mined_rows_may_differ_in_their_start(pair, built):
    target = int(built["mined"].targets(np.array([300]))[0])
    pivot, source = Rows.of([target, target + 1], [3, 5]), Rows.of([299, 300, 301], [2, 3, 5])
    assert built["mined"].align(pivot, source)[0] == 1
    assert built["em"].align(pivot, source).tolist() == [-1, 2]


def test_same_vocabulary_is_the_identity(pivot):
    alignment = build_alignment("em", pivot, pivot)
    assert np.array_equal(alignment.targets(np.arange(len(pivot))), np.arange(len(pivot)))
    ids = pivot("The ratio of 北京 poles").input_ids
    assert alignment.align(*alignment.pair.rows(ids, ids)).tolist() == list(range(len(ids)))


def test_given_ends_of_turn_overrule_the_defaults(pair, built):
    alignment = build_alignment("em", pair.pivot_tokenizer, pair.source_tokenizer, pivot_end_of_turn=1)
    assert alignment.targets(np.array([pair.source_end_of_turn])).tolist() == [1]
    assert built["em"].targets(np.array([pair.source_end_of_turn])).tolist() == [pair.pivot_end_of_turn]


def test_unknown_names_and_options_are_named(pair):
    tokenizers = pair.pivot_tokenizer, pair.source_tokenizer
    with pytest.raises(UserError, match="did you mean ms_released"):
        build_alignment("ms_relased", *tokenizers)
    with pytest.raises(UserError, match="there is no such strategy"):
        build_alignment("no.such.module", *tokenizers)
    with pytest.raises(UserError, match="unknown option use_matrx; did you mean use_matrix"):
        build_alignment("ms_released", *tokenizers, use_matrx=False)
    with pytest.raises(UserError, match="needs mapping statistics"):
        build_alignment("ms_released", *tokenizers)
    with pytest.raises(UserError, match="pivot vocabulary"):
        build_alignment("ms", *tokenizers, MappingStatistics(*tokenizers[::-1]))


def test_a_strategy_of_your_own(pair, monkeypatch):
    own = ModuleType("own_package.own_strategy")
    own.__spec__ = sys.modules["fusion.alignment.strategies.em"].__spec__
    own.build = lambda pair, statistics, strength=1: (pair, strength)
    monkeypatch.setitem(sys.modules, "own_package", ModuleType("own_package"))
    monkeypatch.setitem(sys.modules, "own_package.own_strategy", own)
    tokenizers = pair.pivot_tokenizer, pair.source_tokenizer
    assert build_alignment("own_package.own_strategy", *tokenizers, strength=2)[1] == 2


@pytest.mark.parametrize("use_matrix", [True, False])
def test_golden_rows(golden, real_pair, use_matrix):
    statistics = MappingStatistics(*real_pair, path="dtw")
    for dialogue in golden["dialogues"]:
        statistics.add(dialogue["pivot_ids"], dialogue["source_ids"])
    alignment = build_alignment("ms_released", *real_pair, statistics, use_matrix=use_matrix)
    for dialogue in golden["dialogues"]:
        fields = ("pivot_ids", "source_ids", "top_ids", "top_logits")
        indptr, ids, weights = alignment.map_rows(*(dialogue[field] for field in fields))
        released = dialogue["released_matrix" if use_matrix else "released_no_matrix"]
        assert [ids[a:b].tolist() for a, b in pairwise(indptr)] == released["ids"]
        expected = [
            np.exp(np.array(row) - max(row)) / np.exp(np.array(row) - max(row)).sum()
            for row in released["logits"]
            if row
        ]
        assert np.allclose(weights, np.concatenate(expected), atol=1e-9)


def test_real_pair_aligns_and_covers_most_rows(golden, real_pair):
    statistics = MappingStatistics(*real_pair)
    for dialogue in golden["dialogues"]:
        statistics.add(dialogue["pivot_ids"], dialogue["source_ids"])
    alignment = build_alignment("ms", *real_pair, statistics)
    aligned = total = 0
    for dialogue in golden["dialogues"]:
        rows = alignment.align(*alignment.pair.rows(dialogue["pivot_ids"], dialogue["source_ids"]))
        aligned, total = aligned + int((rows >= 0).sum()), total + len(rows)
    assert aligned / total > 0.85
