"""Checkpoints of several processes are read by one, and the other way round."""

from dataclasses import replace

import pytest
from checkpointed import STEPS, assert_equal, changed, prepared
from parallel_fits import run_fits
from safetensors.torch import load_file

from fusion.config.schema import ParallelConfig
from fusion.training.checkpoints import find_start
from fusion.training.fit import fit
from fusion.training.module import FusionModule

RELATIVE = 1e-5
"""How far losses may be from those of one process that nobody disturbed."""
KINDS = ("ddp", "fsdp", "fsdp1")


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_source):
    """No dropout, whose draws belong to a number of processes."""
    module = prepared(tmp_path_factory.mktemp("devices"), tiny_source, dropout=0.0)
    return changed(module, keep_checkpoints=9)


def losses_of(data, folder, start=None):
    losses = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModule, "on_before_optimizer_step", lambda one, _: losses.append(float(one.outcome.loss)))
        fit(data.config, data, [], folder, start)
    return losses


def test_two_processes_and_one_read_each_others_checkpoints(data, tmp_path):
    """DDP, FSDP2, FSDP2 in two replicas and the older FSDP; all starts of two processes in one."""
    keeping = changed(data, micro_batch_size=1)
    losses = losses_of(keeping, tmp_path / "single")
    at_ten = tmp_path / "single" / "checkpoints" / "step-000010"

    def config(name, **changes):
        parallel = ParallelConfig(name=name, devices=2, accelerator="cpu", **changes)
        return replace(keeping.config, parallel=parallel)

    whole = {f"{name}_whole": config(name) for name in KINDS}
    here = {f"{name}_from_single": config(name) for name in KINDS}
    again = {f"{name}_xagain": config(name) for name in KINDS}  # behind `whole`
    replicas = {"hsdp_from_single": config("fsdp", replicas=2), "hsdp_whole": config("fsdp", replicas=2)}
    starts = dict.fromkeys([*here, "hsdp_from_single"], at_ten)
    runs = tmp_path / "runs"
    starts |= {f"{name}_xagain": runs / f"{name}_whole" / "checkpoints" / "step-000015" for name in KINDS}
    found = run_fits(runs, data, whole | here | again | replicas, starts=starts)

    for name in [*whole, "hsdp_whole"]:
        assert found[name].losses == pytest.approx(losses, rel=RELATIVE), name
        start = find_start(changed(keeping, resume=str(runs / name / "checkpoints" / "step-000010")), tmp_path)
        assert start.state.world == 2
        on = losses_of(changed(keeping, checkpoint_every_steps=0), tmp_path / "on", start)
        assert on == pytest.approx(losses[10:], rel=RELATIVE), name
    for name in [*here, "hsdp_from_single"]:
        assert found[name].losses == pytest.approx(losses[10:], rel=RELATIVE), name
    for name in KINDS:
        before, after = found[f"{name}_whole"], found[f"{name}_xagain"]
        assert after.losses == before.losses[15:]
        assert_equal(*(load_file(one.model / "model.safetensors") for one in (after, before)))
    assert len(losses) == STEPS
