"""Tiny random models of architectures that scale or cap what comes out of their head."""

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
)

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
MODELS = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 5.0}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"final_logit_softcapping": 3.0}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.3}),
    "falcon_h1": (FalconH1ForCausalLM, FalconH1Config, {"lm_head_multiplier": 0.2, **MAMBA}),
}


def make(name: str, vocab_size: int) -> PreTrainedModel:
    model, config, special = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model(config(vocab_size=vocab_size, **SMALL, **special)).eval()
