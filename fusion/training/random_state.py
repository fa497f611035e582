"""States of the generators of random numbers of one process, as plain JSON."""

import json
import random
from pathlib import Path

import numpy as np
import torch

from fusion.cache import write_json


def save_random_state(path: Path) -> None:
    """Write the states of Python's, numpy's and torch's generators, and of the GPU's where one is in use."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    state = {
        "python": [version, words, gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": _to_hex(torch.get_rng_state()),
        "cuda": _to_hex(torch.cuda.get_rng_state()) if torch.cuda.is_initialized() else None,
    }
    write_json(path, state)


def load_random_state(path: Path) -> None:
    """Let the generators go on where those of `save_random_state` stood."""
    state = json.loads(path.read_text("utf-8"))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_hex(state["cuda"]))


def _to_hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
