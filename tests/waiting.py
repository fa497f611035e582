"""Waiting for what must happen some time, however busy the machine is."""

import time

PATIENCE = 1200.0
"""Seconds after which what has not happened never will: importing PyTorch from a cold disk may take a minute."""


def wait_for(condition, seconds=PATIENCE):
    """What `condition()` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)
    return found


def next_second():
    """Go on in another second of the clock than this one: some names are told apart by it alone."""
    now = int(time.time())
    wait_for(lambda: int(time.time()) > now)
