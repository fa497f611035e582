"""Generation: what is drawn, that neighbours in a batch change nothing, that killed runs go on, and servers."""

import numpy as np
import pytest
import torch
from chat_server import chat_server
from transformers import GenerationConfig as ModelSettings

from fusion.config.evaluation import GenerationConfig
from fusion.dialogues.dialogue import Message, chat
from fusion.evaluation.answers import (
    Answer,
    LocalGenerator,
    Prompt,
    ServerGenerator,
    answer_lines,
    dialogue_so_far,
    fitting,
)
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.sampling import Draw, continuations, stop_ids_of

WORDS = ["river", "wire", "pole", "answer", "lines", "space", "system", "model"]
PROMPTS = [Prompt(f"q{n}", (f"say {word}", "and again?"), 0.7 * (n % 2)) for n, word in enumerate(WORDS)]


@pytest.fixture
def candidate(tiny_pivot):
    return Candidate.of_folder(tiny_pivot)


def settings(**changes):
    return GenerationConfig(**{"batch_size": 3, "max_new_tokens": 12, **changes})


def encoded(candidate, *texts):
    return [candidate.reader.encoder.encode_prompt([Message("user", text)]) for text in texts]


def write(candidate, prompts, draws):
    module, reader = candidate.module(), candidate.reader
    stop = stop_ids_of(module, reader.end_of_turn_id)
    return continuations(module, reader.vocab_size, prompts, draws, stop, 12)


def test_a_prompt_ends_where_the_answer_begins(candidate):
    """The prompt's tokens are the first tokens of the dialogue with any answer."""
    (prompt,) = encoded(candidate, "say yes")
    dialogue = candidate.reader.encoder.encode(chat("say yes", "yes"))
    assert prompt.tolist() == dialogue.ids_N[: len(prompt)].tolist()
    assert dialogue.rows_R[0] - len(prompt) in (-1, 0)  # the template writes a space before an answer


def test_greedy_is_the_plain_arg_max_of_every_step(candidate):
    """Without padding, cache and batches: one forward pass per token."""
    prompts = encoded(candidate, "say river", "which wire runs through it?")
    module, stop = candidate.module(), candidate.reader.end_of_turn_id
    found = write(candidate, prompts, [Draw(0.0, 0)] * 2)
    for prompt, ids in zip(prompts, found, strict=True):
        text = prompt.tolist()
        for _ in range(12):
            with torch.no_grad():
                logits = module(torch.tensor([text])).logits[0, -1, : candidate.reader.vocab_size]
            token = int(logits.argmax())
            if token == stop:
                break
            text.append(token)
        assert ids == text[len(prompt) :]


def test_neighbours_and_padding_change_no_answer(candidate):
    draws = [Draw.named(temperature, "seed", n) for n, temperature in enumerate((0.0, 0.7, 1.3))]
    prompts = encoded(candidate, "say", "say wire and pole and river and no", "say yes")
    together = write(candidate, prompts, draws)
    assert together == [write(candidate, [prompt], [draw])[0] for prompt, draw in zip(prompts, draws, strict=True)]


def test_draws_follow_the_distribution(candidate):
    """First tokens of many draws at temperature 0.5, against the model's own probabilities."""
    (prompt,) = encoded(candidate, "say river")
    module, vocab = candidate.module(), candidate.reader.vocab_size
    with torch.no_grad():
        logits = module(torch.from_numpy(prompt)[None].long()).logits[0, -1, :vocab].float()
    expected = (logits / 0.5).softmax(-1).numpy()
    count = 4000
    draws = [Draw.named(0.5, "draw", number) for number in range(count)]
    first = continuations(module, vocab, [prompt] * count, draws, [candidate.reader.end_of_turn_id], 1)
    counts = np.bincount([ids[0] if ids else candidate.reader.end_of_turn_id for ids in first], minlength=vocab)
    likely = expected > 0.01
    error = np.sqrt(expected * (1 - expected) / count)
    assert likely.sum() > 3
    assert np.all(np.abs(counts / count - expected)[likely] < 4.5 * error[likely])


def test_the_models_own_settings_are_put_aside(candidate):
    prompts = encoded(candidate, "say river")
    plain = write(candidate, prompts, [Draw(0.0, 0)])
    module = candidate.module()
    module.generation_config = ModelSettings(repetition_penalty=5.0, do_sample=True, top_k=2, max_new_tokens=1)
    assert write(candidate, prompts, [Draw(0.0, 0)]) == plain
    assert module.generation_config.repetition_penalty == 5.0


def test_seeds_decide(candidate, tmp_path):
    generator = LocalGenerator(settings(), tmp_path)
    first, other = (generator.answers(candidate, PROMPTS, seed) for seed in (1, 2))
    greedy = [number for number, prompt in enumerate(PROMPTS) if not prompt.temperature]
    assert first != other
    assert [first[number] for number in greedy] == [other[number] for number in greedy]
    assert [len(answer.turns) for answer in first] == [2] * len(PROMPTS)
    assert LocalGenerator(settings(), tmp_path / "else").answers(candidate, PROMPTS, 1) == first


def test_a_killed_run_goes_on_to_the_same_answers(candidate, tmp_path, monkeypatch):
    whole = LocalGenerator(settings(), tmp_path / "whole").answers(candidate, PROMPTS, 1)
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # the second turn of the second batch
            raise KeyboardInterrupt
        return continuations(*arguments)

    generator = LocalGenerator(settings(), tmp_path / "killed")
    monkeypatch.setattr("fusion.evaluation.answers.continuations", failing)
    with pytest.raises(KeyboardInterrupt):
        generator.answers(candidate, PROMPTS, 1)
    calls.clear()
    monkeypatch.setattr("fusion.evaluation.answers.continuations", lambda *a: calls.append(a) or continuations(*a))
    assert generator.answers(candidate, PROMPTS, 1) == whole
    assert len(calls) == 4  # two batches of two turns were missing
    assert generator.answers(candidate, PROMPTS, 1) == whole
    assert len(calls) == 4


def test_long_questions_lose_their_beginning(candidate):
    module = candidate.module()
    length = module.config.max_position_embeddings
    prompt = np.arange(length + 50)
    assert fitting(module, prompt, 20).tolist() == prompt[-(length - 20) :].tolist()
    assert fitting(module, prompt[:30], 20).tolist() == list(range(30))


def test_a_server_answers_turn_by_turn(candidate, tmp_path):
    def answer(payload):
        return f"{payload['model']} heard {len(payload['messages'])}, last {payload['messages'][-1]['content']}"

    with chat_server(answer, faults=[500, "malformed"]) as server:
        generator = ServerGenerator(settings(base_url=server.base_url), tmp_path)
        found = generator.answers(candidate, PROMPTS, 3)
        asked = len(server.payloads)
        assert generator.answers(candidate, PROMPTS, 3) == found
        assert len(server.payloads) == asked == 2 * len(PROMPTS) + 2
        assert {payload["seed"] for payload in server.payloads} == {3}
        assert {payload["temperature"] for payload in server.payloads} == {0.0, 0.7}
    assert found[0].turns == ("pivot heard 1, last say river", "pivot heard 3, last and again?")


def test_dialogue_so_far():
    messages = dialogue_so_far(Prompt("q", ("a", "b", "c")), ("x",))
    assert [(one.role, one.content) for one in messages] == [("user", "a"), ("assistant", "x"), ("user", "b")]


def test_answers_are_written_in_fastchats_format():
    (line,) = answer_lines("pivot", "mt_bench", 0, [Prompt("81", ("x", "y"))], [Answer("81", ("a", "b"))])
    assert (line["question_id"], line["model_id"]) == (81, "pivot")
    assert line["choices"] == [{"index": 0, "turns": ["a", "b"]}]
