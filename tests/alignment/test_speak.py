"""What every strategy says of a dialogue: which rows speak, unscaled masses, and the map over whole sequences."""

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_pairs import PAIRS, make_pairs, read_sides, teacher_of

from fusion.alignment import MappingStatistics, build_alignment
from fusion.config import UserError
from fusion.teaching.sparse_rows import scaled
from fusion.teaching.store import TeacherRows

TEXTS = [["The ratio of poles", "is 1:3."], ["calculated calculation 北京"], ["e\u0301 👍🏽\n\n two"]]
MAPS = ("em", "mined", "ms", "ms_released", "strict", "bpm", "canonical", "random")
dialogues = st.lists(texts, min_size=1, max_size=2)


@pytest.fixture(scope="module")
def pairs(pivot, source):
    return make_pairs(pivot, source)


@pytest.fixture(scope="module")
def built(pairs):
    alignments = {}
    for kind, pair in pairs.items():
        tokenizers = pair.pivot_tokenizer, pair.source_tokenizer
        for path in ("bytes", "dtw"):
            counts = MappingStatistics(*tokenizers, path)
            for turns in TEXTS:
                counts.add(*encode(pair, turns))
            for name in (*MAPS, "uld", "alm"):
                alignments[name, kind, path] = build_alignment(name, *tokenizers, counts, path=path)
    return alignments


def say(alignment, turns, seed, stored=None, wanted=None):
    ids = encode(alignment.pair, turns)
    pivot, source = alignment.pair.rows(*ids)
    teacher = teacher_of(source, len(alignment.pair.source), seed)
    stored = np.arange(len(source) - 1) if stored is None else np.asarray(stored)
    told = (teacher.ids_RK, teacher.logprobs_RK, teacher.tail_R, teacher.nll_R)
    teacher = TeacherRows(*(array[stored] for array in told))
    wanted = np.arange(len(pivot)) if wanted is None else np.asarray(wanted)
    return (pivot, source), teacher, alignment.speak(pivot, source, teacher, wanted, stored)


@pytest.mark.parametrize("path", ["bytes", "dtw"])
@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=25, deadline=None)
@given(turns=dialogues, seed=st.integers(0, 99), kind=st.sampled_from(PAIRS))
def test_masses_are_kept_as_the_teacher_gave_them(built, name, path, turns, seed, kind):
    alignment = built[name, kind, path]
    _, teacher, spoken = say(alignment, turns, seed)
    assert np.array_equal(spoken.rows_R, alignment.align(*alignment.pair.rows(*encode(alignment.pair, turns))))
    sums = np.bincount(spoken.targets.row_of_E, spoken.targets.weights_E, minlength=len(spoken.targets))
    assert sums.max(initial=0) <= 1 + 1e-5
    assert np.all(spoken.targets.is_empty_R[spoken.rows_R < 0])
    if name in ("bpm", "canonical", "ms_released"):
        return
    masses = np.exp(teacher.logprobs_RK.astype(np.float64))
    known = (teacher.ids_RK >= 0) & (teacher.ids_RK < len(alignment.pair.source))
    targets = np.where(known, alignment.targets(np.where(known, teacher.ids_RK, 0)), -1)
    kept = np.append(np.where(targets >= 0, masses, 0).sum(axis=1), [0.0, 0.0])  # the last row is not stored
    assert sums == pytest.approx(kept[spoken.rows_R], abs=1e-6)


@pytest.mark.parametrize("path", ["bytes", "dtw"])
@pytest.mark.parametrize("name", [*MAPS, "uld"])
def test_map_rows_says_the_same_scaled_to_one(built, name, path):
    for kind in PAIRS:
        alignment = built[name, kind, path]
        _, teacher, spoken = say(alignment, TEXTS[0], 3)
        beyond = np.full((1, teacher.ids_RK.shape[1]), -1)
        mapped = alignment.map_rows(
            *encode(alignment.pair, TEXTS[0]),
            np.concatenate([teacher.ids_RK, beyond]),
            np.concatenate([teacher.logprobs_RK + 3.0, beyond]),
        )
        rows = scaled(spoken.targets)
        for row, other in enumerate(spoken.rows_R.tolist()):
            start, stop = mapped.indptr[row : row + 2]
            if other < 0 and name == "ms_released":
                continue  # as the authors: the reference token
            expected = dict(zip(mapped.ids[start:stop].tolist(), mapped.weights[start:stop].tolist(), strict=True))
            start, stop = rows.indptr_R[row : row + 2]
            found = dict(zip(rows.ids_E[start:stop].tolist(), rows.weights_E[start:stop].tolist(), strict=True))
            assert found.keys() == expected.keys()
            assert all(found[token] == pytest.approx(expected[token], rel=1e-4, abs=1e-7) for token in found)


@pytest.mark.parametrize("name", MAPS)
def test_only_stored_rows_speak_and_only_wanted_rows_are_told(built, name):
    alignment = built[name, "pieces<-bytes", "bytes"]
    (_, source), _, whole = say(alignment, TEXTS[0], 5)
    stored = [row for row in range(len(source) - 1) if row % 3]
    wanted = [1, 2, 5, 8, 9]
    _, _, some = say(alignment, TEXTS[0], 5, stored, wanted)
    assert some.rows_R.tolist() == whole.rows_R[wanted].tolist()
    for row, place in enumerate(wanted):
        ids, weights = (side[place] for side in whole.targets.padded(6))
        if some.rows_R[row] not in stored:
            ids, weights = np.zeros(6), np.zeros(6)
        found = [side[row] for side in some.targets.padded(6)]
        assert np.array_equal(found[0], ids)
        assert np.array_equal(found[1], np.float32(weights))


@pytest.mark.parametrize("kind", PAIRS)
@settings(max_examples=40, deadline=None)
@given(turns=dialogues)
def test_no_strategy_leaves_out_a_row_that_has_read_the_same(built, kind, turns):
    alignment = built["ms", kind, "bytes"]
    ids = encode(alignment.pair, turns)
    sides = read_sides(alignment.pair, *ids, turns)
    assume(sides is not None)
    pivot, source = alignment.pair.rows(*ids)
    assume(min(pivot.ends) >= 0)
    ours, theirs = sides
    last = {read: row for row, read in enumerate(theirs.read)}
    expected = np.array([last.get(read, -1) for read in ours.read])
    for name in ("ms", "uld", "random", "alm"):
        assert np.array_equal(built[name, kind, "bytes"].align(pivot, source), expected)
    for name in ("bpm", "canonical"):
        rows = built[name, kind, "bytes"].align(pivot, source)
        assert np.array_equal(rows[expected >= 0], expected[expected >= 0])
    strict = built["strict", kind, "bytes"].align(pivot, source)
    for row, other in enumerate(strict.tolist()):
        together = expected[row] >= 0 and (
            ours.read[row + 1 : row + 2] == theirs.read[expected[row] + 1 : expected[row] + 2] != []
        )
        assert other == (expected[row] if together else -1)


@pytest.mark.parametrize("kind", PAIRS)
def test_maps_join_only_tokens_that_share_bytes(built, kind):
    for name in ("strict", "em", "ms", "bpm", "canonical"):
        alignment = built[name, kind, "bytes"]
        targets = alignment.targets(np.arange(len(alignment.pair.source)))
        mapped = np.flatnonzero(targets >= 0)
        assert len(mapped) > 50
        for token in mapped[alignment.pair.source.width[mapped] > 0].tolist():
            assert alignment.pair.share_bytes(int(targets[token]), token)
        assert targets[alignment.pair.source_end_of_turn] == alignment.pair.pivot_end_of_turn


def test_released_loses_masses_that_meet(built):
    released = built["ms_released", "pieces<-bytes", "dtw"]
    targets = released.targets(np.arange(len(released.pair.source)))
    meeting = np.flatnonzero(targets == np.bincount(targets[targets >= 0]).argmax())[:2]
    rows = released.pair.rows(*encode(released.pair, TEXTS[1]))
    stored = np.arange(len(rows[1]))
    logs = np.tile(np.log([[0.5, 0.3]], dtype=np.float32), (len(stored), 1))
    teacher = TeacherRows(np.tile(meeting, (len(stored), 1)), logs, np.full(len(stored), 0.2), np.zeros(len(stored)))
    spoken = released.speak(*rows, teacher, np.arange(len(rows[0])), stored)
    assert np.sum(spoken.rows_R >= 0) == len(spoken.targets.weights_E) > 1
    assert spoken.targets.weights_E == pytest.approx(0.5)


def test_random_targets_follow_the_seed_and_nothing_else(pairs):
    pair = pairs["pieces<-bytes"]
    tokenizers = pair.pivot_tokenizer, pair.source_tokenizer
    ids = np.arange(len(pair.source))
    first, again, other = (build_alignment("random", *tokenizers, seed=seed).targets(ids) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert np.mean(first == other) < 0.05
    content = pair.source.width > 0
    assert np.all(first[~content] == -1)
    assert np.all(pair.pivot.width[first[content]] > 0)
    assert len(set(first[content].tolist())) > content.sum() / 3
    with pytest.raises(UserError, match=r"seed=-1"):
        build_alignment("random", *tokenizers, seed=-1)


def test_counts_of_another_path_are_refused(pairs):
    pair = pairs["pieces<-bytes"]
    tokenizers = pair.pivot_tokenizer, pair.source_tokenizer
    counts = MappingStatistics(*tokenizers, "dtw")
    with pytest.raises(UserError, match="path"):
        build_alignment("ms", *tokenizers, counts, path="bytes")
    with pytest.raises(UserError, match=r"path=words: choose one of bytes, dtw"):
        build_alignment("ms", *tokenizers, path="words")
    assert build_alignment("ms", *tokenizers, counts).pair.path == "dtw"


def test_real_pair_covers_more_the_more_rows_a_strategy_can_use(golden, real_pair):
    for tokenizers in (real_pair, real_pair[::-1]):
        share = {}
        for name in ("strict", "ms", "bpm", "canonical"):
            alignment, aligned, total = build_alignment(name, *tokenizers), 0, 0
            for dialogue in golden["dialogues"]:
                ids = dialogue["pivot_ids"], dialogue["source_ids"]
                ids = ids if tokenizers is real_pair else ids[::-1]
                rows = alignment.align(*alignment.pair.rows(*ids))
                aligned, total = aligned + int((rows >= 0).sum()), total + len(rows)
            share[name] = aligned / total
        assert share["bpm"] == share["canonical"] > share["ms"] > share["strict"] > 0.7
