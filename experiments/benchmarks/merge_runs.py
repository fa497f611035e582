"""Merges in processes of their own, ours and other programs': seconds, and the most memory they held."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MERGEKIT_NAMES = {"sce_mergekit": "sce"}
SAMPLE_SECONDS = 0.02
KIBI = 1 << 10
Sweep = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Inputs:
    """The folders of a family of models, and where outputs may go."""

    base: Path
    targets: list[Path]
    work: Path


@dataclass(frozen=True)
class Run:
    """One merge. `seconds`: without starting Python and imports; `command_seconds`: with them. `processor_seconds`: of
    all threads of the merge, which a machine that others use changes less.

    Bytes of the process: `anonymous`, its own memory at the most (sampled); `resident`, the peak of that and of pages
    of mapped files, which other processes may share.
    """

    out: Path
    seconds: float
    command_seconds: float
    processor_seconds: float
    anonymous: int
    resident: int
    report: dict[str, Any]


def ours(inputs: Inputs, method: str, parameters: dict[str, Any], sweep: Sweep = (), **engine: object) -> Run:
    """`sweep`: parameters of several merges that share one pass, in place of `parameters`."""
    recipe = _recipe(inputs, method, parameters) | {"engine": engine, "sweep": list(sweep)}
    return _run(inputs, "ours", recipe, sys.executable, HERE / "merge_once.py", OMP_NUM_THREADS="1")


def fusion_bench(inputs: Inputs, python: str, method: str, parameters: dict[str, Any], threads: int) -> Run:
    recipe = _recipe(inputs, method, parameters) | {"engine": {"threads": threads}}
    script = HERE / "fusionbench_once.py"
    return _run(inputs, "fusion_bench", recipe, python, script, OMP_NUM_THREADS=str(threads))


def _recipe(inputs: Inputs, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    targets = [str(target) for target in inputs.targets]
    return {"method": method, "base": str(inputs.base), "targets": targets, "parameters": parameters}


def mergekit(inputs: Inputs, python: str, method: str, parameters: dict[str, Any], dtype: str, threads: int) -> Run:
    """`dtype`: what it computes in; it writes bfloat16."""
    recipe = mergekit_recipe(inputs, method, parameters) | {"dtype": dtype, "out_dtype": "bfloat16"}
    return _run(inputs, "mergekit", recipe, python, HERE / "mergekit_once.py", OMP_NUM_THREADS=str(threads))


def mergekit_recipe(inputs: Inputs, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """mergekit's configuration of the same merge."""
    own = {name: parameters[name] for name in ("weight", "density") if name in parameters}
    models = [{"model": str(target), "parameters": own} for target in inputs.targets]
    shared: dict[str, Any] = {name: parameters[name] for name in ("normalize",) if name in parameters}
    if "tau" in parameters:
        shared["select_topk"] = parameters["tau"]
    recipe = {"merge_method": MERGEKIT_NAMES.get(method, method), "models": models, "parameters": shared}
    return recipe if method == "linear" else recipe | {"base_model": str(inputs.base)}


def _run(inputs: Inputs, name: str, recipe: dict[str, Any], python: str, script: Path, **environment: str) -> Run:
    """The script prints a report, or seconds alone, as the last line."""
    path, out = inputs.work / f"{name}.json", inputs.work / name
    path.write_text(json.dumps(recipe), "utf-8")
    shutil.rmtree(out, ignore_errors=True)
    log = inputs.work / f"{name}.log"
    started = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [python, str(script), str(path), str(out)], stdout=output, stderr=output, env=os.environ | environment
        )
        anonymous, resident = _watch(process)
    command_seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{script.name} failed:\n{log.read_text('utf-8')[-2000:]}")
    report = json.loads(log.read_text("utf-8").splitlines()[-1])
    return Run(out, report["seconds"], command_seconds, report["processor_seconds"], anonymous, resident, report)


def _watch(process: "subprocess.Popen[bytes]") -> tuple[int, int]:
    """Peaks of the process's own memory and of all it had in memory, while it runs; Linux only, else zeros."""
    status, anonymous, resident = Path(f"/proc/{process.pid}/status"), 0, 0
    while process.poll() is None:
        try:
            lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        except OSError:
            lines = {}
        anonymous = max(anonymous, _bytes(lines.get("RssAnon")))
        resident = max(resident, _bytes(lines.get("VmHWM")))
        time.sleep(SAMPLE_SECONDS)
    return anonymous, resident


def _bytes(text: str | None) -> int:
    return int(text.split()[0]) * KIBI if text else 0
