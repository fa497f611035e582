"""Speed of token alignment against the published procedure in plain Python, and its growth with the corpus.

Everything runs on one thread and is timed by that thread's clock; references and ours take turns on the same
inputs, and must agree where both say the same.
Array legend: N tokens, R rows, S source rows, K candidates, P distinct pairs.
"""

import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import numpy as np
from growth import measure_growth, plot_growth
from measure import RESULTS, Row, inputs, interleaved, parser, report, seconds
from passages import Passage, Support, Texts
from published import PlainMapping, piece_cost, plain_path, remembered

from fusion.alignment import Alignment, MappingStatistics, boundary_rows, build_alignment, dtw_path
from fusion.alignment.statistics import FIELD_BITS
from fusion.teaching.teacher_rows import TeacherRows

PATH_TOKENS = (512, 2048)
WALK_TOKENS = (200, 500, 1000, 2000)
SYNTHETIC_PAIRS = 5_000_000
MILLI, MICRO, MEBI = 1e3, 1e6, 1 << 20
CLOCK = time.thread_time


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--largest", type=float, default=1e7, help="tokens of the largest corpus of the growth curve")
    chosen = options.parse_args()
    out = chosen.out or RESULTS / "alignment.json"
    data = inputs(chosen.data)
    texts = Texts(data)
    rows = [row for tokens in PATH_TOKENS for row in path_rows(texts, tokens)]
    rows += walk_rows(texts)
    rows += [row for tokens in PATH_TOKENS for row in mapping_rows(texts, tokens)]
    rows += count_rows(texts)
    growth = measure_growth(texts, strategy(texts, "ms", "bytes"), int(chosen.largest))
    rows += [Row(f"slope of {name}", None, slope, "log-log") for name, slope in growth.slopes.items()]
    plot_growth(growth, out.with_name(f"{out.stem}_scaling.png"), "Alignment", "tokens of the pivot")
    report("token alignment", rows, out, inputs=data.origin, growth=growth._asdict())


def path_rows(texts: Texts, tokens: int) -> list[Row]:
    """The dynamic-programming path of one text."""
    source, pivot = texts.pieces(texts.passage(tokens))
    markers = {"source_marker": texts.pair.source.space_marker, "pivot_marker": texts.pair.pivot.space_marker}
    cost = piece_cost(**markers)
    lo_N, hi_N = dtw_path(source, pivot, **markers)
    images = [list(range(lo, hi + 1)) for lo, hi in zip(lo_N.tolist(), hi_N.tolist(), strict=True)]
    assert plain_path(source, pivot, remembered(cost)) == images
    rows = []
    for name, priced in (("as published", cost), ("distances remembered", remembered(cost))):
        took = interleaved(
            partial(plain_path, source, pivot, priced),
            partial(dtw_path, source, pivot, **markers),
            1 if tokens > 1000 else 3,
            15,
            CLOCK,
        )
        rows.append(Row(f"path, {tokens:,} tokens, {name}", *(time * MILLI for time in took), "ms"))
    return rows


def walk_rows(texts: Texts) -> list[Row]:
    """Byte ends of both sides and the rows that have read the same bytes, per token of the pivot."""
    rows = _walk_rows(texts, f"{len(texts.dialogues):,} dialogues", texts.dialogues)
    for tokens in WALK_TOKENS:
        rows += _walk_rows(texts, f"one text of {tokens:,} tokens", [texts.passage(tokens)])
    return rows


def _walk_rows(texts: Texts, name: str, passages: Sequence[Passage]) -> list[Row]:
    pivot, source = texts.pair.pivot, texts.pair.source

    def beside_the_text() -> None:
        for text, ours, theirs in passages:
            boundary_rows(pivot.text_ends(ours, text), source.text_ends(theirs, text))

    def from_ids_alone() -> None:
        for _, ours, theirs in passages:
            boundary_rows(pivot.ends(ours), source.ends(theirs))

    size, repeats = sum(len(passage.pivot_ids) for passage in passages), 10 if len(passages) > 1 else 300
    return [
        Row(
            f"byte ends ({how}) and boundary rows, {name}",
            None,
            seconds(call, repeats, CLOCK) * MICRO / size,
            "us/token",
        )
        for how, call in (("text_ends", beside_the_text), ("ends", from_ids_alone))
    ]


def mapping_rows(texts: Texts, tokens: int) -> list[Row]:
    """Rows, candidates and weights of one text."""
    passage = texts.passage(tokens)
    support, (source, pivot) = texts.support(passage), texts.pieces(passage)
    released, ms = strategy(texts, "ms_released", "dtw"), strategy(texts, "ms", "bytes")
    cost = piece_cost(texts.pair.source.space_marker, texts.pair.pivot.space_marker)
    plain, images = _plain_mapping(texts, released), plain_path(source, pivot, remembered(cost))
    listed = support.ids_SK.tolist(), support.logits_SK.tolist()

    def plain_rows() -> tuple[list[list[int]], list[list[float]]]:
        return plain.rows(pivot, source, images, _labels(passage), listed)

    def ours(alignment: Alignment) -> None:
        alignment.map_rows(passage.pivot_ids, passage.source_ids, *support)

    mapped = released.map_rows(passage.pivot_ids, passage.source_ids, *support)
    assert [mapped.ids[a:b].tolist() for a, b in pairwise(mapped.indptr)] == plain_rows()[0]
    rounds = 1 if tokens > 1000 else 3
    path, took_released = interleaved(
        lambda: plain_path(source, pivot, cost), lambda: ours(released), rounds, 9, CLOCK
    )
    alone, took = interleaved(plain_rows, lambda: ours(ms), 3, 9, CLOCK)
    spoken = seconds(_speaker(texts, passage, support, ms), 9, CLOCK)
    compared = {
        "ms_released, both with the path": (path + alone, took_released),
        "ms_released, the reference without the path": (alone, took_released),
        "ms, the reference with its path": (path + alone, took),
        "ms, the reference without its path": (alone, took),
        "ms from encoded dialogues (speak), the reference with its path": (path + alone, spoken),
    }
    name = f"top-{support.ids_SK.shape[1]} rows of {tokens:,} tokens"
    return [Row(f"{name}, {how}", theirs * MILLI, mine * MILLI, "ms") for how, (theirs, mine) in compared.items()]


def _labels(passage: Passage) -> list[int]:
    following = passage.pivot_ids[1:].tolist()
    return [*following, *following[-1:]]


def _plain_mapping(texts: Texts, released: Alignment) -> PlainMapping:
    pair = texts.pair
    targets = released.targets(np.arange(len(pair.source))).tolist()
    strings = [string or "" for string in pair.source_tokenizer.convert_ids_to_tokens(list(range(len(pair.source))))]
    markers = pair.pivot.space_marker, pair.source.space_marker
    return PlainMapping(pair.pivot_tokenizer.get_vocab(), strings.__getitem__, targets, markers)


def _speaker(texts: Texts, passage: Passage, support: Support, alignment: Alignment) -> Callable[[], object]:
    """Call that does what the pipeline does with one dialogue whose ends are known."""
    pivot, source = texts.pair.rows(passage.pivot_ids, passage.source_ids)
    none_S = np.zeros(len(source), dtype=np.float32)
    ids_SK, logprobs_SK = support.ids_SK.astype(np.int32), support.logits_SK.astype(np.float32)
    teacher = TeacherRows(ids_SK, logprobs_SK, none_S, none_S)
    wanted_R, stored_S = np.arange(len(pivot)), np.arange(len(source))
    return lambda: alignment.speak(pivot, source, teacher, wanted_R, stored_S)


def statistics(texts: Texts, path: str) -> MappingStatistics:
    """Counts of all dialogues."""
    counts = MappingStatistics(texts.pair.pivot_tokenizer, texts.pair.source_tokenizer, path)
    for passage in texts.dialogues[:: 1 if path == "bytes" else 8]:
        counts.add(passage.pivot_ids, passage.source_ids)
    return counts


def strategy(texts: Texts, name: str, path: str) -> Alignment:
    pair = texts.pair
    return build_alignment(name, pair.pivot_tokenizer, pair.source_tokenizer, statistics(texts, path))


def count_rows(texts: Texts) -> list[Row]:
    """From counted pairs to the `ms` map, and the memory that takes."""
    pair = texts.pair
    real, synthetic = statistics(texts, "bytes"), MappingStatistics(pair.pivot_tokenizer, pair.source_tokenizer)
    generator = np.random.default_rng(0)
    size = min(SYNTHETIC_PAIRS, len(pair.pivot) * len(pair.source) // 2)
    drawn = generator.integers(len(pair.pivot) * len(pair.source), size=size + size // 50)
    cells_P = np.unique(drawn)[:size]
    keys_P = cells_P // len(pair.source) << FIELD_BITS | cells_P % len(pair.source)
    synthetic._fold(keys_P, generator.integers(1, 1000, size=len(keys_P)))
    counted = seconds(lambda: statistics(texts, "bytes"), 3, CLOCK)
    rows = [Row(f"ms counts of {len(texts.dialogues):,} dialogues", None, counted, "s")]
    for counts in (real, synthetic):
        name = f"ms map from {len(counts.counts):,} distinct pairs"
        rows.append(Row(name, None, seconds(counts.most_frequent, 5, CLOCK), "s"))
    tracemalloc.start()
    synthetic.most_frequent()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    dense = 4 * len(pair.pivot) * len(pair.source)
    return [*rows, Row("memory of that map, against a dense int32 matrix", dense / MEBI, peak / MEBI, "MiB")]


if __name__ == "__main__":
    main()
