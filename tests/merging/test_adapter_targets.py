"""LoRA adapters as targets: the same merge as with the models that peft makes of them."""

import json
from dataclasses import replace

import pytest
import torch
from merge_inputs import save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fusion.config import UserError
from fusion.config.schema import MergeConfig, PathsConfig
from fusion.merging import merge_folders
from fusion.merging.checkpoints.checkpoint import open_checkpoint
from fusion.merging.targets import open_target
from fusion.merging.verify import main as verify
from fusion.tracking.inputs import find_inputs


def llama(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).to(dtype)


def gpt2(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)).to(dtype)


KINDS = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 6}),
    "stabilised": (llama, {"target_modules": "all-linear", "r": 3, "lora_alpha": 4, "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj", "v_proj"],
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"layers.0.mlp.up_proj": 2, "q_proj": 5},
            "alpha_pattern": {"up_proj": 3, "^model.layers.1.self_attn.v_proj": 7},
        },
    ),
    "embeddings": (llama, {"target_modules": ["embed_tokens", "k_proj"], "r": 4, "lora_alpha": 8}),
    "saved": (llama, {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"], "r": 2}),
    "transposed": (gpt2, {"target_modules": ["c_attn", "c_fc"], "r": 4, "lora_alpha": 8, "fan_in_fan_out": True}),
}


def adapted(tmp_path, kind, seed, dtype=torch.float32):
    """Folders of an adapter with random factors, and of the model into which peft merges it."""
    make, settings = KINDS[kind]
    model = get_peft_model(make(dtype=dtype), LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.1
    adapter, merged = tmp_path / f"adapter_{seed}", tmp_path / f"merged_{seed}"
    model.save_pretrained(adapter)
    model.merge_and_unload().save_pretrained(merged)
    return adapter, merged


def saved_base(tmp_path, kind, dtype=torch.float32):
    KINDS[kind][0](dtype=dtype).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_merged_model(tmp_path, kind):
    base = open_checkpoint(saved_base(tmp_path, kind))
    adapter, merged = adapted(tmp_path, kind, 1)
    target, expected = open_target(adapter, base), open_checkpoint(merged)
    assert set(target) == set(expected)
    moved = [name for name in target if not torch.equal(target[name], base[name])]
    assert len(moved) >= 2
    assert target.specs == expected.specs
    for name in target:
        torch.testing.assert_close(target[name], expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "embeddings", "saved", "transposed"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_merging_adapters_is_merging_their_models(tmp_path, kind, method):
    base = saved_base(tmp_path, kind)
    adapters, models = zip(*(adapted(tmp_path, kind, seed) for seed in (1, 2)), strict=True)
    merge_folders(method, base, adapters, tmp_path / "out", weight=[0.3, 0.7])
    merge_folders(method, base, models, tmp_path / "expected", weight=[0.3, 0.7])
    merge_folders(method, base, [models[0], adapters[1]], tmp_path / "mixed", weight=[0.3, 0.7])
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    for out in ("out", "mixed"):
        found = load_file(tmp_path / out / "model.safetensors")
        assert set(found) == set(expected)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    assert verify([str(tmp_path / "out")]) == 0
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]["target 0"]["files"]
    assert set(listed) == {"adapter_config.json", "adapter_model.safetensors"}
    assert not list((tmp_path / "out").glob("adapter*"))


def test_bfloat16_is_rounded_once(tmp_path):
    base = open_checkpoint(saved_base(tmp_path, "plain", torch.bfloat16))
    adapter, merged = adapted(tmp_path, "plain", 1, torch.bfloat16)
    target, expected = open_target(adapter, base), open_checkpoint(merged)
    factors = load_file(adapter / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    a, b = (factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{which}.weight"] for which in "AB")
    exact = base[name].double() + 6 / 4 * b.double() @ a.double()
    assert torch.equal(target[name], exact.to(torch.bfloat16))
    assert target[name].dtype == torch.bfloat16
    torch.testing.assert_close(target[name], expected[name], rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 40), (16, 32), (37, 24 * 16)])
@pytest.mark.parametrize("kind", ["plain", "transposed"])
def test_any_span_is_that_of_the_whole(tmp_path, kind, start, stop):
    target = open_target(adapted(tmp_path, kind, 1)[0], open_checkpoint(saved_base(tmp_path, kind)))
    name = {"plain": "model.layers.0.mlp.down_proj.weight", "transposed": "transformer.h.0.mlp.c_fc.weight"}[kind]
    whole = target[name].reshape(-1)
    span = torch.empty(stop - start)
    target.homes[name].read_span(name, start, span)
    assert torch.equal(span, whole[start:stop])


def spoilt(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, ["IA3"]),
        ({"use_dora": True, "bias": "all"}, ["DoRA", "bias is all"]),
        ({"init_lora_weights": "pissa"}, ["pissa"]),
        ({"layer_replication": [[0, 2]], "r": 0}, ["layers are repeated", "r is 0"]),
        ({"r": 8}, ["do not fit rank 8"]),
    ],
)
def test_other_adapters_are_refused(tmp_path, changes, words):
    base = open_checkpoint(saved_base(tmp_path, "plain"))
    adapter, _ = adapted(tmp_path, "plain", 1)
    spoilt(adapter, **changes)
    with pytest.raises(UserError) as caught:
        open_target(adapter, base)
    for word in words:
        assert any(word in problem for problem in caught.value.problems), word


def test_an_adapter_must_fit_its_base(tmp_path):
    base = saved_base(tmp_path, "plain")
    adapter, _ = adapted(tmp_path, "plain", 1)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    lone = next(name for name in tensors if "lora_B" in name)
    left = {name: tensor for name, tensor in tensors.items() if name != lone}
    save_file(left | {"base_model.model.model.layers.9.mlp.weight": torch.ones(3)}, path)
    with pytest.raises(UserError) as caught:
        merge_folders("linear", base, [adapter], tmp_path / "out")
    text = str(caught.value)
    assert "one of its factors is missing" in text
    assert "layers.9" in text
    assert not (tmp_path / "out").exists()


def test_an_adapter_needs_a_base_and_is_none(tmp_path):
    base = saved_base(tmp_path, "plain")
    adapter, _ = adapted(tmp_path, "plain", 1)
    with pytest.raises(UserError, match="give the base"):
        merge_folders("linear", None, [adapter], tmp_path / "out")
    with pytest.raises(UserError, match="an adapter, not a model"):
        merge_folders("linear", adapter, [base], tmp_path / "out")
    with pytest.raises(UserError) as caught:
        merge_folders("linear", tmp_path / "none", [adapter], tmp_path / "out")
    assert [problem for problem in caught.value.problems if "target" in problem] == []
    other = save_model(tmp_path / "other", {"w": torch.ones(2, 2)})
    with pytest.raises(UserError, match="the base lacks it"):
        merge_folders("linear", other, [adapter], tmp_path / "out")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled adapters are refused"):
        merge_folders("linear", base, [adapter], tmp_path / "out")


def test_stage_two_finds_adapters(tmp_path):
    adapter, _ = adapted(tmp_path, "plain", 1)
    config = MergeConfig(targets=[str(adapter)], base=str(saved_base(tmp_path, "plain")))
    inputs = find_inputs(replace(config, paths=PathsConfig(runs=str(tmp_path / "runs"))))
    assert [target.path for target in inputs.targets] == [adapter]
