"""Counts are sparse, mergeable, and the same bytes on disk whatever the order of work."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.alignment import MappingStatistics, Rows, VocabularyPair, boundary_rows, build_alignment
from fusion.alignment.strategies.ms_released import _mined
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


@pytest.mark.parametrize("path", ["bytes", "dtw"])
@settings(max_examples=60, deadline=None)
@given(dialogues=st.lists(st.lists(texts, min_size=1, max_size=2), max_size=6), data=st.data())
def test_any_split_merges_to_the_same_bytes(pair, path, dialogues, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("counts")
    whole = _count(pair, dialogues, path)
    workers = data.draw(st.lists(st.integers(0, 3), min_size=len(dialogues), max_size=len(dialogues)))
    shuffled = data.draw(st.permutations(range(len(dialogues))))
    parts = [_count(pair, [dialogues[d] for d in shuffled if workers[d] == worker], path) for worker in range(4)]
    parts = data.draw(st.permutations(parts))
    for part in parts[1:]:
        parts[0].merge(part)
    assert parts[0].counts.tolist() == whole.counts.tolist()
    assert parts[0].most_frequent().tolist() == whole.most_frequent().tolist()
    for name, counts in (("merged", parts[0]), ("whole", whole)):
        counts.save(folder / name)
    assert (folder / "merged").read_bytes() == (folder / "whole").read_bytes()


@given(st.lists(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12), max_size=4))
@settings(max_examples=200, deadline=None)
def test_counts_add_up_and_the_most_frequent_wins(pair, batches):
    statistics, expected = _count(pair, [], "dtw"), Counter()
    for batch in batches:
        counted = Counter(batch)
        keys = np.array(sorted(a << 32 | b for a, b in counted), dtype=np.int64)
        statistics._fold(
            keys, np.array([counted[key >> 32, key & 0xFFFFFFFF] for key in keys.tolist()], dtype=np.int64)
        )
        expected += counted
    assert statistics.counts.tolist() == [[*key, count] for key, count in sorted(expected.items())]
    best = statistics.most_frequent()
    for source in range(6):
        rivals = {a: count for (a, b), count in expected.items() if b == source}
        assert best[source] == (min(rivals, key=lambda a: (-rivals[a], a)) if rivals else -1)


@pytest.mark.parametrize("ends", [(None, None), (None, 5), (7, 5)])
def test_pairs_are_judged_alike_one_by_one_and_at_once(pair, ends):
    statistics = _count(pair, [])
    statistics.pair = replace(pair, pivot_end_of_turn=ends[0], source_end_of_turn=ends[1])
    pivot_P, source_P = (grid.ravel() for grid in np.indices((len(pair.pivot) + 2, len(pair.source) + 2)))
    related_P = statistics._share_bytes(pivot_P, source_P)
    one_by_one = [statistics.pair.share_bytes(*ids) for ids in zip(pivot_P.tolist(), source_P.tolist(), strict=True)]
    assert related_P.tolist() == one_by_one


def test_most_frequent_takes_the_lowest_id_of_ties(pair):
    statistics = _count(pair, [])
    statistics._fold(np.array([3 << 32 | 7, 4 << 32 | 8, 5 << 32 | 7, 9 << 32 | 8]), np.array([2, 1, 2, 5]))
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


def test_golden_map(golden, real_pair):
    """The released map: from the counts, unseen ids, ends of sequence; an equal string goes before all of them."""
    statistics = MappingStatistics(*real_pair, path="dtw")
    for dialogue in golden["dialogues"]:
        statistics.add(dialogue["pivot_ids"], dialogue["source_ids"])
    targets = build_alignment("ms_released", *real_pair, statistics).targets(np.arange(len(real_pair[1])))
    released = np.full(len(targets), golden["unseen_maps_to"])
    for source_id, pivot_id in golden["map"].items():
        released[int(source_id)] = pivot_id
    source_end, pivot_end = golden["eos"]
    released[source_end] = pivot_end
    vocabulary = real_pair[0].get_vocab()
    strings = real_pair[1].convert_ids_to_tokens(list(range(len(targets))))
    expected = [
        vocabulary.get(string.replace("Ġ", "▁"), mined) for string, mined in zip(strings, released, strict=True)
    ]
    assert targets.tolist() == expected
    mined = _mined(VocabularyPair.of(*real_pair), statistics, strings)
    mined[source_end] = pivot_end
    assert mined.tolist() == released.tolist()
