"""Processes that are forked from the tests' own, so that the imports are paid once, and killed."""

import os
import signal
import sys
import time
from collections.abc import Callable
from random import Random

from waiting import PATIENCE

FILE_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}
"""Of Python's audit events, those that tell how far a process is with its files."""


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


def ended(child: int, seconds: float = PATIENCE) -> int:
    """How a child ended: its exit status, or minus the signal. One that does not end is killed, and the test fails."""
    end = time.monotonic() + seconds
    while not (found := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"a forked process did not end within {seconds:g} seconds")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def file_events(work: Callable[[], object]) -> int:
    """How many file events `work` has in a process of its own."""
    reader, writer = os.pipe()

    def counted() -> None:
        seen = []
        sys.addaudithook(lambda event, _: seen.append(event) if event in FILE_EVENTS else None)
        work()
        os.write(writer, str(len(seen)).encode())

    assert ended(fork(counted)) == 0
    count = int(os.read(reader, 20))
    os.close(reader)
    os.close(writer)
    return count


def doom(event: int, seconds: float) -> None:
    """Let this process be killed so long behind its file event of that number, whatever it does then.

    The kernel's alarm ends it as SIGKILL does: no code of it runs any more. What another process would kill after a
    time of sleeping has gone on by then as far as the machine lets it, to its end or not to its beginning.
    """
    left = [event]

    def tell(name: str, _: object) -> None:
        if name in FILE_EVENTS:
            left[0] -= 1
            if left[0] == 0:
                signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sys.addaudithook(tell)


def killed(work: Callable[[], object], draw: Random, events: int) -> bool:
    """Run `work` in a process that is doomed, at one of so many file events or soon behind it; whether it was killed,
    and not done before."""
    event, seconds = draw.randint(1, events), draw.choice((0, draw.uniform(0, 0.003)))

    def doomed() -> None:
        doom(event, seconds)
        work()

    status = ended(fork(doomed))
    assert status in (0, -signal.SIGALRM), status
    return status != 0
