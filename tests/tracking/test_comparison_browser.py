"""The comparison's page in a real browser, with few and with many models: it sorts, filters, brushes and draws."""

import csv

import pytest
from browser import Watched
from recorded_sweep import QUESTIONS, TARGETS, record_sweep

from fusion.tracking import compare

BASELINES = 3 + len(TARGETS)  # pivot, two sources, targets
DRAWINGS = {
    "#parallel": ".lines path",
    "#radar": ".model path",
    "#heat": "rect.cell",
    "#curves": ".curve path",
    "#lineage": ".node rect",
    "#answers": "article",
    "figure.whole": "rect",
}
SIZES = (3, 200)
MOST_BYTES = 2_000_000


@pytest.fixture(scope="module", params=SIZES, ids=lambda size: f"{size}_merges")
def sweep(request, tmp_path_factory):
    """How many merges there are, and the folder with their page."""
    folder = record_sweep(
        tmp_path_factory.mktemp("sweep"), request.param, num_failures=1 if request.param < 10 else 30
    )
    assert compare.main([str(folder)]) == 0
    return request.param, folder


@pytest.fixture
def watched(browser, sweep):
    """The page, opened; nothing may have gone wrong when the test ends, and nothing been asked for."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    watched = Watched(context.new_page())
    address = (sweep[1] / "comparison.html").as_uri()
    watched.page.goto(address)
    watched.page.wait_for_selector("#scores tbody tr:not([hidden])")
    yield watched
    context.close()
    assert watched.complaints == []
    assert watched.requests == [address]


def shown(page, column=None):
    """Texts of the rows of the table that are to be seen; of one column their values."""
    script = """column => [...document.querySelectorAll("#scores tbody tr")].filter(row => !row.hidden)
      .map(row => column === null ? row.textContent : row.cells[column].dataset.value)"""
    return page.evaluate(script, column)


def averages_of(page, kind=""):
    """Of all rows of the table, in its order, whether they are to be seen or not."""
    script = "([rows, column]) => [...document.querySelectorAll(rows)].map(row => +row.cells[column].dataset.value)"
    return page.evaluate(script, [f"#scores tbody tr{kind}", column_of(page, "Average")])


def column_of(page, name):
    script = 'name => [...document.querySelectorAll("#scores thead th")].findIndex(one => one.dataset.column === name)'
    return page.evaluate(script, name)


def test_every_drawing_has_marks(watched, sweep):
    for place, mark in DRAWINGS.items():
        boxes = watched.page.evaluate(
            "selector => [...document.querySelectorAll(selector)].map(one => { const r = one.getBoundingClientRect();"
            " return r.width + r.height; })",
            f"{place} {mark}",
        )
        assert boxes, place
        assert all(size > 0 for size in boxes), place
    assert len(watched.page.query_selector_all(".lines path")) == sweep[0]
    assert len(watched.page.query_selector_all(".curve")) == len(TARGETS)


def test_a_click_sorts(watched, sweep):
    column = column_of(watched.page, "Average")
    heading = f"#scores thead th:nth-child({column + 1}) button"
    for sign, direction in ((-1, "descending"), (1, "ascending")):
        watched.page.click(heading)
        values = [float(value) for value in shown(watched.page, column)]
        assert values == sorted(values, key=lambda value: sign * value)
        assert watched.page.get_attribute(f"#scores thead th:nth-child({column + 1})", "aria-sort") == direction
    assert values == sorted(averages_of(watched.page))[: len(values)]  # of all rows, not of those on the page


def test_words_of_any_column_filter(watched, sweep):
    page = watched.page
    page.fill("#filter", "source=tiny_a target")  # a word of the command, and no kind: that is a title
    assert shown(page) == []
    page.fill("#filter", "merge=ties off")
    page.fill("#filter", "merge=ties")
    found = shown(page)
    assert found
    assert all("merge=ties" in text for text in found)
    at_all = sweep[0] // 4 if sweep[0] > 4 else 1
    assert str(at_all) in page.text_content("#shown")
    page.fill("#filter", "")
    assert len(shown(page)) == min(25, BASELINES + sweep[0])


def test_pages_and_columns(watched, sweep):
    page = watched.page
    assert page.is_visible("#pages") is (sweep[0] > 20)
    if sweep[0] > 20:
        first = shown(page)
        page.click("#pages button[aria-label='next page']")
        assert not set(first) & set(shown(page))
        page.select_option("#pages select", "0")
        assert len(shown(page)) == BASELINES + sweep[0]
    cell = f"#scores tbody tr:not([hidden]) > :nth-child({column_of(page, 'facts') + 1})"
    assert page.is_visible(cell)
    page.click("#columns summary")
    page.click("#columns label:has-text('facts')")
    assert not page.is_visible(cell)


@pytest.mark.parametrize("hand", ["mouse", "keys"])
def test_a_brush_filters_the_table(watched, sweep, hand):
    page = watched.page
    page.evaluate("document.getElementById('parallel').scrollIntoView({block: 'center'})")
    grip = page.query_selector_all("#parallel .grip")[-1]  # of the average score
    box = grip.bounding_box()
    if hand == "mouse":
        page.mouse.move(box["x"] + 14, box["y"] + 1)
        page.mouse.down()
        page.mouse.move(box["x"] + 14, box["y"] + box["height"] / 2, steps=4)
        page.mouse.up()
    else:
        grip.focus()
        page.keyboard.press("Enter")
    kept = len(page.query_selector_all(".lines path:not(.away)"))
    assert 0 < kept < sweep[0]
    assert f"{kept} of {sweep[0]} lines" in page.text_content("#brushed")
    assert f"of {kept} " in page.text_content("#shown")
    averages = [float(value) for value in shown(page, column_of(page, "Average"))]
    assert len(averages) == min(25, kept)
    everything = averages_of(page, ".merged")
    assert min(averages) >= sorted(everything)[len(everything) - kept] - 1e-9
    page.keyboard.press("Escape") if hand == "keys" else page.click("#clear")
    assert len(shown(page)) == min(25, BASELINES + sweep[0])


def test_picked_models_are_in_the_radar(watched):
    page = watched.page
    boxes = page.query_selector_all("#scores .pick input:visible")
    for box in boxes:
        if box.is_checked():
            box.uncheck()
    assert page.query_selector_all("#radar .model") == []
    for box in boxes[:5]:
        box.check()
    assert len(page.query_selector_all("#radar .model")) == 5
    assert page.query_selector_all("#scores .pick input:not(:checked):not(:disabled)") == []


def test_what_is_chosen_is_drawn(watched):
    page = watched.page
    drawings = ("#heat", "#lineage", "#curves")
    before = [page.inner_html(one) for one in drawings]
    page.select_option("#heat-run", "1")
    page.select_option("#lineage-run", "1")
    page.select_option("#curves-metric", "lr")
    assert not set(before) & {page.inner_html(one) for one in drawings}
    stages = page.evaluate('[...document.querySelectorAll("#lineage .node")].map(node => node.classList[1])')
    assert sorted(set(stages)) == ["dialogues", "distributions", "merged", "pivot", "source", "target"]


def test_answers_are_text_side_by_side(watched):
    page = watched.page
    for question in QUESTIONS:
        assert page.text_content("#answers .asked") == question
        said = [one.text_content() for one in page.query_selector_all("#answers article .text")]
        assert len(said) == 3
        assert all("</script><img src=x>" in text for text in said)
        if question != QUESTIONS[-1]:
            page.click("#answers-turn button[aria-label='next question']")
    assert page.is_disabled("#answers-turn button[aria-label='next question']")


def test_a_command_is_copied(watched):
    page = watched.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.fill("#filter", "number=1")
    row = page.query_selector("#scores tbody tr:not([hidden])")
    row.query_selector(".copy").click()
    page.wait_for_selector(".copy[data-used]", state="attached")
    assert page.evaluate("navigator.clipboard.readText()") == row.query_selector("code").text_content()


def test_a_narrow_window_scrolls_only_inside(watched):
    watched.page.set_viewport_size({"width": 400, "height": 800})
    watched.page.wait_for_function(
        "document.documentElement.scrollWidth <= 400"
    )  # drawings follow in a frame of theirs
    for place, mark in DRAWINGS.items():
        assert watched.page.query_selector(f"{place} {mark}"), place


def test_files_stay_in_step(sweep):
    """Without a browser: what the page draws is in the Markdown and the table, too."""
    size, folder = sweep
    page = (folder / "comparison.html").read_text("utf-8")
    assert len(page) < MOST_BYTES
    assert "out of memory at tensor 0" in page
    markdown = (folder / "comparison.md").read_text("utf-8")
    for part in ("Settings that vary", "Training", "Paired tests of", "Jobs without scores"):
        assert f"## {part}" in markdown
    (line,) = (line for line in markdown.splitlines() if line.startswith("| mt_bench | merged ties | merged sce"))
    assert line.endswith("| better |")
    with (folder / "comparison.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert sum(one["kind"] == "merged" for one in table) == size
    (target,) = (one for one in table if (one["kind"], one["label"]) == ("target", "tiny_a"))
    assert (target["steps"], target["command"]) == ("399", "python train.py source=tiny_a")
    assert 0.3 < float(target["loss.last.mean"]) < 0.6
