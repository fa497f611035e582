"""Which dialogues a step reads: all once per epoch, in one order for any number of devices, drawn from the seed."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion.config import UserError
from fusion.training.micro_batches import Limits
from fusion.training.sampler import BUCKET_BATCHES, make_plan

plans = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(1, 500), min_size=1, max_size=120).map(np.asarray),
        "batch_size": st.integers(1, 40),
        "epochs": st.integers(1, 3),
        "seed": st.integers(0, 2**40),
        "world": st.just(1),
    }
)


def epoch_of(plan, epoch):
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    return [plan.step(step) for step in steps]


@given(plans)
def test_every_example_once_per_epoch(settings):
    plan = make_plan(**settings)
    assert plan.total_steps == plan.steps_per_epoch * settings["epochs"]
    for epoch in range(settings["epochs"]):
        steps = epoch_of(plan, epoch)
        assert sorted(np.concatenate(steps)) == list(range(len(settings["lengths"])))
        sizes = [len(step) for step in steps]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) <= settings["batch_size"]


limits = st.builds(
    Limits, dialogues=st.integers(0, 12), tokens=st.one_of(st.just(0), st.integers(1, 3000)), packed=st.booleans()
)


@settings(max_examples=200)
@given(plans, st.integers(1, 4), limits)
def test_micro_batches_divide_a_step_among_ranks(settings, world, limits):
    assume(min(len(settings["lengths"]), settings["batch_size"]) >= 2 * world)
    plan = make_plan(**(settings | {"world": world}))
    alone = make_plan(**settings)
    for step in range(plan.total_steps):
        shares = [plan.micro_batches(step, world, rank, limits) for rank in range(world)]
        assert len({len(share) for share in shares}) == 1
        read = np.concatenate([part for share in shares for part in share])
        assert sorted(read) == sorted(alone.step(step))  # the same dialogues for any number of devices and any limits


@given(plans, st.data())
def test_a_step_is_a_function_of_seed_and_number(settings, data):
    plan, again = make_plan(**settings), make_plan(**settings)
    order = data.draw(st.permutations(range(plan.total_steps)))
    before = np.random.get_state()[1].copy()
    later = {step: again.step(step) for step in order}  # as after a resume: any step first
    assert all((plan.step(step) == later[step]).all() for step in range(plan.total_steps))
    assert (np.random.get_state()[1] == before).all()


def test_epochs_and_seeds_have_their_own_order():
    lengths = np.random.default_rng(0).integers(1, 100, 200)
    plan = make_plan(lengths, 8, 2, seed=0, world=1)
    other = make_plan(lengths, 8, 2, seed=1, world=1)
    orders = [np.concatenate(epoch_of(one, epoch)).tolist() for one in (plan, other) for epoch in (0, 1)]
    assert len(set(map(tuple, orders))) == 4


def test_dialogues_of_a_step_have_similar_lengths():
    lengths = np.random.default_rng(0).integers(1, 1000, BUCKET_BATCHES * 8)
    plan = make_plan(lengths, 8, 1, seed=0, world=1)
    padded = sum(len(step) * lengths[step].max() for step in epoch_of(plan, 0))
    assert padded < 1.2 * lengths.sum()
    firsts = [lengths[step].max() for step in epoch_of(plan, 0)]
    assert firsts != sorted(firsts)


@pytest.mark.parametrize(("number", "batch_size", "world"), [(3, 8, 4), (100, 2, 3), (1, 1, 2), (9, 4, 4)])
def test_too_few_dialogues_for_the_devices_are_refused(number, batch_size, world):
    with pytest.raises(UserError, match=rf"for {world} devices; raise trainer\.batch_size"):
        make_plan(np.ones(number, dtype=int), batch_size, 1, seed=0, world=world)


def test_no_dialogue_at_all_is_refused():
    with pytest.raises(UserError, match="no dialogue is left to train on"):
        make_plan(np.zeros(0), 8, 1, seed=0, world=1)
