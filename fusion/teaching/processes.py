"""A teacher pass of several processes, as their starter sees it: handed over as files, and told of as one.

`fusion.teaching.distributed` is what the processes run.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from fusion.cache import write_json
from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.encode import Encoded
from fusion.processes.failures import Failure
from fusion.processes.starter import Group, run_group

MODULE = "fusion.teaching.distributed"

Shard = tuple[int, Sequence[tuple[str, Encoded]]]
"""A shard's number, and its dialogues with their content hashes."""


@dataclass(frozen=True)
class Task:
    """What the processes are to read, and where rank 0 writes it."""

    folder: Path
    """The distribution store that is being built."""
    model: ModelConfig
    vocab_size: int
    teacher: TeacherConfig
    threads: int
    """CPU threads of each process."""
    shards: Sequence[Shard]

    def save(self, folder: Path) -> None:
        """Write the task into `folder`."""
        settings = {
            "folder": str(self.folder),
            "model": {name: asdict(self.model)[name] for name in ModelConfig.__dataclass_fields__},
            "vocab_size": self.vocab_size,
            "teacher": asdict(self.teacher),
            "threads": self.threads,
            "shards": [[number, [name for name, _ in dialogues]] for number, dialogues in self.shards],
        }
        encoded = [one for _, dialogues in self.shards for _, one in dialogues]
        np.savez(
            folder / "dialogues.npz",
            bounds=np.cumsum([len(one.ids_N) for one in encoded])[:-1],
            ids=np.concatenate([one.ids_N for one in encoded]),
            supervised=np.concatenate([one.supervised_N for one in encoded]),
            ends=np.concatenate([one.ends_N for one in encoded]),
            num_bytes=np.asarray([one.num_bytes for one in encoded]),
            exact=np.asarray([one.exact for one in encoded]),
        )
        write_json(folder / "task.json", settings)

    @classmethod
    def load(cls, folder: Path) -> "Task":
        """Read what `save` has written."""
        settings = json.loads((folder / "task.json").read_text("utf-8"))
        with np.load(folder / "dialogues.npz") as file:
            arrays = dict(file)
        encoded = [
            Encoded(ids, supervised, ends, int(num_bytes), bool(exact))
            for ids, supervised, ends, num_bytes, exact in zip(
                *(np.split(arrays[name], arrays["bounds"]) for name in ("ids", "supervised", "ends")),
                arrays["num_bytes"],
                arrays["exact"],
                strict=True,
            )
        ]
        rest = iter(encoded)
        return cls(
            folder=Path(settings["folder"]),
            model=ModelConfig.of(settings["model"]),
            vocab_size=settings["vocab_size"],
            teacher=TeacherConfig(**settings["teacher"]),
            threads=settings["threads"],
            shards=[(number, [(name, next(rest)) for name in names]) for number, names in settings["shards"]],
        )


def read_in_processes(
    folder: Path, model: ModelConfig, vocab_size: int, teacher: TeacherConfig, shards: Sequence[Shard]
) -> None:
    """Write `shards` into the store in `folder`, read by `teacher.processes` processes that share `model`.

    The index is the caller's business.

    Raises:
        UserError: a process failed; all of them are gone by then. What was written stays, for a second try.
    """
    if not shards:
        return
    with tempfile.TemporaryDirectory(prefix="fusion-teacher-") as name:
        handover = Path(name)
        Task(folder.resolve(), model, vocab_size, teacher, torch.get_num_threads(), shards).save(handover)
        # transformers splits over accelerators whenever it sees one
        failure = run_group(Group(MODULE, handover, teacher.processes, sees_gpus=teacher.device != "cpu"))
    if failure is not None:
        _complain(model, teacher, failure)


def _complain(model: ModelConfig, teacher: TeacherConfig, failure: Failure) -> NoReturn:
    if failure.is_of_user:
        raise UserError(failure.problems)
    raise UserError(
        "\n    ".join(
            [
                f"teacher {model.name}: the {teacher.processes} processes of teacher.placement={teacher.placement} "
                f"failed with status {failure.status}; what was read is kept. Their last lines:",
                *failure.problems,
            ]
        )
    )
