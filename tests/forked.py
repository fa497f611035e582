"""Processes that are forked from the tests' own, so that the imports are paid once, and killed."""

import os
import signal
import time
from collections.abc import Callable


def fork(work: Callable[[], object]) -> int:
    """Run `work` in a process of its own; return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)  # without pytest's own ending
    return child


def ended(child: int) -> int:
    """How a child ended: its exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_after(child: int, seconds: float) -> bool:
    """Kill `child` so long after now; whether it was still alive."""
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return ended(child) == -signal.SIGKILL
