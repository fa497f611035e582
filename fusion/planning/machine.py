"""What this machine has: memory of devices and of the whole, free disk, and how fast it is when it is asked to try."""

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

MEMORY_INFO = Path("/proc/meminfo")
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux tells what a container may have at the most."""
NVIDIA = "nvidia-smi"
OTHER_DEVICES = (Path("/dev/kfd"), Path("/dev/nvidia0"))
PROBE_BYTES = 1 << 26
PROBE_SECONDS = 0.5
PROBE_WIDTH = 1024
SHARE_OF_PRODUCTS = 0.6
"""Of the speed of bare matrix products, what a training step reaches; the rest are small operations and waiting."""


@dataclass(frozen=True)
class Machine:
    gpus: tuple[int, ...]
    """Bytes of each."""
    memory: int
    """Bytes of the CPU's memory that a process may have at the most."""
    has_other_devices: bool = False
    """There are accelerators that `nvidia-smi` does not tell of."""

    @classmethod
    def here(cls) -> "Machine":
        gpus = _gpus()
        return cls(gpus, _memory(), not gpus and any(map(Path.exists, OTHER_DEVICES)))


def _gpus() -> tuple[int, ...]:
    """Asked of the driver's own program, since torch takes seconds to load."""
    if shutil.which(NVIDIA) is None:
        return ()
    words = [NVIDIA, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return tuple(int(line) << 20 for line in done.stdout.split() if line.isdigit()) if done.returncode == 0 else ()


def _memory() -> int:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if MEMORY_INFO.is_file():
        lines = dict(line.split(":", 1) for line in MEMORY_INFO.read_text().splitlines())
        physical = int(lines["MemTotal"].split()[0]) << 10
    limits = [file.read_text().strip() for file in LIMITS if file.is_file()]
    return min([physical, *(int(limit) for limit in limits if limit.isdigit())])


def free_disk(folder: Path) -> int:
    """Bytes free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.absolute().parent
    return shutil.disk_usage(folder).free


def measured_flops(device_type: str, is_half: bool) -> float:
    """FLOP/s that a training step may reach on this device, from matrix products of half a second."""
    import torch

    dtype = torch.bfloat16 if is_half and device_type == "cuda" else torch.float32
    width = PROBE_WIDTH * (8 if device_type == "cuda" else 1)
    left = torch.randn(width, width, device=device_type, dtype=dtype)
    count, started = -1, time.perf_counter()  # the first product warms up
    while time.perf_counter() - started < PROBE_SECONDS or count < 1:
        left @ left
        if device_type == "cuda":
            torch.cuda.synchronize()
        count += 1
        if count == 0:
            started = time.perf_counter()
    return SHARE_OF_PRODUCTS * count * 2 * width**3 / (time.perf_counter() - started)


def measured_disk_speed(folder: Path) -> float:
    """Bytes per second written to the disk of `folder` and flushed."""
    while not folder.exists():
        folder = folder.absolute().parent
    file, content = folder / f".probe.{os.getpid()}.tmp", os.urandom(PROBE_BYTES)
    try:
        started = time.perf_counter()
        with file.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        return PROBE_BYTES / (time.perf_counter() - started)
    finally:
        file.unlink(missing_ok=True)
