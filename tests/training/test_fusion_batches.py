"""Batches: padded tokens, stacked targets, and the number of rows that normalises a step."""

import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from stage1_settings import settings

from fusion.config.schema import ObjectiveConfig, TrainerConfig
from fusion.training.batches import collate
from fusion.training.data import FusionDataModule, Steps
from fusion.training.micro_batches import Limits
from fusion.training.sampler import make_plan


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("data"), tiny_pivot, tiny_source))
    module.setup()
    return module


def with_trainer(data, **changes):
    module = FusionDataModule(replace(data.config, trainer=TrainerConfig(**changes)))
    module.prepared = data.prepared
    assert module.total_steps == module.plan.total_steps == len(module.train_dataloader())
    return module


def steps_of(store, world, limits, batch_size=8):
    """The shares of all ranks, step by step."""
    plan = make_plan(store.lengths, batch_size, 2, 3, world)
    ranks = [Steps(store, plan, world, rank, limits) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {plan.total_steps}
    for step in range(plan.total_steps):
        yield [rank[step] for rank in ranks]


def assert_equal(one, other):
    """The same step, tensor by tensor."""
    assert one.names == other.names
    assert torch.equal(one.rows, other.rows)
    for mine, yours in zip(one.micro_batches, other.micro_batches, strict=True):
        for tensor, same in zip(mine, yours, strict=True):
            assert (tensor is None and same is None) or (tensor.dtype == same.dtype and torch.equal(tensor, same))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("world", "dialogues", "tokens"),
    [(1, 0, 0), (1, 2, 0), (2, 2, 0), (3, 0, 0), (4, 1, 0), (2, 1, 0), (1, 3, 0), (1, 0, 90), (2, 3, 90), (3, 0, 1)],
)
def test_step_rows_are_the_rows_of_all_parts(data, world, dialogues, tokens, packed):
    store = data.prepared.fused
    longest = int(store.lengths.max())
    seen, limits = 0, Limits(dialogues, tokens, packed)
    for shares in steps_of(store, world, limits):
        assert len({len(share.micro_batches) for share in shares}) == 1
        parts = [part for share in shares for part in share.micro_batches]
        rows = sum(int(part.weights_RK[:, 0].sum()) for part in parts)  # idle parts have no weight
        assert {int(share.rows) for share in shares} == {rows}
        assert all(part.ids_BT.numel() <= max(tokens or 8 * longest, longest) for part in parts)
        if not packed:
            assert all(len(part.ids_BT) <= (dialogues or 8) for part in parts)
        seen += rows
    assert seen == 2 * store.num_rows.sum()


@pytest.mark.parametrize("packed", [False, True])
def test_every_row_carries_its_reference_and_its_distribution(data, packed):
    store = data.prepared.fused
    place_of = {name: number for number, name in enumerate(store.examples)}
    for (share,) in steps_of(store, 1, Limits(packed=packed)):
        (batch,) = share.micro_batches
        flat = batch.ids_BT.flatten()
        assert (flat[batch.rows_R + 1] == batch.targets_RK[:, 0]).all()
        assert (batch.weights_RK[:, 0] == 1).all()
        torch.testing.assert_close(batch.weights_RK[:, 1:].sum(1), torch.ones(len(batch.rows_R)))
        assert batch.weights_RK.dtype == torch.float32
        assert batch.targets_RK.dtype == batch.rows_R.dtype == batch.mask_BT.dtype == torch.int64
        row = start = 0
        for number, name in enumerate(share.names):
            example = store[place_of[name]]
            length = len(example.ids_N)
            start = start if packed else number * batch.ids_BT.shape[1]
            assert (flat[start : start + length].numpy() == example.ids_N).all()
            assert batch.mask_BT.flatten()[start : start + length].all()
            if packed:
                assert batch.positions_BT[0, start : start + length].tolist() == list(range(length))
            for place, position in enumerate(example.rows_R):
                assert batch.rows_R[row] == start + position
                entries = slice(*example.targets.indptr_R[place : place + 2])
                weights = batch.weights_RK[row, 1:].numpy()
                assert (weights[weights > 0] == example.targets.weights_E[entries]).all()
                assert (batch.targets_RK[row, 1:].numpy()[weights > 0] == example.targets.ids_E[entries]).all()
                row += 1
            start += length
        assert row == len(batch.rows_R)
        assert batch.mask_BT.sum() == store.lengths[[place_of[name] for name in share.names]].sum()
        assert (batch.positions_BT is not None) == packed


def test_steps_do_not_depend_on_what_was_read_before(data):
    store = data.prepared.fused
    plan = make_plan(store.lengths, 8, 2, 3, 1)
    steps = Steps(store, plan, 1, 0, Limits(2))
    forwards = [steps[number] for number in range(len(steps))]
    later = Steps(store, plan, 1, 0, Limits(2), first=2)
    for number in reversed(range(len(later))):
        assert_equal(later[number], forwards[number + 2])


def test_a_batch_and_a_store_travel_to_other_processes(data):
    store = data.prepared.fused
    assert store[0].ids_N.size  # its files are mapped by now
    again = pickle.loads(pickle.dumps(store))
    assert len(pickle.dumps(store)) < 1000  # the folder's name, not what is in it
    for packed in (False, True):
        batch = collate([again[0], again[1]], again.form, packed)
        copy = pickle.loads(pickle.dumps(batch))
        assert isinstance(copy, type(batch))
        same = collate([store[0], store[1]], store.form, packed)
        assert all(one is other is None or torch.equal(one, other) for one, other in zip(copy, same, strict=True))


@pytest.mark.parametrize("changes", [{}, {"micro_batch_tokens": 120, "packing": True}, {"micro_batch_size": 1}])
def test_steps_are_the_same_for_any_number_of_workers(data, changes):
    loaded = []
    for workers in (0, 1, 2):
        trainer = TrainerConfig(epochs=3, batch_size=5, data_workers=workers, **changes)
        module = FusionDataModule(replace(data.config, trainer=trainer))
        module.prepared, module.first_step = data.prepared, 2
        loader = module.train_dataloader()
        assert loader.num_workers == workers
        assert loader.persistent_workers == (workers > 0)
        loaded.append(list(loader))
    alone, *others = loaded
    assert len(alone) == module.total_steps - 2
    for steps in others:
        for one, other in zip(alone, steps, strict=True):
            assert_equal(one, other)


def test_many_parts_need_few_file_descriptors(data):
    """As torch sends tensors, each would have a descriptor of its own for as long as it lives."""
    before = len(os.listdir("/dev/fd"))
    module = with_trainer(data, epochs=4, batch_size=16, micro_batch_size=1, data_workers=1)
    steps = list(module.train_dataloader())
    tensors = sum(len(step.micro_batches) * 5 for step in steps)
    assert tensors == 5 * 4 * len(data.prepared.fused) >= 300
    assert len(os.listdir("/dev/fd")) - before < 20


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
    loader = with_trainer(data, epochs=2, batch_size=batch_size, micro_batch_size=micro).train_dataloader()
    assert max(len(step.micro_batches) for step in loader) == parts


@pytest.mark.parametrize("packing", [False, True])
def test_a_budget_of_tokens_bounds_every_part(data, packing):
    lengths = data.prepared.fused.lengths
    budget = 2 * int(lengths.max())
    module = with_trainer(data, epochs=2, batch_size=8, micro_batch_tokens=budget, packing=packing)
    parts = [part for step in module.train_dataloader() for part in step.micro_batches]
    assert max(part.ids_BT.numel() for part in parts) <= budget
    read = sum(int(part.mask_BT.sum()) for part in parts)
    assert read == module.tokens_trained(module.total_steps)
    assert len(parts) < 1.6 * read / budget + module.total_steps
    if packing:
        assert sum(part.ids_BT.numel() for part in parts) == read  # no padding


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
