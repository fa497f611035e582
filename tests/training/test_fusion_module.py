"""The module's gradient is the paper's formula over the whole step, however the step is cut."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage1_settings import settings
from tiny_models import make_llama, make_tokenizer, save
from transformers import AutoModelForCausalLM

from fusion.config.schema import ObjectiveConfig, OptimConfig, TrainerConfig
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.module import FusionModule
from fusion.training.schedule import learning_rate


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("fit"), tiny_pivot, tiny_source))
    module.setup()
    return module


def with_settings(data, **changes):
    module = FusionDataModule(replace(data.config, **changes))
    module.prepared = data.prepared
    return module


def one_step(**changes):
    return TrainerConfig(epochs=1, batch_size=8, max_steps=1, progress_bar=False, **changes)


@pytest.fixture
def gradients(data, monkeypatch):
    """Run the first optimiser step and return the gradients that the optimiser saw."""

    def run(**changes):
        seen = {}

        def keep(module, optimizer):
            seen.update({name: one.grad.clone() for name, one in module.model.named_parameters()})

        monkeypatch.setattr(FusionModule, "on_before_optimizer_step", keep)
        module = with_settings(data, **changes)
        assert fit(module.config, module, []).steps == 1
        return seen

    return run


def reference(data, ce_weight, fused=True):
    """The same by dense formulas, dialogue by dialogue, in double precision."""
    model = AutoModelForCausalLM.from_pretrained(data.config.pivot.path, dtype=torch.float64).eval()
    store = data.prepared.fused
    total = torch.zeros((), dtype=torch.float64)
    numbers = with_settings(data, trainer=one_step()).plan.step(0)
    for number in numbers:
        example = store[int(number)]
        ids = torch.from_numpy(example.ids_N.astype("int64"))
        logprobs = model(ids[None]).logits[0].log_softmax(-1)
        for place, row in enumerate(example.rows_R):
            total -= ce_weight * logprobs[row, ids[row + 1]]
            entries = slice(*example.targets.indptr_R[place : place + 2])
            for token, weight in zip(example.targets.ids_E[entries], example.targets.weights_E[entries], strict=True):
                total -= fused * (1 - ce_weight) * float(weight) * logprobs[row, int(token)]
    (total / store.num_rows[numbers].sum()).backward()
    return {name: one.grad for name, one in model.named_parameters()}


def assert_same(found, wanted, tolerance=1e-5):
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        error = (found[name].double() - gradient.double()).norm() / gradient.double().norm()
        assert error < tolerance, f"{name}: {error}"


CUTS = [
    {"micro_batch_size": 8},
    {"micro_batch_size": 4},
    {"micro_batch_size": 3},
    {"micro_batch_size": 1},
    {"micro_batch_tokens": 90},
    {"micro_batch_tokens": 1},
    {"micro_batch_size": 2, "micro_batch_tokens": 70},
    {"packing": True},
    {"packing": True, "micro_batch_size": 3},
    {"packing": True, "micro_batch_tokens": 90, "gradient_checkpointing": True},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_one_step_is_the_papers_gradient_however_it_is_cut(data, gradients, cut):
    assert_same(gradients(trainer=one_step(**cut)), reference(data, 0.3))


@pytest.mark.parametrize(
    "optim", [OptimConfig(lr=1e-2, grad_clip=0.0), OptimConfig(lr=1e-3, grad_clip=0.1)], ids=["free", "clipped"]
)
def test_the_loss_runs_the_same_way_however_steps_are_cut(data, monkeypatch, optim):
    """Relative 1e-4 over 8 steps in float32: Adam divides by small second moments, so rounding grows."""

    def losses(**cut):
        seen = []
        monkeypatch.setattr(
            FusionModule, "on_before_optimizer_step", lambda module, _: seen.append(float(module.outcome.loss))
        )
        trainer = TrainerConfig(epochs=4, batch_size=8, progress_bar=False, **cut)
        module = with_settings(data, trainer=trainer, optim=optim)
        fit(module.config, module, [])
        return seen

    whole = losses()
    assert len(whole) == 8
    assert whole[-1] < 0.95 * whole[0]
    for cut in (*CUTS[2:], {"data_workers": 1, "packing": True, "micro_batch_size": 3}):
        assert losses(**cut) == pytest.approx(whole, rel=1e-4), cut


def test_chunks_and_checkpointing_change_nothing(data, gradients):
    whole = gradients(trainer=one_step())
    assert_same(gradients(trainer=one_step(), objective=ObjectiveConfig(ce_weight=0.3, chunk_rows=5)), whole)
    assert_same(gradients(trainer=one_step(gradient_checkpointing=True)), whole)


def test_sft_and_a_weight_of_one_learn_references_alone(data, gradients):
    wanted = reference(data, 1.0, fused=False)
    assert_same(gradients(trainer=one_step(), objective=ObjectiveConfig(name="sft", ce_weight=0.3)), wanted)
    assert_same(gradients(trainer=one_step(), objective=ObjectiveConfig(ce_weight=1.0)), wanted)


def test_a_weight_of_zero_learns_distributions_alone(data, gradients):
    assert_same(gradients(trainer=one_step(), objective=ObjectiveConfig(ce_weight=0.0)), reference(data, 0.0))


def test_mixed_precision_is_close(data, gradients):
    assert_same(gradients(trainer=one_step(precision="bf16-mixed")), reference(data, 0.3), tolerance=0.2)


def weights(fitted):
    return {name: one.detach().clone() for name, one in fitted.model.named_parameters()}


def test_equal_seeds_train_equal_models(data):
    module = with_settings(data, trainer=TrainerConfig(epochs=2, batch_size=4, progress_bar=False))
    first, second = (weights(fit(module.config, module, [])) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = with_settings(data, trainer=module.config.trainer, seed=1)
    third = weights(fit(other.config, other, []))
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_training_lowers_the_loss_and_leaves_the_pivot_alone(data):
    module = with_settings(data, trainer=TrainerConfig(epochs=8, batch_size=8, progress_bar=False, log_every_steps=1))
    fitted = fit(module.config, module, [])
    short = with_settings(data, trainer=one_step(log_every_steps=1))
    before = fit(short.config, short, []).metrics
    assert fitted.steps == module.total_steps == 8 * module.plan.steps_per_epoch
    assert fitted.metrics["train/loss"] < before["train/loss"]
    mixed = 0.3 * before["train/ce"] + 0.7 * before["train/fusion"]
    assert before["train/loss"] == pytest.approx(mixed, rel=1e-5)
    assert fitted.seconds > 0
    again = fit(short.config, short, []).metrics
    assert again["train/loss"] == before["train/loss"]


def test_a_step_of_a_low_precision_pivot_is_not_rounded_away(data, tmp_path):
    tokenizer = make_tokenizer("metaspace", "openchat")
    low = save(tmp_path / "low", make_llama(len(tokenizer)).bfloat16(), tokenizer, "pivot")
    module = with_settings(
        data,
        pivot=replace(low, dtype="bfloat16"),
        optim=OptimConfig(lr=1e-6, grad_clip=0.0, warmup_fraction=0.0),
        trainer=one_step(),
    )
    trained = weights(fit(module.config, module, []))
    stored = AutoModelForCausalLM.from_pretrained(low.path, dtype=torch.float32).state_dict()
    moved = [(trained[name] != stored[name]).float().mean().item() for name in trained]
    assert min(moved) > 0.1  # in bfloat16 a step of 1e-6 would change next to nothing


def test_only_matrices_decay(data):
    module = FusionModule(replace(data.config, optim=OptimConfig(weight_decay=0.1, betas=[0.8, 0.9])), 10)
    module.configure_model()
    module.configure_model()  # Lightning does it again
    matrices, others = module.configure_optimizers()["optimizer"].param_groups
    assert (matrices["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert all(one.ndim >= 2 for one in matrices["params"])
    assert all(one.ndim < 2 for one in others["params"])
    assert len(matrices["params"]) + len(others["params"]) == len(list(module.parameters()))
    assert matrices["betas"] == (0.8, 0.9)
    assert module.model.training


schedules = st.builds(
    OptimConfig,
    schedule=st.sampled_from(["cosine", "linear", "constant"]),
    warmup_fraction=st.floats(0, 1),
    final_lr_fraction=st.floats(0, 1),
)


@given(schedules, st.integers(1, 300))
def test_the_learning_rate_rises_to_its_peak_and_falls(optim, steps):
    rates = [learning_rate(optim, steps)(step) for step in range(steps)]
    assert max(rates) == pytest.approx(1.0)
    assert all(0 < rate <= 1 + 1e-12 for rate in rates) or optim.final_lr_fraction < 1e-9
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rates[peak:], rates[peak + 1 :], strict=False))
    assert all(rate >= optim.final_lr_fraction - 1e-12 for rate in rates[peak:])
    assert learning_rate(optim, steps)(10 * steps) == pytest.approx(
        1.0 if optim.schedule == "constant" else optim.final_lr_fraction
    )


def test_a_known_schedule():
    factor = learning_rate(OptimConfig(schedule="cosine", warmup_fraction=0.2, final_lr_fraction=0.1), 10)
    assert [factor(0), factor(1), factor(2)] == [0.5, 1.0, 1.0]
    assert factor(6) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    linear = learning_rate(OptimConfig(schedule="linear", warmup_fraction=0.0), 5)
    assert linear(3) == pytest.approx(0.5)
