"""The compiled loops against the Torch expressions that say what they mean, bit for bit where no sum is regrouped."""

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion.merging.numerics import kernels
from fusion.merging.numerics.arithmetic import squared_norms, weighted_sum
from fusion.merging.numerics.random_mask import (
    GROUP,
    LANES,
    philox,
    random_keep,
    random_shares,
    random_words,
    write_kept,
)
from fusion.merging.numerics.rounding import scaled_sum

SIZES = (1, 5, 1023, 1025, 5000)


def made(num_rows: int, num_elements: int, seed: int = 0) -> Tensor:
    """Numbers of all sizes and signs; an eighth of them are zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, num_elements, generator=generator)
    values *= torch.exp(4 * torch.randn(num_rows, num_elements, generator=generator))
    return values * (torch.rand(num_rows, num_elements, generator=generator) > 1 / 8)


def weights_of(count: int) -> Tensor:
    return torch.linspace(0.3, -0.1, count, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("has_base", [True, False])
def test_loading(size: int, has_base: bool) -> None:
    base_N, targets_JN = made(1, size)[0].bfloat16(), made(3, size, 1).bfloat16()
    origin_N, operands_JN = torch.empty(size if has_base else 0), torch.empty(3, size)
    squares_J = torch.empty(3, dtype=torch.float64)
    raw_N = base_N[: size if has_base else 0].view(torch.uint16).numpy()
    arrays = origin_N.numpy(), operands_JN.numpy(), squares_J.numpy()
    square = kernels.load_bfloat16(raw_N, targets_JN.view(torch.uint16).numpy(), has_base, *arrays)
    expected_JN = targets_JN.float() - (base_N.float() if has_base else 0)
    assert torch.equal(operands_JN, expected_JN)
    assert not has_base or torch.equal(origin_N, base_N.float())
    torch.testing.assert_close(squares_J, expected_JN.double().square().sum(dim=1), rtol=1e-6, atol=0)
    assert square == pytest.approx(float(origin_N.double().square().sum()), rel=1e-6)


@pytest.mark.parametrize("size", SIZES)
def test_weighted_sum(size: int) -> None:
    values_JN, weights_J, total_N = made(4, size), weights_of(4), torch.empty(size)
    kernels.weighted_sum(values_JN.numpy(), weights_J.numpy(), total_N.numpy())
    expected_N = torch.zeros(size, dtype=torch.float64)
    for values_N, weight in zip(values_JN, weights_J, strict=True):
        expected_N += values_N.double() * weight
    assert torch.equal(total_N, expected_N.float())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("renormalize", "least"), [(False, 0.0), (True, 0.0), (True, 0.05)])
def test_agreed_sum(size: int, renormalize: bool, least: float) -> None:
    deltas_JN, weights_J, total_N = made(4, size), weights_of(4).abs(), torch.empty(size)
    signs_N = torch.where(deltas_JN.sum(dim=0) >= 0, 1.0, -1.0)
    kernels.agreed_sum(deltas_JN.numpy(), weights_J.numpy(), signs_N.numpy(), renormalize, least, total_N.numpy())
    agreeing_JN = (deltas_JN.double() * weights_J[:, None] * signs_N).clamp(min=0)
    expected_N, divisor_N = torch.zeros(2, size, dtype=torch.float64)
    for agreeing_N, weight in zip(agreeing_JN, weights_J, strict=True):
        expected_N += agreeing_N
        divisor_N += agreeing_N.sign() * weight
    divisor_N = divisor_N.clamp(min=least) if least else torch.where(divisor_N == 0, 1.0, divisor_N)
    assert torch.equal(total_N, (expected_N * signs_N / (divisor_N if renormalize else 1.0)).float())


@pytest.mark.parametrize("scale", [0.0, 1.0, -2.7])
def test_rounding_is_torch_s_for_all_halves_and_overflows_are_seen(scale: float) -> None:
    patterns = np.arange(1 << 16, dtype=np.uint32)
    origins = np.concatenate([patterns << 16 | low for low in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(np.float32)
    origin_N = torch.from_numpy(origins[np.isfinite(origins)])
    delta_N = made(1, len(origin_N))[0]
    rounded_N = torch.empty(len(origin_N), dtype=torch.bfloat16)

    def merged(origin_N: Tensor, delta_N: Tensor) -> bool:
        out_N = rounded_N[: len(origin_N)].view(torch.uint16).numpy()
        return kernels.round_to_bfloat16(delta_N.numpy(), origin_N.numpy(), scale, out_N)

    expected_N = (delta_N * scale + origin_N).bfloat16()
    assert not merged(origin_N, delta_N)  # the largest float32 are beyond bfloat16
    assert torch.equal(rounded_N.view(torch.int16), expected_N.view(torch.int16))
    fits_N = torch.isfinite(expected_N)
    assert merged(origin_N[fits_N], delta_N[fits_N])
    assert not merged(torch.tensor([1.0, float("nan")]), torch.zeros(2))


def test_angles_and_conflicts() -> None:
    values_JN, products_JJ = made(3, 5000), torch.empty(3, 3, dtype=torch.float64)
    kernels.inner_products(values_JN.numpy(), products_JJ.numpy())
    torch.testing.assert_close(products_JJ, values_JN.double() @ values_JN.double().T)
    conflicts_N = (values_JN.amax(dim=0) > 0) & (values_JN.amin(dim=0) < 0)
    assert kernels.count_conflicts(values_JN.numpy()) == int(conflicts_N.sum())


KNOWN_WORDS = [
    ((0x00000000,) * 4, (0x00000000,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]
"""Counter, key and words that the authors publish (Random123, kat_vectors, philox4x32 with 10 rounds)."""


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_WORDS)
def test_the_words_are_philox_s(counter: tuple, key: tuple, words: tuple) -> None:
    made_G = np.empty(GROUP, dtype=np.uint32)
    philox(np.uint64(counter[1] << 32 | counter[0]), np.array([*key, *counter[2:]], dtype=np.uint64), made_G)
    assert tuple(made_G[::LANES].tolist()) == words


@pytest.mark.parametrize(("start", "count"), [(0, 5000), (1, 1), (2047, 2), (4093, 2051)])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_kept_elements_are_those_of_the_mask(start: int, count: int, density: float) -> None:
    key, values_N, kept_N = (3, 1, "w"), made(1, count)[0], torch.empty(count)
    assert np.array_equal(random_words(count, key, start), random_words(start + count, key)[start:])
    mask_N = random_keep(density, count, key, start)
    assert torch.equal(mask_N, random_shares(count, key, start) < density)
    write_kept(values_N, density, 0.7, kept_N, key=key, start=start)
    assert torch.equal(kept_N, mask_N.float() * values_N / 0.7)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [1.0, -0.4])
def test_a_merge_in_one_pass_has_the_same_bits(size: int, scale: float) -> None:
    base_N, targets_JN, weights_J = made(1, size)[0].bfloat16(), made(3, size, 1).bfloat16(), weights_of(3)
    squares_J, rounded_N = torch.empty(3, dtype=torch.float64), torch.empty(size, dtype=torch.bfloat16)
    base_square, is_finite = kernels.merge_bfloat16(
        base_N.view(torch.uint16).numpy(),
        targets_JN.view(torch.uint16).numpy(),
        weights_J.numpy(),
        scale,
        rounded_N.view(torch.uint16).numpy(),
        squares_J.numpy(),
    )
    deltas_JN = targets_JN.float() - base_N.float()
    assert is_finite
    assert torch.equal(squares_J, squared_norms(deltas_JN))
    assert base_square == squared_norms(base_N.float()[None])
    assert torch.equal(rounded_N, scaled_sum("w", base_N, weighted_sum(deltas_JN, weights_J), scale, torch.bfloat16))


def test_counting_what_is_erased() -> None:
    deltas_JN, weights_J = made(4, 3000), weights_of(4)
    signs_N = torch.where(deltas_JN.sum(dim=0) >= 0, 1.0, -1.0)
    nonzero_JN = deltas_JN != 0
    agreeing_JN = deltas_JN.double() * weights_J[:, None] * signs_N > 0
    counts = kernels.count_erased(deltas_JN.numpy(), weights_J.numpy(), signs_N.numpy())
    assert counts == (int((nonzero_JN & ~agreeing_JN).sum()), int(nonzero_JN.sum()))
