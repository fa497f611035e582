"""Adapters: they alone learn, they start without effect, and the folder that is left is an ordinary model's."""

import importlib.util
import sys
from dataclasses import replace

import pytest
import torch
from parallel_fits import run_fits
from safetensors.torch import load_file
from stage1_settings import settings
from tiny_models import make_llama, make_qwen, make_tokenizer
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from fusion.config import UserError
from fusion.config.schema import LoraConfig, ObjectiveConfig, OptimConfig, ParallelConfig, TrainerConfig
from fusion.training.data import FusionDataModule
from fusion.training.export import export_model
from fusion.training.fit import fit
from fusion.training.lora import adapted_layers, add_adapters, merge_adapters
from fusion.training.module import FusionModule

LORA = LoraConfig(rank=4, alpha=8.0)
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_pivot, tiny_source):
    module = FusionDataModule(settings(tmp_path_factory.mktemp("lora"), tiny_pivot, tiny_source))
    module.setup()
    return module


def train(data, lora=LORA, objective=None, **changes):
    trainer = TrainerConfig(**{"epochs": 1, "batch_size": 8, "progress_bar": False, "log_every_steps": 1, **changes})
    objective = objective or data.config.objective
    optim = OptimConfig(lr=1e-2, grad_clip=1.0, weight_decay=0.1)
    module = FusionDataModule(replace(data.config, trainer=trainer, lora=lora, objective=objective, optim=optim))
    module.prepared = data.prepared
    return fit(module.config, module, [])


def adapted(model, lora=LORA, seed=0):
    """`model` with adapters that have an effect."""
    add_adapters(model, lora, seed)
    draw = torch.Generator().manual_seed(1)
    for name, one in model.named_parameters():
        if "lora_B" in name:
            one.data.normal_(0, 0.3, generator=draw)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 13)[None]).logits


def pivot_weights(data):
    return AutoModelForCausalLM.from_pretrained(data.config.pivot.path).state_dict()


def test_the_first_loss_is_that_of_the_pivot(data):
    whole, adapters = train(data, LoraConfig(), max_steps=1), train(data, max_steps=1)
    for name in ("loss", "ce", "fusion"):
        assert adapters.metrics[f"train/{name}"] == whole.metrics[f"train/{name}"]


@pytest.mark.parametrize(
    "objective", [ObjectiveConfig(ce_weight=0.3), ObjectiveConfig(name="sft")], ids=["fusion", "sft"]
)
def test_training_changes_adapters_and_nothing_else(data, monkeypatch, objective):
    seen = {}

    def keep(module, optimizer):
        trained = {id(one) for group in optimizer.param_groups for one in group["params"]}
        for name, one in module.model.named_parameters():
            assert ("lora_" in name) == (id(one) in trained) == one.requires_grad == (one.grad is not None), name

    def keep_weights(module):
        seen.update({name: one.detach().clone() for name, one in module.model.named_parameters()})

    monkeypatch.setattr(FusionModule, "on_before_optimizer_step", keep)
    monkeypatch.setattr(FusionModule, "on_train_end", keep_weights)
    fitted = train(data, objective=objective)
    assert fitted.steps == 2
    before = pivot_weights(data)
    for name, weight in seen.items():
        if "lora_" not in name:
            assert torch.equal(weight, before[name.replace("base_layer.", "")]), name
    assert min(weight.abs().max() for name, weight in seen.items() if "lora_B" in name) > 0


def test_the_trained_model_is_the_pivots_class_with_other_projections(data):
    model = train(data).model
    assert type(model) is LlamaForCausalLM
    before, after = pivot_weights(data), model.state_dict()
    assert list(after) == list(before)
    for name in before:
        assert torch.equal(after[name], before[name]) == (name.split(".")[-2] not in PROJECTIONS), name


def test_equal_seeds_train_equal_models_however_steps_are_cut(data):
    first, second = (train(data).model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    for cut in ({"gradient_checkpointing": True}, {"micro_batch_size": 3, "packing": True}):
        other = train(data, **cut).model.state_dict()
        for name in first:
            torch.testing.assert_close(other[name], first[name], rtol=1e-4, atol=1e-5)


def test_dropout_and_chosen_modules_train(data):
    fitted = train(data, LoraConfig(rank=2, dropout=0.5, modules=["layers.1.mlp.down_proj"]))
    before = pivot_weights(data)
    changed = [name for name, one in fitted.model.state_dict().items() if not torch.equal(one, before[name])]
    assert changed == ["model.layers.1.mlp.down_proj.weight"]


def test_the_draws_belong_to_the_seed():
    def adapters(seed):
        model = make_llama(60)
        add_adapters(model, LORA, seed)
        return [one for name, one in model.named_parameters() if "lora_A" in name]

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, other = adapters(0), adapters(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert all(map(torch.equal, first, adapters(0)))
    assert not any(map(torch.equal, first, other))
    assert all(one.any() for one in first)


def make_gpt2(vocab_size):
    """A model whose linear layers keep their weights the other way round."""
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, bos_token_id=0, eos_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


@pytest.mark.parametrize("make", [make_llama, make_qwen, make_gpt2])
def test_the_merged_folder_says_what_the_adapted_model_said(tmp_path, monkeypatch, make):
    tokenizer = make_tokenizer("byte_level", "chatml")
    model = make(len(tokenizer))
    names, pivot = list(model.state_dict()), logits(model)
    wanted = logits(adapted(model))
    assert (wanted - pivot).abs().max() > 0.1
    merge_adapters(model)
    assert list(model.state_dict()) == names
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    export_model(model, tokenizer, tmp_path / "model", torch.float32, "card")
    monkeypatch.setitem(sys.modules, "peft", None)  # whoever loads the folder need not have it
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded), wanted, rtol=1e-4, atol=1e-4)
    assert not any("lora" in name or "base_layer" in name for name in load_file(tmp_path / "model/model.safetensors"))
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "model").iterdir()}


def test_alpha_over_rank_scales_what_adapters_add():
    deltas = []
    for alpha in (4.0, 12.0):
        model = adapted(make_llama(60), LoraConfig(rank=4, alpha=alpha))
        merge_adapters(model)
        deltas.append(model.model.layers[0].mlp.up_proj.weight - make_llama(60).model.layers[0].mlp.up_proj.weight)
    torch.testing.assert_close(deltas[1], 3 * deltas[0], rtol=1e-4, atol=1e-6)


def test_modules_are_named_by_their_ends():
    model = make_llama(60)
    every = adapted_layers(model, ["all-linear"])
    assert len(every) == 2 * len(PROJECTIONS)
    assert "lm_head" not in every
    assert adapted_layers(model, ["layers.0.self_attn.q_proj"]) == ["model.layers.0.self_attn.q_proj"]
    found = adapted_layers(model, ["v_proj", "mlp.down_proj"])
    assert found == [f"model.layers.{n}.{one}" for n in (0, 1) for one in ("self_attn.v_proj", "mlp.down_proj")]


def test_modules_that_are_not_there_are_told_of_together():
    with pytest.raises(UserError) as raised:
        adapted_layers(make_llama(60), ["q_prj", "v_proj", "proj", "lm_head", "all-linear"])
    told = raised.value.problems
    assert [problem.split(":")[0] for problem in told] == [
        f"lora.modules={name}" for name in ("q_prj", "proj", "lm_head", "all-linear")
    ]
    assert "did you mean q_proj?" in told[0]
    assert "(there are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj)" in told[0]
    with pytest.raises(UserError, match=r"lora\.modules is empty"):
        adapted_layers(make_llama(60), [])


def test_without_peft_the_message_says_how_to_get_it(monkeypatch):
    model = make_llama(60)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"lora\.rank=4: the package peft is missing; pip install 'fusion-chat\[lora\]'"
    ):
        add_adapters(model, LORA, 0)
    assert all(one.requires_grad for one in model.parameters())


def test_two_processes_train_the_adapters_of_one(tmp_path, data):
    """DDP and FSDP2, packed and padded: the loss of every step within 1e-5, weights within 1e-4."""
    optim = OptimConfig(lr=1e-2, grad_clip=0.5)
    alone = TrainerConfig(epochs=2, batch_size=8, progress_bar=False, log_every_steps=1)
    cuts = {"ddp": {"micro_batch_size": 2}, "fsdp": {"micro_batch_tokens": 90, "packing": True}}
    configs = {
        name: replace(
            data.config,
            lora=LORA,
            optim=optim,
            trainer=replace(alone, **cut),
            parallel=ParallelConfig(name=name, devices=2, accelerator="cpu"),
        )
        for name, cut in cuts.items()
    }
    single = replace(configs["ddp"], parallel=ParallelConfig(), trainer=alone)
    module = FusionDataModule(single)
    module.prepared = data.prepared
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModule, "on_before_optimizer_step", lambda one, _: losses.append(float(one.outcome.loss)))
        wanted = fit(single, module, []).model.state_dict()
    for name, found in run_fits(tmp_path, data, configs).items():
        assert found.losses == pytest.approx(losses, rel=1e-5), name
        loaded = AutoModelForCausalLM.from_pretrained(found.model).state_dict()
        assert list(loaded) == list(wanted)
        for weight in wanted:
            torch.testing.assert_close(loaded[weight], wanted[weight], rtol=1e-4, atol=1e-4)
