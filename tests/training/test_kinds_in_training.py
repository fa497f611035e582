"""Every kind of targets is trained on with its own loss, however a step is cut into micro-batches."""

from dataclasses import replace

import pytest
import torch
from fake_alignment import fake_align_pair
from stage1_settings import settings
from transformers import AutoModelForCausalLM

from fusion.alignment.target_kind import TargetKind
from fusion.config.schema import FusionConfig, ObjectiveConfig, TrainerConfig
from fusion.objective.target_loss import Head, Targets, target_loss
from fusion.training.batches import collate, idle
from fusion.training.data import FusionDataModule
from fusion.training.fit import fit
from fusion.training.module import FusionModule

FORMS = {
    "bucket": (TargetKind(), "bucket"),
    "ranks": (TargetKind("ranks"), "scale"),
    "spans": (TargetKind("spans", 10.0), "scale"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(params=FORMS)
def data(request, folder, tiny_pivot, tiny_source, monkeypatch):
    kind, tail = FORMS[request.param]
    monkeypatch.setattr("fusion.training.prepare.align_pair", fake_align_pair(kind))
    config = settings(folder, tiny_pivot, tiny_source, fusion=FusionConfig(name="source_only"))
    config = replace(config, alignment=replace(config.alignment, tail=tail, fallback="skip"))
    module = FusionDataModule(config)
    module.setup()
    return module


def one_step(micro=0):
    return TrainerConfig(
        epochs=1, batch_size=8, max_steps=1, micro_batch_size=micro, progress_bar=False, log_every_steps=1
    )


def first_step(data, monkeypatch, **changes):
    """Gradients that the optimiser saw, and the logged metrics."""
    seen = {}

    def keep(module, optimizer):
        seen.update({name: one.grad.clone() for name, one in module.model.named_parameters()})

    monkeypatch.setattr(FusionModule, "on_before_optimizer_step", keep)
    module = FusionDataModule(replace(data.config, **changes))
    module.prepared = data.prepared
    return seen, fit(module.config, module, []).metrics


def one_by_one(data, ce_weight):
    """Loss and gradients of the first step in double precision, dialogue by dialogue, whose ids need no moving."""
    model = AutoModelForCausalLM.from_pretrained(data.config.pivot.path, dtype=torch.float64).eval()
    store = data.prepared.fused
    head = model.get_output_embeddings()
    numbers = FusionDataModule.plan.fget(data).step(0)
    parts = []
    for number in numbers:
        batch = collate([store[int(number)]], store.form)
        hidden = model.model(batch.ids_BT).last_hidden_state[0][batch.rows_R]
        targets = Targets(batch.targets_RK, batch.weights_RK.double())
        parts.append(target_loss(hidden, Head(head.weight, head.bias), targets, store.form, ce_weight))
    rows = int(store.num_rows[numbers].sum())
    (sum(part.loss for part in parts) / rows).backward()
    summed = {
        name: float(sum(getattr(part, name).detach() for part in parts)) / rows for name in ("loss", "ce", "fusion")
    }
    return {name: one.grad for name, one in model.named_parameters()}, summed


@pytest.mark.parametrize("micro", [0, 3, 1])
def test_one_step_is_the_sum_over_its_dialogues(data, monkeypatch, micro):
    wanted, parts = one_by_one(data, 0.3)
    found, metrics = first_step(data, monkeypatch, trainer=one_step(micro))
    for name, gradient in wanted.items():
        assert (found[name].double() - gradient).norm() < 2e-4 * gradient.norm(), name
    if not micro:
        for name, value in parts.items():
            assert metrics[f"train/{name}"] == pytest.approx(value, rel=1e-4)
    assert parts["fusion"] > 0


def test_sft_reads_no_fused_entry(data, monkeypatch):
    wanted, parts = one_by_one(data, 1.0)
    found, metrics = first_step(data, monkeypatch, trainer=one_step(), objective=ObjectiveConfig(name="sft"))
    for name, gradient in wanted.items():
        assert (found[name].double() - gradient).norm() < 1e-4 * gradient.norm(), name
    assert metrics["train/loss"] == metrics["train/ce"] == pytest.approx(parts["ce"], rel=1e-4)
    assert metrics["train/fusion"] == 0


def test_an_idle_batch_has_no_loss(data):
    store = data.prepared.fused
    batch = idle(collate([store[0], store[1]], store.form))
    hidden = torch.randn(len(batch.rows_R), 4, requires_grad=True)
    head = Head(torch.randn(int(batch.targets_RK.max()) + 1, 4, requires_grad=True))
    found = target_loss(hidden, head, Targets(batch.targets_RK, batch.weights_RK), store.form, 0.3)
    found.loss.backward()
    assert found.loss == found.ce == found.fusion == 0
    assert not hidden.grad.any()
    assert not head.weight_VH.grad.any()


@pytest.mark.parametrize("data", ["spans"], indirect=True)
def test_spans_of_different_dialogues_stay_apart(data):
    store = data.prepared.fused
    examples = [store[number] for number in range(4)]
    batch = collate(examples, store.form)
    used = batch.weights_RK[:, 1] > 0
    dialogue_R = torch.repeat_interleave(torch.arange(4), torch.tensor([len(one.rows_R) for one in examples]))
    spans = batch.targets_RK[:, 1][used]
    assert (dialogue_R[spans] == dialogue_R[used]).all()
    assert (spans <= torch.arange(len(used))[used]).all()
    counts = [len(set(one.targets.ids_E.tolist())) for one in examples]
    assert len(spans.unique()) == sum(counts)
