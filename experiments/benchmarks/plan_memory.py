"""What `plan=true` says of a training's memory, against the peak of the process that train.py runs in.

A Llama with random weights learns two steps of long texts (`objective=sft`, so that no teacher reads before), with and
without accumulation and gradient checkpointing. Needs no GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from measure import RESULTS, Row, inputs, parser, report
from peaks import GIVEN_BACK
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusion.config.compose import CONFIG_FOLDER, register, to_settings
from fusion.config.schema import TrainConfig
from fusion.dialogues.dialogue import chat, write_jsonl
from fusion.planning.stage1 import Stage1Plan
from fusion.planning.text import GIB

REPOSITORY = Path(__file__).resolve().parents[2]
SHAPES = {"86M": (640, 1728, 10, 10, 5), "30M": (320, 864, 8, 5, 5)}
"""Hidden and inner size, layers, heads, key-value heads; the vocabulary is the tokeniser's."""
TOKENS = 512
VARIANTS = {
    "one micro-batch": ("trainer.batch_size=4", "trainer.micro_batch_size=4"),
    "accumulated": ("trainer.batch_size=8", "trainer.micro_batch_size=4"),
    "checkpointed": ("trainer.batch_size=8", "trainer.micro_batch_size=4", "trainer.gradient_checkpointing=true"),
}
COMMON = "pivot=hf source=hf objective=sft data=jsonl trainer.max_steps=2 evaluation=none logger=none"


def make_pivot(folder: Path, tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    """A random Llama beside a tokeniser, stored in bfloat16 as published models are."""
    hidden, inner, layers, heads, keys = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        vocab_size=len(tokenizer),
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--shape", choices=SHAPES, default="86M")
    chosen = options.parse_args()
    given = inputs(chosen.data)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_pivot(folder / "pivot", given.pivot, chosen.shape)
        words = " ".join(f"word {n}" for n in range(TOKENS))
        write_jsonl(folder / "d.jsonl", [chat(f"Say {n}.", words, f"and {n}", words) for n in range(40)])
        rows = [compared(folder, name) for name in VARIANTS]
    title = f"peak of train.py (reference) and its plan, Llama of {chosen.shape}, {TOKENS} tokens"
    report(title, rows, chosen.out or RESULTS / "plan_memory.json", origin=given.origin)


def compared(folder: Path, name: str) -> Row:
    """Peak of the process, and what the plan says of it."""
    words = [*COMMON.split(), f"data.max_length={TOKENS}", *VARIANTS[name]]
    paths = [f"{role}.path={folder / 'pivot'}" for role in ("pivot", "source")]
    paths += [f"data.path={folder / 'd.jsonl'}", "pivot.chat_template=plain"]
    job = folder / "run"
    command = [
        sys.executable,
        str(REPOSITORY / "train.py"),
        *words,
        *paths,
        "skip_finished=false",
        "trainer.resume=never",
    ]
    subprocess.run([*command, f"hydra.run.dir={job}"], check=True, cwd=folder, env=os.environ | GIVEN_BACK)
    measured = json.loads((job / "result.json").read_text())["metrics"]["train/peak_memory_gib"]
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        config = to_settings(compose("train", overrides=[*words, *paths]), TrainConfig)
    planned = Stage1Plan.of(config).step.peak / GIB
    return Row(name, measured, planned, "GiB")


if __name__ == "__main__":
    main()
