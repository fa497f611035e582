"""Out of memory: what a training step needs, in bytes, and which settings would make it need less."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from fusion.config import UserError
from fusion.config.schema import TrainConfig
from fusion.objective.head_loss import rows_per_chunk
from fusion.planning.step_memory import LayerSizes, layer_precision
from fusion.training.batches import OptimizerStep
from fusion.training.module import FusionModule
from fusion.training.parallel import SHARDED
from fusion.training.throughput import GIB

ADVICE = 3
"""How many settings are named that leave the method as it is."""


@dataclass(frozen=True)
class MemoryNeed:
    """What a step needs on one device, in bytes; estimates, but for the first two."""

    weights: int
    """With their 16-bit copies, where precision is mixed."""
    trained: int
    """Gradients and AdamW's two moments of the weights that are trained."""
    activations: int
    """Of one micro-batch."""
    checkpointed: int
    """The same with gradient checkpointing."""
    logits: int
    """Of one chunk of rows."""


class Cut(NamedTuple):
    """The largest micro-batch of a step."""

    dialogues: int
    tokens: int
    """Padding included."""
    rows: int


class Advice(NamedTuple):
    saved: float
    """Bytes."""
    text: str


class OutOfMemory(pl.Callback):
    """Turns running out of memory into a `UserError` that says what was needed and what helps.

    Lightning tears everything down before it hands the error on, so the numbers are taken while it still stands.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self._explanation: str | None = None

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        assert isinstance(module, FusionModule)
        if is_out_of_memory(exception):
            self._explanation = explain(exception, trainer, module, self.config)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Around `trainer.fit`.

        Raises:
            UserError: the device had not enough memory.
        """
        try:
            yield
        except RuntimeError as error:
            if self._explanation is None:
                raise
            raise UserError(self._explanation) from error


def is_out_of_memory(error: BaseException) -> bool:
    """GPUs have an exception of their own for it, the CPU's allocator has not."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "not enough memory" in str(error)
    )


def explain(error: BaseException, trainer: pl.Trainer, module: FusionModule, config: TrainConfig) -> str:
    """What ran out, what the step needs, and the settings that save most."""
    device = trainer.strategy.root_device
    told = [f"step {trainer.global_step + 1} ran out of memory: {str(error).splitlines()[0]}", *_allocated(device)]
    if module.step is None:
        return "\n    ".join([*told, "the pivot's weights alone are too much; spread them: parallel=fsdp"])
    cut = largest_cut(module.step)
    chunk_rows = config.objective.chunk_rows or rows_per_chunk(_vocabulary(module.model), device)
    need = memory_need(module.model, config, cut, chunk_rows)
    told.append(_needed(need, cut, config))
    told += [f"{one.text} saves about {_gib(one.saved)}" for one in advice(need, cut, config, chunk_rows)]
    return "\n    ".join(told)


def _allocated(device: torch.device) -> Iterator[str]:
    if device.type == "cuda":
        tensors, kept = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        total = torch.cuda.get_device_properties(device).total_memory
        yield f"of {_gib(total)} tensors had {_gib(tensors)}, and {_gib(kept - tensors)} more were reserved"


def _needed(need: MemoryNeed, cut: Cut, config: TrainConfig) -> str:
    activations = need.checkpointed if config.trainer.gradient_checkpointing else need.activations
    return (
        f"needed are about {_gib(need.weights)} for weights, {_gib(need.trained)} for gradients and optimiser, "
        f"{_gib(activations)} for activations of {cut.tokens} tokens, {_gib(need.logits)} for logits"
    )


def _gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.2f} MiB"


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def memory_need(model: PreTrainedModel, config: TrainConfig, cut: Cut, chunk_rows: int) -> MemoryNeed:
    """The need of `model` (its own part, where it is sharded) for a micro-batch, by the formula above."""
    parameters = list(model.parameters())
    is_sharded = config.parallel.name in SHARDED
    is_cast = config.trainer.precision == "bf16-mixed" and not is_sharded
    precision = layer_precision(config.trainer.precision, is_sharded)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = (getattr(text, "num_key_value_heads", None) or heads) * head_size
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    sizes = LayerSizes(text.num_hidden_layers, text.hidden_size, keys, inner)
    return MemoryNeed(
        weights=sum(own_part(one).nbytes + 2 * is_cast * own_part(one).numel() for one in parameters),
        trained=sum(3 * own_part(one).nbytes for one in parameters if one.requires_grad),
        activations=sizes.activations(cut.tokens, precision),
        checkpointed=sizes.checkpointed(cut.tokens, precision),
        logits=4 * min(chunk_rows, cut.rows) * text.vocab_size,
    )


def largest_cut(step: OptimizerStep) -> Cut:
    """The micro-batch of most tokens; its dialogues are counted as if all micro-batches had as many."""
    batch = max(step.micro_batches, key=lambda one: one.ids_BT.numel())
    return Cut(-(-len(step.names) // len(step.micro_batches)), batch.ids_BT.numel(), len(batch.rows_R))


def advice(need: MemoryNeed, cut: Cut, config: TrainConfig, chunk_rows: int) -> list[Advice]:
    """Up to `ADVICE` settings that would save most memory, the best first; then the one that changes the method."""
    found = [*_smaller_activations(need, cut, config), _smaller_state(need, config)]
    rows = min(chunk_rows, cut.rows)
    fewer = max(1, rows // 4)
    if fewer < rows:
        found.append(Advice(need.logits * (1 - fewer / rows), f"objective.chunk_rows={fewer} (now {chunk_rows})"))
    best = sorted(found, key=lambda one: -one.saved)[:ADVICE]
    adapters = Advice(need.trained, "lora=rank16 (now every weight is trained; adapters alone are another method)")
    return best if config.lora.rank else [*best, adapters]


def _smaller_activations(need: MemoryNeed, cut: Cut, config: TrainConfig) -> Iterator[Advice]:
    trainer = config.trainer
    now = need.checkpointed if trainer.gradient_checkpointing else need.activations
    if cut.dialogues > 1:
        fewer = cut.dialogues // 2
        change = f"trainer.micro_batch_size={fewer} (now {trainer.micro_batch_size or cut.dialogues})"
        if trainer.micro_batch_tokens:
            change = f"trainer.micro_batch_tokens={cut.tokens // 2} (now {trainer.micro_batch_tokens})"
        yield Advice(now * (1 - fewer / cut.dialogues), change)
    if not trainer.gradient_checkpointing:
        yield Advice(now - need.checkpointed, "trainer.gradient_checkpointing=true (now false)")


def _smaller_state(need: MemoryNeed, config: TrainConfig) -> Advice:
    parallel = config.parallel
    devices = parallel.devices * parallel.num_nodes
    if parallel.name in SHARDED:
        more = f"parallel.devices={2 * parallel.devices} (now {parallel.devices}, parallel={parallel.name})"
        return Advice((need.weights + need.trained) / 2, more)
    shares = max(devices, 2)
    saved = (need.weights + need.trained) * (1 - 1 / shares)
    on_each = f" parallel.devices={shares}" if parallel.num_nodes == 1 else ""
    return Advice(saved, f"parallel=fsdp{on_each} (now parallel={parallel.name})")


def own_part(parameter: Tensor) -> Tensor:
    """What this device has of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
