"""AlpacaEval 2 against a real server: the weighted win rate by hand, both orders, drawn and unreadable verdicts."""

import json
import math

import pytest
from chat_server import chat_server

from fusion.config import UserError
from fusion.config.evaluation import AlpacaEvalConfig, EndpointConfig
from fusion.evaluation.alpaca_eval import AlpacaEval, preference
from fusion.evaluation.answers import Answer
from fusion.evaluation.benchmark_files import alpaca_eval_instructions
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.endpoint import Endpoint, Reply
from fusion.evaluation.judge_prompts import alpaca_eval_prompt

BASELINE = [
    {"instruction": f"say {word}", "output": f"baseline {word}", "generator": "base", "dataset": "koala"}
    for word in ("river", "wire", "pole", "yes", "no", "lines")
]


class Parrot:
    """Answers every instruction with a text that the judge recognises."""

    def answers(self, candidate, prompts, seed):
        return [Answer(prompt.name, (f"parrot of {prompt.turns[0]} {'x' * int(prompt.name)}",)) for prompt in prompts]


@pytest.fixture
def candidate(tiny_pivot):
    return Candidate.of_folder(tiny_pivot)


def run(tmp_path, candidate, server, model="judge", prompts="", repeats=1, **changes):
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps(BASELINE * repeats))
    instructions = alpaca_eval_instructions(AlpacaEvalConfig(questions=str(file)))
    endpoint = EndpointConfig(base_url=server.base_url, model=model, first_wait_s=0.01)
    judge = Endpoint(endpoint, tmp_path / "cache")
    return AlpacaEval(instructions, alpaca_eval_prompt(prompts), None, Parrot(), judge, **changes).score(candidate)


def shown(payload):
    """(word, whether the model's answer is shown second)."""
    text = payload["messages"][-1]["content"]
    word = text.split("say ")[1].split()[0]
    return word, text.index("baseline") < text.index("parrot")


def test_weighted_win_rate_by_hand(tmp_path, candidate):
    """The judge is sure of the model by a log-odds per word, and leans to what it sees second by 1."""
    odds = {"river": 2.0, "wire": -1.0, "pole": 0.0, "yes": 0.5, "no": -3.0, "lines": 1.0}

    def judge(payload):
        word, is_second = shown(payload)
        second = (odds[word] if is_second else -odds[word]) + 1.0
        return "M" if second > 0 else "m", {"m": -second - 0.7, "M": -0.7, "the": -9.0}

    with chat_server(judge) as server:
        sheet = run(tmp_path, candidate, server)
        assert len(server.payloads) == 12
        assert {(one["max_tokens"], one["top_logprobs"], one["temperature"]) for one in server.payloads} == {
            (1, 5, 1.0)
        }
    by_hand = [(1 / (1 + math.exp(-(odd + 1))) + 1 / (1 + math.exp(-(odd - 1)))) / 2 for odd in odds.values()]
    assert [one.score for one in sheet.items] == pytest.approx(by_hand)
    assert sheet.result().mean == pytest.approx(sum(by_hand) / 6)
    assert sheet.facts["drawn"] == 0
    assert "Drawn verdicts" not in " ".join(sheet.notes)
    assert {one["model_id"] for one in sheet.records["answers"]} == {"pivot"}
    assert len(sheet.records["judgments"]) == 12
    assert sheet.facts["length_controlled"] == {"0": None}  # too few for a regression


def test_a_judge_that_only_sees_places_finds_no_winner(tmp_path, candidate):
    with chat_server(lambda payload: ("M", {"m": -5.0, "M": -0.01})) as server:
        sheet = run(tmp_path, candidate, server)
        assert [one.score for one in sheet.items] == pytest.approx([0.5] * 6)
        single = run(tmp_path, candidate, server, both_orders=False)
    assert any(abs(one.score - 0.5) > 0.4 for one in single.items)


def test_drawn_verdicts_are_said_to_be_drawn(tmp_path, candidate):
    with chat_server(lambda payload: "M" if shown(payload)[1] else "m") as server:
        sheet = run(tmp_path, candidate, server)
    assert [one.score for one in sheet.items] == [1.0] * 6
    assert "Drawn verdicts: the judge gave no log-probabilities for 12 of 12" in " ".join(sheet.notes)


def test_a_judge_that_refuses_log_probabilities_draws_verdicts(tmp_path, candidate):
    def judge(payload):
        if payload.get("logprobs"):
            return 400, {"error": {"message": "logprobs are not supported by this model"}}
        return "M" if shown(payload)[1] else "m"

    with chat_server(judge) as server:
        sheet = run(tmp_path, candidate, server)
        assert len(server.payloads) <= 12 + 8  # what was under way is asked again, the others once
    assert [one.score for one in sheet.items] == [1.0] * 6
    assert sheet.facts["drawn"] == 12


def test_unreadable_verdicts_are_counted_and_left_out(tmp_path, candidate):
    def judge(payload):
        word, is_second = shown(payload)
        if word == "wire" and is_second:
            return "Neither", {"Neither": -0.1, "Both": -2.0}
        return "M", {"m": -1.0, "M": -1.0}

    with chat_server(judge) as server:
        sheet = run(tmp_path, candidate, server)
    assert [one.score is None for one in sheet.items] == [False, True, False, False, False, False]
    assert (sheet.excluded, sheet.facts["unreadable"]) == (1, 1)
    assert "1 of 12 verdicts cannot be read" in " ".join(sheet.notes)


@pytest.mark.parametrize(
    ("text", "first_token", "is_second", "expected"),
    [
        ("M", {"M": math.log(0.6), "m": math.log(0.2)}, True, 0.75),
        ("M", {"M": math.log(0.6), "m": math.log(0.2)}, False, 0.25),
        ("M", {"M": math.log(0.3), " M": math.log(0.3), "m": math.log(0.2)}, True, 0.75),
        ("M", {"M": math.log(0.9), "x": math.log(0.1)}, True, 0.9),  # m is at most as probable as x
        ("x", {"x": -0.1}, True, None),
        (" m", None, False, 1.0),
        ("**M**.", None, False, 0.0),
        ("Model", None, True, None),
        ("most", None, False, None),
        ("?", None, False, None),
        ("", None, True, None),
    ],
)
def test_preference(text, first_token, is_second, expected):
    found = preference(Reply(text, first_token, "judge"), is_second)
    assert found == (pytest.approx(expected) if expected is not None else None)


def test_what_cannot_be_compared_is_said(tmp_path, candidate):
    with chat_server(lambda payload: ("M", {"M": -0.5, "m": -1.0})) as server:
        sheet = run(tmp_path, candidate, server, repeats=4)
    notes = " ".join(sheet.notes)
    assert "Not comparable with published numbers: the judge is judge; the prompts are the built-in ones" in notes
    assert "24 of 805 instructions" in notes
    assert "by lengths alone, which is not the published regression" in notes


def test_a_prompt_in_alpaca_evals_format(tmp_path):
    file = tmp_path / "clf.txt"
    file.write_text(
        '<|im_start|>system\nBe fair.\n<|im_end|>\n<|im_start|>user\n{\n {"a": "{instruction}"}, """{output_1}""", '
        '"""{output_2}"""}\n<|im_end|>\n'
    )
    prompt = alpaca_eval_prompt(str(file)).prompts["pair"]
    messages = prompt.filled(instruction="{output_1}", output_1="one", output_2="two {instruction}")
    assert [one["role"] for one in messages] == ["system", "user"]
    assert messages[1]["content"] == '{\n {"a": "{output_1}"}, """one""", """two {instruction}"""}'
    file.write_text("{instruction} {output_1}")
    with pytest.raises(UserError, match=r"no place for \{output_2\}"):
        alpaca_eval_prompt(str(file))


def test_bad_questions(tmp_path):
    file = tmp_path / "baseline.json"
    file.write_text(json.dumps([{"instruction": "a"}, {"instruction": "b", "output": "c"}, 3]))
    with pytest.raises(UserError) as error:
        alpaca_eval_instructions(AlpacaEvalConfig(questions=str(file)))
    assert [problem.split(":")[0] for problem in error.value.problems] == [
        "baseline.json, row 1",
        "baseline.json, row 3",
    ]


def test_no_hub_no_questions(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot be had from the hub .* give the path"):
        alpaca_eval_instructions(AlpacaEvalConfig(questions="nobody/nothing"))
