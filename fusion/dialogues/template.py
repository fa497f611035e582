"""Dialogues as text: the chat template's rendering, and where in it the assistant speaks."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from fusion.config import UserError
from fusion.dialogues.dialogue import Dialogue, Message, chat

PROBE = chat("ask", "probe")
TODAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
"""The date in templates that print it (Llama 3's own default), so that a dialogue is the same text every day."""
MARKER = "<<answer>>"
"""Stands for an answer whose place is looked for."""


class UnrenderableDialogue(Exception):
    """This dialogue does not survive this template; the reader counts it and goes on."""


@dataclass(frozen=True)
class Turn:
    """Character span of one assistant turn's content in the rendered text, and where its end-of-turn token stands."""

    start: int
    end: int
    end_of_turn: int | None
    """Start of the end-of-turn string; None where the template ends a turn without one."""


@dataclass(frozen=True)
class Rendering:
    text: str
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class ChatFormat:
    """How one tokeniser writes dialogues, and the token that ends its turns."""

    tokenizer: PreTrainedTokenizerFast
    end_of_turn_id: int
    end_of_turn: str

    def render(self, dialogue: Dialogue) -> Rendering:
        """Render `dialogue`; raises UnrenderableDialogue when the template refuses or rewrites it.

        Answers are stripped: many templates do so, and all must agree on the bytes of an answer.
        """
        messages = [
            {"role": one.role, "content": one.content.strip() if one.role == "assistant" else one.content}
            for one in dialogue.messages
        ]
        text = _apply(self.tokenizer, messages)
        turns, cursor, question = [], 0, ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                question = message["content"].strip()
                continue
            known = _prompt_length(self.tokenizer, messages[:index], text)
            start = text.find(message["content"], max(cursor, known or _behind(text, question, cursor)))
            if start < 0:
                raise UnrenderableDialogue("the chat template rewrites an answer, so its tokens cannot be found")
            cursor = start + len(message["content"])
            turns.append(Turn(start, cursor, self._find_end_of_turn(text, cursor)))
        return Rendering(text, tuple(turns))

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text up to where the assistant begins to answer the last message; raises UnrenderableDialogue."""
        return _apply(self.tokenizer, [{"role": one.role, "content": one.content} for one in messages], prompt=True)

    def _find_end_of_turn(self, text: str, content_end: int) -> int | None:
        rest = text[content_end:]
        padding = len(rest) - len(rest.lstrip())
        return content_end + padding if rest[padding:].startswith(self.end_of_turn) else None


def chat_format(tokenizer: PreTrainedTokenizerFast, where: str, end_of_turn: str | None = None) -> ChatFormat:
    """Find out how `tokenizer` ends an assistant turn: the first special token after the content of a probe dialogue.

    `end_of_turn` (a token's text) overrules the probe. A tokeniser without a chat template falls back to its
    end-of-sequence token, which is all a source needs when it reads the pivot's rendering.

    Raises:
        UserError: no end-of-turn token can be found; the message names `where` and the setting that mends it.
    """
    remedy = f"set {where}.end_of_turn to the token that ends an assistant turn"
    if end_of_turn is not None:
        token_id = tokenizer.get_vocab().get(end_of_turn)
        if token_id is None:
            raise UserError(f"{where}: end_of_turn={end_of_turn!r} is not a token of this tokeniser; {remedy}")
        return ChatFormat(tokenizer, token_id, end_of_turn)
    try:
        token_id = _probe_end_of_turn(tokenizer) if tokenizer.chat_template else tokenizer.eos_token_id
    except (UnrenderableDialogue, ValueError) as error:
        raise UserError(f"{where}: its chat template cannot render a question with an answer ({error})") from error
    if token_id is None:
        raise UserError(
            f"{where}: this tokeniser ends no assistant turn: its chat template writes no special token after the "
            f"content and it has no end-of-sequence token; {remedy}"
        )
    return ChatFormat(tokenizer, int(token_id), str(tokenizer.convert_ids_to_tokens(int(token_id))))


def require_template(tokenizer: PreTrainedTokenizerFast, where: str) -> None:
    """Raise a UserError when `tokenizer` has no chat template to render with."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{where}: its tokeniser has no chat template; set {where}.chat_template=plain or to a Jinja file"
        )


def _probe_end_of_turn(tokenizer: PreTrainedTokenizerFast) -> int | None:
    messages = [{"role": message.role, "content": message.content} for message in PROBE.messages]
    text = _apply(tokenizer, messages)
    tail = text[text.rindex(PROBE.messages[-1].content) + len(PROBE.messages[-1].content) :]
    ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
    special = [token for token in ids if token in tokenizer.added_tokens_decoder]
    return special[0] if special else tokenizer.eos_token_id


def _apply(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], prompt: bool = False) -> str:
    template = str(tokenizer.chat_template)
    dated = TODAY + template if "strftime_now" in template else None
    try:
        return str(
            tokenizer.apply_chat_template(messages, chat_template=dated, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # a template is someone's program and may raise anything
        raise UnrenderableDialogue(f"the chat template refuses it: {error}") from error


def _prompt_length(tokenizer: PreTrainedTokenizerFast, before: list[dict[str, str]], text: str) -> int:
    """Where the answer to `before` starts in `text` (another answer would start there too) or may start (after the
    generation prompt); 0 where the template writes `before` in another way when more follows."""
    marked = [*before, {"role": "assistant", "content": MARKER}]
    for messages, prompt in ((marked, False), (before, True), (before, False)):
        try:
            rendered = _apply(tokenizer, messages, prompt)
        except UnrenderableDialogue:
            continue
        prefix = rendered.rpartition(MARKER)[0] if messages is marked else rendered
        if prefix and text.startswith(prefix):
            return len(prefix)
    return 0


def _behind(text: str, question: str, cursor: int) -> int:
    found = text.find(question, cursor)
    return cursor if found < 0 else found + len(question)
