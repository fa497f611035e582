"""A whole optimiser step of SFT and of fusion, side by side on one device: tokens per second, MFU, peak memory.

Both take turns on the same model with random weights, of a size that people train. On a GPU, for instance:

    python training_step.py --device cuda --shape 7b --dtype bfloat16 --length 2048

Weights, gradients and moments are in `--dtype` (mixed: float32, computing in bfloat16). MFU is the share of what the
maker promises for a GPU; on a CPU, of what a product of large matrices reaches there.
"""

import argparse
import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import RESULTS, Row, parser, report, turns
from steps import OBJECTIVES, PRECISIONS, SHAPES, Learner, Setup, Shape, Step, forget_peak, make_batch

from fusion.training.flops import peak_flops
from fusion.training.throughput import GIB, peak_memory

WARMUP_STEPS = 2
PRODUCT = 2_048
"""Rows and columns of the matrices whose product shows what a device can do."""
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"shape": ["small"], "dtype": "float32", "length": 256, "dialogues": 4, "checkpoint": False},
    "cuda": {"shape": ["1b", "7b"], "dtype": "bfloat16", "length": 2_048, "dialogues": 1, "checkpoint": True},
}


class Peak(NamedTuple):
    """FLOP/s that a device could reach, and who says so."""

    flops: float
    source: str


def main(words: Sequence[str] | None = None) -> None:
    chosen = _chosen(words)
    torch.set_num_threads(1)
    device = torch.device(chosen.device, 0) if chosen.device == "cuda" else torch.device("cpu")
    setup = Setup(device, chosen.dtype, chosen.parallel, chosen.checkpoint)
    with _process_group(setup):
        peak = _peak(setup)
        print(f"{_name(device)}: {peak.flops / 1e12:.3g} TFLOP/s in {chosen.dtype} ({peak.source})")
        found = {name: _measure(SHAPES[name], setup, chosen, peak) for name in chosen.shape}
    report(
        f"One optimiser step, SFT and fusion: {_name(device)}, {chosen.dtype}, parallel={chosen.parallel}",
        [row for name, one in found.items() for row in _rows(name, one)],
        chosen.out or RESULTS / f"training_step{'_cuda' if chosen.device == 'cuda' else ''}.json",
        device=_name(device),
        settings={key: value for key, value in vars(chosen).items() if key not in ("out", "data")},
        peak=peak._asdict(),
        shapes={name: {**SHAPES[name]._asdict(), **one} for name, one in found.items()},
    )


def _chosen(words: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for; ends with status 2 where this machine cannot do it."""
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cpu", choices=DEFAULTS)
    options.add_argument("--shape", nargs="+", choices=SHAPES, help="cpu: small; cuda: 1b 7b")
    options.add_argument("--dtype", choices=PRECISIONS, help="cpu: float32; cuda: bfloat16")
    options.add_argument("--length", type=int, help="tokens per dialogue; cpu: 256; cuda: 2048")
    options.add_argument("--dialogues", type=int, help="in one micro-batch; cpu: 4; cuda: 1")
    options.add_argument(
        "--checkpoint", action=argparse.BooleanOptionalAction, help="activation checkpointing; cpu: no; cuda: yes"
    )
    options.add_argument("--parallel", default="single", choices=("single", "fsdp"), help="fsdp: FSDP2 on one device")
    options.add_argument("--rounds", type=int, default=5, help="how often both take their turn")
    chosen = options.parse_args(words)
    for name, value in DEFAULTS[chosen.device].items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, value)
    if chosen.device == "cuda" and not torch.cuda.is_available():
        options.error("--device cuda: this machine has no CUDA device; --device cpu measures a small shape here")
    if min(chosen.length - 3, chosen.dialogues, chosen.rounds) < 1:
        options.error("--length needs 4 tokens or more, --dialogues and --rounds 1 or more")
    return chosen


@contextmanager
def _process_group(setup: Setup) -> Iterator[None]:
    """Of this process alone, where weights are sharded."""
    if setup.parallel == "single":
        yield
        return
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, 1 thread of {os.cpu_count()}"


def _clock(device: torch.device) -> Callable[[], np.ndarray]:
    """A GPU's own time; a CPU's one thread that works, so that waiting for a core that others use does not count."""

    def wall() -> np.ndarray:
        torch.cuda.synchronize(device)
        return np.asarray([time.perf_counter()])

    return wall if device.type == "cuda" else lambda: np.asarray([time.process_time()])


def _peak(setup: Setup) -> Peak:
    promised = peak_flops(setup.device, PRECISIONS[setup.dtype][0])
    if promised is not None:
        return Peak(promised, "data sheet")
    dtype = torch.float32 if setup.dtype == "float32" else torch.bfloat16
    one, other = (torch.randn(PRODUCT, PRODUCT, device=setup.device).to(dtype) for _ in range(2))
    took = turns({"product": lambda: one @ other}, 4, _clock(setup.device))["product"].min()
    return Peak(2 * PRODUCT**3 / float(took), f"a product of two matrices of {PRODUCT} rows and columns, measured")


def _measure(shape: Shape, setup: Setup, chosen: argparse.Namespace, peak: Peak) -> dict[str, Any]:
    """Numbers of SFT and fusion, or what a GPU had too little memory for."""
    gc.collect()  # a model before this one
    try:
        learner = Learner(shape, setup)
        batch = make_batch(chosen.dialogues, chosen.length, shape.vocab, setup.device)
        steps = {way: Step(way, learner, batch) for way in OBJECTIVES}
        for _ in range(WARMUP_STEPS):
            norms = {way: step() for way, step in steps.items()}
        assert all(np.isfinite(norm) and norm > 0 for norm in norms.values()), norms
        took = turns(steps, chosen.rounds, _clock(setup.device))
        return {way: _numbers(step, took[way][:, 0], peak) for way, step in steps.items()}
    except torch.OutOfMemoryError as error:
        print(f"out of memory: {error}")
        return {"out_of_memory": str(error).splitlines()[0]}


def _numbers(step: Step, took: np.ndarray, peak: Peak) -> dict[str, Any]:
    device = step.learner.setup.device
    forget_peak(device)
    step()
    seconds = float(took.min())
    return {
        "seconds": seconds,
        "all_seconds": took.tolist(),
        "tokens_per_second": step.tokens / seconds,
        "mfu": step.flops / seconds / peak.flops,
        "peak_memory_gib": peak_memory(device) / GIB,
    }


def _rows(name: str, found: dict[str, Any]) -> Iterator[Row]:
    if "out_of_memory" in found:
        return
    sft, fusion = found["sft"], found["fusion"]
    yield Row(f"{name}: fusion against SFT, one step", sft["seconds"], fusion["seconds"], "s")
    yield Row(f"{name}: peak memory", sft["peak_memory_gib"], fusion["peak_memory_gib"], "GiB")
    for way, one in found.items():
        yield Row(f"{name}: {way}", None, one["tokens_per_second"], "tokens/s")
        yield Row(f"{name}: {way}, MFU", None, 100 * one["mfu"], "%")


if __name__ == "__main__":
    main()
