"""Batches: padded tokens, stacked targets, and the number of rows that normalises a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stage1_settings import settings

from fusion.config.schema import ObjectiveConfig, TrainerConfig
from fusion.training.data import FusionDataModule, Steps
from fusion.training.sampler import make_plan


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("data"), tiny_pivot, tiny_source))
    module.setup()
    return module


def steps_of(store, world, micro, batch_size=8):
    """The shares of all ranks, step by step."""
    plan = make_plan(store.lengths, batch_size, 2, 3, world)
    ranks = [Steps(store, plan, world, rank, micro) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {plan.total_steps}
    for step in range(plan.total_steps):
        yield [rank[step] for rank in ranks]


@pytest.mark.parametrize(("world", "micro"), [(1, 0), (1, 2), (2, 2), (3, 0), (4, 1), (1, 1), (2, 1), (1, 3)])
def test_step_rows_are_the_rows_of_all_parts(data, world, micro):
    store = data.prepared.fused
    seen = 0
    for shares in steps_of(store, world, micro):
        assert len({len(share.micro_batches) for share in shares}) == 1
        parts = [part for share in shares for part in share.micro_batches]
        rows = sum(int(part.weights_RK[:, 0].sum()) for part in parts)  # idle parts have no weight
        assert {int(share.rows) for share in shares} == {rows}
        assert all(len(part.ids_BT) <= (micro or 8) for part in parts)
        seen += rows
    assert seen == 2 * store.num_rows.sum()


def test_every_row_carries_its_reference_and_its_distribution(data):
    store = data.prepared.fused
    plan = make_plan(store.lengths, 8, 1, 3, 1)
    for step, (share,) in zip(range(plan.total_steps), steps_of(store, 1, 0), strict=False):
        (batch,) = share.micro_batches
        examples = [store[int(number)] for number in plan.step(step)]
        assert sorted(share.names) == sorted(store.examples[int(number)] for number in plan.step(step))
        flat = batch.ids_BT.flatten()
        assert (flat[batch.rows_R + 1] == batch.targets_RK[:, 0]).all()
        assert (batch.weights_RK[:, 0] == 1).all()
        torch.testing.assert_close(batch.weights_RK[:, 1:].sum(1), torch.ones(len(batch.rows_R)))
        assert batch.weights_RK.dtype == torch.float32
        assert batch.targets_RK.dtype == batch.rows_R.dtype == torch.int64
        row = 0
        for number, example in enumerate(examples):
            assert batch.mask_BT[number].sum() == len(example.ids_N)
            assert (batch.ids_BT[number, : len(example.ids_N)].numpy() == example.ids_N).all()
            for place in range(len(example.rows_R)):
                entries = slice(*example.targets.indptr_R[place : place + 2])
                weights = batch.weights_RK[row, 1:].numpy()
                assert (weights[weights > 0] == example.targets.weights_E[entries]).all()
                assert (batch.targets_RK[row, 1:].numpy()[weights > 0] == example.targets.ids_E[entries]).all()
                row += 1
        assert row == len(batch.rows_R)


def test_steps_do_not_depend_on_what_was_read_before(data):
    store = data.prepared.fused
    plan = make_plan(store.lengths, 8, 2, 3, 1)
    steps = Steps(store, plan, 1, 0, 2)
    forwards = [steps[number] for number in range(len(steps))]
    later = Steps(store, plan, 1, 0, 2, first=2)
    for number in reversed(range(len(later))):
        again, before = later[number], forwards[number + 2]
        assert again.names == before.names
        for one, other in zip(again.micro_batches, before.micro_batches, strict=True):
            assert all(map(torch.equal, one, other))


def test_without_a_fusion_term_only_references_are_left(tmp_path, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path, tiny_pivot, tiny_source, objective=ObjectiveConfig(name="sft")))
    module.setup()
    for step in module.train_dataloader():
        for batch in step.micro_batches:
            assert batch.targets_RK.shape[1] == batch.weights_RK.shape[1] == 1


@pytest.mark.parametrize(
    ("batch_size", "micro", "parts"), [(8, 0, 1), (8, 8, 1), (8, 4, 2), (8, 3, 3), (8, 1, 8), (4, 16, 1)]
)
def test_micro_batches_of_a_step(data, batch_size, micro, parts):
    trainer = TrainerConfig(epochs=2, batch_size=batch_size, micro_batch_size=micro)
    module = FusionDataModule(replace(data.config, trainer=trainer))
    module.prepared = data.prepared
    assert module.total_steps == module.plan.total_steps
    loader = module.train_dataloader()
    assert len(loader) == module.total_steps
    assert max(len(step.micro_batches) for step in loader) == parts


def test_steps_and_tokens(data):
    lengths = data.prepared.fused.lengths
    for limit in (-1, 1, 1000):
        module = FusionDataModule(
            replace(data.config, trainer=replace(data.config.trainer, epochs=3, max_steps=limit))
        )
        module.prepared = data.prepared
        whole = 3 * -(-len(lengths) // 8)
        assert module.total_steps == (whole if limit < 0 else min(limit, whole))
    assert module.tokens_trained(whole) == 3 * lengths.sum()
    assert module.tokens_trained(0) == 0
    assert 0 < module.tokens_trained(1) < lengths.sum()


def test_setting_up_twice_prepares_once(data, monkeypatch):
    before = data.prepared
    data.prepare_data()  # reads the cache
    data.setup("fit")
    assert data.prepared is before
    assert np.array_equal(before.fused.lengths, data.prepared.fused.lengths)
