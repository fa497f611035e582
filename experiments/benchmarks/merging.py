"""Merging against mergekit 0.1.5 (https://github.com/arcee-ai/mergekit), and other measurements of merging.

    python -m venv mergekit-venv && mergekit-venv/bin/pip install -r experiments/benchmarks/mergekit.txt
    python experiments/benchmarks/merging.py --mergekit mergekit-venv/bin/python --work FOLDER

`FOLDER` takes 9 GB, with `--sizes 3B` 32 GB more. Both programs merge a base and five targets in bfloat16, made of
seeds, from a warm page cache, in turn, `--rounds` times; the shortest run of each counts. mergekit writes with two
threads beside the merge, which is its quickest way here, and computes in bfloat16 (its quickest) and in float32 (as
we do). Our merges run with `engine.checksums=false`, the same work, and once more with checksums. `--fusion-bench`
names a Python with FusionBench (fusionbench.txt), which merges models in memory. Every part has a file of results.
"""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from measure import RESULTS, Row, parser, report, seconds
from merge_models import LARGE, SMALL, TINY, make_models
from merge_reference import Error, errors
from merge_runs import Inputs, Run, fusion_bench, mergekit, ours

THREADS = 2
NUM_TARGETS = 5
GIBI = 1 << 30
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.2},
    "task_arithmetic": {"weight": 0.3},
    "dare_linear": {"weight": 0.2, "density": 0.6, "normalize": True},
    "ties": {"weight": 0.2, "density": 0.6, "normalize": True},
    "sce_mergekit": {"tau": 0.1},
}
"""FuseChat's published baselines; SCE as mergekit computes it, so that the outputs can be compared."""
UNKNOWN = ("dare_linear",)
"""Methods of whose masks mergekit tells nothing."""
CHECKED = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.down_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
    "model.norm.weight",
)
MODELS = f"base and {NUM_TARGETS} targets, {SMALL.num_elements:,} parameters each, bfloat16"
SHAPES = {"0.1B": TINY, "0.4B": SMALL, "3B": LARGE}
DTYPES = ("bfloat16", "float32")
"""What mergekit computes in."""


def compare(inputs: Inputs, method: str, python: str | None, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Rows of seconds and memory of one method, and facts about the outputs."""
    parameters = METHODS[method]
    best: dict[str, Run] = {}
    facts: dict[str, Any] = {"load_average": [], "error": {}}
    for _ in range(rounds):
        facts["load_average"].append(os.getloadavg()[0])
        for name, run in _runs(inputs, method, parameters, python):
            if name not in best or run.seconds < best[name].seconds:
                best[name] = run
            if name not in facts["error"] and (name.startswith("ours") or method not in UNKNOWN):
                facts["error"][name] = _error(run, inputs, method, parameters)._asdict()
    mine, checked = best["ours"], best["ours with checksums"]
    rows = []
    for name, run in best.items():
        if name.startswith("mergekit"):
            rows.append(Row(f"{method}: {name}", run.seconds, mine.seconds, "s"))
            rows.append(Row(f"{method}: {name}, processors", run.processor_seconds, mine.processor_seconds, "s"))
            rows.append(Row(f"{method}: {name}, whole command", run.command_seconds, mine.command_seconds, "s"))
            rows.append(Row(f"{method}: {name}, ours with checksums", run.seconds, checked.seconds, "s"))
            rows.append(Row(f"{method}: {name}, own memory", run.anonymous / GIBI, mine.anonymous / GIBI, "GiB"))
            rows.append(Row(f"{method}: {name}, resident", run.resident / GIBI, mine.resident / GIBI, "GiB"))
    if python is None:
        rows += [Row(f"{method}", None, mine.seconds, "s"), Row(method, None, mine.resident / GIBI, "GiB")]
    facts["speed"] = {name: best[name].report["speed"] / 1e9 for name in ("ours", "ours with checksums")}
    return rows, facts


def _runs(inputs: Inputs, method: str, parameters: dict[str, Any], python: str | None) -> Iterator[tuple[str, Run]]:
    yield "ours", ours(inputs, method, parameters, threads=THREADS, checksums=False, probe_disk=False)
    for dtype in DTYPES if python else ():
        yield f"mergekit in {dtype}", mergekit(inputs, str(python), method, parameters, dtype, THREADS)
    yield "ours with checksums", ours(inputs, method, parameters, threads=THREADS, probe_disk=False)


def sweep(inputs: Inputs, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """Three settings of SCE: three merges, and the same in one pass."""
    settings = [{"tau": tau} for tau in (0.05, 0.1, 0.2)]
    engine = {"threads": THREADS, "probe_disk": False, "checksums": False}
    seconds: dict[str, list[float]] = {"separate": [], "fused": []}
    for _ in range(rounds):
        seconds["separate"].append(sum(ours(inputs, "sce", one, **engine).seconds for one in settings))
        seconds["fused"].append(ours(inputs, "sce", {}, sweep=settings, **engine).seconds)
    row = Row("three settings of sce: separate, fused", min(seconds["separate"]), min(seconds["fused"]), "s")
    return [row], {"all_seconds": seconds}


def against_fusion_bench(inputs: Inputs, python: str) -> list[Row]:
    """Rows of the methods that FusionBench has, which trims the whole model."""
    wanted: dict[str, dict[str, Any]] = {
        "linear": {},
        "task_arithmetic": {"weight": 0.3},
        "ties": {"density": 0.6, "trim": "model"},
    }
    rows = []
    for method, parameters in wanted.items():
        mine = ours(inputs, method, parameters, threads=THREADS, probe_disk=False, checksums=False)
        theirs = fusion_bench(inputs, python, method, parameters, THREADS)
        rows.append(Row(f"{method}: FusionBench", theirs.seconds, mine.seconds, "s"))
        rows.append(Row(f"{method}: FusionBench, processors", theirs.processor_seconds, mine.processor_seconds, "s"))
        rows.append(Row(f"{method}: FusionBench, own memory", theirs.anonymous / GIBI, mine.anonymous / GIBI, "GiB"))
    return rows


def _error(run: Run, inputs: Inputs, method: str, parameters: dict[str, Any]) -> Error:
    return errors(run.out, inputs.base, inputs.targets, CHECKED, method, parameters)


def copies(inputs: Inputs) -> dict[str, float]:
    """GB read and written per second by a plain copy of the base, left in memory and brought to the disk."""
    source = inputs.base / "model.safetensors"
    num_bytes = 2 * source.stat().st_size / 1e9
    return {
        name: num_bytes / seconds(lambda flush=flush: _copy(source, inputs.work / "copy", flush), repeats=3)
        for name, flush in (("in memory", False), ("on the disk", True))
    }


def _copy(source: Path, copied: Path, flush: bool) -> None:
    shutil.copyfile(source, copied)
    with copied.open("rb") as file:
        if flush:
            os.fsync(file.fileno())


def memory(work: Path, sizes: Sequence[str], methods: Sequence[str]) -> Iterator[tuple[str, dict]]:
    """Merges of a base and three targets of growing size."""
    for name in sizes:
        shape = SHAPES[name]
        base, targets = make_models(work / name, shape, 3)
        for method in methods:
            run = ours(Inputs(base, targets, work), method, METHODS[method], threads=THREADS)
            yield (
                f"{name}, {method}",
                {
                    "elements": shape.num_elements,
                    "own_memory_gib": run.anonymous / GIBI,
                    "resident_gib": run.resident / GIBI,
                    "seconds": run.seconds,
                    "speed_gb_s": run.report["speed"] / 1e9,
                },
            )


def main() -> None:
    options = parser("Merging against mergekit, and memory against model size.")
    options.add_argument(
        "--mergekit", metavar="PYTHON", help="a Python that has mergekit (mergekit.txt); else no ratios"
    )
    options.add_argument(
        "--work", type=Path, required=True, help="folder for models and outputs, kept for the next run"
    )
    options.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    options.add_argument(
        "--sizes", nargs="*", choices=SHAPES, default=["0.1B", "0.4B"], help="memory is measured of these"
    )
    options.add_argument("--sweep", action="store_true", help="also time a sweep in one pass")
    options.add_argument("--fusion-bench", metavar="PYTHON", help="a Python that has FusionBench (fusionbench.txt)")
    options.add_argument("--rounds", type=int, default=2)
    given = options.parse_args()
    out = given.out or RESULTS / "merging.json"
    inputs = Inputs(*make_models(given.work / "0.4B", SMALL, NUM_TARGETS), given.work)
    for method in given.methods:  # a file for each: the slow ones take minutes
        warm(inputs)
        before = copies(inputs)
        rows, facts = compare(inputs, method, given.mergekit, given.rounds)
        copied = {"copy_gb_s": {"before": before, "after": copies(inputs)}, "models": MODELS}
        report(f"Merging by {method}", rows, out.with_stem(f"{out.stem}_{method}"), **copied, **facts)
    if given.sweep:
        warm(inputs)
        rows, facts = sweep(inputs, given.rounds)
        report("A sweep in one pass", rows, out.with_stem(f"{out.stem}_sweep"), models=MODELS, **facts)
    if given.fusion_bench:
        small = Inputs(*make_models(given.work / "0.1B", TINY, 3), given.work)
        warm(small)
        rows = against_fusion_bench(small, given.fusion_bench)
        told = f"base and 3 targets, {TINY.num_elements:,} parameters each, bfloat16"
        report("Merging against FusionBench 0.2.33", rows, out.with_stem(f"{out.stem}_fusion_bench"), models=told)
    if given.sizes:
        found = dict(memory(given.work, given.sizes, ("linear", "ties")))
        rows = [Row(f"{name}: own memory", None, one["own_memory_gib"], "GiB") for name, one in found.items()]
        rows += [Row(f"{name}: speed", None, one["speed_gb_s"], "GB/s") for name, one in found.items()]
        report("Memory of a merge by size", rows, out.with_stem(f"{out.stem}_memory"), merges=found)


def warm(inputs: Inputs) -> None:
    """Bring the inputs into the page cache."""
    piece = bytearray(1 << 24)
    for folder in (inputs.base, *inputs.targets):
        with (folder / "model.safetensors").open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


if __name__ == "__main__":
    started = time.monotonic()
    main()
    print(f"{time.monotonic() - started:.0f} s")
