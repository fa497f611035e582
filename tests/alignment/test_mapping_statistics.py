"""Counts are sparse, mergeable, and the same bytes on disk whatever the order of work."""

from collections import Counter

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment import MappingStatistics, Rows, boundary_rows
from fusion.config import UserError

DIALOGUES = [
    ["The ratio of poles", "is 1:3."],
    ["calculated calculation 北京"],
    ["e\u0301 👍🏽\n\n two"],
    ["The poles"],
]


def _count(pair, dialogues, path="bytes"):
    statistics = MappingStatistics(pair.pivot_tokenizer, pair.source_tokenizer, path)
    for turns in dialogues:
        statistics.add(*encode(pair, turns))
    return statistics


@settings(max_examples=100, deadline=None)
@given(dialogues=st.lists(st.lists(texts, min_size=1, max_size=2), max_size=3))
def test_pairs_start_alike_and_share_bytes(pair, dialogues):
    expected = Counter()
    for turns in dialogues:
        pivot, source = pair.rows(*encode(pair, turns))
        rows = boundary_rows(pivot.ends, source.ends)
        found = [(a, source.next[j]) for a, j in zip(pivot.next.tolist(), rows.tolist(), strict=True) if j >= 0]
        expected.update((a, b) for a, b in found if a >= 0 and b >= 0 and pair.share_bytes(a, b))
    assert _count(pair, dialogues).counts.tolist() == [[*key, count] for key, count in sorted(expected.items())]


def test_pairs_of_a_known_text(pair):
    pivot_ids, source_ids = [10, 11, 12, pair.pivot_end_of_turn], [20, 21, pair.source_end_of_turn]
    statistics = MappingStatistics(pair.pivot_tokenizer, pair.source_tokenizer)
    pivot, source = Rows.of(pivot_ids, [1, 2, 4, 5]), Rows.of(source_ids, [1, 4, 5])
    statistics.add_rows(pivot, source)
    byte = pair.pivot[11]
    related = [[11, 21, 1]] if pair.source[21].startswith(byte) else []
    assert statistics.counts.tolist() == sorted([*related, [pair.pivot_end_of_turn, pair.source_end_of_turn, 1]])


@pytest.mark.parametrize("path", ["bytes", "dtw"])
def test_same_bytes_whatever_the_order(pair, path, tmp_path):
    _count(pair, DIALOGUES, path).save(tmp_path / "all.npz")
    parts = [_count(pair, DIALOGUES[2:], path), _count(pair, DIALOGUES[:2][::-1], path)]
    parts[0].merge(parts[1])
    parts[0].save(tmp_path / "merged.npz")
    assert (tmp_path / "all.npz").read_bytes() == (tmp_path / "merged.npz").read_bytes()
    loaded = _count(pair, DIALOGUES[:1], path).load(tmp_path / "all.npz")
    assert loaded.counts.tolist() == parts[0].counts.tolist()
    loaded.add(*encode(pair, DIALOGUES[0]))
    assert loaded.counts[:, 2].sum() > parts[0].counts[:, 2].sum()


def test_most_frequent_takes_the_lowest_id_of_ties(pair):
    statistics = _count(pair, [])
    statistics._fold(np.array([3 << 32 | 7, 5 << 32 | 7, 9 << 32 | 8, 4 << 32 | 8]), np.array([2, 2, 5, 1]))
    best = statistics.most_frequent()
    assert (best[7], best[8], best[9]) == (3, 9, -1)


def test_other_vocabularies_and_paths_are_refused(pair, tmp_path):
    statistics = _count(pair, DIALOGUES)
    statistics.save(tmp_path / "counts.npz")
    swapped = MappingStatistics(pair.source_tokenizer, pair.pivot_tokenizer, "dtw")
    with pytest.raises(UserError) as refusal:
        swapped.load(tmp_path / "counts.npz")
    assert len(refusal.value.problems) == 3
    with pytest.raises(UserError, match="path"):
        statistics.merge(_count(pair, [], "dtw"))
    with pytest.raises(UserError, match="choose one of bytes, dtw"):
        _count(pair, [], "words")


def test_golden_counts(golden, real_pair):
    statistics = MappingStatistics(*real_pair, path="dtw")
    for dialogue in golden["dialogues"]:
        statistics.add(dialogue["pivot_ids"], dialogue["source_ids"])
    assert statistics.counts.tolist() == golden["counts"]
