"""`bpm` and `canonical`: rows inside a source token, conditional candidates, and where their mass goes."""

from functools import cache

import numpy as np
import pytest
from dialogue_texts import encode, texts
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizer_pairs import CORPUS, PAIRS, Side, make_pairs, read_sides, teacher_of, wrap
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from fusion.alignment import Rows, VocabularyPair, build_alignment, token_bytes
from fusion.alignment.continuations import Continuations
from fusion.alignment.cut import Cutter
from fusion.teaching.store import TeacherRows

NAMES = ("bpm", "canonical")
dialogues = st.lists(texts, min_size=1, max_size=2)


@pytest.fixture(scope="module")
def built(pivot, source) -> dict[tuple[str, str], Continuations]:
    pairs = make_pairs(pivot, source)
    return {
        (name, kind): build_alignment(name, pair.pivot_tokenizer, pair.source_tokenizer)
        for name in NAMES
        for kind, pair in pairs.items()
    }


def prepare(alignment, turns):
    ids = encode(alignment.pair, turns)
    sides = read_sides(alignment.pair, *ids, turns)
    assume(sides is not None)
    rows = alignment.pair.rows(*ids)
    assume(min(rows[0].ends) >= 0)
    return rows, sides


def source_row(ours: Side, theirs: Side, row: int) -> int:
    """The last row that has read the same; else the one before the token under way; by comparing what was read."""
    same = [s for s, read in enumerate(theirs.read) if read == ours.read[row]]
    if same:
        return same[-1]
    before = [s for s, read in enumerate(theirs.read) if ours.read[row].startswith(read)]
    return before[-1] if before else -1


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(turns=dialogues)
def test_every_row_uses_the_source_row_that_has_read_the_same_or_least_less(built, name, kind, turns):
    alignment = built[name, kind]
    (pivot, source), (ours, theirs) = prepare(alignment, turns)
    rows = alignment.align(pivot, source)
    assert rows.dtype == np.int32
    assert rows.tolist() == [source_row(ours, theirs, row) for row in range(len(pivot))]
    for row, other in enumerate(rows.tolist()):
        if other >= 0:
            begun = ours.read[row].removeprefix(theirs.read[other])
            assert theirs.read[other] + begun == ours.read[row]
            assert not begun or theirs.added[other + 1].startswith(begun)


def going_on(pair: VocabularyPair, ours: Side, theirs: Side, row: int, other: int) -> tuple[bool, bytes, bytes]:
    """(the candidate loses a space, what the pivot writes in front of it, what it has written of it)."""
    begun = ours.read[row].removeprefix(theirs.read[other])
    first = row + 1
    while begun and ours.read[first - 1] != theirs.read[other] and first > 0:
        first -= 1
    lead = b" " if ours.lost_space(first) and (first > 0 or not begun) else b""
    return theirs.lost_space(other + 1), lead, lead + begun if begun else b""


def longest_prefix(pair: VocabularyPair, rest: bytes) -> int:
    """By reading the whole vocabulary; whole pieces go before byte pieces, then lower ids."""
    begins = [(len(content), whole, -token) for content, whole, token in contents(pair) if rest.startswith(content)]
    size, _, token = max(begins, default=(0, True, 1))
    return -1 if rest[:size].isspace() and not rest.isspace() else -token


@cache
def contents(pair: VocabularyPair) -> list[tuple[bytes, bool, int]]:
    tokens = [token for token in range(len(pair.pivot)) if pair.pivot[token]]
    return [(pair.pivot[token], token not in pair.pivot.byte_pieces, token) for token in tokens]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(turns=dialogues, seed=st.integers(0, 99))
def test_all_mass_is_accounted_for(built, name, kind, turns, seed):
    """Row by row against a plain account: what counts, what it is scaled by, and where it goes."""
    alignment = built[name, kind]
    pair, ((pivot, source), (ours, theirs)) = alignment.pair, prepare(alignment, turns)
    teacher = teacher_of(source, len(pair.source), seed)
    wanted, stored = np.arange(len(pivot) - 1), np.arange(len(source) - 1)
    spoken = alignment.speak(pivot, source, teacher, wanted, stored)
    ids, weights = spoken.targets.padded(teacher.ids_RK.shape[1])
    for row, other in enumerate(spoken.rows_R.tolist()):
        expected: dict[int, float] = {}
        if other >= 0:
            drops, lead, done = going_on(pair, ours, theirs, row, other)
            counted = []
            for token, log in zip(teacher.ids_RK[other].tolist(), teacher.logprobs_RK[other].tolist(), strict=True):
                content = pair.source[token]
                if not content:
                    if 0 <= token < len(pair.source) and not done:  # an event
                        counted.append((int(pair.equal_ids[token]), log))
                    continue
                written = lead + (content.removeprefix(b" ") if drops else content)
                if done and (not written.startswith(done) or written == done):
                    continue
                rest = written[len(done) :]
                target = longest_prefix(pair, rest) if len(written) > len(lead) else -1
                if name == "canonical" and len(written) > len(lead):
                    target = alignment.target(written, done)
                    assert target < 0 or (pair.pivot[target] and rest.startswith(pair.pivot[target]))
                counted.append((target, log))
            total = sum(np.exp(log) for _, log in counted) if done else 1.0
            for target, log in counted:
                if target >= 0:
                    expected[target] = expected.get(target, 0.0) + np.exp(log) / total
        found = {
            token: weight for token, weight in zip(ids[row].tolist(), weights[row].tolist(), strict=True) if weight
        }
        assert found.keys() == expected.keys()
        assert all(found[token] == pytest.approx(expected[token], rel=1e-5) for token in found)
        assert sum(found.values()) <= 1 + 1e-5


def certain(source, ids) -> TeacherRows:
    rows = len(source) - 1
    return TeacherRows(
        np.reshape(ids, (rows, 1)), np.zeros((rows, 1), dtype=np.float32), np.zeros(rows), np.zeros(rows)
    )


@pytest.mark.parametrize("kind", PAIRS)
def test_canonical_goes_on_as_the_pivot_reads_the_text(built, kind):
    """A source that is sure of the reference makes the pivot sure of its own reference tokens."""
    alignment = built["canonical", kind]
    right = total = 0
    for text in ("The ratio of poles and wires is 1:3.", "They calculated the calculation", "two poles, 北京"):
        pivot, source = alignment.pair.rows(*encode(alignment.pair, [text, text]))
        stored, wanted = np.arange(len(source) - 1), np.arange(len(pivot) - 1)
        spoken = alignment.speak(pivot, source, certain(source, source.next[:-1]), wanted, stored)
        for row in np.flatnonzero(spoken.rows_R >= 0).tolist():
            # The pivot's token may reach beyond the source's: then no candidate says as much.
            if pivot.ends[row + 1] <= source.ends[spoken.rows_R[row] + 1]:
                total += 1
                right += spoken.targets.padded(1)[0][row, 0] == pivot.next[row]
    assert right == total > 15


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("name", NAMES)
def test_what_was_asked_before_changes_nothing(built, name, kind, monkeypatch):
    pair = built[name, kind].pair
    turns = [["The ratio of poles", "is 1:3."], ["calculated 北京"], ["naïve café 👍🏽"], ["The ratio"]]
    texts = [pair.rows(*encode(pair, one)) for one in turns]
    teachers = [teacher_of(source, len(pair.source), seed) for seed, (_, source) in enumerate(texts)]

    def speak(order):
        fresh = build_alignment(name, pair.pivot_tokenizer, pair.source_tokenizer)
        said = {}
        for number in order:
            pivot, source = texts[number]
            rows = np.arange(len(pivot) - 1), np.arange(len(source) - 1)
            targets = fresh.speak(pivot, source, teachers[number], *rows).targets
            said[number] = [array.tobytes() for array in (targets.indptr_R, targets.ids_E, targets.weights_E)]
        return [said[number] for number in sorted(said)]

    forwards = speak([0, 1, 2, 3])
    assert forwards == speak([3, 1, 0, 2, 0])
    monkeypatch.setattr("fusion.alignment.continuations.REMEMBERED", 0)
    assert forwards == speak([2, 0, 3, 1])


def test_white_space_gets_no_mass_of_candidates_that_say_more(built):
    bpm = built["bpm", "pieces<-bytes"]
    longer = next(t for t in range(len(bpm.pair.source)) if bpm.pair.source[t] == b" calculat")
    blank = next(t for t in range(len(bpm.pair.source)) if bpm.pair.source[t] == b" ")
    assert longest_prefix(bpm.pair, b" calculat") == bpm.targets(np.array([longer]))[0]
    assert bpm.pair.pivot[int(bpm.targets(np.array([blank]))[0])] == b" "
    assert bpm.target(b" \x00", b"") == -1
    assert bpm.target(b"a \x00", b"a") == -1
    assert bpm.pair.pivot[bpm.target(b"a  ", b"a")].isspace()


def test_dummy_prefixes_are_not_text(built):
    """`▁The` at the start of a turn says `The`: the way to write it there with a dummy prefix, and only with one."""
    both = built["canonical", "unigram<-bytes"].pair
    for tokenizers, said, expected in (
        ((both.pivot_tokenizer, both.source_tokenizer), b"The", b" The"),
        ((both.source_tokenizer, both.pivot_tokenizer), b" The", b"The"),
    ):
        alignment = build_alignment("canonical", *tokenizers)
        pair = alignment.pair
        pivot, source = pair.rows(*encode(pair, ["The ratio", "The ratio"]))
        start = int(np.flatnonzero(pivot.read == pair.pivot_end_of_turn)[0])
        candidate = next(t for t in range(len(pair.source)) if pair.source[t] == said)
        teacher = certain(source, np.full(len(source) - 1, candidate))
        spoken = alignment.speak(pivot, source, teacher, np.array([start]), np.arange(len(source) - 1))
        assert [pair.pivot[int(token)] for token in spoken.targets.ids_E] == [expected]


def test_the_same_vocabulary_is_the_identity(pivot):
    for name in NAMES:
        alignment = build_alignment(name, pivot, pivot)
        ids = np.arange(3, len(pivot))
        assert alignment.targets(ids).tolist() == ids.tolist()


def test_a_candidate_within_a_character_is_written_in_bytes_only_if_that_is_certain(built):
    canonical = built["canonical", "pieces<-bytes"]
    pivot = canonical.pair.pivot
    assert "北".encode() in pivot.id_of
    assert canonical.target("北".encode(), b"") == pivot.id_of["北".encode()]
    assert canonical.target("北".encode()[:2], b"") == -1
    assert pivot[canonical.target(b" " + "北".encode()[:2], b"")] == b" "
    unwritten = next(chr(code) for code in range(0x600, 0x700) if not _begun(pivot, chr(code).encode()[:1]))
    for content, done in ((unwritten.encode(), b""), (unwritten.encode()[:1], b""), ("北".encode(), b"\xe5")):
        piece = canonical.target(content, done)
        assert piece in pivot.byte_pieces
        assert pivot[piece] == content[len(done) : len(done) + 1]


def _begun(table, begin):
    return any(content.startswith(begin) for content, token in table.id_of.items() if token not in table.byte_pieces)


@pytest.mark.parametrize(("width", "aligned"), [(6, True), (5, True), (4, False)])
def test_tokens_that_reach_into_the_template_have_no_inner_rows(built, width, aligned):
    """What of such a token the pivot has read is not known; one byte less is a dummy prefix."""
    alignment = built["bpm", "pieces<-bytes"]
    poles = next(token for token in range(len(alignment.pair.source)) if alignment.pair.source[token] == b" poles")
    pivot, source = Rows.of([9, 9, 9], [0, 2, width]), Rows.of([9, poles], [0, width])
    assert alignment.align(pivot, source).tolist() == [0, 0 if aligned else -1, 1]


def test_what_was_written_includes_the_dummy_prefix(built, monkeypatch):
    """After an end of turn the pivot writes ` x`, of which `x` is text, and is within the source's `xy`."""
    alignment = built["canonical", "unigram<-bytes"]
    pair, asked = alignment.pair, []
    pivot_id, source_id = next(
        (ours, theirs)
        for content, ours in pair.pivot.id_of.items()
        for other, theirs in pair.source.id_of.items()
        if content[:1] == b" " and len(content) > 1 and other.startswith(content[1:]) and len(other) >= len(content)
    )
    begun, whole = pair.pivot[pivot_id], b" " + pair.source[source_id]
    pivot = Rows.of([pair.pivot_end_of_turn, pivot_id, 5], [1, len(begun), len(whole)])
    source = Rows.of([pair.source_end_of_turn, source_id], [1, len(whole)])
    fresh = build_alignment("canonical", pair.pivot_tokenizer, pair.source_tokenizer)
    monkeypatch.setattr(fresh, "target", lambda written, done: asked.append((written, done)) or 7)
    spoken = fresh.speak(pivot, source, certain(source, [source_id]), np.arange(2), np.arange(1))
    assert spoken.rows_R.tolist() == [0, 0]
    assert sorted(asked) == [(whole, b""), (whole, begun)]


def test_a_continuation_has_no_space_in_front():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = wrap(backend, "<eos>")
    table, cutter = token_bytes(tokenizer), Cutter(tokenizer, token_bytes(tokenizer))
    assert table[tokenizer("poles").input_ids[0]].startswith(b" ")
    for content in (b"poles", b" poles", b"<eos>", b"po\xe5", "北京".encode()[1:], b""):
        assert b"".join(table[token] for token in cutter.cut(content)) == content
