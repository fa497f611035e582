"""Bytes of an optimiser step, from a model's shape alone.

A decoder layer keeps for the backward pass, per token, tensors of the hidden size H, of the keys and values KV, and of
the inner size F of its feed-forward part. How many bytes per H, KV and F is counted for layers of Llama's kind whose
attention keeps no scores (sdpa, flash), as https://arxiv.org/abs/2205.04198 counts those of GPT; other layers
are near it. With gradient checkpointing every layer keeps its input alone, and one layer at a time is whole.
"""

from dataclasses import dataclass

KEPT = {"32-true": (32, 8, 16), "bf16-mixed": (30, 4, 8), "bf16-true": (20, 4, 8), "64-true": (64, 16, 32)}
"""Lightning's precision -> bytes that a layer keeps per token for each of H, KV and F."""
HIDDEN = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2, "64-true": 8}
"""Lightning's precision -> bytes of a number between two layers."""
SINGLE = 4
"""Bytes of a float32 number: logits and the head's gradient, whatever the precision."""
CPU_CHUNK, GPU_CHUNK = 1 << 22, 1 << 27
"""Logits of one chunk."""


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """Rows whose logits fill a chunk: few on a CPU, where fresh memory costs, many on a GPU, where launches cost."""
    return max(8, (CPU_CHUNK if device_type == "cpu" else GPU_CHUNK) // vocab_size)


@dataclass(frozen=True)
class LayerSizes:
    """What decides about the activations of a decoder."""

    layers: int
    hidden: int
    keys: int
    """Key-value heads times their size."""
    inner: int
    """Of all experts that a token visits."""

    def per_token(self, precision: str) -> int:
        """Bytes that one layer keeps."""
        sizes = (self.hidden, self.keys, self.inner)
        return sum(kept * size for kept, size in zip(KEPT[precision], sizes, strict=True))

    def activations(self, tokens: int, precision: str) -> int:
        return tokens * self.layers * self.per_token(precision)

    def checkpointed(self, tokens: int, precision: str) -> int:
        """The same with gradient checkpointing."""
        return tokens * (self.layers * HIDDEN[precision] * self.hidden + self.per_token(precision))


def layer_precision(precision: str, is_sharded: bool) -> str:
    """Sharded weights come in 16 bits when they are gathered, so layers keep what 16-bit layers do."""
    return "bf16-true" if precision == "bf16-mixed" and is_sharded else precision
