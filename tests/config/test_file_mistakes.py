"""Mistakes in the user's own YAML files: all at once, each with file, line and the nearest valid name."""

import pytest

from fusion.config.check import command_line_problems
from fusion.config.compose import register


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write YAML files into an own config folder; returns the problems of a command that uses it."""
    monkeypatch.chdir(tmp_path)

    def problems(files, *words, entry="train"):
        for name, text in files.items():
            path = tmp_path / "mine" / f"{name}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        register()
        return command_line_problems(entry, ("--config-dir", "mine", *words))

    return problems


def test_right_files_have_no_problems(own):
    assert own({"source/mine": "name: mine\npath: /a\n"}, "source=mine") == []
    assert own({"merge/mine": "method: my.module.function\nanything: 3\n"}, "merge=mine", entry="merge") == []


def test_all_mistakes_of_a_file_with_their_lines(own):
    text = "# mine\nlr: fast\nshedule: cosine\nbetas: [0.9, 0.99]\nwarmup_fraction: soon\n"
    assert own({"optim/mine": text}, "optim=mine", "sede=1") == [
        "mine/optim/mine.yaml, line 2: optim.lr: a number is expected (Value 'fast' of type 'str' could not be "
        "converted to Float)",
        "mine/optim/mine.yaml, line 3: there is no setting `optim.shedule`; did you mean `optim.schedule`? see --help",
        "mine/optim/mine.yaml, line 5: optim.warmup_fraction: a number is expected (Value 'soon' of type 'str' could "
        "not be converted to Float)",
        "sede=1: there is no setting `sede`; did you mean `seed`? see --help",
    ]


def test_nested_tables_and_global_files(own):
    text = "# @package _global_\ntrainer:\n  epochs: 3\n  epoch: 4\nworld:\n  models:\n    pivot: {stps: 3}\n"
    found = own({"experiments/mine": text}, "experiments=mine")
    assert [problem.split(";")[0] for problem in found] == [
        "mine/experiments/mine.yaml, line 4: there is no setting `trainer.epoch`",
        "mine/experiments/mine.yaml, line 7: there is no setting `world.models.pivot.stps`",
    ]


def test_a_defaults_list_that_names_what_there_is_not(own):
    text = "# @package _global_\ndefaults:\n  - override /optim: papr\n"
    (problem,) = own({"experiments/mine": text}, "experiments=mine")
    assert problem.startswith("mine/experiments/mine.yaml, line 3: optim=papr: there is no such option; did you mean")
    text = "# @package _global_\ndefaults:\n  - override /optm: paper\n"
    (problem,) = own({"experiments/mine": text}, "experiments=mine")
    assert problem.startswith("mine/experiments/mine.yaml, line 3: there is no group `optm`; did you mean `optim`?")
    text = "# @package _global_\ndefaults:\n  - override /merge: sce\n"
    (problem,) = own({"experiments/mine": text}, "experiments=mine")
    assert "has no group `merge` to override" in problem


def test_several_files_and_a_right_one(own):
    files = {
        "optim/mine": "lr: fast\n",
        "trainer/mine": "epochs: 1.5\n",
        "source/mine": "name: mine\npath: world:tiny_b\n",
    }
    found = own(files, "optim=mine", "trainer=mine", "source=mine")
    assert [problem.split(":")[0] for problem in found] == [
        "mine/optim/mine.yaml, line 1",
        "mine/trainer/mine.yaml, line 1",
    ]


UNREADABLE = {
    "merge/broken": "method: sce\ntau 0.5\n",
    "merge/open": "method: [sce\n",
    "merge/list": "- sce\n",
    "merge/empty": "",
    "merge/latin": "method: sc\u00e9\n",
}
SAID = {
    "broken": "mine/merge/broken.yaml, line 3: no YAML: could not find expected ':'",
    "open": "mine/merge/open.yaml, line 2: no YAML: ",
    "list": "merge=list: the file holds no table",
    "empty": "merge.method=None: the name of a method is expected",
    "latin": "merge=latin: the file is no text in UTF-8",
}


@pytest.fixture
def unreadable(own, tmp_path):
    own(UNREADABLE)
    (tmp_path / "mine/merge/latin.yaml").write_bytes(UNREADABLE["merge/latin"].encode("latin-1"))
    return own


@pytest.mark.parametrize("name", SAID)
def test_a_file_that_cannot_be_read_is_told_with_all_else(unreadable, name):
    (alone,) = unreadable({}, f"merge={name}", entry="merge")
    assert alone.startswith(SAID[name])
    found = unreadable({}, f"merge={name}", "sede=1", "engine.memory=1MiB", entry="merge")
    assert {problem.split(":")[0] for problem in found} == {alone.split(":")[0], "sede=1", "engine.memory=1MiB"}


def test_all_own_files_of_a_sweep_are_read(unreadable):
    found = unreadable({}, "-m", f"merge=sce,{','.join(SAID)}", entry="merge")
    assert len(found) == len(SAID)
    for problem, (name, said) in zip(found, SAID.items(), strict=True):
        assert problem.removeprefix(f"merge={name}: ").startswith(said.removeprefix(f"merge={name}: "))
