"""Parameters are checked against a method's signature, and the YAML files agree with it."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from omegaconf import OmegaConf

from fusion.config import UserError
from fusion.merging import (
    MergedDelta,
    TensorDeltas,
    check_parameters,
    load_method,
    merge_method,
    merge_state_dicts,
    method_names,
)
from fusion.merging.parameters import Share, options_of

CONF = Path(__file__).resolve().parents[2] / "conf" / "merge"


@merge_method(paper="https://example.org")
def halve(deltas: TensorDeltas, *, mode: Literal["first", "last"], steps: int = 1, keep: Share = 1.0) -> MergedDelta:
    """A user's own method, with a required parameter."""
    chosen = 0 if mode == "first" else -1
    return MergedDelta(lambda block: block.deltas_JN[chosen] * keep / 2**steps, torch.zeros(deltas.num_targets))


@merge_method(paper="https://example.org")
def broken(deltas: TensorDeltas) -> MergedDelta:
    return MergedDelta(lambda block: block.deltas_JN, torch.zeros(1))


HALVE = f"{halve.function.__module__}.halve"


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_yaml_with_its_defaults(name: str) -> None:
    settings = OmegaConf.to_container(OmegaConf.load(CONF / f"{name}.yaml"))
    assert settings.pop("method") == name
    assert settings.pop("scale") == 1.0
    assert check_parameters(name, settings) == []
    assert settings == {key: option.default for key, option in options_of(load_method(name)).items()}


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_its_paper_and_a_sentence(name: str) -> None:
    method = load_method(name)
    assert method.name == name
    assert method.paper.startswith("https://")
    assert method.function.__doc__
    assert method.paper in (CONF / f"{name}.yaml").read_text().splitlines()[0]


def test_every_yaml_has_a_method() -> None:
    assert {path.stem for path in CONF.glob("*.yaml")} == set(method_names())


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("sce", {"tua": 0.1}, "no parameter 'tua': did you mean 'tau'?"),
        ("sce", {"tau": 1.1}, "tau must be a number from 0 to 1, got 1.1"),
        ("sce", {"tau": "abc"}, "got 'abc'"),
        ("sce", {"tau": float("nan")}, "got nan"),
        ("sce", {"tau": True}, "got True"),
        ("sce", {"renormalize": 1}, "renormalize must be true or false"),
        ("varm", {"unit": "matrx"}, "did you mean 'matrix'?"),
        ("ties", {"density": [0.5, 0.0]}, "density must be a number above 0 to 1 or a list of numbers above 0 to 1"),
        ("linear", {"weight": [1.0, -1.0]}, "sums to zero"),
        ("linear", {"context": None}, "no parameter 'context'"),
        (HALVE, {}, "mode is missing: one of first, last"),
        (HALVE, {"mode": "first", "steps": 1.5}, "steps must be a whole number"),
    ],
)
def test_problems(name: str, parameters: dict, expected: str) -> None:
    problems = check_parameters(name, parameters)
    assert len(problems) == 1
    assert expected in problems[0]
    assert name in problems[0]


def test_good_parameters_have_no_problems() -> None:
    assert check_parameters("linear", {"weight": [1, 2.5]}) == []
    assert check_parameters("linear", {"weight": [1.0, -1.0], "normalize": False}) == []
    assert check_parameters("sce", {"tau": 1}) == []


def test_all_problems_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        merge_state_dicts("ties", None, [{"w": torch.ones(2)}], densty=0.5, weight="x", scale=float("nan"), seed=0.5)
    assert len(caught.value.problems) == 5


def test_a_list_of_the_wrong_length() -> None:
    assert "lists 2 numbers for 3 targets" in check_parameters("ties", {"weight": [1.0, 2.0]}, num_targets=3)[0]


class TestOwnMethods:
    def test_are_found_by_their_path(self) -> None:
        base, targets = {"w": torch.zeros(2)}, [{"w": torch.ones(2)}, {"w": torch.full((2,), 4.0)}]
        merged = merge_state_dicts(HALVE, base, targets, mode="last", keep=0.5)
        assert merged["w"].tolist() == [1.0, 1.0]

    @pytest.mark.parametrize(
        ("name", "hint"),
        [
            ("sec", "did you mean 'sce'?"),
            ("no_such_package.module.merge", "No module named"),
            ("fusion.merging.methods.sce.other", "has no attribute 'other'"),
            ("fusion.merging.numerics.selection.trimmer", "mark the function with @merge_method"),
        ],
    )
    def test_that_cannot_be_found(self, name: str, hint: str) -> None:
        with pytest.raises(UserError, match=hint.replace("?", r"\?")):
            load_method(name)

    def test_that_return_nonsense(self) -> None:
        path = f"{broken.function.__module__}.broken"
        with pytest.raises(UserError, match="must return a float32 delta of shape"):
            merge_state_dicts(path, {"w": torch.zeros(2)}, [{"w": torch.ones(2)}] * 2)
