"""State dicts: the sum, its one rounding, and the checks of what goes in."""

import pytest
import torch
from merge_inputs import DATA_FREE, make_family, width

from fusion.config import UserError
from fusion.merging import load_method, merge_deltas, merge_state_dicts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_order_and_inputs_are_kept(dtype: torch.dtype) -> None:
    base, targets = make_family(dtype=dtype)
    before = {name: tensor.clone() for name, tensor in base.items()}
    merged = merge_state_dicts("sce_released", base, targets)
    assert list(merged) == list(base)
    assert all(merged[name].dtype == dtype and merged[name].shape == base[name].shape for name in base)
    assert all(torch.equal(base[name], before[name]) for name in base)


def test_deltas_below_half_a_unit_add_up_before_the_one_rounding() -> None:
    base = {"w": torch.ones(3, dtype=torch.bfloat16)}
    next_up = {"w": torch.full((3,), 1 + 2**-7, dtype=torch.bfloat16)}
    merged = merge_state_dicts("task_arithmetic", base, [next_up] * 4, weight=0.25)
    assert torch.equal(merged["w"], next_up["w"])


@pytest.mark.parametrize("name", [name for name in DATA_FREE if not load_method(name).unwidened])
def test_bfloat16_is_the_float32_result_rounded(name: str) -> None:
    base, targets = make_family(width(name, 2), torch.bfloat16)
    merged = merge_state_dicts(name, base, targets)
    widened = [{tensor: value.float() for tensor, value in state.items()} for state in (base, *targets)]
    exact = merge_state_dicts(name, widened[0], widened[1:])
    assert all(torch.equal(merged[tensor], exact[tensor].bfloat16()) for tensor in base)


@pytest.mark.parametrize("name", DATA_FREE)
def test_scale_multiplies_the_delta_and_one_merge_serves_all_scales(name: str) -> None:
    base, targets = make_family(width(name, 2))
    merged = merge_deltas(name, base, targets)
    for scale in (0.0, 0.5, 1.0, 3.0):
        expected = merge_state_dicts(name, base, targets, scale=scale)
        searched = merged.at_scale(scale)
        for tensor in base:
            assert torch.equal(searched[tensor], expected[tensor])
            torch.testing.assert_close(expected[tensor], base[tensor] + scale * merged.deltas[tensor])


def test_without_a_base_deltas_are_taken_from_zero() -> None:
    base, targets = make_family()
    alone = merge_state_dicts("linear", None, targets, weight=[1.0, 2.0, 1.0])
    for name, merged in merge_state_dicts("linear", base, targets, weight=[1.0, 2.0, 1.0]).items():
        torch.testing.assert_close(merged, alone[name], rtol=1e-5, atol=1e-7)


def test_tensors_that_are_not_floats_or_empty_are_copied() -> None:
    extra = {
        "ids": torch.arange(3),
        "flags": torch.tensor([True]),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.0),
    }
    merged = merge_state_dicts("task_arithmetic", extra, [extra, {**extra, "scalar": torch.tensor(4.0)}], weight=0.5)
    assert torch.equal(merged["ids"], extra["ids"])
    assert merged["ids"] is not extra["ids"]
    assert merged["scalar"].item() == 3.0
    with pytest.raises(UserError, match=r"target 1: 'ids' is not a float tensor"):
        merge_state_dicts("linear", extra, [extra, {**extra, "ids": torch.arange(3) + 1}])


def test_all_misfits_are_reported_at_once() -> None:
    base, targets = make_family(2)
    name = "model.norm.weight"
    del targets[0][name]
    targets[0]["extra"] = torch.ones(1)
    targets[1][name] = torch.ones(7)
    targets[1]["model.layers.0.mlp.weight"] = targets[1]["model.layers.0.mlp.weight"].half()
    with pytest.raises(UserError) as caught:
        merge_state_dicts("linear", base, targets)
    problems = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert f"target 0: '{name}' of base is missing" in problems
    assert "target 0: 'extra' is not in base" in problems
    assert f"target 1: '{name}' is float32 [7], but float32 [6] in base" in problems
    assert "float16 [9, 6], but float32 [9, 6]" in problems


def test_many_misfits_are_summed_up() -> None:
    base = {f"w{i}": torch.ones(1) for i in range(20)}
    with pytest.raises(UserError, match="and 16 more tensors that do not fit"):
        merge_state_dicts("linear", base, [{"v": torch.ones(1)}])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["base", "target 1"])
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_nan_and_infinity_are_found(value: float, where: str, method: str) -> None:
    base, targets = make_family(2)
    spoilt = base if where == "base" else targets[1]
    spoilt["model.norm.weight"][2] = value
    with pytest.raises(UserError, match=f"^{where}: 'model.norm.weight' holds NaN or infinities") as caught:
        merge_state_dicts(method, base, targets)
    assert len(caught.value.problems) == 1


def test_an_overflow_is_found() -> None:
    base = {"w": torch.full((2,), 60000.0, dtype=torch.float16)}
    target = {"w": torch.full((2,), 61000.0, dtype=torch.float16)}
    with pytest.raises(UserError, match=r"overflows torch.float16 at scale 9: choose a smaller scale"):
        merge_state_dicts("task_arithmetic", base, [target], weight=1.0, scale=9)


@pytest.mark.parametrize(
    ("method", "base", "num_targets", "scale", "problem"),
    [
        ("ties", False, 2, 1.0, "works on deltas from a base"),
        ("linear", True, 0, 1.0, "at least one target"),
        ("slerp", True, 3, 1.0, "exactly 2 targets, got 3"),
        ("linear", False, 2, 0.5, "there is no base"),
        ("linear", True, 2, "search", "scale must be a number"),
    ],
)
def test_requests_that_make_no_sense(method: str, base: bool, num_targets: int, scale: float, problem: str) -> None:
    state = {"w": torch.ones(2)}
    with pytest.raises(UserError, match=problem):
        merge_state_dicts(method, state if base else None, [state] * num_targets, scale=scale)


def test_quantized_models_are_refused() -> None:
    state = {"w": torch.ones(2).to(torch.float8_e4m3fn)}
    with pytest.raises(UserError, match="quantized"):
        merge_state_dicts("linear", state, [state])


def test_the_report() -> None:
    base, targets = make_family(2)
    report = merge_deltas("varm", base, targets).report
    deltas = [torch.cat([(target[name] - base[name]).flatten() for name in base]) for target in targets]
    assert report.delta_norms == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-5)
    sizes = {name: tensor.numel() for name, tensor in base.items()}
    means = [sum(report.coefficients[name][j] * sizes[name] for name in base) / sum(sizes.values()) for j in range(2)]
    assert report.mean_coefficients == pytest.approx(means)
    assert report.bytes_read == 3 * 4 * sum(sizes.values())
    assert report.parameters == {"unit": "matrix"}
    assert '"mean_coefficients"' in report.to_json()
