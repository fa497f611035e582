"""How a step is cut and dealt: within the limits, as few parts as can be, as much work for every device."""

from itertools import combinations_with_replacement, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.training.micro_batches import Limits, cut, deal

many_lengths = st.lists(st.integers(1, 500), min_size=1, max_size=60)
worlds = st.integers(1, 5)
all_limits = st.builds(
    Limits, dialogues=st.integers(0, 9), tokens=st.one_of(st.just(0), st.integers(1, 2000)), packed=st.booleans()
)


def sizes_of(parts, lengths, limits):
    return [limits.size([lengths[place] for place in part]) for part in parts]


@settings(max_examples=300)
@given(many_lengths, worlds, all_limits)
def test_every_dialogue_is_in_one_part_within_the_limits(lengths, world, limits):
    parts = cut(lengths, world, limits)
    assert sorted(place for part in parts for place in part) == list(range(len(lengths)))
    assert len(parts) % world == 0
    for part, size in zip(parts, sizes_of(parts, lengths, limits), strict=True):
        assert len(part) <= (limits.dialogues or len(lengths))
        assert size <= (limits.tokens or size) or len(part) == 1  # a longer dialogue is a part of its own


@settings(max_examples=300)
@given(many_lengths, worlds, all_limits)
def test_no_part_is_idle_while_another_could_be_split(lengths, world, limits):
    parts = cut(lengths, world, limits)
    if not limits.packed and not all(parts):
        assert max(map(len, parts)) == 1
    assert sum(not part for part in parts) < world or len(lengths) < world


@settings(max_examples=300)
@given(many_lengths, worlds, all_limits)
def test_all_ranks_have_as_many_parts_and_about_the_same_tokens(lengths, world, limits):
    ranks = deal(lengths, world, limits)
    assert len(ranks) == world
    assert len({len(parts) for parts in ranks}) == 1
    assert sorted(np.concatenate([part for parts in ranks for part in parts])) == list(range(len(lengths)))
    sizes = [sizes_of(parts, lengths, limits) for parts in ranks]
    totals = list(map(sum, sizes))
    assert max(totals) - min(totals) <= max(map(max, sizes))  # never more than one part apart
    assert all(one == sorted(one, reverse=True) for one in sizes)


@given(many_lengths, worlds, all_limits)
def test_equal_questions_have_equal_answers(lengths, world, limits):
    first, second = deal(lengths, world, limits), deal(list(lengths), world, limits)
    assert all(
        np.array_equal(one, other)
        for mine, yours in zip(first, second, strict=True)
        for one, other in zip(mine, yours, strict=True)
    )


def best_by_trying(lengths, number, limits):
    """Size of the largest part when `number` parts are filled in the best way; None when it cannot be done."""
    best = None
    for chosen in product(range(number), repeat=len(lengths)):
        parts = [[length for length, part in zip(lengths, chosen, strict=True) if part == k] for k in range(number)]
        sizes = [limits.size(part) for part in parts]
        fits = all(
            len(part) <= (limits.dialogues or 99) and (len(part) < 2 or size <= (limits.tokens or size))
            for part, size in zip(parts, sizes, strict=True)
        )
        if fits and (best is None or max(sizes) < best):
            best = max(sizes)
    return best


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("dialogues", "tokens"), [(0, 0), (2, 0), (0, 14), (3, 20)])
def test_few_and_even_parts_against_all_ways_to_cut(dialogues, tokens, packed):
    limits = Limits(dialogues, tokens, packed)
    for lengths in combinations_with_replacement((1, 3, 4, 7, 10), 5):
        found = cut(lengths, 1, limits)
        assert best_by_trying(lengths, len(found), limits) is not None
        fewer = len(found) - 1
        if not packed:
            assert not fewer or best_by_trying(lengths, fewer, limits) is None
            assert max(sizes_of(found, lengths, limits)) == best_by_trying(lengths, len(found), limits)
        else:  # the heuristic's known bounds: a part more, 4/3 of the best
            assert fewer < 2 or best_by_trying(lengths, fewer - 1, limits) is None
            best = best_by_trying(lengths, len(found), limits)
            assert max(sizes_of(found, lengths, limits)) <= 4 / 3 * best


def test_known_cuts():
    lengths = [9, 2, 8, 3, 2, 30]
    assert cut(lengths, 1, Limits()) == [[5, 0, 2, 3, 1, 4]]
    assert cut(lengths, 1, Limits(tokens=18)) == [[5], [0, 2], [3, 1, 4]]
    assert cut(lengths, 1, Limits(dialogues=2, tokens=18)) == [[5], [0], [2, 3], [1, 4]]
    assert cut(lengths, 1, Limits(tokens=24, packed=True)) == [[5], [0, 2, 3, 1, 4]]
    assert [len(part) for part in cut([5] * 3, 4, Limits())] == [1, 1, 1, 0]  # one device has nothing to read


def test_devices_share_the_tokens_of_long_and_short_dialogues():
    lengths = np.random.default_rng(0).integers(10, 2000, 128).tolist()
    for limits in (Limits(tokens=8192), Limits(dialogues=4), Limits(tokens=8192, packed=True)):
        ranks = deal(lengths, 4, limits)
        totals = [sum(sizes_of(parts, lengths, limits)) for parts in ranks]
        assert max(totals) < 1.05 * min(totals)
