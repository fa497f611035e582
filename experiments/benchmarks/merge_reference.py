"""Merges in float64, from their definitions and in plain NumPy: what both engines are measured against.

Shapes: J targets, N elements of a tensor.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fusion.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from fusion.merging.numerics.random_mask import random_words

Merge = Callable[[np.ndarray, str, dict[str, Any]], np.ndarray]
LEAST = 1e-6


class Error(NamedTuple):
    """How far written tensors are from the reference: `largest` difference, and the share of elements that are not
    the reference rounded to bfloat16."""

    largest: float
    not_rounded: float


def errors(
    out: Path, base: Path, targets: Sequence[Path], names: Sequence[str], method: str, parameters: dict
) -> Error:
    """Over the tensors `names`."""
    origin, models, merged = (
        open_checkpoint(base),
        [open_checkpoint(target) for target in targets],
        open_checkpoint(out),
    )
    largest, wrong, total = 0.0, 0, 0
    for name in names:
        base_N = _wide(origin, name)
        deltas_JN = np.stack([_wide(model, name) - base_N for model in models])
        expected_N = base_N + MERGES[method](deltas_JN, name, parameters)
        found_N = _wide(merged, name)
        largest = max(largest, float(np.abs(found_N - expected_N).max()))
        rounded_N = torch.from_numpy(expected_N).to(torch.bfloat16).double().numpy()
        wrong, total = wrong + int((found_N != rounded_N).sum()), total + len(found_N)
    return Error(largest, wrong / total)


def _wide(model: Checkpoint, name: str) -> np.ndarray:
    return model[name].reshape(-1).double().numpy()


def _linear(deltas_JN: np.ndarray, name: str, parameters: dict[str, Any]) -> np.ndarray:
    return deltas_JN.mean(axis=0)


def _task_arithmetic(deltas_JN: np.ndarray, name: str, parameters: dict[str, Any]) -> np.ndarray:
    return parameters["weight"] * deltas_JN.sum(axis=0)


def _dare_linear(deltas_JN: np.ndarray, name: str, parameters: dict[str, Any]) -> np.ndarray:
    """Our masks: another program's cannot be known."""
    num_targets, num_elements = deltas_JN.shape
    words_JN = np.stack([random_words(num_elements, (0, j, name)) for j in range(num_targets)])
    masks_JN = words_JN < parameters["density"] * 2**32
    return (deltas_JN * masks_JN / parameters["density"]).mean(axis=0)


def _ties(deltas_JN: np.ndarray, name: str, parameters: dict[str, Any]) -> np.ndarray:
    count = max(1, int(parameters["density"] * deltas_JN.shape[1]))
    trimmed_JN = deltas_JN * np.stack([_largest(np.abs(deltas_N), count) for deltas_N in deltas_JN])
    return _agreed(trimmed_JN, np.full(len(deltas_JN), parameters["weight"]), 0.0)


def _sce_mergekit(deltas_JN: np.ndarray, name: str, parameters: dict[str, Any]) -> np.ndarray:
    variance_N = deltas_JN.var(axis=0)
    selected_JN = deltas_JN * _largest(variance_N, int(parameters["tau"] * np.count_nonzero(variance_N)))
    means_J = np.square(selected_JN).mean(axis=1)
    uniform_J = np.full(len(means_J), 1 / len(means_J))
    return _agreed(selected_JN, uniform_J if means_J.sum() < LEAST else means_J / means_J.sum(), LEAST)


def _largest(keys_N: np.ndarray, count: int) -> np.ndarray:
    """Mask of the `count` largest; of equal ones those of lowest index."""
    mask_N = np.zeros(len(keys_N), dtype=bool)
    mask_N[np.argsort(-keys_N, kind="stable")[:count]] = True
    return mask_N


def _agreed(deltas_JN: np.ndarray, weights_J: np.ndarray, least: float) -> np.ndarray:
    signs_N = np.where((weights_J @ deltas_JN if least == 0 else deltas_JN.sum(axis=0)) >= 0, 1.0, -1.0)
    agree_JN = deltas_JN * signs_N > 0
    divisor_N = np.maximum(weights_J @ agree_JN, least)
    return weights_J @ (deltas_JN * agree_JN) / np.where(divisor_N == 0, 1.0, divisor_N)


MERGES: dict[str, Merge] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    "dare_linear": _dare_linear,
    "ties": _ties,
    "sce_mergekit": _sce_mergekit,
}
