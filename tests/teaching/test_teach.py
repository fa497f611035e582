"""The teacher pass: cached, resumed to the same bytes, and clear about models that cannot teach."""

import shutil
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import encoder, make_llama, make_tokenizer, save
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM

from fusion.config import UserError
from fusion.config.schema import ModelConfig, TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.teaching import forward
from fusion.teaching import teach as module
from fusion.teaching.causal_lm import load_causal_lm
from fusion.teaching.store import DistributionStore
from fusion.teaching.teach import teach, teach_share

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

    monkeypatch.setattr(module, "place", refuse)
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
    exact = replace(SETTINGS, store="exact")  # codes may differ by a whole step where numbers hardly do
    stores = [run(tmp_path, replace(exact, batch_tokens=tokens)) for tokens in (1, 10_000)]
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
        run(tmp_path, replace(SETTINGS, rows="nucleus")),
        run(tmp_path, replace(SETTINGS, rows="nucleus", top_p=0.5)),
        run(tmp_path, replace(SETTINGS, rows="random")),
        run(tmp_path, replace(SETTINGS, rows="random", draws=7)),
        run(tmp_path, replace(SETTINGS, store="exact")),
        run(tmp_path, name="other weights"),
        run(tmp_path, model=replace(tiny_pivot, dtype="bfloat16")),
        run(tmp_path, dialogues={name: encoded[name] for name in names[1:]}),
        teach(tiny_pivot, "weights", vocab_size - 1, encoded, SETTINGS, tmp_path),
    ]
    assert len({store.folder for store in stores}) == len(stores)


@pytest.mark.parametrize(
    "changes", [{"workers": 3}, {"device": "auto"}, {"top_p": 0.5}, {"draws": 7}, {"rows": "top_k", "workers": 2}]
)
def test_what_cannot_change_the_result_keeps_the_folder(run, tmp_path, changes, monkeypatch):
    first = run(tmp_path)
    monkeypatch.setattr(module, "place", lambda *_: pytest.fail("the model was loaded again"))
    assert run(tmp_path, replace(SETTINGS, **changes)).folder == first.folder


@pytest.fixture
def share(tiny_pivot, encoded, vocab_size):
    def of(cache, workers, worker):
        return teach_share(
            tiny_pivot, "weights", vocab_size, encoded, replace(SETTINGS, workers=workers, worker=worker), cache
        )

    return of


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_workers_together_write_the_bytes_of_one(run, share, encoded, tmp_path, order):
    whole = run(tmp_path / "one")
    shares = [share(tmp_path / "many", 4, worker) for worker in order]
    assert [one.store is not None for one in shares] == [{*order[: n + 1]} >= {0, 1, 2} for n in range(4)]
    assert sum(one.shards for one in shares) == 3 == shares[0].all_shards
    assert sum(one.rows for one in shares) == sum(len(one.rows_R) for one in encoded.values())
    (folder,) = {one.store for one in shares if one.store}
    assert folder == str(tmp_path / "many" / "teaching" / whole.folder.name)
    assert content(tmp_path / "many" / "teaching" / whole.folder.name) == content(whole.folder)


def test_a_job_that_is_no_worker_reads_what_workers_left(run, share, tmp_path, monkeypatch):
    whole = run(tmp_path / "one")
    share(tmp_path / "many", 3, 1)
    append, written = DistributionStore.append, []

    def counts(self, number, names, rows):
        written.append(number)
        append(self, number, names, rows)

    monkeypatch.setattr(DistributionStore, "append", counts)
    assert content(run(tmp_path / "many").folder) == content(whole.folder)
    assert written == [0, 2]


def test_every_shard_is_logged_with_speed_and_time_left(run, tmp_path, caplog, monkeypatch):
    """By a clock that goes on by a second whenever it is looked at."""
    caplog.set_level("INFO")
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=count(1.0).__next__))
    run(tmp_path)
    lines = [line for line in caplog.messages if line.startswith("teacher pivot: ")]
    assert [line.split(",")[0] for line in lines] == [f"teacher pivot: {n} of 3 shards" for n in (1, 2, 3)]
    assert all(int(line.split()[-4]) > 0 and line.split()[-3] == "tokens/s," for line in lines)
    assert lines[-1].endswith("0:00:00 left")


class MostLogits(TorchDispatchMode):
    """Notes the most rows over the vocabulary that any operation returns."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor) and one.ndim and one.shape[-1] == self.vocab_size:
                self.rows = max(self.rows, one.numel() // self.vocab_size)
        return result


def make_gemma(vocab_size):
    config = Gemma2Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=5.0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gemma2ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_no_more_logits_exist_than_a_chunk_of_them(encoded, make, tmp_path, monkeypatch):
    size = 3000
    model = save(tmp_path / "model", make(size), make_tokenizer("metaspace", "openchat"), "wide")
    settings = replace(SETTINGS, batch_tokens=10_000, shard_dialogues=100)
    rows = sum(len(one.rows_R) for one in encoded.values())
    tokens = len(encoded) * max(len(one.ids_N) for one in encoded.values())
    assert tokens > 2 * rows > 4 * 20
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 20 * size)
    with MostLogits(size) as seen:
        chunked = teach(model, "weights", size, encoded, settings, tmp_path / "chunked")
    assert seen.rows == 20
    monkeypatch.setattr(forward, "CHUNK_LOGITS", 1 << 30)
    with MostLogits(size) as seen:
        whole = teach(model, "weights", size, encoded, settings, tmp_path / "whole")
    assert seen.rows == rows  # of all supervised rows, but still of no other token
    for name in encoded:
        np.testing.assert_allclose(chunked[name].nll_R, whole[name].nll_R, rtol=2e-3, atol=2e-4)
        np.testing.assert_array_equal(chunked[name].ids_RK, whole[name].ids_RK)


@pytest.mark.parametrize("make", [make_llama, make_gemma])
def test_half_precision_teaches_nearly_the_same(encoded, vocab_size, make, tmp_path):
    model = save(tmp_path / "model", make(vocab_size), make_tokenizer("metaspace", "openchat"), "pivot")
    settings = replace(SETTINGS, store="exact")
    full = teach(model, "weights", vocab_size, encoded, settings, tmp_path)
    half = teach(replace(model, dtype="bfloat16"), "weights", vocab_size, encoded, settings, tmp_path)
    assert half.folder != full.folder
    differences = [np.abs(half[name].nll_R - full[name].nll_R) for name in encoded]
    assert 0 < np.concatenate(differences).mean() < 0.1
    for name in encoded:
        masses_R = np.exp(half[name].logprobs_RK).sum(1) + half[name].tail_R
        np.testing.assert_allclose(masses_R, 1, atol=1e-5)


def test_memory_that_runs_out_is_told_with_what_helps(run, tmp_path, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(module, "teacher_rows", full)
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    (problem,) = caught.value.problems
    assert problem.startswith("teacher pivot: the device's memory does not hold a batch of ")
    for words in ("teacher.batch_tokens (now 64)", "now float32", "source.dtype", "(now single)"):
        assert words in problem


def test_a_finished_store_that_lost_bytes_is_refused(run, tmp_path):
    folder = run(tmp_path).folder
    shards = sorted(folder.glob("shard-*"))
    whole = [path.read_bytes() for path in shards]
    shards[0].write_bytes(whole[0][:-1])
    shards[2].unlink()
    with pytest.raises(UserError) as caught:
        run(tmp_path)
    assert [problem.split(":")[0] for problem in caught.value.problems] == [str(shards[0]), str(shards[2])]
    assert all(f"delete {folder}" in problem for problem in caught.value.problems)


def test_a_flipped_byte_is_named_and_never_read(run, encoded, tmp_path):
    folder = run(tmp_path).folder
    path = sorted(folder.glob("shard-*"))[1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    store = run(tmp_path)
    (problem,) = store.verify()
    assert problem.startswith(f"{path}: ")

    def read_all():
        for name in encoded:
            store[name]

    with pytest.raises(UserError, match=path.name):
        read_all()


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
