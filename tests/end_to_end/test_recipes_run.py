"""Recipes of real models run as they are, but for width and depth: the same classes, settings and way of train.py."""

import json
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny_models import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

import merge
import train
from fusion.config.compose import CONFIG_FOLDER, register
from fusion.config.launch import launch
from fusion.config.shape import ShapeConfig

QUESTION = "Which river is it, and where does it run?"
SHAREGPT = [
    {
        "conversations": [
            turn
            for place in range(5)
            for turn in (
                {"from": "human", "value": f"{QUESTION} {n} {place}"},
                {"from": "gpt", "value": "yes " * (1 + n % 4)},
            )
        ]
    }
    for n in range(12)
]
ALPACA = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}, yes."} for n in range(12)]
BAD = {"conversations": [{"from": "human", "value": "no answer"}]}
CASES = {
    "openchat + mixtral, published": ("experiments=fusechat_7b_v2 source=mixtral_8x7b_instruct", SHAREGPT),
    "qwen3 + llama, small GPU": ("experiments=fuse_small_gpu", SHAREGPT),
    "gemma + phi": ("pivot=gemma_3_1b source=phi_4_mini data=sharegpt", SHAREGPT),
    "smollm3 + qwen1.5, Alpaca": ("pivot=smollm3_3b source=qwen1_5_72b_chat data=alpaca", ALPACA),
}
KINDS = {"mistral": ("metaspace", "openchat"), "mixtral": ("metaspace", "mistral"), "llama": ("byte_level", "llama3")}
HERE = (
    "parallel=single parallel.accelerator=cpu trainer.precision=32-true trainer.max_steps=2 trainer.batch_size=8 "
    "trainer.progress_bar=false teacher.device=cpu teacher.placement=single pivot.dtype=float32 source.dtype=float32 "
    "data.max_length=120 data.heldout_fraction=0.1 evaluation=none logger=none"
)
"""What a small machine without GPUs has to change."""


def shrunken(shape, folder):
    """A random model of the architecture in `shape`, one that a CPU trains in a moment, in `folder`."""
    kind = KINDS.get(shape.model_type, ("byte_level", "gemma" if "gemma" in shape.model_type else "chatml"))
    tokenizer = make_tokenizer(*kind)
    experts = {"num_local_experts": 4, "num_experts_per_tok": shape.active_experts} if shape.experts else {}
    config = AutoConfig.for_model(
        shape.model_type,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4 if shape.heads == shape.key_value_heads else 2,
        head_dim=8 if shape.head_size * shape.heads == shape.hidden_size else 16,
        vocab_size=len(tokenizer) + 5,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **experts,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run train.py or merge.py in an empty folder; returns the job's folder."""
    monkeypatch.chdir(tmp_path)

    def go(entry, *words):
        job = tmp_path / "runs" / entry
        monkeypatch.setattr("sys.argv", [f"{entry}.py", *words, f"hydra.run.dir={job}"])
        launch(entry, {"train": train, "merge": merge}[entry].run)
        return job

    return go


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_runs_shrunken(case, run, tmp_path):
    words, rows = CASES[case]
    recipe = words.split()
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = compose("train", overrides=recipe)
    pivot, source = (shrunken(config[role].shape, tmp_path / role) for role in ("pivot", "source"))
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, BAD]))
    job = run("train", *recipe, *HERE.split(), f"pivot.path={pivot}", f"source.path={source}", f"data.path={data}")
    result = json.loads((job / "result.json").read_text())
    assert (result["status"], result["steps"], result["name"]) == ("finished", 2, config.source.name)
    counts = result["report"]["dialogues"]
    assert counts["dropped"] == {}
    if config.data.long == "split":  # dialogues became two
        assert counts["train"] + counts["heldout"] > len(rows)
    target = json.loads((job / "model" / "config.json").read_text())
    assert target["model_type"] == config.pivot.shape.model_type
    assert not torch.equal(*(weights(folder) for folder in (Path(pivot), job / "model")))


def weights(folder):
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        return torch.cat([one.flatten().float() for one in model.parameters()])


def test_targets_that_others_published_are_merged_as_they_are(run, tmp_path):
    """Bare model folders, by the published recipe; a new source is one more target and the same command."""
    facts = OmegaConf.load(CONFIG_FOLDER / "model" / "openchat_3_5_7b.yaml").shape
    shape = OmegaConf.merge(OmegaConf.structured(ShapeConfig(), flags={"readonly": False}), facts)
    base = shrunken(shape, tmp_path / "base")
    targets = []
    for number in range(3):
        model = AutoModelForCausalLM.from_pretrained(base)
        torch.manual_seed(number)
        with torch.no_grad():
            for one in model.parameters():
                one += 0.01 * torch.randn_like(one)
        model.save_pretrained(tmp_path / f"target{number}")
        make_tokenizer("metaspace", "openchat").save_pretrained(tmp_path / f"target{number}")
        targets.append(str(tmp_path / f"target{number}"))
    merged = []
    for count in (2, 3):
        job = run(
            "merge", "experiments=fusechat_7b_v2_merge", f"base={base}", f"targets=[{','.join(targets[:count])}]"
        )
        assert json.loads((job / "result.json").read_text())["targets"] == [f"target{n}" for n in range(count)]
        merged.append(weights(job / "model"))
    assert not torch.equal(*merged)
