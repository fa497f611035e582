"""The comparison's files, its table on the terminal and its command: complete, well-formed, equal for equal rows."""

import csv
import dataclasses
import html
import html.parser
import io
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from sample_rows import SKILLS, aligned, record_job, report, row, sweep

from fusion.config import EXIT_USER_ERROR, UserError
from fusion.tracking import compare
from fusion.tracking.comparison import FailedJob, write_comparison
from fusion.tracking.summary import percent
from fusion.tracking.terminal import print_table

OWN_KEYS = {"model", "kind", "strategy", "seed", "path", "scores", "nll_per_byte"}


def written(folder: Path, rows, **extra) -> tuple[list[dict], str, str]:
    paths = write_comparison(folder, rows, **{"title": "A sweep", **extra})
    texts = [path.read_text("utf-8") for path in paths]
    return json.loads(texts[0]), texts[1], texts[2]


def target(model: str, seed: int = 1, sources=None, name: str = "ms", **changes):
    """A target with the report of its alignment."""
    settings = {"alignment": {"name": name}}
    where = f"runs/{name}/{seed}"
    return row(model, "target", 0.5, seed=seed, path=where, parameters=settings, alignment=report(sources, **changes))


class OpenTags(html.parser.HTMLParser):
    """Checks that every tag is closed in order, and collects attributes and visible text."""

    VOID = frozenset({"meta", "input", "rect", "line"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_json_is_a_list_with_the_agreed_keys(tmp_path):
    entries, _, _ = written(tmp_path, sweep())
    assert len(entries) == 8
    assert all(entry.keys() >= OWN_KEYS for entry in entries)
    assert [entry["strategy"] for entry in entries[-2:]] == ["sce", "linear"]
    assert {entry["strategy"] for entry in entries[:-2]} == {""}
    assert entries[-2]["scores"]["average"] == 0.712
    assert entries[-2]["coefficients"] == {"tiny_a": 0.9, "tiny_b": -0.3}


def test_same_rows_in_any_order_are_the_same_bytes(tmp_path):
    rows = [*sweep(), *(dataclasses.replace(one, seed=2, path=one.path + "2") for one in sweep())]
    rows += [target("tiny_a", seed, {"tiny_c": aligned(600 + seed), "tiny_b": aligned()}) for seed in range(3)]
    failures = [FailedJob("b", "failed", "x"), FailedJob("a", "failed", "y")]
    first = [path.read_bytes() for path in write_comparison(tmp_path / "a", rows, title="t", failures=failures)]
    random.Random(3).shuffle(rows)
    second = [path.read_bytes() for path in write_comparison(tmp_path / "b", rows, title="t", failures=failures[::-1])]
    assert first == second


def test_page_is_self_contained_and_well_formed(tmp_path):
    _, _, page = written(tmp_path, sweep(), command="python merge.py -m merge=sce,linear")
    parsed = OpenTags(page)
    assert "http://" not in page
    assert "https://" not in page
    links = {value for name, value in parsed.attributes if name in ("href", "src")}
    assert {link for link in links if not link.startswith("#")} == {
        "comparison.json",
        "comparison.md",
        "comparison.csv",
    }
    assert not {"link", "img", "iframe"} & set(parsed.tags)
    for text in (
        "best",
        "python merge.py -m merge=sce,linear",
        "python merge.py merge=sce seed=1",
        "prefers-color-scheme",
    ):
        assert text in page
    assert parsed.tags.count("figure") == 1 + len(SKILLS)


def test_hostile_names_stay_text(tmp_path):
    name = "<img src=x onerror=alert(1)> \"'|`*{{ 7*7 }}\n# heading"
    hostile = row(name, "merged", 0.5, strategy=name, command=name, parameters={name: name}, coefficients={name: 1.0})
    hostile = dataclasses.replace(hostile, path=name, scores={name: 0.5, "average": 0.5}, strong_skills=(name,))
    failures = [FailedJob(name, name, name)]
    told = report({name: aligned()}, who_won={name: 3}, rows_won={name: 1.0})
    rows = [hostile, *sweep(), row(name, "target", 0.5, alignment=told, parameters={"alignment": {"name": name}})]
    _, markdown, page = written(tmp_path, rows, title=name, command=f"{name} ```", failures=failures)
    parsed = OpenTags(page)
    assert "img" not in parsed.tags
    assert "onerror" not in dict(parsed.attributes)
    assert "{{ 7*7 }}" in html.unescape(page)
    body = markdown.split("\n## Command\n")[0]
    assert "<img" not in body.replace("\\<", "")
    assert len([line for line in body.splitlines() if line.startswith("# ")]) == 1
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert len({line.replace("\\|", "").count("|") for line in table[:12]}) == 1
    assert "````sh" in markdown


def test_missing_scores_are_shown_as_missing(tmp_path):
    rows = [
        row("a", "merged", None, nll_per_byte=None),
        row("b", "merged", 0.5, scores={"facts": 0.5, "average": math.nan}, nll_per_byte=math.inf),
        row("c", "merged", 0.5, scores={}, seed=None),
        row("d", "merged", 0.3),
    ]
    entries, markdown, page = written(tmp_path, rows)
    OpenTags(page)
    assert [entry["model"] for entry in entries] == ["d", "a", "b", "c"]
    assert entries[2]["scores"] == {"facts": 0.5, "average": None}
    assert entries[2]["nll_per_byte"] is None
    assert "nan" not in markdown.lower()
    assert percent(None) == "-"


@pytest.mark.parametrize("count", [0, 1, 200])
def test_any_number_of_rows(tmp_path, count):
    rows = [row("sce", "merged", n / 400, path=str(n), parameters={"tau": n, "name": "x" * 60}) for n in range(count)]
    entries, markdown, page = written(tmp_path, rows)
    OpenTags(page)
    assert len(entries) == count
    assert page.count('<details id="model-') == count
    if count == 200:
        assert "192 more are in the table" in page
        assert "sce tau=199" in markdown


def test_rows_that_break_the_contract_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"row of merged sce.*fractions of 1"):
        write_comparison(tmp_path, [row("sce", "merged", 71.2)], title="percent instead of fractions")


def test_failed_jobs_are_listed(tmp_path):
    failures = [FailedJob("sweep/merge=ties", "failed", "out of memory")]
    _, markdown, page = written(tmp_path, sweep(), failures=failures)
    assert "| sweep/merge=ties | failed | out of memory |" in markdown
    assert "1 job has no scores" in page
    assert "sweep/merge=ties: failed, out of memory" in page


def test_markdown_has_seeds_and_coefficients(tmp_path):
    rows = [*sweep(), dataclasses.replace(sweep()[1], seed=2, path="2", scores={"average": 0.732})]
    _, markdown, _ = written(tmp_path, rows)
    assert "**72.2 ± 1.4** | 71.2 73.2" in markdown
    assert "| sce | 0.900 | -0.300 |" in markdown


def test_alignment_and_fusion_of_every_target(tmp_path):
    rows = [*sweep(), *(target("tiny_x", seed) for seed in (1, 2)), target("tiny_x", 1, {"tiny_a": aligned()}, "em")]
    entries, markdown, page = written(tmp_path, rows)
    OpenTags(page)
    section = markdown.split("## Alignment and fusion")[1].split("\n## ")[0]
    lines = [line.split(" | ") for line in section.splitlines() if line.startswith("| tiny")]
    assert lines[0] == [
        *("| tiny_x alignment=em", "tiny_a", "em", "pivot 160 (60.0%), tiny_a 80 (40.0%)"),
        *(
            "1000",
            "80.0",
            "75.0",
            "5.0",
            "20.0",
            "85.0",
            "12.3",
            "2.5",
            "10.0",
            "-",
            "120",
            "240",
            "20.4",
            "58.5",
            "1 |",
        ),
    ]
    assert [line[-1] for line in lines[:2]] == ["1 |", "2 |"]
    assert "| tiny_x alignment=em | tiny_a | em | letters | 90.0 | 75.0 | 80.0 | 75.0 | 0.0 | 25.0 |" in section
    assert "| tiny_a |" not in section.replace("=em | tiny_a |", "").replace("=ms | tiny_a |", "")  # no report
    part = page.split("<h2>Alignment and fusion</h2>")[1].split("<h2>")[0]
    assert part.count('<a href="#model-') == 4  # two lines in each of two tables
    assert part.count("<details>") == 1
    assert '<rect class="relation-0" x="0.00%" width="75.00%"' in part
    assert '<rect class="relation-3 bare" x="80.00%" width="20.00%"' in part
    assert "pivot 160 (60.0%)" in part
    kept = [entry["alignment"] for entry in entries if entry["model"] == "tiny_x"]
    assert kept == [report()] * 3


@pytest.mark.parametrize("alignment", [{}, {"alignment": {}}, {"alignment": {"tiny_a": {}}, "who_won": None}])
def test_reports_that_are_missing_or_older_make_no_trouble(tmp_path, alignment):
    _, markdown, page = written(tmp_path, [*sweep(), row("tiny_x", "target", 0.5, alignment=alignment)])
    OpenTags(page)
    has_line = bool(alignment.get("alignment"))
    assert ("Alignment and fusion" in page) == ("## Alignment and fusion" in markdown) == has_line
    assert ("By kind of text" in page) is ("By kind of text" in markdown) is False


def table_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_per_model_and_a_column_per_number(tmp_path):
    rows = [*sweep(), target("tiny_x"), *(row("ties", "merged", 0.5 + seed / 10, seed=seed) for seed in (1, 2))]
    table = table_of(write_comparison(tmp_path, rows, title="t")[-1])
    assert [(one["kind"], one["label"]) for one in table[-3:]] == [
        ("merged", "sce"),
        ("merged", "ties"),
        ("merged", "linear"),
    ]
    by_label = {(one["kind"], one["label"]): one for one in table}
    assert len(by_label) == len(table) == 10
    ties, sce, linear = (by_label["merged", name] for name in ("ties", "sce", "linear"))
    assert (ties["seeds"], ties["strategy"], ties["verdict"]) == ("2", "ties", "tied")
    assert float(ties["score.facts.mean"]) == pytest.approx(0.65)
    assert float(ties["score.average.sd"]) == pytest.approx(0.1 / math.sqrt(2))
    assert float(sce["score.add.low"]) < 0.712 < float(sce["score.add.high"])
    assert (sce["scale.mean"], sce["scale.searched"], sce["setting.tau"]) == ("1.8", "true", "0.1")
    assert (sce["coefficient.tiny_b"], linear["coefficient.tiny_b"], linear["setting.tau"]) == ("-0.3", "", "")
    assert (sce["nll_per_byte.mean"], sce["score.add.sd"]) == ("0.5", "")
    one = by_label["target", "tiny_x"]
    assert (one["setting.alignment.name"], one["alignment.sources"], one["alignment.seeds"]) == ("ms", "tiny_a", "1")
    assert (one["alignment.covered"], one["alignment.kind.1-1.share"]) == ("0.8", "0.75")
    assert (one["alignment.kind.inner.covered"], one["alignment.kind.inner.mass_kept"]) == ("0.0", "")
    assert one["alignment.category.letters.covered"] == "0.75"
    assert (one["alignment.dtw.no_row"], one["alignment.dtw.unread_row"]) == ("0.1", "")
    assert one["alignment.bytes_per_row.teacher"] == "20.4"
    assert (one["fusion.fallback"], one["fusion.who_won.pivot"], one["fusion.rows_won.tiny_a"]) == (
        "0.123",
        "160.0",
        "0.4",
    )
    assert by_label["target", "tiny_a"]["alignment.covered"] == sce["alignment.covered"] == ""


def test_csv_of_many_sources_has_their_mean(tmp_path):
    (one,) = table_of(
        write_comparison(tmp_path, [target("all", 1, {"a": aligned(), "b": aligned(covered=1.0)})], title="t")[-1]
    )
    assert one["alignment.sources"] == "a b"
    assert float(one["alignment.covered"]) == pytest.approx(0.9)


@pytest.mark.parametrize("name", ['a,"b"\n=1\r', "x;y"])
def test_csv_keeps_any_name(tmp_path, name):
    (one,) = table_of(write_comparison(tmp_path, [row(name, "target", 0.5)], title="t")[-1])
    assert (one["label"], one["model"]) == (name, name)


def test_csv_of_nothing_is_a_file_without_lines(tmp_path):
    assert table_of(write_comparison(tmp_path, [], title="t")[-1]) == []


def printed(rows, width: int = 100) -> list[str]:
    console = Console(file=io.StringIO(), width=width)
    print_table(rows, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize("seeds", [1, 3])
def test_table_fits_100_columns_with_six_skills(seeds):
    rows = [dataclasses.replace(one, seed=seed, path=f"{one.path}{seed}") for seed in range(seeds) for one in sweep()]
    rows.append(row("task_arithmetic_with_a_name_that_is_long", "merged", 0.3))
    lines = printed(rows)
    assert all(len(line) <= 100 for line in lines)
    assert not any("…" in line for line in lines)
    merged = next(number for number, line in enumerate(lines) if line.startswith("merged"))
    assert "71.2" in lines[merged]
    assert "best" in lines[merged]
    assert not any(line.startswith(("pivot", "source", "sft", "target")) for line in lines[merged:])
    assert lines[-1].startswith("best merged: sce 71.2")


def test_table_prints_names_as_they_are_and_no_control_characters():
    lines = printed([row("[red]x[/red]\x1b[2J", "merged", 0.5)])
    text = "\n".join(lines)
    assert "[red]x[/red]" in text.replace("\n", "")
    assert "\x1b" not in text


def test_command_line_writes_the_page(tmp_path, capsys):
    record_job(tmp_path / "runs/a", sweep())
    record_job(tmp_path / "runs/b", status="failed", reason="diverged")
    assert compare.main([str(tmp_path / "runs"), "--out", str(tmp_path / "page"), "--title", "Mine"]) == 0
    assert {path.name for path in (tmp_path / "page").iterdir()} == {
        f"comparison.{e}" for e in ("json", "md", "html", "csv")
    }
    assert "Mine" in (tmp_path / "page/comparison.html").read_text("utf-8")
    output = capsys.readouterr().out
    assert "best merged: sce 71.2" in output
    assert "runs/b: failed, diverged" in output
    assert output.splitlines()[-1] == f"page: {tmp_path / 'page/comparison.html'}"


def test_command_line_says_when_there_is_nothing(tmp_path, capsys):
    assert compare.main([str(tmp_path), str(tmp_path)]) == EXIT_USER_ERROR
    assert "no finished job with scores" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "nowhere")]) == EXIT_USER_ERROR
    assert "no such folder" in capsys.readouterr().err


def test_module_runs_and_loads_nothing_heavy(tmp_path):
    code = "import sys, fusion.tracking.compare as c; c.main([sys.argv[1]]); print(*sys.modules)"
    record_job(tmp_path, sweep())
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=root, capture_output=True, text=True, check=True
    )
    assert not {"torch", "transformers", "numpy"} & set(result.stdout.split())
