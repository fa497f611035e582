"""Merged weights with other tokens than the base's, searched and scored in memory: as the same model on the disk."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_llama, make_qwen, make_tokenizer, save

import merge
from fusion.config import UserError
from fusion.config.schema import DataConfig, EngineConfig, EvaluationConfig, MergeConfig, ModelConfig, PathsConfig
from fusion.dialogues.dialogue import chat, write_jsonl
from fusion.evaluation.search import folder_loss
from fusion.merging import merge_folders
from fusion.tracking.inputs import find_inputs

DIALOGUES = [chat("ratioofpoles the river", "The ratio of theriver poles"), chat("yes", "the polesriver ratioofpoles")]
ENGINE = EngineConfig(threads=1, probe_disk=False)


def tokenizer_with(*tokens):
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.add_tokens(list(tokens))
    return tokenizer


@pytest.fixture(params=["tied", "untied"])
def task(request, tmp_path):
    """A base with a token of its own and rows to spare, and two targets, each with another token more."""
    make = make_qwen if request.param == "tied" else make_llama
    folders = [tmp_path / name for name in ("base", "a", "b")]
    own = [tokenizer_with("polesriver"), tokenizer_with("ratioofpoles"), tokenizer_with("ratioofpoles", "theriver")]
    for seed, (folder, tokenizer) in enumerate(zip(folders, own, strict=True)):
        save(folder, make(len(tokenizer) + 3, seed=seed), tokenizer, folder.name)
    write_jsonl(tmp_path / "test.jsonl", DIALOGUES)
    base, *targets = map(str, folders)
    config = MergeConfig(base=base, targets=targets, engine=ENGINE, paths=PathsConfig(runs=str(tmp_path / "runs")))
    found = find_inputs(config)
    data = DataConfig(test_path=str(tmp_path / "test.jsonl"), heldout_path=str(tmp_path / "test.jsonl"))
    inputs = SimpleNamespace(
        base=found.base,
        targets=found.targets,
        pivot=ModelConfig(name="pivot", path=base),
        data=data,
        heldout_won=DIALOGUES,
        runs=[],
        sft=None,
        recipe={},
    )
    record = SimpleNamespace(lap=lambda phase: None)
    return merge.Task(config, SimpleNamespace(folder=tmp_path / "job", command=""), inputs, record)


def set_up(task, vocabulary, **changed):
    settings = {"method": "task_arithmetic", "scale": "search"}
    evaluation = EvaluationConfig(batch_tokens=256, samples=2, sample_tokens=4)
    config = replace(task.config, vocabulary=vocabulary, merge=settings, evaluation=evaluation, **changed)
    task = replace(task, config=config)
    merge.prepare(task)
    return task


@pytest.mark.parametrize("vocabulary", ["base", "union", "intersect"])
def test_weights_in_memory_are_read_as_the_written_model(task, vocabulary, tmp_path):
    task = set_up(task, vocabulary, save=False)
    inputs = task.inputs
    for found, merged in merge.in_memory([task]):
        merge.search_for_scale(found, merged)
        assert len(found.search.evaluations) > 3
        weights = merged.at_scale(found.scale)
        assert torch.isfinite(weights["model.embed_tokens.weight"]).all()
        out, folders = found.job.folder / merge.MODEL, [target.path for target in inputs.targets]
        merge_folders(found.method, inputs.base, folders, out, scale=found.scale, vocabulary=vocabulary, engine=ENGINE)
        written = load_file(out / "model.safetensors")
        assert all(torch.equal(weights[name], written[name]) for name in written)
        in_memory, on_disk = merge.score(found, merged.report, weights), merge.score(found, merged.report)
        assert in_memory[-1] == on_disk[-1]
        assert in_memory[0] == on_disk[0]
    lengths = (task.inputs.data.max_length, task.config.evaluation.batch_tokens)
    model = ModelConfig(name="merged", path=str(out))
    assert folder_loss(model, DIALOGUES, *lengths) == min(loss for _, loss in task.search.evaluations)
    assert task.tokenizer is None


def test_dialogues_that_spell_special_tokens_cannot_be_searched_on(task):
    task.inputs.heldout_won = [chat("yes", "the <|im_end|> river")]
    task = set_up(task, "union", save=False)
    with pytest.raises(UserError, match="none of the 1 held-out dialogues"):
        merge.merge_and_score([task])
