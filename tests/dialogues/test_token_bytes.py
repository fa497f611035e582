"""Every kind of tokeniser, trained on the spot: its bytes are the text's bytes, whatever the text."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion.config import UserError
from fusion.dialogues.token_bytes import offset_ends, token_bytes

SHARED = Path(__file__).resolve().parents[2] / "../shared"
CORPUS = [
    "The ratio of poles and wires is 1:3.",
    "  two leading  spaces\n\nand lines",
    "naïve café 北京 日本語 👍🏽 e\u0301",
] * 4
SPECIAL = ["<s>", "</s>", "<|user|>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte_level", "byte_level_prefix", "metaspace", "metaspace_first", "prepend_replace", "unigram")

texts = st.text(
    st.sampled_from("aeTh  \n\t13:.é北本👍\U0001f3fde\u0301\u200dßÿĠ")
    | st.characters(exclude_characters="▁", exclude_categories=["Cs"])
)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def _byte_level(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "byte_level_prefix")
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def _space_marked(kind: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if kind == "prepend_replace":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if kind == "metaspace_first" else "always"
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *SPECIAL, *BYTES], limit_alphabet=40)
    backend.train_from_iterator(CORPUS, trainer)
    return _with_plain_bytes(backend)


def _with_plain_bytes(backend: Tokenizer) -> Tokenizer:
    """The trainer adds byte pieces as special tokens; real tokenisers have them in the vocabulary only."""
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return Tokenizer.from_str(json.dumps(spec))


def _unigram() -> Tokenizer:
    letters = sorted(set("".join(CORPUS).replace(" ", "▁")))
    pieces = ["<unk>", *SPECIAL, *BYTES, "▁The", "▁and", "and", "re", *letters]
    scores = [0.0 if token < 260 else -float(token % 7 + 1) for token in range(len(pieces))]
    backend = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", *SPECIAL])
    return backend


@pytest.fixture(scope="module")
def trained() -> dict[str, PreTrainedTokenizerFast]:
    makers = {kind: _byte_level if kind.startswith("byte") else _space_marked for kind in KINDS[:-1]}
    return {kind: _wrap(make(kind)) for kind, make in makers.items()} | {"unigram": _wrap(_unigram())}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(turns=st.lists(texts, min_size=1, max_size=3))
def test_tokens_spell_the_text_and_its_special_tokens(trained, kind, turns):
    tokenizer = trained[kind]
    text = "</s>".join(turns)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = token_bytes(tokenizer).text_ends(ids, text.encode())
    assert ends is not None
    assert np.all(np.diff(ends) >= 0)
    assert not ids or ends[-1] == len(text.encode())


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(text=texts)
def test_width_is_content_only(trained, kind, text):
    tokenizer = trained[kind]
    table, ids = token_bytes(tokenizer), tokenizer(text, add_special_tokens=False).input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Two of the kinds read a text with and without a first space alike.
    alike = kind in ("byte_level_prefix", "metaspace", "metaspace_first", "unigram")
    said = table.joined([bos, *ids, eos])
    assert said == text.encode() or (alike and b" " + said == text.encode())
    assert table.ends([bos, *ids, eos])[-1] == len(said)
    assert table.ends(ids).tolist() == table.ends([bos, *ids, eos])[1:-1].tolist()
    assert table.text_ends([bos, *ids, eos], text.encode()) is not None


def test_special_tokens_are_events_with_a_literal(trained):
    tokenizer = trained["metaspace"]
    table = token_bytes(tokenizer)
    ids = tokenizer.convert_tokens_to_ids(SPECIAL)
    assert table.ends(ids).tolist() == [0, 0, 0]
    assert set(ids) <= set(table.special.tolist())
    assert [table.literal(token) for token in ids] == [token.encode() for token in SPECIAL]


def test_absent_dummy_prefix_has_no_width(trained):
    tokenizer = trained["metaspace"]
    text = "北<|user|>The"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = token_bytes(tokenizer).text_ends(ids, text.encode())
    user = ids.index(tokenizer.convert_tokens_to_ids("<|user|>"))
    assert ends[user] == len("北<|user|>".encode())
    assert tokenizer.convert_ids_to_tokens(ids[user + 1]).startswith("▁")
    assert ends[-1] == len(text.encode())


def test_other_text_is_refused(trained):
    for tokenizer in trained.values():
        ids = tokenizer("The ratio", add_special_tokens=False).input_ids
        assert token_bytes(tokenizer).text_ends(ids, b"The ratia") is None
        assert token_bytes(tokenizer).text_ends(ids, b"The ratio is") is None
        assert token_bytes(tokenizer).text_ends(ids, b"The rati") is None


def test_special_token_that_swallows_white_space():
    backend = _byte_level("byte_level")
    backend.add_special_tokens([AddedToken("<|end|>", special=True, lstrip=True, rstrip=True, normalized=False)])
    tokenizer, text = _wrap(backend), "The \n<|end|>\n  two"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ends = token_bytes(tokenizer).text_ends(ids, text.encode())
    assert ends[ids.index(tokenizer.convert_tokens_to_ids("<|end|>"))] == text.index("two")
    assert ends[-1] == len(text)


def test_added_text_tokens_keep_their_bytes(trained):
    tokenizer = _wrap(_byte_level("byte_level"))
    before = token_bytes(tokenizer)
    tokenizer.add_tokens(["<tool>"])
    table, ids = token_bytes(tokenizer), tokenizer("The<tool>é").input_ids
    assert table is not before
    assert table.joined(ids) == "The<tool>é".encode()


def test_equal_strings_prefer_pieces_over_bytes(trained):
    table = token_bytes(trained["metaspace"])
    tokenizer = trained["metaspace"]
    assert table.id_of[b"e"] == tokenizer.convert_tokens_to_ids("e") != tokenizer.convert_tokens_to_ids("<0x65>")
    assert table.id_of[b"\xff"] == tokenizer.convert_tokens_to_ids("<0xFF>")
    assert b"</s>" not in table.id_of


def test_table_is_built_once_and_named_by_content(trained):
    tokenizer = trained["byte_level"]
    assert token_bytes(tokenizer) is token_bytes(tokenizer)
    assert token_bytes(tokenizer).fingerprint == token_bytes(_wrap(tokenizer.backend_tokenizer)).fingerprint
    assert len({token_bytes(trained[kind]).fingerprint for kind in ("byte_level", "metaspace", "unigram")}) == 3


def test_rows_beyond_the_tokeniser_are_nothing(trained):
    table = token_bytes(trained["byte_level"])
    assert table[len(table) + 5] == b""
    assert table[-1] == b""


def test_word_piece_and_slow_tokenisers_are_refused():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path="some/bert")
    with pytest.raises(UserError, match=r"some/bert.*WordPiece"):
        token_bytes(tokenizer)

    class Slow:
        def __len__(self) -> int:
            return 0

    with pytest.raises(UserError, match="only fast tokenisers"):
        token_bytes(Slow())


def test_offsets_prove_boundaries_where_the_text_is_rewritten():
    backend = _byte_level("byte_level")
    backend.normalizer = normalizers.NFC()
    tokenizer, text = _wrap(backend), "e\u0301 The 👍🏽"
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert token_bytes(tokenizer).text_ends(encoded.input_ids, text.encode()) is None
    ends = offset_ends([(0, 0), *encoded.offset_mapping, (0, 0)], text)
    known = ends[ends >= 0]
    assert np.all(np.diff(known) >= 0)
    assert {0, 3, len(text.encode())} <= set(known.tolist())
    assert 1 not in known
    boundaries = {len(text[:index].encode()) for index in range(len(text) + 1)}
    assert set(known.tolist()) <= boundaries


@pytest.mark.parametrize("name", ["mistral-32k", "qwen-151k"])
def test_real_tokenisers_on_real_dialogues(name):
    if not SHARED.is_dir():
        pytest.skip("no ../shared")
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    table = token_bytes(tokenizer)
    for line in (SHARED / "data/gsm8k_dialogues.jsonl").read_text("utf-8").splitlines()[::8]:
        contents = [message["content"] for message in json.loads(line)["messages"]]
        text = tokenizer.eos_token.join([*contents, ""])
        ids = tokenizer(text).input_ids
        ends = table.text_ends(ids, text.encode())
        assert ends is not None
        assert ends[-1] == len(text.encode())
        assert table.joined(tokenizer(contents[0]).input_ids).removeprefix(b" ") == contents[0].encode().removeprefix(
            b" "
        )
