"""Small models of four published architectures, with random weights."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fusion.config.world import TinyModelConfig

MAX_POSITIONS = 256
ROPE_THETA = 100.0  # dialogues have tens of tokens: far more of the frequencies tell neighbours apart than at 10,000
MLP_RATIO = 2.5
MAX_NEW_TOKENS = 48


def make_model(
    settings: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, initializer_range: float, seed: int
) -> PreTrainedModel:
    """A model of `settings.architecture` for `tokenizer`; equal seeds give equal weights."""
    rows = -(-len(tokenizer) // settings.vocab_multiple) * settings.vocab_multiple
    common: dict[str, Any] = {
        "vocab_size": rows,
        "hidden_size": settings.hidden_size,
        "intermediate_size": int(MLP_RATIO * settings.hidden_size),
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "initializer_range": initializer_range,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _ARCHITECTURES[settings.architecture](settings, common)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, max_new_tokens=MAX_NEW_TOKENS
    )
    return model


def _llama(settings: TinyModelConfig, common: dict[str, Any]) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(**common, num_key_value_heads=settings.key_value_heads, tie_word_embeddings=True)
    )


def _qwen2(settings: TinyModelConfig, common: dict[str, Any]) -> PreTrainedModel:
    return Qwen2ForCausalLM(
        Qwen2Config(**common, num_key_value_heads=settings.key_value_heads, tie_word_embeddings=True)
    )


def _mistral(settings: TinyModelConfig, common: dict[str, Any]) -> PreTrainedModel:
    return MistralForCausalLM(
        MistralConfig(
            **common, num_key_value_heads=settings.key_value_heads, tie_word_embeddings=True, sliding_window=None
        )
    )


def _gpt_neox(settings: TinyModelConfig, common: dict[str, Any]) -> PreTrainedModel:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**common, tie_word_embeddings=False))


_ARCHITECTURES: dict[str, Callable[[TinyModelConfig, dict[str, Any]], PreTrainedModel]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gpt_neox": _gpt_neox,
    "mistral": _mistral,
}
