"""Fisher, RegMean and learned coefficients as merges: given evidence, against NumPy in float64."""

import re

import numpy as np
import pytest
import torch
from merge_inputs import make_family, save_model
from safetensors.torch import save_file

from fusion.config import UserError
from fusion.config.schema import EngineConfig
from fusion.merging import Evidence, check_parameters, merge_deltas, merge_folders, merge_state_dicts
from fusion.merging.checkpoints.checkpoint import open_checkpoint

KINDS = {
    "fisher": "squared_gradients",
    "regmean": "input_products",
    "learned": "learned_coefficients",
    "fisher_learned": "fisher_coefficients",
}


def random_state(seed, shapes, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def evidence(method, states, name="made by hand", coefficients=None):
    """Of `fisher_learned` with coefficients beside the states: those given, or 1."""
    beside = None
    if method == "fisher_learned":
        ones = [{one: torch.tensor(1.0) for one in set().union(*states)}] * len(states)
        beside = Evidence("learned_coefficients", tuple(coefficients or ones), name)
    return Evidence(KINDS[method], tuple(states), name, {"dialogues": [1] * len(states)}, beside)


def merged_delta(method, deltas_JRC, states, **parameters):
    """The merged delta of one tensor `w`, and its coefficients."""
    base = {"w": torch.zeros(deltas_JRC.shape[1:])}
    found = merge_deltas(
        method, base, [{"w": one} for one in deltas_JRC], evidence=evidence(method, states), **parameters
    )
    return found.deltas["w"].double().numpy(), found.report


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=2e-7 * np.abs(expected).max())


def inputs_of(place, num_tokens=40, num_inputs=5):
    generator = torch.Generator().manual_seed(100 + place)
    mixing = torch.randn(num_inputs, num_inputs, generator=generator)
    return (torch.randn(num_tokens, num_inputs, generator=generator) @ mixing).double()


def products_of(inputs):
    return {"w": (inputs.T @ inputs / len(inputs)).float()}


class TestFisher:
    DELTAS = torch.tensor([[[1.0, 2.0, 4.0]], [[3.0, 0.0, 8.0]]])

    def test_by_hand(self):
        states = [{"w": torch.tensor([[3.0, 0.0, 0.0]])}, {"w": torch.tensor([[1.0, 5.0, 0.0]])}]
        delta, report = merged_delta("fisher", self.DELTAS, states, normalize=False)
        close(delta, [[1.5, 0.0, 6.0]])  # the last position was never seen: the plain average
        assert report.coefficients["w"] == pytest.approx([(0.75 + 0 + 0.5) / 3, (0.25 + 1 + 0.5) / 3])
        assert report.shares == {"unseen": pytest.approx(1 / 3)}

    def test_weights(self):
        states = [{"w": torch.ones(1, 3)}, {"w": torch.ones(1, 3)}]
        delta, _ = merged_delta("fisher", self.DELTAS, states, weight=[3.0, 1.0], normalize=False)
        close(delta, [[1.5, 1.5, 5.0]])

    def test_normalizing_divides_by_the_mean_over_the_model(self):
        shapes = {"a": (70, 1000), "b": (9,)}
        base, *targets = (random_state(seed, shapes) for seed in range(3))
        states = [{name: one.square() for name, one in random_state(seed, shapes).items()} for seed in (7, 8)]
        states[1]["b"] *= 100
        found = merge_deltas("fisher", base, targets, evidence=evidence("fisher", states)).deltas
        scaled = [{name: 1e-9 * one for name, one in states[0].items()}, states[1]]
        means = [sum(float(one.double().sum()) for one in state.values()) / 70009 for state in states]
        for name in shapes:
            fishers = [state[name].double().numpy() / mean for state, mean in zip(states, means, strict=True)]
            deltas = [(target[name] - base[name]).double().numpy() for target in targets]
            close(found[name].numpy(), sum(f * d for f, d in zip(fishers, deltas, strict=True)) / sum(fishers))
        again = merge_deltas("fisher", base, targets, evidence=evidence("fisher", scaled)).deltas
        for name in shapes:
            torch.testing.assert_close(again[name], found[name], rtol=1e-5, atol=1e-6)

    def test_tensors_without_evidence_are_averaged_and_told_of(self):
        delta, report = merged_delta("fisher", self.DELTAS, [{}, {}], weight=[1.0, 3.0])
        close(delta, [[2.5, 0.5, 7.0]])
        assert report.events == {"no squared gradients of this tensor: the average by weight": ["w"]}

    def test_tiny_squared_gradients_still_weigh(self):
        states = [{"w": torch.full((1, 3), 3e-37)}, {"w": torch.full((1, 3), 1e-37)}]
        close(merged_delta("fisher", self.DELTAS, states, normalize=False)[0], [[1.5, 1.5, 5.0]])


class TestRegMean:
    def test_against_least_squares_on_the_inputs(self):
        deltas_JRC = random_state(1, {"w": (3, 4, 5)})["w"]
        inputs = [inputs_of(place) for place in range(3)]
        stacked = np.concatenate([one.numpy() for one in inputs])
        outputs = np.concatenate([(x @ d.double().T).numpy() for x, d in zip(inputs, deltas_JRC, strict=True)])
        expected, *_ = np.linalg.lstsq(stacked, outputs, rcond=None)
        delta, report = merged_delta("regmean", deltas_JRC, [products_of(x) for x in inputs], off_diagonal=1.0)
        np.testing.assert_allclose(delta, expected.T, rtol=1e-4, atol=1e-5)
        assert report.events == {}

    @pytest.mark.parametrize("off_diagonal", [0.0, 0.5, 0.9])
    def test_against_the_formula(self, off_diagonal):
        deltas_JRC, weights = random_state(1, {"w": (2, 4, 5)})["w"], [1.0, 2.5]
        states = [products_of(inputs_of(place)) for place in range(2)]
        grams = []
        for state, weight in zip(states, weights, strict=True):
            gram = state["w"].double().numpy()
            grams.append(weight * (off_diagonal * gram + (1 - off_diagonal) * np.diag(np.diag(gram))))
        numerator = sum(d.double().numpy() @ g for d, g in zip(deltas_JRC, grams, strict=True))
        expected = numerator @ np.linalg.inv(sum(grams))
        delta, _ = merged_delta("regmean", deltas_JRC, states, off_diagonal=off_diagonal, weight=weights)
        close(delta, expected)

    @pytest.mark.parametrize("off_diagonal", [0.9, 1.0])
    def test_inputs_that_never_come_are_averaged(self, off_diagonal):
        deltas_JRC = random_state(1, {"w": (2, 4, 5)})["w"]
        inputs = [inputs_of(place) for place in range(2)]
        for one in inputs:
            one[:, 3] = 0
        delta, _ = merged_delta("regmean", deltas_JRC, [products_of(x) for x in inputs], off_diagonal=off_diagonal)
        close(delta[:, 3], deltas_JRC.double().mean(dim=0).numpy()[:, 3])
        seen = [0, 1, 2, 4]
        alone, _ = merged_delta(
            "regmean", deltas_JRC[:, :, seen], [products_of(x[:, seen]) for x in inputs], off_diagonal=off_diagonal
        )
        np.testing.assert_allclose(delta[:, seen], alone, rtol=1e-5, atol=1e-6)

    def test_directions_that_never_come_are_averaged(self):
        """With whole products two inputs that always agree leave their difference open."""
        deltas_JRC = random_state(1, {"w": (2, 4, 5)})["w"]
        inputs = [inputs_of(place) for place in range(2)]
        for one in inputs:
            one[:, 4] = one[:, 0]
        delta, _ = merged_delta("regmean", deltas_JRC, [products_of(x) for x in inputs], off_diagonal=1.0)
        mean = deltas_JRC.double().mean(dim=0).numpy()
        np.testing.assert_allclose(delta[:, 0] - delta[:, 4], mean[:, 0] - mean[:, 4], rtol=1e-4, atol=1e-5)

    def test_other_tensors_are_averaged(self):
        shapes = {"model.embed_tokens.weight": (5, 4), "v": (4, 3), "model.norm.weight": (4,)}
        base, *targets = (random_state(seed, shapes) for seed in range(3))
        found = merge_deltas("regmean", base, targets, evidence=evidence("regmean", [{}, {}]), weight=[1.0, 3.0])
        for name in shapes:
            expected = (targets[0][name] - base[name]) / 4 + 3 * (targets[1][name] - base[name]) / 4
            torch.testing.assert_close(found.deltas[name], expected)
        told = {"no products of inputs of this tensor: the average by weight": ["model.embed_tokens.weight", "v"]}
        assert found.report.events == told


def test_learned_coefficients_are_the_weights_of_a_sum():
    base, targets = make_family(2)
    states = [{name: torch.tensor(j + 0.1 * place) for place, name in enumerate(base)} for j in range(2)]
    found = merge_deltas("learned", base, targets, evidence=evidence("learned", states))
    for place, name in enumerate(base):
        weights = [0.1 * place, 1 + 0.1 * place]
        expected = sum(w * (target[name] - base[name]) for w, target in zip(weights, targets, strict=True))
        torch.testing.assert_close(found.deltas[name], expected, rtol=1e-5, atol=1e-7)
        assert found.report.coefficients[name] == pytest.approx(weights)
    assert found.report.evidence == {"dialogues": [1, 1]}


class TestFisherLearned:
    def test_against_the_formula(self):
        base, targets = make_family(3)
        states = [{name: one.square() for name, one in random_state(j, shapes_of(base)).items()} for j in range(3)]
        rows = [{name: torch.tensor(j + 0.1 * place) for place, name in enumerate(base)} for j in range(3)]
        found = merge_deltas("fisher_learned", base, targets, evidence=evidence("fisher_learned", states, "", rows))
        num_elements = sum(one.numel() for one in base.values())
        means = [sum(float(one.double().sum()) for one in state.values()) / num_elements for state in states]
        for name, origin in base.items():
            fishers = [state[name].double().numpy() / mean for state, mean in zip(states, means, strict=True)]
            deltas = [(target[name] - origin).double().numpy() for target in targets]
            weights = [float(row[name]) * fisher / sum(fishers) for row, fisher in zip(rows, fishers, strict=True)]
            close(found.deltas[name].numpy(), sum(w * d for w, d in zip(weights, deltas, strict=True)))
            assert found.report.coefficients[name] == pytest.approx([float(w.mean()) for w in weights], rel=1e-5)

    def test_coefficients_of_one_are_fisher_merging(self):
        base, targets = make_family(2)
        states = of_family("fisher", base)
        one = merge_deltas("fisher", base, targets, evidence=evidence("fisher", states)).deltas
        other = merge_deltas("fisher_learned", base, targets, evidence=evidence("fisher_learned", states)).deltas
        assert all(torch.equal(one[name], other[name]) for name in base)

    def test_tensors_without_squared_gradients_have_their_coefficients_still(self):
        rows = [{"w": torch.tensor(3.0)}, {"w": torch.tensor(1.0)}]
        base, targets = {"w": torch.zeros(1, 3)}, [{"w": one} for one in TestFisher.DELTAS]
        found = merge_deltas("fisher_learned", base, targets, evidence=evidence("fisher_learned", [{}, {}], "", rows))
        close(found.deltas["w"].double().numpy(), [[3.0, 3.0, 10.0]])
        assert list(found.report.events) == ["no squared gradients of this tensor: the average by weight"]


def of_family(method, base):
    """Evidence of two targets of `make_family`."""
    states = []
    for j in range(2):
        if method.startswith("fisher"):
            states.append({name: one.square() for name, one in random_state(j, shapes_of(base)).items()})
        elif method == "regmean":
            linear = [name for name, tensor in base.items() if tensor.ndim == 2 and "embed" not in name]
            states.append({name: products_of(inputs_of(j, 40, base[name].shape[1]))["w"] for name in linear})
        else:
            states.append({name: torch.tensor(0.3 + 0.1 * j) for name in base})
    return states


def shapes_of(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@pytest.mark.parametrize("method", KINDS)
class TestAll:
    def test_the_scale_multiplies_the_delta(self, method):
        base, targets = make_family(2)
        given = evidence(method, of_family(method, base))
        merged = merge_deltas(method, base, targets, evidence=given)
        for scale in (0.0, 1.0, 2.5):
            expected = merge_state_dicts(method, base, targets, scale=scale, evidence=given)
            assert all(torch.equal(merged.at_scale(scale)[name], expected[name]) for name in base)

    def test_the_order_of_targets_does_not_matter(self, method):
        base, targets = make_family(2)
        states = of_family(method, base)
        straight = merge_deltas(method, base, targets, evidence=evidence(method, states)).deltas
        turned = merge_deltas(method, base, targets[::-1], evidence=evidence(method, states[::-1])).deltas
        for name in base:
            torch.testing.assert_close(turned[name], straight[name], rtol=1e-4, atol=1e-7)

    def test_one_target_alone_is_kept(self, method):
        base, targets = make_family(1)
        states = [{name: torch.tensor(1.0) for name in base}] if method == "learned" else of_family(method, base)[:1]
        merged = merge_state_dicts(method, base, targets, evidence=evidence(method, states))
        for name in base:
            torch.testing.assert_close(merged[name], targets[0][name])

    def test_files_threads_and_memory_change_no_bit(self, method, tmp_path):
        shapes = {"model.layers.0.w": (300, 250), "model.layers.1.w": (40, 30), "model.norm.weight": (9,)}
        base, *targets = (random_state(seed, shapes) for seed in range(3))
        states = of_family(method, base)
        for place, state in enumerate(states):
            (tmp_path / f"evidence{place}").mkdir()
            save_file(state, tmp_path / f"evidence{place}" / "measured.safetensors")
        kept = [open_checkpoint(tmp_path / f"evidence{place}") for place in range(2)]
        folders = [save_model(tmp_path / str(place), state) for place, state in enumerate([base, *targets])]
        expected = merge_state_dicts(method, base, targets, evidence=evidence(method, states))
        for threads, memory in ((1, "64MiB"), (3, "13MiB")):
            out = tmp_path / f"out{threads}"
            engine = EngineConfig(memory=memory, threads=threads)
            merge_folders(method, folders[0], folders[1:], out, evidence=evidence(method, kept), engine=engine)
            found = open_checkpoint(out)
            assert all(torch.equal(found[name], expected[name]) for name in shapes)

    def test_is_refused_without_evidence_of_its_kind(self, method):
        base, targets = make_family(2)
        with pytest.raises(UserError, match=f"merge method '{method}' needs {KINDS[method].replace('_', ' ')}, which"):
            merge_state_dicts(method, base, targets)
        with pytest.raises(UserError) as caught:
            merge_state_dicts(method, base, targets, evidence=Evidence("hearsay", ({},), ""))
        assert f"takes {KINDS[method]} evidence, got hearsay" in caught.value.problems[0]
        assert "evidence of 1 targets is given, and 2 targets" in caught.value.problems[1]

    def test_evidence_of_other_shapes_is_refused(self, method):
        base, targets = {"w": torch.zeros(3, 4)}, [{"w": torch.ones(3, 4)}] * 2
        for shape in ((3, 3), (2, 2, 2), (5, 5)):
            states = [{"w": torch.ones(shape)}] * 2
            for settings in ({}, {"normalize": False}) if method == "fisher" else ({},):
                with pytest.raises(UserError, match="evidence of 'w' must have the shape"):
                    merge_state_dicts(method, base, targets, evidence=evidence(method, states), **settings)


def test_other_methods_take_no_evidence():
    base, targets = make_family(2)
    with pytest.raises(UserError, match="merge method 'linear' takes no evidence, got squared_gradients"):
        merge_state_dicts("linear", base, targets, evidence=Evidence("squared_gradients", ({}, {}), ""))


@pytest.mark.parametrize(
    ("method", "parameters", "problem"),
    [
        ("learned", {"steps": 0}, "steps must be a whole number from 1 to"),
        ("learned", {"rate": {"*": 0.1}}, r"rate must be a number above 0 to 10, got \{'\*': 0.1\}"),
        ("learned", {"weight": 1.0}, "no parameter 'weight'"),
        ("fisher", {"dialogues": "mine"}, "dialogues must be one of own, all"),
        ("fisher", {"weight": [1.0, -1.0]}, "weight must be a number from 0 to inf"),
        ("regmean", {"weight": [0.0, 0.0]}, "gives no target a share"),
    ],
)
def test_parameters_of_measuring_are_checked_with_the_others(method, parameters, problem):
    (found,) = check_parameters(method, parameters, num_targets=2)
    assert re.search(problem, found)


def test_a_killed_merge_does_not_go_on_with_other_evidence(tmp_path, monkeypatch):
    """The working folder of an attempt with other evidence holds other tensors."""
    from fusion.merging import folders as merging_folders

    keys = []
    original = merging_folders._key
    monkeypatch.setattr(merging_folders, "_key", lambda *args: keys.append(original(*args)) or keys[-1])
    base, targets = make_family(2)
    saved = [save_model(tmp_path / str(place), state) for place, state in enumerate([base, *targets])]
    for name in ("one", "other", "one"):
        given = evidence("fisher", of_family("fisher", base), name)
        merge_folders("fisher", saved[0], saved[1:], tmp_path / f"out{len(keys)}", evidence=given)
    assert keys[0] == keys[2] != keys[1]
