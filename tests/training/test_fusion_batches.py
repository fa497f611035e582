"""Batches: padded tokens, stacked targets, and the number of rows that normalises a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from stage1_settings import settings

from fusion.config.schema import ObjectiveConfig, TrainerConfig
from fusion.training.data import FusionDataModule, MicroBatches
from fusion.training.sampler import make_plan


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("data"), tiny_pivot, tiny_source))
    module.setup()
    return module


def batches_of(store, world, per_rank, batch_size=8):
    plan = make_plan(store.lengths, batch_size, 2, 3, world)
    ranks = [MicroBatches(store, plan, world, rank, per_rank) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {plan.total_steps * per_rank}
    for step in range(plan.total_steps):
        yield [rank[step * per_rank + part] for rank in ranks for part in range(per_rank)]


@pytest.mark.parametrize(("world", "per_rank"), [(1, 1), (1, 4), (2, 2), (3, 1), (4, 1), (1, 8), (2, 4), (1, 11)])
def test_step_rows_are_the_rows_of_all_parts(data, world, per_rank):
    store = data.prepared.fused
    seen = 0
    for parts in batches_of(store, world, per_rank):
        rows = sum(int(part.weights_RK[:, 0].sum()) for part in parts)  # idle parts have no weight
        assert {int(part.step_rows) for part in parts} == {rows}
        seen += rows
    assert seen == 2 * store.num_rows.sum()


def test_every_row_carries_its_reference_and_its_distribution(data):
    store = data.prepared.fused
    plan = make_plan(store.lengths, 8, 1, 3, 1)
    for step, (batch,) in zip(range(plan.total_steps), batches_of(store, 1, 1), strict=False):
        examples = [store[int(number)] for number in plan.step(step)]
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


def test_batches_do_not_depend_on_what_was_read_before(data):
    store = data.prepared.fused
    plan = make_plan(store.lengths, 8, 2, 3, 1)
    batches = MicroBatches(store, plan, 1, 0, 2)
    forwards = [batches[number] for number in range(len(batches))]
    for number in reversed(range(len(batches))):
        again = batches[number]
        assert all(torch.equal(one, other) for one, other in zip(again, forwards[number], strict=True))


def test_without_a_fusion_term_only_references_are_left(tmp_path, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path, tiny_pivot, tiny_source, objective=ObjectiveConfig(name="sft")))
    module.setup()
    for batch in module.train_dataloader():
        assert batch.targets_RK.shape[1] == batch.weights_RK.shape[1] == 1


@pytest.mark.parametrize(
    ("batch_size", "micro", "accumulation"), [(8, 0, 1), (8, 8, 1), (8, 4, 2), (8, 3, 3), (8, 1, 8), (4, 16, 1)]
)
def test_accumulation(data, batch_size, micro, accumulation):
    trainer = TrainerConfig(epochs=2, batch_size=batch_size, micro_batch_size=micro)
    module = FusionDataModule(replace(data.config, trainer=trainer))
    module.prepared = data.prepared
    assert module.accumulation == accumulation
    assert module.total_steps == module.plan.total_steps
    loader = module.train_dataloader()
    assert len(loader) == module.total_steps * accumulation
    assert all(len(batch.ids_BT) <= max(micro, 1) or not micro for batch in loader)


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
