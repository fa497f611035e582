"""Several machines that train together: which one this is, and where the first one is reached."""

import os
import re

from fusion.config import UserError, raise_problems
from fusion.config.schema import ParallelConfig
from fusion.processes.starter import Node

FIRST_PORT, NUM_PORTS = 20_000, 10_000
"""Ports of Slurm's jobs: the job's number chooses one, so that jobs which share a machine do not meet."""


def this_node(parallel: ParallelConfig) -> Node:
    """Its number comes from Slurm or from NODE_RANK, the address of the first one from `parallel.rendezvous` or Slurm.

    Raises:
        UserError: these are missing, or say something else than `parallel.num_nodes`.
    """
    if parallel.num_nodes == 1:
        return Node()
    number, is_slurm = _number(), "SLURM_NODEID" in os.environ
    if is_slurm:
        _check_slurm(parallel)
    if not number < parallel.num_nodes:
        raise UserError(f"this is node {number} (from 0), but parallel.num_nodes={parallel.num_nodes}")
    return Node(number, parallel.num_nodes, parallel.rendezvous or _slurm_address())


def _number() -> int:
    said = os.environ.get("SLURM_NODEID", os.environ.get("NODE_RANK"))
    if said is None or not said.isdigit():
        raise UserError(
            "parallel.num_nodes above 1: which node this is has to be said; start one task per node under Slurm, or "
            "set NODE_RANK=0 on the first node, NODE_RANK=1 on the next one, ..."
        )
    return int(said)


def _check_slurm(parallel: ParallelConfig) -> None:
    """Slurm's step has one task on each of the nodes: its processes are started by us."""
    nodes = os.environ.get("SLURM_STEP_NUM_NODES", os.environ.get("SLURM_NNODES", str(parallel.num_nodes)))
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", nodes))
    problems = []
    if int(nodes) != parallel.num_nodes:
        problems.append(f"parallel.num_nodes={parallel.num_nodes}, but Slurm gave {nodes} nodes")
    if int(tasks) != int(nodes):
        problems.append(f"Slurm started {tasks} tasks on {nodes} nodes; start one per node (--ntasks-per-node=1)")
    raise_problems(problems)


def _slurm_address() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST", os.environ.get("SLURM_JOB_NODELIST"))
    if not nodes:
        raise UserError(
            "parallel.num_nodes above 1: outside Slurm parallel.rendezvous has to say HOST:PORT of the first node"
        )
    return f"{first_host(nodes)}:{FIRST_PORT + int(os.environ.get('SLURM_JOB_ID', '0')) % NUM_PORTS}"


def first_host(nodes: str) -> str:
    """First host of a list as Slurm writes it: `gpu[07-09,12],login1` begins with gpu07."""
    first = re.match(r"[^,\[\]](?:[^,\[\]]|\[\d[^\]]*\])*", nodes)
    if first is None:
        raise UserError(f"Slurm's list of nodes cannot be read: {nodes}")
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
