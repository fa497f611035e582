"""Two tokenisers trained on the spot, the real pair, and the released aligner's outputs."""

import gzip
import json

import pytest
from tokenizer_pairs import CORPUS, SHARED, wrap
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusion.alignment import VocabularyPair


@pytest.fixture(scope="session")
def pivot() -> PreTrainedTokenizerFast:
    """SentencePiece-like: a dummy prefix, byte fallback, short pieces, `</s>`."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>", *byte_pieces]
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=special, limit_alphabet=45)
    backend.train_from_iterator([text.replace(" ", " ▁") for text in CORPUS], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in byte_pieces]
    return wrap(Tokenizer.from_str(json.dumps(spec)), "</s>")


@pytest.fixture(scope="session")
def source() -> PreTrainedTokenizerFast:
    """Byte-level BPE: longer pieces, `<|im_end|>`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=["<|im_end|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS * 3, trainer)
    return wrap(backend, "<|im_end|>")


@pytest.fixture(scope="session")
def pair(pivot, source) -> VocabularyPair:
    return VocabularyPair.of(pivot, source)


@pytest.fixture(scope="session")
def real_pair() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    if not SHARED.is_dir():
        pytest.skip("no ../shared")
    mistral, qwen = (AutoTokenizer.from_pretrained(SHARED / "tokenizers" / n) for n in ("mistral-32k", "qwen-151k"))
    return mistral, qwen


@pytest.fixture(scope="session")
def golden() -> dict:
    if not SHARED.is_dir():
        pytest.skip("no ../shared")
    with gzip.open(SHARED / "fixtures/released_alignment.json.gz") as file:
        return json.load(file)
