"""Dialogues longer than a model reads, split between turns: https://arxiv.org/abs/2402.16107 made its data so."""

from collections.abc import Iterator, Sequence

from fusion.dialogues.dialogue import Dialogue, Message
from fusion.dialogues.encode import Encoder
from fusion.dialogues.template import UnrenderableDialogue


def split_long(dialogues: Sequence[Dialogue], encoder: Encoder, max_length: int) -> list[Dialogue]:
    """`dialogues` in order, those of more than `max_length` tokens as several.

    A piece begins with a user turn, behind the system message of the whole, and holds as many rounds as fit. A single
    round that is too long stays whole, and is cut where it is read; so does a dialogue that cannot be rendered.
    """
    return [piece for dialogue in dialogues for piece in _pieces(dialogue, encoder, max_length)]


def _pieces(dialogue: Dialogue, encoder: Encoder, max_length: int) -> list[Dialogue]:
    try:
        if encoder.num_tokens(dialogue) <= max_length:
            return [dialogue]
        return list(_filled(dialogue, encoder, max_length))
    except UnrenderableDialogue:
        return [dialogue]


def _filled(dialogue: Dialogue, encoder: Encoder, max_length: int) -> Iterator[Dialogue]:
    system, rounds = _rounds(dialogue)
    piece: list[Message] = []
    for turns in rounds:
        longer = Dialogue((*system, *piece, *turns), dialogue.category)
        if piece and encoder.num_tokens(longer) > max_length:
            yield Dialogue((*system, *piece), dialogue.category)
            piece = []
        piece += turns
    yield Dialogue((*system, *piece), dialogue.category)


def _rounds(dialogue: Dialogue) -> tuple[list[Message], list[list[Message]]]:
    """The system message, and the other turns in groups that each begin where a user speaks and end with an answer."""
    system = [message for message in dialogue.messages[:1] if message.role == "system"]
    rounds: list[list[Message]] = []
    for message in dialogue.messages[len(system) :]:
        if not rounds or (message.role == "user" and any(one.role == "assistant" for one in rounds[-1])):
            rounds.append([])
        rounds[-1].append(message)
    if len(rounds) > 1 and all(message.role != "assistant" for message in rounds[-1]):
        question = rounds.pop()
        rounds[-1] += question  # without an answer it teaches nothing alone
    return system, rounds
