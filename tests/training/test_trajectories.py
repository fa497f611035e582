"""What changes the cost of a training does not change what it learns: losses, gradient norms and weights."""

from functools import partialmethod

import numpy as np
import pytest
import torch
from checkpointed import assert_equal, changed, prepared, weights
from torch._dynamo.utils import counters

from fusion.training import sampler
from fusion.training.fit import fit
from fusion.training.module import FusionModule

RELATIVE = 1e-5
"""Over all steps, in float32: sums in another order."""
STEPS = 12
EXACT = {
    "workers": {"data_workers": 2},
    "checkpointed": {"gradient_checkpointing": True},
    "checkpoints": {"checkpoint_every_steps": 5},
    "told rarely": {"log_every_steps": 5},
}
EQUAL = {
    "one dialogue at a time": {"micro_batch_size": 1},
    "uneven micro-batches": {"micro_batch_size": 3},
    "a budget of tokens": {"micro_batch_tokens": 70},
    "a budget below the longest": {"micro_batch_tokens": 20},
    "packed": {"packing": True},
    "packed by budget": {"packing": True, "micro_batch_tokens": 70},
    "packed in twos": {"packing": True, "micro_batch_size": 2, "data_workers": 2},
    "checkpointed parts": {"gradient_checkpointing": True, "micro_batch_tokens": 70},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_source):
    """Steps of seven or eight dialogues; most gradients are clipped."""
    module = prepared(tmp_path_factory.mktemp("trajectories"), tiny_source, dropout=0.0)
    return changed(module, batch_size=8, epochs=STEPS, max_steps=STEPS)


def trajectory(data, folder=None, **changes):
    """(losses, gradient norms, weights)"""
    module, seen = changed(data, **changes), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModule, "on_before_optimizer_step", lambda one, _: seen.append(one.outcome))
        fitted = fit(module.config, module, [], folder)
    assert len(seen) == STEPS
    return [float(one.loss) for one in seen], [float(one.grad_norm) for one in seen], weights(fitted)


@pytest.fixture(scope="module")
def whole(data):
    losses, norms, _ = found = trajectory(data)
    assert losses[-1] < 0.8 * losses[0]
    assert sum(norm > data.config.optim.grad_clip for norm in norms) > STEPS / 2
    return found


def assert_alike(found, wanted):
    for mine, yours in zip(found[:2], wanted[:2], strict=True):
        assert mine == pytest.approx(yours, rel=RELATIVE)
    for name, one in wanted[2].items():
        torch.testing.assert_close(found[2][name], one, rtol=RELATIVE, atol=RELATIVE)


@pytest.mark.parametrize("changes", EXACT.values(), ids=EXACT)
def test_the_same_to_the_last_bit(data, whole, changes, tmp_path):
    losses, norms, learnt = trajectory(data, tmp_path, **changes)
    assert (losses, norms) == whole[:2]
    assert_equal(learnt, whole[2])


@pytest.mark.parametrize("changes", EQUAL.values(), ids=EQUAL)
def test_the_same_however_a_step_is_cut(data, whole, changes):
    assert_alike(trajectory(data, **changes), whole)


def test_grouping_by_length_is_about_padding_alone(data, whole, monkeypatch):
    def by_place(lengths, world, limits):
        """Every device's dialogues in twos, as they stand in the step."""
        places = np.random.default_rng(len(lengths)).permutation(len(lengths))
        return [np.array_split(mine, -(-len(mine) // 2)) for mine in np.array_split(places, world)]

    monkeypatch.setattr(sampler, "deal", by_place)
    assert_alike(trajectory(data), whole)


def test_the_same_weights_are_dropped_when_activations_are_computed_again(tmp_path, tiny_source):
    data = prepared(tmp_path, tiny_source, dropout=0.3)
    data = changed(data, batch_size=8, epochs=STEPS, max_steps=STEPS, micro_batch_size=3)
    dropping, again = trajectory(data), trajectory(data, gradient_checkpointing=True)
    assert dropping[:2] == again[:2]
    assert_equal(again[2], dropping[2])


def test_compiled_layers_learn_the_same(data, whole, monkeypatch):
    """As torch.compile traces and differentiates them, packed and checkpointed too; kernels would take minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    assert_alike(trajectory(data, compile=True, gradient_checkpointing=True, packing=True), whole)
    assert counters["frames"]["ok"] > 0
    assert not counters["graph_break"]
