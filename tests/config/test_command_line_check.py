"""Every mistake of a command line in one answer, with the nearest valid name, before anything runs."""

import sys

import pytest

from fusion.config.check import command_line_problems, sweep_problems
from fusion.config.compose import register
from fusion.config.launch import launch


def problems(*words, entry="train"):
    register()
    return command_line_problems(entry, words)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("seed=3", "optim.lr=1e-3", "tags=[a,b]", "data.limit=null", "pivot=hf", "pivot.path=/a"),
        ("-m", "source=tiny_a,tiny_b", "seed=range(0,3)", "optim.lr=choice(1e-3,1e-4)", "hydra.sweep.dir=/tmp/x"),
        ("-m", "source=glob(tiny_?)"),
        ("++seed=4", "+alignment.options.use_matrix=true", "~logger", "--cfg", "job"),
        ("source=tiny_all", "source.members.tiny_a.name=a", "+source.members.mine.path=/a"),
    ],
)
def test_right_commands_have_no_problems(words):
    assert problems(*words) == []


def test_all_problems_are_told_at_once():
    found = problems(
        "optm.lr=3",
        "sede=1",
        "optim.lr=abc",
        "trainer.epochs=1.5",
        "optim=papr",
        "seed",
        "--foo",
        "+new=1",
        "trainer.epochs=",
    )
    expected = {
        "--foo": "unknown option",
        "seed": "not KEY=VALUE",
        "optim=papr": "did you mean `paper`? options are paper, tiny",
        "optm.lr=3": "did you mean `optim.lr`?",
        "sede=1": "did you mean `seed`?",
        "optim.lr=abc": "a number is expected",
        "trainer.epochs=1.5": "a whole number is expected",
        "+new=1": "there is no setting `new`",
        "trainer.epochs=": "a whole number is expected",
    }
    assert {problem.split(": ")[0] for problem in found} == set(expected)
    for start, said in expected.items():
        assert any(problem.startswith(f"{start}: ") and said in problem for problem in found)


def test_files_and_parameters_are_looked_at_beside_typing_errors():
    found = problems("sede=1", "data=jsonl", "data.path=lost.jsonl")
    assert [problem.split(":")[0] for problem in found] == ["sede=1", "data.path=lost.jsonl"]
    register()
    words = ("sede=1", "base=/lost", "merge.tau=often")
    found = command_line_problems("merge", words, lambda settings: [f"tau {settings.merge['tau']}"])
    assert [problem.split(":")[0] for problem in found] == ["sede=1", "base=/lost", "tau often"]


def test_all_choices_of_a_sweep_are_checked():
    found = problems("-m", "source=tiny_a,tiny_x,hg", "seed=1,x,2,y", "sede=1,2", "optim.lr=1e-3,fast")
    assert [problem.split(":")[0] for problem in found] == [
        "source=tiny_x",
        "source=hg",
        "seed=1,x,2,y",
        "seed=1,x,2,y",
        "sede=1,2",
        "optim.lr=1e-3,fast",
    ]
    assert "'x'" in found[2]
    assert "'y'" in found[3]


def test_near_names():
    near = {
        "lr=1": "optim.lr",
        "batch_size=1": "world.batch_size` or `trainer.batch_size",
        "train.epochs=1": "trainer.epochs",
        "pivot.pth=/a": "pivot.path",
        "objctive=sft": "objective",
        "alignment.fallbak=gold": "alignment.fallback",
        "+optim.weightdecay=1": "optim.weight_decay",
    }
    for problem, (word, name) in zip(problems(*near), near.items(), strict=True):
        assert problem.startswith(f"{word}: ")
        assert f"did you mean `{name}`?" in problem


def test_a_group_of_the_other_entry_hides_no_other_problem():
    found = problems("merge=linear", "sede=1")
    assert [problem.split(":")[0] for problem in found] == ["merge=linear", "sede=1"]
    assert problems("merge=linear", entry="merge") == []
    assert problems("source=tiny_a", entry="merge") != []


def test_other_mistakes():
    words = [
        "++new.table=1",
        "+optim.foo=3",
        "~foo",
        "~pivot.name",
        "data.limit=soon",
        "tags=x",
        "trainer.epochs=null",
    ]
    assert [problem.split(": ")[0] for problem in problems(*words)] == words


def test_parameters_follow_the_chosen_method():
    assert problems("merge=sce", "merge.tau=0.2", "merge.scale=search", entry="merge") == []
    (problem,) = problems("merge=linear", "merge.tau=0.2", entry="merge")
    assert "there is no setting `merge.tau`" in problem


def test_a_setting_that_not_all_options_of_a_sweep_have_is_explained(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["-m", "merge=sce,linear,varm,sce_released", "merge.tau=0.1,0.2"]
    assert problems(*words, entry="merge") == []
    wrong = [f"merge.tau=0.1,0.2: merge={name} has no setting `merge.tau`" for name in ("linear", "varm")]
    assert [problem.split(";")[0] for problem in sweep_problems("merge", words)] == wrong
    monkeypatch.setattr(sys, "argv", ["merge.py", *words])
    with pytest.raises(SystemExit) as stop:
        launch("merge", lambda settings, job: pytest.fail("a job was run"))
    assert stop.value.code == 2
    assert wrong[0] in capsys.readouterr().err


@pytest.fixture
def own_folder(tmp_path):
    folder = tmp_path / "my configs" / "source"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text("name: mine\npath: /models/mine\n")
    return folder.parent


def test_the_users_own_config_folder_is_searched(own_folder):
    assert problems("--config-dir", str(own_folder), "source=mine") == []
    assert problems(f"hydra.searchpath=[file://{own_folder}]", "source=mine") == []
    found = problems("--config-dir", str(own_folder), "source=mne", "sede=1")
    assert len(found) == 2
    assert "did you mean `mine`?" in found[0]
    assert "sede=1" in found[1]
    (problem,) = problems("source=mine")
    assert "there is no such option" in problem


def test_options_between_the_words_are_explained():
    assert problems("seed=1", "trainer.epochs=2", "-m") == problems("-m", "seed=1", "trainer.epochs=2") == []
    found = problems("seed=1", "-m", "sede=1", "trainer.epochs=2")
    assert len(found) == 2
    assert found[0].startswith("sede=1 trainer.epochs=2: put options like -m before or behind")
    assert "did you mean `seed`" in found[1]


def test_a_search_without_m_is_explained():
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = "hparams_search=merge_weights"
    assert problems(search, "seed=1", entry="merge") == [f"{search}: a search is a sweep: put -m in front"]
    assert problems("-m", search, entry="merge") == []
    assert problems(search, "search.a=0.5", entry="merge") == []  # one job of a search, run again
