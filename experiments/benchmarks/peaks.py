"""Memory of a pass: the peak of a process that does nothing else, and the largest tensor that is made.

As a command, `python peaks.py PASS FOLDER VOCABULARY DATA DIALOGUES` prints bytes of this process: with the model
loaded and warm, and at the most during the pass (`all_logits`, `no_logits` or `into_store`).
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from passes import Corpus, Reading, in_shards, load_teacher
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fusion.config.schema import TeacherConfig

KIBI = 1 << 10
STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
"""Where Linux tells the peak of this process, and forgets it; elsewhere the peak of loading counts, too."""
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc gives freed tensors back at once: what it would keep for later differs by 100 MiB from run to run."""


class Peak(NamedTuple):
    """Bytes of a process."""

    loaded: int
    """With the warm model."""
    highest: int

    @property
    def above(self) -> int:
        return self.highest - self.loaded


def peak_of(name: str, folder: Path, vocab_size: int, data: Path, dialogues: int) -> Peak:
    """The peak of pass `name` in a process of its own."""
    return peak_of_process(__file__, name, folder, vocab_size, data, dialogues)


def peak_of_process(script: str, *words: object) -> Peak:
    """What a script prints that runs on its own and ends with `print_peak`."""
    command = [sys.executable, script, *map(str, words)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVEN_BACK)
    return Peak(*json.loads(done.stdout))


def main(name: str, folder: str, vocab_size: str, data: str, dialogues: str) -> None:
    torch.set_num_threads(1)
    settings = TeacherConfig(device="cpu")
    reader = load_teacher(Path(folder), int(vocab_size), settings.device, "float32")
    named = Corpus.of(Path(data)).alike(int(dialogues))
    passes = [Reading(reader, in_shards(some, settings), settings) for some in (named[:1], named)]
    warm, measured = (
        {"all_logits": one.all_logits, "no_logits": one.no_logits, "into_store": one.into_store}[name]
        for one in passes
    )
    assert passes[1].padded
    warm()
    print_peak(measured)


def print_peak(call: Callable[[], object]) -> None:
    """Bytes of this process: now, and at the most during `call`."""
    with contextlib.suppress(OSError):
        FORGET.write_text("5")
    loaded = _highest()
    call()
    print(json.dumps(Peak(loaded, _highest())))


def _highest() -> int:
    """Peak of this process; on Linux not from `getrusage`, where a new process inherits the peak of its parent."""
    if STATUS.is_file():
        lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * KIBI
    unit = 1 if sys.platform == "darwin" else KIBI
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class LargestTensor(TorchDispatchMode):
    """Notes the largest memory that any operation gives to a new tensor; the weights are not new."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.shape: tuple[int, ...] = ()
        self.bytes = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in self._weights:
                self._note(one)
        return result

    def _note(self, tensor: torch.Tensor) -> None:
        size = tensor.untyped_storage().nbytes()
        if size > self.bytes:
            self.bytes, self.shape = size, tuple(tensor.shape)


def largest_tensor(model: torch.nn.Module, call: Callable[[], object]) -> LargestTensor:
    """The largest tensor that `call` makes."""
    with LargestTensor(model) as seen:
        call()
    return seen


if __name__ == "__main__":
    main(*sys.argv[1:])
