"""A training step is what transformers' logits and a dense loss give: heads that scale or cap, all divergences."""

from dataclasses import replace

import pytest
import torch
from dense_losses import stage1_loss_of_logits
from scaled_heads import MODELS, make
from stage1_settings import settings
from tiny_models import make_llama, make_tokenizer, save
from transformers import AutoModelForCausalLM, Gemma2ForCausalLM

from fusion.alignment.target_kind import TargetKind
from fusion.config import UserError
from fusion.config.schema import ObjectiveConfig, TrainConfig, TrainerConfig
from fusion.objective.divergence import Divergence
from fusion.objective.model_head import has_known_head, read_head
from fusion.objective.target_form import TargetForm
from fusion.objective.target_loss import Targets
from fusion.teaching.causal_lm import has_plain_head
from fusion.training.batches import collate
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.module import FusionModule

PADDED = 64
"""Rows of the pivots' heads beyond their tokeniser's ids."""
CE_WEIGHT = 0.3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("heads")


@pytest.fixture(scope="module")
def pivots(folder):
    """Settings of a pivot of that architecture, with the tokeniser of `tiny_pivot`."""
    tokenizer, made = make_tokenizer("metaspace", "openchat"), {}

    def settings_of(name):
        if name not in made:
            made[name] = save(folder / name, make(name, len(tokenizer) + PADDED), tokenizer, name)
        return made[name]

    return settings_of


@pytest.fixture(scope="module")
def prepared(folder, tiny_pivot, tiny_source):
    """Real targets of either tail."""

    def prepare(tail):
        config = settings(folder, tiny_pivot, tiny_source)
        module = FusionDataModule(replace(config, alignment=replace(config.alignment, tail=tail)))
        module.setup()
        return module

    return {tail: prepare(tail) for tail in ("scale", "bucket")}


def first_step(data, monkeypatch, **changes):
    """Gradients that the optimiser saw, and the logged metrics."""
    seen = {}

    def keep(module, optimizer):
        seen.update({name: one.grad.clone() for name, one in module.model.named_parameters()})

    trainer = TrainerConfig(epochs=1, batch_size=8, micro_batch_size=3, max_steps=1, progress_bar=False)
    monkeypatch.setattr(FusionModule, "on_before_optimizer_step", keep)
    module = FusionDataModule(replace(data.config, trainer=replace(trainer, log_every_steps=1), **changes))
    module.prepared = data.prepared
    return seen, fit(module.config, module, []).metrics


def dense_step(data, pivot, divergence):
    """The same in double precision, from the logits that the model gives of every dialogue."""
    model = AutoModelForCausalLM.from_pretrained(pivot.path, dtype=torch.float64).eval()
    store = data.prepared.fused
    numbers = FusionDataModule.plan.fget(data).step(0)
    sums = []
    for number in numbers:
        batch = collate([store[int(number)]], store.form)
        logits = model(batch.ids_BT, attention_mask=batch.mask_BT).logits[0, batch.rows_R]
        targets = Targets(batch.targets_RK, batch.weights_RK.double())
        sums.append(torch.stack(stage1_loss_of_logits(logits, targets, store.form, CE_WEIGHT, divergence)))
    means = torch.stack(sums).sum(0) / int(store.num_rows[numbers].sum())
    means[0].backward()
    return {name: one.grad for name, one in model.named_parameters()}, means.detach()


def assert_same_step(found, wanted, tolerance=2e-5):
    (gradients, metrics), (expected, means) = found, wanted
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        error = (gradients[name].double() - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error}"
    for name, value in zip(("loss", "ce", "fusion"), means.tolist(), strict=True):
        assert metrics[f"train/{name}"] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_pivot_that_scales_or_caps_its_logits(name, pivots, prepared, monkeypatch):
    pivot = pivots(name)
    assert not has_plain_head(make(name, 100))
    found = first_step(prepared["scale"], monkeypatch, pivot=pivot)
    assert_same_step(found, dense_step(prepared["scale"], pivot, Divergence()))


@pytest.mark.parametrize("tail", ["scale", "bucket"])
@pytest.mark.parametrize(("name", "temperature"), [("forward_kl", 2.0), ("reverse_kl", 1.0), ("jsd", 0.5)])
def test_every_divergence(name, temperature, tail, prepared, monkeypatch):
    data = prepared[tail]
    objective = ObjectiveConfig(ce_weight=CE_WEIGHT, divergence=name, temperature=temperature)
    found = first_step(data, monkeypatch, objective=objective)
    assert_same_step(found, dense_step(data, data.config.pivot, Divergence(name, temperature)), 1e-4)


def test_a_divergence_over_capped_logits(pivots, prepared, monkeypatch):
    objective = ObjectiveConfig(ce_weight=CE_WEIGHT, divergence="jsd", temperature=2.0, chunk_rows=5)
    found = first_step(prepared["bucket"], monkeypatch, pivot=pivots("gemma2"), objective=objective)
    assert_same_step(found, dense_step(prepared["bucket"], pivots("gemma2"), Divergence("jsd", 2.0)), 1e-4)


@pytest.mark.parametrize("objective", [ObjectiveConfig(divergence="jsd"), ObjectiveConfig(temperature=3.0)], ids=str)
def test_targets_are_the_same_whatever_the_divergence(objective, prepared):
    data = prepared["scale"]
    other = FusionDataModule(replace(data.config, objective=objective))
    other.setup()
    assert other.prepared.fused.folder == data.prepared.fused.folder
    assert other.config.recipe() != data.config.recipe()


@pytest.mark.parametrize("kind", ["ranks", "spans"])
def test_targets_that_are_no_distributions_refuse_a_divergence(kind):
    form = TargetForm(TargetKind(kind))
    form.refuse_divergence("forward_kl", 1.0)
    TargetForm().refuse_divergence("jsd", 2.0)
    with pytest.raises(UserError, match=rf"objective.divergence=jsd, .*targets are {kind}, which have a distance"):
        form.refuse_divergence("jsd", 1.0)
    with pytest.raises(UserError, match=r"objective.temperature=2"):
        form.refuse_divergence("forward_kl", 2.0)


def test_preparing_refuses_it_too(folder, tiny_pivot, tiny_source):
    config = settings(folder, tiny_pivot, tiny_source, objective=ObjectiveConfig(divergence="reverse_kl"))
    uld = replace(config.alignment, name="uld")
    with pytest.raises(UserError, match="leave both out, or use another alignment"):
        FusionDataModule(replace(config, alignment=uld)).setup()
    sft = replace(config, alignment=uld, objective=ObjectiveConfig(name="sft"))
    FusionDataModule(sft).setup()


def test_what_a_config_says_is_read():
    assert read_head(make_llama(50))[2:] == (1.0, None)
    found = {name: read_head(make(name, 50))[2:] for name in MODELS}
    assert found["gemma2"] == (1.0, 5.0)
    assert found["granite"] == (pytest.approx(1 / 3), None)
    assert found["cohere"] == (0.3, None)
    assert found["falcon_h1"] == (0.2, None)


def test_a_pivot_that_does_more_to_its_logits_is_refused(pivots, monkeypatch, tmp_path):
    plain = Gemma2ForCausalLM.forward

    def shifted(self, *arguments, **named):
        outputs = plain(self, *arguments, **named)
        outputs.logits = outputs.logits + torch.arange(outputs.logits.shape[-1]).remainder(7)
        return outputs

    assert has_known_head(make("gemma2", 50))
    monkeypatch.setattr(Gemma2ForCausalLM, "forward", shifted)
    module = FusionModule(TrainConfig(pivot=pivots("gemma2")), 1)
    with pytest.raises(UserError, match="pivot gemma2: Gemma2ForCausalLM does more to its logits than the objective"):
        module.configure_model()
