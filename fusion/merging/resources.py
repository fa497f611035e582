"""What a merge may take of the machine."""

import math
import os
from dataclasses import dataclass

import torch

from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.config.sizes import num_bytes
from fusion.merging.plan import MergePlan

MEBI = 1 << 20


@dataclass(frozen=True)
class Resources:
    """`memory` in bytes is for tensors; Python and torch take about 0.3 GiB beside it."""

    memory: int
    threads: int
    device: torch.device
    checksums: bool = True

    @classmethod
    def of(cls, config: EngineConfig) -> "Resources":
        """Raises `UserError` when the device is not there."""
        device = torch.device(config.device)
        if device.type == "cuda":
            index = device.index or 0
            if index >= torch.cuda.device_count():
                raise UserError(f"engine.device={config.device}: there is no such CUDA device here; take cpu")
            device = torch.device("cuda", index)
        return cls(num_bytes(config.memory), config.threads or len(os.sched_getaffinity(0)), device, config.checksums)

    @property
    def kept_per_thread(self) -> int:
        """Bytes of a tensor's inputs that one thread keeps over several passes; larger tensors are shared by all."""
        return self.memory // (4 * self.threads)

    @property
    def kept_alone(self) -> int:
        """Bytes of a shared tensor's inputs that are kept; larger tensors are read again in every pass."""
        return self.memory // 2


def checked_resources(plan: MergePlan, config: EngineConfig) -> Resources:
    """The resources of a merge.

    Raises:
        UserError: the device is not there, or a whole-matrix method needs more memory.
    """
    resources = Resources.of(config)
    needed, name = largest_whole(plan)
    if needed > resources.memory:
        raise UserError(
            f"merge method '{plan.method.name}' works on whole tensors and needs {math.ceil(needed / MEBI)} MiB for "
            f"'{name}', but engine.memory is {config.memory}: give it engine.memory={math.ceil(needed / MEBI)}MiB"
        )
    return resources


def largest_whole(plan: MergePlan) -> tuple[int, str]:
    """Bytes that the method needs for the tensor of which it needs most as a whole, and that tensor's name."""
    if not plan.method.whole:
        return 0, ""
    return max(
        (plan.method.whole_bytes(name, plan.specs[name].shape, len(plan.targets)), name) for name in plan.merged_names
    )
