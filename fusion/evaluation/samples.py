"""A few answers of a model, written out, so that models can be read side by side and not only counted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from fusion.dialogues.dialogue import Dialogue, Message
from fusion.dialogues.encode import Encoder
from fusion.dialogues.template import UnrenderableDialogue
from fusion.evaluation.answers import fitting, max_new_tokens_within
from fusion.evaluation.sampling import Draw, continuations, stop_ids_of

GREEDY = Draw(0.0, 0)
ASSISTANT = "assistant"
SPEAKERS = {"system": "System", "user": "Asked", ASSISTANT: "Answered"}


@dataclass(frozen=True)
class Sample:
    """A question, the right answer, and what the model answers."""

    category: str
    question: str
    """Everything that was said before; of several turns each with its speaker."""
    reference: str
    answer: str


@dataclass(frozen=True)
class SampleSettings:
    """The dialogues whose last turn is answered, and the length at which an answer is cut."""

    dialogues: tuple[Dialogue, ...] = ()
    max_new_tokens: int = 64


def choose_samples(
    test: Sequence[Dialogue], heldout: Sequence[Dialogue], per_category: int, max_new_tokens: int
) -> SampleSettings:
    """The first few dialogues of every category: test dialogues, or held-out ones where there are none."""
    seen: Counter[str] = Counter()
    chosen = []
    for dialogue in test or heldout:
        if dialogue.messages[-1].role == ASSISTANT and seen[dialogue.category] < per_category:
            seen[dialogue.category] += 1
            chosen.append(dialogue)
    return SampleSettings(tuple(chosen), max_new_tokens)


def sample_answers(
    model: PreTrainedModel, encoder: Encoder, vocab_size: int, settings: SampleSettings
) -> list[Sample]:
    """The most likely answer to every dialogue, all in one batch; those that the template refuses are left out."""
    room = max_new_tokens_within(model, settings.max_new_tokens)
    prompts, asked = [], []
    for dialogue in settings.dialogues:
        try:
            prompts.append(fitting(model, encoder.encode_prompt(dialogue.messages[:-1]), room))
        except UnrenderableDialogue:
            continue
        asked.append(dialogue)
    if not prompts:
        return []
    stops = stop_ids_of(model, encoder.own.end_of_turn_id)
    written = continuations(model, vocab_size, prompts, [GREEDY] * len(prompts), stops, room)
    texts = [str(encoder.own.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written]
    return [_sample(dialogue, text) for dialogue, text in zip(asked, texts, strict=True)]


def _sample(dialogue: Dialogue, answer: str) -> Sample:
    *before, last = dialogue.messages
    return Sample(dialogue.category, _told(before), last.content, answer)


def _told(messages: Sequence[Message]) -> str:
    if len(messages) == 1:
        return messages[0].content
    return "\n".join(f"{SPEAKERS[message.role]}: {message.content}" for message in messages)
