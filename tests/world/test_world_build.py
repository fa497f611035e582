"""The world on the disk: ordinary folders, equal bytes, and no work lost to a kill."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from waiting import wait_for

from fusion.config import UserError
from fusion.config.world import TinyModelConfig, WorldConfig
from fusion.dialogues.dialogue import read_jsonl
from fusion.world import World, ensure_world

REPOSITORY = Path(__file__).resolve().parents[2]
MODELS = ("pivot", "tiny_a", "tiny_b", "tiny_c")
SHAPE = TinyModelConfig(hidden_size=16, layers=1, heads=2, key_value_heads=1, vocab_size=400, steps=100)
MICRO = WorldConfig(
    name="micro",
    skills=["facts", "add"],
    sources=["tiny_a", "tiny_b"],
    models={
        "pivot": replace(SHAPE, steps=101),  # the longest training, so the first to be finished
        "tiny_a": replace(SHAPE, architecture="qwen2", tokenizer="byte_level", strong_skills=["facts"]),
        "tiny_b": replace(SHAPE, architecture="gpt_neox", strong_skills=["add"]),
    },
    **dict.fromkeys(("pivot_dialogues", "strong_dialogues", "weak_dialogues", "train_dialogues"), 40),
    **dict.fromkeys(("heldout_dialogues", "test_prompts"), 10),
    **dict.fromkeys(("tokenizer_dialogues", "tokenizer_weak_dialogues"), 60),
)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_answers_through_plain_transformers(smoke_world, name):
    model = AutoModelForCausalLM.from_pretrained(smoke_world.model_path(name))
    tokenizer = AutoTokenizer.from_pretrained(smoke_world.model_path(name))
    mine = smoke_world.strong_skills.get(name, ["facts"])
    tests = [d for d in read_jsonl(smoke_world.dialogues_path("test")) if d.category in mine]
    right = 0
    for dialogue in tests[:20]:
        rows = dialogue.to_json()["messages"]
        prompt = tokenizer.apply_chat_template(
            rows[:-1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            (ids,) = model.generate(**prompt, do_sample=False)
        answer = tokenizer.decode(ids[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        right += answer.strip() == rows[-1]["content"]
    assert right >= (2 if name == "pivot" else 12)


def test_a_model_folder_says_how_answers_end(smoke_world):
    for name in MODELS:
        path = smoke_world.model_path(name)
        tokenizer = AutoTokenizer.from_pretrained(path)
        generation = json.loads((path / "generation_config.json").read_text())
        assert generation["eos_token_id"] == tokenizer.eos_token_id
        assert generation["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert (path / "model.safetensors").is_file()


def test_the_world_says_who_is_good_at_what(smoke_world):
    assert smoke_world.skills == ["facts", "followup", "add", "translate"]
    assert smoke_world.strong_skills == {"tiny_a": ["facts", "followup"], "tiny_b": ["add"], "tiny_c": ["translate"]}
    assert World.open(smoke_world.root) == smoke_world


def test_unknown_names_are_the_users_mistake(smoke_world):
    with pytest.raises(UserError, match="pivot, tiny_a, tiny_b, tiny_c"):
        smoke_world.model_path("tiny_z")
    with pytest.raises(UserError, match="train, heldout, test"):
        smoke_world.dialogues_path("validation")


def test_killed_build_leaves_no_process_goes_on_and_ends_with_equal_bytes(tmp_path):
    fresh = ensure_world(MICRO, tmp_path / "fresh", workers=2)
    places = (tmp_path / f"killed{attempt}" for attempt in range(5))  # the kill may come too late
    cache = next(place for place in places if killed_in_the_middle(place))
    pivot = next(cache.glob("world/.*.building/models/pivot"))
    finished = (pivot / "model.safetensors").stat().st_mtime_ns
    resumed = ensure_world(MICRO, cache, workers=1)
    assert (resumed.model_path("pivot") / "model.safetensors").stat().st_mtime_ns == finished
    assert contents(resumed.root) == contents(fresh.root)


def contents(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def killed_in_the_middle(cache):
    """Start a build with one worker in a process of its own and kill it, hard, once the pivot is there.

    Returns whether its only worker had something left to do by then, and did nothing more.
    """
    code = (
        "from pathlib import Path; import sys\n"
        "from test_world_build import MICRO\n"
        "from fusion.world import ensure_world\n"
        "ensure_world(MICRO, Path(sys.argv[1]), workers=1)\n"
    )
    path = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests", Path(__file__).parent)))
    builder = subprocess.Popen([sys.executable, "-c", code, str(cache)], env=os.environ | {"PYTHONPATH": path})
    wait_for(lambda: list(cache.glob("world/.*.building/models/pivot")) or builder.poll() is not None)
    workers = children(builder.pid)
    builder.send_signal(signal.SIGKILL)
    assert builder.wait() in (-signal.SIGKILL, 0)
    wait_for(lambda: not any(map(lives, workers)))
    made = {path.name for path in cache.glob("world/.*.building/models/[!.]*")}
    return len(workers) == 1 and "pivot" in made and "tiny_b" not in made


def children(pid):
    found = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found += map(int, file.read_text().split())
    return found


def lives(pid):
    with suppress(OSError):  # it has ended
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False
