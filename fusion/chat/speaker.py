"""A model that takes part in a chat: it remembers what it was asked and said, and answers piece by piece."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from threading import Event, Thread
from typing import TypeAlias

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import TextStreamer

from fusion.config import UserError, raise_problems
from fusion.config.schema import ModelConfig
from fusion.dialogues.dialogue import Message
from fusion.evaluation.answers import fitting, max_new_tokens_within
from fusion.evaluation.candidate import Candidate
from fusion.evaluation.entries import model_folder, short_name, unique_names
from fusion.evaluation.sampling import Draw, continuations, stop_ids_of

Queue: TypeAlias = "SimpleQueue[str | BaseException | None]"


class _Pieces(TextStreamer):
    """Hands out text as soon as its words are complete; None is the end. Ends the generation when `stop` is set."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, queue: Queue, stop: Event) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._queue, self._stop = queue, stop

    def put(self, value: Tensor) -> None:
        if self._stop.is_set():
            raise InterruptedError("nobody reads the answer on")
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._queue.put(text)


@dataclass
class Speaker:
    """One model and its side of the talk."""

    candidate: Candidate
    temperature: float = 0.0
    max_new_tokens: int = 512
    seed: int = 0
    messages: list[Message] = field(default_factory=list)

    @classmethod
    def of(cls, model: ModelConfig, pivot: ModelConfig, **settings: float) -> "Speaker":
        """Raises UserError for models that cannot be read."""
        speaker = cls(Candidate.of_folder(model, pivot), **settings)  # type: ignore[arg-type]
        speaker.candidate.module()
        return speaker

    @property
    def name(self) -> str:
        return self.candidate.name

    def forget(self) -> None:
        """Begin a new talk."""
        self.messages.clear()

    def answer(self, question: str) -> Iterator[str]:
        """The answer in pieces; it is remembered when the last piece is taken.

        Raises UnrenderableDialogue where the template refuses the question; the talk is then as before it.
        """
        asked = [*self.messages, Message("user", question)]
        prompt_N = self.candidate.reader.encoder.encode_prompt(asked)
        queue: Queue = SimpleQueue()
        stop = Event()
        name = f"{self.name} answers"
        writer = Thread(target=self._write, args=(prompt_N, queue, stop), name=name, daemon=True)
        writer.start()
        said = ""
        try:
            while (piece := queue.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                said += piece
                yield piece
        finally:  # nobody reads on: the model is free for the next question when this returns
            stop.set()
            writer.join()
        self.messages = [*asked, Message("assistant", said.strip())]

    def _write(self, prompt_N: np.ndarray, queue: Queue, stop: Event) -> None:
        module, reader = self.candidate.module(), self.candidate.reader
        room = max_new_tokens_within(module, self.max_new_tokens)
        draw = Draw.named(self.temperature, self.seed, self.name, len(self.messages))
        try:
            continuations(
                module,
                reader.vocab_size,
                [fitting(module, prompt_N, room)],
                [draw],
                stop_ids_of(module, reader.end_of_turn_id),
                room,
                _Pieces(reader.tokenizer, queue, stop),
            )
        except BaseException as error:  # it belongs to whoever reads the pieces
            queue.put(error)
        else:
            queue.put(None)


def speakers(paths: list[str], **settings: float) -> list[Speaker]:
    """A speaker per model folder, hub id or run folder; one without a chat template reads the first one's.

    Raises UserError with every model that cannot be read, before any weights are loaded.
    """
    names = unique_names([short_name(path) for path in paths])
    models = [ModelConfig(name, model_folder(path), dtype="auto") for name, path in zip(names, paths, strict=True)]
    found, problems = [], []
    for model in models:
        try:
            found.append(Candidate.of_folder(model, models[0]))
        except UserError as error:
            problems += error.problems
    raise_problems(list(dict.fromkeys(problems)))
    for candidate in found:
        candidate.module()
    return [Speaker(candidate, **settings) for candidate in found]  # type: ignore[arg-type]
