"""Model FLOPs: what a training step must compute, and what a device could.

Per token and weight of a matrix 6 FLOPs: 2 in the forward pass, 2 for the gradient of the input, 2 for that of the
weight, plus 12 * L * H * Q * T for attention (L layers, H heads, head size Q, dialogue of T tokens): PaLM, appendix B,
https://arxiv.org/abs/2204.02311. As there, a causal mask does not halve attention, and what gradient checkpointing
computes again does not count. Three things are ours: a frozen weight has no gradient, so 4; of experts only those
count that a token visits; and the head counts for supervised rows alone, since no other row has logits.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import Embedding, Parameter
from transformers import PreTrainedModel

PEAK_TFLOPS: dict[str, tuple[float, float, float]] = {
    "GB200": (2500.0, 1250.0, 80.0),
    "B200": (2250.0, 1125.0, 75.0),
    "H200 NVL": (835.5, 417.7, 60.0),
    "H200": (989.4, 494.7, 66.9),
    "GH200": (989.4, 494.7, 66.9),
    "H100 NVL": (835.5, 417.7, 60.0),
    "H100 PCIe": (756.0, 378.0, 51.2),
    "H100": (989.4, 494.7, 66.9),
    "H800": (989.4, 494.7, 66.9),
    "H20": (148.0, 74.0, 44.0),
    "A100": (312.0, 156.0, 19.5),
    "A800": (312.0, 156.0, 19.5),
    "L40S": (362.0, 183.0, 91.6),
    "L40": (181.0, 90.5, 90.5),
    "L4": (121.0, 60.0, 30.3),
    "A40": (149.7, 74.8, 37.4),
    "A10G": (70.0, 35.0, 31.5),
    "A10": (125.0, 62.5, 31.2),
    "RTX A6000": (154.8, 77.4, 38.7),
    "RTX 4090": (165.2, 82.6, 82.6),
    "RTX 3090": (71.0, 35.6, 35.6),
}
"""Words of a device's name -> dense tera-FLOP/s of the maker's data sheet: 16-bit with 32-bit sums, TF32, float32."""


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward and a backward pass."""

    per_token: int
    """Matrices of the decoder."""
    per_pair: int
    """Attention of a token to a token, either way round, in all layers."""
    per_row: int
    """The head, per supervised row."""

    @staticmethod
    def of(model: PreTrainedModel) -> "ModelFlops":
        """Read off the model's weights (whole or sharded) and its config."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
        experts = getattr(config, "num_experts_per_tok", None)
        output = model.get_output_embeddings().weight
        assert isinstance(output, Parameter)
        matrices = [one for one in _matrices(model) if one is not output]
        return ModelFlops(
            sum(_flops(one, experts) for one in matrices),
            12 * config.num_hidden_layers * heads * head_size,
            _flops(output, None),
        )

    def step(self, lengths: Sequence[int], rows: int) -> int:
        """FLOPs of dialogues of `lengths` tokens (padding does not count) with `rows` supervised rows together."""
        pairs = sum(length * length for length in lengths)
        return self.per_token * sum(lengths) + self.per_pair * pairs + self.per_row * rows


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the data sheet of `device` promises for Lightning's `precision`; None where it is not known."""
    if device.type != "cuda" or precision.startswith("64"):
        return None
    name = torch.cuda.get_device_name(device)
    found = max((words for words in PEAK_TFLOPS if re.search(rf"\b{words}\b", name)), key=len, default=None)
    if found is None:
        return None
    half, tf32, single = PEAK_TFLOPS[found]
    if "16" in precision:
        return half * 1e12
    return (single if torch.get_float32_matmul_precision() == "highest" else tf32) * 1e12


def _matrices(model: PreTrainedModel) -> Iterator[Parameter]:
    """Weights that tokens are multiplied with; embeddings are looked up."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, Embedding)}
    return (one for one in model.parameters() if one.ndim >= 2 and id(one) not in looked_up)


def _flops(weight: Parameter, experts: int | None) -> int:
    """Per token; a stack of experts [E, ., .] is visited by `experts` of E."""
    numbers = weight.numel() if weight.ndim == 2 or experts is None else weight.numel() // len(weight) * experts
    return (6 if weight.requires_grad else 4) * numbers
