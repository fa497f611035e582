"""Is everything here that a job needs? `python -m fusion.doctor` looks, and says what to do where it is not.

It ends with 1 when something is missing without which nothing runs; a note is no failure.
"""

import argparse
import netrc
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.error import URLError
from urllib.request import Request, urlopen

from fusion.planning.machine import Machine, free_disk
from fusion.planning.text import GIB, size_text

PACKAGE = "fusion-chat"
HUB, HUB_SECONDS = "https://huggingface.co", 3
WANDB_HOST = "api.wandb.ai"
LITTLE_DISK = 5 * GIB
TRUE = {"1", "true", "yes", "on"}


class Finding(NamedTuple):
    verdict: Literal["ok", "note", "missing"]
    subject: str
    text: str


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fusion.doctor", description=__doc__)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="folder of the cache (paths.cache)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the jobs (paths.runs)")
    options = parser.parse_args(words)
    findings = list(examine(options.cache, options.runs))
    for finding in findings:
        print(f"{finding.verdict:<8}{finding.subject:<12}{finding.text}")
    missing = sum(finding.verdict == "missing" for finding in findings)
    print(f"{missing} missing" if missing else "everything that a job needs is here")
    return 1 if missing else 0


def examine(cache: Path, runs: Path) -> Iterator[Finding]:
    """All findings, in the order in which a newcomer meets the things."""
    yield Finding("ok", "python", f"{platform.python_version()} on {platform.platform()}")
    yield from _packages()
    yield from _devices()
    for subject, folder in (("cache", cache), ("runs", runs)):
        yield _folder(subject, folder)
    yield _hub()
    yield _wandb()


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    try:
        needed = [Requirement(text) for text in metadata.requires(PACKAGE) or []]
    except metadata.PackageNotFoundError:
        yield Finding(
            "note", "packages", f"{PACKAGE} is not installed, so versions cannot be checked: pip install -e ."
        )
        return
    for one in needed:
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(one.name)
        except metadata.PackageNotFoundError:
            yield Finding("missing", "package", f"{one.name}: not installed; pip install '{one}'")
            continue
        if not one.specifier.contains(version, prereleases=True):
            yield Finding(
                "missing", "package", f"{one.name} {version}: {one.specifier} is needed; pip install '{one}'"
            )
        elif one.name in ("torch", "transformers", "pytorch-lightning", "hydra-core"):
            yield Finding("ok", "package", f"{one.name} {version}")


def _devices() -> Iterator[Finding]:
    machine = Machine.here()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cpu", f"{cores} cores, {size_text(machine.memory)} of memory")
    try:
        import torch

        gpus = [torch.cuda.get_device_properties(place) for place in range(torch.cuda.device_count())]
    except (ImportError, OSError) as error:
        yield Finding("missing", "torch", f"cannot be imported: {error}")
        return
    for place, gpu in enumerate(gpus):
        yield Finding("ok", "gpu", f"cuda:{place} {gpu.name}, {size_text(gpu.total_memory)}")
    if machine.gpus and not gpus:
        yield Finding("missing", "gpu", "the driver sees GPUs, torch does not: install a build of torch for CUDA")
    elif not gpus:
        yield Finding("note", "gpu", "none: tiny models train on the CPU, large ones elsewhere")


def _folder(subject: str, folder: Path) -> Finding:
    existing = folder
    while not existing.exists():
        existing = existing.absolute().parent
    try:
        with tempfile.NamedTemporaryFile(dir=existing):
            pass
    except OSError as error:
        return Finding("missing", subject, f"{folder}: cannot be written ({error.strerror}); paths.{subject}=FOLDER")
    free = free_disk(folder)
    text = f"{folder.absolute()}: writable, {size_text(free)} free"
    return Finding("note" if free < LITTLE_DISK else "ok", subject, text)


def _hub() -> Finding:
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        return Finding("note", "hub", "offline (HF_HUB_OFFLINE is set): only what was downloaded before")
    return _reached(lambda: urlopen(Request(HUB, method="HEAD"), timeout=HUB_SECONDS).close())


def _reached(ask: Callable[[], None]) -> Finding:
    try:
        ask()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        return Finding("note", "hub", f"{HUB} is not reached ({reason}); folders and downloaded models work")
    from huggingface_hub import get_token

    return Finding("ok", "hub", f"{HUB} is reached, {'logged in' if get_token() else 'not logged in: hf auth login'}")


def _wandb() -> Finding:
    if os.environ.get("WANDB_API_KEY") or _has_netrc(WANDB_HOST):
        return Finding("ok", "wandb", "logged in; logger=wandb logger.offline=false uploads at once")
    return Finding("note", "wandb", "not logged in: logger=wandb records offline; wandb login changes that")


def _has_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


if __name__ == "__main__":
    sys.exit(main())
