"""What is measured on dialogues equals what autograd and plain forward passes give in float64, and is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_llama, make_qwen, make_tokenizer, save

from fusion.config import UserError
from fusion.dialogues.dialogue import chat
from fusion.merging import Study, deltas, measure, merge_folders
from fusion.merging.checkpoints.checkpoint import open_checkpoint
from fusion.merging.measuring import coefficients, fisher, grams
from fusion.merging.measuring.coefficients import learned_coefficients
from fusion.merging.measuring.fisher import squared_gradients
from fusion.merging.measuring.fisher_coefficients import fisher_coefficients
from fusion.merging.measuring.grams import input_products
from fusion.teaching.causal_lm import load_causal_lm

FIRST = [chat("a b", "c d", "e", "f g"), chat("h", "i yes"), chat("river", "two wires")]
SECOND = [chat("j k", "l no"), chat("poles", "The answer is yes, not no."), FIRST[0]]


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """Settings of a Llama with a head of its own, and the folders of two models near it."""
    root = tmp_path_factory.mktemp("family")
    tokenizer = make_tokenizer("metaspace", "openchat")
    pivot = save(root / "pivot", make_llama(len(tokenizer)), tokenizer, "pivot")
    targets = []
    for place in range(2):
        model, generator = make_llama(len(tokenizer)), torch.Generator().manual_seed(place)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
        targets.append(Path(save(root / f"target{place}", model, tokenizer, "target").path))
    return pivot, targets


@pytest.fixture
def study(family, tmp_path):
    pivot, targets = family
    return Study(pivot, Path(pivot.path), targets, [FIRST, SECOND], tmp_path / "cache")


def exact_model(study, folder):
    return load_causal_lm(replace(study.pivot, path=str(folder)), dtype="float64")


def exact_nll(model, tokens, weights=None):
    """Nats of a dialogue's supervised tokens, by the model's own forward."""
    inputs = {"input_ids": torch.from_numpy(tokens.ids_N).long()[None]}
    output = model(**inputs) if weights is None else torch.func.functional_call(model, weights, kwargs=inputs)
    references = torch.from_numpy(tokens.ids_N[tokens.rows_R + 1]).long()
    return torch.nn.functional.cross_entropy(output.logits[0, tokens.rows_R], references, reduction="sum")


def close(actual, expected, relative=1e-4):
    atol = relative * float(expected.abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=relative, atol=atol)


class TestSquaredGradients:
    def test_equal_autograd_in_float64(self, study):
        found = squared_gradients(study)
        for place, dialogues in enumerate(study.dialogues):
            model, encoded = exact_model(study, study.targets[place]), study.encoded(dialogues)
            expected = {name: torch.zeros_like(one) for name, one in model.named_parameters()}
            for tokens in encoded:
                model.zero_grad()
                exact_nll(model, tokens).backward()
                for name, parameter in model.named_parameters():
                    expected[name] += parameter.grad.square() / len(encoded)
            assert set(found.states[place]) == set(expected)
            for name, one in expected.items():
                assert found.states[place][name].dtype == torch.float32
                close(found.states[place][name], one)
        assert found.summary == {"kind": "squared_gradients", "dialogues": [3, 3]}

    def test_of_a_tied_head_are_of_both_its_uses(self, tmp_path):
        tokenizer = make_tokenizer("byte_level", "chatml")
        pivot = save(tmp_path / "m", make_qwen(len(tokenizer)), tokenizer, "pivot")
        study = Study(pivot, None, [Path(pivot.path)], [FIRST[1:2]], tmp_path / "cache")
        model, (tokens,) = exact_model(study, pivot.path), study.encoded(FIRST[1:2])
        exact_nll(model, tokens).backward()
        (state,) = squared_gradients(study).states
        assert "lm_head.weight" not in state
        close(state["model.embed_tokens.weight"], model.get_input_embeddings().weight.grad.square())


class TestInputProducts:
    def test_equal_plain_passes_in_float64(self, study):
        found = input_products(study)
        for place, dialogues in enumerate(study.dialogues):
            model, encoded = exact_model(study, study.targets[place]), study.encoded(dialogues)
            inputs = {name: [] for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
            for name, module in model.named_modules():
                if name in inputs:
                    module.register_forward_pre_hook(lambda _, given, read=inputs[name]: read.append(given[0][0]))
            with torch.no_grad():
                for tokens in encoded:
                    model(input_ids=torch.from_numpy(tokens.ids_N).long()[None])
            rows = [torch.from_numpy(tokens.rows_R) for tokens in encoded]
            inputs["lm_head"] = [one[chosen] for one, chosen in zip(inputs["lm_head"], rows, strict=True)]
            assert set(found.states[place]) == {f"{name}.weight" for name in inputs}
            for name, parts in inputs.items():
                read = torch.cat(parts)
                close(found.states[place][f"{name}.weight"], read.T @ read / len(read))

    def test_little_memory_takes_more_passes_and_changes_no_bit(self, study, monkeypatch):
        passes = []
        original = grams._grams
        monkeypatch.setattr(grams, "_grams", lambda *args: passes.append(1) or original(*args))
        whole = input_products(study)
        assert len(passes) == 2
        little = input_products(replace(study, memory=6000, cache=study.cache / "little"))
        assert len(passes) > 2 + 4
        for place in range(2):
            assert set(whole.states[place]) == set(little.states[place])
            assert all(torch.equal(whole.states[place][name], little.states[place][name]) for name in little.states[0])

    def test_a_tied_head_has_none(self, tmp_path):
        tokenizer = make_tokenizer("byte_level", "chatml")
        pivot = save(tmp_path / "m", make_qwen(len(tokenizer)), tokenizer, "pivot")
        (state,) = input_products(Study(pivot, None, [Path(pivot.path)], [FIRST], tmp_path / "cache")).states
        assert len(state) == 7
        assert not any("embed" in name or "head" in name for name in state)


def learned_by_autograd(study, batches, start, rate, shares=None):
    """Adam on the coefficients through `functional_call`, float64; `shares`: a factor of every delta."""
    model = exact_model(study, study.base)
    base = {name: one.double() for name, one in open_checkpoint(study.base).items()}
    parts = [{name: one.double() - base[name] for name, one in open_checkpoint(t).items()} for t in study.targets]
    for part, share in zip(parts, shares or [], strict=bool(shares)):
        part |= {name: share[name] * one for name, one in part.items()}
    weights = {name: torch.full((2,), start, dtype=torch.float64, requires_grad=True) for name in base}
    adam = torch.optim.Adam(weights.values(), lr=rate)
    losses = []
    for batch in batches:
        merged = {
            name: base[name] + sum(w * p[name] for w, p in zip(weights[name], parts, strict=True)) for name in base
        }
        loss = sum(exact_nll(model, one, merged) for one in batch) / sum(one.num_bytes for one in batch)
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(float(loss.detach()))
    return {name: one.tolist() for name, one in weights.items()}, losses


def exact_shares(gradients):
    """F_j / sum_i F_i of every position, each F divided by its mean over the model."""
    states = [{name: state[name].double() for name in state} for state in gradients.states]
    means = [torch.cat([one.flatten() for one in state.values()]).mean() for state in states]
    scaled = [{name: one / mean for name, one in state.items()} for state, mean in zip(states, means, strict=True)]
    totals = {name: sum(state[name] for state in scaled) for name in scaled[0]}
    even = 1 / len(states)
    return [
        {name: torch.where(totals[name] > 0, one / totals[name], even) for name, one in state.items()}
        for state in scaled
    ]


class TestLearnedCoefficients:
    def test_equal_autograd_through_the_merge(self, study):
        found = learned_coefficients(study, steps=6, rate=0.05, start=0.4)
        expected, losses = learned_by_autograd(study, [study.encoded(study.all_dialogues)] * 6, 0.4, 0.05)
        assert set(found.states[0]) == set(expected)
        for name, row in expected.items():
            assert [float(state[name]) for state in found.states] == pytest.approx(row, abs=1e-4)
        assert found.summary["nats_per_byte"] == pytest.approx(losses, rel=1e-5)
        assert losses[-1] < losses[0]

    def test_batches_are_drawn_by_the_seed(self, study):
        encoded = study.encoded(study.all_dialogues)
        drawn = [list(coefficients._drawn(encoded, 2, 5, seed)) for seed in (1, 1, 2)]
        numbers = {id(one): number for number, one in enumerate(encoded)}
        places = [[numbers[id(one)] for batch in batches for one in batch] for batches in drawn]
        assert places[0] == places[1] != places[2]
        assert sorted(places[0]) == sorted([*range(5), *range(5)])
        found = learned_coefficients(replace(study, seed=1), steps=5, batch=2)
        expected, _ = learned_by_autograd(study, drawn[0], 0.3, 0.02)
        for name, row in expected.items():
            assert [float(state[name]) for state in found.states] == pytest.approx(row, abs=1e-4)

    def test_small_batches_of_tokens_add_up(self, study):
        whole = learned_coefficients(study, steps=2)
        cut = learned_coefficients(replace(study, batch_tokens=16), steps=2)
        assert whole.name != cut.name
        for state, other in zip(whole.states, cut.states, strict=True):
            assert all(float(state[name]) == pytest.approx(float(other[name]), abs=1e-5) for name in state)

    def test_need_a_base(self, study):
        with pytest.raises(UserError, match="without a base: give the base"):
            learned_coefficients(replace(study, base=None))

    def test_go_into_the_report_of_the_merge(self, study, tmp_path):
        found = measure("learned", study, steps=3)
        report = merge_folders("learned", study.base, study.targets, tmp_path / "out", evidence=found, steps=3)
        assert report.coefficients["lm_head.weight"] == [float(state["lm_head.weight"]) for state in found.states]
        assert len(report.evidence["nats_per_byte"]) == report.parameters["steps"] == 3


class TestFisherCoefficients:
    def test_equal_autograd_through_the_merge(self, study, monkeypatch):
        monkeypatch.setattr(deltas, "BLOCK_ELEMENTS", 64)
        found = fisher_coefficients(study, steps=6, rate=0.05, start=0.8)
        shares = exact_shares(squared_gradients(study))
        batches = [study.encoded(study.all_dialogues)] * 6
        expected, losses = learned_by_autograd(study, batches, 0.8, 0.05, shares)
        for name, row in expected.items():
            assert [float(state[name]) for state in found.beside.states] == pytest.approx(row, abs=1e-4)
        assert found.summary["nats_per_byte"] == pytest.approx(losses, rel=1e-5)
        assert losses[-1] < losses[0]

    def test_squared_gradients_are_those_of_fisher(self, study):
        found, alone = fisher_coefficients(study, steps=1), squared_gradients(study)
        for state, other in zip(found.states, alone.states, strict=True):
            assert all(torch.equal(state[name], other[name]) for name in other)

    def test_other_squared_gradients_teach_other_coefficients(self, study):
        own, whole = (fisher_coefficients(study, steps=2, dialogues=whose) for whose in ("own", "all"))
        assert own.name != whole.name
        assert own.summary["nats_per_byte"] != whole.summary["nats_per_byte"]

    def test_the_model_that_was_learned_is_the_one_that_is_merged(self, study, tmp_path):
        """The loss of the next step, which the coefficients were not yet changed for, is that of the merged model."""
        found = measure("fisher_learned", study, steps=2)
        merge_folders("fisher_learned", study.base, study.targets, tmp_path / "out", evidence=found)
        model, encoded = exact_model(study, tmp_path / "out"), study.encoded(study.all_dialogues)
        loss = sum(float(exact_nll(model, one).detach()) for one in encoded) / sum(one.num_bytes for one in encoded)
        assert measure("fisher_learned", study, steps=3).summary["nats_per_byte"][2] == pytest.approx(loss, rel=1e-5)


FEW = {"learned": {"steps": 2}, "fisher_learned": {"steps": 2}}
MODULES = {"fisher": fisher, "regmean": grams, "learned": coefficients, "fisher_learned": coefficients}


@pytest.mark.parametrize(("method", "module"), MODULES.items())
class TestAllOfThem:
    def test_are_kept_and_the_same_again(self, method, module, study, monkeypatch):
        first = measure(method, study, **FEW.get(method, {}))
        again = measure(method, replace(study, cache=study.cache / "again"), **FEW.get(method, {}))
        monkeypatch.setattr(Study, "model", lambda *_: pytest.fail("measured a second time"))
        kept = measure(method, study, **FEW.get(method, {}))
        assert first.name == kept.name == again.name
        for one, other, third in zip(first.states, kept.states, again.states, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)
            assert all(torch.equal(one[name], third[name]) for name in one)

    def test_other_dialogues_are_measured_anew(self, method, module, study):
        settings = FEW.get(method, {})
        first = measure(method, study, **settings)
        other = measure(method, replace(study, dialogues=[FIRST[:1], SECOND]), **settings)
        assert first.name != other.name

    def test_a_measuring_that_was_killed_leaves_nothing_to_read(self, method, module, study, monkeypatch):
        settings = FEW.get(method, {})
        expected = measure(method, replace(study, cache=study.cache / "whole"), **settings)
        place = "write_json" if method in FEW else "save_file"
        with monkeypatch.context() as patched:
            patched.setattr(module, place, die)
            with pytest.raises(KeyboardInterrupt):
                measure(method, study, **settings)
        assert not [path for path in (study.cache / module.STAGE).iterdir() if not path.name.startswith(".")]
        found = measure(method, study, **settings)
        for one, other in zip(expected.states, found.states, strict=True):
            assert all(torch.equal(one[name], other[name]) for name in one)


def die(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("measure_of", [squared_gradients, input_products])
def test_a_target_without_dialogues_of_its_own_reads_all(measure_of, study):
    lacking = replace(study, dialogues=[[], SECOND])
    assert measure_of(lacking).summary["dialogues"] == [3, 3]
    assert measure_of(study, dialogues="all").summary["dialogues"] == [5, 5]


def test_the_number_of_threads_names_what_is_kept(study):
    """Sums may differ in the last bit between numbers of threads."""
    names = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        names.append(study.kept("stage", study.targets, FIRST, {}, lambda out: None).name)
    assert names[0] == names[2] != names[1]


@pytest.mark.parametrize(
    ("dialogues", "problem"),
    [
        ([[], []], "there are no dialogues to measure on"),
        ([FIRST], "dialogues of 1 targets are given, and 2 targets"),
    ],
)
def test_a_study_needs_dialogues_for_each_target(study, dialogues, problem):
    with pytest.raises(UserError, match=problem):
        replace(study, dialogues=dialogues)


def test_dialogues_that_no_model_can_read_are_refused(study):
    silent = [chat("a", "<|end_of_turn|>")]
    with pytest.raises(UserError, match="none of 1 dialogues to measure on can be read"):
        measure("fisher", replace(study, dialogues=[silent, silent]))


def test_weights_that_break_the_model_are_refused(study, tmp_path):
    model = load_causal_lm(study.pivot)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    broken = Path(save(tmp_path / "broken", model, make_tokenizer("metaspace", "openchat"), "broken").path)
    for method in ("fisher", "regmean"):
        with pytest.raises(UserError, match="is not finite: does the model read these dialogues at all"):
            measure(method, replace(study, targets=[broken, broken]))


def test_tensors_of_other_names_are_refused(study, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "renamed"
    folder.mkdir()
    for path in study.targets[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    weights["extra.weight"] = torch.ones(2)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'extra.weight' and 0 more tensors have other names"):
        measure("fisher", replace(study, targets=[folder, folder]))


def test_only_methods_that_need_it_are_measured_for(study):
    with pytest.raises(UserError, match="'linear' needs no evidence"):
        measure("linear", study)
    with pytest.raises(UserError, match="did you mean 'steps'"):
        measure("learned", study, stpes=3)


def test_fisher_merging_from_dialogues_to_folder(study, tmp_path):
    """Everything together, against the formula on what was measured."""
    found = measure("fisher", study)
    merge_folders("fisher", study.base, study.targets, tmp_path / "out", evidence=found)
    name = "model.layers.1.mlp.down_proj.weight"
    states = [open_checkpoint(path) for path in study.targets]
    means = [np.mean(np.concatenate([one.numpy().ravel() for one in state.values()])) for state in found.states]
    shares = torch.stack([state[name].double() / mean for state, mean in zip(found.states, means, strict=True)])
    shares /= shares.sum(dim=0)
    expected = sum(share * state[name].double() for share, state in zip(shares, states, strict=True))
    close(open_checkpoint(tmp_path / "out")[name], expected, 1e-5)
