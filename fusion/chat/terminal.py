"""The chat in a terminal: one question, every model's answer in turn, as it is written."""

from collections.abc import Sequence
from typing import TextIO

from fusion.chat.speaker import Speaker
from fusion.dialogues.template import UnrenderableDialogue

HELP = "ask all models at once; /new begins a new talk, /quit ends"


def talk(speakers: Sequence[Speaker], questions: TextIO, out: TextIO) -> None:
    """Answer lines of `questions` until they end."""
    print(f"{', '.join(one.name for one in speakers)}: {HELP}", file=out)
    width = max(len(one.name) for one in speakers)
    while True:
        print("> ", end="", file=out, flush=True)
        line = questions.readline()
        question = line.strip()
        if not line or question == "/quit":
            return
        if question == "/new":
            for speaker in speakers:
                speaker.forget()
            print("a new talk", file=out)
        elif question:
            for speaker in speakers:
                _tell(speaker, question, width, out)


def _tell(speaker: Speaker, question: str, width: int, out: TextIO) -> None:
    print(f"{speaker.name:<{width}}  ", end="", file=out, flush=True)
    try:
        for piece in speaker.answer(question):
            print(piece.replace("\n", f"\n{' ' * width}  "), end="", file=out, flush=True)
    except UnrenderableDialogue as error:
        print(f"[cannot be asked: {error}]", end="", file=out)
    print(file=out)
