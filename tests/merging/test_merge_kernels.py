"""The compiled loops against the Torch expressions that say what they mean, bit for bit where no sum is regrouped."""

import hashlib

import numpy as np
import pytest
import torch
from torch import Tensor

from fusion.merging import kernels
from fusion.merging.random_mask import random_keep, random_words

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


def test_the_words_are_numpy_s_philox() -> None:
    for start, count in ((0, 3000), (1, 1), (2, 2050), (4093, 7)):
        words = random_words(3, 1, "w", start, count)
        low, high = (int(word) for word in key_of(3, 1, "w"))
        generator = np.random.Philox(key=[low, high])
        assert np.array_equal(words, generator.random_raw(start + count)[start:])
        mask_N = random_keep(0.3, count, seed=3, target=1, name="w", start=start)
        assert np.array_equal(mask_N.numpy(), (words < np.uint64(int(0.3 * 2**64))).astype(np.float32))


def key_of(seed: int, target: int, name: str) -> np.ndarray:
    return np.frombuffer(hashlib.sha256(f"{seed}\0{target}\0{name}".encode()).digest()[:16], dtype="<u8")
