"""Time of every step of an alignment over corpora of growing size, and the slope of its logarithm."""

import time
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from passages import Passage, Texts

from fusion.alignment import Alignment, MappingStatistics, Rows, boundary_rows
from fusion.teaching.teacher_rows import TeacherRows

SMALLEST = 10_000
CLOCK = time.thread_time
STEPS = ("byte ends", "boundary rows", "statistics", "mapping", "all")


class Growth(NamedTuple):
    """Seconds by step over corpora of `tokens` tokens of the pivot."""

    tokens: list[int]
    seconds: dict[str, list[float]]
    slopes: dict[str, float]
    """Least squares through the logarithms: 1 is linear."""

    @classmethod
    def of(cls, tokens: list[int], seconds: dict[str, list[float]]) -> "Growth":
        logarithms = {step: np.polyfit(np.log(tokens), np.log(took), 1) for step, took in seconds.items()}
        return cls(tokens, seconds, {step: float(slope) for step, (slope, _) in logarithms.items()})


class Spoken(NamedTuple):
    passage: Passage
    teacher: TeacherRows


def measure_growth(texts: Texts, alignment: Alignment, largest: int) -> Growth:
    """Ten times more tokens at every step, from `SMALLEST` to `largest`; the dialogues come again where they run out.

    Tokenising is done before; the source's candidates are made up, once per dialogue. Small corpora are aligned again
    and again, up to a million tokens in all, and the shortest run counts.
    """
    spoken = [_spoken(texts, passage, seed) for seed, passage in enumerate(texts.dialogues)]
    _one_run(texts, alignment, spoken[:2])
    sizes, took = [], {step: [] for step in STEPS}
    wanted = SMALLEST
    while wanted <= max(largest, 10 * SMALLEST):
        corpus = list(_corpus(spoken, wanted))
        sizes.append(sum(len(one.passage.pivot_ids) for one in corpus))
        runs = [_one_run(texts, alignment, corpus) for _ in range(max(1, 10**6 // wanted))]
        for step in STEPS:
            took[step].append(min(run[step] for run in runs))
        wanted *= 10
    return Growth.of(sizes, took)


def _spoken(texts: Texts, passage: Passage, seed: int) -> Spoken:
    support = texts.support(passage, seed)
    none_S = np.zeros(len(passage.source_ids), dtype=np.float32)
    return Spoken(
        passage,
        TeacherRows(support.ids_SK.astype(np.int32), support.logits_SK.astype(np.float32), none_S, none_S),
    )


def _corpus(spoken: list[Spoken], tokens: int) -> Iterator[Spoken]:
    total = 0
    for one in islice(cycle(spoken), tokens):
        yield one
        total += len(one.passage.pivot_ids)
        if total >= tokens:
            return


def _one_run(texts: Texts, alignment: Alignment, corpus: list[Spoken]) -> dict[str, float]:
    """Seconds by step; everything but the counts is forgotten, as a store would have it on disk."""
    pair = texts.pair
    counts = MappingStatistics(pair.pivot_tokenizer, pair.source_tokenizer)
    marks = np.zeros(len(STEPS) - 1)
    for (text, pivot_ids, source_ids), teacher in corpus:
        started = CLOCK()
        ends = pair.pivot.text_ends(pivot_ids, text), pair.source.text_ends(source_ids, text)
        walked = CLOCK()
        boundary_rows(*ends)
        joined = CLOCK()
        pivot, source = Rows.of(pivot_ids, ends[0]), Rows.of(source_ids, ends[1])
        counts.add_rows(pivot, source)
        counted = CLOCK()
        alignment.speak(pivot, source, teacher, np.arange(len(pivot)), np.arange(len(source)))
        marks += np.diff([started, walked, joined, counted, CLOCK()])
    started = CLOCK()
    counts.most_frequent()
    marks[STEPS.index("statistics")] += CLOCK() - started
    return dict(zip(STEPS, [*marks.tolist(), float(marks.sum())], strict=True))


def plot_growth(growth: Growth, path: Path, what: str, axis: str) -> None:
    """Seconds over tokens, both in logarithms, one line per step; `axis` says whose tokens."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for step, took in growth.seconds.items():
        axes.loglog(growth.tokens, took, marker="o", label=f"{step} (slope {growth.slopes[step]:.3f})")
    axes.set(xlabel=axis, ylabel="seconds, one thread", title=f"{what} grows with the corpus")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
