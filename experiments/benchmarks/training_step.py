"""A whole optimiser step: fusion against SFT and against dense logits and targets; time, memory, where time goes.

On a CPU (`--device cpu`, float32) all three take turns, and memory is what the step needs beyond weights, gradients
and moments, in a process of its own. On a GPU (`--device cuda`, weights in bfloat16, gradient checkpointing) fusion
and SFT run one after the other, with tokens per second, MFU and peak memory.
"""

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Row, parser, report, turns
from steps import SHAPES, WAYS, Shape, Step, make_batch, make_model, make_step, peak_of
from torch.profiler import ProfilerActivity, profile

from fusion.training.flops import peak_flops
from fusion.training.throughput import GIB

MIB = 1 << 20
LENGTHS = (128, 256, 512, 1_024)
SHOWN_OPERATIONS = 12


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options.add_argument("--shape", nargs="+", default=None, choices=SHAPES, help="cpu: small; cuda: 1b 7b")
    options.add_argument("--dialogues", type=int, default=None, help="cpu: 4; cuda: 1")
    options.add_argument("--tokens", type=int, default=None, help="per dialogue; cpu: 256; cuda: 2048")
    options.add_argument("--rounds", type=int, default=5, help="how often every way takes its turn")
    chosen = options.parse_args()
    (_on_cpu if chosen.device == "cpu" else _on_gpu)(chosen)


def _on_cpu(chosen: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    (name,) = chosen.shape or ["small"]
    dialogues, tokens = chosen.dialogues or 4, chosen.tokens or 256
    steps = {way: make_step(way, SHAPES[name], dialogues, tokens) for way in WAYS}
    norms = {way: step() for way, step in steps.items()}
    assert abs(norms["fusion"] / norms["dense"] - 1) < 1e-3, norms  # the same gradient, two ways
    took = {way: float(times.min()) for way, times in turns(steps, chosen.rounds, _cpu_seconds).items()}
    peaks = {way: peak_of(way, name, dialogues, tokens).above / MIB for way in WAYS}
    ours = steps["fusion"]
    lengths = dict(_by_length(SHAPES[name], chosen.rounds))
    slope = float(np.polyfit(np.log(list(lengths)), np.log(list(lengths.values())), 1)[0])
    rows = [
        Row("fusion against dense logits and targets", took["dense"], took["fusion"], "s"),
        Row("the same, memory beyond weights and moments", peaks["dense"], peaks["fusion"], "MiB"),
        Row("fusion against SFT", took["sft"], took["fusion"], "s"),
        Row("the same, memory beyond weights and moments", peaks["sft"], peaks["fusion"], "MiB"),
        *(Row(f"fusion, one dialogue of {length} tokens", None, seconds, "s") for length, seconds in lengths.items()),
    ]
    facts: dict[str, Any] = {
        "shape": {"name": name, **SHAPES[name]._asdict()},
        "dialogues": dialogues,
        "tokens": tokens,
        "tokens_per_second": {way: ours.tokens / seconds for way, seconds in took.items()},
        "model_gflops_per_second": {way: ours.flops / seconds / 1e9 for way, seconds in took.items()},
        "slope_over_length": slope,
        "profile": _profile(ours),
    }
    print(f"time over tokens: slope {slope:.3f}; of the step's time: {facts['profile']}")
    report("One optimiser step", rows, chosen.out or RESULTS / "training_step.json", **facts)


def _cpu_seconds() -> np.ndarray:
    """Of this process, which has one thread that works: waiting for a core that others use does not count."""
    return np.asarray([time.process_time()])


def _by_length(shape: Shape, rounds: int) -> Iterator[tuple[int, float]]:
    model = make_model(shape, torch.device("cpu"), torch.float32)
    for tokens in LENGTHS:
        step = Step("fusion", model, make_batch(1, tokens, shape.vocab, torch.device("cpu")))
        step()
        yield tokens, float(turns({"fusion": step}, rounds, _cpu_seconds)["fusion"].min())


def _profile(step: Step) -> dict[str, dict[str, float]]:
    """Shares of the step's time, by part and by operation."""
    parts = _parts(step)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    events = seen.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    slowest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN_OPERATIONS]
    operations = {event.key: round(event.self_cpu_time_total / whole, 3) for event in slowest}
    return {"parts": parts, "operations": operations}


def _parts(step: Step) -> dict[str, float]:
    marks = [time.process_time()]

    def mark() -> None:
        marks.append(time.process_time())

    step.optimizer.zero_grad()
    loss = step.loss() / len(step.batch.rows_R)
    mark()
    loss.backward()
    mark()
    step.clip()
    mark()
    step.optimizer.step()
    mark()
    names = ("forward pass and head's gradients", "backward pass", "clipping", "AdamW")
    return {
        name: round(float(part), 3) for name, part in zip(names, np.diff(marks) / (marks[-1] - marks[0]), strict=True)
    }


def _on_gpu(chosen: argparse.Namespace) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    dialogues, tokens = chosen.dialogues or 1, chosen.tokens or 2_048
    rows, facts = [], {}
    for name in chosen.shape or ["1b", "7b"]:
        found = {
            way: _measure_on_gpu(way, SHAPES[name], dialogues, tokens, device, chosen.rounds)
            for way in ("sft", "fusion")
        }
        facts[name] = found
        for unit in ("s", "GiB"):
            rows.append(Row(f"{name}, fusion against SFT", found["sft"][unit], found["fusion"][unit], unit))
    report(
        f"One optimiser step on {torch.cuda.get_device_name(device)}",
        rows,
        chosen.out or RESULTS / "training_step_cuda.json",
        device=torch.cuda.get_device_name(device),
        dialogues=dialogues,
        tokens=tokens,
        shapes=facts,
    )


def _measure_on_gpu(
    way: str, shape: Shape, dialogues: int, tokens: int, device: torch.device, rounds: int
) -> dict[str, float | None]:
    model = make_model(shape, device, torch.bfloat16)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = Step(way, model, make_batch(dialogues, tokens, shape.vocab, device))
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats(device)
    seconds = float(turns({way: step}, rounds, _wall_seconds)[way].min())
    peak = peak_flops(device, "bf16-true")
    found = {
        "s": seconds,
        "GiB": torch.cuda.max_memory_allocated(device) / GIB,
        "tokens_per_second": step.tokens / seconds,
        "mfu": None if peak is None else step.flops / seconds / peak,
    }
    print(way, shape, {key: value and round(value, 3) for key, value in found.items()}, flush=True)
    return found


def _wall_seconds() -> np.ndarray:
    torch.cuda.synchronize()
    return np.asarray([time.perf_counter()])


if __name__ == "__main__":
    main()
