"""The recipes of real models: each composes without a complaint, and what it says about a model is so."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from fusion.config.compose import CONFIG_FOLDER, SCHEMAS, register, to_settings
from fusion.config.rules import settings_problems
from fusion.config.shape import ShapeConfig

MODELS = sorted(path.stem for path in (CONFIG_FOLDER / "model").glob("*.yaml"))
PUBLISHED_SOURCES = {
    "fusechat_7b_v1": ("nh2_mixtral_8x7b", "nh2_solar_10_7b"),
    "fusechat_7b_v2": (
        "starling_7b_alpha",
        "nh2_solar_10_7b",
        "internlm2_chat_20b",
        "mixtral_8x7b_instruct",
        "qwen1_5_72b_chat",
    ),
}


def settings_of(entry, *overrides):
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        settings = to_settings(compose(entry, overrides=list(overrides)), SCHEMAS[entry])
    assert settings_problems(settings) == []
    return settings


def options(group):
    return {path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_a_source_of_its_own_name(name):
    source = settings_of("train", f"source={name}").source
    assert source.name == name
    assert source.path.count("/") == 1


@pytest.mark.parametrize("name", sorted(options("pivot") & set(MODELS)))
def test_pivots_come_with_the_published_training(name):
    settings = settings_of("train", f"pivot={name}")
    assert settings.pivot.name == name
    assert (settings.objective.ce_weight, settings.optim.lr, settings.trainer.epochs) == (0.9, 5e-6, 3)


@pytest.mark.parametrize("name", MODELS)
def test_the_facts_about_a_model_are_those_of_its_architecture(name):
    """A model of the same class and sizes, without memory for its weights, has exactly so many of them."""
    facts = ShapeConfig(**OmegaConf.to_object(OmegaConf.load(CONFIG_FOLDER / "model" / f"{name}.yaml")).pop("shape"))
    experts = (
        {"num_local_experts": facts.experts, "num_experts_per_tok": facts.active_experts} if facts.experts else {}
    )
    config = AutoConfig.for_model(
        facts.model_type,
        hidden_size=facts.hidden_size,
        intermediate_size=facts.inner_size,
        num_hidden_layers=facts.layers,
        num_attention_heads=facts.heads,
        num_key_value_heads=facts.key_value_heads,
        head_dim=facts.head_size,
        vocab_size=facts.vocab_size,
        tie_word_embeddings=facts.tied,
        pad_token_id=0,
        **experts,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert sum(one.numel() for one in {id(one): one for one in model.parameters()}.values()) == facts.parameters


@pytest.mark.parametrize(
    ("name", "source"), [(name, source) for name, sources in PUBLISHED_SOURCES.items() for source in sources]
)
def test_the_published_recipes(name, source):
    settings = settings_of("train", f"experiments={name}", f"source={source}")
    assert (settings.pivot.path, settings.source.name) == ("openchat/openchat_3.5", source)
    assert (settings.data.path, settings.data.max_length, settings.data.long) == (
        "FuseAI/FuseChat-Mixture",
        2048,
        "split",
    )
    trainer, optim, parallel = settings.trainer, settings.optim, settings.parallel
    assert (trainer.epochs, trainer.batch_size, trainer.micro_batch_size) == (3, 128, 4)
    assert trainer.batch_size == parallel.devices * trainer.micro_batch_size * 4
    assert (trainer.precision, trainer.gradient_checkpointing) == ("bf16-mixed", True)
    assert (optim.lr, optim.schedule, optim.warmup_fraction, optim.weight_decay) == (5e-6, "cosine", 0.03, 0.0)
    assert (settings.objective.name, settings.objective.ce_weight) == ("fusion", 0.9)
    assert (settings.teacher.top_k, settings.teacher.temperature) == (10, 1.0)
    assert (settings.alignment.name, settings.fusion.name, settings.fusion.unit) == ("ms", "min_ce", "token")
    assert (settings.template, parallel.name) == ("shared", "fsdp")


def test_the_published_merges():
    assert settings_of("merge", "experiments=fusechat_7b_v1_merge").merge["method"] == "varm"
    assert settings_of("merge", "experiments=fusechat_7b_v1_merge").merge["unit"] == "matrix"
    merge = settings_of("merge", "experiments=fusechat_7b_v2_merge").merge
    assert (merge["method"], merge["tau"]) == ("sce_released", 0.1)


def test_facts_decide_about_no_result():
    settings = settings_of("train", "pivot=qwen3_0_6b")
    other = settings_of("train", "pivot=qwen3_0_6b", "pivot.shape.parameters=1", "data.num_dialogues=7")
    assert settings.common(["pivot", "data"]) == other.common(["pivot", "data"])
    assert settings.result_settings() == other.result_settings()
