"""One optimiser step on a model with random weights: fusion, SFT, and the plain way with dense logits and targets.

The plain way is that of the released code (https://github.com/fanqiwan/FuseAI): logits of all positions, cross-entropy
of the references, and the divergence from targets as a tensor of the size [dialogues, tokens, vocabulary].

As a command, `python steps.py WAY SHAPE DIALOGUES TOKENS` prints bytes of this process: before the step, with weights,
gradients and moments in memory, and at the most during the step.

Tensor legend: B dialogues, T tokens, V vocabulary, R supervised rows, K target entries.
"""

import contextlib
import json
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from peaks import FORGET, Peak
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fusion.config.schema import ObjectiveConfig, ParallelConfig, TrainConfig, TrainerConfig
from fusion.objective.target_form import TargetForm
from fusion.training.batches import FusionBatch
from fusion.training.flops import ModelFlops
from fusion.training.module import clip_gradients
from fusion.training.parallel import spread
from fusion.training.student import Student
from fusion.training.throughput import peak_memory
from fusion.training.weights import StoredWeights

CPU = torch.device("cpu")
TOP_K = 10
SUPERVISED = 0.7
"""Share of the tokens that an assistant says: the end of every dialogue."""
CE_WEIGHT = 0.9
OBJECTIVES = {name: ObjectiveConfig(name=name, ce_weight=CE_WEIGHT) for name in ("sft", "fusion")}
WAYS = ("fusion", "sft", "dense")
PRECISIONS = {
    "float32": ("32-true", torch.float32),
    "bfloat16": ("bf16-true", torch.bfloat16),
    "mixed": ("bf16-mixed", torch.float32),
}
"""Word -> Lightning's word, and the dtype of the weights, gradients and moments."""


class Shape(NamedTuple):
    """A Llama."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocab: int
    is_tied: bool = False

    @property
    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads,
            vocab_size=self.vocab,
            tie_word_embeddings=self.is_tied,
            max_position_embeddings=8192,
        )


SHAPES = {
    "tiny": Shape(64, 172, 2, 2, 2, 1_000),
    "small": Shape(512, 1_376, 8, 8, 4, 32_000),
    "1b": Shape(2_048, 8_192, 16, 32, 8, 128_256, is_tied=True),
    "3b": Shape(3_072, 8_192, 28, 24, 8, 128_256, is_tied=True),
    "7b": Shape(4_096, 14_336, 32, 32, 8, 32_002),
    "8b": Shape(4_096, 14_336, 32, 32, 8, 128_256),
}
"""Small enough for a CPU; as Llama-3.2-1B and 3B, Mistral-7B with OpenChat's tokens, and Llama-3.1-8B."""


def make_model(shape: Shape, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights, drawn where they are needed: on the meta device first, so that the CPU never holds them."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    model.to_empty(device=device)
    model.init_weights()  # rotary frequencies too
    model.tie_weights()
    return model.train()


def make_batch(dialogues: int, tokens: int, vocab: int, device: torch.device) -> FusionBatch:
    """Random dialogues of the same length, with random top-10 targets."""
    draw = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(vocab, (dialogues, tokens), generator=draw)
    first = tokens - 1 - int(SUPERVISED * tokens)
    rows_R = torch.cat([number * tokens + torch.arange(first, tokens - 1) for number in range(dialogues)])
    fused_RK = torch.rand(len(rows_R), TOP_K, generator=draw)
    others_RK = torch.rand(len(rows_R), vocab // TOP_K, generator=draw).argsort(-1)[:, :TOP_K]  # no token twice
    targets_RK = torch.cat([ids_BT.flatten()[rows_R + 1, None], others_RK], dim=1)
    weights_RK = torch.cat([torch.ones(len(rows_R), 1), fused_RK / fused_RK.sum(-1, keepdim=True)], dim=1)
    batch = FusionBatch(ids_BT, torch.ones_like(ids_BT), rows_R, targets_RK, weights_RK)
    return FusionBatch(*(None if tensor is None else tensor.to(device) for tensor in batch))  # type: ignore[arg-type]


class Dense(torch.nn.Module):
    """The plain way; the targets are made before the step."""

    def __init__(self, model: PreTrainedModel, batch: FusionBatch) -> None:
        super().__init__()
        self.model = model
        shape, vocab = batch.ids_BT.shape, model.config.vocab_size
        labels = torch.full((batch.ids_BT.numel(),), -100, device=batch.ids_BT.device)
        labels[batch.rows_R] = batch.targets_RK[:, 0]
        self.labels_BT = labels.reshape(shape)
        targets = torch.zeros(batch.ids_BT.numel(), vocab, device=batch.ids_BT.device)
        targets[batch.rows_R] = targets[batch.rows_R].scatter(1, batch.targets_RK[:, 1:], batch.weights_RK[:, 1:])
        self.targets_BTV = targets.reshape(*shape, vocab)

    def forward(self, batch: FusionBatch) -> Tensor:
        logits_BTV = self.model(input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False).logits.float()
        ce = cross_entropy(logits_BTV.flatten(0, 1), self.labels_BT.flatten(), reduction="sum")
        apart_BT = kl_div(logits_BTV.log_softmax(-1), self.targets_BTV, reduction="none").sum(-1)
        return CE_WEIGHT * ce + (1 - CE_WEIGHT) * (apart_BT * (self.labels_BT >= 0)).sum()


class Setup(NamedTuple):
    """Where and how a model is trained."""

    device: torch.device
    dtype: str = "float32"
    """One of `PRECISIONS`."""
    parallel: str = "single"
    """single, or fsdp: FSDP2 on this one device, within a process group of one."""
    checkpoints: bool = False
    """Activations are computed again in the backward pass."""

    @property
    def config(self) -> TrainConfig:
        kind = "gpu" if self.device.type == "cuda" else "cpu"
        precision, _ = PRECISIONS[self.dtype]
        trainer = TrainerConfig(precision=precision, gradient_checkpointing=self.checkpoints)
        return TrainConfig(parallel=ParallelConfig(self.parallel, accelerator=kind), trainer=trainer)


PLAIN = Setup(CPU)


class Learner:
    """A student on its device with its optimiser; SFT and fusion take turns on the same one."""

    def __init__(self, shape: Shape, setup: Setup = PLAIN) -> None:
        self.setup = setup
        model = make_model(shape, setup.device, PRECISIONS[setup.dtype][1])
        self.flops = ModelFlops.of(model)
        mesh = None if setup.parallel == "single" else init_device_mesh(setup.device.type, (1,))
        student = Student(model, OBJECTIVES["fusion"], TargetForm())
        self.student = spread(student, setup.config, StoredWeights({}), mesh)
        on_gpu = setup.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.student.parameters(), lr=1e-6, fused=on_gpu)  # without temporaries

    def autocast(self) -> torch.autocast:
        """As Lightning does it; sharded weights are cast when they are gathered."""
        is_mixed = self.setup.dtype == "mixed" and self.setup.parallel == "single"
        return torch.autocast(self.setup.device.type, torch.bfloat16, enabled=is_mixed)


@dataclass
class Step:
    """Forward and backward pass, clipping, AdamW; `way` is one of `WAYS`. Call it to make a step."""

    way: str
    learner: Learner
    batch: FusionBatch

    def __post_init__(self) -> None:
        self._dense = Dense(self.learner.student.model, self.batch) if self.way == "dense" else None

    def __call__(self) -> float:
        """Make the step; returns the gradient norm."""
        self.learner.optimizer.zero_grad()
        (self.loss() / len(self.batch.rows_R)).backward()
        norm = self.clip()
        self.learner.optimizer.step()
        return float(norm)  # waits for the device

    def loss(self) -> Tensor:
        """Summed over rows."""
        with self.learner.autocast():
            if self._dense is not None:
                return self._dense(self.batch)
            self.learner.student.objective = OBJECTIVES[self.way]
            return self.learner.student(self.batch).loss

    def clip(self) -> Tensor:
        return clip_gradients(self.learner.student, 1.0)

    @property
    def tokens(self) -> int:
        return self.batch.ids_BT.numel()

    @cached_property
    def flops(self) -> int:
        """Model FLOPs, the head for supervised rows alone, whatever the way is."""
        dialogues, tokens = self.batch.ids_BT.shape
        return self.learner.flops.step([tokens] * dialogues, len(self.batch.rows_R))


def forget_peak(device: torch.device) -> None:
    """`peak_memory` counts from now on; what cannot forget goes on counting from the start."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        FORGET.write_text("5")


def peak_of(way: str, shape: str, dialogues: int, tokens: int) -> Peak:
    """The peak of a step in a process of its own."""
    words = [sys.executable, __file__, way, shape, str(dialogues), str(tokens)]
    return Peak(*json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout))


def main(way: str, shape: str, dialogues: str, tokens: str) -> None:
    torch.set_num_threads(1)
    learner, vocab = Learner(SHAPES[shape]), SHAPES[shape].vocab
    Step("fusion", learner, make_batch(1, 8, vocab, CPU))()  # gradients and moments are in memory now
    step = Step(way, learner, make_batch(int(dialogues), int(tokens), vocab, CPU))
    forget_peak(CPU)
    before = peak_memory(CPU)
    step()
    print(json.dumps(Peak(before, peak_memory(CPU))))


if __name__ == "__main__":
    main(*sys.argv[1:])
