"""The authors' SCE beyond the recorded outputs: other dtypes, more targets, tensors of many blocks."""

import pytest
import rounded_merges
import torch
from torch import Tensor

from fusion.config.schema import EngineConfig
from fusion.merging import deltas, merge_deltas, merge_state_dicts
from fusion.merging.methods.sce_released import NOTHING_WEIGHED
from fusion.merging.numerics.unwidened import population_variance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def family(num_targets: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """A base, and targets of which each leaves some positions alone."""
    generator = torch.Generator().manual_seed(num_targets)
    base = 0.05 * torch.randn(shape, generator=generator)
    steps = [0.003 * (j + 1) * torch.randn(shape, generator=generator) for j in range(num_targets)]
    kept = [torch.rand(shape, generator=generator) < 0.8 for _ in range(num_targets)]
    return base.to(dtype), [(base + step * keep).to(dtype) for step, keep in zip(steps, kept, strict=True)]


def merged(base: Tensor, targets: list[Tensor], tau: float, threads: int = 1) -> Tensor:
    states = [{"w": tensor} for tensor in (base, *targets)]
    return merge_state_dicts("sce_released", states[0], states[1:], tau=tau, engine=EngineConfig(threads=threads))["w"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_targets", [1, 2, 6, 17])
@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_a_tensor_of_one_block_is_merged_as_the_program_does(tau: float, num_targets: int, dtype: torch.dtype) -> None:
    base, targets = family(num_targets, (90, 130), dtype)
    assert torch.equal(merged(base, targets, tau), rounded_merges.sce_released(base, targets, tau, first=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_move_the_last_bit_at_most(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", 1500)
    base, targets = family(3, (90, 130), dtype)
    in_blocks, whole = (
        merged(base, targets, 0.1, threads=2),
        rounded_merges.sce_released(base, targets, 0.1, first=True),
    )
    torch.testing.assert_close(in_blocks, whole, rtol=torch.finfo(dtype).eps, atol=1e-8)
    assert torch.equal(in_blocks, merged(base, targets, 0.1))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("num_targets", [1, 2, 3, 9])
def test_the_variance_has_the_bits_of_torch(num_targets: int, dtype: torch.dtype) -> None:
    base, targets = family(num_targets, (5000,), dtype)
    deltas_JN = torch.stack([target - base for target in targets])
    assert torch.equal(population_variance(deltas_JN), deltas_JN.var(dim=0, unbiased=False))


def test_where_nothing_is_selected_coefficients_are_uniform_and_the_deltas_stay() -> None:
    base, step = {"w": torch.zeros(4)}, {"w": torch.full((4,), 0.5)}
    found = merge_deltas("sce_released", base, [step, step])
    assert found.report.events == {NOTHING_WEIGHED: ["w"]}
    assert torch.equal(found.deltas["w"], step["w"])
