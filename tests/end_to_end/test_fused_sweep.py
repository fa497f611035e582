"""Jobs of one sweep that share a pass over the inputs, and merges that are scored without being written."""

import json
import shutil

import pytest

TAUS = ("0.2", "1.0")


def result(folder):
    return json.loads((folder / "result.json").read_text())


def merged_row(folder):
    row = result(folder)["comparison"][-1]
    assert row["kind"] == "merged"
    return row


@pytest.fixture(scope="module")
def sweeps(workplace, targets, sft):
    """Folders of one sweep, run separately and fused."""
    for name in ("separate", "fused"):
        words = ("merge=sce", f"merge.tau={','.join(TAUS)}", f"sweep={name}", f"hydra.sweep.dir=runs/{name}")
        workplace.run("merge", "-m", *words)
    return workplace.runs / "separate", workplace.runs / "fused"


def test_a_fused_sweep_leaves_what_separate_jobs_leave(sweeps):
    separate, fused = sweeps
    for tau in TAUS:
        alone, together = (sweep / f"merge.tau={tau}" for sweep in (separate, fused))
        for path in (alone / "model").iterdir():
            if path.name == "README.md":  # the card tells the command
                continue
            assert path.read_bytes() == (together / "model" / path.name).read_bytes(), path.name
        assert merged_row(alone)["scores"] == merged_row(together)["scores"]
        assert result(alone)["fingerprint"] == result(together)["fingerprint"]
        assert {path.name for path in alone.iterdir()} == {path.name for path in together.iterdir()}
        assert (together / "merge.html").exists()
        assert result(together)["merge"]["merged_together"] == 2
        assert result(alone)["merge"]["merged_together"] == 1
        assert "sweep=fused" in (together / "command.txt").read_text()
    merged = [row for row in json.loads((fused / "comparison.json").read_text()) if row["kind"] == "merged"]
    assert [row["parameters"]["tau"] for row in merged] == [
        row["parameters"]["tau"]
        for row in json.loads((separate / "comparison.json").read_text())
        if row["kind"] == "merged"
    ]


def test_only_what_is_missing_of_a_fused_sweep_is_merged_again(workplace, sweeps):
    folder = shutil.copytree(sweeps[1], workplace.runs / "fused_again")
    again = ("-m", "merge=sce", f"merge.tau={','.join(TAUS)}", "sweep=fused", f"hydra.sweep.dir={folder}")
    first, second = (folder / f"merge.tau={tau}" for tau in TAUS)
    kept = (first / "result.json").read_bytes()
    (second / "result.json").unlink()
    printed = workplace.run("merge", *again)
    assert printed.count("finished before") == 1
    assert (first / "result.json").read_bytes() == kept
    assert result(second)["merge"]["merged_together"] == 1


def test_scores_without_a_model_on_the_disk(workplace, merges, sweeps):
    folder = workplace.runs / "unsaved"
    words = ("merge=sce", f"merge.tau={','.join(TAUS)}", "merge.scale=1.0,search", "sweep=fused", "save=false")
    workplace.run("merge", "-m", *words, f"hydra.sweep.dir={folder}")
    jobs = {path.parent.name: path.parent for path in folder.glob("*/result.json")}
    assert len(jobs) == 4
    for job in jobs.values():
        found = result(job)
        assert found["status"] == "finished"
        assert found["model"] is None
        assert found["merge"]["merged_together"] == 4
        assert not list(job.rglob("*.safetensors"))
    for tau in TAUS:
        (job,) = (one for name, one in jobs.items() if f"tau={tau}" in name and "search" not in name)
        saved = merged_row(sweeps[0] / f"merge.tau={tau}")
        assert (merged_row(job)["scores"], merged_row(job)["nll_per_byte"]) == (saved["scores"], saved["nll_per_byte"])
    (searched,) = (one for name, one in jobs.items() if "tau=1.0" in name and "search" in name)
    saved = merges / "merge=sce"
    assert result(searched)["scale"] == result(saved)["scale"]
    assert result(searched)["scale_search"] == result(saved)["scale_search"]
    assert merged_row(searched)["scores"] == merged_row(saved)["scores"]


def test_a_mistake_in_one_job_of_a_fused_sweep_stops_no_other(workplace, targets):
    folder = workplace.runs / "one_is_wrong"
    words = ("merge=sce", "merge.tau=0.5,7", "sweep=fused", "evaluation=none", f"hydra.sweep.dir={folder}")
    printed = workplace.run("merge", "-m", *words, code=2)
    assert "merge.tau=7: merge method 'sce': tau must be" in printed
    assert "merge.tau=0.5: " not in printed.split("problem", 1)[1]
    assert result(folder / "merge.tau=0.5")["status"] == "finished"
    assert result(folder / "merge.tau=7")["status"] == "failed"


def test_nor_does_a_method_for_other_targets(workplace, targets):
    folder = workplace.runs / "one_does_not_fit"
    words = ("merge=sce,slerp", "sweep=fused", "evaluation=none", f"hydra.sweep.dir={folder}")
    printed = workplace.run("merge", "-m", *words, code=2)
    assert "merge=slerp: merge method 'slerp' takes exactly 2 targets, got 3" in printed
    assert result(folder / "merge=sce")["status"] == "finished"
    assert result(folder / "merge=slerp")["status"] == "failed"
