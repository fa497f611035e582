"""From a command line to jobs: typed settings in, exit code 2 and all problems out."""

import dataclasses
import errno
import logging
import os
import shlex

import pytest
from omegaconf import OmegaConf

from fusion.config import UserError
from fusion.config.launch import launch
from fusion.config.schema import MergeConfig, TrainConfig


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Run a command line in an empty folder; returns (exit code, jobs that ran, what was complained)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(entry, *words, job=lambda settings, job: None, together=None):
        ran = []

        def keep(settings, one):
            ran.append((settings, one))
            return job(settings, one)

        monkeypatch.setattr("sys.argv", [f"{entry}.py", *words])
        code = 0
        try:
            launch(entry, keep, together)
        except SystemExit as stop:
            code = stop.code
        return code, ran, capsys.readouterr().err

    return run


def test_a_job_gets_frozen_settings_and_a_folder(command, tmp_path):
    code, ran, _ = command("train", "seed=7", "optim.lr=1e-3", "optim.betas=[0.8,0.9]", "data.limit=5", "tags=[a,b]")
    ((settings, job),) = ran
    assert code == 0
    assert isinstance(settings, TrainConfig)
    assert (settings.seed, settings.optim.lr, settings.data.limit, settings.tags) == (7, 1e-3, 5, ["a", "b"])
    assert settings.world.seed == 7  # interpolations are resolved
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.optim.lr = 1.0
    assert job.sweep is None
    assert job.folder.parent == tmp_path / "runs" / "train"
    assert job.folder.is_dir()
    assert job.command.startswith("python train.py seed=7 optim.lr=1e-3")
    assert OmegaConf.create(job.config_yaml).optim.lr == 1e-3
    assert os.getcwd() == str(tmp_path)


def test_the_command_of_a_job_names_the_users_own_config_folder(command, tmp_path):
    folder = tmp_path / "my conf"
    (folder / "merge").mkdir(parents=True)
    (folder / "merge/mine.yaml").write_text("method: linear\nscale: 1.0\n")
    code, ((_, job),), _ = command("merge", "--config-dir", str(folder), "merge=mine")
    assert code == 0
    assert job.command == shlex.join(["python", "merge.py", "--config-dir", str(folder), "merge=mine"])
    _, ((_, plain),), _ = command("merge", "merge=sce")
    assert plain.command == "python merge.py merge=sce"


def test_a_sweep_runs_every_job_with_a_command_of_its_own(command, tmp_path):
    code, ran, _ = command("merge", "-m", "merge=linear,sce", "tags=[x y]", "seed=3")
    assert code == 0
    assert [(settings.merge["method"], settings.seed) for settings, _ in ran] == [("linear", 3), ("sce", 3)]
    assert all(isinstance(settings, MergeConfig) for settings, _ in ran)
    assert len({job.folder for _, job in ran}) == 2
    assert {job.folder.parent for _, job in ran} == {job.sweep for _, job in ran}
    assert [job.name for _, job in ran] == ["merge=linear", "merge=sce"]
    assert shlex.split(ran[1][1].command) == ["python", "merge.py", "merge=sce", "tags=[x\\ y]", "seed=3"]


def test_mistakes_are_told_before_any_job(command):
    code, ran, said = command("train", "sede=1", "optim.lr=fast", "template=odd")
    assert (code, ran) == (2, [])
    assert said.startswith("3 problems:\n  - sede=1: ")
    code, ran, said = command("train", "template=odd", "seed=-1", "data.limit=0")
    assert (code, ran) == (2, [])
    assert said.startswith("3 problems:\n")
    code, ran, said = command("train", "source=tiny_a,tiny_b")
    assert (code, ran) == (2, [])
    assert "source=tiny_a,tiny_b" in said
    code, ran, _ = command("train", "hydra.no_such_thing=1")
    assert (code, ran) == (2, [])


def test_a_users_mistake_in_one_job_of_a_sweep_stops_no_other(command):
    def picky(settings, job):
        if settings.seed == 2:
            raise UserError(["seed 2 is bad", "and ugly"])

    code, ran, said = command("merge", "-m", "seed=-1,2,3", job=picky)
    assert code == 2
    assert [settings.seed for settings, _ in ran] == [2, 3]
    assert said.startswith("3 problems:\n  - seed=-1: seed=-1: at least 0 is expected\n")
    assert "  - seed=2: seed 2 is bad\n  - seed=2: and ugly\n" in said


def test_a_crash_in_one_job_of_a_sweep_stops_no_other(command, tmp_path):
    def broken(settings, job):
        if settings.seed == 2:
            raise ZeroDivisionError("ours")

    code, ran, said = command("merge", "-m", "seed=1,2,3", "hydra.sweep.dir=here", job=broken)
    assert code == 1
    assert [settings.seed for settings, _ in ran] == [1, 2, 3]
    assert "seed=2: ZeroDivisionError: ours" in said
    assert "Traceback" in said
    (again,) = [line.strip() for line in said.splitlines() if line.startswith("  python merge.py")]
    code, ran, said = command("merge", *shlex.split(again)[2:])
    ((settings, job),) = ran
    assert (code, settings.seed) == (0, 2)
    assert job.folder == tmp_path / "here" / "seed=2"


def test_jobs_are_cancelled_by_a_file_before_they_begin(command, tmp_path, capsys):
    def cancel(settings, job):
        if settings.seed == 1:
            (job.sweep / "CANCEL").write_text("seed=2 seed=4*\n")

    code, ran, _ = command("merge", "-m", "seed=1,2,3,40", "hydra.sweep.dir=here", job=cancel)
    assert (code, [settings.seed for settings, _ in ran]) == (0, [1, 3])
    (tmp_path / "here" / "CANCEL").unlink()
    (tmp_path / "runs").mkdir(exist_ok=True)
    (tmp_path / "runs" / "CANCEL").write_text("slow\n")
    _, ran, _ = command("merge", "-m", "seed=5,6", "tags=[slow,x]")
    assert ran == []
    _, ran, _ = command("merge", "-m", "seed=5,6", "tags=[quick]")
    assert len(ran) == 2
    (tmp_path / "runs" / "CANCEL").write_text("")
    assert command("merge", "-m", "seed=5,6")[1] == []
    assert len(command("merge", "seed=5")[1]) == 1  # a single job is not a sweep


def test_a_search_goes_on_where_it_was_killed(command):
    """The seed proposes the same points again, so a search that is started anew finds its finished jobs."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")

    def value(settings, job):
        return sum((one - best) ** 2 for one, best in zip(settings.merge["weight"], (0.2, 0.9, 1.2), strict=True))

    words = ("-m", "hparams_search=merge_weights", "hydra.sweep.dir=here")
    tried = []
    for trials in (4, 24):
        code, ran, _ = command("merge", *words, f"hydra.sweeper.n_trials={trials}", job=value)
        assert code == 0
        assert all(settings.search_value == "heldout_won" for settings, _ in ran)
        tried.append([tuple(settings.merge["weight"]) for settings, _ in ran])
    assert tried[1][:4] == tried[0]
    losses = [sum((one - best) ** 2 for one, best in zip(point, (0.2, 0.9, 1.2), strict=True)) for point in tried[1]]
    assert min(losses[10:]) < min(losses[:10])


def test_a_search_whose_jobs_all_fail_says_why(command):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper.optuna_sweeper")

    def wrong(settings, job):
        raise UserError("there are two targets")

    words = ("-m", "hparams_search=merge_weights", "hydra.sweep.dir=here", "hydra.sweeper.n_trials=2")
    code, ran, said = command("merge", *words, job=wrong)
    assert (code, len(ran)) == (2, 2)
    assert said.count("there are two targets") == 2
    assert "No trials are completed" not in said


def test_a_single_job_says_its_problems_without_a_traceback(command):
    def wrong(settings, job):
        raise UserError(["one", "two"])

    assert command("train", job=wrong)[0::2] == (2, "2 problems:\n  - one\n  - two\n")


@pytest.mark.parametrize("word", ["hydra.run.dir", "paths.runs"])
def test_a_folder_that_cannot_be_made_is_told(command, tmp_path, word):
    (tmp_path / "file").write_text("no folder")
    code, ran, said = command("train", f"{word}=file/x")
    assert (code, ran) == (2, [])
    assert "file/x" in said
    assert "name folders that can be written: hydra.run.dir" in said


def test_a_full_disk_stops_no_other_job(command):
    def full(settings, job):
        if settings.seed == 1:
            raise OSError(errno.ENOSPC, "No space left on device")

    code, ran, said = command("merge", "-m", "seed=1,2", job=full)
    assert (code, len(ran)) == (2, 2)
    assert "seed=1: No space left on device; name folders" in said
    assert "Traceback" not in said


def test_a_plan_leaves_nothing_of_its_own_and_all_of_others(command, tmp_path):
    def speak(settings, job):
        logging.getLogger("fusion").info("planned")

    for words in (["plan=true"], ["-m", "plan=true", "seed=1,2"]):
        assert command("merge", *words, job=speak)[0] == 0
        assert not list(tmp_path.glob("runs/*"))
    (tmp_path / "here").mkdir()
    (tmp_path / "here/result.json").write_text("{}")
    (tmp_path / "here/launch.log").write_text("of before\n")
    assert command("merge", "plan=true", "hydra.run.dir=here", job=speak)[0] == 0
    assert (tmp_path / "here/launch.log").read_text().startswith("of before\n")
    assert (tmp_path / "here/result.json").is_file()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/of_another_program.log").write_text("kept")
    assert command("merge", "plan=true", "hydra.run.dir=logs", job=speak)[0] == 0
    assert (tmp_path / "logs/of_another_program.log").read_text() == "kept"


def test_a_plan_with_a_mistake_leaves_nothing_to_run_again(command, tmp_path):
    def refuse(settings, job):
        raise UserError("no such target")

    assert command("merge", "plan=true", job=refuse)[0] == 2
    assert not list(tmp_path.glob("runs/*"))
    code, _, said = command("merge", "-m", "plan=true", "seed=1,2", job=refuse)
    assert (code, said.count("no such target")) == (2, 2)
    assert "run again" not in said
    assert not list(tmp_path.glob("runs/*"))


def test_mistakes_that_an_entry_point_finds_are_told_with_others(command, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["merge.py", "seed=-1", "merge.tau=often"])
    with pytest.raises(SystemExit, match="2"):
        launch("merge", lambda settings, job: None, None, lambda settings: ["tau"])
    assert capsys.readouterr().err == "2 problems:\n  - seed=-1: at least 0 is expected\n  - tau\n"


def test_an_error_of_ours_is_no_users_mistake(command):
    def broken(settings, job):
        raise ZeroDivisionError("ours")

    with pytest.raises(ZeroDivisionError, match="ours"):
        command("train", job=broken)


def test_jobs_of_a_fused_sweep_wait_for_each_other(command):
    together = []
    words = ("-m", "merge=sce", "merge.tau=0.1,0.2", "sweep=fused")
    code, ran, _ = command("merge", *words, together=together.append)
    ((first, second),) = together
    assert (code, ran) == (0, [])
    assert [settings.merge["tau"] for settings, _ in (first, second)] == [0.1, 0.2]
    assert first[1].folder != second[1].folder
    assert first[1].sweep == second[1].sweep
    assert all("sweep=fused" in job.command for _, job in (first, second))


def test_what_a_fused_sweep_complains_of_is_told(command):
    def fail(jobs):
        raise UserError([f"{job.name}: no" for _, job in jobs])

    code, _, complained = command("merge", "-m", "merge=sce", "merge.tau=0.1,2", "sweep=fused", together=fail)
    assert code == 2
    assert "merge.tau=0.1: no" in complained
    assert "merge.tau=2: no" in complained


def test_a_fused_sweep_needs_one_process(command):
    words = ("-m", "merge=sce", "merge.tau=0.1,0.2", "sweep=fused", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    together = []
    code, ran, complained = command("merge", *words, together=together.append)
    assert (code, ran, together) == (2, [], [])
    assert "jobs in processes of their own cannot share a pass; leave launcher out" in complained


def test_a_single_job_is_never_fused(command):
    together = []
    code, ran, _ = command("merge", "merge=sce", "sweep=fused", together=together.append)
    assert (code, len(ran), together) == (0, 1, [])
