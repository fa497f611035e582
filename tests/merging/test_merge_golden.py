"""Parity with mergekit 0.1.5 and the authors' released SCE, on their recorded outputs, and with exact arithmetic."""

import json
from pathlib import Path

import dense_merges
import pytest
import torch
from safetensors.torch import load_file

from fusion.merging import merge_state_dicts

FIXTURES = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures"
NAMES = {"sce": "sce_mergekit", "select_topk": "tau"}
COMPAT = {"model_stock": {"compat": "mergekit"}}
OUTSIDE = {
    # Thresholds of deltas that were rounded to bfloat16 have many ties, which the program cuts in another order.
    "ties": 0.01,
    "breadcrumbs": 0.01,
    "breadcrumbs_ties": 0.01,
    # Votes of sums near zero that were added up in bfloat16.
    "sce": 0.01,
    "sce_released": 0.01,
    # Lengths and angles from products in bfloat16, so that factors are off by up to an ulp before the last rounding.
    "model_stock": 0.01,
    "karcher": 0.01,
    "nuslerp": 0.01,
}
"""Largest share of elements that may be more than an ulp away in bfloat16, and why."""

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
    parameters = {NAMES.get(name, name): value for name, value in given.items()}
    if compat:
        parameters |= COMPAT.get(case["method"], {})
    base = inputs[0] if case["uses_base"] else None
    return merge_state_dicts(NAMES.get(case["method"], case["method"]), base, inputs[1:], scale=scale, **parameters)


def label(case: dict) -> str:
    return f"{case['case']}-{case['method']}-{case['dtype']}"


def test_no_recorded_case_is_left_out() -> None:
    assert len(cases()) == 34


@pytest.mark.parametrize("case", cases("float32"), ids=label)
def test_float32_equals_the_recorded_output_but_for_the_last_bit(case: dict, golden: dict) -> None:
    for name, merged in merge_case(case, golden).items():
        expected = golden[f"case{case['case']}/{name}"]
        last_bit = torch.finfo(torch.float32).eps * expected.abs().clamp(min=0.05)
        assert ((merged - expected).abs() <= 2 * last_bit).all(), name


@pytest.mark.parametrize("case", cases("bfloat16"), ids=label)
def test_bfloat16_is_the_float32_result_rounded_once(case: dict, golden: dict) -> None:
    merged, exact = merge_case(case, golden), merge_case(case, golden, torch.float32)
    for name in merged:
        assert torch.equal(merged[name], exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("case", cases("bfloat16"), ids=label)
def test_bfloat16_is_as_near_to_the_recorded_output_as_its_own_rounding_allows(case: dict, golden: dict) -> None:
    """The recorded programs compute in bfloat16, which moves sums by ulps of what is summed; we compute in float32."""
    inputs = [state(golden, f"bfloat16/{name}/") for name in ("base", "target0", "target1", "target2")]
    outside = total = 0
    for name, merged in merge_case(case, golden).items():
        expected = golden[f"case{case['case']}/{name}"].float()
        summed = torch.stack([loaded[name].float().abs() for loaded in inputs]).amax(dim=0)
        outside += int(((merged.float() - expected).abs() > torch.finfo(torch.bfloat16).eps * summed).sum())
        total += expected.numel()
    assert outside / total <= OUTSIDE.get(case["method"], 0)


@pytest.mark.parametrize("case", cases(), ids=label)
def test_we_are_at_least_as_near_to_exact_arithmetic(case: dict, golden: dict) -> None:
    """Sum of the distances of all elements from the paper's formula in float64."""
    method = getattr(dense_merges, case["method"])
    inputs = [state(golden, f"{case['dtype']}/{name}/") for name in ["base", *targets_of(case)]]
    ours = theirs = 0.0
    for name, merged in merge_case(case, golden, compat=False).items():
        base, *targets = (loaded[name].double() for loaded in inputs)
        exact = method(base, targets, **plain_parameters(case))
        ours += float((merged.double() - exact).abs().sum())
        theirs += float((golden[f"case{case['case']}/{name}"].double() - exact).abs().sum())
    print(label(case), ours, theirs)
    assert ours <= theirs
