"""Answers of a model to questions of one or more turns; kept in the cache, so that a killed run goes on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from fusion.cache import cached_folder, code_version, fingerprint, write_json
from fusion.config import UserError
from fusion.config.evaluation import EndpointConfig, GenerationConfig
from fusion.dialogues.dialogue import Message
from fusion.dialogues.template import UnrenderableDialogue
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.endpoint import Endpoint, Question, endpoint_problems
from fusion.evaluation.sampling import Draw, continuations, stop_ids_of

MODEL_CODE = ("fusion.evaluation.answers", "fusion.evaluation.sampling", "fusion.dialogues", "fusion.teaching")


@dataclass(frozen=True)
class Prompt:
    """User turns that are answered one after the other."""

    name: str
    turns: tuple[str, ...]
    temperature: float = 0.0


@dataclass(frozen=True)
class Answer:
    name: str
    turns: tuple[str, ...]
    """Assistant turns, one per user turn."""


class Generator(Protocol):
    """Whatever lets models answer."""

    def answers(self, candidate: Candidate, prompts: Sequence[Prompt], seed: int) -> list[Answer]:
        """Answers in the order of `prompts`; equal seeds give equal answers."""
        ...


@dataclass(frozen=True)
class LocalGenerator:
    """transformers, in fixed batches: a batch is what a killed run loses at most, and what decides the bytes."""

    settings: GenerationConfig
    cache: Path

    def answers(self, candidate: Candidate, prompts: Sequence[Prompt], seed: int) -> list[Answer]:
        key = {
            "model": candidate.identity,
            "dtype": candidate.reader.model.dtype,
            "template": str(candidate.reader.encoder.template.tokenizer.chat_template),
            "prompts": fingerprint({"prompts": list(prompts)}),
            "seed": seed,
            "batch_size": self.settings.batch_size,
            "max_new_tokens": self.settings.max_new_tokens,
            "threads": torch.get_num_threads(),
            "code": code_version(*MODEL_CODE),
        }

        def build(folder: Path) -> None:
            size = self.settings.batch_size
            for number, start in enumerate(range(0, len(prompts), size)):
                batch = prompts[start : start + size]
                file = folder / f"{number:05}.json"
                if not file.is_file():
                    found = _answer_batch(candidate, batch, seed, self.settings.max_new_tokens)
                    write_json(file, [vars(one) for one in found])

        return [
            Answer(one["name"], tuple(one["turns"]))
            for file in sorted(cached_folder(self.cache, "answers", key, build).glob("[0-9]*.json"))
            for one in json.loads(file.read_text("utf-8"))
        ]


@dataclass(frozen=True)
class ServerGenerator:
    """An OpenAI-compatible server that serves every model under its name; its replies are kept."""

    settings: GenerationConfig
    cache: Path

    def answers(self, candidate: Candidate, prompts: Sequence[Prompt], seed: int) -> list[Answer]:
        endpoint = Endpoint(_endpoint_settings(self.settings, candidate.name), self.cache)
        turns: list[tuple[str, ...]] = [() for _ in prompts]
        for turn in range(max((len(prompt.turns) for prompt in prompts), default=0)):
            asked = [number for number, prompt in enumerate(prompts) if len(prompt.turns) > turn]
            questions = [self._question(prompts[number], turns[number], seed) for number in asked]
            for number, reply in zip(asked, endpoint.ask_all(questions), strict=True):
                turns[number] += (reply.text.strip(),)
        return [Answer(prompt.name, given) for prompt, given in zip(prompts, turns, strict=True)]

    def _question(self, prompt: Prompt, given: tuple[str, ...], seed: int) -> Question:
        messages = tuple({"role": one.role, "content": one.content} for one in dialogue_so_far(prompt, given))
        return Question(messages, prompt.temperature, self.settings.max_new_tokens, seed=seed)


def _endpoint_settings(settings: GenerationConfig, model: str) -> EndpointConfig:
    return EndpointConfig(
        base_url=settings.base_url,
        model=model,
        key_variable=settings.key_variable,
        concurrency=settings.concurrency,
        timeout_s=settings.timeout_s,
    )


def server_problems(settings: GenerationConfig) -> list[str]:
    """Why the server of `settings` cannot be asked."""
    return endpoint_problems(_endpoint_settings(settings, "any"), "generation")


def make_generator(settings: GenerationConfig, cache: Path) -> Generator:
    """A server where the settings name one, else transformers in this process."""
    return ServerGenerator(settings, cache) if settings.base_url else LocalGenerator(settings, cache)


def dialogue_so_far(prompt: Prompt, given: Sequence[str]) -> list[Message]:
    """Questions with the answers that were given, and the next question."""
    turns = [Message("user", prompt.turns[0])]
    for answer, question in zip(given, prompt.turns[1:], strict=False):
        turns += [Message("assistant", answer), Message("user", question)]
    return turns


def _answer_batch(candidate: Candidate, batch: Sequence[Prompt], seed: int, max_new_tokens: int) -> list[Answer]:
    module = candidate.module()
    room = max_new_tokens_within(module, max_new_tokens)
    turns: list[tuple[str, ...]] = [() for _ in batch]
    for turn in range(max(len(prompt.turns) for prompt in batch)):
        asked = [number for number, prompt in enumerate(batch) if len(prompt.turns) > turn]
        texts = _spoken(
            candidate,
            [dialogue_so_far(batch[number], turns[number]) for number in asked],
            [Draw.named(batch[number].temperature, seed, batch[number].name, turn) for number in asked],
            room,
        )
        for number, text in zip(asked, texts, strict=True):
            turns[number] += (text,)
    return [Answer(prompt.name, given) for prompt, given in zip(batch, turns, strict=True)]


def _spoken(
    candidate: Candidate, dialogues: Sequence[Sequence[Message]], draws: Sequence[Draw], max_new_tokens: int
) -> list[str]:
    """The assistant's next turn in every dialogue; empty where the template refuses the dialogue."""
    module, reader = candidate.module(), candidate.reader
    texts = [""] * len(dialogues)
    prompts: dict[int, np.ndarray] = {}
    for number, messages in enumerate(dialogues):
        try:
            prompts[number] = fitting(module, reader.encoder.encode_prompt(messages), max_new_tokens)
        except UnrenderableDialogue as error:
            if len(messages) == 1:  # a first question that cannot be asked is no answer of the model
                raise UserError(f"{candidate.name}: a question cannot be asked: {error}") from error
    if not prompts:
        return texts
    stop_ids = stop_ids_of(module, reader.end_of_turn_id)
    chosen = [draws[number] for number in prompts]
    written = continuations(module, reader.vocab_size, list(prompts.values()), chosen, stop_ids, max_new_tokens)
    for number, ids in zip(prompts, written, strict=True):
        texts[number] = str(reader.tokenizer.decode(ids, skip_special_tokens=True)).strip()
    return texts


def context_length(module: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None where its config does not say."""
    length = getattr(module.config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def max_new_tokens_within(module: PreTrainedModel, max_new_tokens: int) -> int:
    """At most half of the model's positions, so that the question has room as well."""
    length = context_length(module)
    return min(max_new_tokens, length // 2) if length else max_new_tokens


def fitting(module: PreTrainedModel, prompt_N: np.ndarray, max_new_tokens: int) -> np.ndarray:
    """`prompt_N` without its beginning where it and the answer are longer than the model's positions."""
    length = context_length(module)
    return prompt_N[-(length - max_new_tokens) :] if length else prompt_N


def answer_lines(
    model: str, benchmark: str, seed: int, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[dict[str, Any]]:
    """Lines of `answers.jsonl`, in FastChat's format."""
    return [
        {
            "question_id": int(one.name) if one.name.isdecimal() else one.name,
            "model_id": model,
            "benchmark": benchmark,
            "seed": seed,
            "questions": list(prompt.turns),
            "choices": [{"index": 0, "turns": list(one.turns)}],
        }
        for prompt, one in zip(prompts, answers, strict=True)
    ]
