"""The user's dialogues: every bad row is named at once, good ones come back as they are, splits are stable."""

import json
import random
import unicodedata

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.config import UserError
from fusion.config.schema import DataConfig
from fusion.dialogues.dialogue import Dialogue, Message, chat, read_jsonl, write_jsonl
from fusion.dialogues.load import SHOWN_PROBLEMS, load_dialogues, load_splits

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}


def row(*messages, **more):
    return {"messages": [{"role": role, "content": content} for role, content in messages], **more}


@pytest.fixture
def load(tmp_path):
    """Load a file with the given rows (objects, or lines as text or bytes)."""

    def write_and_load(*rows, limit=None):
        lines = [one if isinstance(one, str | bytes) else json.dumps(one) for one in rows]
        content = b"\n".join(line.encode() if isinstance(line, str) else line for line in lines)
        (tmp_path / "d.jsonl").write_bytes(content)
        return load_dialogues(str(tmp_path / "d.jsonl"), limit=limit)

    return write_and_load


def problems_of(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return caught.value.problems


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


def test_good_rows_come_back_as_they_are(load):
    system = row(("system", "Be kind."), ("user", ""), ("assistant", " 北京 👍🏽\n"), category="greeting")
    first, second = load(GOOD, system)
    assert first == chat("hi", "yo")
    assert [message.content for message in second.messages] == ["Be kind.", "", " 北京 👍🏽\n"]
    assert second.category == "greeting"


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ("{oops", "not JSON"),
        ("[1, 2]", "must be an object"),
        ('"text"', "must be an object"),
        (b'{"messages": "caf\xe9"}', "not UTF-8"),
        ({"text": "hello"}, "no `messages`"),
        ({"messages": "hello"}, "no `messages`"),
        ({"messages": []}, "no `messages`"),
        ({"messages": {"role": "user"}}, "no `messages`"),
        ({"messages": ["hello"]}, "unknown role None"),
        (row(("human", "hi"), ("assistant", "yo")), "unknown role 'human'"),
        (row((["user"], "hi"), ("assistant", "yo")), "unknown role ['user']"),
        (row(("user", "hi")), "no assistant turn"),
        (row(("user", "hi"), ("assistant", "")), "message 2 is an empty assistant turn"),
        (row(("user", "hi"), ("assistant", " \n\t")), "message 2 is an empty assistant turn"),
        (row(("user", None), ("assistant", "yo")), "message 1 has no text"),
        (row(("user", 5), ("assistant", "yo")), "message 1 has no text"),
        (row(("user", "hi"), ("assistant", ["yo"])), "message 2 has no text"),
        (row(("user", "hi"), ("assistant", "\ud83d")), "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_with_its_line(load, bad, said):
    (problem, *more) = problems_of(load, GOOD, "", GOOD, bad, GOOD)
    assert "d.jsonl, row 4: " in problem
    assert said in problem
    assert not more or all("row 4: " in other for other in more)


def test_all_problems_are_told_at_once(load):
    found = problems_of(load, "{", GOOD, row(("bot", 1)), {"x": 1}, row(("user", "q")))
    assert [problem.split(": ")[0].split("row ")[1] for problem in found] == ["1", "3", "3", "4", "5"]


def test_a_flood_of_problems_is_cut_short(load):
    found = problems_of(load, *["{"] * (SHOWN_PROBLEMS + 5))
    assert len(found) == SHOWN_PROBLEMS + 1
    assert "5 more" in found[-1]


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_refused(load, content):
    (problem,) = problems_of(load, content)
    assert "d.jsonl" in problem
    assert "no dialogues" in problem


def test_files_from_windows_are_read(load):
    assert load("\ufeff" + json.dumps(GOOD) + "\r", json.dumps(GOOD) + "\r") == [chat("hi", "yo")] * 2


def test_texts_that_look_like_other_types_stay_texts(load):
    (dialogue,) = load(row(("user", "2020-01-01"), ("assistant", "2020-01-02 03:04:05"), category="2021-02-03"))
    assert [message.content for message in dialogue.messages] == ["2020-01-01", "2020-01-02 03:04:05"]
    assert dialogue.category == "2021-02-03"


def test_keys_that_other_rows_lack_do_no_harm(load):
    extra = {
        "messages": [{"role": "user", "content": "q", "name": "Bo"}, {"role": "assistant", "content": "a"}],
        "id": 7,
        "category": None,
    }
    assert load(GOOD, extra, row(("user", "q"), ("assistant", "a"), id="x")) == [
        chat("hi", "yo"),
        *[chat("q", "a")] * 2,
    ]


def test_the_limit_takes_the_first_rows_and_reads_no_more(load):
    assert len(load(*[GOOD] * 5, limit=3)) == 3
    assert len(load(*[GOOD] * 2, limit=9)) == 2
    assert len(load(GOOD, "{broken, but behind the limit", limit=1)) == 1


def test_contents_are_composed_characters(load):
    (dialogue,) = load(row(("user", "e\u0301"), ("assistant", "A\u030a \u1100\u1161")))
    assert [message.content for message in dialogue.messages] == ["é", "Å 가"]
    assert all(unicodedata.is_normalized("NFC", message.content) for message in dialogue.messages)


@pytest.mark.parametrize("name", ["nothing.jsonl", "nothing.parquet", "folder.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    (tmp_path / "folder.jsonl").mkdir()
    (problem,) = problems_of(load_dialogues, str(tmp_path / name))
    assert name in problem
    assert "no such file" in problem


def test_parquet_is_read_as_jsonl_is(tmp_path, datasets_cache):
    rows = [GOOD, row(("system", "s"), ("user", "e\u0301"), ("assistant", "a"))]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "d.parquet")
    dialogues = load_dialogues(str(tmp_path / "d.parquet"))
    assert [message.content for message in dialogues[1].messages] == ["s", "é", "a"]
    assert len(load_dialogues(str(tmp_path / "d.parquet"), limit=1)) == 1


def test_bad_rows_of_parquet_and_files_that_are_none(tmp_path, datasets_cache):
    datasets.Dataset.from_list([GOOD, row(("bot", "hi"))]).to_parquet(tmp_path / "bad.parquet")
    (problem,) = problems_of(load_dialogues, str(tmp_path / "bad.parquet"))
    assert "row 2: message 1 has the unknown role 'bot'" in problem
    (tmp_path / "none.parquet").write_bytes(b"no parquet at all")
    (problem,) = problems_of(load_dialogues, str(tmp_path / "none.parquet"))
    assert "cannot be read" in problem


def test_a_saved_dataset_folder_is_read(tmp_path, datasets_cache):
    datasets.Dataset.from_list([GOOD] * 3).save_to_disk(tmp_path / "saved")
    assert load_dialogues(str(tmp_path / "saved")) == [chat("hi", "yo")] * 3


def many(number):
    return [chat(f"question {place}", f"answer {place}") for place in range(number)]


def split(path, dialogues, **settings):
    write_jsonl(path, dialogues)
    return load_splits(DataConfig(path=str(path), **settings))


def test_the_held_out_share_is_disjoint_and_stable(tmp_path):
    dialogues = many(400)
    train, heldout = split(tmp_path / "a.jsonl", dialogues, heldout_fraction=0.2)
    assert set(train).isdisjoint(heldout)
    assert set(train) | set(heldout) == set(dialogues)
    assert 50 < len(heldout) < 110
    shuffled = random.Random(0).sample(dialogues, len(dialogues))
    assert set(split(tmp_path / "b.jsonl", shuffled, heldout_fraction=0.2)[1]) == set(heldout)
    fewer = split(tmp_path / "c.jsonl", dialogues[:200], heldout_fraction=0.2)[1]
    assert set(fewer) == set(heldout) & set(dialogues[:200])
    more = split(tmp_path / "d.jsonl", dialogues, heldout_fraction=0.3)[1]
    assert set(heldout) < set(more)


def test_the_ends_of_the_held_out_share(tmp_path):
    assert split(tmp_path / "a.jsonl", many(20), heldout_fraction=0.0)[1] == []
    assert split(tmp_path / "b.jsonl", many(20), heldout_fraction=1.0)[0] == []


def test_a_held_out_file_replaces_the_share(tmp_path):
    write_jsonl(tmp_path / "heldout.jsonl", [chat("q", "held out")])
    train, heldout = split(tmp_path / "a.jsonl", many(30), heldout_path=str(tmp_path / "heldout.jsonl"))
    assert train == many(30)
    assert heldout == [chat("q", "held out")]


def test_the_content_hash_names_the_messages_alone():
    one = Dialogue((Message("user", "a"), Message("assistant", "b")))
    assert one.content_hash == Dialogue(one.messages, "category").content_hash
    assert len(bytes.fromhex(one.content_hash)) == 16
    others = [chat("b", "a"), chat("a", "b", ""), chat("ab", ""), Dialogue((Message("system", "a"), one.messages[1]))]
    assert len({dialogue.content_hash for dialogue in [one, *others]}) == 5


texts = st.text(st.characters(codec="utf-8")) | st.sampled_from(
    ["\u2028", "a\u2029b", "\x85", "\r\n", "\x1c", '"', "\\"]
)


@given(st.lists(st.lists(texts, min_size=1, max_size=3), min_size=1, max_size=4))
def test_written_dialogues_are_read_again(tmp_path_factory, dialogues):
    path = tmp_path_factory.mktemp("jsonl") / "d.jsonl"
    written = [chat(*turns, category=turns[0][:3]) for turns in dialogues]
    write_jsonl(path, written)
    assert read_jsonl(path) == written
