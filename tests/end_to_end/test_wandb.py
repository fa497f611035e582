"""W&B records of two sweeps, read back from the offline files: no run mixes with another, all say enough."""

from collections import defaultdict

import pytest
from wandb_file import records, values

QUICK = (
    "world=smoke",
    "trainer.max_steps=3",
    "trainer.log_every_steps=1",
    "logger=wandb",
    "trainer.progress_bar=false",
)


class Found:
    """One offline run."""

    def __init__(self, folder):
        self.runs, self.metrics, self.summary, self.artifacts, self.config = [], defaultdict(list), {}, {}, {}
        for record in records(folder):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                self.runs.append(record.run)
                self.config |= values(record.run.config.update)
            elif kind == "config":
                self.config |= values(record.config.update)
            elif kind == "history":
                for name, value in values(record.history.item).items():
                    self.metrics[name].append(value)
            elif kind == "summary":
                self.summary |= values(record.summary.update)
            elif kind == "artifact":
                self.artifacts[record.artifact.type] = record.artifact
        self.run = self.runs[0]


@pytest.fixture(scope="module")
def runs(workplace, targets):
    """Folder of the job -> its run; a training sweep of two jobs, and a merge sweep of two jobs over the targets."""
    folder = workplace.root / "wandb"
    workplace.run("train", "-m", *QUICK, "source=tiny_a,tiny_b", "tags=[first]", f"hydra.sweep.dir={folder}/trained")
    merge = ("merge=task_arithmetic,sce", "logger=wandb", f"targets=[{targets}]", f"hydra.sweep.dir={folder}/merged")
    workplace.run("merge", "-m", *merge)
    return {path.parents[1].name: Found(path) for path in folder.glob("*/*/wandb/offline-run-*")}


def test_every_job_is_one_run_of_its_sweep(runs):
    assert sorted(runs) == ["merge=sce", "merge=task_arithmetic", "source=tiny_a", "source=tiny_b"]
    assert len({found.run.run_id for found in runs.values()}) == 4
    assert {found.run.run_group for found in runs.values()} == {"trained", "merged"}
    for job, found in runs.items():
        stage = "merge" if job.startswith("merge") else "train"
        assert (found.run.job_type, found.run.display_name) == (stage, f"{stage} {job}")
    assert list(runs["source=tiny_a"].run.tags) == ["first"]


def test_a_run_has_its_own_settings_and_losses_alone(runs):
    for name in ("tiny_a", "tiny_b"):
        found = runs[f"source={name}"]
        assert found.config["source"]["name"] == name
        assert found.config["trainer"]["max_steps"] == 3
        assert len(found.metrics["train/loss"]) == 3
    first, second = (runs[f"source={name}"].metrics["train/loss"] for name in ("tiny_a", "tiny_b"))
    assert first != second


def test_a_file_holds_one_run_alone(runs):
    """Jobs of a sweep run one after the other in one process: nothing of one may be written to another's file."""
    for job, found in runs.items():
        assert {run.run_id for run in found.runs} == {found.run.run_id}, job
        key, value = job.split("=")
        assert f"{key}={value}" in found.config["command"]
        assert found.config[key]["method" if key == "merge" else "name"] == value
        steps = found.metrics["_step"]
        assert steps == sorted(set(steps)), job
    assert len({found.config["command"] for found in runs.values()}) == len(runs)


def test_the_summary_sorts_runs(runs):
    assert runs["source=tiny_a"].summary["steps"] == 3
    merged = runs["merge=sce"].summary
    assert 0 <= merged["score/average"] <= 1
    assert merged["scale"] == 1.0
    assert sum(merged[f"coefficient/tiny_{name}"] for name in "abc") == pytest.approx(1)


def test_tables_of_scores_and_coefficients(runs):
    found = runs["merge=sce"].metrics
    skills = [name for name in runs["merge=sce"].summary if name.startswith("score/")]
    assert found["table/scores/ncols"] == [3 + len(skills)]
    (models,) = found["table/scores/nrows"]
    assert models >= 8  # pivot, three sources, three targets, the merge; SFT where another test has trained it
    assert found["table/coefficients/ncols"] == [4]
    assert found["table/coefficients/nrows"][0] > 10


def test_artifacts_say_what_they_are_made_of(runs):
    """Named by content: a merge names the targets that trainings have made."""
    target = runs["source=tiny_a"].artifacts["target"]
    assert target.name.startswith("target-tiny_a-")
    for part in ("dialogues-train-", "model-pivot-", "model-tiny_a-", "distributions-tiny_a-"):
        assert part in target.metadata
    merged = runs["merge=sce"].artifacts["merged"]
    assert all(f"target-tiny_{name}-" in merged.metadata for name in "abc")
