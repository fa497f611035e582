"""The main job with other choices: data of one's own, other templates, many-to-one, loggers."""

import json
import shutil

import pytest

from fusion.dialogues.dialogue import read_jsonl, write_jsonl

FEW = ("world=smoke", "trainer.max_steps=3")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_models_and_dialogues_copied_elsewhere(workplace, targets, tmp_path):
    (world,) = (workplace.cache / "world").glob("[!.]*")
    for name, copy in (("pivot", "first"), ("tiny_a", "second")):
        shutil.copytree(world / "models" / name, tmp_path / copy)
    write_jsonl(tmp_path / "mine.jsonl", read_jsonl(world / "dialogues" / "train.jsonl")[:60])
    workplace.run(
        "train",
        "pivot=hf",
        f"pivot.path={tmp_path / 'first'}",
        "source=hf",
        f"source.path={tmp_path / 'second'}",
        "data=jsonl",
        f"data.path={tmp_path / 'mine.jsonl'}",
        "trainer.max_steps=2",
        "trainer.batch_size=8",
        "hydra.run.dir=runs_hf/job",
    )
    found = result(workplace.root / "runs_hf" / "job")
    assert found["steps"] == 2
    assert found["report"]["dialogues"]["train"] + found["report"]["dialogues"]["heldout"] == 60
    assert "optim:\n  lr: 5.0e-06" in (workplace.root / "runs_hf" / "job" / "config.yaml").read_text()


ALIGNMENTS = ("em", "mined", "ms_released", "strict", "bpm", "canonical", "alm", "uld", "random")


def test_every_other_alignment(workplace, targets):
    """One sweep: the teacher pass is done once, by the sweep of the targets."""
    sweep = workplace.root / "variants" / "alignments"
    before = stores(workplace)
    workplace.run("train", "-m", *FEW, f"alignment={','.join(ALIGNMENTS)}", f"hydra.sweep.dir={sweep}")
    reports = {name: result(sweep / f"alignment={name}")["report"]["alignment"]["tiny_a"] for name in ALIGNMENTS}
    for report in reports.values():
        assert 0 < report["covered"] <= report["aligned"] <= 1
    assert {name for name, report in reports.items() if report["mass_kept"] is None} == {"alm", "uld"}
    assert reports["strict"]["covered"] < reports["canonical"]["covered"]
    assert stores(workplace) == before


def test_hard_labels_of_several_sources_are_merged(workplace, targets):
    """References of the dialogues that a source won: targets, not a baseline."""
    folder = workplace.root / "hard"  # elsewhere, so that these are not the latest targets of other tests
    place = (f"paths.runs={folder}", f"hydra.sweep.dir={folder}/targets")
    workplace.run("train", "-m", *FEW, "experiments=hard_labels", "source=tiny_a,tiny_b", *place)
    row = result(folder / "targets" / "source=tiny_a")["comparison"][-1]
    assert (row["kind"], row["model"], row["parameters"]["fusion"]["keep_pivot_won"]) == ("target", "tiny_a", 0.0)
    workplace.run("merge", "merge=linear", f"paths.runs={folder}", f"hydra.run.dir={folder}/merged")
    assert result(folder / "merged")["targets"] == ["tiny_a", "tiny_b"]


def stores(workplace):
    """Names of the finished distribution stores."""
    return {store.name for store in (workplace.cache / "teaching").glob("[!.]*")}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("levels", ("fusion.level=span,token",)),
        ("functions", ("fusion=avg_ce,source_only,pivot_only",)),
        ("edges", ("alignment.tail=scale,bucket", "alignment.fallback=pivot,skip")),
        ("paths", ("alignment=ms,strict", "alignment.path=dtw")),
        ("rows", ("teacher=nucleus,random",)),
    ],
)
def test_choices_of_every_step(workplace, targets, name, settings):
    sweep = workplace.root / "variants" / name
    workplace.run("train", "-m", *FEW, *settings, "evaluation=none", f"hydra.sweep.dir={sweep}")
    jobs = [result(file.parent) for file in sweep.glob("*/result.json")]
    assert len(jobs) >= 2
    assert all(job["status"] == "finished" and job["steps"] == 3 for job in jobs)
    assert len({job["metrics"]["train/loss"] for job in jobs}) == len(jobs)


def test_workers_of_a_sweep_share_a_teacher_pass(workplace, targets):
    """Two processes that joblib starts read their shards; the job behind them finds everything read."""
    shared = (*FEW, "teacher.top_k=7", "teacher.shard_dialogues=16")
    sweep = "hydra.sweep.dir=variants/workers"
    workers = ("teacher.workers=2", "teacher.worker=0,1", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    workplace.run("train", "-m", *shared, *workers, sweep)
    jobs = [result(file.parent) for file in (workplace.root / "variants" / "workers").glob("*/result.json")]
    assert sorted(job["worker"] for job in jobs) == [0, 1]
    assert all(share["shards"] for job in jobs for share in job["shares"])
    read = stores(workplace)
    workplace.run("train", *shared, "evaluation=none", "hydra.run.dir=variants/after_workers")
    assert stores(workplace) == read


def test_native_template_aligns_message_contents(workplace, targets):
    workplace.run("train", *FEW, "template=native", "hydra.run.dir=variants/native")
    report = result(workplace.root / "variants" / "native")["report"]["alignment"]["tiny_a"]
    assert report["covered"] > 0.5


def test_many_to_one(workplace, targets):
    workplace.run("train", *FEW, "source=tiny_all", "hydra.run.dir=variants/all")
    found = result(workplace.root / "variants" / "all")
    assert set(found["report"]["alignment"]) == {"tiny_a", "tiny_b", "tiny_c"}
    assert sum(found["report"]["who_won"].values()) == found["report"]["dialogues"]["train"]


def test_keep_pivot_won_leaves_dialogues_out(workplace, targets):
    workplace.run("train", *FEW, "fusion.keep_pivot_won=0", "hydra.run.dir=variants/won")
    report = result(workplace.root / "variants" / "won")["report"]
    assert report["trained_on"] == report["who_won"]["tiny_a"] < report["dialogues"]["train"]


def test_hard_control_trains_on_references_of_won_dialogues(workplace, targets):
    workplace.run("train", *FEW, "objective=sft", "fusion.keep_pivot_won=0", "hydra.run.dir=variants/hard")
    found = result(workplace.root / "variants" / "hard")
    assert found["report"]["trained_on"] == found["report"]["who_won"]["tiny_a"]
    assert found["metrics"]["train/loss"] == pytest.approx(found["metrics"]["train/ce"])


def test_wandb_offline_needs_no_account_and_names_the_upload(workplace, targets):
    output = workplace.run("train", *FEW, "logger=wandb", "hydra.run.dir=variants/wandb")
    assert "wandb sync " in output
    assert list((workplace.root / "variants" / "wandb").glob("wandb/offline-run-*/run-*.wandb"))


def test_tensorboard(workplace, targets):
    workplace.run("train", *FEW, "logger=tensorboard", "hydra.run.dir=variants/tensorboard")
    assert list((workplace.root / "variants" / "tensorboard").rglob("events.out.tfevents.*"))


def test_csv_has_the_loss_parts(workplace, targets):
    (table,) = (targets / "source=tiny_a").rglob("metrics.csv")
    header = table.read_text().splitlines()[0].split(",")
    assert {"train/loss", "train/ce", "train/fusion", "train/lr", "score/average"} <= set(header)


MEASURES = {
    "fisher": "squared_gradients",
    "regmean": "input_products",
    "learned": "learned_coefficients",
    "fisher_learned": "fisher_coefficients",
}


def test_methods_that_measure_on_dialogues(workplace, targets):
    """What was measured is kept, so that another scale measures nothing."""
    sweep = workplace.root / "variants" / "measured"
    choice = (f"merge={','.join(MEASURES)}", "merge.scale=2,search", "evaluation=none")
    workplace.run("merge", "-m", *choice, f"hydra.sweep.dir={sweep}")
    for method, kind in MEASURES.items():
        found = result(sweep / f"merge.scale=search,merge={method}")
        assert found["status"] == "finished"
        assert found["merge"]["evidence"]["kind"] == kind
        assert len(found["scale_search"]) >= 5
    for method in ("learned", "fisher_learned"):
        losses = result(sweep / f"merge.scale=2,merge={method}")["merge"]["evidence"]["nats_per_byte"]
        assert losses[-1] < losses[0]
    stages = ("squared_gradients", "input_products", "learned_coefficients")
    assert [len(list((workplace.cache / stage).glob("[!.]*"))) for stage in stages] == [3, 3, 2]
