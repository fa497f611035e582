"""The teacher pass: cached, resumed to the same bytes, and clear about models that cannot teach."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import encoder, make_llama, make_tokenizer, save

from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.teaching import teach as module
from fusion.teaching.causal_lm import load_causal_lm
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import teach

SETTINGS = TeacherConfig(top_k=4, batch_tokens=64, shard_dialogues=4, device="cpu")


@pytest.fixture(scope="module")
def encoded():
    dialogues = [chat(f"question {n}", "yes " * (1 + n % 5), "and?", f"no {n}") for n in range(10)]
    return {dialogue.content_hash: encoder("metaspace", "openchat").encode(dialogue) for dialogue in dialogues}


@pytest.fixture(scope="module")
def vocab_size():
    return len(encoder("metaspace", "openchat").own.tokenizer)


@pytest.fixture
def run(tiny_pivot, encoded, vocab_size):
    def pass_over(cache, settings=SETTINGS, model=tiny_pivot, dialogues=encoded, name="weights"):
        return teach(model, name, vocab_size, dialogues, settings, cache)

    return pass_over


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_dialogue_is_taught_and_found(run, encoded, tmp_path):
    store = run(tmp_path)
    assert set(store) == set(encoded)
    for name, one in encoded.items():
        assert store[name].ids_RK.shape == (len(one.rows_R), 4)
    assert store.verify() == []
    assert len(list(store.folder.glob("shard-*"))) == 3


def test_a_second_pass_reads_the_cache(run, tmp_path, monkeypatch):
    first = run(tmp_path)

    def refuse(*_):
        raise AssertionError("the model was loaded again")

    monkeypatch.setattr(module, "load_causal_lm", refuse)
    assert run(tmp_path).folder == first.folder


def test_the_order_of_dialogues_changes_no_byte(run, encoded, tmp_path):
    first = run(tmp_path / "a")
    second = run(tmp_path / "b", dialogues=dict(reversed(encoded.items())))
    assert first.folder.name == second.folder.name
    assert content(first.folder) == content(second.folder)


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_killed_pass_goes_on_and_ends_in_the_same_bytes(run, tmp_path, monkeypatch, survivors):
    whole = run(tmp_path / "whole")
    append, written = DistributionStore.append, []

    def dies(self, number, names, rows):
        if len(written) == survivors:
            raise KeyboardInterrupt
        written.append(number)
        append(self, number, names, rows)

    def counts(self, number, names, rows):
        written.append(number)
        append(self, number, names, rows)

    monkeypatch.setattr(DistributionStore, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed")
    assert not any((tmp_path / "killed" / "teaching").glob("[0-9a-f]*"))
    monkeypatch.setattr(DistributionStore, "append", counts)
    resumed = run(tmp_path / "killed")
    assert written == [0, 1, 2]  # nothing was done twice
    assert content(resumed.folder) == content(whole.folder)


def test_batches_change_results_by_rounding_alone(run, encoded, tmp_path):
    stores = [run(tmp_path, replace(SETTINGS, batch_tokens=tokens)) for tokens in (1, 10_000)]
    assert stores[0].folder != stores[1].folder
    for name in encoded:
        one, other = (store[name] for store in stores)
        np.testing.assert_allclose(one.nll_R, other.nll_R, atol=1e-5)
        np.testing.assert_allclose(one.logprobs_RK, other.logprobs_RK, rtol=2e-3)


def test_what_can_change_the_result_changes_the_folder(run, tiny_pivot, encoded, vocab_size, tmp_path):
    names = sorted(encoded)
    stores = [
        run(tmp_path),
        run(tmp_path, replace(SETTINGS, top_k=5)),
        run(tmp_path, replace(SETTINGS, temperature=2.0)),
        run(tmp_path, name="other weights"),
        run(tmp_path, model=replace(tiny_pivot, dtype="bfloat16")),
        run(tmp_path, dialogues={name: encoded[name] for name in names[1:]}),
        teach(tiny_pivot, "weights", vocab_size - 1, encoded, SETTINGS, tmp_path),
    ]
    assert len({store.folder for store in stores}) == len(stores)


def poisoned(model, folder, name, value):
    shutil.copytree(model.path, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = torch.full_like(weights[name], value)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ModelConfig(name="sick", path=str(folder))


def test_a_model_full_of_nan_is_named_with_its_dialogues(run, encoded, tiny_pivot, tmp_path):
    sick = poisoned(tiny_pivot, tmp_path / "sick", "model.norm.weight", float("nan"))
    with pytest.raises(UserError) as caught:
        run(tmp_path / "cache", model=sick)
    (problem,) = caught.value.problems
    assert problem.startswith("teacher sick: the model gives NaN or infinite logits")
    assert any(name in problem for name in encoded)


def test_a_tokenizer_of_another_model_is_noticed(encoded, vocab_size, tmp_path):
    small = save(tmp_path / "small", make_llama(60), make_tokenizer("metaspace", "openchat"), "small")
    with pytest.raises(UserError, match=r"teacher small: its tokeniser has token \d+, but the model embeds only 60"):
        teach(small, "weights", vocab_size, encoded, SETTINGS, tmp_path / "cache")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_the_users_problem(run, tmp_path, device):
    with pytest.raises(UserError, match=rf"teacher\.device={device}: the model cannot be moved there"):
        run(tmp_path, replace(SETTINGS, device=device))


def test_models_that_cannot_be_loaded_are_named(tiny_pivot, tmp_path):
    empty, torn, pickled, strange, holey = (tmp_path / name for name in ("empty", "torn", "bin", "strange", "holey"))
    empty.mkdir()
    for folder in (torn, pickled, strange, holey):
        shutil.copytree(tiny_pivot.path, folder)
    weights = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    (strange / "config.json").write_text('{"model_type": "nothing_known"}')
    rest = load_file(holey / "model.safetensors")
    rest.pop("model.layers.0.mlp.up_proj.weight")
    save_file(rest, holey / "model.safetensors", metadata={"format": "pt"})
    for folder in (empty, torn, pickled, strange, holey, tmp_path / "missing"):
        with pytest.raises(UserError, match=rf"sick \(path={folder}\): the model cannot be loaded"):
            load_causal_lm(ModelConfig(name="sick", path=str(folder)))
    with pytest.raises(UserError, match="the model cannot be loaded"):
        load_causal_lm(replace(tiny_pivot, dtype="float99"))
