"""Breadcrumbs, DELLA, NearSwap and RAM by hand."""

import pytest
import torch
from merge_inputs import merge_tensor

from fusion.merging import check_parameters, load_method

FIVE = torch.tensor([[5.0, -1.0, 3.0, 2.0, -4.0]])


def test_breadcrumbs_drops_at_both_ends():
    merged = merge_tensor(load_method("breadcrumbs"), FIVE, density=0.4, gamma=0.2, weight=1.0)
    assert merged.delta.tolist() == [0.0, 0.0, 3.0, 0.0, -4.0]


def test_breadcrumbs_keeps_its_density_before_it_drops_the_largest():
    merged = merge_tensor(load_method("breadcrumbs"), FIVE, density=0.8, gamma=0.6, weight=1.0)
    assert merged.delta.tolist() == [0.0, -1.0, 3.0, 2.0, -4.0]


def test_breadcrumbs_of_equal_deltas_keeps_those_of_lowest_index():
    merged = merge_tensor(load_method("breadcrumbs"), torch.ones(1, 5), density=0.4, gamma=0.2, weight=1.0)
    assert merged.delta.tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]


def test_breadcrumbs_ties_elects_a_sign():
    deltas_JN = torch.tensor([[5.0, 1.0, 0.1], [-1.0, 2.0, 9.0]])
    merged = merge_tensor(load_method("breadcrumbs_ties"), deltas_JN, density=2 / 3, gamma=0.0, weight=1.0)
    assert merged.delta.tolist() == [5.0, 3.0, 9.0]


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_keeps_large_deltas_more_often(name):
    generator = torch.Generator().manual_seed(0)
    deltas_JRC = torch.rand(1, 1000, 200, generator=generator) + 0.5
    merged = merge_tensor(load_method(name), deltas_JRC, density=0.5, epsilon=0.3, weight=1.0).delta.view(1000, 200)
    order_RC = deltas_JRC[0].argsort(dim=1)
    kept_RC = (merged != 0).gather(1, order_RC).double()
    chances_C = 0.2 + 0.6 * torch.arange(200) / 199
    assert (kept_RC.mean(dim=0) - chances_C).abs().max() < 5 * (0.25 / 1000) ** 0.5
    torch.testing.assert_close(merged.mean(), deltas_JRC.mean(), rtol=0.02, atol=0)  # each has its expected value


def test_della_keeps_the_l1_norm_where_asked():
    generator = torch.Generator().manual_seed(0)
    deltas_JRC = torch.randn(1, 40, 50, generator=generator)
    merged = merge_tensor(load_method("della_linear"), deltas_JRC, density=0.5, rescale="l1", weight=1.0)
    torch.testing.assert_close(merged.delta.abs().sum(), deltas_JRC.abs().sum())


def test_della_of_density_one_drops_nothing():
    assert torch.equal(merge_tensor(load_method("della_linear"), FIVE, density=1.0, weight=1.0).delta, FIVE[0])


def test_della_s_chances_are_probabilities():
    (problem,) = check_parameters("della", {"density": [0.6, 0.9], "epsilon": 0.15}, num_targets=2)
    assert "density 0.9 +- epsilon 0.15" in problem


def test_nearswap_moves_at_most_so_far():
    torch.testing.assert_close(merge_tensor(load_method("nearswap"), FIVE, t=2.5).delta, FIVE[0].clamp(-2.5, 2.5))


def test_ram_averages_only_what_is_shared():
    deltas_JN = torch.tensor([[1.0, 0.0, 4.0, 1e-6], [0.0, 0.0, 2.0, 3.0]])
    assert merge_tensor(load_method("ram"), deltas_JN).delta.tolist() == [1.0, 0.0, 3.0, 3.0]


def test_ram_plus_boosts_what_is_not_shared():
    deltas_JN = torch.tensor([[1.0, 1.0, 4.0, 0.0], [0.0, 0.0, 2.0, 3.0]])
    merged = merge_tensor(load_method("ram"), deltas_JN, boost=0.5, limit=0.6)
    torch.testing.assert_close(merged.delta, torch.tensor([1.25, 1.25, 3.0, 3 * 1.3]))  # rho 1/2, and 1 cut to 0.6
