"""Thresholds of selections are exact, whatever the sample that guesses are taken from and however little is kept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion.merging.deltas import BLOCK_ELEMENTS, ModelDeltas, TensorDeltas
from fusion.merging.numerics import thresholds
from fusion.merging.numerics.selection import largest, most_varying, order_statistics
from fusion.merging.numerics.thresholds import find_thresholds

BLOCKS = 3 * BLOCK_ELEMENTS + 700


class MisledDeltas(TensorDeltas):
    """Whose sample is not of them."""

    def sample(self, function) -> Tensor:
        return torch.full((self.num_targets, 50), 0.3) * torch.arange(50)


def keys_of(kind: str, seed: int, num_elements: int = BLOCKS) -> Tensor:
    """Three rows of one kind, float32; none is like another."""
    keys = torch.randn(3, num_elements, generator=torch.Generator().manual_seed(seed))
    if kind == "coarse":
        return (keys * 3).round() / 3
    if kind == "by row":  # blocks that are nothing like each other, so that any sample errs
        return keys * torch.logspace(-20, 10, num_elements)
    return torch.zeros_like(keys) if kind == "zero" else keys * (keys > 1.5) if kind == "sparse" else keys


def deltas(block) -> Tensor:
    return block.deltas_JN


def expected_mask(keys_N: Tensor, count: int) -> Tensor:
    mask_N = torch.zeros(len(keys_N))
    mask_N[torch.argsort(keys_N.abs(), descending=True, stable=True)[: max(count, 0)]] = 1
    return mask_N


def check(passes: TensorDeltas, keys: Tensor, counts: list[int]) -> None:
    selected = largest(passes, deltas, counts)
    mask = torch.cat(passes.map(lambda block: selected.mask(block, block.deltas_JN)), dim=1)
    for mask_N, keys_N, count in zip(mask, keys, counts, strict=True):
        assert torch.equal(mask_N, expected_mask(keys_N, count))


@pytest.mark.parametrize("gathered", [8, 3000, 1 << 22])
@pytest.mark.parametrize("misled", [False, True])
@pytest.mark.parametrize("kind", ["plain", "coarse", "by row", "zero", "sparse"])
def test_thresholds_are_exact(kind: str, misled: bool, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thresholds, "GATHERED", gathered)
    keys = keys_of(kind, 0)
    passes = (MisledDeltas if misled else TensorDeltas).of(keys)
    check(passes, keys, [1, BLOCKS // 3, BLOCKS - 5])
    check(passes, keys, [0, BLOCKS, BLOCK_ELEMENTS])


@settings(max_examples=40)
@given(
    values=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    count=st.integers(-1, 41),
    gathered=st.sampled_from([1, 1 << 22]),
)
def test_thresholds_of_few_values_are_exact(values: list[float], count: int, gathered: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(thresholds, "GATHERED", gathered)
        keys = torch.tensor([values])
        check(TensorDeltas.of(keys), keys, [count])
        ordered = sorted(abs(value) for value in keys[0].tolist())
        ranks = sorted({0, len(values) // 2, len(values) - 1})
        assert order_statistics(TensorDeltas.of(keys), deltas, ranks) == [ordered[rank] for rank in ranks]


@pytest.mark.parametrize("share", [0.1, 0.8])
def test_nan_counts_as_the_largest_and_ends_the_search(share: float) -> None:
    keys = keys_of("plain", 3, 5000)
    keys[:, 2000:] = float("nan")
    (found, *_) = largest(TensorDeltas.of(keys), deltas, [int(share * 5000)] * 3).thresholds
    finite_N = keys[0, :2000].abs().sort(descending=True).values
    assert found.level == finite_N[999] if share == 0.8 else math.isnan(found.level)
    assert most_varying(TensorDeltas.of(keys_of("plain", 4, 5000) * 1e30), 0.3).selected is not None


def test_a_share_of_what_is_not_zero() -> None:
    keys = keys_of("sparse", 1)
    (found, *_) = find_thresholds(TensorDeltas.of(keys), deltas, [lambda num_nonzero: num_nonzero // 10] * 3)
    count = int(torch.count_nonzero(keys[0])) // 10
    assert found.level == keys[0].abs().sort(descending=True).values[count - 1]


def test_good_guesses_take_one_pass_and_misled_ones_few() -> None:
    keys, passes = keys_of("plain", 2), []

    def counted(block) -> Tensor:
        passes.append(block.start)
        return block.deltas_JN

    num_blocks = len(TensorDeltas.of(keys).starts)
    largest(TensorDeltas.of(keys), counted, [BLOCKS // 2] * 3)
    assert num_blocks < len(passes) < 2 * num_blocks  # those of the sample, and of one pass
    passes.clear()
    largest(MisledDeltas.of(keys), counted, [BLOCKS // 2] * 3)
    assert 2 * num_blocks <= len(passes) <= 4 * num_blocks


def test_a_model_s_thresholds_are_those_of_all_tensors_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [keys_of("coarse", seed, size) for seed, size in enumerate([5, 3 * BLOCK_ELEMENTS, 40, 1000])]
    sizes = [part.shape[1] for part in parts]
    places = [sum(sizes[:i]) for i in range(len(parts))]
    tensors = {str(i): TensorDeltas.of(part) for i, part in enumerate(parts)}
    tensors = {
        name: TensorDeltas(name, one.shape, 3, one.operands, place)
        for (name, one), place in zip(tensors.items(), places, strict=True)
    }
    model = ModelDeltas(3, sum(sizes), lambda function: {name: function(one) for name, one in tensors.items()})
    keys = torch.cat(parts, dim=1)
    check(model, keys, [1, sum(sizes) // 2, sum(sizes) // 5])  # type: ignore[arg-type]
    assert model.sample(deltas).shape[1] < 40_000
