"""Memory that is used again and again: new memory costs more than what is done with it."""

import threading

import torch
from torch import Tensor


class Workspace(threading.local):
    """Buffers of one thread."""

    def __init__(self) -> None:
        self._buffers: dict[object, Tensor] = {}

    def buffer(self, name: object, num_elements: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Unset elements [num_elements]; what the same `name` gave before is overwritten."""
        held = self._buffers.get(name)
        if held is None or held.dtype != dtype or len(held) < num_elements or held.device != device:
            self._buffers[name] = held = torch.empty(num_elements, dtype=dtype, device=device)
        return held[:num_elements]


_scratch = Workspace()


def scratch(name: str, like: Tensor) -> Tensor:
    """Unset elements of the shape and type of `like`; what the same `name` gave the thread before is overwritten."""
    return _scratch.buffer(name, like.numel(), like.dtype, like.device).view(like.shape)
