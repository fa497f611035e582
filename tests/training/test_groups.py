"""Groups of processes: idle devices, norms over flat shards, several nodes, and one job after the other."""

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from checkpointed import changed, prepared
from parallel_fits import IDLE, run_fits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from waiting import PATIENCE

from fusion.config.schema import ParallelConfig
from fusion.processes.starter import PACKAGE_ROOT, Group, Node, run_group
from fusion.training.fit import fit
from fusion.training.module import FusionModule
from fusion.training.processes import MODULE, Task, train_in_processes
from fusion.training.target import train_target

RELATIVE = 1e-5
"""How far losses, norms and weights may be from those of one process, over 20 steps in float32."""
STEPS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_source):
    """Steps of four or five dialogues of different lengths, one to a micro-batch; gradients are clipped in most."""
    module = prepared(tmp_path_factory.mktemp("groups"), tiny_source, dropout=0.0)
    return changed(module, micro_batch_size=1, max_steps=STEPS, checkpoint_every_steps=STEPS)


def alone(data, **changes):
    """Losses, norms and weights of one process that reads whole steps."""
    module, seen = changed(data, micro_batch_size=0, **changes), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FusionModule, "on_before_optimizer_step", lambda one, _: seen.append(one.outcome))
        model = fit(module.config, module, []).model
    norms = [float(one.grad_norm) for one in seen]
    assert len(seen) == STEPS
    assert max(norms) > data.config.optim.grad_clip > 0
    return [float(one.loss) for one in seen], norms, {name: one.detach() for name, one in model.named_parameters()}


def spread(data, name, **settings):
    return replace(data.config, parallel=ParallelConfig(name, accelerator="cpu", **{"devices": 2, **settings}))


def assert_exported(folder, weights):
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert loaded.keys() == weights.keys()
    for name, one in weights.items():
        torch.testing.assert_close(loaded[name], one, rtol=RELATIVE, atol=RELATIVE)


def test_idle_devices_flat_shards_and_all_that_saves_memory(data, tmp_path):
    losses, norms, weights = alone(data)
    configs = {f"{name}{IDLE}": spread(data, name) for name in ("ddp", "fsdp", "fsdp1")}
    configs["fsdp1_clips"] = spread(data, "fsdp1")
    saving = changed(data, gradient_checkpointing=True, compile=True, packing=True, micro_batch_tokens=60)
    configs["fsdp_saves"] = spread(saving, "fsdp", cpu_offload=True)
    for name, found in run_fits(tmp_path, data, configs).items():
        assert found.losses == pytest.approx(losses, rel=RELATIVE), name
        assert found.norms == pytest.approx(norms, rel=RELATIVE), name
        assert_exported(found.model, weights)


class Lines:
    """A logger that keeps what the starter hands on."""

    def __init__(self):
        self.losses, self.norms = [], []

    def log_metrics(self, metrics, step):
        self.losses.append(metrics["train/loss"])
        self.norms.append(metrics["train/grad_norm"])

    def save(self):
        pass


@contextmanager
def kept_port():
    """A port that nobody else is given before the first node listens there: bound here all the while."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the node does; neither disturbs the other then
        one.bind(("127.0.0.1", 0))
        yield one.getsockname()[1]


def test_two_nodes_of_two_processes_with_a_replica_each(data, tmp_path):
    """HSDP as it is meant: sharded within a node, reduced between nodes. A job of four devices in the end."""
    larger, lines = changed(data, batch_size=8, epochs=10), Lines()
    config = spread(larger, "fsdp", num_nodes=2, replicas=2)

    def train(number, address):
        return train_in_processes(config, larger, [lines], tmp_path, "card", Node(number, 2, address))

    with kept_port() as port, ThreadPoolExecutor(2) as pool:
        first, second = pool.map(train, range(2), [f"127.0.0.1:{port}"] * 2)
    assert (first.steps, second.steps) == (STEPS, STEPS)
    losses, norms, weights = alone(larger)
    assert lines.losses == pytest.approx(losses, rel=RELATIVE)  # the first process alone tells
    assert lines.norms == pytest.approx(norms, rel=RELATIVE)
    assert_exported(tmp_path / "model", weights)
    assert world_of(tmp_path) == 4


def world_of(folder):
    checkpoint = folder / "checkpoints" / f"step-{STEPS:06d}"
    world = json.loads((checkpoint / "state.json").read_text())["world"]
    assert len(list(checkpoint.glob("random-*.json"))) == world
    return world


def test_a_group_of_another_size_is_refused(data, tmp_path):
    config = spread(data, "ddp")
    Task(config, data.prepared.fused.folder.resolve(), data.prepared.inputs, tmp_path, "card").save(tmp_path)
    failure = run_group(Group(MODULE, tmp_path, size=1))
    assert failure.is_of_user
    assert failure.problems == ["1 processes were started, but 2 were to work together"]


def test_every_job_has_the_devices_that_it_asks_for(data, tmp_path):
    """In one process, one after the other, as jobs of a sweep: one device, two, one again."""
    for name, config in (("one", data.config), ("two", spread(data, "ddp")), ("one_again", data.config)):
        module = changed(data, parallel=config.parallel)
        train_target(config, module, [], tmp_path / name, "card", Node())
    assert [world_of(tmp_path / name) for name in ("one", "two", "one_again")] == [1, 2, 1]
    models = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "one_again")]
    assert all(torch.equal(one, models[1][weight]) for weight, one in models[0].items())
    assert_exported(tmp_path / "two" / "model", alone(data)[2])


DONE = """
import atexit, os, sys
from pathlib import Path
import torch
from fusion.processes.member import take_part

def work():
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/store", rank=0, world_size=1)
    atexit.register(os.abort)
    print("done")

take_part(Path(sys.argv[1]), 1, work)
"""


def test_an_interpreter_that_aborts_at_its_end_is_no_failure(tmp_path):
    """Threads of the collective operations may do that to a process that has done all its work."""
    environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1"}
    command, pipe = [sys.executable, "-c", DONE, str(tmp_path)], subprocess.PIPE
    with subprocess.Popen(command, cwd=PACKAGE_ROOT, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "done\n"
        assert process.wait(PATIENCE) == 0
    assert not list(tmp_path.glob("failure-*"))
