"""Speed, memory and growth of the teacher pass: a model's top-10 distributions into a store on the disk.

The reference is a bare forward: the same padded batches through the model's own forward, which gives [B, T, V]
logits (no loss, no gradients), and nothing done with them. A second one computes no logits at all. All run on one
thread, take turns, and are timed by that thread's clock; with `--device cuda` in bfloat16, by the wall, speed alone.
Tensor legend: B dialogues, T tokens, V vocabulary.
"""

import hashlib
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from growth import Growth, plot_growth
from measure import RESULTS, Row, parser, report, turns
from passes import (
    BASE,
    PARTS,
    TINY,
    Clock,
    Corpus,
    Reading,
    all_supervised,
    clocks,
    in_shards,
    load_teacher,
    make_teacher,
)
from peaks import largest_tensor, peak_of
from transformers.utils.logging import disable_progress_bar

from fusion.config.schema import TeacherConfig
from fusion.dialogues.encode import Encoded

SMALLEST = 1_000
REPEATED_TOKENS = 100_000
MICRO, MEBI = 1e6, 1 << 20
FLOAT = 4
DIALOGUES, DIALOGUES_OF_ACCELERATORS = 24, 1319
STEPS = (*PARTS, "all")
PART_NAMES = {"candidates": "log-softmax, NLL, most likely tokens, and the rest"}
BARE, DECODER = "bare forward, all logits", "decoder alone, no logits"
OURS, OURS_OF_ALL = "teacher pass", "teacher pass, every token supervised"


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    options.add_argument("--dialogues", type=int, default=None, help="dialogues read; default: 24, cuda: 1319")
    options.add_argument("--rounds", type=int, default=3, help="how often every pass runs")
    options.add_argument("--largest", type=float, default=1e6, help="tokens of the largest corpus of the growth curve")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    device = torch.device(chosen.device)
    dialogues = chosen.dialogues or (DIALOGUES if device.type == "cpu" else DIALOGUES_OF_ACCELERATORS)
    corpus = Corpus.of(chosen.data)
    name = "teacher_pass" if device.type == "cpu" else f"teacher_pass_{device.type}"
    out = chosen.out or RESULTS / f"{name}.json"
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = speed(corpus, dialogues, chosen.rounds, device, Path(folder))
        if device.type == "cpu":
            memory_rows, peaks = memory(corpus, dialogues, chosen.data, Path(folder))
            growth_rows, grown = growth(corpus, chosen.largest, out)
            rows, facts = [*rows, *memory_rows, *growth_rows], facts | peaks | grown
    report("teacher pass", rows, out, inputs=corpus.origin, **facts)


def speed(
    corpus: Corpus, dialogues: int, rounds: int, device: torch.device, folder: Path
) -> tuple[list[Row], dict[str, Any]]:
    """Passes of a model of 110 million parameters, which stays in `folder`, and the parts of ours."""
    settings = TeacherConfig(device=str(device))
    dtype = "float32" if device.type == "cpu" else "bfloat16"
    reader = make_teacher(folder, corpus.vocab_size, BASE, settings.device, dtype)
    named = corpus.alike(dialogues)
    reading = Reading(reader, in_shards(named, settings), settings)
    everything = Reading(reader, in_shards(all_supervised(named), settings), settings)
    calls = {
        BARE: reading.all_logits,
        OURS: reading.into_store,
        DECODER: reading.no_logits,
        OURS_OF_ALL: everything.into_store,
    }
    read_clocks: Clock = partial(clocks, device)
    if device.type != "cpu":  # kernels are loaded, and memory is taken, at the first use
        turns(calls, 1, read_clocks)
    took = turns(calls, rounds, read_clocks)
    column = 0 if device.type == "cpu" else 1  # a thread that waits for an accelerator looks idle
    per_token = MICRO / reading.tokens
    best = {name: float(times[:, column].min()) * per_token for name, times in took.items()}
    parts = {name: float(spent[column]) * per_token for name, spent in reading.parts(read_clocks).items()}
    facts = {
        "device": _device_name(device),
        "dtype": dtype,
        "parameters": sum(weight.numel() for weight in reader.model.parameters()),
        "read": _sizes(reading),
        "tokens_per_second": {name: MICRO / each for name, each in best.items()},
        "seconds_by_round": {name: _by_clock(times) for name, times in took.items()},
        "speed_against_bare_forward_by_round": {
            name: _by_clock(took[BARE] / took[name]) for name in (OURS, OURS_OF_ALL)
        },
        "parts_us_per_token": parts,
    }
    return _speed_rows(best, parts), facts


def _speed_rows(best: dict[str, float], parts: dict[str, float]) -> list[Row]:
    pairs = (BARE, OURS), (BARE, OURS_OF_ALL), (DECODER, OURS)
    compared = [Row(f"{ours} : {theirs}", best[theirs], best[ours], "us/token") for theirs, ours in pairs]
    return [*compared, *(Row(f"of it: {PART_NAMES.get(part, part)}", None, parts[part], "us/token") for part in PARTS)]


def _sizes(reading: Reading) -> dict[str, int]:
    return {
        "tokens": reading.tokens,
        "tokens with padding": sum(ids_BT.numel() for ids_BT, _ in reading.padded),
        "supervised rows": reading.rows,
        "batches": len(reading.padded),
    }


def _by_clock(times: np.ndarray) -> dict[str, list[float]]:
    """[rounds, clocks] by clock."""
    return {name: times[:, column].round(4).tolist() for column, name in enumerate(("thread", "wall"))}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, one thread"


def memory(corpus: Corpus, dialogues: int, data: Path, folder: Path) -> tuple[list[Row], dict[str, Any]]:
    """Peaks of processes that run one pass of the model in `folder`, and the largest tensor of ours."""
    settings = TeacherConfig(device="cpu")
    passes = {BARE: "all_logits", DECODER: "no_logits", OURS: "into_store"}
    peaks = {name: peak_of(each, folder, corpus.vocab_size, data, dialogues) for name, each in passes.items()}
    reader = load_teacher(folder, corpus.vocab_size, settings.device, "float32")
    reading = Reading(reader, in_shards(corpus.alike(dialogues), settings), settings)
    logits = FLOAT * corpus.vocab_size * max(ids_BT.numel() for ids_BT, _ in reading.padded)
    largest = largest_tensor(reader.model, reading.into_store)
    assert largest.bytes < logits, f"the pass made a tensor {largest.shape} of {largest.bytes} bytes"
    above = {name: peak.above / MEBI for name, peak in peaks.items()}
    shape = " x ".join(map(str, largest.shape))
    rows = [
        Row(f"memory above the loaded model, {OURS} : {name}", above[name], above[OURS], "MiB")
        for name in (BARE, DECODER)
    ]
    rows.append(
        Row(f"largest tensor made ({shape}) : logits of its batch", logits / MEBI, largest.bytes / MEBI, "MiB")
    )
    return rows, {"peaks_in_bytes": {name: peak._asdict() for name, peak in peaks.items()}}


def growth(corpus: Corpus, largest: float, out: Path) -> tuple[list[Row], dict[str, Any]]:
    """Passes of a tiny model over ten times more tokens at every step; small ones run again and again."""
    settings = TeacherConfig(device="cpu")
    device = torch.device(settings.device)
    tokens: list[int] = []
    took: dict[str, list[float]] = {step: [] for step in STEPS}
    with tempfile.TemporaryDirectory() as folder:
        reader = make_teacher(Path(folder), corpus.vocab_size, TINY, settings.device, "float32")
    wanted = SMALLEST
    while wanted <= max(largest, 10 * SMALLEST):
        reading = Reading(reader, in_shards(list(_dialogues(corpus, wanted)), settings), settings)
        tokens.append(reading.tokens)
        runs = [reading.parts(partial(clocks, device)) for _ in range(max(1, REPEATED_TOKENS // wanted))]
        for step in STEPS:
            took[step].append(min(float(run[step][0]) for run in runs))
        wanted *= 10
    grown = Growth.of(tokens, took)
    plot_growth(grown, out.with_name(f"{out.stem}_scaling.png"), "The teacher pass", "tokens of the teacher")
    rows = [Row(f"slope of {name}", None, slope, "log-log") for name, slope in grown.slopes.items()]
    return rows, {"growth": grown._asdict()}


def _dialogues(corpus: Corpus, tokens: int) -> Iterator[tuple[str, Encoded]]:
    """Dialogues with `tokens` tokens together; they come again, under new names, where they run out."""
    total = 0
    for number, (_, one) in enumerate(cycle(corpus.named)):
        yield hashlib.sha256(str(number).encode()).hexdigest()[:32], one
        total += len(one.ids_N)
        if total >= tokens:
            return


if __name__ == "__main__":
    main()
