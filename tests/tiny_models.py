"""Tokenisers, chat templates and models made on the spot: as small as can be, of the kinds that people really use."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fusion.config.schema import ModelConfig
from fusion.dialogues.encode import Encoder
from fusion.dialogues.template import chat_format

torch.set_num_threads(1)

CORPUS = [
    "The ratio of poles and wires is 1:3. Which river runs through it? The answer is yes, not no.",
    "  two leading  spaces\n\nand lines, system user assistant model",
    "naïve café 北京 日本語 👍🏽",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = ("byte_level", "metaspace", "metaspace_always")
"""Byte-level BPE; SentencePiece-like with a dummy prefix before the text, or behind every special token too."""


@dataclass(frozen=True)
class Format:
    """A chat template with the special tokens that it writes."""

    template: str
    special: tuple[str, ...]
    end_of_turn: str
    bos: str | None = None
    eos: str | None = None


def turns(user: str, assistant: str, system: str = "", prompt: str = "") -> str:
    """A template from one expression per role; `c` is the content of the message."""
    refuse = "{{ raise_exception('no system messages here') }}"
    return (
        "{{ bos_token }}{% for m in messages %}{% set c = m['content'] %}"
        f"{{% if m['role'] == 'user' %}}{user}{{% elif m['role'] == 'assistant' %}}{assistant}"
        f"{{% else %}}{system or refuse}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{prompt}{{% endif %}}"
    )


def tagged(role: str) -> str:
    return f"<|im_start|>{role}\n{{{{ c }}}}<|im_end|>\n"


def headed(role: str) -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{{{{ c | trim }}}}<|eot_id|>"


def of_gemma(role: str) -> str:
    return f"<start_of_turn>{role}\n{{{{ c | trim }}}}<end_of_turn>\n"


def spoken(role: str) -> str:
    return f"GPT4 Correct {role}: {{{{ c }}}}<|end_of_turn|>"


TAGS = ("<|im_start|>", "<|im_end|>")
THINKING = "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
MOVED_SYSTEM = (  # as Mistral's later templates: the system message goes into the last question
    "{{ bos_token }}{% set ms = messages | rejectattr('role', 'equalto', 'system') | list %}"
    "{% for m in ms %}{% if m['role'] == 'user' %}[INST] "
    "{% if messages[0]['role'] == 'system' and (loop.last or loop.index0 == ms | length - 2) %}"
    "{{ messages[0]['content'] + '\n\n' }}{% endif %}{{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
FORMATS = {
    "chatml": Format(
        turns(tagged("user"), tagged("assistant"), tagged("system"), "<|im_start|>assistant\n"),
        TAGS,
        "<|im_end|>",
        eos="<|im_end|>",
    ),
    "llama3": Format(
        turns(
            headed("user"),
            headed("assistant"),
            headed("system"),
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
    ),
    "mistral": Format(
        turns("[INST] {{ c }} [/INST]", "{{ c }}{{ eos_token }} "), ("<s>", "</s>"), "</s>", bos="<s>", eos="</s>"
    ),
    "moved_system": Format(MOVED_SYSTEM, ("<s>", "</s>"), "</s>", bos="<s>", eos="</s>"),
    "gemma": Format(
        turns(of_gemma("user"), of_gemma("model"), prompt="<start_of_turn>model\n"),
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<end_of_turn>",
        bos="<bos>",
        eos="<eos>",
    ),
    "openchat": Format(
        turns(spoken("User"), spoken("Assistant"), "{{ c }}<|end_of_turn|>", "GPT4 Correct Assistant:"),
        ("<s>", "</s>", "<|end_of_turn|>"),
        "<|end_of_turn|>",
        bos="<s>",
        eos="<|end_of_turn|>",
    ),
    "promptless": Format(
        turns(tagged("user"), tagged("assistant"), tagged("system")), TAGS, "<|im_end|>", eos="<|im_end|>"
    ),
    "thinking": Format(
        turns(
            tagged("user"),
            tagged("assistant").replace("{{ c }}", THINKING + "{{ c }}"),
            prompt="<|im_start|>assistant\n",
        ),
        TAGS,
        "<|im_end|>",
        eos="<|im_end|>",
    ),
}
REFUSE_SYSTEM = ("mistral", "gemma", "thinking")


@cache
def backend_json(kind: str, special: tuple[str, ...]) -> str:
    if kind == "byte_level":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=360, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(CORPUS, trainer)
        return backend.to_str()
    backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="always" if kind == "metaspace_always" else "first"
    )
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<unk>", *special, *BYTES], limit_alphabet=40, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    spec = json.loads(backend.to_str())  # byte pieces are ordinary pieces, though the trainer makes them special
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in BYTES]
    return json.dumps(spec)


def make_tokenizer(kind: str, name: str, **changes: str | None) -> PreTrainedTokenizerFast:
    """A new tokeniser of one of `KINDS` with one of `FORMATS`; padding is the end-of-turn token, as many have it."""
    form = FORMATS[name]
    tokens = {"bos_token": form.bos, "eos_token": form.eos, "pad_token": form.end_of_turn, **changes}
    given = {key: token for key, token in tokens.items() if token is not None}
    backend = Tokenizer.from_str(backend_json(kind, form.special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **given)
    tokenizer.chat_template = form.template
    return tokenizer


@cache
def encoder(
    kind: str, name: str, pivot_kind: str = "", pivot_name: str = "", max_length: int | None = None
) -> Encoder:
    """Encoder of a tokeniser in its own template, or in the rendering of a pivot."""
    own = chat_format(make_tokenizer(kind, name), "source")
    shared = chat_format(make_tokenizer(pivot_kind, pivot_name), "pivot") if pivot_kind else None
    return Encoder(own, shared, max_length)


def make_llama(vocab_size: int, seed: int = 0, bias: bool = False) -> LlamaForCausalLM:
    """A random Llama with a head of its own."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=bias,
        initializer_range=0.3,
        max_position_embeddings=512,
    )
    return _seeded(lambda: LlamaForCausalLM(config), seed)


def make_qwen(vocab_size: int, seed: int = 0) -> Qwen2ForCausalLM:
    """A random Qwen2 whose head is its embedding."""
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        max_position_embeddings=512,
    )
    return _seeded(lambda: Qwen2ForCausalLM(config), seed)


def _seeded(make, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> ModelConfig:
    """Write an ordinary model folder and return settings that point to it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(name=name, path=str(folder))
