"""Scores of one model: exact match of the greedy answer per skill, and NLL per byte on held-out dialogues.

The last assistant turn of a test dialogue is the right answer. The greedy answer equals it token for token exactly
when, reading the right answer, the most likely token is the right one at every position, the end-of-turn included; so
one forward pass scores it, without generating.

Array legend: R supervised rows of a dialogue.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fusion.cache import cached_folder, code_version, fingerprint, write_json
from fusion.config import UserError
from fusion.config.schema import ModelConfig
from fusion.dialogues.dialogue import Dialogue
from fusion.dialogues.encode import Encoded, Encoder
from fusion.dialogues.reader import Reader, encode_all
from fusion.evaluation.samples import SampleSettings, sample_answers
from fusion.teaching.causal_lm import embedding_rows, load_causal_lm, on_device
from fusion.teaching.forward import RowReader, token_batches

AVERAGE = "average"
NO_CATEGORY = "all"
NO_SAMPLES = SampleSettings()
MODEL_CODE = ("fusion.evaluation", "fusion.teaching", "fusion.dialogues")


@dataclass(frozen=True)
class Scores:
    scores: dict[str, float]
    """Share of right answers by skill, and `average`, the mean over skills; empty without test dialogues."""
    num_items: dict[str, int]
    """Scored test dialogues by skill."""
    nll_per_byte: float | None
    """Nats per byte of assistant text on the held-out dialogues."""
    items: dict[str, bool]
    """Right or wrong by content hash of the test dialogue."""
    heldout: dict[str, list[float]] = field(default_factory=dict)
    """Nats and bytes by content hash of the held-out dialogue."""
    samples: list[dict[str, str]] = field(default_factory=list)
    """Answers that were written out: the fields of `Sample`."""


@dataclass(frozen=True)
class RowResults:
    nll_R: np.ndarray
    """float32 nats of each reference token."""
    right_R: np.ndarray
    """bool: the most likely token is the reference."""


def read_results(
    model: PreTrainedModel, vocab_size: int, encoded: Mapping[str, Encoded], batch_tokens: int
) -> Iterator[tuple[str, RowResults]]:
    """Content hash and results of every dialogue, in length buckets."""
    reader = RowReader(model, vocab_size)
    order = sorted(encoded, key=lambda name: (len(encoded[name].ids_N), name))
    for positions in token_batches([len(encoded[name].ids_N) for name in order], batch_tokens):
        names = [order[position] for position in positions]
        nll: list[np.ndarray] = []
        right: list[np.ndarray] = []
        for logits_RV, references_R in reader.chunks([encoded[name] for name in names]):
            chosen = logits_RV.gather(-1, references_R.unsqueeze(-1)).squeeze(-1)
            nll.append((logits_RV.logsumexp(-1) - chosen).cpu().numpy())
            right.append((logits_RV.argmax(-1) == references_R).cpu().numpy())
        bounds = np.cumsum([0, *(len(encoded[name].rows_R) for name in names)])
        all_nll, all_right = np.concatenate(nll), np.concatenate(right)
        for name, first, last in zip(names, bounds[:-1], bounds[1:], strict=True):
            yield name, RowResults(all_nll[first:last], all_right[first:last])


def nll_per_byte(model: PreTrainedModel, vocab_size: int, encoded: Mapping[str, Encoded], batch_tokens: int) -> float:
    """Nats per byte of assistant text, end-of-turn counted as one byte, over all dialogues together."""
    return _per_byte(nats_and_bytes(model, vocab_size, encoded, batch_tokens))


def nats_and_bytes(
    model: PreTrainedModel, vocab_size: int, encoded: Mapping[str, Encoded], batch_tokens: int
) -> dict[str, list[float]]:
    """Nats and bytes of the assistant text of every dialogue, by content hash."""
    return {
        name: [float(results.nll_R.sum(dtype=np.float64)), float(encoded[name].num_bytes)]
        for name, results in read_results(model, vocab_size, encoded, batch_tokens)
    }


def _per_byte(dialogues: Mapping[str, Sequence[float]]) -> float:
    return sum(nats for nats, _ in dialogues.values()) / sum(size for _, size in dialogues.values())


def score_model(
    model: PreTrainedModel,
    encoder: Encoder,
    vocab_size: int,
    test: Sequence[Dialogue],
    heldout: Sequence[Dialogue],
    batch_tokens: int,
    samples: SampleSettings = NO_SAMPLES,
) -> Scores:
    """Score a loaded model on dialogues that it reads through `encoder`."""
    reader = Reader(ModelConfig(), encoder)
    (test_tokens,), _ = encode_all([reader], test)
    (heldout_tokens,), _ = encode_all([reader], heldout)
    items = {
        name: bool(results.right_R[last_turn(test_tokens[name], encoder.own.end_of_turn_id)].all())
        for name, results in read_results(model, vocab_size, test_tokens, batch_tokens)
    }
    skills: dict[str, list[bool]] = {}
    for dialogue in test:
        if dialogue.content_hash in items:
            skills.setdefault(dialogue.category or NO_CATEGORY, []).append(items[dialogue.content_hash])
    scores = {skill: float(np.mean(right)) for skill, right in skills.items()}
    if scores:
        scores[AVERAGE] = float(np.mean(list(scores.values())))
    losses = nats_and_bytes(model, vocab_size, heldout_tokens, batch_tokens)
    return Scores(
        scores,
        {skill: len(right) for skill, right in skills.items()},
        _per_byte(losses) if losses else None,
        dict(sorted(items.items())),
        dict(sorted(losses.items())),
        [vars(one) for one in sample_answers(model, encoder, vocab_size, samples)],
    )


def last_turn(encoded: Encoded, end_of_turn_id: int) -> np.ndarray:
    """bool [R]: rows of the last assistant turn, its end-of-turn included."""
    ends_turn_R = encoded.ids_N[encoded.rows_R + 1] == end_of_turn_id
    turn_R = np.cumsum(ends_turn_R) - ends_turn_R
    return turn_R == turn_R[-1]


def score_folder(
    reader: Reader,
    test: Sequence[Dialogue],
    heldout: Sequence[Dialogue],
    batch_tokens: int,
    cache: Path,
    samples: SampleSettings = NO_SAMPLES,
) -> Scores:
    """Score the model of `reader` (a folder or a hub model) once: the scores are kept in the cache."""
    model = reader.model
    key = {
        "model": reader.identity,
        "dtype": model.dtype,
        "template": str(reader.encoder.template.tokenizer.chat_template),
        "test": fingerprint({"test": [dialogue.to_json() for dialogue in test]}),
        "heldout": fingerprint({"heldout": [dialogue.to_json() for dialogue in heldout]}),
        "samples": [dialogue.content_hash for dialogue in samples.dialogues],
        "sample_tokens": samples.max_new_tokens,
        "max_length": reader.encoder.max_length,
        "batch_tokens": batch_tokens,
        "threads": torch.get_num_threads(),
        "code": code_version(*MODEL_CODE),
    }

    def build(folder: Path) -> None:
        loaded = on_device(load_causal_lm(model))
        scores = score_model(loaded, reader.encoder, reader.vocab_size, test, heldout, batch_tokens, samples)
        write_json(folder / "scores.json", vars(scores))

    return Scores(**_read(cached_folder(cache, "scores", key, build) / "scores.json"))


def score_weights(
    reader: Reader,
    weights: Mapping[str, Tensor],
    test: Sequence[Dialogue],
    heldout: Sequence[Dialogue],
    batch_tokens: int,
    samples: SampleSettings = NO_SAMPLES,
    model: ModelConfig | None = None,
) -> Scores:
    """Score other weights, which need not be on the disk, in `model` (default: that of `reader`).

    They have its shapes, but for the rows of tokens, which are those of `reader`.
    """
    loaded = on_device(load_causal_lm(model or reader.model))
    take_weights(loaded, weights)
    return score_model(loaded, reader.encoder, reader.vocab_size, test, heldout, batch_tokens, samples)


def take_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """Give `model` the weights of a state dict as files hold it: tied heads are not in it.

    Its embedding and head get as many rows as there are.
    """
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding) + ".weight"
    if name in weights and len(weights[name]) != embedding_rows(model):
        model.resize_token_embeddings(len(weights[name]), mean_resizing=False)
    model.load_state_dict(dict(weights), strict=False)
    model.tie_weights()


def _read(path: Path) -> dict:
    import json

    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: kept scores cannot be read ({error}); delete this folder to score again") from error
