"""Tokenisers of two families, trained on the spot, with the chat template of their model.

The pivot's template is plain text but for its end-of-turn token, because in the paper's setting every source reads the
pivot's rendering with its own vocabulary: role tokens of the pivot would be unknown words to it. In all templates a
space stands before the content, so that the first word of a message is the same piece (`▁The`, `ĠThe`) as the same
word further on. Without it a byte-level model says `Ġ` and then `The`, and teaches the pivot to say the bare marker.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from fusion.config.world import TinyModelConfig, WorldConfig
from fusion.world.corpora import tokenizer_corpus

PAD = "<pad>"
BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
MARKER = "▁"
ROLES = {"user": "User:", "assistant": "Assistant:", "system": "System:"}


@dataclass(frozen=True)
class ChatMarkup:
    """What a chat template writes around the messages."""

    user: str
    assistant: str
    system: str
    end_of_turn: str
    ends_user_turns: bool
    """Whether the end-of-turn token also stands after the user's messages."""

    @property
    def special_tokens(self) -> list[str]:
        """Markers in angle or square brackets are tokens of their own; those of the pivot are plain text."""
        markers = (self.user, self.assistant, self.system, self.end_of_turn, PAD)
        return [marker for marker in dict.fromkeys(markers) if marker[:1] in "<["]

    @property
    def template(self) -> str:
        """Jinja template, with the assistant's part (end of turn included) marked as generation."""
        end_of_user = self.end_of_turn if self.ends_user_turns else ""
        return (
            "{%- for message in messages -%}"
            "{%- if message['role'] == 'assistant' -%}"
            f"{{{{ '{self.assistant}' }}}}{{%- generation -%}}"
            f"{{{{ ' ' + message['content'] + '{self.end_of_turn}' }}}}"
            "{%- endgeneration -%}"
            "{%- elif message['role'] == 'system' -%}"
            f"{{{{ '{self.system} ' + message['content'] + '{end_of_user}' }}}}"
            "{%- else -%}"
            f"{{{{ '{self.user} ' + message['content'] + '{end_of_user}' }}}}"
            "{%- endif -%}"
            "{%- endfor -%}"
            f"{{%- if add_generation_prompt -%}}{{{{ '{self.assistant}' }}}}{{%- endif -%}}"
        )


MARKUP = {
    "llama": ChatMarkup(ROLES["user"], ROLES["assistant"], ROLES["system"], "</s>", True),
    "qwen2": ChatMarkup("<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_end|>", True),
    "gpt_neox": ChatMarkup("<human>", "<bot>", "<note>", "<|endoftext|>", False),
    "mistral": ChatMarkup("[INST]", "[/INST]", "[SYS]", "</s>", False),
}


def make_tokenizer(model: str, config: WorldConfig) -> PreTrainedTokenizerFast:
    """Train the tokeniser of `model` on the text that the model will read."""
    settings = config.models[model]
    markup = MARKUP[settings.architecture]
    train = {"metaspace": _metaspace, "byte_level": _byte_level}[settings.tokenizer]
    backend = train(settings, list(_text(model, config)), len(markup.special_tokens))
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in markup.special_tokens])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=markup.end_of_turn,
        pad_token=PAD,
        chat_template=markup.template,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def _text(model: str, config: WorldConfig) -> Iterator[str]:
    """The pivot's rendering between its end-of-turn tokens; its pieces are all that native renderings need, too."""
    for dialogue in tokenizer_corpus(model, config):
        for message in dialogue.messages:
            yield f"{ROLES[message.role]} {message.content}"


def _metaspace(settings: TinyModelConfig, text: list[str], num_special: int) -> Tokenizer:
    """BPE with marked spaces and byte fallback, as SentencePiece makes it."""
    backend = Tokenizer(models.BPE())
    spaces = pre_tokenizers.Metaspace(replacement=MARKER, prepend_scheme="never")
    backend.pre_tokenizer = pre_tokenizers.Sequence([spaces, *_digits(settings), pre_tokenizers.Punctuation()])
    size = settings.vocab_size - len(BYTE_PIECES) - num_special
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=size, show_progress=False))
    learnt = json.loads(backend.to_str())["model"]
    pieces = [*BYTE_PIECES, *sorted(learnt["vocab"], key=learnt["vocab"].__getitem__)]
    backend.model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in learnt["merges"]],
        byte_fallback=True,
    )
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=MARKER, prepend_scheme="never")]
    )
    return backend


def _byte_level(settings: TinyModelConfig, text: list[str], num_special: int) -> Tokenizer:
    """BPE over bytes, as GPT-2 has it."""
    backend = Tokenizer(models.BPE())
    spaces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_digits(settings), spaces])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size - num_special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(text, trainer)
    return backend


def _digits(settings: TinyModelConfig) -> list[pre_tokenizers.PreTokenizer]:
    return [pre_tokenizers.Digits(individual_digits=True)] if settings.split_digits else []
