"""Parity with mergekit 0.1.5 and the authors' released SCE, on their recorded outputs, and with exact arithmetic."""

import json
from pathlib import Path

import dense_merges
import pytest
import rounded_merges
import torch
from safetensors.torch import load_file

from fusion.merging import merge_state_dicts

FIXTURES = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures"
NAMES = {"select_topk": "tau"}
COMPAT = {"sce": ("sce_mergekit", {}), "model_stock": ("model_stock", {"compat": "mergekit"})}
"""Where the recorded program is not the paper's formula: the method and parameters that are."""
DEFAULT = {"sce": ("sce", {"renormalize": True})}
EXACT = "sce_released"
"""The method that takes the recorded program's own steps."""
LAST_BITS = 1e-6
"""Of the largest number that is added up at a position: how far float32 outputs may be apart."""
IN_BFLOAT16 = {
    "task_arithmetic": "weighted deltas are rounded, then their sum",
    "breadcrumbs": "equal deltas after rounding are cut in another order",
    "breadcrumbs_ties": "equal deltas after rounding are cut in another order",
    "ties": "thresholds and votes see rounded deltas",
    "sce": "thresholds and votes see rounded deltas, and the coefficients are rounded",
    "model_stock": "cosines, the ratio and both its products are rounded",
    "karcher": "directions and the steps between them are rounded",
    "nuslerp": "directions, the angle and its sines are rounded",
}
"""Which recorded programs add up in bfloat16, and what is rounded before the last rounding."""
FEW = 40
"""How many of the 4,529 elements of such a program may therefore be more than an ulp away."""

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the recorded outputs are not here")


def cases(dtype: str | None = None) -> list[dict]:
    path = FIXTURES / "merging_golden.json"
    found = json.loads(path.read_text()) if path.is_file() else []
    return [case for case in found if dtype in (None, case["dtype"])]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "merging_golden.safetensors")


def state(golden: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}


def targets_of(case: dict) -> list[str]:
    return case["parameters"].get("models", ["target0", "target1", "target2"])


def plain_parameters(case: dict) -> dict:
    return {name: value for name, value in case["parameters"].items() if name not in ("models", "base")}


def merge_case(case: dict, golden: dict, dtype: torch.dtype | None = None, compat: bool = True) -> dict:
    """Our result with the case's parameters; on inputs of another dtype when `dtype` is given."""
    given = plain_parameters(case)
    scale = given.pop("lambda", 1.0)
    inputs = [state(golden, f"{case['dtype']}/{name}/") for name in ["base", *targets_of(case)]]
    if dtype:
        inputs = [{name: tensor.to(dtype) for name, tensor in loaded.items()} for loaded in inputs]
    method, fixed = (COMPAT if compat else DEFAULT).get(case["method"], (case["method"], {}))
    parameters = {NAMES.get(name, name): value for name, value in given.items()} | fixed
    base = inputs[0] if case["uses_base"] else None
    return merge_state_dicts(method, base, inputs[1:], scale=scale, **parameters)


def label(case: dict) -> str:
    return f"{case['case']}-{case['method']}-{case['dtype']}"


def test_no_recorded_case_is_left_out() -> None:
    assert len(cases()) == 34


def largest_input(case: dict, golden: dict, name: str) -> torch.Tensor:
    """Per position the magnitude that decides how far apart neighbouring numbers are while a program adds up."""
    inputs = ["base"] * case["uses_base"] + targets_of(case)
    return torch.stack([golden[f"{case['dtype']}/{one}/{name}"].float().abs() for one in inputs]).amax(dim=0)


def ulp(magnitudes: torch.Tensor) -> torch.Tensor:
    """Distance of neighbouring bfloat16 numbers of these magnitudes."""
    return torch.exp2(torch.frexp(magnitudes).exponent - 8.0)


@pytest.mark.parametrize("case", [case for case in cases() if case["method"] == EXACT], ids=label)
def test_the_authors_sce_is_met_bit_by_bit(case: dict, golden: dict) -> None:
    for name, merged in merge_case(case, golden).items():
        assert torch.equal(merged, golden[f"case{case['case']}/{name}"]), name


@pytest.mark.parametrize("case", cases("float32"), ids=label)
def test_float32_equals_the_recorded_output_but_for_the_last_bit(case: dict, golden: dict) -> None:
    for name, merged in merge_case(case, golden).items():
        expected = golden[f"case{case['case']}/{name}"]
        assert ((merged - expected).abs() <= LAST_BITS * largest_input(case, golden, name)).all(), name


@pytest.mark.parametrize("case", [case for case in cases("bfloat16") if case["method"] != EXACT], ids=label)
def test_bfloat16_is_the_float32_result_rounded_once(case: dict, golden: dict) -> None:
    merged, exact = merge_case(case, golden), merge_case(case, golden, torch.float32)
    for name in merged:
        assert torch.equal(merged[name], exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("case", cases("bfloat16"), ids=label)
def test_bfloat16_is_within_an_ulp_of_the_recorded_output(case: dict, golden: dict) -> None:
    """The recorded programs compute in bfloat16; we round once. Programs that do so, too, are met everywhere."""
    outside = total = 0
    for name, merged in merge_case(case, golden).items():
        distance = (merged.float() - golden[f"case{case['case']}/{name}"].float()).abs()
        outside += int((distance > ulp(largest_input(case, golden, name))).sum())
        total += merged.numel()
    assert total == 4529
    assert outside <= (FEW if case["method"] in IN_BFLOAT16 else 0)


@pytest.mark.parametrize("case", [case for case in cases("bfloat16") if case["method"] in IN_BFLOAT16], ids=label)
def test_in_steps_of_bfloat16_the_recorded_output_is_met_bit_by_bit(case: dict, golden: dict) -> None:
    """The same formulas, every step rounded: so nothing but rounding is between our output and the recorded one."""
    method = getattr(rounded_merges, case["method"])
    inputs = [state(golden, f"bfloat16/{name}/") for name in ["base", *targets_of(case)]]
    for name in inputs[0]:
        base, *targets = (loaded[name] for loaded in inputs)
        replayed = method(base, targets, **plain_parameters(case))
        assert torch.equal(replayed.to(torch.bfloat16), golden[f"case{case['case']}/{name}"]), name


def distances(case: dict, golden: dict, compat: bool) -> tuple[float, float]:
    """Sum over all elements of how far our output, and the recorded one, are from a formula in float64."""
    method = getattr(dense_merges, COMPAT[case["method"]][0] if compat else case["method"])
    inputs = [state(golden, f"{case['dtype']}/{name}/") for name in ["base", *targets_of(case)]]
    ours = theirs = 0.0
    for name, merged in merge_case(case, golden, compat=compat).items():
        base, *targets = (loaded[name].double() for loaded in inputs)
        exact = method(base, targets, **plain_parameters(case))
        ours += float((merged.double() - exact).abs().sum())
        theirs += float((golden[f"case{case['case']}/{name}"].double() - exact).abs().sum())
    return ours, theirs


@pytest.mark.parametrize("case", cases(), ids=label)
def test_we_are_at_least_as_near_to_the_paper_s_formula_in_exact_arithmetic(case: dict, golden: dict) -> None:
    ours, theirs = distances(case, golden, compat=False)
    assert ours <= theirs


@pytest.mark.parametrize("case", [case for case in cases() if case["method"] == "sce"], ids=label)
def test_we_are_nearer_to_mergekit_s_own_sce_than_mergekit(case: dict, golden: dict) -> None:
    ours, theirs = distances(case, golden, compat=True)
    assert ours <= theirs
