"""Methods by hand, and what they are made of; what holds for all of them is in test_merge_properties.py."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_inputs import merge_tensor
from torch import Tensor

from fusion.merging import TensorDeltas, merge_deltas, merge_state_dicts
from fusion.merging.layers import layer_of
from fusion.merging.methods.dare_linear import dare_linear
from fusion.merging.methods.sce import sce
from fusion.merging.methods.sce_released import sce_released
from fusion.merging.methods.task_arithmetic import task_arithmetic
from fusion.merging.methods.ties import ties
from fusion.merging.methods.varm import varm
from fusion.merging.numerics.arithmetic import UNIFORM, squared_norms
from fusion.merging.numerics.election import Election, agreed_sum, majority
from fusion.merging.numerics.random_mask import random_keep, random_words
from fusion.merging.numerics.selection import NOTHING_SELECTED, largest, trimmer, variance


def deltas_of(seed: int, num_targets: int = 3, num_elements: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes_J = 0.01 * torch.arange(1, num_targets + 1)[:, None]
    return sizes_J * torch.randn(num_targets, num_elements, generator=generator)


near = {"rtol": 1e-4, "atol": 1e-7}
seeds = st.integers(0, 2**32 - 1)


def test_sce_selects_nothing_where_targets_do_not_vary_and_says_so() -> None:
    same_JN = deltas_of(5, 1).repeat(3, 1)
    merged = merge_tensor(sce, same_JN, tau=0.1)
    assert not merged.delta.any()
    assert merged.events == (NOTHING_SELECTED,)
    torch.testing.assert_close(merge_tensor(sce, same_JN, tau=1.0).delta, same_JN[0], **near)


def test_sce_by_hand() -> None:
    deltas_JN = torch.tensor([[3.0, 1.0, 0.0, 0.5], [-1.0, 1.0, 0.0, 0.4]])
    merged = merge_tensor(sce, deltas_JN, tau=0.5)  # two positions vary, one is selected: the first
    torch.testing.assert_close(merged.coefficients, torch.tensor([0.9, 0.1], dtype=torch.float64))
    torch.testing.assert_close(merged.delta, torch.tensor([2.7, 0.0, 0.0, 0.0]))  # the minority's -1 is erased
    renormalized = merge_tensor(sce, deltas_JN, tau=0.5, renormalize=True)
    torch.testing.assert_close(renormalized.delta, torch.tensor([3.0, 0, 0, 0]))
    released = merge_tensor(sce_released, deltas_JN, tau=0.5)
    torch.testing.assert_close(released.delta, torch.tensor([3.0, 1.0, 0.0, 0.49]))


def test_ties_by_hand() -> None:
    deltas_JN = torch.tensor([[4.0, -1.0, 0.1, 2.0], [2.0, 3.0, 0.1, -3.0]])
    # Half of each is kept: 4 and 2; 3 and -3. The last position's vote is -1: only the second target stays there.
    merged = merge_tensor(ties, deltas_JN, density=0.5)
    torch.testing.assert_close(merged.delta, torch.tensor([4.0, 3.0, 0.0, -3.0]))


def test_varm_units() -> None:
    small, large = deltas_of(1, 2, 60), deltas_of(2, 2, 90).flip(0)
    names = ["model.layers.0.a", "model.layers.0.b", "model.layers.10.a", "head"]
    parts = [small, large, large, small]
    base = {name: torch.zeros(part.shape[1]) for name, part in zip(names, parts, strict=True)}
    targets = [{name: part[j] for name, part in zip(names, parts, strict=True)} for j in range(2)]
    energies = [part.double().square().sum(dim=1) for part in parts]
    expected = {
        "matrix": energies,
        "layer": [energies[0] + energies[1]] * 2 + energies[2:],
        "model": [sum(energies)] * 4,
    }
    for unit, wanted in expected.items():
        coefficients = merge_deltas("varm", base, targets, unit=unit).report.coefficients
        for name, energy in zip(names, wanted, strict=True):
            assert coefficients[name] == pytest.approx((energy / energy.sum()).tolist())


def test_varm_per_parameter_weighs_every_position_alone() -> None:
    merged = merge_tensor(varm, torch.tensor([[3.0, 0.0, 0.0], [1.0, 2.0, 0.0]]), unit="parameter")
    torch.testing.assert_close(merged.delta, torch.tensor([2.8, 2.0, 0.0]))


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.7.mlp.up_proj.weight", "model.layers.7"),
        ("layers.0.q", "layers.0"),
        ("gpt_neox.layers.11.moe.experts.3.w1", "gpt_neox.layers.11"),
        ("0.weight", "0"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_tensor_s_layer(name: str, layer: str) -> None:
    assert layer_of(name) == layer


@pytest.mark.parametrize("name", ["varm", "sce"])
def test_fallbacks_are_reported(name: str) -> None:
    report = merge_deltas(name, {"w": torch.ones(4)}, [{"w": torch.ones(4)}] * 2).report
    assert report.events == {UNIFORM: ["w"]}
    assert report.coefficients == {"w": [0.5, 0.5]}


def test_weights_and_densities_may_be_given_per_target() -> None:
    deltas_JN = deltas_of(3, 2)
    merged = merge_tensor(task_arithmetic, deltas_JN, weight=[1.0, 0.25])
    torch.testing.assert_close(merged.delta, deltas_JN[0] + 0.25 * deltas_JN[1])
    lazy = TensorDeltas.of(deltas_JN)
    (kept,) = lazy.map(trimmer(lazy, torch.tensor([0.1, 1.0])))
    assert torch.count_nonzero(kept, dim=1).tolist() == [20, 200]


def largest_of(keys_KN: Tensor, counts: list[int]) -> Tensor:
    """The mask [K, N] of a selection over several blocks."""
    lazy = TensorDeltas.of(keys_KN)
    chosen = largest(lazy, lambda block: block.deltas_JN, counts)
    return torch.cat(lazy.map(lambda block: chosen.mask(block, block.deltas_JN)), dim=1)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.integers(0, 3), min_size=1, max_size=30), count=st.integers(-1, 31))
def test_the_largest_are_kept_and_ties_go_to_the_lowest_index(values: list[int], count: int) -> None:
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[: max(count, 0)]
    keys = torch.tensor([values], dtype=torch.float32)
    assert torch.nonzero(largest_of(keys, [count])[0]).flatten().tolist() == sorted(order)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, offset=st.sampled_from([0.0, 1.0, 1000.0]))
def test_variance_is_exact_even_for_large_equal_deltas(seed: int, offset: float) -> None:
    deltas_JN = deltas_of(seed) + offset
    deltas_JN[:, :20] = deltas_JN[0, :20]
    expected_N = deltas_JN.double().var(dim=0, correction=0)
    torch.testing.assert_close(variance(deltas_JN).double(), expected_N, rtol=2e-6, atol=1e-30)
    assert not variance(deltas_JN)[:20].any()


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e30])
@pytest.mark.parametrize("num_elements", [5, 1024, 5000])
def test_squared_norms_are_precise_at_any_size(size: float, num_elements: int) -> None:
    values_JN = deltas_of(1, 3, num_elements) * size
    expected_J = values_JN.double().square().sum(dim=1)
    torch.testing.assert_close(squared_norms(values_JN), expected_J, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 1500, 2040])
def test_squared_norms_reveal_what_is_not_finite(value: float, position: int) -> None:
    values_JN = torch.ones(1, 2041)
    values_JN[0, position] = value
    assert not torch.isfinite(squared_norms(values_JN)).any()


def test_a_vote_of_zero_agrees_with_nobody_and_a_tie_is_plus() -> None:
    votes_JN = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 2.0, 0.0], [0.0, -3.0, 0.0]])
    block, signs_N = TensorDeltas.of(votes_JN).block(0, votes_JN), majority(votes_JN)
    assert signs_N.tolist() == [1, -1, 1]
    weights_J = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)
    assert agreed_sum(votes_JN, weights_J, signs_N, renormalize=False).tolist() == [0.25, -3, 0]
    assert Election(lambda block: block.deltas_JN, weights_J, True)(block).tolist() == [1, -3, 0]


class TestRandomMasks:
    def test_do_not_depend_on_chunks(self) -> None:
        whole = random_words(1000, (7, 1, "model.w"))
        cut = [random_words(min(73, 1000 - start), (7, 1, "model.w"), start) for start in range(0, 1000, 73)]
        assert np.array_equal(whole, np.concatenate(cut))

    def test_depend_on_seed_target_and_name_only(self) -> None:
        first = random_keep(0.5, 256, (7, 1, "model.w"))
        assert torch.equal(first, random_keep(0.5, 256, (7, 1, "model.w")))
        for other in ((8, 1, "model.w"), (7, 0, "model.w"), (7, 1, "model.v")):
            assert not torch.equal(first, random_keep(0.5, 256, other))

    def test_never_change(self) -> None:
        # Published merges must stay reproducible: these words are part of the format.
        words = random_words(2, (0, 0, "w"))
        assert words.tolist() == [212295873, 298940870]

    @pytest.mark.parametrize("density", [0.1, 0.6, 0.95])
    def test_keep_their_share(self, density: float) -> None:
        kept = random_keep(density, 200_000, (1, 0, "w")).float().mean()
        assert abs(float(kept) - density) < 4 * (density * (1 - density) / 200_000) ** 0.5

    @pytest.mark.parametrize("rescale", ["density", "l1"])
    def test_dare_keeps_the_expected_value(self, rescale: str) -> None:
        deltas_JN = deltas_of(3, 2, 50)
        merged = [
            merge_tensor(dare_linear, deltas_JN, name="w", seed=seed, rescale=rescale).delta for seed in range(2000)
        ]
        spread = torch.stack(merged).std(dim=0) / 2000**0.5
        difference = torch.stack(merged).mean(dim=0) - deltas_JN.mean(dim=0)
        assert (difference.abs() < 5 * spread + (2e-4 if rescale == "l1" else 0)).all()

    def test_dare_l1_keeps_the_norm(self) -> None:
        deltas_JN = deltas_of(3, 1)
        merged = merge_tensor(dare_linear, deltas_JN, rescale="l1", density=0.3)
        assert float(merged.delta.abs().sum()) == pytest.approx(float(deltas_JN.abs().sum()), rel=1e-5)
        assert 0.2 < torch.count_nonzero(merged.delta) / 200 < 0.4

    def test_the_seed_reaches_the_mask_through_the_engine(self) -> None:
        base, targets = {"w": torch.zeros(99)}, [{"w": torch.ones(99)}] * 2
        first, again, other = (merge_state_dicts("dare_linear", base, targets, seed=seed)["w"] for seed in (1, 1, 2))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        assert not torch.equal(first == 0, first != first[0])  # the two targets do not share a mask


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_keeps_lengths_on_the_sphere_and_hits_both_ends(t: float) -> None:
    first, second = (values / values.norm() for values in deltas_of(1, 2))
    merged = merge_state_dicts("slerp", None, [{"w": first}, {"w": second}], t=t)["w"]
    assert float(merged.norm()) == pytest.approx(1, rel=1e-5)
    if t in (0.0, 1.0):
        torch.testing.assert_close(merged, second if t else first, **near)


def test_slerp_with_a_base_still_merges_weights() -> None:
    targets = [{"w": values} for values in deltas_of(1, 2) + 0.02]
    alone = merge_state_dicts("slerp", None, targets, t=0.4)["w"]
    based = merge_state_dicts("slerp", {"w": torch.full((200,), 0.1)}, targets, t=0.4)["w"]
    torch.testing.assert_close(based, alone, **near)
