"""Loss and gradients of the head: fusion against dense logits and targets, and against SFT with the same kernel.

Time, memory, growth with tokens and vocabulary, and where the time goes; float32 on one thread of a CPU, timed by that
thread's clock. All ways take turns, and give the same gradients where they have the same loss.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from growth import Growth, plot_growth
from heads import CPU, DIALOGUES, TOP_K, Passes, peak_of
from measure import RESULTS, Row, parser, report, turns
from torch.profiler import ProfilerActivity, profile

from fusion.objective.head_loss import rows_per_chunk

MIB = 1 << 20
FLOAT = 4
SUPERVISED = 0.7
"""Share of the tokens that assistants say, in the run where not every token is supervised."""
VOCABULARIES = (8_000, 32_000, 128_000)
LENGTHS = (1_024, 2_048, 4_096, 8_192)
SIZES = (8_000, 16_000, 32_000, 64_000, 128_000)
SMALL_TOKENS = 1_024
"""Of the growth over vocabularies."""
SHOWN_OPERATIONS = 10


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--tokens", type=int, default=4_096, help="of four dialogues together")
    options.add_argument("--vocabulary", type=int, default=32_000)
    options.add_argument("--hidden", type=int, default=512)
    options.add_argument("--rounds", type=int, default=5, help="how often every way takes its turn")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    out = chosen.out or RESULTS / "objective.json"
    rows, facts = [], {}
    for part in (_time, _memory, _growth):
        more_rows, more_facts = part(chosen)
        rows, facts = [*rows, *more_rows], facts | more_facts
    for over, grown in facts["growth"].items():
        plot_growth(grown, out.with_name(f"{out.stem}_{over}.png"), "Loss and gradients of the head", over)
    facts["growth"] = {over: grown._asdict() for over, grown in facts["growth"].items()}
    shape = {name: getattr(chosen, name) for name in ("tokens", "vocabulary", "hidden")}
    report("Loss and gradients of the head", rows, out, dialogues=DIALOGUES, top_k=TOP_K, **shape, **facts)


def _time(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    passes = Passes.random(chosen.tokens, chosen.vocabulary, chosen.hidden)
    _check_gradients(passes)
    took = _seconds(passes, tuple(passes.ways), chosen.rounds)
    best = {way: min(times) for way, times in took.items()}
    some = Passes.random(chosen.tokens, chosen.vocabulary, chosen.hidden, SUPERVISED)
    of_some = {way: min(times) for way, times in _seconds(some, ("fusion", "dense", "released"), 3).items()}
    ratios = np.asarray(took["fusion"]) / np.asarray(took["sft"])
    named = {"tail bucket": "fusion with a tail bucket", "jsd": "JSD at temperature 2, with a tail bucket"}
    rows = [
        Row("fusion : logits and targets of all tokens", best["dense"], best["fusion"], "s"),
        Row("fusion : the released program's loss", best["released"], best["fusion"], "s"),
        Row(f"the first, {SUPERVISED:.0%} of the tokens supervised", of_some["dense"], of_some["fusion"], "s"),
        Row(f"the second, {SUPERVISED:.0%} of the tokens supervised", of_some["released"], of_some["fusion"], "s"),
        Row("fusion : SFT with the same kernel", best["sft"], best["fusion"], "s"),
        Row("the same, median of the rounds", 1.0, float(np.median(ratios)), "of SFT"),
        Row("SFT : cross-entropy of all logits", best["dense sft"], best["sft"], "s"),
        Row("fusion : its three matrix products and nothing else", best["products"], best["fusion"], "s"),
        Row("these products : by torch.mm", best["products by torch.mm"], best["products"], "s"),
        *(Row(f"{name} : SFT with the same kernel", best["sft"], best[way], "s") for way, name in named.items()),
    ]
    flops = 6 * chosen.tokens * chosen.vocabulary * chosen.hidden
    facts = {
        "seconds": {way: np.round(times, 4).tolist() for way, times in took.items()},
        "seconds_some_supervised": of_some,
        "gflops_per_second": flops / best["fusion"] / 1e9,
        "profile": _profile(passes),
    }
    return rows, facts


def _check_gradients(passes: Passes) -> None:
    """Fusion and the dense ways have one loss, so they have one gradient."""
    ours = passes.gradients("fusion")
    for way in ("dense", "released"):
        for one, other in zip(ours, passes.gradients(way), strict=True):
            error = float((one - other).norm() / other.norm())
            assert error < 1e-4, f"{way}: gradients differ by {error}"


def _seconds(passes: Passes, ways: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    calls = {way: passes.ways[way] for way in ways}
    return {way: times[:, 0].tolist() for way, times in turns(calls, rounds, _clock).items()}


def _clock() -> np.ndarray:
    return np.asarray([time.thread_time()])


def _profile(passes: Passes) -> dict[str, float]:
    """Shares of fusion's time by operation."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        passes.fusion()
    events = seen.key_averages()
    whole = sum(event.self_cpu_time_total for event in events)
    slowest = sorted(events, key=lambda event: -event.self_cpu_time_total)[:SHOWN_OPERATIONS]
    return {event.key: round(event.self_cpu_time_total / whole, 3) for event in slowest}


def _memory(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    peaks = {
        way: peak_of(way, chosen.tokens, chosen.vocabulary, chosen.hidden)
        for way in ("fusion", "sft", "dense", "released")
    }
    above = {way: peak.above / MIB for way, peak in peaks.items()}
    rows = [
        Row("memory, fusion : logits and targets of all tokens", above["dense"], above["fusion"], "MiB"),
        Row("memory, fusion : the released program's loss", above["released"], above["fusion"], "MiB"),
        Row("memory, fusion : SFT with the same kernel", above["sft"], above["fusion"], "MiB"),
    ]
    rest = {}
    for vocab in VOCABULARIES:
        peak = peak_of("fusion", chosen.tokens, vocab, chosen.hidden).above
        gradient, chunk = vocab * chosen.hidden * FLOAT, rows_per_chunk(vocab, CPU) * vocab * FLOAT
        rest[vocab] = {"peak": peak, "head_gradient": gradient, "chunk": chunk}
        beyond = (peak - gradient - chunk) / MIB
        rows.append(Row(f"memory, {vocab:,} tokens: beyond head's gradient and one chunk", None, beyond, "MiB"))
    return rows, {"peaks_in_bytes": {way: peak._asdict() for way, peak in peaks.items()}, "by_vocabulary": rest}


def _growth(chosen: argparse.Namespace) -> tuple[list[Row], dict[str, Any]]:
    shapes = {
        "tokens": [(tokens, chosen.vocabulary) for tokens in LENGTHS],
        "vocabulary": [(SMALL_TOKENS, vocab) for vocab in SIZES],
    }
    grown = {}
    for place, (over, sizes) in enumerate(shapes.items()):
        found = [_seconds(Passes.random(*size, chosen.hidden), ("fusion", "sft"), 2) for size in sizes]
        took = {way: [min(one[way]) for one in found] for way in ("fusion", "sft")}
        grown[over] = Growth.of([size[place] for size in sizes], took)
    rows = [Row(f"growth with {over}", None, one.slopes["fusion"], "log-log") for over, one in grown.items()]
    return rows, {"growth": grown}


if __name__ == "__main__":
    main()
