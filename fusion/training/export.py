"""A trained model as an ordinary Hugging Face folder that transformers, vLLM, lm-eval and mergekit load as it is."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.cache import fsync_tree, write_text


def export_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype, card: str
) -> None:
    """Write weights (safetensors), config, generation config, tokeniser with chat template, and the model card.

    The folder appears whole or not at all; an older one of the same name is replaced. `dtype` is the one in which the
    pivot is stored: weights are trained in more precision and rounded once, here.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.to(dtype=dtype)  # type: ignore[call-arg]
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    write_text(temporary / "README.md", card)
    fsync_tree(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def model_card(name: str, base: str, summary: str, command: str) -> str:
    """A model card: what the model is, what it came from, and the command that makes it again."""
    return (
        f"---\nlibrary_name: transformers\ntags: [fusion, knowledge-distillation]\n---\n# {name}\n\n{summary}\n\n"
        f"- Pivot: `{base}`\n- Method: [FuseChat](https://arxiv.org/abs/2408.07990), fuse-then-merge\n"
        f"- Inputs, settings and scores: `lineage.json` in the folder of the run\n\n"
        f"Make it again:\n\n```\n{command}\n```\n"
    )
