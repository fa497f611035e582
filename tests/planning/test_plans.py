"""`plan=true` answers from the settings alone: right numbers, at once, and a kind no where the job cannot fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from cpu_time import run_and_weigh, weight_of_hydra
from hydra import compose, initialize_config_dir
from tiny_models import make_llama, make_qwen, make_tokenizer, save
from transformers import AutoConfig, AutoModelForCausalLM

from fusion.config import UserError
from fusion.config.compose import CONFIG_FOLDER, SCHEMAS, register, to_settings
from fusion.config.schema import EngineConfig, LoraConfig, MergeConfig, ModelConfig
from fusion.config.world import WorldConfig
from fusion.dialogues.dialogue import chat, write_jsonl
from fusion.merging import MergeRequest, merge_folders
from fusion.merging.foreseen import foreseen
from fusion.planning.machine import Machine
from fusion.planning.shapes import guessed_parameters, model_shape
from fusion.planning.stage1 import Stage1Plan
from fusion.planning.stage2 import Stage2Plan

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 1 << 30
A100 = Machine(gpus=(40 * GIB,) * 8, memory=1000 * GIB)
SMALL = Machine(gpus=(24 * GIB,), memory=64 * GIB)
LAPTOP = Machine(gpus=(), memory=16 * GIB)


@cache
def settings(*overrides, entry="train"):
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return to_settings(compose(entry, overrides=list(overrides)), SCHEMAS[entry])


def plan(*overrides, machine=A100):
    return Stage1Plan.of(settings(*overrides), machine)


@pytest.mark.parametrize("name", ["fusechat_7b_v1", "fusechat_7b_v2", "fuse_small_gpu", "fuse_multi_node"])
def test_every_recipe_is_planned(name):
    text = plan(f"experiments={name}").text()
    for word in ("weights", "optimiser", "activations", "logits chunk", "checkpoints", "stores of the teachers"):
        assert word in text


def test_the_published_recipe_fits_the_published_machine():
    """Eight GPUs of 40 GB trained it: https://arxiv.org/abs/2402.16107."""
    found = plan("experiments=fusechat_7b_v1", "source=nh2_solar_10_7b")
    assert found.sure_problems() == []
    assert 12 * 7.24e9 / 8 <= found.step.weights + found.step.gradients + found.step.optimiser <= 17 * 7.24e9 / 8
    assert found.step.peak < 40 * GIB
    assert found.steps == -(-3 * found.reading.dialogues // 128)
    alone = plan("experiments=fusechat_7b_v1", "parallel=single", "parallel.accelerator=gpu", machine=SMALL)
    (problem,) = alone.sure_problems()
    assert "which has 24.0 GiB" in problem
    assert "parallel=fsdp over" in problem


def test_the_small_recipe_fits_a_small_gpu():
    assert plan("experiments=fuse_small_gpu", machine=SMALL).step.peak < 24 * GIB
    assert not [one for one in plan("experiments=fuse_small_gpu", machine=SMALL).problems() if "step takes" in one]


def test_a_machine_without_gpus_is_told_so():
    assert any(
        "no GPU is here" in problem for problem in plan("experiments=fusechat_7b_v2", machine=LAPTOP).problems()
    )
    assert plan("experiments=fusechat_7b_v2", machine=LAPTOP).sure_problems() == []
    other = plan("experiments=fusechat_7b_v2", "estimate.device_memory=80GiB", machine=LAPTOP)
    assert not any("GPU is here" in problem for problem in other.problems())


def test_the_default_fits_anything():
    assert plan(machine=LAPTOP).problems() == []


def test_adapters_and_offload_need_no_optimiser_for_all():
    config = settings("experiments=fuse_small_gpu")
    whole = Stage1Plan.of(config, SMALL).step
    adapted = Stage1Plan.of(replace(config, lora=LoraConfig(rank=16)), SMALL).step
    assert adapted.optimiser < whole.optimiser / 20
    offloaded = plan("experiments=fusechat_7b_v2", "parallel.cpu_offload=true").step
    assert offloaded.weights == offloaded.optimiser == 0


def test_smaller_steps_need_less():
    base = ("experiments=fuse_small_gpu", "trainer.gradient_checkpointing=false")
    large, cut = plan(*base).step, plan(*base, "trainer.micro_batch_tokens=2048").step
    assert cut.activations == large.activations // 2
    assert plan("experiments=fuse_small_gpu").step.activations < large.activations / 4


def test_hours_follow_the_throughput():
    slow, fast = (plan("experiments=fuse_small_gpu", f"estimate.tokens_per_second={speed}") for speed in (1000, 4000))
    assert sum(slow.hours().values()) == pytest.approx(4 * sum(fast.hours().values()))
    trained = slow.steps * 64 * slow.reading.mean_tokens
    assert slow.hours()["training (on 1)"] == pytest.approx(trained / 1000 / 3600)
    assert plan("experiments=fuse_small_gpu").hours() == {}
    assert plan("estimate.probe=true", machine=LAPTOP).hours()["training (on 1)"] > 0


@pytest.mark.parametrize(("make", "kind"), [(make_llama, "openchat"), (make_qwen, "chatml")])
def test_the_weights_of_a_folder_are_counted(tmp_path, make, kind):
    tokenizer = make_tokenizer("byte_level", kind)
    model = make(len(tokenizer)).to(torch.bfloat16)
    shape = model_shape(save(tmp_path, model, tokenizer, "mine"), WorldConfig())
    assert shape.parameters == sum(one.numel() for one in model.parameters())
    assert (shape.stored_bytes, shape.facts.tied) == (2, model.config.tie_word_embeddings)
    assert (shape.facts.hidden_size, shape.facts.vocab_size) == (model.config.hidden_size, len(tokenizer))
    (tmp_path / "model.safetensors").unlink()  # as of a model that is not downloaded yet
    assert model_shape(ModelConfig(path=str(tmp_path)), WorldConfig()).parameters == pytest.approx(
        shape.parameters, rel=0.02
    )


def test_a_mixture_counts_the_experts_that_a_token_visits(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("mixtral", **sizes, num_key_value_heads=2, vocab_size=90, num_local_experts=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shape = model_shape(ModelConfig(path=str(tmp_path)), WorldConfig())
    assert shape.parameters == guessed_parameters(shape.facts)
    assert shape.matrices == shape.parameters - 2 * 90 * 32 - 2 * 2 * 3 * 32 * 48


def test_dialogues_on_the_disk_are_counted(tmp_path):
    write_jsonl(tmp_path / "d.jsonl", [chat("a" * 80, "b" * 200)] * 19 + [chat("a", "b" * 9000)])
    found = plan("data=jsonl", f"data.path={tmp_path}/d.jsonl", "data.heldout_fraction=0").reading
    assert found.dialogues == 20
    assert 100 < found.mean_tokens < 300
    assert 2000 < found.longest_tokens <= 2048


@pytest.mark.parametrize(
    ("name", "content"),
    [("d.json", b'[{"a":'), ("d.parquet", b"x"), ("d.json", b"[\xff]"), ("d.jsonl", b"\n\n")],
    ids=["cut", "no parquet", "no text", "empty"],
)
def test_dialogues_that_cannot_be_read_are_told(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        plan("data=jsonl", f"data.path={tmp_path / name}")


CONFIG = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 10}


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        ("{", None),
        ("[]", None),
        (json.dumps({**CONFIG, "num_attention_heads": 0}), None),
        (json.dumps(CONFIG), b"junk"),
        (json.dumps(CONFIG), b"junk and more than eight bytes"),
        (json.dumps(CONFIG), (4).to_bytes(8, "little") + b"[{}]"),
        (json.dumps(CONFIG), (10).to_bytes(8, "little") + b'{"a": {}} '),
    ],
)
def test_a_model_that_cannot_be_read_is_told(tmp_path, config, weights):
    (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"config\.json does not tell" if weights is None else "copy or download it"):
        model_shape(ModelConfig(path=str(tmp_path)), WorldConfig())


def test_all_that_is_unknown_is_told_at_once():
    with pytest.raises(UserError) as caught:
        plan("pivot=hf", "pivot.path=nobody/nothing", "source=hf", "source.path=no/one", "data=hub", "data.path=a/b")
    told = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 3
    assert "nobody/nothing" in told
    assert "no/one" in told
    assert "data.num_dialogues=NUMBER" in told


def merge_plan(base, targets, machine=SMALL, vocabulary="error", save=True, engine=EngineConfig(), **merge):  # noqa: B008
    config = MergeConfig(merge={"scale": 1.0, **merge}, save=save, vocabulary=vocabulary, engine=engine)
    model = foreseen(MergeRequest(merge["method"]), base, targets, vocabulary, engine)
    return Stage2Plan.of(config, model, base, targets, machine)


@pytest.fixture
def three_models(tmp_path):
    folders = [tmp_path / name for name in ("base", "a", "b")]
    for seed, folder in enumerate(folders):
        make_llama(60, seed).save_pretrained(folder)
    return folders


def test_a_merge_reads_all_and_writes_one(three_models):
    base, *targets = three_models
    size = (base / "model.safetensors").stat().st_size
    found = merge_plan(base, targets, method="sce")
    assert (found.bytes_read, found.bytes_written) == (3 * size, size)
    assert found.problems() == []
    assert merge_plan(base, targets, method="sce", scale="search").bytes_read == 6 * size
    (problem,) = replace(found, machine=Machine((), GIB)).problems()
    assert "smaller engine.memory" in problem


def test_a_merge_that_is_only_scored_writes_nothing_and_holds_its_deltas(three_models):
    base, *targets = three_models
    written = merge_plan(base, targets, method="sce")
    scored = merge_plan(base, targets, method="sce", save=False)
    searched = merge_plan(base, targets, method="sce", scale="search", save=False)
    assert (scored.bytes_written, scored.bytes_read) == (0, written.bytes_read)
    assert searched.bytes_read == written.bytes_read
    assert scored.memory == written.memory + 4 * written.model.parameters
    large = replace(searched, model=replace(searched.model, parameters=GIB), machine=Machine((), 8 * GIB))
    assert large.memory > 12 * GIB
    (problem,) = large.problems()
    assert "give a number for merge.scale and save=true" in problem


def test_a_merge_counts_what_its_method_needs_beside_the_engine(three_models):
    base, *targets = three_models
    small = EngineConfig(memory="64KiB")
    whole = merge_plan(base, targets, method="iso_c", engine=small)
    assert 1 << 16 < whole.model.largest_whole < 1 << 17
    assert whole.memory > merge_plan(base, targets, method="sce", engine=small).memory
    assert whole.problems() == ["the method needs 1MiB for its largest whole tensor; give engine.memory=1MiB or more"]
    assert merge_plan(base, targets, method="iso_c").problems() == []
    assert merge_plan(base, targets, method="fisher").model.is_measured


def test_a_union_of_vocabularies_is_planned_with_its_rows(tmp_path):
    sizes = []
    for seed, tokens in enumerate([(), ("<tool>", "<image>"), ("<image>", "<pause>")]):
        tokenizer = make_tokenizer("byte_level", "chatml")
        tokenizer.add_tokens(list(tokens), special_tokens=True)
        save(tmp_path / str(seed), make_llama(len(tokenizer), seed), tokenizer, "one")
        sizes.append((tmp_path / str(seed) / "model.safetensors").stat().st_size)
    base, *targets = (tmp_path / str(seed) for seed in range(3))
    found = merge_plan(base, targets, method="task_arithmetic", vocabulary="union")
    merge_folders("task_arithmetic", base, targets, tmp_path / "out", vocabulary="union")
    assert found.bytes_written == (tmp_path / "out/model.safetensors").stat().st_size > sizes[0]
    assert (found.bytes_read, found.model.new_tokens) == (sum(sizes), 3)
    assert "3, behind the base's" in found.text()
    with pytest.raises(UserError, match="vocabulary=base"):
        merge_plan(base, targets, method="task_arithmetic")


def test_a_merge_that_would_be_refused_has_no_plan(three_models, tmp_path):
    targets = three_models[1:]
    make_llama(70, 3).save_pretrained(tmp_path / "larger")
    with pytest.raises(UserError) as caught:
        merge_plan(None, [*targets, tmp_path / "larger"], method="sce")
    assert any("give the base" in problem for problem in caught.value.problems)
    assert any("embed_tokens" in problem for problem in caught.value.problems)


def test_the_command_answers_at_once_and_leaves_nothing(tmp_path):
    command = [sys.executable, str(REPOSITORY / "train.py"), "experiments=fusechat_7b_v2", "plan=true"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    asked = [run_and_weigh(command, cwd=tmp_path, env=environment) for _ in range(2)]  # the first may compile
    assert min(seconds for _, _, seconds in asked) < 25 * weight_of_hydra()
    said = asked[0][0]
    assert "openchat_3_5_7b" in said
    assert "nothing was run" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_job_that_cannot_fit_is_refused_before_it_begins(tmp_path):
    config = {"model_type": "llama", "hidden_size": 65536, "num_hidden_layers": 400, "num_attention_heads": 64}
    (tmp_path / "huge").mkdir()
    (tmp_path / "huge" / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    write_jsonl(tmp_path / "d.jsonl", [chat("a", "b")])
    words = ["pivot=hf", "pivot.path=huge", "data=jsonl", "data.path=d.jsonl", "parallel.accelerator=cpu"]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "weights, gradients and optimiser take" in done.stderr
    assert "estimate.check=false" in done.stderr
