"""Which of several nodes this is, and where the first one is: from Slurm, or from what the user says."""

import os

import pytest

from fusion.config import UserError
from fusion.config.schema import ParallelConfig
from fusion.processes.starter import Node
from fusion.training.nodes import FIRST_PORT, NUM_PORTS, first_host, this_node

TWO = ParallelConfig("fsdp", devices=2, num_nodes=2)
SLURM = {
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09,12]",
    "SLURM_JOB_ID": "1234567",
}


@pytest.fixture
def said(monkeypatch):
    """Sets what launchers say in the environment, and nothing else."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name == "NODE_RANK":
            monkeypatch.delenv(name)

    def say(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return say


def test_one_node_asks_nobody(said):
    said(SLURM | {"SLURM_NODEID": "7"})
    assert this_node(ParallelConfig("ddp", devices=2)) == Node(0, 1, "")


def test_slurm_says_all(said):
    said(SLURM)
    assert this_node(TWO) == Node(1, 2, f"gpu07:{FIRST_PORT + 1234567 % NUM_PORTS}")


def test_jobs_that_share_a_machine_have_ports_of_their_own(said):
    ports = set()
    for job in range(1234567, 1234572):
        said(SLURM | {"SLURM_JOB_ID": str(job)})
        ports.add(int(this_node(TWO).address.rpartition(":")[2]))
    assert len(ports) == 5
    assert all(1024 < port < 32768 for port in ports)  # below those that Linux hands out


def test_the_step_counts_more_than_the_job(said):
    """Two tasks of a larger allocation (srun --nodes=2)."""
    said(SLURM | {"SLURM_NNODES": "5", "SLURM_NTASKS": "5", "SLURM_JOB_NODELIST": "login1"})
    assert this_node(TWO).address.startswith("gpu07:")


def test_without_a_step_the_job_counts(said):
    said({"SLURM_NODEID": "0", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "a1,a2"})
    assert this_node(TWO) == Node(0, 2, f"a1:{FIRST_PORT}")


def test_a_rendezvous_goes_before_slurms_list(said):
    said(SLURM)
    assert this_node(ParallelConfig("ddp", num_nodes=2, rendezvous="other:29500")) == Node(1, 2, "other:29500")


def test_the_user_says_all(said):
    said({"NODE_RANK": "1"})
    assert this_node(ParallelConfig("ddp", num_nodes=2, rendezvous="node0:29400")) == Node(1, 2, "node0:29400")


@pytest.mark.parametrize(
    ("variables", "problems"),
    [
        ({}, ["which node this is has to be said"]),
        ({"NODE_RANK": "first"}, ["which node this is has to be said"]),
        ({"NODE_RANK": "0"}, ["outside Slurm parallel.rendezvous has to say HOST:PORT"]),
        ({"NODE_RANK": "2"}, [r"this is node 2 (from 0), but parallel.num_nodes=2"]),
        (SLURM | {"SLURM_STEP_NODELIST": "[1-2]"}, ["Slurm's list of nodes cannot be read: [1-2]"]),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "4"}, ["Slurm started 4 tasks on 2 nodes; start one per node"]),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "6"},
            ["parallel.num_nodes=2, but Slurm gave 3 nodes", "Slurm started 6 tasks on 3 nodes"],
        ),
    ],
)
def test_what_is_missing_or_says_something_else_is_told(said, variables, problems):
    said(variables)
    with pytest.raises(UserError) as raised:
        this_node(TWO)
    assert len(raised.value.problems) == len(problems)
    assert all(part in found for part, found in zip(problems, raised.value.problems, strict=True))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu-a.cluster.org", "gpu-a.cluster.org"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[1-4]", "gpu1"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("rack[2-3]-node,other", "rack2-node"),
        ("rack[1-2]node[3-4]", "rack1node3"),
    ],
)
def test_first_host_of_slurms_lists(nodes, first):
    assert first_host(nodes) == first
