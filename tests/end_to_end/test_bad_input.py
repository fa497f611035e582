"""What a newcomer gets wrong: a message that says what, where and what to do; exit code 2; nothing half-written."""

import json
import shutil

import pytest


@pytest.fixture
def user_folder(tmp_path, workplace, targets):
    (world,) = (workplace.cache / "world").glob("[!.]*")
    shutil.copytree(world / "models" / "pivot", tmp_path / "pivot")
    shutil.copytree(world / "models" / "tiny_a", tmp_path / "source")
    return tmp_path


def train(workplace, folder, text=None, **paths):
    """Stage 1 on the user's folder; returns the complaint. The dialogues are `text`."""
    data = folder / "mine.jsonl"
    if text is not None:
        data.write_text(text)
    models = {"pivot": folder / "pivot", "source": folder / "source", **paths}
    arguments = [f"{group}=hf" for group in models] + [f"{group}.path={path}" for group, path in models.items()]
    output = workplace.run(
        "train", *arguments, "data=jsonl", f"data.path={data}", f"hydra.run.dir={folder}/run", code=2
    )
    assert "problem" in output
    assert "Traceback" not in output
    assert not (folder / "run" / "model").exists()
    return output


GOOD = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"


def test_empty_dialogue_file(workplace, user_folder):
    assert "mine.jsonl: the file holds no dialogues" in train(workplace, user_folder, "")


def test_all_bad_rows_are_named_at_once(workplace, user_folder):
    no_answer = json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n"
    robot = json.dumps({"messages": [{"role": "robot", "content": "a"}]}) + "\n"
    output = train(workplace, user_folder, GOOD + no_answer + GOOD + robot)
    assert "mine.jsonl, row 2: no assistant turn" in output
    assert "mine.jsonl, row 4: message 1 has the unknown role 'robot'" in output


def test_missing_folder(workplace, user_folder):
    output = train(workplace, user_folder, GOOD, source=user_folder / "nowhere")
    assert "nowhere" in output
    assert "no such folder" in output


def test_tokeniser_without_end_of_turn(workplace, user_folder):
    path = user_folder / "source" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["eos_token"] = None
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))
    (user_folder / "source" / "chat_template.jinja").unlink(missing_ok=True)
    output = train(workplace, user_folder, GOOD)
    assert "source: this tokeniser ends no assistant turn" in output
    assert "end_of_turn" in output


def test_targets_of_another_architecture(workplace, targets):
    (world,) = (workplace.cache / "world").glob("[!.]*")
    wrong = [targets / "source=tiny_a" / "model", world / "models" / "tiny_b"]
    output = workplace.run(
        "merge",
        "targets=[" + ",".join(f"'{path}'" for path in wrong) + "]",
        f"base={world / 'models' / 'pivot'}",
        "hydra.run.dir=bad/merge",
        code=2,
    )
    assert "gpt_neox" in output
    assert "merge one architecture only" in output
    assert not (workplace.root / "bad" / "merge" / "model").exists()


def test_settings_out_of_range_come_together(workplace):
    output = workplace.run("train", "objective.ce_weight=2", "optim.lr=-1", "alignment.fallback=guess", code=2)
    for message in ("objective.ce_weight=2.0: a share", "optim.lr=-1.0: a number above 0", "alignment.fallback=guess"):
        assert message in output


def test_merge_parameters_are_checked(workplace, targets):
    output = workplace.run("merge", "merge=sce", "merge.tau=2", "+merge.tua=1", code=2)
    assert "tau" in output
    assert "tua" in output


def test_methods_that_measure_need_dialogues(workplace, user_folder):
    """Folders that no run of train.py has made come without held-out dialogues."""
    folder = user_folder / "pivot"
    arguments = ["merge=learned", f"targets=[{folder},{folder}]", f"base={folder}"]
    output = workplace.run("merge", *arguments, f"hydra.run.dir={user_folder}/merge", code=2)
    assert "merge=learned: there are no held-out dialogues that a source won to work with" in output
    assert "Traceback" not in output
    assert not (user_folder / "merge" / "model").exists()


def test_patterns_that_fit_no_tensor(workplace, user_folder):
    folder = user_folder / "pivot"
    arguments = ["merge=linear", "merge.weight={*mpl*:1,*:2}", f"targets=[{folder},{folder}]", f"base={folder}"]
    output = workplace.run("merge", *arguments, f"hydra.run.dir={user_folder}/merge", code=2)
    assert "weight: pattern '*mpl*' fits no tensor" in output
    assert "Traceback" not in output
