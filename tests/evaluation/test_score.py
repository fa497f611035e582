"""Scores: which rows are the answer, and what exact match and NLL per byte mean."""

import numpy as np
import pytest
import torch

from fusion.dialogues.dialogue import chat
from fusion.dialogues.encode import Encoded
from fusion.dialogues.reader import make_readers
from fusion.evaluation.samples import choose_samples
from fusion.evaluation.score import last_turn, score_folder, score_model
from fusion.teaching.causal_lm import load_causal_lm

END = 9
DIALOGUES = [chat("a b", "c d", "e", "f g", category="one"), chat("h", "i", category="two"), chat("j k", "l")]


def encoded(ids, supervised):
    ids_N = np.asarray(ids, dtype=np.int32)
    return Encoded(ids_N, np.asarray(supervised, dtype=bool), np.arange(len(ids_N)), 1, True)


def test_last_turn_is_what_follows_the_last_but_one_end_of_turn():
    one = encoded([1, 2, 3, END, 4, 5, 6, END], [0, 0, 1, 1, 0, 1, 1, 1])
    assert last_turn(one, END).tolist() == [False, False, True, True, True]


def test_last_turn_may_have_a_gap_before_its_end_of_turn():
    spaced = encoded([1, 2, 3, 8, END, 4, 5, 8, END], [0, 0, 1, 0, 1, 0, 1, 0, 1])
    assert last_turn(spaced, END).tolist() == [False, False, True, True]


def test_last_turn_cut_before_its_end():
    cut = encoded([1, 2, END, 4, 5, 6], [0, 1, 1, 0, 1, 1])
    assert last_turn(cut, END).tolist() == [False, False, True, True]


def test_scores_equal_a_plain_forward_pass(tiny_pivot):
    (reader,) = make_readers([tiny_pivot], "native")
    model = load_causal_lm(tiny_pivot)
    scores = score_model(model, reader.encoder, reader.vocab_size, DIALOGUES, DIALOGUES, batch_tokens=64)
    nats = length = 0.0
    right = {}
    for dialogue in DIALOGUES:
        tokens = reader.encoder.encode(dialogue)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens.ids_N).long()[None]).logits[0, :, : reader.vocab_size]
        references = torch.from_numpy(tokens.ids_N[tokens.rows_R + 1]).long()
        nats += torch.nn.functional.cross_entropy(logits[tokens.rows_R], references, reduction="sum").item()
        length += tokens.num_bytes
        answer = last_turn(tokens, reader.end_of_turn_id)
        right[dialogue.content_hash] = bool((logits[tokens.rows_R].argmax(-1) == references).numpy()[answer].all())
    assert scores.nll_per_byte == pytest.approx(nats / length, rel=1e-5)
    assert scores.items == right
    assert scores.num_items == {"one": 1, "two": 1, "all": 1}
    assert scores.scores["average"] == pytest.approx(np.mean(list(right.values())))


def test_scores_are_kept(tiny_pivot, tmp_path, monkeypatch):
    (reader,) = make_readers([tiny_pivot], "native")
    first = score_folder(reader, DIALOGUES, DIALOGUES, 64, tmp_path)
    monkeypatch.setattr("fusion.evaluation.score.load_causal_lm", lambda model: pytest.fail("scored again"))
    assert score_folder(reader, DIALOGUES, DIALOGUES, 64, tmp_path) == first


def test_samples_are_greedy_answers_one_for_each_category(tiny_pivot):
    (reader,) = make_readers([tiny_pivot], "native")
    model = load_causal_lm(tiny_pivot)
    samples = choose_samples(DIALOGUES + DIALOGUES, [], per_category=1, max_new_tokens=5)
    assert samples.dialogues == tuple(DIALOGUES)
    found = score_model(model, reader.encoder, reader.vocab_size, DIALOGUES, [], 64, samples).samples
    assert [one["category"] for one in found] == ["one", "two", ""]
    assert [one["reference"] for one in found] == ["f g", "i", "l"]
    assert [one["question"] for one in found] == ["Asked: a b\nAnswered: c d\nAsked: e", "h", "j k"]
    for dialogue, one in zip(DIALOGUES, found, strict=True):
        prompt = torch.from_numpy(reader.encoder.encode_prompt(dialogue.messages[:-1])).long()
        new: list[int] = []
        for _ in range(5):
            ids = torch.cat([prompt, torch.tensor(new, dtype=torch.long)])[None]
            with torch.no_grad():
                new.append(int(model(input_ids=ids).logits[0, -1, : reader.vocab_size].argmax()))
            if new[-1] == reader.end_of_turn_id:
                break
        assert one["answer"] == reader.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_without_test_dialogues_samples_are_held_out_ones(tiny_pivot):
    assert choose_samples([], DIALOGUES, 1, 5).dialogues == tuple(DIALOGUES)
    assert choose_samples(DIALOGUES, DIALOGUES, 0, 5).dialogues == ()
