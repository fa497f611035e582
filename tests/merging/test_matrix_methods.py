"""Iso-C, TSV-M and WUDI on whole matrices: by hand, against NumPy in float64, and where a formula leaves a choice.

On matrices they are no averages: a single target is itself for TSV-M and WUDI, not for Iso-C (its singular values
become equal); identical targets merge into themselves for WUDI's exact solution alone (TSV-M cuts each to its share of
directions; Adam moves elements, not directions, and leaves those that hardly matter to the objective).
"""

import numpy as np
import pytest
import torch
from merge_inputs import merge_tensor

from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.merging import merge_deltas, merge_state_dicts
from fusion.merging.methods.iso_c import iso_c
from fusion.merging.methods.tsv_m import tsv_m
from fusion.merging.methods.wudi import wudi

METHODS = ("iso_c", "tsv_m", "wudi")
SHAPES = [(7, 5), (5, 7), (6, 6), (1, 4), (4, 1)]


def deltas_of(shape, num_targets=3, seed=0, size=0.01):
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(num_targets, *shape, generator=generator)


def merged(method, deltas_JRC, **parameters):
    return merge_tensor(method, deltas_JRC, **parameters).delta.reshape(deltas_JRC.shape[1:]).double().numpy()


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-7 * np.abs(expected).max())


class TestIsoC:
    def test_by_hand(self):
        deltas_JRC = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, -1.0]]])
        close(merged(iso_c, deltas_JRC), [[2.0, 0.0], [0.0, -2.0]])

    @pytest.mark.parametrize("shape", SHAPES)
    def test_against_numpy(self, shape):
        deltas_JRC = deltas_of(shape)
        u, s, vh = np.linalg.svd(deltas_JRC.double().numpy().sum(axis=0), full_matrices=False)
        close(merged(iso_c, deltas_JRC), s.mean() * u @ vh)

    def test_directions_without_deltas_stay_zero(self):
        """The deltas have rank 1; which other singular vectors a library invents must not matter."""
        row, column = torch.tensor([3.0, 4.0, 0.0]), torch.tensor([1.0, 0.0, 2.0, 2.0])
        close(merged(iso_c, torch.outer(column, row)[None]), torch.outer(column, row).numpy())


class TestTsvM:
    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("rank", [None, 0.5, 1.0])
    def test_against_numpy(self, shape, rank):
        deltas_JRC = deltas_of(shape, num_targets=2)
        kept = max(1, int((rank or 0.5) * min(shape)))
        parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas_JRC.double().numpy()]
        u = np.concatenate([part[0][:, :kept] for part in parts], axis=1)
        s = np.concatenate([part[1][:kept] for part in parts])
        vh = np.concatenate([part[2][:kept] for part in parts])
        close(merged(tsv_m, deltas_JRC, rank=rank), isometry(u) @ np.diag(s) @ isometry(vh))

    def test_targets_in_orthogonal_directions_are_added(self):
        deltas_JRC = torch.zeros(2, 4, 6)
        deltas_JRC[0, :2, :3], deltas_JRC[1, 2:, 3:] = deltas_of((2, 3), 2, seed=3)
        close(merged(tsv_m, deltas_JRC), deltas_JRC.sum(dim=0).numpy())

    def test_a_target_twice_counts_once(self):
        delta_RC = deltas_of((6, 6), 1, seed=4)[0]
        once = merged(tsv_m, delta_RC[None], rank=0.5)
        close(merged(tsv_m, torch.stack([delta_RC, delta_RC])), once)

    def test_more_targets_than_directions(self):
        assert np.isfinite(merged(tsv_m, deltas_of((2, 2), 5))).all()


def isometry(matrix):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return u[:, s > 1e-7 * s[0]] @ vh[s > 1e-7 * s[0]]


def disturbance(merged_RC, deltas_JRC):
    """WUDI's objective as the paper writes it."""
    merged_RC = torch.as_tensor(merged_RC)
    terms = [((merged_RC - d) @ d.T).square().sum() / d.square().sum() for d in deltas_JRC.double()]
    return float(sum(terms))


class TestWudi:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_exact_against_least_squares(self, shape):
        """Stacked, the terms are one linear system: m [d_1^T/|d_1| ...] = [d_1 d_1^T/|d_1| ...]."""
        deltas_JRC = deltas_of(shape)
        scaled = [d / np.linalg.norm(d) for d in deltas_JRC.double().numpy()]
        inputs = np.concatenate([d.T for d in scaled], axis=1)
        outputs = np.concatenate([d @ e.T for d, e in zip(deltas_JRC.double().numpy(), scaled, strict=True)], axis=1)
        expected, *_ = np.linalg.lstsq(inputs.T, outputs.T, rcond=None)
        close(merged(wudi, deltas_JRC, solver="exact"), expected.T)

    def test_adam_follows_autograd_on_the_paper_s_objective(self):
        deltas_JRC = deltas_of((5, 4))
        total = deltas_JRC.double().sum(dim=0)
        unit = total.square().mean().sqrt()
        variable = (total / unit).requires_grad_()
        adam = torch.optim.Adam([variable], lr=0.02)
        for _ in range(25):
            adam.zero_grad()
            terms = [((variable - d) @ d.T).square().sum() / d.square().sum() for d in deltas_JRC.double() / unit]
            torch.stack(terms).sum().backward()
            adam.step()
        close(merged(wudi, deltas_JRC, steps=25), (variable * unit).detach().numpy())

    def test_adam_comes_near_the_minimum(self):
        deltas_JRC = deltas_of((6, 5))
        start = disturbance(deltas_JRC.double().sum(dim=0), deltas_JRC)
        least = disturbance(merged(wudi, deltas_JRC, solver="exact"), deltas_JRC)
        found = disturbance(merged(wudi, deltas_JRC), deltas_JRC)
        assert least <= found < least + 0.01 * (start - least)

    def test_targets_on_different_inputs_do_not_disturb_each_other(self):
        deltas_JRC = torch.zeros(2, 4, 6)
        deltas_JRC[0, :, :3], deltas_JRC[1, :, 3:] = deltas_of((4, 3), 2, seed=3)
        for solver in ("exact", "adam"):
            close(merged(wudi, deltas_JRC, solver=solver), deltas_JRC.sum(dim=0).numpy())

    def test_a_target_that_did_not_move_has_no_say(self):
        deltas_JRC = deltas_of((5, 4))
        deltas_JRC[1] = 0
        close(merged(wudi, deltas_JRC, solver="exact"), merged(wudi, deltas_JRC[[0, 2]], solver="exact"))

    def test_deltas_that_cancel_still_have_a_unit(self):
        deltas_JRC = deltas_of((4, 4), 1)
        opposite = torch.cat([deltas_JRC, -deltas_JRC])
        assert np.abs(merged(wudi, opposite)).max() < 1e-12


def test_what_holds_of_one_target_and_of_equal_ones():
    delta_RC = deltas_of((5, 7), 1)[0]
    equal_JRC = delta_RC.repeat(3, 1, 1)
    close(merged(tsv_m, delta_RC[None]), delta_RC.double().numpy())
    close(merged(wudi, delta_RC[None]), delta_RC.double().numpy())
    close(merged(wudi, equal_JRC, solver="exact"), delta_RC.double().numpy())
    start, found = (disturbance(one, equal_JRC) for one in (3 * delta_RC.double(), merged(wudi, equal_JRC)))
    assert found < 0.01 * start


@pytest.mark.parametrize("method", METHODS)
class TestAllThree:
    def test_other_tensors_are_averaged(self, method):
        shapes = {"model.embed_tokens.weight": (5, 4), "model.norm.weight": (4,), "conv.weight": (3, 2, 2)}
        targets = [{name: deltas_of(shape, 2, seed=1)[j] for name, shape in shapes.items()} for j in range(2)]
        base = {name: torch.zeros(shape) for name, shape in shapes.items()}
        found = merge_deltas(method, base, targets)
        for name in shapes:
            torch.testing.assert_close(found.deltas[name], (targets[0][name] + targets[1][name]) / 2)
            assert found.report.coefficients[name] == [0.5, 0.5]

    def test_the_size_of_deltas_passes_through(self, method):
        deltas_JRC = deltas_of((5, 6))
        for size in (1e-6, 1.0, 100.0):
            scaled = merge_state_dicts(
                method, {"w": torch.zeros(5, 6)}, [{"w": size * delta_RC} for delta_RC in deltas_JRC]
            )
            expected = merge_state_dicts(method, {"w": torch.zeros(5, 6)}, [{"w": one} for one in deltas_JRC])
            torch.testing.assert_close(scaled["w"], size * expected["w"], rtol=1e-4, atol=1e-6 * size)

    def test_no_deltas(self, method):
        found = merge_deltas(method, {"w": torch.zeros(3, 4)}, [{"w": torch.zeros(3, 4)}] * 2)
        assert not found.deltas["w"].any()
        assert found.report.coefficients["w"] == [0.0, 0.0]

    def test_coefficients_are_those_of_the_nearest_weighted_sum(self, method):
        deltas_JRC = deltas_of((6, 5))
        found = merge_deltas(method, {"w": torch.zeros(6, 5)}, [{"w": one} for one in deltas_JRC])
        columns = deltas_JRC.flatten(1).T.double().numpy()
        expected, *_ = np.linalg.lstsq(columns, found.deltas["w"].flatten().double().numpy(), rcond=None)
        assert found.report.coefficients["w"] == pytest.approx(expected.tolist(), rel=1e-5)

    def test_needs_its_memory_only_for_matrices(self, method):
        shapes = {"model.embed_tokens.weight": (2000, 300), "w": (30, 30)}
        base = {name: torch.zeros(shape) for name, shape in shapes.items()}
        targets = [{name: deltas_of(shape, 1, seed=j)[0] for name, shape in shapes.items()} for j in range(2)]
        merge_state_dicts(method, base, targets, engine=EngineConfig(memory="1MiB"))
        base["w2"], targets = torch.zeros(200, 200), [{**target, "w2": torch.ones(200, 200)} for target in targets]
        with pytest.raises(UserError, match=r"works on whole tensors and needs .* MiB for 'w2'"):
            merge_state_dicts(method, base, targets, engine=EngineConfig(memory="1MiB"))

    def test_threads_and_memory_change_no_bit(self, method):
        """In 1600 KiB for three threads, all of them work on the large matrix together."""
        base = {"w": torch.zeros(90, 90), "v": torch.zeros(9, 20), "model.norm": torch.zeros(7)}
        targets = [{name: deltas_of(tensor.shape, 1, seed=j)[0] for name, tensor in base.items()} for j in range(2)]
        found = [
            merge_state_dicts(method, base, targets, engine=EngineConfig(memory=memory, threads=threads))
            for threads, memory in ((1, "64MiB"), (3, "1600KiB"), (2, "2GiB"))
        ]
        assert all(torch.equal(one[name], found[0][name]) for one in found for name in base)
