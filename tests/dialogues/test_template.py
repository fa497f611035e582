"""Where an answer stands in a rendered dialogue, for the chat templates that people use."""

import pytest
from tiny_models import FORMATS, KINDS, REFUSE_SYSTEM, make_tokenizer

from fusion.config import UserError
from fusion.dialogues.dialogue import Dialogue, Message, chat
from fusion.dialogues.template import UnrenderableDialogue, chat_format, require_template

SYSTEM = Message("system", "yes")


def answers(rendering):
    return [rendering.text[turn.start : turn.end] for turn in rendering.turns]


@pytest.fixture(params=FORMATS)
def form(request):
    return chat_format(make_tokenizer("byte_level", request.param), request.param)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
def test_the_end_of_turn_is_found_by_a_probe(kind, name):
    tokenizer = make_tokenizer(kind, name)
    found = chat_format(tokenizer, "model")
    assert found.end_of_turn == FORMATS[name].end_of_turn
    assert found.end_of_turn_id == tokenizer.get_vocab()[found.end_of_turn]


@pytest.mark.parametrize(
    "turns",
    [
        ("hi", "yo"),
        ("yes", "yes", "yes", "yes"),  # the same text in all turns
        ("say yes", "yes", "no? yes!", "no"),
        ("", "a"),
        ("user", "user", "assistant", "assistant", "model", "model"),  # what headers are made of
        ("a", "s", "b", "t"),
        ("think", "think", "Assistant: GPT4 Correct", ":"),
        ("q", "l.\n\n2", "\n", "{{ bos_token }}{% for %}"),
        ("<<answer>>", "<<answer>>", "x", "<<answer>>"),
        ("café 北京", "👍🏽 e\u0301", "日", "本"),
    ],
)
def test_answers_are_found_where_they_stand(form, turns):
    rendering = form.render(chat(*turns))
    assert answers(rendering) == list(turns[1::2])
    for turn in rendering.turns:
        assert turn.end_of_turn is not None
        assert rendering.text.startswith(form.end_of_turn, turn.end_of_turn)
        assert rendering.text[turn.end : turn.end_of_turn].strip() == ""


def test_answers_come_after_their_questions(form):
    rendering = form.render(chat("first yes", "yes", "second yes", "yes", "third yes", "yes"))
    places = [place for word in ("first", "second", "third") for place in [rendering.text.index(word)]]
    for place, turn in zip(places, rendering.turns, strict=True):
        assert place < turn.start
    assert [turn.start for turn in rendering.turns] == sorted(turn.start for turn in rendering.turns)


def test_white_space_around_an_answer_never_counts(form):
    padded = form.render(chat("q", " \nYes ", "Yes please", "\tNo\n\n"))
    assert answers(padded) == ["Yes", "No"]
    assert padded == form.render(chat("q", "Yes", "Yes please", "No"))


def test_white_space_within_an_answer_counts(form):
    assert answers(form.render(chat("q", "a  b\n\n c"))) == ["a  b\n\n c"]


@pytest.mark.parametrize("name", FORMATS)
def test_system_messages(name):
    form = chat_format(make_tokenizer("byte_level", name), name)
    dialogue = Dialogue((SYSTEM, *chat("say yes", "yes", "again", "yes").messages))
    if name in REFUSE_SYSTEM:
        with pytest.raises(UnrenderableDialogue, match="refuses"):
            form.render(dialogue)
    else:
        rendering = form.render(dialogue)
        assert answers(rendering) == ["yes", "yes"]
        assert rendering.turns[0].start > rendering.text.index("say yes") + len("say yes")
        assert rendering.turns[1].start > rendering.text.index("again")


def test_an_answer_may_come_first():
    form = chat_format(make_tokenizer("byte_level", "chatml"), "model")
    dialogue = Dialogue((Message("assistant", "Hello!"), *chat("Hello!", "Hello!").messages))
    rendering = form.render(dialogue)
    assert answers(rendering) == ["Hello!"] * 2
    assert rendering.text.count("Hello!", 0, rendering.turns[1].start) == 2


def test_a_template_that_prints_the_date_renders_the_same_every_day():
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.chat_template = "Today: {{ strftime_now('%d %b %Y') }}\n" + tokenizer.chat_template
    assert chat_format(tokenizer, "model").render(chat("q", "a")).text.startswith("Today: 26 Jul 2024\n<|im_start|>")


def test_a_template_that_rewrites_answers_is_found_out():
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ c }}", "{{ c | replace('secret', '') }}")
    form = chat_format(tokenizer, "model")
    assert answers(form.render(chat("q", "a"))) == ["a"]
    with pytest.raises(UnrenderableDialogue, match="rewrites"):
        form.render(chat("q", "the secret word"))


def test_a_turn_that_the_template_leaves_open_has_no_end():
    tokenizer = make_tokenizer("byte_level", "mistral")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    form = chat_format(tokenizer, "model")
    assert form.end_of_turn == "</s>"  # nothing special behind the probe's answer, so the end of the sequence
    (turn,) = form.render(chat("q", "a")).turns
    assert turn.end_of_turn is None


def test_the_settings_overrule_the_probe():
    tokenizer = make_tokenizer("metaspace", "openchat")
    assert chat_format(tokenizer, "model", "</s>").end_of_turn == "</s>"
    with pytest.raises(UserError, match=r"pivot: end_of_turn='<nope>' is not a token.*pivot\.end_of_turn"):
        chat_format(tokenizer, "pivot", "<nope>")


def test_a_tokenizer_without_any_end_is_refused():
    tokenizer = make_tokenizer("byte_level", "chatml", eos_token=None, pad_token=None)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(UserError, match=r"source: .*ends no assistant turn.*source\.end_of_turn"):
        chat_format(tokenizer, "source")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="ends no assistant turn"):
        chat_format(tokenizer, "source")


def test_without_a_template_the_end_of_sequence_ends_turns():
    tokenizer = make_tokenizer("metaspace", "mistral")
    tokenizer.chat_template = None
    assert chat_format(tokenizer, "source").end_of_turn == "</s>"
    with pytest.raises(UserError, match=r"pivot: .*no chat template.*pivot\.chat_template"):
        require_template(tokenizer, "pivot")


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('never') }}", "nothing of the dialogue", "{{ 1 + 'a' }}", "{% for %}"]
)
def test_a_template_that_renders_nothing_is_the_users_problem(template):
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="pivot: its chat template cannot render"):
        chat_format(tokenizer, "pivot")
