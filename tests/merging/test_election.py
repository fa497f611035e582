"""An election in one pass over stored bit patterns has the bits of the same election step by step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from merge_inputs import save_model
from torch import Tensor

from fusion.config.schema import EngineConfig
from fusion.merging import merge_folders
from fusion.merging.deltas import BLOCK_ELEMENTS, TensorDeltas
from fusion.merging.numerics.arithmetic import squared_norms
from fusion.merging.numerics.election import Election
from fusion.merging.numerics.one_pass import OnePass, Patterns, Span, WeightedSum
from fusion.merging.numerics.rounding import scaled_sum
from fusion.merging.numerics.selection import SelectedSquares, Selection, magnitude, most_varying, trimmer

J = 4
WEIGHTS = torch.tensor([0.5, 0.2, 0.3, 0.7], dtype=torch.float64)


def models(size: int, coarse: bool = True) -> tuple[Tensor, Tensor]:
    """Base [N] and targets [J, N], bfloat16; if `coarse`, some deltas are zero and many are equal."""
    generator = torch.Generator().manual_seed(size)
    base_N = torch.randn(size, generator=generator).bfloat16() * (1 if coarse else 1e-4)
    steps_JN = torch.randint(-3, 4, (J, size), generator=generator) / 64
    if not coarse:
        steps_JN = torch.randn(J, size, generator=generator)
    return base_N, (base_N.float() + steps_JN).bfloat16()


def bit_patterns(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.view(torch.uint16).numpy() for tensor in tensors]


def in_one_pass(delta: OnePass, base_N: Tensor, targets_JN: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    rounded_N, squares_J = torch.empty_like(base_N), torch.empty(J, dtype=torch.float64)
    *inputs, rounded = bit_patterns(base_N, targets_JN, rounded_N)
    found = delta.merge(Patterns(Span(0, len(base_N)), *inputs, squares_J.numpy()), scale, rounded)
    assert found is None or (found[0] == squared_norms(base_N.float()[None]) and found[1])
    return None if found is None else (rounded_N, squares_J)


SELECTIONS = {
    "everything": lambda deltas: Selection(magnitude, None),
    "trimmed": lambda deltas: trimmer(deltas, torch.tensor([0.3, 1.0, 0.5, 0.9])),
    "varying": lambda deltas: most_varying(deltas, 0.4),
    "nothing": lambda deltas: most_varying(deltas, 1e-9),
}


@pytest.mark.parametrize("size", [1, 1023, 1024, 3000])
@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize(
    ("renormalize", "votes_J", "least"), [(True, WEIGHTS, 0.0), (False, None, 0.0), (True, None, 0.6)]
)
def test_one_pass_has_the_same_bits(
    size: int, kind: str, renormalize: bool, votes_J: Tensor | None, least: float
) -> None:
    base_N, targets_JN = models(size)
    deltas_JN = targets_JN.float() - base_N.float()
    deltas = TensorDeltas.of(deltas_JN)
    election = Election(SELECTIONS[kind](deltas), WEIGHTS, renormalize, votes_J, least)
    for scale in (1.0, -0.7):
        (delta_N,) = deltas.map(election)
        expected_N = scaled_sum("w", base_N.float(), delta_N, scale, torch.bfloat16)
        found = in_one_pass(election, base_N, targets_JN, scale)
        if found is None:  # only where equal deltas are cut within the block
            bounds = [0 < threshold.rest < size for threshold in election.select.selected.thresholds]
            assert any(bounds)
            return
        assert torch.equal(found[0].view(torch.int16), expected_N.view(torch.int16))
        assert torch.equal(found[1], squared_norms(deltas_JN))


@pytest.mark.parametrize("tau", [0.001, 0.1, 0.3, 0.36, 0.9])
def test_few_selected_positions_have_the_same_bits_as_among_all(tau: float) -> None:
    base_N, targets_JN = models(3000, coarse=False)
    base_N[::7] = -0.0  # stays, or becomes plus zero, whichever the long way makes of it
    targets_JN[:, ::7] = -0.0
    deltas = TensorDeltas.of(targets_JN.float() - base_N.float())
    select = most_varying(deltas, tau)
    for renormalize, least, scale in ((False, 0.0, 1.0), (True, 0.0, -0.7), (True, 0.6, 1.0)):
        election = Election(select, WEIGHTS, renormalize, least_divisor=least)
        (delta_N,) = deltas.map(election)
        found = in_one_pass(election, base_N, targets_JN, scale)
        expected_N = scaled_sum("w", base_N.float(), delta_N, scale, torch.bfloat16)
        assert found is not None
        assert torch.equal(found[0].view(torch.int16), expected_N.view(torch.int16))


@pytest.mark.parametrize("size", [1, 1023, 1024, 3000])
@pytest.mark.parametrize("kind", [kind for kind in SELECTIONS if kind != "nothing"])
def test_squares_of_what_is_selected_have_the_same_bits_in_one_pass(size: int, kind: str) -> None:
    base_N, targets_JN = models(size, coarse=False)
    deltas_JN = targets_JN.float() - base_N.float()
    deltas = TensorDeltas.of(deltas_JN)
    look = SelectedSquares(SELECTIONS[kind](deltas))
    patterns = Patterns(Span(0, size), *bit_patterns(base_N, targets_JN), np.empty(J))
    found = look.look(patterns)
    expected_J = deltas.map(look)[0]
    if not expected_J.all():  # a zero might be what has become too small for float32
        assert found is None
        return
    assert found is not None
    assert torch.equal(found[0], expected_J)
    assert found[1] == squared_norms(base_N.float()[None])
    assert torch.equal(torch.from_numpy(patterns.squares_J), squared_norms(deltas_JN))


def test_squares_that_leave_float32_are_summed_the_longer_way() -> None:
    for step in (1e-30, 1e30):
        targets_JN = (torch.ones(J, 5) * step).bfloat16()
        look = SelectedSquares(Selection(magnitude, None))
        inputs = bit_patterns(torch.zeros(5).bfloat16(), targets_JN)
        assert look.look(Patterns(Span(0, 5), *inputs, np.empty(J))) is None
        assert torch.isfinite(TensorDeltas.of(targets_JN.float()).map(look)[0]).all()


def test_only_known_selections_go_in_one_pass() -> None:
    base_N, targets_JN = models(100)
    assert in_one_pass(Election(lambda block: block.deltas_JN, WEIGHTS, True), base_N, targets_JN, 1.0) is None
    own = Selection(lambda block: block.deltas_JN, trimmer(TensorDeltas.of(targets_JN.float()), WEIGHTS).selected)
    assert in_one_pass(Election(own, WEIGHTS, True), base_N, targets_JN, 1.0) is None


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("linear", {}),
        ("ties", {"density": 0.35}),
        ("ties", {"density": 0.35, "trim": "model"}),
        ("sce", {"tau": 0.3}),
        ("sce", {}),
        ("sce_mergekit", {"tau": 0.3}),
    ],
)
def test_whole_merges_have_the_same_bytes(
    method: str, parameters: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_N, targets_JN = models(3 * BLOCK_ELEMENTS + 4000)
    base = save_model(tmp_path / "base", {"a": base_N[:-4000].view(-1, 1024), "b": base_N[-4000:]})
    targets = [
        save_model(tmp_path / str(j), {"a": target_N[:-4000].view(-1, 1024), "b": target_N[-4000:]})
        for j, target_N in enumerate(targets_JN)
    ]
    merged, calls = [], []
    ways = [(Election, "merge"), (WeightedSum, "merge"), (SelectedSquares, "look")]
    for kind, way in ways:
        found_by = getattr(kind, way)

        def counted(self, *args, found_by=found_by):
            calls.append(found_by(self, *args))
            return calls[-1]

        monkeypatch.setattr(kind, way, counted)
    for name in ("in_one_pass", "step_by_step"):
        merge_folders(method, base, targets, tmp_path / name, engine=EngineConfig(probe_disk=False), **parameters)
        merged.append((tmp_path / name / "model.safetensors").read_bytes())
        if name == "in_one_pass":
            assert any(found is not None for found in calls)
        for kind, way in ways:
            monkeypatch.setattr(kind, way, lambda *_: None)
    assert merged[0] == merged[1]
