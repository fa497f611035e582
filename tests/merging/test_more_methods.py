"""Arcee Fusion, Breadcrumbs, DELLA, NearSwap and RAM by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from merge_inputs import merge_tensor

from fusion.merging import check_parameters, deltas, load_method, merge_deltas
from fusion.merging.methods.model_stock import OPPOSED
from fusion.merging.numerics.ranking import ranks_in_rows

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


@pytest.mark.parametrize("shape", [(3, 9000), (9000,)])
def test_della_ranks_whole_rows_wherever_blocks_cut_them(shape, monkeypatch):
    deltas_J = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # with equal ones
    uncut = merge_tensor(load_method("della"), deltas_J).delta
    monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", 700)
    monkeypatch.setattr(deltas, "LONGEST_ROW", 5600)
    assert torch.equal(merge_tensor(load_method("della"), deltas_J).delta, uncut)


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=4, max_size=4), min_size=1, max_size=5))
def test_equal_magnitudes_rank_as_they_stand(rows):
    expected = [[sorted(range(4), key=lambda place, row=row: (row[place], place)) for row in rows]]
    ranks_RC = ranks_in_rows(torch.tensor(rows, dtype=torch.float32))
    assert ranks_RC.argsort(dim=1).tolist() == expected[0]


def arcee_fusion_by_sorting(base, target):
    """As mergekit writes it, but in float64 and without its 1e-8 beside the probabilities."""
    deltas = target - base
    chances = target.softmax(dim=-1)
    divergence = (chances * (target.log_softmax(dim=-1) - base.log_softmax(dim=-1))).sum(dim=-1, keepdim=True)
    importance = deltas.abs() * divergence
    ordered = importance.flatten().sort().values
    lower, median, upper = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.25, 0.5, 0.75))
    return torch.where(importance >= median + 1.5 * (upper - lower), deltas, 0.0)


@pytest.mark.parametrize("shape", [(40, 50), (3000,), (1,), ()])
@pytest.mark.parametrize("block_elements", [1 << 17, 512])
def test_arcee_fusion_keeps_what_is_important(shape, block_elements, monkeypatch):
    monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", block_elements)
    generator = torch.Generator().manual_seed(0)
    base = 0.05 * torch.randn(shape, generator=generator)
    target = base + 0.01 * torch.randn(shape, generator=generator)
    merged = merge_deltas("arcee_fusion", {"w": base}, [{"w": target}]).deltas["w"]
    expected = arcee_fusion_by_sorting(base.double(), base.double() + (target - base).double())
    torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=0)
    assert len(shape) == 0 or shape == (1,) or 0.02 < torch.count_nonzero(merged) / merged.numel() < 0.2


def test_arcee_fusion_sees_divergences_of_tiny_deltas():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 64, generator=generator, dtype=torch.float64)
    target = base + 1e-7 * torch.arange(1, 21)[:, None] * torch.randn(20, 64, generator=generator, dtype=torch.float64)
    merged = merge_deltas("arcee_fusion", {"w": base}, [{"w": target}]).deltas["w"]
    share_R = torch.count_nonzero(merged, dim=1) / 64
    assert share_R[:10].sum() == 0
    assert share_R[-5:].min() > 0.2


def test_ram_without_unshared_deltas_has_no_boost():
    merged = merge_tensor(load_method("ram"), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), boost=0.5, epsilon=0.5)
    assert merged.delta.tolist() == [2.0, 3.0]


def test_model_stock_tells_of_targets_that_point_apart():
    merged = merge_tensor(load_method("model_stock"), torch.tensor([[1.0, 0.0], [-0.5, 1.0]]))
    assert merged.events == (OPPOSED,)
    assert (merged.coefficients < 0).all()
