"""What a model is made of, in numbers: facts that let a plan be made before anything is downloaded."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ShapeConfig:
    """Facts about a model of the hub, for `plan=true`; nothing else reads them. Zeros: look into its config.json."""

    model_type: str = ""
    """Architecture as transformers calls it, for instance mistral, mixtral, qwen3 or gemma3_text."""
    parameters: int = 0
    """Weights, each counted once."""
    hidden_size: int = 0
    """Width of the residual stream."""
    inner_size: int = 0
    """Width within the feed-forward part, of one expert where there are several."""
    layers: int = 0
    """Decoder layers."""
    heads: int = 0
    """Attention heads."""
    key_value_heads: int = 0
    """Key-value heads."""
    head_size: int = 0
    """Width of an attention head."""
    vocab_size: int = 0
    """Rows of the head, which may be more than the tokeniser has tokens."""
    tied: bool = False
    """Whether the head is the embedding."""
    experts: int = 0
    """Experts per layer; 0 where the feed-forward part is one."""
    active_experts: int = 0
    """Experts that a token visits."""
