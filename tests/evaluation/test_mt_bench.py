"""MT-Bench: verdicts, prompts, temperatures; the whole benchmark on a tiny model where its questions are there."""

import json
from hashlib import sha256
from pathlib import Path

import pytest
from chat_server import KEY, KEY_VARIABLE, chat_server, files_with

from fusion.config import UserError
from fusion.config.evaluation import EndpointConfig, GenerationConfig, MTBenchConfig
from fusion.dialogues.dialogue import Message
from fusion.evaluation.answers import LocalGenerator
from fusion.evaluation.benchmark_files import mt_bench_questions
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.endpoint import Endpoint, Reply
from fusion.evaluation.judge_prompts import mt_bench_prompts
from fusion.evaluation.mt_bench import TEMPERATURES, MTBench, mark
from fusion.evaluation.sampling import Draw, continuations, stop_ids_of

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["say river", "now wire"]},
    {"question_id": 111, "category": "math", "turns": ["1 and 3?", "no, 3 and 1"], "extra": 1},
    {"question_id": 131, "category": "extraction", "turns": ["which pole?", "which space?"]},
]
REFERENCES = [{"question_id": 111, "choices": [{"index": 0, "turns": ["it is four", "four again"]}]}]


@pytest.fixture
def candidate(tiny_pivot):
    return Candidate.of_folder(tiny_pivot)


@pytest.fixture
def files(tmp_path):
    paths = {"questions": tmp_path / "question.jsonl", "references": tmp_path / "reference.jsonl"}
    for path, rows in zip(paths.values(), (QUESTIONS, REFERENCES), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MTBenchConfig(**{name: str(path) for name, path in paths.items()})


def bench(settings, server, cache, seeds=(0,), model="judge", key_variable=""):
    endpoint = EndpointConfig(base_url=server.base_url, model=model, first_wait_s=0.01, key_variable=key_variable)
    generator = LocalGenerator(GenerationConfig(batch_size=8, max_new_tokens=8), cache)
    prompts = mt_bench_prompts(settings.prompts)
    return MTBench(mt_bench_questions(settings), prompts, generator, Endpoint(endpoint, cache), seeds)


def hashed_mark(payload):
    text = json.dumps(payload["messages"])
    return 1 + int(sha256(text.encode()).hexdigest(), 16) % 10


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Good. Mark: [[7]]", 7),
        ("[[8.5]]", 8.5),
        ("Mark: [6]", 6),
        ("[1] is cited, but [[9]]", 9),
        ("[[0]]", None),
        ("[[11]]", None),
        ("seven", None),
        ("", None),
    ],
)
def test_marks(text, expected):
    assert mark(Reply(text, None, "judge")) == expected


def test_what_the_judge_is_shown(candidate, files, tmp_path):
    with chat_server(lambda payload: f"[[{hashed_mark(payload)}]]") as server:
        sheet = bench(files, server, tmp_path).score(candidate)
        texts = ["\n".join(one["content"] for one in payload["messages"]) for payload in server.payloads]
        assert {payload["temperature"] for payload in server.payloads} == {0.0}
    assert len(texts) == 6
    references = [text for text in texts if "reference answer ---" in text]
    assert len(references) == 2
    assert all("it is four" in text for text in references)
    assert sum("four again" in text for text in references) == 1
    first = next(text for text in texts if "--- question ---\nsay river" in text)
    second = next(text for text in texts if "--- second question ---\nnow wire" in text)
    answers = {line["question_id"]: line["choices"][0]["turns"] for line in sheet.records["answers"]}
    assert answers[81][0] in first
    assert all(answer in second for answer in answers[81])
    assert [tuple(line["judge"]) for line in sheet.records["judgments"]][2:4] == [
        ("judge", "single-math-v1"),
        ("judge", "single-math-v1-multi-turn"),
    ]


def test_scores_are_the_means_of_the_marks(candidate, files, tmp_path):
    with chat_server(lambda payload: f"[[{hashed_mark(payload)}]]") as server:
        sheet = bench(files, server, tmp_path, seeds=(0, 1)).score(candidate)
    marks = [line["score"] for line in sheet.records["judgments"]]
    assert len(marks) == 12
    assert sheet.result().mean == pytest.approx(sum(marks) / 12)
    turns = sheet.facts["turns"]
    assert (turns["turn_1"] + turns["turn_2"]) / 2 == pytest.approx(sum(marks) / 12)
    assert sheet.result().num_seeds == 2


def test_unreadable_verdicts_are_counted_and_left_out(candidate, files, tmp_path):
    def judge(payload):
        return "I would rather not." if "now wire" in payload["messages"][-1]["content"] else "[[4]]"

    with chat_server(judge) as server:
        sheet = bench(files, server, tmp_path).score(candidate)
    assert [(one.score, one.weight) for one in sheet.items] == [(4.0, 1.0), (4.0, 2.0), (4.0, 2.0)]
    assert (sheet.facts["verdicts"], sheet.facts["unreadable"]) == (6, 1)
    assert any("1 of 6 verdicts cannot be read" in note for note in sheet.notes)


def test_comparability_is_said(candidate, files, tmp_path):
    prompts = tmp_path / "judge_prompts.jsonl"
    names = ("single-v1", "single-math-v1", "single-v1-multi-turn", "single-math-v1-multi-turn")
    rows = [{"name": name, "system_prompt": "judge", "prompt_template": "{answer_1}"} for name in names]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with chat_server(lambda payload: "[[5]]") as server:
        (note,) = bench(files, server, tmp_path).score(candidate).notes
        assert note.startswith(
            "Not comparable with published numbers: the judge is judge; the prompts are the built-in"
        )
        assert "3 of 80 questions" in note
        settings = MTBenchConfig(files.questions, files.references, str(prompts))
        (note,) = bench(settings, server, tmp_path, model="gpt-4-0613").score(candidate).notes
        assert note == "Not comparable with published numbers: 3 of 80 questions."
    prompts.write_text(json.dumps(rows[0]) + "\n")
    with pytest.raises(UserError, match=r"the prompt single-math-v1 is missing"):
        mt_bench_prompts(str(prompts))


def test_bad_questions_are_all_named(tmp_path):
    file = tmp_path / "question.jsonl"
    bad = [QUESTIONS[0], {"question_id": 82, "turns": ["one"]}, ["no object"]]
    file.write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(UserError) as error:
        mt_bench_questions(MTBenchConfig(str(file)))
    assert [problem.split(":")[0] for problem in error.value.problems] == [f"{file}, row 2", f"{file}, row 3"]


def talking(candidate):
    """A judge with the tiny model behind it: it says something, then marks."""
    module, reader = candidate.module(), candidate.reader

    def judge(payload):
        prompt = reader.encoder.encode_prompt([Message("user", payload["messages"][-1]["content"][-60:])])
        stop = stop_ids_of(module, reader.end_of_turn_id)
        (ids,) = continuations(module, reader.vocab_size, [prompt], [Draw(0.0, 0)], stop, 4)
        value = hashed_mark(payload)
        said = reader.tokenizer.decode(ids).replace("[", "(")
        return said if value == 10 else f"{said} Mark: [[{value}]]"

    return judge


@pytest.mark.skipif(not (SHARED / "mt_bench_questions.jsonl").is_file(), reason="MT-Bench's questions are not here")
def test_the_whole_benchmark_on_a_tiny_model(candidate, tiny_pivot, tmp_path, monkeypatch):
    """80 questions, two turns, real references, a judge that fails in several ways: nothing is lost."""
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    settings = MTBenchConfig(
        str(SHARED / "mt_bench_questions.jsonl"), str(SHARED / "mt_bench_reference_answers.jsonl")
    )
    questions = mt_bench_questions(settings)
    assert len(questions) == 80
    assert {one.category for one in questions} == set(TEMPERATURES)
    faults = ["empty", 429, 500, "malformed", "cut"]
    with chat_server(talking(candidate), faults=faults, key=KEY) as server:
        sheet = bench(settings, server, tmp_path, key_variable=KEY_VARIABLE).score(candidate)
        asked = len(server.payloads)
        assert asked == 160 + len(faults)
        again = bench(settings, server, tmp_path, key_variable=KEY_VARIABLE)
        assert again.score(Candidate.of_folder(tiny_pivot)).items == sheet.items
        assert len(server.payloads) == asked
        assert again.judge.ledger.from_cache == 160
    assert len(sheet.items) == 80
    assert 0 < sheet.facts["unreadable"] < 60
    marks = [line["score"] for line in sheet.records["judgments"] if line["score"] is not None]
    assert len(marks) == 160 - sheet.facts["unreadable"]
    assert sheet.result().mean == pytest.approx(sum(marks) / len(marks))
    with_reference = sum("math" in line["judge"][1] for line in sheet.records["judgments"])
    assert with_reference == 60  # 30 questions have right answers
    assert files_with(KEY, tmp_path) == []
