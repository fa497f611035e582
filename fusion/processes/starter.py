"""Processes that work as one, as their starter sees them: started by torchrun, watched, and told of as one.

`fusion.processes.member` is their own side. They get the name of a folder, the handover: what they are to do lies
there, and what they leave is found there.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fusion.processes.failures import Failure, Terminated, read_failures, saved_failures

log = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PROGRESS = "fusion: "
"""What a line of the processes' output begins with that goes into the log."""
LAUNCHER_WORDS = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
LAUNCHER_PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_", "PET_", "ACCELERATE_", "FSDP_")
"""Environment variables by which launchers tell a process its place; an outer launcher's must not reach ours."""
LAST_LINES = 12
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Node:
    """This machine among those whose processes work together."""

    number: int = 0
    count: int = 1
    address: str = ""
    """HOST:PORT where the first of several machines is reached."""


@dataclass(frozen=True)
class Group:
    """Processes of one `torch.distributed.run`."""

    module: str
    """Every process runs `python -m module HANDOVER`."""
    handover: Path
    size: int
    """Processes on this machine."""
    node: Node = Node()
    sees_gpus: bool = True
    is_heard: bool = False
    """Whether what the processes print is shown; without, only the last lines are kept, to tell of a failure."""
    grace_seconds: int = 30
    """How long the processes may take to end when they are told to, before they are killed."""


def run_group(group: Group, look: Callable[[], None] = lambda: None) -> Failure | None:
    """Start the processes, call `look` every now and then and once at the end, and wait for all of them.

    torchrun ends all of them when one fails; they also end when this process does. A SIGTERM that comes meanwhile is
    passed on, and what they still do then is waited for.

    Raises:
        Terminated: there was such a SIGTERM; all of them are gone by then.
    """
    on_terminal = group.is_heard and sys.stderr.isatty()  # then they write to it themselves: bars, colours
    lines: deque[str] = deque(maxlen=LAST_LINES)
    with subprocess.Popen(
        _command(group),
        stdin=subprocess.PIPE,  # never written to: it closes when this process dies, and the others follow
        stdout=subprocess.PIPE,
        stderr=None if on_terminal else subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(group),
    ) as launcher:
        assert launcher.stdout is not None
        listener = threading.Thread(target=_listen, args=(launcher.stdout, lines, group.is_heard), daemon=True)
        listener.start()
        try:
            with _passing_on_sigterm(launcher) as told:
                while launcher.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        launcher.wait(LOOK_SECONDS)
                    look()
                listener.join(group.grace_seconds)  # the output ends with the last of them
        except BaseException:
            launcher.terminate()
            raise
    look()
    if told.is_set():
        raise Terminated(_last_words(group.handover))
    return read_failures(group.handover, list(lines), launcher.returncode)


def _last_words(handover: Path) -> str:
    """What the processes said when they were told to end."""
    said = [problem for one in saved_failures(handover).values() if one.is_wanted for problem in one.problems]
    return said[0] if said else "told to end (SIGTERM)"


def _command(group: Group) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(group.size)]
    if group.node.count == 1:
        command.append("--standalone")
    else:
        host, _, port = group.node.address.rpartition(":")
        command += ["--nnodes", str(group.node.count), "--node-rank", str(group.node.number)]
        command += ["--master-addr", host, "--master-port", port]
    return [*command, "-m", group.module, str(group.handover)]


def _environment(group: Group) -> dict[str, str]:
    """This process's environment without what an outer launcher says in it."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_WORDS and not name.startswith(LAUNCHER_PREFIXES)
    }
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH"))))
    kept["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(group.grace_seconds)
    if not group.sees_gpus:
        kept["CUDA_VISIBLE_DEVICES"] = ""
    return kept


def _listen(output: Iterable[str] | TextIO, lines: deque[str], is_heard: bool) -> None:
    for line in output:
        if line.startswith(PROGRESS):
            log.info("%s", line.removeprefix(PROGRESS).rstrip())
        elif line.strip():
            lines.append(line.rstrip())
            if is_heard:
                print(line, end="", file=sys.stderr, flush=True)


@contextmanager
def _passing_on_sigterm(launcher: "subprocess.Popen[str]") -> Iterator[threading.Event]:
    """Only the main thread hears signals; in another one, the main thread's business is not touched."""
    told = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def pass_on(*_: object) -> None:
        told.set()
        launcher.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
