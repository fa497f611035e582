"""Weights and optimiser in safetensors files, every process its own part: no pickle is read or written.

torch's distributed checkpoints plan who writes what, and put the parts together again for any number of processes:
names are those of one process alone, and a part says where in its tensor it belongs.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    OptimizerStateType,
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from fusion.training.parallel import own_name

FILE_BYTES = 2**30
"""Whole tensors of about so many bytes share a file. A process writes its files one after the other, and holds a copy
of the one that it writes."""
OPTIMIZER = "optimizer"
OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


def shard_pattern(rank: int) -> str:
    """What matches the files of process `rank`."""
    return f"shard-{rank + 1:05d}-*.safetensors"


def save_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the trained weights and the optimiser's state into `folder`; all processes have to come.

    Raises:
        CheckpointException: a process cannot write.
    """
    tensors = _weights(module) | _of_optimizer(_optimizer_state(module, optimizer))
    writer = HuggingFaceStorageWriter(str(folder), _files(tensors), save_distributed=True)
    with _quiet():
        dcp.save(dict(tensors), storage_writer=writer)


def load_tensors(module: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The reverse, before the first step; every process reads what it has to have."""
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    weights, state = _weights(module), _optimizer_state(module, optimizer)
    # A weight that has had no gradient yet has no state; the optimiser here was given one for each.
    of_weights = cast(dict[str, dict[str, Tensor]], state["state"])
    known = {name for name, values in of_weights.items() if all(_key(name, part) in stored for part in values)}
    state["state"] = {name: values for name, values in state["state"].items() if name in known}  # type: ignore[union-attr]
    with _quiet():
        dcp.load(weights | _of_optimizer(state), storage_reader=reader)
    set_model_state_dict(module, dict(weights), options=OPTIONS)
    set_optimizer_state_dict(module, optimizer, state, options=OPTIONS)


def _weights(module: torch.nn.Module) -> dict[str, Tensor]:
    """What is trained, once each: a head that is the embedding is not repeated."""
    trained = {own_name(name) for name, one in module.named_parameters() if one.requires_grad}
    found = get_model_state_dict(module, options=OPTIONS)
    return {name: cast(Tensor, one) for name, one in found.items() if name in trained}


def _optimizer_state(module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerStateType:
    """By names of weights; an optimiser that has not stepped yet gets its tensors."""
    return get_optimizer_state_dict(module, optimizer, options=OPTIONS)


def _of_optimizer(state: OptimizerStateType) -> dict[str, Tensor]:
    of_weights = cast(dict[str, dict[str, Tensor]], state["state"])
    return {_key(name, part): one for name, values in of_weights.items() for part, one in values.items()}


def _key(weight: str, part: str) -> str:
    return f"{OPTIMIZER}/{weight}/{part}"


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """The number, from 1, of the file of every tensor."""
    numbers, bytes_before = {}, 0
    for name, one in tensors.items():
        numbers[name] = 1 + bytes_before // FILE_BYTES
        bytes_before += one.size().numel() * one.dtype.itemsize  # the older FSDP has no `numel`
    return numbers


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is a case of ours
        yield
