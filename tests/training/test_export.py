"""A trained model as a folder that other programs load: complete, in the wanted dtype, there or not there."""

import json

import pytest
import torch
from safetensors import safe_open
from tiny_models import make_llama, make_qwen, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fusion.cache import folder_hash
from fusion.training import export
from fusion.training.export import export_model, model_card

CARD = model_card("fusion tiny", "/models/pivot", "A summary.", "python train.py seed=1")


@pytest.fixture
def tokenizer():
    return make_tokenizer("byte_level", "llama3")


@pytest.mark.parametrize("make", [make_llama, make_qwen])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_loads_as_it_is(tmp_path, tokenizer, make, dtype):
    model = make(len(tokenizer))
    wanted = {name: one.detach().to(dtype).clone() for name, one in model.state_dict().items()}
    export_model(model, tokenizer, tmp_path / "model", dtype, CARD)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto", use_safetensors=True)
    assert loaded.dtype == dtype
    assert all(torch.equal(one, wanted[name]) for name, one in loaded.state_dict().items())
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert again.chat_template == tokenizer.chat_template
    text = "a <|eot_id|> 北京"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert (tmp_path / "model" / "generation_config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_tied_weights_are_written_once(tmp_path, tokenizer):
    export_model(make_qwen(len(tokenizer)), tokenizer, tmp_path / "model", torch.float32, CARD)
    with safe_open(tmp_path / "model" / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118 (a safetensors file is no dictionary)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_an_older_model_is_replaced_whole(tmp_path, tokenizer):
    for seed in (0, 1):
        model = make_llama(len(tokenizer), seed)
        export_model(model, tokenizer, tmp_path / "model", torch.float32, CARD)
        (tmp_path / "model" / f"left_by_{seed}").touch()
    assert not (tmp_path / "model" / "left_by_0").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_a_kill_leaves_the_older_model(tmp_path, tokenizer, monkeypatch):
    export_model(make_llama(len(tokenizer)), tokenizer, tmp_path / "model", torch.float32, CARD)
    before = folder_hash(tmp_path / "model")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(export, "fsync_tree", die)
        with pytest.raises(KeyboardInterrupt):
            export_model(make_llama(len(tokenizer), 1), tokenizer, tmp_path / "model", torch.float32, CARD)
    assert folder_hash(tmp_path / "model") == before
    export_model(make_llama(len(tokenizer), 1), tokenizer, tmp_path / "model", torch.float32, CARD)
    assert folder_hash(tmp_path / "model") != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_equal_models_are_equal_bytes(tmp_path, tokenizer):
    for name in ("a", "b"):
        export_model(make_llama(len(tokenizer)), tokenizer, tmp_path / name, torch.float32, CARD)
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")


def test_the_card_says_what_it_is_and_how_to_make_it_again(tmp_path, tokenizer):
    export_model(make_llama(len(tokenizer)), tokenizer, tmp_path / "model", torch.float32, CARD)
    card = (tmp_path / "model" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in ("# fusion tiny", "A summary.", "/models/pivot", "python train.py seed=1", "lineage.json"):
        assert part in card
