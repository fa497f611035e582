"""Parity with mergekit 0.1.5 and the authors' released SCE, on their recorded outputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion.merging import merge_state_dicts

FIXTURES = Path(__file__).resolve().parents[2] / ".." / "shared" / "fixtures"
NAMES = {"sce": "sce_mergekit", "select_topk": "tau"}
COVERED = ("linear", "task_arithmetic", "ties", "sce", "sce_released", "slerp")
ALLOWED_OUTSIDE = {"ties": 0.01, "sce": 0.01, "sce_released": 0.01}  # a vote or a threshold decided otherwise

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the recorded outputs are not here")


def cases() -> list[dict]:
    path = FIXTURES / "merging_golden.json"
    return [case for case in json.loads(path.read_text()) if case["method"] in COVERED] if path.is_file() else []


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / "merging_golden.safetensors")


def state(golden: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): tensor for key, tensor in golden.items() if key.startswith(prefix)}


def merge_case(case: dict, golden: dict, dtype: torch.dtype | None = None) -> dict:
    """Our result with the case's parameters; on inputs of another dtype when `dtype` is given."""
    given = dict(case["parameters"])
    targets = given.pop("models", ["target0", "target1", "target2"])
    given.pop("base", None)
    scale = given.pop("lambda", 1.0)
    inputs = [state(golden, f"{case['dtype']}/{name}/") for name in ["base", *targets]]
    if dtype:
        inputs = [{name: tensor.to(dtype) for name, tensor in loaded.items()} for loaded in inputs]
    parameters = {NAMES.get(name, name): value for name, value in given.items()}
    base = inputs[0] if case["uses_base"] else None
    return merge_state_dicts(NAMES.get(case["method"], case["method"]), base, inputs[1:], scale=scale, **parameters)


def label(case: dict) -> str:
    return f"{case['case']}-{case['method']}-{case['dtype']}"


@pytest.mark.parametrize("case", [case for case in cases() if case["dtype"] == "float32"], ids=label)
def test_float32_equals_the_recorded_output_but_for_the_last_bit(case: dict, golden: dict) -> None:
    for name, merged in merge_case(case, golden).items():
        expected = golden[f"case{case['case']}/{name}"]
        last_bit = torch.finfo(torch.float32).eps * expected.abs().clamp(min=0.05)
        assert ((merged - expected).abs() <= 2 * last_bit).all(), name


@pytest.mark.parametrize("case", [case for case in cases() if case["dtype"] == "bfloat16"], ids=label)
def test_bfloat16_is_the_float32_result_rounded_once(case: dict, golden: dict) -> None:
    merged, exact = merge_case(case, golden), merge_case(case, golden, torch.float32)
    for name in merged:
        assert torch.equal(merged[name], exact[name].to(torch.bfloat16)), name


@pytest.mark.parametrize("case", [case for case in cases() if case["dtype"] == "bfloat16"], ids=label)
def test_bfloat16_is_as_near_to_the_recorded_output_as_its_own_rounding_allows(case: dict, golden: dict) -> None:
    # The recorded programs compute in bfloat16, which moves sums by units in the last place of what is summed, and
    # thresholds by whole elements; we compute in float32.
    inputs = [state(golden, f"bfloat16/{name}/") for name in ("base", "target0", "target1", "target2")]
    outside = total = 0
    for name, merged in merge_case(case, golden).items():
        expected = golden[f"case{case['case']}/{name}"].float()
        summed = torch.stack([loaded[name].float().abs() for loaded in inputs]).amax(dim=0)
        outside += int(((merged.float() - expected).abs() > torch.finfo(torch.bfloat16).eps * summed).sum())
        total += expected.numel()
    assert outside / total <= ALLOWED_OUTSIDE.get(case["method"], 0)
