"""The judge client on a real server that misbehaves: nothing lost, nothing paid twice, no key written."""

import logging
import signal
import subprocess
import sys
import threading
from itertools import count

import pytest
from chat_server import KEY, KEY_VARIABLE, chat_server, files_with
from waiting import PATIENCE, wait_for

from fusion.config import UserError
from fusion.config.evaluation import EndpointConfig
from fusion.evaluation.endpoint import LOST_IN_A_ROW, Endpoint, Question, Refused


def settings(server, **changes):
    defaults = {"model": "judge", "first_wait_s": 0.01, "concurrency": 4}
    return EndpointConfig(base_url=server.base_url, **{**defaults, **changes})


def question(number, **changes):
    return Question(({"role": "user", "content": f"question {number}"},), **changes)


def echo(payload):
    return "answer to " + payload["messages"][-1]["content"]


def test_every_fault_is_survived_and_order_kept(tmp_path):
    faults = ["empty", 429, 500, "malformed", "cut", 503, 429]
    with chat_server(echo, faults=faults) as server:
        endpoint = Endpoint(settings(server, retries=len(faults)), tmp_path)  # one question may get all of them
        replies = endpoint.ask_all([question(number) for number in range(30)])
    assert [reply.text for reply in replies] == [f"answer to question {number}" for number in range(30)]
    assert all(server.seen[fault] for fault in faults)
    assert endpoint.ledger.repeated == len(faults)
    assert endpoint.ledger.asked == 30


def test_an_answer_that_does_not_come_in_time_is_asked_for_again(tmp_path):
    """Without counting: on a busy machine others may come too late, too."""
    with chat_server(echo, faults=["timeout"]) as server:
        endpoint = Endpoint(settings(server, timeout_s=0.3, retries=50), tmp_path)
        assert endpoint.ask(question(1)).text == "answer to question 1"
        assert server.seen["timeout"] == 1
    assert endpoint.ledger.repeated >= 1
    with chat_server(echo, faults=["timeout"] * 2) as server:
        endpoint = Endpoint(settings(server, timeout_s=0.3, retries=1), tmp_path)
        with pytest.raises(UserError, match=r"1 of 1 questions have no answer .*ReadTimeout.*run the same command"):
            endpoint.ask(question(1))


def test_a_rerun_costs_nothing_and_says_the_same(tmp_path):
    with chat_server(echo) as server:
        first = Endpoint(settings(server), tmp_path)
        replies = first.ask_all([question(number) for number in range(10)])
        asked = len(server.payloads)
        again = Endpoint(settings(server), tmp_path)
        assert again.ask_all([question(number) for number in range(10)]) == replies
        assert len(server.payloads) == asked == 10
    assert (again.ledger.asked, again.ledger.from_cache) == (0, 10)
    assert again.ledger.to_json(settings(server, input_price=1.0))["dollars"] == 0


def test_the_same_question_is_asked_once(tmp_path):
    with chat_server(echo) as server:
        replies = Endpoint(settings(server), tmp_path).ask_all([question(number % 2) for number in range(8)])
        assert [reply.text for reply in replies] == ["answer to question 0", "answer to question 1"] * 4
        assert len(server.payloads) == 2


def test_what_decides_an_answer_is_in_its_key(tmp_path):
    with chat_server(echo) as server:
        endpoint = Endpoint(settings(server), tmp_path)
        endpoint.ask_all(
            [
                question(1),
                question(1, temperature=0.5),
                question(1, sample=1),
                question(1, seed=3),
                question(1, max_tokens=5),
                question(1, top_logprobs=5),
            ]
        )
        Endpoint(settings(server, model="other"), tmp_path).ask(question(1))
        assert len(server.payloads) == 7


def test_tokens_and_dollars_are_counted(tmp_path):
    with chat_server(echo) as server:
        prices = settings(server, input_price=10.0, output_price=30.0)
        endpoint = Endpoint(prices, tmp_path)
        endpoint.ask(question(1))
    counted = endpoint.ledger.to_json(prices)
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (10, 20)
    assert counted["dollars"] == pytest.approx((10 * 10 + 20 * 30) / 1e6)
    assert counted["models"] == ["judge-2026"]


def test_questions_go_side_by_side(tmp_path):
    """Nobody is answered before five have asked."""
    together = threading.Barrier(5, timeout=PATIENCE)

    def answer(payload):
        together.wait()
        return echo(payload)

    with chat_server(answer) as server:
        Endpoint(settings(server, concurrency=5), tmp_path).ask_all([question(number) for number in range(10)])
        assert server.most_at_once == 5


def test_no_key_in_any_file_log_or_message(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with chat_server(echo, key=KEY, faults=[500, "cut"]) as server:
        given = settings(server, key_variable=KEY_VARIABLE)
        endpoint = Endpoint(given, tmp_path)
        assert endpoint.ask(question(1)).text == "answer to question 1"
        monkeypatch.setenv(KEY_VARIABLE, KEY + "-wrong")
        with pytest.raises(Refused) as refused:
            Endpoint(given, tmp_path).ask_all([question(number) for number in range(2, 9)])
    assert "status 401" in str(refused.value)
    assert KEY not in str(refused.value)
    assert KEY not in caplog.text
    assert KEY not in repr(given) + repr(endpoint.ledger)
    assert files_with(KEY, tmp_path) == []
    assert files_with("question 1", tmp_path) != []


def test_a_question_without_answer_is_told_and_the_others_are_kept(tmp_path):
    def stubborn(payload):
        return (503, {"error": "busy"}) if payload["messages"][-1]["content"] == "question 3" else echo(payload)

    questions = [question(number) for number in range(6)]
    with chat_server(stubborn) as server:
        with pytest.raises(UserError, match=r"1 of 6 questions have no answer .*status 503.*run the same command"):
            Endpoint(settings(server, retries=1), tmp_path).ask_all(questions)
        server.answer, before = echo, len(server.payloads)
        endpoint = Endpoint(settings(server), tmp_path)
        assert len(endpoint.ask_all(questions)) == 6
        assert len(server.payloads) == before + 1
    assert endpoint.ledger.from_cache == 5


def test_an_endpoint_that_is_down_is_given_up_early(tmp_path):
    """Patience is for a question or a moment: not every one of a thousand questions is tried to the end."""
    with chat_server(lambda payload: (503, {"error": "down"})) as server:
        endpoint = Endpoint(settings(server, retries=2), tmp_path)
        with pytest.raises(UserError, match=r"200 of 200 questions have no answer \(the first: status 503\)"):
            endpoint.ask_all([question(number) for number in range(200)])
        assert len(server.payloads) <= 3 * (LOST_IN_A_ROW + 4)


def test_the_reason_that_is_told_is_of_a_question_that_was_asked(tmp_path):
    """The first question is still waiting when the endpoint is given up."""

    class Hesitant(Endpoint):
        def _asked_once(self, asked):
            if asked == question(0):
                assert self._stop.wait(PATIENCE)
            return super()._asked_once(asked)

    with chat_server(lambda payload: (503, {"error": "down"})) as server:
        endpoint = Hesitant(settings(server, retries=0), tmp_path)
        with pytest.raises(UserError, match=r"20 of 20 questions have no answer \(the first: status 503\)"):
            endpoint.ask_all([question(number) for number in range(20)])


def test_progress_is_told_and_not_every_request(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def told():
        return [line for line in caplog.messages if "questions done" in line]

    with chat_server(echo) as server:
        Endpoint(settings(server), tmp_path).ask_all([question(number) for number in range(50)])
        assert "25 of 50 questions done" in caplog.text
        assert len(told()) == 10
        assert "HTTP Request" not in caplog.text  # httpx's line for every request
        Endpoint(settings(server), tmp_path).ask_all([question(number) for number in range(50)])
    assert len(told()) == 10  # nothing was asked


def test_empty_answers_are_believed_at_last_but_not_kept(tmp_path):
    with chat_server(lambda payload: "") as server:
        endpoint = Endpoint(settings(server), tmp_path)
        assert endpoint.ask(question(1)).text == ""
        assert len(server.payloads) == 3
        endpoint.ask(question(1))
        assert len(server.payloads) == 6


def test_log_probabilities_of_the_first_token(tmp_path):
    with chat_server(lambda payload: ("m", {"m": -0.1, "M": -2.4})) as server:
        endpoint = Endpoint(settings(server), tmp_path)
        assert endpoint.ask(question(1, top_logprobs=5)).first_token == {"m": -0.1, "M": -2.4}
        assert endpoint.ask(question(1)).first_token is None
        assert endpoint.ask(question(1, top_logprobs=5)).first_token == {"m": -0.1, "M": -2.4}
        assert len(server.payloads) == 2


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"base_url": "api.example.org"}, "address of an endpoint"),
        ({"base_url": "https://user:secret@example.org/v1"}, "must hold no key"),
        ({"base_url": "https://example.org/v1?key=secret"}, "must hold no key"),
        ({"model": ""}, "judge.model"),
        ({"key_variable": "FUSION_TEST_NO_SUCH_KEY"}, "FUSION_TEST_NO_SUCH_KEY is not set"),
    ],
)
def test_settings_that_cannot_work(tmp_path, changes, problem):
    given = EndpointConfig(**{"base_url": "https://example.org/v1", "model": "judge", **changes})
    with pytest.raises(UserError, match=problem) as error:
        Endpoint(given, tmp_path)
    assert "secret" not in str(error.value)


SCRIPT = """
import sys
from pathlib import Path
from fusion.config.evaluation import EndpointConfig
from fusion.evaluation.endpoint import Endpoint, Question
endpoint = Endpoint(EndpointConfig(base_url=sys.argv[1], model="judge", concurrency=2), Path(sys.argv[2]))
endpoint.ask_all([Question(({"role": "user", "content": f"question {n}"},)) for n in range(20)])
"""


def test_killed_and_resumed(tmp_path):
    """After a SIGKILL only what had no reply is asked again; every kept file is whole."""
    may_go_on, numbers = threading.Event(), count(1)

    def slow_after_seven(payload):
        if next(numbers) > 7:
            may_go_on.wait(PATIENCE)
        return echo(payload)

    with chat_server(slow_after_seven) as server:
        command = [sys.executable, "-c", SCRIPT, server.base_url, str(tmp_path)]
        process = subprocess.Popen(command)
        wait_for(lambda: len(kept(tmp_path)) == 7 and server.at_once == 2)  # both threads wait for an answer
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(server.payloads) == 9
        may_go_on.set()
        subprocess.run(command, check=True)
        assert len(server.payloads) == 9 + 20 - 7
        assert len(kept(tmp_path)) == 20


def kept(folder):
    return list(folder.rglob("[!.]*.json"))
