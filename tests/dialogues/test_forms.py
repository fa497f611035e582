"""ShareGPT's and Alpaca's rows are read as what they are; rows of the wild are mended, or left out and counted."""

import json

import pytest

from fusion.config import UserError
from fusion.config.schema import DataConfig
from fusion.dialogues.dialogue import Dialogue, Message, chat
from fusion.dialogues.forms import as_messages, mended
from fusion.dialogues.load import load_dialogues, load_splits

SHAREGPT = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "id": "1"}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
MESSAGES = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def write(path, rows, array=False):
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turns(*said):
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def test_all_forms_of_one_file(tmp_path):
    path = write(tmp_path / "d.jsonl", [SHAREGPT, ALPACA, MESSAGES])
    assert load_dialogues(path) == [chat("hi", "yo"), chat("Add.\n\n1 2", "3"), chat("a", "b")]


def test_a_json_file_of_one_array(tmp_path):
    path = write(tmp_path / "d.json", [SHAREGPT, SHAREGPT | {"system": "Be kind."}], array=True)
    first, second = load_dialogues(path, form="sharegpt")
    assert first == chat("hi", "yo")
    assert second.messages[0] == Message("system", "Be kind.")
    (tmp_path / "d.json").write_text("[{oops")
    with pytest.raises(UserError, match=r"d\.json: not JSON"):
        load_dialogues(path)


def test_parquet(tmp_path):
    import datasets

    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list([SHAREGPT]).to_parquet(str(path))
    assert load_dialogues(str(path)) == [chat("hi", "yo")]


@pytest.mark.parametrize(
    ("row", "form", "said"),
    [
        (MESSAGES, "sharegpt", "ShareGPT's form"),
        (SHAREGPT, "alpaca", "Alpaca's form"),
        ({"conversations": "hi"}, "auto", "ShareGPT's form"),
        ({"text": "hi"}, "auto", "no `messages`"),
        ({"conversations": [{"from": "robot", "value": "hi"}]}, "auto", "unknown role 'robot'"),
        (ALPACA | {"output": None}, "auto", "message 2 has no text"),
    ],
)
def test_what_has_not_that_form_is_told_with_its_row(tmp_path, row, form, said):
    path = write(tmp_path / "d.jsonl", [MESSAGES if form == "auto" else row, row])
    with pytest.raises(UserError) as caught:
        load_dialogues(path, form=form)
    assert said in caught.value.problems[-1]
    assert "row 2" in caught.value.problems[-1]


def test_an_alpaca_row_without_input():
    assert as_messages(ALPACA | {"input": ""})["messages"][0]["content"] == "Add."


@pytest.mark.parametrize(
    ("row", "kept"),
    [
        (turns(("assistant", "hello"), ("user", "a"), ("assistant", "b")), [("user", "a"), ("assistant", "b")]),
        (turns(("system", "s"), ("assistant", "x"), ("user", "a"), ("assistant", "b")), "sab"),
        (turns(("system", " "), ("user", "a"), ("assistant", "b"), ("user", "c")), "ab"),
        (turns(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "")), "ab"),
        (turns(("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")), "ab"),
        (turns(("user", "a"), ("assistant", "b"), ("assistant", "c")), "ab"),
        (turns(("user", "a"), ("user", "b"), ("assistant", "c")), ""),
        (turns(("user", "a")), ""),
        (turns(), ""),
    ],
)
def test_mending(row, kept):
    messages = mended(row)["messages"]
    assert "".join(message["content"] for message in messages) == "".join(text[-1] for text in kept)


def test_what_cannot_be_mended_is_left_out(tmp_path, caplog):
    path = write(tmp_path / "d.jsonl", [MESSAGES, turns(("user", "a")), {"text": "x"}, SHAREGPT])
    assert load_dialogues(path, clean=True) == [chat("a", "b"), chat("hi", "yo")]
    assert "2 rows are left out" in caplog.text
    data = DataConfig(path=path, clean=True, heldout_fraction=0.0)
    assert load_splits(data) == ([chat("a", "b"), chat("hi", "yo")], [])
    only_bad = write(tmp_path / "bad.jsonl", [{"text": "x"}])
    with pytest.raises(UserError, match="left out all 1 rows"):
        load_dialogues(only_bad, clean=True)


def test_dialogues_are_not_changed_without_being_asked(tmp_path):
    row = turns(("user", "a"), ("assistant", "b"), ("user", "c"))
    (dialogue,) = load_dialogues(write(tmp_path / "d.jsonl", [row]))
    assert [message.content for message in dialogue.messages] == ["a", "b", "c"]
    assert isinstance(dialogue, Dialogue)
