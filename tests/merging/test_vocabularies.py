"""Targets with other tokens than the base's: whose rows meet, what the others get, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama, make_qwen, make_tokenizer, save

import merge
from fusion.config import UserError
from fusion.config.rules import settings_problems
from fusion.config.schema import MergeConfig, PathsConfig
from fusion.dialogues.token_bytes import token_bytes
from fusion.merging import merge_folders
from fusion.merging.checkpoints.checkpoint import open_checkpoint
from fusion.merging.inputs import Inputs
from fusion.merging.vocabularies.vocabulary import match
from fusion.tracking.inputs import find_inputs

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def saved(folder, tokenizer, *, seed=0, make=make_llama, padding=0):
    save(folder, make(len(tokenizer) + padding, seed=seed), tokenizer, folder.name)
    return folder


def extended(*, tokens=("<|tool|>", "<|pad|>"), words=("ratioofpoles",)):
    """The base's tokeniser with more tokens."""
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.add_tokens(list(words))
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    return tokenizer


@pytest.fixture
def base(tmp_path):
    return saved(tmp_path / "base", make_tokenizer("byte_level", "chatml"), padding=5)


def expected_rows(base, target, names, num_rows):
    """By the tokens' strings, which mean the same in tokenisers of one kind."""
    other = target.get_vocab()
    rows = [-1] * num_rows
    for token, place in base.get_vocab().items():
        rows[place] = other.get(token, -1)
    assert names is None or all(other[name] not in rows for name in names)
    return rows


def adopted(base_tensor, target_tensor, rows):
    return torch.stack([target_tensor[row] if row >= 0 else base_tensor[i] for i, row in enumerate(rows)])


def test_added_tokens_go_and_the_bases_padding_stays(tmp_path, base):
    target = saved(tmp_path / "target", extended(), seed=1)
    opened, plain, whole = open_checkpoint(base), open_checkpoint(target), None
    matched = Inputs.open(base, [target], "base").targets[0]
    rows = expected_rows(make_tokenizer("byte_level", "chatml"), extended(), ["<|tool|>"], len(opened[EMBEDDING]))
    assert rows[-5:] == [-1] * 5
    for name in (EMBEDDING, HEAD):
        whole = adopted(opened[name], plain[name], rows)
        assert torch.equal(matched[name], whole)
        assert torch.equal(matched[name][-5:], opened[name][-5:])
    assert all(torch.equal(matched[name], plain[name]) for name in plain if name not in (EMBEDDING, HEAD))
    assert matched.specs == opened.specs


def test_other_orders_of_tokens_meet(tmp_path, base):
    """Another template's special tokens move all ids, whatever the sizes."""
    other = make_tokenizer("byte_level", "openchat")
    target = saved(tmp_path / "target", other, seed=1)
    opened, plain = open_checkpoint(base), open_checkpoint(target)
    matched = Inputs.open(base, [target], "base").targets[0]
    rows = expected_rows(make_tokenizer("byte_level", "chatml"), other, None, len(opened[EMBEDDING]))
    moved = [row for place, row in enumerate(rows) if row not in (place, -1)]
    assert len(moved) > 100
    assert rows.count(-1) > 3
    for name in (EMBEDDING, HEAD):
        assert torch.equal(matched[name], adopted(opened[name], plain[name], rows))
    flat = matched[EMBEDDING].reshape(-1)
    for start, stop in [(0, 1), (7, 300), (16, 32), (1601, 2900)]:
        span = torch.empty(stop - start)
        matched.homes[EMBEDDING].read_span(EMBEDDING, start, span)
        assert torch.equal(span, flat[start:stop])


def test_different_kinds_meet_by_the_bytes(tmp_path):
    """`Ġthe` and `▁the` are the same token; single bytes meet byte pieces."""
    letters, pieces = make_tokenizer("byte_level", "chatml"), make_tokenizer("metaspace", "openchat")
    tables = token_bytes(letters), token_bytes(pieces)
    rows = match("base", tables, [len(letters), len(pieces)]).rows_IV[1]
    special = set(tables[0].special.tolist())
    found = np.flatnonzero(rows >= 0)
    assert len(found) > 200
    for place in found:
        assert tables[0].literal(place) == tables[1].literal(int(rows[place]))
        assert (place in special) == (int(rows[place]) in set(tables[1].special.tolist()))
    spaced = [token for token in letters.get_vocab() if token.startswith("Ġ") and token[1:].isalpha()]
    common = [token for token in spaced if f"▁{token[1:]}" in pieces.get_vocab()]
    assert common
    for token in common:
        assert rows[letters.get_vocab()[token]] == pieces.get_vocab()[f"▁{token[1:]}"]
    every_byte = [place for place in range(len(tables[0])) if len(tables[0].literal(place)) == 1]
    assert len(every_byte) >= 256
    assert all(rows[place] >= 0 for place in every_byte)


def test_a_merge_counts_by_the_bases_tokens(tmp_path, base):
    targets = [
        saved(tmp_path / "a", extended(), seed=1),
        saved(tmp_path / "b", make_tokenizer("byte_level", "chatml"), seed=2, padding=5),
    ]
    merge_folders("task_arithmetic", base, targets, tmp_path / "out", vocabulary="base", weight=0.5)
    opened = open_checkpoint(base)
    states = Inputs.open(base, targets, "base").targets
    assert torch.equal(states[1][EMBEDDING], open_checkpoint(targets[1])[EMBEDDING])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name in (EMBEDDING, HEAD, "model.norm.weight"):
        expected = opened[name] + sum(0.5 * (state[name] - opened[name]) for state in states)
        torch.testing.assert_close(merged[name], expected, rtol=1e-5, atol=1e-6)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["vocabulary"] == "base"
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_tied_heads_follow_their_embedding(tmp_path):
    base = saved(tmp_path / "base", make_tokenizer("byte_level", "chatml"), make=make_qwen)
    target = saved(tmp_path / "target", extended(), make=make_qwen, seed=1)
    merge_folders("linear", base, [target], tmp_path / "out", vocabulary="base")
    merged, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", target))
    assert HEAD not in merged
    rows = expected_rows(make_tokenizer("byte_level", "chatml"), extended(), None, len(merged[EMBEDDING]))
    assert min(rows) >= 0
    torch.testing.assert_close(merged[EMBEDDING], source[EMBEDDING][rows], rtol=1e-6, atol=1e-6)


def test_another_vocabulary_is_refused_unless_asked_for(tmp_path, base):
    target = saved(tmp_path / "target", extended(), seed=1)
    with pytest.raises(UserError, match="vocabulary=base") as caught:
        merge_folders("linear", base, [target], tmp_path / "out")
    assert sum("vocabulary=base" in problem for problem in caught.value.problems) == 2
    with pytest.raises(UserError, match="choose one of error, base, union, intersect"):
        merge_folders("linear", base, [target], tmp_path / "out", vocabulary="onion")
    with pytest.raises(UserError, match="needs a base"):
        merge_folders("linear", None, [target, target], tmp_path / "out", vocabulary="base")
    (target / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"target 0: .*tokeniser"):
        merge_folders("linear", base, [target], tmp_path / "out", vocabulary="base")


def test_the_setting_has_its_choices():
    assert settings_problems(MergeConfig(vocabulary="base")) == []
    (problem,) = settings_problems(MergeConfig(vocabulary="onion"))
    assert problem.startswith("vocabulary=onion: choose one of error, base, union, intersect")


def task_of(tmp_path, base, targets, **changed):
    settings = {"targets": [str(target) for target in targets], "vocabulary": "base", "merge": {"method": "linear"}}
    config = MergeConfig(
        **{**settings, **changed}, base=base and str(base), paths=PathsConfig(runs=str(tmp_path / "runs"))
    )
    record = SimpleNamespace(lap=lambda phase: None)
    return merge.Task(config, SimpleNamespace(folder=tmp_path / "job"), find_inputs(config), record)


def test_merges_in_memory_and_into_folders_are_one(tmp_path, base):
    targets = [saved(tmp_path / f"t{seed}", extended(), seed=seed) for seed in (1, 2)]
    tasks = [task_of(tmp_path, base, targets, merge={"method": name}) for name in ("linear", "task_arithmetic")]
    for task in tasks:
        merge.prepare(task)
    for task, merged in merge.in_memory(tasks):
        out = tmp_path / task.method
        merge_folders(task.method, base, targets, out, vocabulary="base")
        weights, written = merged.at_scale(1.0), load_file(out / "model.safetensors")
        assert weights.keys() == written.keys()
        assert all(torch.equal(weights[name], written[name]) for name in written)


def test_jobs_merged_together_have_one_vocabulary(tmp_path, base):
    target = saved(tmp_path / "target", make_tokenizer("byte_level", "chatml"), seed=1, padding=5)
    task = task_of(tmp_path, base, [target])
    other = replace(task, config=replace(task.config, vocabulary="error"))
    assert merge._shared(task) == merge._shared(replace(task, config=replace(task.config, seed=1)))
    assert merge._shared(task) != merge._shared(other)


def test_stage_two_refuses_what_the_vocabulary_does_not_allow(tmp_path, base):
    target = saved(tmp_path / "target", extended(), seed=1)
    with pytest.raises(UserError, match="needs a base"):
        merge.prepare(task_of(tmp_path, None, [target]))
    with pytest.raises(UserError, match="a method without evidence"):
        merge.prepare(task_of(tmp_path, base, [target], merge={"method": "fisher"}))
