"""How a training is spread: what every setting asks of Lightning and of torch, and what a machine has to have."""

from dataclasses import replace

import pytest
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy
from tiny_models import make_llama, make_qwen
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from transformers import PreTrainedModel

from fusion.config import UserError
from fusion.config.schema import ObjectiveConfig, ParallelConfig, TrainConfig
from fusion.config.schema import TrainerConfig as Trainer
from fusion.objective.target_form import TargetForm
from fusion.training import parallel
from fusion.training.parallel import (
    ShardedStrategy,
    accelerator,
    check_compiler,
    check_devices,
    cluster,
    decoder_layers,
    lightning_precision,
    make_strategy,
    spread,
)
from fusion.training.student import Student
from fusion.training.weights import StoredWeights

FSDP = ParallelConfig("fsdp", devices=4, num_nodes=2, accelerator="gpu")


def settings(way, **trainer):
    return TrainConfig(parallel=way, trainer=Trainer(**trainer))


def make_student(model):
    return Student(model, ObjectiveConfig(), TargetForm())


class Mesh:
    """As much of a device mesh as is asked for before anything is sharded."""

    def __init__(self, kind, shape, names=("data_parallel",)):
        self.device_type, self.shape, self.names = kind, tuple(shape), names

    def size(self):
        return torch.Size(self.shape).numel()


@pytest.fixture
def sharded(monkeypatch):
    """What `fully_shard` was asked to do: (module, mesh, policy of precision, policy of offloading)."""
    calls = []
    monkeypatch.setattr(
        parallel, "init_device_mesh", lambda kind, shape, mesh_dim_names: Mesh(kind, shape, mesh_dim_names)
    )
    monkeypatch.setattr(
        parallel,
        "fully_shard",
        lambda module, mesh, mp_policy, offload_policy: calls.append((module, mesh, mp_policy, offload_policy)),
    )
    return calls


def shard(way, kind, precision="32-true"):
    student = make_student(make_llama(60))
    spread(student, settings(way, precision=precision), StoredWeights({}), Mesh(kind, [8]))
    return student


def test_every_layer_is_sharded_and_the_student_last(sharded):
    student = shard(FSDP, "cuda")
    assert [call[0] for call in sharded] == [*student.model.model.layers, student]
    assert {call[1].shape for call in sharded} == {(8,)}


def test_replicas_are_a_dimension_of_the_mesh(sharded):
    shard(replace(FSDP, replicas=2), "cuda")
    assert {(call[1].shape, call[1].names) for call in sharded} == {((2, 4), ("replicate", "shard"))}


@pytest.mark.parametrize(("kind", "policy"), [("cuda", CPUOffloadPolicy), ("cpu", OffloadPolicy)])
def test_offloading_is_of_gpus(sharded, kind, policy):
    """What lives in the CPU's memory anyway has nowhere else to go."""
    shard(replace(FSDP, cpu_offload=True, accelerator="gpu" if kind == "cuda" else "cpu"), kind)
    assert {type(call[3]) for call in sharded} == {policy}


def test_without_offloading_shards_stay_on_the_device(sharded):
    shard(FSDP, "cuda")
    assert {type(call[3]) for call in sharded} == {OffloadPolicy}


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", None), ("bf16-mixed", torch.bfloat16)])
def test_shards_are_float32_and_cast_when_they_are_gathered(sharded, precision, dtype):
    config = settings(FSDP, precision=precision)
    assert lightning_precision(config) == "32-true"
    student = shard(FSDP, "cuda", precision)
    assert {call[2].param_dtype for call in sharded} == {dtype}
    assert {call[2].reduce_dtype for call in sharded} == {torch.float32}
    assert [call[2].cast_forward_inputs for call in sharded] == [True, True, False]  # not the weights of targets
    assert {one.dtype for one in student.parameters()} == {torch.float32}


def test_strategies(monkeypatch):
    assert make_strategy(settings(ParallelConfig())) == "auto"
    ddp = make_strategy(settings(ParallelConfig("ddp", devices=2)))
    assert isinstance(ddp, DDPStrategy)
    assert isinstance(make_strategy(settings(ParallelConfig("fsdp1", devices=2))), FSDPStrategy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    sharded = make_strategy(settings(FSDP))
    assert isinstance(sharded, ShardedStrategy)
    assert (sharded._data_parallel_size, sharded._tensor_parallel_size) == (8, 1)
    assert sharded._process_group_backend is None  # NCCL alone
    offloading = make_strategy(settings(replace(FSDP, cpu_offload=True)))
    assert offloading._process_group_backend == "cpu:gloo,cuda:nccl"  # norms are summed where gradients are
    on_cpu = make_strategy(settings(replace(FSDP, cpu_offload=True, accelerator="cpu")))
    assert on_cpu._process_group_backend is None
    assert lightning_precision(settings(ParallelConfig(), precision="bf16-true")) == "bf16-true"


def test_no_scheduler_says_who_one_process_is():
    assert type(cluster(ParallelConfig())) is LightningEnvironment
    assert type(cluster(ParallelConfig("ddp", devices=2))) is TorchElasticEnvironment


@pytest.mark.parametrize(
    ("way", "gpus", "kind", "problems"),
    [
        (ParallelConfig(), 0, "auto", []),
        (ParallelConfig(accelerator="gpu"), 0, "gpu", ["accelerator=gpu: this machine has no CUDA device"]),
        (ParallelConfig("ddp", devices=8), 0, "cpu", []),
        (ParallelConfig("ddp", devices=2), 2, "gpu", []),
        (ParallelConfig("fsdp", devices=8), 2, "gpu", ["devices=8: this machine has 2 CUDA devices"]),
        (ParallelConfig("fsdp", devices=8, accelerator="cpu"), 2, "cpu", []),
        (ParallelConfig("fsdp1", devices=2), 0, "cpu", ["parallel=fsdp1 runs on GPUs only; use parallel=fsdp"]),
        (ParallelConfig("fsdp1", devices=2, accelerator="gpu"), 0, "gpu", ["no CUDA device"]),
    ],
)
def test_devices_that_a_machine_has(monkeypatch, way, gpus, kind, problems):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    assert accelerator(way) == kind
    if not problems:
        check_devices(way)
        return
    with pytest.raises(UserError) as raised:
        check_devices(way)
    assert len(raised.value.problems) == len(problems)
    assert all(part in found for part, found in zip(problems, raised.value.problems, strict=True))


def test_compiling_needs_a_compiler_on_cpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    check_compiler("gpu")
    with pytest.raises(UserError, match=r"trainer\.compile=true: torch\.compile needs a C\+\+ compiler"):
        spread(make_student(make_llama(60)), settings(ParallelConfig(accelerator="cpu"), compile=True), None, None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        check_compiler("auto")
    (tmp_path / "my-compiler").touch(mode=0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    check_compiler("cpu")


def test_what_a_model_does_not_support_is_told(monkeypatch):
    model = make_qwen(60)
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"gradient_checkpointing=true: Qwen2ForCausalLM does not support it"):
        spread(make_student(model), settings(ParallelConfig(), gradient_checkpointing=True), None, None)
    monkeypatch.setattr(PreTrainedModel, "_no_split_modules", None)
    monkeypatch.setattr(type(model), "_no_split_modules", None)
    model._no_split_modules = None
    with pytest.raises(UserError, match="parallel=fsdp: Qwen2ForCausalLM does not say what its decoder layers are"):
        decoder_layers(model, "parallel=fsdp")


def test_the_layers_of_a_model_are_its_blocks():
    model = make_llama(60)
    assert decoder_layers(model, "") == list(model.model.layers)
