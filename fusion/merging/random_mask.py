"""Random masks from a counter-based generator: every element's fate is a pure function of its key.

The key is (seed, target, tensor name, element index), so neither threads, nor chunks, nor the order of tensors, nor
a resumed run can change a mask.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor

WORDS_PER_COUNTER = 4  # Philox-4x64 makes four words of every counter value


def random_words(seed: int, target: int, name: str, start: int, count: int) -> np.ndarray:
    """Random uint64 words [count] of the elements `start`, `start + 1`, ... of tensor `name` of target `target`."""
    digest = hashlib.sha256(f"{seed}\0{target}\0{name}".encode()).digest()
    generator = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8"))
    counters, skipped = divmod(start, WORDS_PER_COUNTER)
    generator.advance(counters)
    return generator.random_raw(skipped + count)[skipped:]


def random_keep(density: float, count: int, *, seed: int, target: int, name: str, start: int = 0) -> Tensor:
    """Bool mask [count]: each element is kept with probability `density`, independently."""
    if density >= 1:
        return torch.ones(count, dtype=torch.bool)
    words = random_words(seed, target, name, start, count)
    return torch.from_numpy(words < np.uint64(int(density * 2**64)))


def random_shares(count: int, *, seed: int, target: int, name: str, start: int = 0) -> Tensor:
    """Uniform float64 numbers from 0 (included) to 1, [count]: of every element its own."""
    words = random_words(seed, target, name, start, count)
    return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53)
