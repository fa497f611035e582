"""The page of one merge: complete, well-formed, without a network, and the same bytes for the same report."""

import html.parser

import pytest
import torch
from torch import Tensor

from fusion.merging import merge_deltas
from fusion.tracking.merge_page import MergeView, write_merge_page

NAMES = ("model.embed_tokens.weight", "model.layers.0.a.weight", "model.layers.0.b", "model.layers.1.a.weight", "head")
TARGETS = ("first", "<second>")


def state(seed: int, spread: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: spread * torch.randn(4 + place, 3, generator=generator) for place, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def report() -> dict:
    base = state(0)
    targets = [{name: base[name] + step for name, step in state(j, 0.1 * j).items()} for j in (1, 2)]
    for target in targets:
        target["head"] = base["head"]
    found = merge_deltas("sce", base, targets, tau=0.5).report
    found.copy_speed = 4e9
    return found.to_dict()


def test_layers_are_means_over_elements(report: dict) -> None:
    layers = {layer.name: layer for layer in MergeView(report, TARGETS).layers}
    assert list(layers) == ["model.embed_tokens.weight", "model.layers.0", "model.layers.1", "head"]
    first, second = (report["tensors"][f"model.layers.0.{name}"] for name in ("a.weight", "b"))
    assert (first["elements"], second["elements"]) == (15, 18)
    means = [
        (15 * a + 18 * b) / 33 for a, b in zip(*(report["coefficients"][name] for name in NAMES[1:3]), strict=True)
    ]
    assert layers["model.layers.0"].coefficients == pytest.approx(means)
    norms = [(a * a + b * b) ** 0.5 for a, b in zip(first["norms"], second["norms"], strict=True)]
    assert layers["model.layers.0"].norms == pytest.approx(norms)
    assert layers["model.layers.0"].elements == 33


def test_a_stack_has_a_cell_for_every_tensor_of_its_layers(report: dict) -> None:
    (stack,) = MergeView(report, TARGETS).stacks.values()
    assert (stack.roles, stack.numbers) == (["a.weight", "b"], [0, 1])
    assert [(column, row, tensor.name) for column, row, tensor in stack] == [
        (0, 0, NAMES[1]),
        (0, 1, NAMES[2]),
        (1, 0, NAMES[3]),
    ]


class Checked(html.parser.HTMLParser):
    """Every tag is closed in order; text and attributes are kept."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.links: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def test_the_page_shows_everything_and_loads_nothing(tmp_path, report: dict) -> None:
    page = write_merge_page(tmp_path, report, TARGETS, "python merge.py merge.tau=0.5")
    assert page == tmp_path / "merge.html"
    checked = Checked(page.read_text("utf-8"))
    assert checked.links == ["result.json"]
    for wanted in (*NAMES, *TARGETS, "python merge.py merge.tau=0.5", "Selected", "Erased", "Sign conflicts"):
        assert wanted in checked.texts, wanted
    (event,) = report["events"]
    assert f"{event}: 1 of 5 tensors" in checked.texts
    for name in NAMES:
        assert all(f"{value:.3f}" in checked.texts for value in report["coefficients"][name])
    assert (
        sum(text.startswith("model.layers.") and ": " in text for text in checked.texts) == 6
    )  # cells of both targets
    assert "a plain copy at the start: 4.00 GB/s" in checked.texts


def test_the_same_report_is_the_same_page(tmp_path, report: dict) -> None:
    pages = [write_merge_page(tmp_path / name, report, TARGETS, "c") for name in "ab"]
    assert pages[0].read_bytes() == pages[1].read_bytes()
