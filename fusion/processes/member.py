"""One of several processes that work as one, as it sees itself; `fusion.processes.starter` has started it."""

import logging
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from fusion.config import EXIT_USER_ERROR, UserError
from fusion.processes.failures import Failure, save_failure, saved_failures
from fusion.processes.starter import LAST_LINES, PROGRESS

OTHERS_SECONDS = 5
"""How long a process outlives another one's failure: enough for a failure of its own to be told."""


def take_part(handover: Path, size: int, work: Callable[[], None]) -> NoReturn:
    """Do this process's share of what `size` processes do together, and end; a failure is told in a file of
    `handover`."""
    rank = int(os.environ["RANK"])
    threading.Thread(target=_watch, args=(handover, rank), daemon=True).start()
    _log_to_starter(rank)
    try:
        found = int(os.environ["WORLD_SIZE"])
        if found != size:
            raise UserError(f"{found} processes were started, but {size} were to work together")
        work()
        torch.distributed.destroy_process_group()
    except UserError as error:
        _leave(handover, rank, Failure(EXIT_USER_ERROR, error.problems))
    except SystemExit as error:  # told to end
        _leave(handover, rank, Failure(error.code if isinstance(error.code, int) else 1, [str(error)]))
    except BaseException:
        _leave(handover, rank, Failure(1, traceback.format_exc().splitlines()[-LAST_LINES:]))
    _end(0)


def _leave(handover: Path, rank: int, failure: Failure) -> NoReturn:
    save_failure(handover, rank, failure)
    _end(failure.status or 1)


def _end(status: int) -> NoReturn:
    """At once: the usual clean-up would wait for processes that wait for this one after a failure; and after success,
    a thread of Gloo's that still holds a tensor while Python goes may abort the process, although all is done
    (https://github.com/pytorch/pytorch/pull/179291)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(handover: Path, rank: int) -> None:
    """End with the starter, whose end closes the standard input even if it was killed; end soon after another process
    has failed, because waiting for it in a collective operation may take half an hour."""
    while not _others_failed(handover, rank):
        if select.select([sys.stdin], [], [], 1.0)[0] and not os.read(sys.stdin.fileno(), 1):
            os._exit(1)
    time.sleep(OTHERS_SECONDS)
    os._exit(1)


def _others_failed(handover: Path, rank: int) -> bool:
    return any(other != rank and not failure.is_wanted for other, failure in saved_failures(handover).items())


def _log_to_starter(rank: int) -> None:
    """What the package logs goes to the starter's log, once."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter(f"{PROGRESS}%(message)s"))
    package = logging.getLogger("fusion")
    package.addHandler(handler)
    package.setLevel(logging.INFO if rank == 0 else logging.ERROR)
