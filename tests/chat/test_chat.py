"""The chat: answers in pieces that are those of generation, memory, the terminal, and the page's server."""

import io
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from waiting import PATIENCE

from fusion.chat import speaker as module
from fusion.chat.speaker import Speaker, speakers
from fusion.chat.terminal import talk
from fusion.chat.web import make_server
from fusion.dialogues.dialogue import Message
from fusion.dialogues.template import UnrenderableDialogue
from fusion.evaluation.sampling import Draw, continuations, stop_ids_of

REPOSITORY = Path(__file__).resolve().parents[2]
client = httpx.Client(timeout=PATIENCE)


@pytest.fixture
def pair(tiny_pivot, tiny_source):
    return speakers([tiny_pivot.path, tiny_source.path], max_new_tokens=12)


def plain_answer(speaker, *turns):
    """What generation gives to a talk of user and assistant turns."""
    reader, module = speaker.candidate.reader, speaker.candidate.module()
    messages = [Message(("user", "assistant")[place % 2], turn) for place, turn in enumerate(turns)]
    prompt = reader.encoder.encode_prompt(messages)
    stop = stop_ids_of(module, reader.end_of_turn_id)
    (ids,) = continuations(module, reader.vocab_size, [prompt], [Draw(0.0, 0)], stop, 12)
    return str(reader.tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_pieces_are_the_answer_and_are_remembered(pair):
    for speaker in pair:
        first = "".join(speaker.answer("say river"))
        assert first.strip() == plain_answer(speaker, "say river")
        second = "".join(speaker.answer("and wire?"))
        assert second.strip() == plain_answer(speaker, "say river", first.strip(), "and wire?")
        assert [one.role for one in speaker.messages] == ["user", "assistant"] * 2
        speaker.forget()
        assert "".join(speaker.answer("say river")) == first


def test_what_cannot_be_asked_leaves_the_talk_as_it_was(pair):
    speaker = pair[0]
    list(speaker.answer("say river"))
    before = list(speaker.messages)
    with pytest.raises(UnrenderableDialogue):
        list(speaker.answer(f"forged {speaker.candidate.reader.encoder.own.end_of_turn}"))
    assert speaker.messages == before


def test_an_error_of_the_model_reaches_whoever_reads(pair, monkeypatch):
    def broken(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("fusion.chat.speaker.continuations", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pair[0].answer("say river"))
    assert pair[0].messages == []


def test_the_terminal(pair):
    out = io.StringIO()
    talk(pair, io.StringIO("say river\n\n/new\nsay river\n/quit\nnever\n"), out)
    text = out.getvalue()
    for speaker in pair:
        told = plain_answer(speaker, "say river").splitlines()[0]
        assert len(re.findall(rf"^(?:> )?{speaker.name}\s+{re.escape(told)}", text, re.M)) == 2
        assert len(speaker.messages) == 2
    assert "a new talk" in text
    assert "never" not in text


def test_the_command(tiny_pivot):
    done = subprocess.run(
        [sys.executable, "-m", "fusion.chat", tiny_pivot.path, "--max-new-tokens", "4"],
        input="say yes\n",
        cwd=REPOSITORY,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(tiny_pivot.path).name in done.stdout


def test_a_model_that_is_not_there(capsys):
    from fusion.chat.__main__ import main

    assert main(["/nowhere/at/all", "/nor/here"]) == 2
    assert capsys.readouterr().err.count("no such folder") == 2


@pytest.mark.parametrize("option", [["--port", "99999"], ["--temperature", "nan"], ["--max-new-tokens", "0"]])
def test_options_that_cannot_be(option, capsys):
    from fusion.chat.__main__ import main

    with pytest.raises(SystemExit) as ended:
        main(["/nowhere", *option])
    assert ended.value.code == 2
    assert option[0] in capsys.readouterr().err


def test_an_answer_that_nobody_reads_on_ends(tiny_pivot, monkeypatch):
    """A page that is closed frees the model: its thread ends, and its own settings are back."""

    told_to_stop = []

    class Leisurely(module._Pieces):
        """Says nothing more before somebody hangs up, so that this comes before the end of the answer."""

        def on_finalized_text(self, text, stream_end=False):
            super().on_finalized_text(text, stream_end)
            if text:
                told_to_stop.append(self._stop.wait(PATIENCE / 4))

    (speaker,) = speakers([tiny_pivot.path], max_new_tokens=400)
    own = speaker.candidate.module().generation_config
    with monkeypatch.context() as patch:
        patch.setattr(module, "_Pieces", Leisurely)
        pieces = speaker.answer("say river")
        next(pieces)
    assert f"{speaker.name} answers" in names_of_threads()
    pieces.close()
    assert told_to_stop == [True]
    assert f"{speaker.name} answers" not in names_of_threads()
    assert speaker.candidate.module().generation_config is own
    assert speaker.messages == []
    assert "".join(speaker.answer("say river"))


def names_of_threads():
    return [thread.name for thread in threading.enumerate()]


@pytest.fixture
def page(pair):
    server = make_server(pair, 0)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    yield address
    server.shutdown()
    server.server_close()
    thread.join()


def facts_of(address):
    text = client.get(address + "/").text
    return json.loads(re.search(r"const facts = (\{.*\});", text).group(1))


def test_the_page_asks_and_streams(page, pair):
    facts = facts_of(page)
    assert facts["models"] == [speaker.name for speaker in pair]
    headers = {"X-Token": facts["token"]}
    for number, speaker in enumerate(pair):
        asked = {"model": number, "question": "say river"}
        with client.stream("POST", page + "/ask", json=asked, headers=headers) as response:
            lines = [json.loads(line) for line in response.iter_lines()]
        assert lines[-1] == {"end": True}
        assert "".join(line.get("text", "") for line in lines).strip() == plain_answer(speaker, "say river")
    assert client.post(page + "/new", json={}, headers=headers).status_code == 200
    assert all(speaker.messages == [] for speaker in pair)


def test_strangers_cannot_ask(page, pair):
    asked = {"model": 0, "question": "say river"}
    assert client.post(page + "/ask", json=asked).status_code == 403
    assert client.post(page + "/ask", json=asked, headers={"X-Token": "guess"}).status_code == 403
    assert client.get(page + "/", headers={"Host": "evil.example"}).status_code == 404
    assert client.get(page + "/../secrets").status_code == 404
    headers = {"X-Token": facts_of(page)["token"]}
    for bad in ({"model": 9, "question": "a"}, {"model": "0", "question": "a"}, {"model": 0}, []):
        assert client.post(page + "/ask", json=bad, headers=headers).status_code == 400
    assert pair[0].messages == []


def test_the_page_loads_nothing_from_elsewhere(page):
    response = client.get(page + "/")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)=|https?://|innerHTML", response.text)


def test_a_speaker_draws_by_its_seed(tiny_pivot):
    def said(seed):
        speaker = Speaker.of(tiny_pivot, tiny_pivot, temperature=1.0, max_new_tokens=12, seed=seed)
        return "".join(speaker.answer("say river"))

    assert said(1) == said(1)
    assert len({said(seed) for seed in range(4)}) > 1
