"""What stage 1 reports is read as it was written, whatever is missing, and averaged over seeds."""

import io

import numpy as np
import pytest
from rich.console import Console
from sample_rows import aligned, report, row

from fusion.alignment.categories import CATEGORIES as WRITTEN_CATEGORIES
from fusion.alignment.relations import RELATIONS as WRITTEN_RELATIONS
from fusion.alignment.report import SHAPE, Tally
from fusion.config.schema import AlignmentConfig
from fusion.tracking.grouping import summarise
from fusion.tracking.stage1_report import (
    CATEGORIES,
    RELATIONS,
    comparison_lines,
    mean,
    occurring_categories,
    occurring_kinds,
    read_alignment,
    read_fusion,
)
from fusion.tracking.terminal import LOG_WIDTH, print_stage1


def target(seed: int, alignment: dict, **extra):
    return row("tiny_a", "target", 0.5, seed=seed, alignment=alignment, **extra)


def lines_of(*rows):
    return comparison_lines(summarise(rows))


def test_relations_and_categories_are_those_that_alignments_report():
    assert RELATIONS == WRITTEN_RELATIONS
    assert CATEGORIES == WRITTEN_CATEGORIES


def test_a_tally_is_read_as_it_was_written():
    generator = np.random.default_rng(0)
    tally = Tally(rows_LC=generator.integers(1, 50, SHAPE))
    tally.covered_LC = tally.aligned_LC = generator.integers(0, tally.rows_LC + 1)
    tally.mass_LC = 0.5 * tally.aligned_LC
    read = read_alignment(tally.report(has_masses=True))
    total = tally.rows_LC.sum()
    assert read.tokens == total
    assert read.covered == pytest.approx(tally.covered_LC.sum() / total, abs=1e-6)
    assert read.mass_kept == 0.5
    for number, name in enumerate(RELATIONS):
        assert read.kinds[name].share == pytest.approx(tally.rows_LC[number].sum() / total, abs=1e-6)
        assert read.kinds[name].mass_kept == 0.5
    for number, name in enumerate(CATEGORIES):
        counts_L = tally.rows_LC[:, number]
        assert list(read.categories[name].kinds.values()) == pytest.approx(list(counts_L / counts_L.sum()))
        assert read.categories[name].covered == pytest.approx(
            tally.covered_LC[:, number].sum() / counts_L.sum(), abs=1e-6
        )


def test_the_bar_is_full_and_tells_covered_from_uncovered():
    segments = read_alignment(aligned()).segments
    assert [(one.relation, one.is_covered) for one in segments] == [("1-1", True), ("n-1", True), ("inner", False)]
    assert [one.start for one in segments] == pytest.approx([0, 0.75, 0.8])
    assert sum(one.width for one in segments) == pytest.approx(1)
    half = aligned(kinds={"1-n": {"share": 1.0, "covered": 0.25}})
    assert [one.width for one in read_alignment(half).segments] == [0.25, 0.75]


@pytest.mark.parametrize("old", [{}, {"kinds": 3, "categories": [1], "dtw": None, "covered": "much"}, {"kinds": {}}])
def test_a_report_without_its_parts_is_read_as_unknown(old):
    read = read_alignment(old)
    assert (read.tokens, read.covered, read.mass_kept) == (None, None, None)
    assert (read.kinds, read.categories, read.segments) == ({}, {}, [])
    assert set(read.dtw.values()) == set(read.bytes_per_row.values()) == {None}
    assert (occurring_kinds([read]), occurring_categories([read])) == ([], [])
    (line,) = lines_of(target(1, {"alignment": {"tiny_a": old}}))
    assert (line.fusion.dialogues, line.fusion.trained_on, line.fusion.winners) == (None, None, [])


def test_what_never_occurs_is_not_listed():
    read = read_alignment(aligned(inner=0))
    assert occurring_kinds([read]) == ["1-1", "n-1"]
    assert occurring_categories([read]) == ["letters", "digits"]


def test_seeds_are_averaged_and_counted():
    first = report({"tiny_a": aligned(750, 200, covered=0.8)}, trained_on=100)
    second = report({"tiny_a": aligned(950, 0, covered=1.0, dtw=None)}, trained_on=101, who_won={"tiny_a": 240})
    (line,) = lines_of(target(1, first), target(2, second))
    assert (line.label, line.source, line.seeds) == ("tiny_a", "tiny_a", 2)
    assert line.alignment.covered == pytest.approx(0.9)
    assert line.alignment.kinds["1-1"].share == pytest.approx(0.85)
    assert line.alignment.kinds["inner"].share == pytest.approx(0.1)
    assert line.alignment.kinds["inner"].covered == 0  # known of one seed alone
    assert line.alignment.dtw["another_row"] == 0.025
    assert line.fusion.trained_on == 100.5
    assert line.fusion.who_won == {"pivot": 80, "tiny_a": 160}
    assert line.fusion.winners == ["pivot 80 (60.0%)", "tiny_a 160 (40.0%)"]


def test_a_folder_that_several_jobs_scored_counts_once():
    rows = [target(seed, report(), path="runs/a/model") for seed in (1, 2, 3)]
    (line,) = lines_of(*rows, target(4, {}, path="runs/of/before"))
    assert line.seeds == 1


def test_every_source_of_a_target_has_its_line():
    both = report({"tiny_a": aligned(), "tiny_b": aligned(covered=0.95)})
    strict = {"alignment": {"name": "strict"}}
    lines = lines_of(
        row("tiny_all", "target", 0.5, alignment=both, parameters=strict), row("sft", "sft", 0.5), target(1, report())
    )
    assert [(line.label, line.source, line.strategy) for line in lines] == [
        ("tiny_a", "tiny_a", "-"),
        ("tiny_all", "tiny_a", "strict"),
        ("tiny_all", "tiny_b", "strict"),
    ]
    assert [line.place for line in lines] == [2, 3, 3]
    assert mean([line.alignment for line in lines]).covered == pytest.approx((0.8 + 0.8 + 0.95) / 3)


def test_winners_of_whom_only_the_dialogues_are_known():
    assert read_fusion({"who_won": {"pivot": 3, "a": 1}}).winners == ["a 1", "pivot 3"]


def printed(written: dict) -> list[str]:
    console = Console(file=io.StringIO(), width=LOG_WIDTH)
    print_stage1(written, AlignmentConfig(name="strict", fallback="skip"), "min_ce", console)
    return console.file.getvalue().splitlines()


def test_the_terminal_shows_coverage_by_kind_and_text_and_who_won():
    everything = {kind: {"rows": 1, "share": 0.1, "covered": 1.0, "mass_kept": 1.0} for kind in RELATIONS}
    source = {
        **aligned(),
        "kinds": {**aligned()["kinds"], **{k: everything[k] for k in ("1-n", "unread", "unproven")}},
    }
    lines = printed(report({"tiny_a": source, "tiny_b": aligned(dtw=None)}))
    assert all(len(line) <= LOG_WIDTH for line in lines)
    assert not any("…" in line for line in lines)
    assert lines[0] == "dialogues: 240 to train on, 80 held out, 2 left out"
    assert "tiny_a, alignment=strict, in percent" in lines
    cells = [line.split() for line in lines]
    assert ["tokens", "share", "covered", "mass", "kept", *RELATIONS] in cells
    assert ["all", "1000", "100.0", "80.0", "85.0", "75.0", "10.0", "5.0", "20.0", "10.0", "10.0"] in cells
    assert ["letters", "90.0", "75.0", "80.0", "75.0", "0.0", "25.0"] in cells
    assert ["covered", "100.0", "100.0", "0.0"] in cells
    assert ["mass", "kept", "90.0", "40.0", "-"] in cells
    assert lines.count("bytes per row: 20.4 in the teacher's store, 58.5 aligned") == 2
    paths = [line for line in lines if line.startswith("DTW")]
    assert paths == [
        "DTW path against exact bytes, in percent: another row 2.5, no row 10.0, unread row - (50 dialogues)"
    ]
    assert lines[-2] == "min_ce won by, in dialogues (and tokens): pivot 160 (60.0%), tiny_a 80 (40.0%)"
    assert lines[-1] == "trained on 120 of 240 dialogues; of 1000 tokens 12.3% fall back (fallback=skip)"


def test_sft_prints_its_dialogues_alone():
    written = report(who_won={"references": 240})
    del written["alignment"]
    assert printed(written) == ["dialogues: 240 to train on, 80 held out, 2 left out"]


def test_names_are_printed_without_markup_and_control_characters():
    text = "\n".join(printed(report({"[red]x[/red]\x1b[2J": aligned()}, who_won={"\x1b[2J": 1})))
    assert "[red]x[/red]" in text
    assert "\x1b" not in text
