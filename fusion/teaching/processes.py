"""A teacher pass of several processes, as their starter sees it: handed over as files, watched, and told of as one.

`fusion.teaching.distributed` is what the processes run.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from fusion.cache import write_json
from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.encode import Encoded

log = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PROGRESS = "fusion: "
"""What a line of the processes' output begins with that goes into the log."""
LAUNCHER_WORDS = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_")
"""Environment variables by which launchers tell a process its place; an outer launcher's must not reach ours."""
LAST_LINES = 12

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
            "model": {field.name: getattr(self.model, field.name) for field in fields(ModelConfig)},
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
            model=ModelConfig(**settings["model"]),
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
        lines, code = _run(handover, teacher)
        if code:
            _complain(model, teacher, handover, lines, code)


def _run(handover: Path, teacher: TeacherConfig) -> tuple[list[str], int]:
    """The last lines of the processes' output, and the exit status. torchrun ends all of them when one fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(teacher.processes), "-m", "fusion.teaching.distributed", str(handover)]
    lines: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,  # never written to: it closes when this process dies, and the others follow
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(teacher),
    ) as launcher:
        assert launcher.stdout is not None
        try:
            for line in launcher.stdout:
                if line.startswith(PROGRESS):
                    log.info("%s", line.removeprefix(PROGRESS).rstrip())
                elif line.strip():
                    lines.append(line.rstrip())
        except BaseException:
            launcher.terminate()
            raise
    return list(lines), launcher.returncode


def _environment(teacher: TeacherConfig) -> dict[str, str]:
    """This process's environment without what an outer launcher says in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_WORDS and not name.startswith(LAUNCHER_PREFIXES)
    }
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    if teacher.device == "cpu":
        kept["CUDA_VISIBLE_DEVICES"] = ""  # transformers splits over accelerators whenever it sees one
    return kept


def save_failure(handover: Path, rank: int, problems: Sequence[str], of_user: bool) -> None:
    """Leave word of why process `rank` failed."""
    write_json(handover / f"failure-{rank}.json", {"problems": list(problems), "of_user": of_user})


def _complain(model: ModelConfig, teacher: TeacherConfig, handover: Path, lines: Sequence[str], code: int) -> NoReturn:
    """Tell what the first process that failed has left; the others failed because it was gone."""
    killed = [line.strip() for line in lines if "Signal " in line and "SIGTERM" not in line]
    files = sorted(handover.glob("failure-*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    failures = [json.loads(path.read_text("utf-8")) for path in files]
    for failure in failures:
        if failure["of_user"] and not killed:
            raise UserError(failure["problems"])
    told = killed or (failures[0]["problems"] if failures else lines)
    raise UserError(
        "\n    ".join(
            [
                f"teacher {model.name}: the {teacher.processes} processes of teacher.placement={teacher.placement} "
                f"failed with status {code}; what was read is kept. Their last lines:",
                *told,
            ]
        )
    )
