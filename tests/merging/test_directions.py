"""Methods on the sphere by hand; parity with recorded outputs is in test_merge_golden.py."""

import math

import pytest
import torch
from merge_inputs import merge_tensor

from fusion.merging import load_method
from fusion.merging.numerics.directions import WHOLE_TENSOR

RIGHT_ANGLE = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
ROWS = torch.tensor([[[1.0, 0.0], [2.0, 2.0]], [[0.0, 1.0], [1.0, 1.0]]])
"""Two targets: the first rows are orthogonal, the second ones parallel."""


def test_nuslerp_goes_along_the_arc_by_weight():
    merged = merge_tensor(load_method("nuslerp"), RIGHT_ANGLE, weight=[2.0, 1.0])
    torch.testing.assert_close(merged.delta, torch.tensor([2 * math.sin(math.pi / 3), 4 * math.sin(math.pi / 6)]))


def test_nuslerp_of_rows_bends_each_by_its_own_angle():
    merged = merge_tensor(load_method("nuslerp"), ROWS, unit="row")
    half = math.sqrt(0.5)
    torch.testing.assert_close(merged.delta, torch.tensor([half, half, 1.5, 1.5]))
    assert merged.coefficients.tolist() == pytest.approx([(half + 0.5) / 2] * 2)


def test_a_vector_has_no_rows():
    assert merge_tensor(load_method("model_stock"), RIGHT_ANGLE, unit="row").events == (WHOLE_TENSOR,)


def test_multislerp_has_the_mean_direction_and_the_mean_length():
    merged = merge_tensor(load_method("multislerp"), RIGHT_ANGLE)
    torch.testing.assert_close(merged.delta, torch.full((2,), 3 * math.sqrt(0.5)))
    opposed = merge_tensor(load_method("multislerp"), torch.tensor([[1.0, 0.0], [-3.0, 0.0]]))
    torch.testing.assert_close(opposed.delta, torch.tensor([-1.0, 0.0]))  # no mean direction: the plain mean


def test_karcher_is_where_the_pulls_of_all_targets_cancel_out():
    generator = torch.Generator().manual_seed(0)
    weights_JN = torch.randn(4, 30, generator=generator)
    merged = merge_tensor(load_method("karcher"), weights_JN, max_iterations=100, tolerance=1e-12).delta.double()
    units_JN = weights_JN.double() / weights_JN.double().norm(dim=1, keepdim=True)
    mean_N = merged / merged.norm()
    to_mean_J = (units_JN @ mean_N).acos()
    pull_N = ((to_mean_J / to_mean_J.sin())[:, None] * (units_JN - to_mean_J.cos()[:, None] * mean_N)).sum(dim=0)
    assert float(pull_N.norm()) < 1e-6
    assert float(merged.norm()) == pytest.approx(float(weights_JN.norm(dim=1).mean()))


def test_karcher_of_what_has_no_mean_begins_at_a_target():
    merged = merge_tensor(load_method("karcher"), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    assert torch.isfinite(merged.delta).all()
    assert not merge_tensor(load_method("karcher"), torch.zeros(3, 5)).delta.any()


def test_model_stock_shrinks_by_the_angle():
    deltas_JN = torch.tensor([[1.0, 0.0], [0.5, math.sqrt(0.75)]])  # 60 degrees apart
    merged = merge_tensor(load_method("model_stock"), deltas_JN)
    torch.testing.assert_close(merged.delta, (2 * 0.5 / 1.5) * deltas_JN.mean(dim=0))
    assert not merge_tensor(load_method("model_stock"), RIGHT_ANGLE).delta.any()


def test_model_stock_of_rows():
    merged = merge_tensor(load_method("model_stock"), ROWS, unit="row")
    torch.testing.assert_close(merged.delta, torch.tensor([0.0, 0.0, 1.5, 1.5]))
