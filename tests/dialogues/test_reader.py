"""Models as readers: loaded tokenisers, all problems at once, names for weights, and dialogues read alike by all."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import make_tokenizer

from fusion.config import UserError
from fusion.config.schema import ModelConfig
from fusion.dialogues.dialogue import Dialogue, Message, chat
from fusion.dialogues.reader import encode_all, make_readers, scoring_reader
from fusion.dialogues.tokenizer import load_tokenizer, read_template


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Settings of saved tokenisers: with OpenChat's template, with ChatML, and without any template."""
    models = {}
    for name, kind in (("openchat", "metaspace"), ("chatml", "byte_level"), ("gemma", "metaspace")):
        folder = tmp_path_factory.mktemp(name)
        tokenizer = make_tokenizer(kind, name)
        if name == "gemma":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        models[name] = ModelConfig(name=name, path=str(folder))
    return models


def problems_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return caught.value.problems


def test_readers_find_template_and_end_of_turn(saved):
    pivot, source = make_readers([saved["openchat"], saved["chatml"]], "native")
    assert pivot.encoder.own.end_of_turn == "<|end_of_turn|>"
    assert source.encoder.own.end_of_turn == "<|im_end|>"
    assert source.end_of_turn_id == source.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert pivot.vocab_size == len(pivot.tokenizer)
    assert source.vocab_size == len(source.tokenizer)
    assert source.encoder.template is source.encoder.own


def test_a_shared_template_is_the_pivots(saved):
    pivot, chatml, bare = make_readers([saved["openchat"], saved["chatml"], saved["gemma"]], "shared", 64)
    assert chatml.encoder.template is bare.encoder.template is pivot.encoder.own
    assert bare.encoder.own.end_of_turn == "<eos>"
    assert bare.encoder.max_length == 64


def test_every_unusable_model_is_named_at_once(saved, tmp_path):
    models = [
        saved["gemma"],
        ModelConfig(name="lost", path=str(tmp_path / "lost")),
        replace(saved["chatml"], name="ended", end_of_turn="<nope>"),
        replace(saved["openchat"], name="styled", chat_template="no_such_template"),
        saved["chatml"],
    ]
    found = problems_of(make_readers, models, "shared")
    assert [problem.split(":")[0].split(" ")[0] for problem in found] == ["gemma", "lost", "ended", "styled"]
    assert "chat_template" in found[0]
    assert "no such folder" in found[1]
    assert "<nope>" in found[2]
    assert "chatml, plain" in found[3]
    assert len(problems_of(make_readers, [saved["chatml"], saved["gemma"]], "native")) == 1


@pytest.mark.parametrize("content", ["", "{}", "{broken", '{"model": {"type": "Nonsense"}}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    if content:
        (tmp_path / "tokenizer.json").write_text(content)
    (problem,) = problems_of(load_tokenizer, ModelConfig(name="source", path=str(tmp_path)))
    assert problem.startswith(f"source (path={tmp_path}): ")
    assert "tokeniser" in problem


@pytest.mark.parametrize("path", ["./nothing", "/nothing/at/all", "~/nothing", "a/b/c", "nothing"])
def test_a_missing_folder_is_no_hub_id(path):
    (problem,) = problems_of(load_tokenizer, ModelConfig(name="source", path=path))
    assert "no such folder" in problem


def test_templates_come_from_files_and_by_name(saved, tmp_path):
    (tmp_path / "mine.jinja").write_text("{{ messages[0]['content'] }}</s>\n")
    assert read_template(str(tmp_path / "mine.jinja"), "x") == "{{ messages[0]['content'] }}</s>"
    rendered = {}
    for name in ("plain", "chatml"):
        tokenizer = load_tokenizer(replace(saved["openchat"], chat_template=name))
        rendered[name] = tokenizer.apply_chat_template(
            [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
            tokenize=False,
            add_generation_prompt=True,
        )
    assert (
        rendered["chatml"] == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    )
    assert rendered["plain"].count("<|end_of_turn|>") == 2
    assert rendered["plain"].endswith("Assistant:")


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_builtin_templates_can_be_learned(saved, name):
    model = replace(saved["chatml"], chat_template=name)
    (reader,) = make_readers([model], "native")
    dialogue = Dialogue((Message("system", "s"), *chat("yes", "yes", "assistant", "Assistant: no").messages))
    encoded = reader.encoder.encode(dialogue)
    text = reader.tokenizer.decode(encoded.ids_N[encoded.supervised_N])
    assert text.replace(" ", "") == "yes<|im_end|>Assistant:no<|im_end|>"
    assert encoded.num_bytes == len("yes") + len("Assistant: no") + 2


def test_an_identity_names_content_not_place(saved, tmp_path):
    shutil.copytree(saved["chatml"].path, tmp_path / "copy")
    copy = replace(saved["chatml"], path=str(tmp_path / "copy"))
    here, there = (make_readers([model], "native")[0] for model in (saved["chatml"], copy))
    assert here.identity == there.identity
    assert here.tokenizer_hash == there.tokenizer_hash
    (Path(copy.path) / "model.safetensors").write_bytes(b"weights")
    changed = make_readers([copy], "native")[0]
    assert changed.identity != here.identity
    assert changed.tokenizer_hash == here.tokenizer_hash
    spec = json.loads((Path(copy.path) / "tokenizer.json").read_text("utf-8"))
    spec["model"]["merges"].pop()
    (Path(copy.path) / "tokenizer.json").write_text(json.dumps(spec))
    assert make_readers([copy], "native")[0].tokenizer_hash != here.tokenizer_hash


def test_the_vocabulary_ends_behind_its_last_id(saved, tmp_path):
    shutil.copytree(saved["chatml"].path, tmp_path / "holes")
    spec = json.loads((tmp_path / "holes" / "tokenizer.json").read_text("utf-8"))
    spec["model"]["vocab"]["yes"] = 1000
    (tmp_path / "holes" / "tokenizer.json").write_text(json.dumps(spec))
    (reader,) = make_readers([replace(saved["chatml"], path=str(tmp_path / "holes"))], "native")
    assert reader.vocab_size == 1001 > len(reader.tokenizer)


def test_all_readers_read_the_same_dialogues_once(saved):
    readers = make_readers([saved["openchat"], saved["chatml"]], "native")
    good, other = chat("q", "a"), chat("q", "b", "r", "c")
    dialogues = [
        good,
        other,
        good,
        chat("q", "<|im_end|>"),
        chat("<|end_of_turn|>", "a"),
        Dialogue((Message("user", "q"),)),
    ]
    encoded, dropped = encode_all(readers, dialogues)
    assert [list(mapping) for mapping in encoded] == [[good.content_hash, other.content_hash]] * 2
    assert sum(dropped.values()) == 3
    assert any("<|im_end|>" in reason for reason in dropped)
    assert encoded[0][other.content_hash].num_bytes == encoded[1][other.content_hash].num_bytes == 4


def test_a_model_is_scored_in_its_own_template_or_in_the_pivots(saved):
    own = scoring_reader(saved["chatml"], saved["openchat"])
    assert own.encoder.template.end_of_turn == "<|im_end|>"
    borrowed = scoring_reader(saved["gemma"], saved["openchat"])
    assert borrowed.encoder.template.end_of_turn == "<|end_of_turn|>"
    assert borrowed.encoder.own.end_of_turn == "<eos>"
