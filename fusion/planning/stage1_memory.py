"""Memory that stage 1 needs on one device: for a step of the training, and for each teacher.

What a step needs at its highest moment is the larger of two moments: the end of a forward pass, when all activations
are there, and the update of the weights, when all gradients are. With accumulation the gradients of the micro-batches
before are there at the first one, too.
"""

from dataclasses import dataclass

from fusion.config.schema import ModelConfig, ParallelConfig, TrainConfig
from fusion.planning.reading import SUPERVISED, Reading
from fusion.planning.shapes import ModelShape
from fusion.planning.step_memory import SINGLE, layer_precision, rows_per_chunk

WEIGHT = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2, "64-true": 8}
"""Lightning's precision -> bytes of a trained weight."""
READ_AS = {"float32": 4, "bfloat16": 2, "float16": 2}
LIBRARIES = {"cpu": 600 << 20, "cuda": 500 << 20}
"""Python, torch and their like in a process; a GPU's context on the GPU."""
GATHERED_LAYERS = 2
"""Sharded: layers that are whole at a time, one in use and one on its way."""
LORA_MATRICES = 7
"""Linear layers of a decoder layer."""


@dataclass(frozen=True)
class StepNeed:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimiser: int
    activations: int
    logits: int
    """Of one chunk, with the gradient of the head, which exists beside it."""
    gathered: int
    """Sharded: weights that are whole for a moment."""
    scratch: int
    """Of the update itself."""
    libraries: int
    accumulates: bool
    micro_batch: str

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.weights + self.optimiser + self.libraries

    @property
    def peak(self) -> int:
        forward = self.activations + self.logits + (self.gradients if self.accumulates else 0)
        return self.state + self.gathered + max(forward, self.gradients + self.scratch)


@dataclass(frozen=True)
class MicroBatch:
    dialogues: int
    tokens: int
    """Padding included."""
    per_step: int
    """How many there are in an optimiser step on one device."""


def largest_micro_batch(config: TrainConfig, reading: Reading) -> MicroBatch:
    """The micro-batch of the longest dialogues."""
    trainer = config.trainer
    devices = config.parallel.devices * config.parallel.num_nodes
    on_device = max(1, -(-min(trainer.batch_size, reading.dialogues) // devices))
    dialogues = min(trainer.micro_batch_size or on_device, on_device)
    if trainer.micro_batch_tokens:
        dialogues = max(1, min(dialogues, trainer.micro_batch_tokens // reading.longest_tokens))
    return MicroBatch(dialogues, dialogues * reading.longest_tokens, -(-on_device // dialogues))


def device_type(parallel: ParallelConfig, num_gpus: int) -> str:
    """Where a job with these settings trains: cpu or cuda."""
    if parallel.accelerator == "auto":
        return "cuda" if num_gpus else "cpu"
    return "cpu" if parallel.accelerator == "cpu" else "cuda"


def shards(parallel: ParallelConfig) -> int:
    """Devices that hold one copy of weights and optimiser together."""
    is_sharded = parallel.name in ("fsdp", "fsdp1")
    return max(1, parallel.devices * parallel.num_nodes // parallel.replicas) if is_sharded else 1


def step_need(config: TrainConfig, pivot: ModelShape, reading: Reading, where: str) -> StepNeed:
    """What a training step needs on a device of type `where` (cpu or cuda)."""
    trainer, parts = config.trainer, shards(config.parallel)
    is_sharded = config.parallel.name in ("fsdp", "fsdp1")
    size, batch = WEIGHT[trainer.precision], largest_micro_batch(config, reading)
    is_cast = trainer.precision == "bf16-mixed" and not is_sharded
    trained = _adapter_parameters(pivot, config.lora.rank) if config.lora.rank else pivot.parameters
    on_device = 0 if config.parallel.cpu_offload and where == "cuda" else 1
    precision = layer_precision(trainer.precision, is_sharded)
    activations = pivot.sizes.checkpointed if trainer.gradient_checkpointing else pivot.sizes.activations
    rows = min(
        config.objective.chunk_rows or rows_per_chunk(pivot.facts.vocab_size, where),
        int(SUPERVISED * batch.tokens) + 1,
    )
    head_gradient = 0 if config.lora.rank else SINGLE * pivot.head_parameters
    layer = pivot.matrices // max(pivot.facts.layers, 1)
    return StepNeed(
        weights=on_device * pivot.parameters * size // parts + 2 * is_cast * pivot.parameters,
        gradients=on_device * trained * size // parts,
        optimiser=on_device * 2 * trained * size // parts,
        activations=activations(batch.tokens, precision),
        logits=SINGLE * rows * pivot.facts.vocab_size + head_gradient,
        gathered=is_sharded * size * (GATHERED_LAYERS * layer + pivot.head_parameters),
        scratch=on_device * trained * size // parts if where == "cuda" else 0,
        libraries=LIBRARIES[where],
        accumulates=batch.per_step > 1,
        micro_batch=f"{batch.dialogues} x {reading.longest_tokens} tokens",
    )


def _adapter_parameters(pivot: ModelShape, rank: int) -> int:
    facts = pivot.facts
    return rank * facts.layers * LORA_MATRICES * (facts.hidden_size + facts.inner_size)


def teacher_need(config: TrainConfig, model: ModelConfig, shape: ModelShape, where: str, num_gpus: int) -> int:
    """Bytes on one device while `model` reads: weights, one layer's intermediate results, and a chunk of logits."""
    size = READ_AS.get(model.dtype, shape.stored_bytes)
    teacher = config.teacher
    spread = {"auto": max(num_gpus, 1), "single": 1}.get(teacher.placement, teacher.processes)
    layer = teacher.batch_tokens * size * (6 * shape.facts.hidden_size + 3 * shape.sizes.inner)
    logits = SINGLE * rows_per_chunk(shape.facts.vocab_size, where) * shape.facts.vocab_size
    return shape.parameters * size // spread + layer + logits + LIBRARIES[where]
