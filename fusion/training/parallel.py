"""How one training run is spread over devices: one, DDP, or weights that are sharded over them.

Sharding is FSDP2 (`fully_shard`), or the older FullyShardedDataParallel; both are ZeRO-3
(https://arxiv.org/abs/1910.02054, https://arxiv.org/abs/2304.11277).
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from pytorch_lightning.plugins.environments import ClusterEnvironment, LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import CustomPolicy
from transformers import PreTrainedModel

from fusion.config import UserError, raise_problems
from fusion.config.schema import ParallelConfig, TrainConfig
from fusion.training.student import Student
from fusion.training.weights import StoredWeights

SHARDED = ("fsdp", "fsdp1")


def world_size(parallel: ParallelConfig) -> int:
    return parallel.devices * parallel.num_nodes


def accelerator(parallel: ParallelConfig) -> str:
    """Lightning's word: several processes share no other accelerators than GPUs."""
    if parallel.name == "single" or parallel.accelerator != "auto":
        return parallel.accelerator
    return "gpu" if torch.cuda.is_available() else "cpu"


def check_devices(parallel: ParallelConfig) -> None:
    """Raise UserError with all that this machine lacks for `parallel`."""
    gpus, kind = torch.cuda.device_count(), accelerator(parallel)
    problems = []
    if kind == "gpu" and not gpus:
        problems.append("parallel.accelerator=gpu: this machine has no CUDA device")
    if kind == "gpu" and parallel.devices > gpus > 0:
        problems.append(f"parallel.devices={parallel.devices}: this machine has {gpus} CUDA devices")
    if parallel.name == "fsdp1" and kind != "gpu":
        problems.append("parallel=fsdp1 runs on GPUs only; use parallel=fsdp")
    raise_problems(problems)


def make_strategy(config: TrainConfig) -> Strategy | str:
    """Lightning's part of it; `spread` is the other one."""
    if config.parallel.name == "ddp":
        return DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False)
    if config.parallel.name == "fsdp":
        return ShardedStrategy(config.parallel)
    return FSDPStrategy(state_dict_type="full") if config.parallel.name == "fsdp1" else "auto"


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all devices; without sizes, Lightning would make the devices of a node tensor-parallel."""

    def __init__(self, parallel: ParallelConfig) -> None:
        self.offloads = parallel.cpu_offload and accelerator(parallel) == "gpu"
        super().__init__(
            data_parallel_size=world_size(parallel),
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend="cpu:gloo,cuda:nccl" if self.offloads else None,
        )

    def model_to_device(self) -> None:
        """Shards are where they belong since they were made."""
        if not self.offloads:
            super().model_to_device()


def cluster(parallel: ParallelConfig) -> ClusterEnvironment:
    """Who we are is said by our own torchrun, or by nobody: never by a scheduler around us."""
    return LightningEnvironment() if parallel.name == "single" else TorchElasticEnvironment()


def lightning_precision(config: TrainConfig) -> str:
    """Sharded weights are float32; their policy casts them when it gathers them."""
    return "32-true" if config.parallel.name in SHARDED else config.trainer.precision


def spread(student: Student, config: TrainConfig, weights: StoredWeights | None, mesh: DeviceMesh | None) -> Student:
    """Checkpoint activations, compile the layers and shard them, in this order; the student's own forward pass is the
    root, so that embeddings and head are gathered around it.

    Raises:
        UserError: the model's architecture cannot be treated so, or the machine cannot compile.
    """
    model = student.model
    if config.trainer.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(f"trainer.gradient_checkpointing=true: {type(model).__name__} does not support it")
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.trainer.compile:
        check_compiler(accelerator(config.parallel))
        for layer in decoder_layers(model, "trainer.compile=true"):
            layer.compile()
    if config.parallel.name == "fsdp":
        assert weights is not None
        assert mesh is not None
        _shard(student, config, weights, mesh)
    if config.parallel.name == "fsdp1":
        return _shard_flat(student, config)
    return student


def check_compiler(kind: str) -> None:
    """Raise UserError where torch.compile lacks what it writes its kernels with; `kind` is Lightning's word."""
    on_gpu = kind == "gpu" or (kind == "auto" and torch.cuda.is_available())
    if not on_gpu and not any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++") if name):
        raise UserError(
            "trainer.compile=true: torch.compile needs a C++ compiler on CPUs, and there is none; install g++, or set "
            "CXX to yours"
        )


def decoder_layers(model: PreTrainedModel, what_for: str) -> list[torch.nn.Module]:
    """The repeated blocks of a model, which transformers never splits over devices."""
    names = model._no_split_modules or ()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"{what_for}: {type(model).__name__} does not say what its decoder layers are")
    return layers


def _shard(student: Student, config: TrainConfig, weights: StoredWeights, mesh: DeviceMesh) -> None:
    parallel = config.parallel
    if parallel.replicas > 1:
        shape = (parallel.replicas, mesh.size() // parallel.replicas)
        mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
    offload = CPUOffloadPolicy() if parallel.cpu_offload and mesh.device_type == "cuda" else OffloadPolicy()
    lower = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
    inner = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32)
    # The weights of targets are inputs of the root, and stay float32.
    outer = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(student.model, "parallel=fsdp"):
        weights.fill(layer)
        fully_shard(layer, mesh=mesh, mp_policy=inner, offload_policy=offload)
    weights.fill(student)
    fully_shard(student, mesh=mesh, mp_policy=outer, offload_policy=offload)


def _shard_flat(student: Student, config: TrainConfig) -> Student:
    layers = set(decoder_layers(student.model, "parallel=fsdp1"))
    lower = torch.bfloat16 if config.trainer.precision == "bf16-mixed" else None
    wrapped = FullyShardedDataParallel(
        student,
        auto_wrap_policy=CustomPolicy(lambda module: module in layers),
        mixed_precision=MixedPrecision(lower, torch.float32, cast_root_forward_inputs=False),
        device_id=torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu"),
        use_orig_params=True,
    )
    return cast(Student, wrapped)  # its attributes are the student's


def own_name(name: str) -> str:
    """Name of a parameter without the wrappers around it."""
    return name.replace("_fsdp_wrapped_module.", "")


@contextmanager
def accumulating(strategy: Strategy, student: torch.nn.Module) -> Iterator[None]:
    """What a backward pass in here finds is shared with the other devices by the last one of the step, as far as
    memory allows: a device that keeps a shard of the weights keeps the same shard of the gradients."""
    if isinstance(student, FSDPModule):
        student.set_requires_all_reduce(False)  # between replicas
        try:
            yield
        finally:
            student.set_requires_all_reduce(True)
    elif isinstance(strategy, DDPStrategy):
        with strategy.block_backward_sync():
            yield
    else:
        yield
