"""The nearest string is the first of the nearest ones, however it is found."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from tokenizer_pairs import SHARED

from fusion.alignment import build_alignment
from fusion.alignment.nearest import NearestStrings
from fusion.alignment.strategies.mined import token_strings

few_letters = st.text("ab", max_size=7)
mixed = st.text("abcAB ▁é京👍", max_size=12)
long_ones = st.text("ab", min_size=50, max_size=140) | few_letters


def _brute_force(strings: list[str], queries: list[str]) -> list[int]:
    return cdist(queries, strings, scorer=Levenshtein.distance, dtype=np.int32).argmin(axis=1).tolist()


@settings(max_examples=300, deadline=None)
@given(st.lists(few_letters, min_size=1, max_size=30), st.lists(few_letters, min_size=1, max_size=10))
@example(strings=["", "", "a"], queries=["", "b", "a"])
@example(strings=["abab", "baba", "a", "b"], queries=["abba", "c", "cc"])
def test_first_of_the_nearest_of_alike_strings(strings, queries):
    assert NearestStrings(strings).nearest(queries).tolist() == _brute_force(strings, queries)


@settings(max_examples=200, deadline=None)
@given(st.lists(mixed, min_size=1, max_size=40), st.lists(mixed | st.text(max_size=6), min_size=1, max_size=10))
def test_first_of_the_nearest_of_many_letters(strings, queries):
    assert NearestStrings(strings).nearest(queries).tolist() == _brute_force(strings, queries)


@settings(max_examples=100, deadline=None)
@given(st.lists(long_ones, min_size=1, max_size=8), st.lists(long_ones, min_size=1, max_size=4))
@example(strings=["a" * 64, "a" * 65, "a" * 63 + "b"], queries=["a" * 64, "b" * 64, "a" * 66, "a" * 128])
def test_strings_longer_than_a_machine_word(strings, queries):
    assert NearestStrings(strings).nearest(queries).tolist() == _brute_force(strings, queries)


def test_more_kinds_of_letters_than_a_signature_has_bits():
    generator = np.random.default_rng(0)
    letters = [chr(0x4E00 + code) for code in range(300)] + list("abcdefgh")
    strings, queries = (
        ["".join(generator.choice(letters, size=size)) for size in generator.integers(1, 9, size=many)]
        for many in (500, 200)
    )
    assert NearestStrings(strings).nearest(queries).tolist() == _brute_force(strings, queries)


def test_no_strings():
    with pytest.raises(ValueError, match="among none"):
        NearestStrings([])
    assert NearestStrings(["a"]).nearest([]).tolist() == []


def test_the_whole_map_is_what_single_tokens_get(pair):
    whole, single = (build_alignment("mined", pair.pivot_tokenizer, pair.source_tokenizer) for _ in range(2))
    ids = np.arange(len(pair.source))
    target_V = whole.targets(ids)
    generator = np.random.default_rng(0)
    parts = [single.targets(part) for part in np.array_split(generator.permutation(ids), 50)]
    assert np.concatenate(parts).tolist() == target_V[np.random.default_rng(0).permutation(ids)].tolist()
    assert np.all(target_V[pair.source.width > 0] >= 0)
    assert whole.targets(ids[:14].reshape(2, 7)).tolist() == target_V[:14].reshape(2, 7).tolist()


def test_real_tokens_against_brute_force(real_pair):
    assert SHARED.is_dir()
    alignment = build_alignment("mined", *real_pair)
    pair = alignment.pair
    sought = np.flatnonzero((pair.equal_ids < 0) & (pair.source.width > 0))
    sample = np.random.default_rng(1).permutation(sought)[:2000]
    table, strings = pair.pivot, token_strings(pair.pivot, pair.pivot_tokenizer)
    near = [token for token in range(len(table)) if table.width[token] and token not in table.byte_pieces]
    source_strings = token_strings(pair.source, pair.source_tokenizer)
    targets = alignment.targets(sample)
    for start in range(0, len(sample), 250):
        part = sample[start : start + 250]
        first = _brute_force([strings[token] for token in near], [source_strings[token] for token in part.tolist()])
        assert targets[start : start + 250].tolist() == [near[place] for place in first]
