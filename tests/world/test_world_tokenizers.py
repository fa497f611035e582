"""Tokenisers of both families: nothing is lost, templates say where the assistant speaks."""

import pytest

from fusion.config.world import WorldConfig
from fusion.dialogues.dialogue import chat
from fusion.dialogues.encode import Encoder
from fusion.dialogues.template import chat_format
from fusion.world.tokenizers import make_tokenizer

WORLD = WorldConfig(tokenizer_dialogues=150, tokenizer_weak_dialogues=50)
MODELS = list(WORLD.models)
TEXTS = ["The sum is 15.", " The river", "naïve café 🙂 漢字", "two  spaces\nand\ttabs", "", "x" * 40]
DIALOGUE = chat("What is 5 plus 1?", "The sum is 6.", "And the river?", "Its river is Radu.")


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make_tokenizer(name, WORLD) for name in MODELS}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizers, name, text):
    tokenizer = tokenizers[name]
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", MODELS)
def test_special_tokens(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) <= WORLD.models[name].vocab_size
    assert chat_format(tokenizer, name).end_of_turn_id == tokenizer.eos_token_id


@pytest.mark.parametrize("name", MODELS)
def test_generation_prompt_is_a_prefix_of_the_answered_dialogue(tokenizers, name):
    rows = DIALOGUE.to_json()["messages"]
    prompt = tokenizers[name].apply_chat_template(rows[:3], tokenize=False, add_generation_prompt=True)
    whole = tokenizers[name].apply_chat_template(rows, tokenize=False)
    assert whole.removeprefix(prompt) == f" {rows[3]['content']}{tokenizers[name].eos_token}"


@pytest.mark.parametrize("name", MODELS)
def test_generation_mask_is_what_the_encoder_supervises(tokenizers, name):
    tokenizer = tokenizers[name]
    rendered = tokenizer.apply_chat_template(
        DIALOGUE.to_json()["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = Encoder(chat_format(tokenizer, name)).encode(DIALOGUE)
    assert rendered["input_ids"] == encoded.ids_N.tolist()
    assert rendered["assistant_masks"] == encoded.supervised_N.astype(int).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_first_word_of_an_answer_is_one_piece_with_its_space(tokenizers, name):
    tokenizer = tokenizers[name]
    native, shared = chat_format(tokenizer, name), chat_format(tokenizers["pivot"], "pivot")
    for template in (native, shared):
        encoded = Encoder(native, template).encode(DIALOGUE)
        first = int(encoded.ids_N[encoded.supervised_N][0])
        assert tokenizer.decode([first]) == " The"


def test_pivot_template_is_plain_text_to_every_source(tokenizers):
    text = tokenizers["pivot"].apply_chat_template(DIALOGUE.to_json()["messages"][:2], tokenize=False)
    assert text == "User: What is 5 plus 1?</s>Assistant: The sum is 6.</s>"
    for name in MODELS:
        assert tokenizers[name].tokenize("Assistant: The") in (["Assistant", ":", "▁The"], ["Assistant", ":", "ĠThe"])


@pytest.mark.parametrize("name", MODELS)
def test_digits_are_split_where_the_settings_say(tokenizers, name):
    spelled = [piece for piece in tokenizers[name].get_vocab() if not piece.startswith("<0x")]
    numbers = [piece for piece in spelled if sum(character.isdigit() for character in piece) > 1]
    assert bool(numbers) != WORLD.models[name].split_digits


def test_equal_seeds_give_equal_tokenizers(tokenizers):
    again = make_tokenizer("tiny_a", WORLD)
    assert again.backend_tokenizer.to_str() == tokenizers["tiny_a"].backend_tokenizer.to_str()
