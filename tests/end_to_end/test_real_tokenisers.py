"""Stage 1 on real dialogues with real tokenisers, under small random models of those vocabularies."""

import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from .conftest import REPOSITORY

SHARED = REPOSITORY / ".." / "shared"
DIALOGUES = SHARED / "data" / "gsm8k_dialogues.jsonl"
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}

pytestmark = pytest.mark.skipif(not DIALOGUES.exists(), reason="needs the real tokenisers and dialogues")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A Llama with Mistral's 32k pieces, and a Qwen2 whose head is padded beyond its 151k tokens, as published."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    mistral = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "mistral-32k")
    qwen = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "qwen-151k")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(mistral), **SHAPE)).save_pretrained(folder / "pivot")
    Qwen2ForCausalLM(Qwen2Config(vocab_size=151_936, **SHAPE)).save_pretrained(folder / "source")
    mistral.save_pretrained(folder / "pivot")
    qwen.save_pretrained(folder / "source")
    return folder


def test_real_dialogues(workplace, models):
    workplace.run(
        "train",
        "pivot=hf",
        f"pivot.path={models / 'pivot'}",
        "pivot.chat_template=plain",
        "source=hf",
        f"source.path={models / 'source'}",
        "data=jsonl",
        f"data.path={DIALOGUES}",
        "data.limit=24",
        "trainer.batch_size=8",
        "trainer.epochs=1",
        "hydra.run.dir=runs_real/job",
    )
    found = json.loads((workplace.root / "runs_real" / "job" / "result.json").read_text())
    assert found["report"]["dialogues"]["dropped"] == {}
    assert found["report"]["alignment"]["source"]["aligned"] > 0.9
    assert found["report"]["alignment"]["source"]["covered"] > 0.9
    target = workplace.root / "runs_real" / "job" / "model"
    assert AutoModelForCausalLM.from_pretrained(target).config.vocab_size == 32_000
    assert "Assistant:" in AutoTokenizer.from_pretrained(target).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
