"""A whole optimiser step on one CPU thread: fusion against dense logits and targets, and against SFT; where time goes.

All three take turns in float32; memory is what the step needs beyond weights, gradients and moments, in a process of
its own. `training_step.py` compares fusion and SFT alone, on any device.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from measure import RESULTS, Row, parser, report, turns
from steps import CPU, SHAPES, WAYS, Learner, Shape, Step, make_batch, peak_of
from torch.profiler import ProfilerActivity, profile

MIB = 1 << 20
LENGTHS = (128, 256, 512, 1_024)
SHOWN_OPERATIONS = 12


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--shape", default="small", choices=SHAPES)
    options.add_argument("--dialogues", type=int, default=4)
    options.add_argument("--length", type=int, default=256, help="tokens per dialogue")
    options.add_argument("--rounds", type=int, default=5, help="how often every way takes its turn")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[chosen.shape]
    batch = make_batch(chosen.dialogues, chosen.length, shape.vocab, CPU)
    steps = {way: Step(way, Learner(shape), batch) for way in WAYS}
    norms = {way: step() for way, step in steps.items()}
    assert abs(norms["fusion"] / norms["dense"] - 1) < 1e-3, norms  # the same gradient, two ways
    took = {way: float(times.min()) for way, times in turns(steps, chosen.rounds, _cpu_seconds).items()}
    peaks = {way: peak_of(way, chosen.shape, chosen.dialogues, chosen.length).above / MIB for way in WAYS}
    lengths = dict(_by_length(shape, chosen.rounds))
    slope = float(np.polyfit(np.log(list(lengths)), np.log(list(lengths.values())), 1)[0])
    rows = [
        Row("fusion against dense logits and targets", took["dense"], took["fusion"], "s"),
        Row("the same, memory beyond weights and moments", peaks["dense"], peaks["fusion"], "MiB"),
        Row("fusion against SFT", took["sft"], took["fusion"], "s"),
        Row("the same, memory beyond weights and moments", peaks["sft"], peaks["fusion"], "MiB"),
        *(Row(f"fusion, one dialogue of {length} tokens", None, seconds, "s") for length, seconds in lengths.items()),
    ]
    facts: dict[str, Any] = {
        "shape": {"name": chosen.shape, **shape._asdict()},
        "dialogues": chosen.dialogues,
        "length": chosen.length,
        "slope_over_length": slope,
        "profile": _profile(steps["fusion"]),
    }
    print(f"time over tokens: slope {slope:.3f}; of the step's time: {facts['profile']}")
    report("One optimiser step, dense or sparse", rows, chosen.out or RESULTS / "dense_step.json", **facts)


def _cpu_seconds() -> np.ndarray:
    """Of this process, which has one thread that works: waiting for a core that others use does not count."""
    return np.asarray([time.process_time()])


def _by_length(shape: Shape, rounds: int) -> Iterator[tuple[int, float]]:
    learner = Learner(shape)
    for tokens in LENGTHS:
        step = Step("fusion", learner, make_batch(1, tokens, shape.vocab, CPU))
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

    step.learner.optimizer.zero_grad()
    loss = step.loss() / len(step.batch.rows_R)
    mark()
    loss.backward()
    mark()
    step.clip()
    mark()
    step.learner.optimizer.step()
    mark()
    names = ("forward pass and head's gradients", "backward pass", "clipping", "AdamW")
    return {
        name: round(float(part), 3) for name, part in zip(names, np.diff(marks) / (marks[-1] - marks[0]), strict=True)
    }


if __name__ == "__main__":
    main()
