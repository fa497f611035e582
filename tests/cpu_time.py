"""How much work a command is, measured by another one: seconds alone would tell how fast the machine is."""

import os
import subprocess
import sys
import tempfile
from functools import cache


def run_and_weigh(command, **settings):
    """What a command said on its standard output and error, and the seconds that it kept a CPU busy."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, **settings)
        _, status, usage = os.wait4(process.pid, 0)  # of this process alone, whatever else ends meanwhile
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        said, complained = out.read(), err.read()
    assert process.returncode == 0, complained
    return said, complained, usage.ru_utime


@cache
def weight_of_hydra():
    """Seconds for which Hydra alone keeps a CPU busy until a command line can be read: no entry point does less."""
    command = [sys.executable, "-c", "import hydra, hydra.core.override_parser.overrides_parser, omegaconf"]
    return min(run_and_weigh(command)[2] for _ in range(3))
