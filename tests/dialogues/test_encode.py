"""Dialogues as tokens: what is supervised, and byte ends that agree between tokenisers and templates."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import FORMATS, KINDS, encoder, make_tokenizer
from tokenizers import AddedToken, normalizers

from fusion.dialogues.dialogue import Dialogue, Message, chat
from fusion.dialogues.encode import Encoder, corpus_hash
from fusion.dialogues.template import UnrenderableDialogue, chat_format
from fusion.dialogues.token_bytes import token_bytes

alphabet = st.sampled_from("aeT .:!\n\t[]<>|/13é北日👍\U0001f3fd\u0301\u200d_") | st.characters(
    exclude_characters="▁", exclude_categories=["Cs"]
)
RESERVED = {"<unk>", "<|user|>", *(token for one in FORMATS.values() for token in one.special)}
contents = (  # Hypothesis also draws strings that it finds in our code; special tokens are refused, by a test below
    st.text(alphabet, min_size=1, max_size=20) | st.sampled_from(["yes", "no", "The answer is yes", "user"])
).filter(lambda text: not any(token in text for token in RESERVED))
dialogues = st.lists(st.tuples(contents, contents), min_size=1, max_size=3).map(
    lambda pairs: chat(*(turn for pair in pairs for turn in pair))
)
PAIRS = [  # model (tokeniser, template), and the pivot whose rendering it reads
    ("byte_level", "chatml", "metaspace", "openchat"),
    ("metaspace", "mistral", "byte_level", "llama3"),
    ("metaspace_always", "gemma", "metaspace", "moved_system"),
    ("byte_level", "llama3", "byte_level", "promptless"),
    ("metaspace", "openchat", "byte_level", "thinking"),
]


def answers(dialogue):
    return [message.content.strip() for message in dialogue.messages if message.role == "assistant"]


def num_units(dialogue):
    return sum(len(answer.encode()) + 1 for answer in answers(dialogue))


def runs(encoded):
    """Ids of every run of neighbouring supervised tokens."""
    places = np.flatnonzero(encoded.supervised_N)
    return [encoded.ids_N[run] for run in np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)]


def check(encoder, dialogue):
    """Everything that must hold for an ordinary dialogue."""
    encoded = encoder.encode(dialogue)
    spell = token_bytes(encoder.own.tokenizer).written
    expected = [answer + encoder.own.end_of_turn for answer in answers(dialogue)]
    assert [spell(run).decode().lstrip() for run in runs(encoded)] == expected
    assert all(run[-1] == encoder.own.end_of_turn_id for run in runs(encoded))
    assert encoded.exact
    assert encoded.num_bytes == num_units(dialogue)
    ends_S = encoded.ends_N[encoded.supervised_N]
    assert (np.diff(ends_S) > 0).all()
    assert ends_S[-1] == num_units(dialogue)
    assert (np.diff(encoded.ends_N) >= 0).all()
    assert encoded.ends_N[0] >= 0
    assert (encoded.rows_R == np.flatnonzero(encoded.supervised_N) - 1).all()
    return encoded


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=12)
@given(dialogue=dialogues)
def test_answers_and_their_ends_are_supervised(kind, name, dialogue):
    assume(all(answers(dialogue)))
    check(encoder(kind, name), dialogue)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(pair[1::2]))
@settings(max_examples=20)
@given(dialogue=dialogues)
def test_in_the_rendering_of_a_pivot_a_model_ends_turns_its_own_way(pair, dialogue):
    assume(all(answers(dialogue)))
    shared, native, pivot = encoder(*pair), encoder(*pair[:2]), encoder(*pair[2:])
    encoded = check(shared, dialogue)
    others = [check(native, dialogue), check(pivot, dialogue)]
    assert {other.num_bytes for other in others} == {encoded.num_bytes}
    last = [set(one.ends_N[one.supervised_N][[-1]].tolist()) for one in [encoded, *others]]
    assert last[0] == last[1] == last[2]


@given(dialogue=dialogues, data=st.data())
@settings(max_examples=30)
def test_a_cut_dialogue_is_the_beginning_of_the_whole(dialogue, data):
    assume(all(answers(dialogue)))
    whole = encoder("byte_level", "chatml").encode(dialogue)
    length = data.draw(st.integers(2, len(whole.ids_N)))
    short = Encoder(encoder("byte_level", "chatml").own, max_length=length)
    if not whole.supervised_N[1:length].any():
        with pytest.raises(UnrenderableDialogue, match="max_length"):
            short.encode(dialogue)
        return
    cut = short.encode(dialogue)
    for name in ("ids_N", "supervised_N", "ends_N"):
        assert (getattr(cut, name) == getattr(whole, name)[:length]).all()
        assert len(getattr(cut, name)) == length
    assert cut.num_bytes == max(cut.ends_N.max(), 0)


def test_a_known_dialogue_token_by_token():
    encoded = encoder("byte_level", "chatml").encode(chat("hi", "yes", "", "no"))
    tokenizer = encoder("byte_level", "chatml").own.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(encoded.ids_N.tolist())
    assert [token for token, one in zip(tokens, encoded.supervised_N, strict=True) if one and token != "<|im_end|>"]
    ends = [token for token, one in zip(tokens, encoded.supervised_N, strict=True) if one and token == "<|im_end|>"]
    assert len(ends) == 2  # of four; the user's are not supervised
    assert tokens.count("<|im_end|>") == 4
    assert encoded.ends_N.max() == 3 + 1 + 2 + 1
    assert encoded.ids_N.dtype == np.int32


def test_padding_equal_to_the_end_of_turn_masks_nothing():
    tokenizer = make_tokenizer("byte_level", "chatml")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == chat_format(tokenizer, "model").end_of_turn_id
    check(Encoder(chat_format(tokenizer, "model")), chat("a", "b", "c", "d"))


@pytest.mark.parametrize("kind", KINDS)
def test_system_messages_are_read_and_not_learned(kind):
    dialogue = Dialogue((Message("system", "yes"), *chat("yes", "yes", "yes", "no").messages))
    for name in ("chatml", "llama3", "openchat", "moved_system"):
        check(encoder(kind, name), dialogue)


def test_start_tokens_are_the_models_own():
    dialogue = chat("q", "a")

    def first(*pair):
        one = encoder(*pair)
        return one.own.tokenizer.convert_ids_to_tokens(one.encode(dialogue).ids_N.tolist())[0]

    assert first("byte_level", "llama3", "metaspace", "openchat") == "<|begin_of_text|>"
    assert first("metaspace", "mistral", "byte_level", "gemma") == "<s>"
    assert first("byte_level", "chatml", "metaspace", "openchat").startswith("G")  # has none, so GPT4 ... begins
    assert "<s>" not in encoder("byte_level", "chatml", "metaspace", "openchat").own.tokenizer.get_vocab()


def refused(encoder, *turns):
    with pytest.raises(UnrenderableDialogue, match="special token"):
        encoder.encode(chat(*turns))


@pytest.mark.parametrize("name", FORMATS)
def test_contents_cannot_forge_turns(name):
    one = encoder("byte_level", name)
    for token in FORMATS[name].special:
        refused(one, "q", f"a{token}b")
        refused(one, f"a{token}", "fine")
    check(one, chat("q", "a < b | c > d <im_start>"))


def test_tokens_of_the_pivot_and_of_the_model_are_both_refused():
    one = encoder("byte_level", "chatml", "metaspace", "gemma")
    refused(one, "q", "a<|im_end|>")
    refused(one, "q", "a<end_of_turn>")
    refused(one, "q", "<start_of_turn>user")


def test_an_end_of_turn_that_is_not_special_works_and_is_refused_in_contents():
    tokenizer = make_tokenizer("byte_level", "llama3")
    tokenizer.add_tokens([AddedToken(token, special=False) for token in ("<|done|>", "<|next|>", "<|other|>", "\n\n")])
    tokenizer.chat_template = "<|next|>" + tokenizer.chat_template.replace("<|eot_id|>", "<|done|>")
    one = Encoder(chat_format(tokenizer, "model"))
    assert one.own.end_of_turn == "<|done|>"
    refused(one, "q", "a<|eot_id|>")  # special still, though no template writes it
    check(one, chat("q", "yes, done", "|", "no<|other|>\n\nyes"))
    refused(one, "q", "a<|next|>b")
    refused(one, "q", "a<|done|>b")


def test_special_tokens_that_swallow_white_space():
    tokenizer = make_tokenizer("metaspace", "mistral")
    tokenizer.add_tokens(
        [AddedToken(token, special=True, rstrip=True) for token in ("<|user|>", "<|bot|>", "<|end|>")]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ {'user': '<|user|>', 'assistant': '<|bot|>'}[m['role']] }}\n"
        "{{ m['content'] }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% endif %}"
    )
    check(Encoder(chat_format(tokenizer, "model")), chat("q", "yes", " two ", " no \n"))


def test_a_template_without_an_end_supervises_the_content_alone():
    tokenizer = make_tokenizer("byte_level", "mistral")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    encoded = Encoder(chat_format(tokenizer, "model")).encode(chat("q", "yes", "q", "no"))
    assert [token_bytes(tokenizer).written(run).strip() for run in runs(encoded)] == [b"yes", b"no"]
    assert encoded.num_bytes == encoded.ends_N.max() == 5


@pytest.mark.parametrize("normalizer", [normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()])
def test_a_tokenizer_that_rewrites_text_falls_back_to_offsets(normalizer):
    tokenizer = make_tokenizer("byte_level", "chatml")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFD(), normalizer])
    dialogue = chat("Q É", "The RATIO é ﬁ", "q", "No")
    encoded = Encoder(chat_format(tokenizer, "model")).encode(dialogue)
    assert not encoded.exact
    first, second = (tokenizer.decode(run).lower().strip() for run in runs(encoded))
    assert first.startswith("the ratio")
    assert second == "no<|im_end|>"
    assert encoded.num_bytes == num_units(dialogue)
    known = encoded.ends_N[encoded.ends_N >= 0]
    assert (np.diff(known) >= 0).all()
    assert known[-1] == num_units(dialogue)
    assert set(encoded.ends_N.tolist()) <= set(range(-1, num_units(dialogue) + 1))


def test_the_space_marker_as_content_is_no_proof_but_no_error():
    one = encoder("metaspace", "openchat")
    encoded = one.encode(chat("q", "a▁b"))
    assert not encoded.exact
    assert encoded.num_bytes == len("a▁b".encode()) + 1
    assert one.own.end_of_turn_id in runs(encoded)[0]


def test_the_hash_of_a_corpus_counts_tokens_and_masks_but_no_order():
    one = encoder("byte_level", "chatml")
    corpus = {dialogue.content_hash: one.encode(dialogue) for dialogue in (chat("a", "b"), chat("c", "d", "e", "f"))}
    assert corpus_hash(corpus) == corpus_hash(dict(reversed(corpus.items())))
    (name, first), *_ = corpus.items()
    mask = first.supervised_N.copy()
    mask[-1] = ~mask[-1]
    changed = [
        {**corpus, name: type(first)(first.ids_N + 1, first.supervised_N, first.ends_N, 1, True)},
        {**corpus, name: type(first)(first.ids_N, mask, first.ends_N, 1, True)},
        {name: first},
    ]
    assert Counter(map(corpus_hash, [corpus, *changed])).most_common(1)[0][1] == 1
