"""What the processes of a training know together; one process alone knows what it knows."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

Told = TypeVar("Told")


class SharedFailure(Exception):
    """Raised on every process when one could not read or write; says why."""


def from_all_ranks(own: Told) -> list[Told]:
    """What every process says, by rank; all of them have to ask."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [own]
    told: list[Told] = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(told, own)
    return told


def together(work: Callable[[], Told]) -> list[Told]:
    """What `work` returns on every process, by rank; nobody goes on before the last one is done.

    Raises:
        SharedFailure: files could not be read or written, here or by another process.
    """
    try:
        done, problems = [work()], []
    except OSError as error:
        done, problems = [], [f"{error}"]
    except CheckpointException as error:  # the same one on every process
        failures = [one for one, _ in error.failures.values()]
        if not all(isinstance(one, OSError) for one in failures):
            raise
        done, problems = [], [f"{one}" for one in failures]
    told = from_all_ranks((done, problems))
    failed = dict.fromkeys(problem for _, problems in told for problem in problems)
    if failed:
        raise SharedFailure("; ".join(failed))
    return [done[0] for done, _ in told]
