"""Numbers that are not finite stop a run before they reach the weights, and the dialogues at fault are named."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from stage1_settings import settings
from transformers import AutoModelForCausalLM

from fusion.config import UserError
from fusion.config.schema import ObjectiveConfig, OptimConfig, TrainerConfig
from fusion.objective.fused_store import FusedStore
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.module import FusionModule


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    """Steps of four or five dialogues, in micro-batches of two; the rate is the same in every step."""
    optim = OptimConfig(lr=1e-2, schedule="constant", warmup_fraction=0.0)
    trainer = TrainerConfig(batch_size=6, micro_batch_size=2, progress_bar=False)
    folder = tmp_path_factory.mktemp("fit")
    module = FusionDataModule(settings(folder, tiny_pivot, tiny_source, trainer=trainer, optim=optim))
    module.setup()
    return module


def with_settings(data, **changes):
    module = FusionDataModule(replace(data.config, **changes))
    module.prepared = data.prepared
    return module


def names_of(data, step):
    return [data.prepared.fused.examples[int(number)] for number in data.plan.step(step)]


@pytest.fixture
def modules(monkeypatch):
    """The modules that are trained, in order, to look at when training has failed."""
    seen = []
    whole = FusionModule.configure_model

    def configure_model(module):
        whole(module)
        seen.append(module)

    monkeypatch.setattr(FusionModule, "configure_model", configure_model)
    return seen


@pytest.fixture
def poison(monkeypatch):
    """Give the fused targets of a dialogue another weight."""
    whole = FusedStore.__getitem__
    bad = {}

    def read(store, number):
        example = whole(store, number)
        weight = bad.get(store.examples[number])
        if weight is None:
            return example
        weights_E = np.full_like(example.targets.weights_E, weight)
        return replace(example, targets=replace(example.targets, weights_E=weights_E))

    monkeypatch.setattr(FusedStore, "__getitem__", read)
    return lambda name, weight: bad.update({name: weight})


def stopped(module):
    with pytest.raises(UserError) as told:
        fit(module.config, module, [])
    (problem,) = told.value.problems
    return [line.strip() for line in problem.splitlines()]


def hashes(line):
    return re.findall(r"\b[0-9a-f]{16,}\b", line)


def weights(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def assert_equal_weights(found, wanted):
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("weight", [np.nan, np.inf])
def test_a_dialogue_with_bad_targets_is_named_and_nothing_is_learnt_from_it(data, modules, poison, weight):
    names = names_of(data, 0)
    name = names[3]
    poison(name, weight)
    told = stopped(data)
    assert re.match(r"step 1: the loss is (nan|inf) and the gradient norm (nan|inf); training stopped before", told[0])
    assert told[1].startswith(f"1 of the {len(names)} dialogues do this alone: ")
    assert hashes(told[1]) == [name]
    assert "GPT4 Correct User: Which" in told[1]
    assert told[2] == "what helps: a lower optim.lr (now 0.01), or a look at these dialogues"
    stored = AutoModelForCausalLM.from_pretrained(data.config.pivot.path, dtype=torch.float32)
    assert_equal_weights(weights(modules[0].model), weights(stored))


def test_the_weights_are_those_of_the_last_good_step(data, modules, poison):
    trainer = replace(data.config.trainer, max_steps=1)
    one_step = with_settings(data, trainer=trainer)
    good = weights(fit(one_step.config, one_step, []).model)
    names = sorted(set(names_of(data, 1)) - set(names_of(data, 0)))[:2]
    for name in names:
        poison(name, np.nan)
    told = stopped(data)
    assert told[0].startswith("step 2: ")
    assert hashes(told[1]) == names
    assert_equal_weights(weights(modules[-1].model), good)


def test_a_gradient_beyond_all_numbers_stops_training_though_the_loss_is_one(data, modules, poison):
    name = names_of(data, 0)[0]
    poison(name, 1e30)
    told = stopped(data)
    assert re.match(r"step 1: the loss is [\d.]+e\+\d+ and the gradient norm inf", told[0])
    assert hashes(told[1]) == [name]


def test_weights_that_were_bad_before_are_named_with_the_dialogues_that_read_them(data, modules, monkeypatch):
    """The embedding of a token that one dialogue of the step has: only that dialogue is at fault."""
    store, names = data.prepared.fused, names_of(data, 0)
    tokens = {name: set(store[store.examples.index(name)].ids_N.tolist()) for name in names}
    name, token = next(
        (name, min(own))
        for name in names
        if (own := tokens[name] - set().union(*(tokens[other] for other in names if other != name)))
    )
    whole = FusionModule.configure_model

    def configure_model(module):
        whole(module)
        module.model.get_input_embeddings().weight.data[token] = torch.nan

    monkeypatch.setattr(FusionModule, "configure_model", configure_model)
    told = stopped(data)
    assert told[1] == "weights that were not finite before it: model.embed_tokens.weight"
    assert hashes(told[2]) == [name]


def test_precision_is_a_remedy_where_it_is_low(data, poison):
    poison(names_of(data, 0)[0], np.nan)
    module = with_settings(data, trainer=replace(data.config.trainer, precision="bf16-mixed"))
    assert stopped(module)[2].endswith("or trainer.precision=32-true (now bf16-mixed)")


def test_many_dialogues_are_counted(data, modules, monkeypatch):
    monkeypatch.setattr("fusion.training.health.SHOWN", 2)
    module = with_settings(data, objective=ObjectiveConfig(ce_weight=float("nan")))
    told, names = stopped(module), names_of(data, 0)
    assert told[1].startswith(f"{len(names)} of the {len(names)} dialogues do this alone: ")
    assert hashes(told[1]) == sorted(names)[:2]
    assert told[1].endswith(f" and {len(names) - 2} more")


def test_what_no_dialogue_does_alone_is_said_of_all(data, modules, monkeypatch):
    whole = FusionModule._accumulate
    monkeypatch.setattr(FusionModule, "_accumulate", lambda module, step: whole(module, step) * torch.nan)
    told = stopped(data)
    assert told[1].startswith("no dialogue of the step does this alone, only together: ")
    assert hashes(told[1]) == sorted(names_of(data, 0))[:5]


def test_a_healthy_run_is_checked_once_per_step(data, monkeypatch):
    checks = []
    whole = torch.Tensor.isfinite
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda tensor: checks.append(tensor.shape) or whole(tensor))
    fitted = fit(data.config, data, [])
    assert checks == [torch.Size([])] * fitted.steps
