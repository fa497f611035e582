"""Pairs of tokenisers of every sort, trained on the spot, and what their rows have read, found without byte ends."""

import json
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion.alignment import Rows, VocabularyPair
from fusion.dialogues.token_bytes import TokenBytes
from fusion.teaching.store import TeacherRows

SHARED = Path(__file__).resolve().parents[2] / "../shared"
SPOKEN = "The ratio of poles and wires is 1:3. They calculated the calculation of the poles, 北京 and 日本語 👍🏽."
CORPUS = [SPOKEN, "  two leading  spaces\n\nand lines", "naïve café e\u0301"]
PAIRS = ("pieces<-bytes", "bytes<-pieces", "bytes<-bytes", "pieces<-unigram", "unigram<-bytes")
END = b"\xff"  # stands for an end of turn; no UTF-8 text holds it


def wrap(backend: Tokenizer, end_of_turn: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end_of_turn)


def make_pairs(pieces: PreTrainedTokenizerFast, byte_level: PreTrainedTokenizerFast) -> dict[str, VocabularyPair]:
    tokenizers = {"pieces": pieces, "bytes": byte_level, "unigram": unigram(), "short bytes": short_byte_level()}
    names = [name.split("<-") for name in PAIRS]
    names[PAIRS.index("bytes<-bytes")][0] = "short bytes"
    return {
        name: VocabularyPair.of(tokenizers[pivot], tokenizers[source])
        for name, (pivot, source) in zip(PAIRS, names, strict=True)
    }


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece Unigram: a dummy prefix before every segment, byte fallback."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    backend.train_from_iterator(CORPUS * 2, trainer)
    trained = backend.to_str()
    spec = json.loads(trained)
    spec["model"]["byte_fallback"] = True
    spec["model"]["vocab"] += [[piece, -20.0] for piece in byte_pieces]
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return wrap(backend, "</s>")


def short_byte_level() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["all the poles are calculated", "a wire, the ratio of two 北京"], trainer)
    return wrap(backend, "<eos>")


@dataclass
class Side:
    """One sequence as bytes: what each token is, what it adds to the text, and what has been read at each row."""

    raw: list[bytes]
    added: list[bytes]
    read: list[bytes]

    def lost_space(self, token: int) -> bool:
        return token < len(self.raw) and self.raw[token] != self.added[token] and self.added[token] != END


def read_sides(
    pair: VocabularyPair, pivot_ids: list[int], source_ids: list[int], turns: list[str]
) -> tuple[Side, Side] | None:
    """None if the tokens of one side do not spell the turns, dummy prefixes apart. A space that both add is text."""
    sides = (pair.pivot, pivot_ids, pair.pivot_end_of_turn), (pair.source, source_ids, pair.source_end_of_turn)
    split = [_turns(*side) for side in sides]
    texts = [turn.encode("utf-8") for turn in turns]
    for number, text in enumerate(texts):
        if all(b"".join(turns[number]) == b" " + text for turns in split):
            texts[number] = b" " + text
    pivot, source = (_read(turns, texts) for turns in split)
    return None if pivot is None or source is None else (pivot, source)


def _turns(table: TokenBytes, ids: list[int], end_of_turn: int) -> list[list[bytes]]:
    turns: list[list[bytes]] = [[]]
    for token in ids:
        if token == end_of_turn:
            turns.append([])
        else:
            turns[-1].append(table[token])
    return turns[:-1]


def _read(turns: list[list[bytes]], texts: list[bytes]) -> Side | None:
    raw: list[bytes] = []
    added: list[bytes] = []
    for turn, text in zip(turns, texts, strict=True):
        raw += [*turn, b""]
        if b"".join(turn) == b" " + text:
            turn = [turn[0][1:], *turn[1:]]
        if b"".join(turn) != text:
            return None
        added += [*turn, END]
    return Side(raw, added, list(accumulate(added)))


def teacher_of(source: Rows, size: int, seed: int, width: int = 6) -> TeacherRows:
    """Random rows; one candidate is the reference, some are missing, some beyond the tokeniser's own ids."""
    generator = np.random.default_rng(seed)
    rows = max(len(source) - 1, 0)
    ids = np.array([generator.permutation(size + 5)[:width] for _ in range(rows)], dtype=np.int32).reshape(rows, width)
    for row, reference in enumerate(source.next[:rows].tolist()):
        if reference not in ids[row]:
            ids[row, 1] = reference
    masses = generator.dirichlet(np.full(width + 1, 0.5), rows)
    logs = np.log(masses[:, :width] + 1e-6).astype(np.float32)
    missing = generator.random((rows, width)) < 0.1
    ids[missing], logs[missing] = -1, -np.inf
    return TeacherRows(ids, logs, masses[:, width].astype(np.float32), generator.exponential(2.0, rows))
