"""Where the weights of a teacher live: one device, all devices of the machine, or split over several processes.

The splits are transformers' own plans (`DistributedConfig`); the tensor parallelism is that of
https://arxiv.org/abs/1909.08053, the sharding that of https://arxiv.org/abs/2304.11277.
"""

import importlib.util
import shutil
import tempfile
import weakref
from dataclasses import fields
from typing import cast

import torch
import transformers
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig

from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.teaching.causal_lm import load_causal_lm, on_device

SPLIT = {"tensor_parallel": "tp_size", "fsdp": "fsdp_size"}
"""Placements of several processes, with the field of transformers' `DistributedConfig` that asks for them."""


def is_split(teacher: TeacherConfig) -> bool:
    """Whether several processes read together."""
    return teacher.placement in SPLIT


def place(model: ModelConfig, teacher: TeacherConfig) -> PreTrainedModel:
    """Load `model` into this process: on one device (placement=single), or over the machine's devices (auto).

    What fits on no accelerator goes to the CPU's memory and then to the disk; every layer still runs on an
    accelerator, if there is one.

    Raises:
        UserError: accelerate is missing, the device is not there, or the model cannot be loaded.
    """
    assert not is_split(teacher), "a model that is split is read by several processes"
    if teacher.placement == "single":
        return on_device(load_causal_lm(model), teacher.device)
    check_placement(teacher)
    folder = tempfile.mkdtemp(prefix="fusion-offload-")  # for weights that transformers converts while it loads
    try:
        loaded = load_causal_lm(
            model, device_map="auto", max_memory=_max_memory(teacher.device), offload_folder=folder
        )
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(loaded, shutil.rmtree, folder, ignore_errors=True)
    return loaded


def load_split(model: ModelConfig, teacher: TeacherConfig) -> PreTrainedModel:
    """Load this process's part of `model`, together with the other processes of a `torch.distributed.run`.

    `final_hidden` and `head` give whole tensors on every process, as for a model in one piece. All processes have to
    run the same number of forward passes: of the same batches under tensor parallelism, of any batches under FSDP.

    Raises:
        UserError: the model cannot be loaded, or transformers has no plan that splits it.
    """
    config = DistributedConfig.from_dict({SPLIT[teacher.placement]: teacher.processes})
    loaded = load_causal_lm(model, distributed_config=config)
    if teacher.placement == "fsdp":
        _check_layers(model, loaded)
        # A root of its own for passes without the head: without one, no layer is fetched while another computes.
        fully_shard(loaded.base_model, mesh=cast(DTensor, next(loaded.parameters())).device_mesh)
    return loaded


def _check_layers(model: ModelConfig, loaded: PreTrainedModel) -> None:
    lists = [one for one in loaded.modules() if isinstance(one, torch.nn.ModuleList)]
    if not any(isinstance(layer, FSDPModule) for one in lists for layer in one):
        raise UserError(
            f"teacher {model.name}: transformers has no plan that shards the layers of {loaded.config.model_type} "
            "models; use teacher.placement=auto"
        )


def check_placement(teacher: TeacherConfig) -> None:
    """Raise UserError when this machine or its packages cannot do what `teacher` asks for."""
    if teacher.placement == "single":
        return
    where = f"teacher.placement={teacher.placement}"
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(f"{where}: the package accelerate is missing; pip install 'fusion-chat[big]'")
    if teacher.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"{where}: it chooses the devices itself, teacher.device={teacher.device} cannot be had; leave out "
            "teacher.device, and hide other devices with CUDA_VISIBLE_DEVICES"
        )
    if is_split(teacher):
        _check_processes(teacher, where)


def _check_processes(teacher: TeacherConfig, where: str) -> None:
    if teacher.processes < 2:
        raise UserError(f"{where}: a model is split over 2 or more processes; set teacher.processes")
    devices = torch.cuda.device_count() if teacher.device != "cpu" else 0
    if teacher.device == "cuda" and devices == 0:
        raise UserError(f"{where}: there is no CUDA device; leave out teacher.device")
    if devices and teacher.processes > devices:
        raise UserError(
            f"{where}: teacher.processes={teacher.processes} processes need a device each, this machine has {devices}"
        )
    if not set(SPLIT.values()) <= {field.name for field in fields(DistributedConfig)}:  # as in the first 5.x
        raise UserError(
            f"{where}: transformers {transformers.__version__} cannot split models while it loads them; "
            "pip install -U transformers (5.23 can)"
        )


def _max_memory(device: str) -> dict[int | str, int] | None:
    """Bytes that each device may hold; None lets accelerate use what is free."""
    if device != "cpu":
        return None
    from accelerate.utils import get_max_memory  # an extra

    return {"cpu": int(0.9 * get_max_memory()["cpu"])}  # the share of it that transformers takes
