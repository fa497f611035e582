"""A teacher says the same wherever its weights live, and failures of its processes come back as one mistake."""

import gc
import importlib.util
import logging
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import encoder, make_qwen, make_tokenizer, save
from transformers import LlamaConfig, LlamaForCausalLM
from waiting import PATIENCE, wait_for

from fusion.config import UserError
from fusion.config.schema import ModelConfig, SourceConfig, TeacherConfig
from fusion.dialogues.dialogue import chat
from fusion.processes.starter import PACKAGE_ROOT
from fusion.teaching import placement
from fusion.teaching.causal_lm import final_hidden, has_plain_head, head, load_causal_lm, logits_device
from fusion.teaching.placement import check_placement, place
from fusion.teaching.processes import Task, read_in_processes
from fusion.teaching.teach import teach

SINGLE = TeacherConfig(top_k=4, batch_tokens=64, shard_dialogues=3, device="cpu", store="exact")
AUTO = replace(SINGLE, placement="auto")
SPLITS = {name: replace(SINGLE, placement=name, processes=2) for name in ("tensor_parallel", "fsdp")}
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="accelerate is an extra: pip install 'fusion-chat[big]'"
)
ENCODER = encoder("metaspace", "openchat")
VOCAB_SIZE = len(ENCODER.own.tokenizer)


@pytest.fixture(scope="module")
def encoded():
    dialogues = [chat(f"question {n}", "yes " * (1 + n % 5), "and?", f"no {n}") for n in range(10)]
    return {dialogue.content_hash: ENCODER.encode(dialogue) for dialogue in dialogues}


def llama(folder, kv_heads=2):
    """A model whose heads two processes can share, unless it has but one; more rows in the head than tokens, odd."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE + (VOCAB_SIZE + 1) % 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        initializer_range=0.3,
        max_position_embeddings=512,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return save(folder, LlamaForCausalLM(config), make_tokenizer("metaspace", "openchat"), "big")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return save(
        tmp_path_factory.mktemp("qwen"), make_qwen(VOCAB_SIZE), make_tokenizer("metaspace", "openchat"), "tied"
    )


@pytest.fixture(scope="module")
def single(model, encoded, tmp_path_factory):
    return teach(model, "weights", VOCAB_SIZE, encoded, SINGLE, tmp_path_factory.mktemp("single"))


def assert_same(found, expected):
    assert set(found) == set(expected)
    for name in expected:
        ours, theirs = found[name], expected[name]
        np.testing.assert_array_equal(ours.ids_RK, theirs.ids_RK)
        for field in ("logprobs_RK", "tail_R", "nll_R"):
            np.testing.assert_allclose(getattr(ours, field), getattr(theirs, field), rtol=2e-3, atol=2e-4)


@needs_accelerate
@pytest.mark.parametrize("name", SPLITS)
def test_processes_that_share_a_model_read_what_one_reads(model, encoded, single, tmp_path, name, monkeypatch, caplog):
    outer = {"WORLD_SIZE": "7", "RANK": "5", "LOCAL_RANK": "5", "MASTER_ADDR": "nowhere", "TORCHELASTIC_RUN_ID": "x"}
    for variable, value in outer.items():  # as inside a torchrun
        monkeypatch.setenv(variable, value)
    caplog.set_level(logging.INFO)
    store = teach(model, "weights", VOCAB_SIZE, encoded, SPLITS[name], tmp_path)
    assert store.folder.name != single.folder.name
    assert_same(store, single)
    assert store.verify() == []
    assert any("4 of 4 shards" in line for line in caplog.messages)
    shards = {path.name: path.read_bytes() for path in single.folder.glob("shard-*")}
    assert set(shards) == {path.name for path in store.folder.glob("shard-*")}
    if name == "fsdp":  # every number is computed as in one process
        assert shards == {path.name: path.read_bytes() for path in store.folder.glob("shard-*")}


@needs_accelerate
@pytest.mark.parametrize("name", ["model", "tied"])
@pytest.mark.parametrize("share", [0.0, 0.8, None])
def test_a_model_that_is_spread_over_memory_and_disk_says_the_same(name, share, request, monkeypatch):
    settings = request.getfixturevalue(name)
    whole = load_causal_lm(settings)
    size = sum(weight.numel() * 4 for weight in whole.parameters())
    limit = None if share is None else {"cpu": max(1, int(share * size))}
    monkeypatch.setattr(placement, "_max_memory", lambda device: limit)
    spread = place(settings, AUTO)
    assert any(weight.device.type == "meta" for weight in spread.parameters()) == (limit is not None)
    ids_BT = torch.randint(1, VOCAB_SIZE, (3, 17), generator=torch.Generator().manual_seed(0))
    ids_BT, mask_BT = ids_BT.to(logits_device(spread)), torch.ones_like(ids_BT)
    assert has_plain_head(spread)
    with torch.no_grad():
        hidden = final_hidden(spread, ids_BT, mask_BT)
        torch.testing.assert_close(hidden, final_hidden(whole, ids_BT, mask_BT))
        torch.testing.assert_close(head(spread)(hidden[0]), head(whole)(hidden[0]))


@needs_accelerate
def test_a_spread_teacher_fills_the_same_store(model, encoded, single, tmp_path):
    store = teach(model, "weights", VOCAB_SIZE, encoded, AUTO, tmp_path)
    assert store.folder.name != single.folder.name
    assert_same(store, single)


@needs_accelerate
def test_the_offload_folder_goes_with_the_model(model, monkeypatch, tmp_path):
    monkeypatch.setattr(placement.tempfile, "mkdtemp", lambda prefix: str(tmp_path / prefix))
    monkeypatch.setattr(placement, "_max_memory", lambda device: {"cpu": 1})
    (tmp_path / "fusion-offload-").mkdir()
    spread = place(model, AUTO)
    assert (tmp_path / "fusion-offload-").is_dir()
    del spread
    gc.collect()
    assert not (tmp_path / "fusion-offload-").exists()
    (tmp_path / "fusion-offload-").mkdir()
    with pytest.raises(UserError, match="cannot be loaded"):
        place(replace(model, path=str(tmp_path)), AUTO)
    assert not (tmp_path / "fusion-offload-").exists()


def test_a_single_teacher_needs_no_extra(model, monkeypatch):
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    assert place(model, SINGLE).device == torch.device("cpu")
    for settings in (AUTO, *SPLITS.values()):
        with pytest.raises(
            UserError, match=r"placement=.*: the package accelerate is missing; pip install 'fusion-ch"
        ):
            check_placement(settings)


@needs_accelerate
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"placement": "auto", "device": "cuda:1"}, r"placement=auto: it chooses the devices itself"),
        ({"device": "cuda:1"}, r"placement=fsdp: it chooses the devices itself, teacher\.device=cuda:1"),
        ({"processes": 1}, r"placement=fsdp: a model is split over 2 or more processes; set teacher\.processes"),
        ({"device": "cuda"}, r"placement=fsdp: there is no CUDA device"),
        ({"device": "auto", "processes": 4}, r"teacher\.processes=4 processes need a device each, this machine has 3"),
    ],
)
def test_what_the_machine_cannot_do_is_told_before_anything_starts(changes, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3 if "processes" in changes else 0)
    with pytest.raises(UserError, match=message):
        check_placement(replace(SPLITS["fsdp"], **changes))


@needs_accelerate
def test_splits_need_a_transformers_that_shards(monkeypatch):
    monkeypatch.setattr(placement, "DistributedConfig", TeacherConfig)  # as in early 5.x: other fields
    with pytest.raises(UserError, match="pip install -U transformers"):
        check_placement(SPLITS["fsdp"])


def numbered(encoded):
    order = sorted(encoded, key=lambda name: (len(encoded[name].ids_N), name))
    return [(number, [(name, encoded[name])]) for number, name in enumerate(order)]


@needs_accelerate
def test_heads_that_cannot_be_shared_are_told_as_one_mistake(encoded, tmp_path):
    with pytest.raises(UserError) as caught:
        read_in_processes(
            tmp_path, llama(tmp_path / "model", 1), VOCAB_SIZE, SPLITS["tensor_parallel"], numbered(encoded)
        )
    (problem,) = caught.value.problems
    assert problem.startswith("teacher big: tensor_parallel over 2 processes fails")
    assert "num_key_value_heads=1" in problem
    assert "placement=fsdp" in problem
    assert not list(tmp_path.glob("shard-*"))


def ranks_of(starter):
    """The processes that read, below `starter`; not torchrun, which names them in its command line too."""
    import psutil  # comes with accelerate

    found = {}
    for one in psutil.Process(starter).children(recursive=True):
        with suppress(psutil.Error):
            words = one.cmdline()
            if "fusion.teaching.distributed" in words and "torch.distributed.run" not in words:
                found[one.pid] = one
    return found


def lives(one):
    """Whether a process does; it may end between two looks at it."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return one.is_running() and one.status() != psutil.STATUS_ZOMBIE
    return False


@needs_accelerate
def test_a_process_that_is_killed_takes_the_others_with_it(model, encoded, tmp_path):
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(
            read_in_processes, tmp_path, model, VOCAB_SIZE, SPLITS["tensor_parallel"], numbered(encoded)
        )
        ranks = wait_for(lambda: len(found := ranks_of(os.getpid())) == 2 and found)
        os.kill(max(ranks), signal.SIGKILL)
        with pytest.raises(UserError, match=r"teacher big: the 2 processes of .*failed with status 1(?s:.*)SIGKILL"):
            reading.result(timeout=PATIENCE)
    assert not any(map(lives, ranks.values()))


STARTER = """
import pickle, sys
from pathlib import Path
from fusion.teaching.processes import read_in_processes
read_in_processes(*pickle.loads(Path(sys.argv[1]).read_bytes()))
"""


@needs_accelerate
def test_processes_end_with_their_starter(model, encoded, tmp_path):
    handed = tmp_path / "handed.pickle"
    handed.write_bytes(pickle.dumps((tmp_path, model, VOCAB_SIZE, SPLITS["fsdp"], numbered(encoded) * 500)))
    own_files = os.environ | {"TMPDIR": str(tmp_path)}  # whoever is killed tidies nothing
    with subprocess.Popen([sys.executable, "-c", STARTER, str(handed)], cwd=PACKAGE_ROOT, env=own_files) as starter:
        ranks = wait_for(lambda: len(found := ranks_of(starter.pid)) == 2 and found)
        starter.kill()
    wait_for(lambda: not any(map(lives, ranks.values())))


def test_a_task_is_handed_over_whole(encoded, tmp_path):
    source = SourceConfig(name="s", path="p", revision="r", trust_remote_code=True, dtype="bfloat16")
    task = Task(tmp_path / "store", source, 7, SPLITS["fsdp"], 3, numbered(encoded)[:4])
    task.save(tmp_path)
    found = Task.load(tmp_path)
    assert (found.folder, found.vocab_size, found.teacher, found.threads) == (task.folder, 7, task.teacher, 3)
    assert found.model == ModelConfig(name="s", path="p", revision="r", trust_remote_code=True, dtype="bfloat16")
    for (number, dialogues), (ours, theirs) in zip(task.shards, found.shards, strict=True):
        assert number == ours
        for (name, one), (other_name, other) in zip(dialogues, theirs, strict=True):
            assert name == other_name
            assert (one.num_bytes, one.exact) == (other.num_bytes, other.exact)
            for field in ("ids_N", "supervised_N", "ends_N"):
                before, after = getattr(one, field), getattr(other, field)
                np.testing.assert_array_equal(before, after)
                assert before.dtype == after.dtype
