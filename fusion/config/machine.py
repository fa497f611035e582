"""Settings about the machine: none of them changes a result."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """How a merge uses the machine; none of it changes the merged weights."""

    memory: str = "2GiB"
    """Memory for the tensors of a merge, whatever the model's size; Python and torch take about 0.3 GiB beside it."""
    threads: int = 0
    """CPU threads that read, merge and write at once; 0 takes every core."""
    device: str = "cpu"
    """Where deltas are merged: cpu, cuda or cuda:N. On a GPU sums may differ from the CPU's in the last bit."""
    probe_disk: bool = True
    """Copy a little first, so that the report can compare the merge's speed to that of a plain copy."""
    checksums: bool = True
    """Take the SHA-256 of all inputs and outputs for the manifest; on a fast disk that is most of a simple merge."""
    shard_size: str = "5GB"
    """Largest file of merged weights: where the base has larger ones, the merged model is written in shards."""


@dataclass(frozen=True)
class EstimateConfig:
    """What a plan counts with."""

    check: bool = True
    """Refuse to start a job whose weights and optimiser alone fit no device here, or whose model fits no disk."""
    device_memory: str | None = None
    """Memory of one device, such as 80GiB, when the job will run elsewhere; that of this machine when left out."""
    tokens_per_dialogue: int | None = None
    """Mean tokens of a dialogue; left out: from the size of the file, or `data.max_length` for the hub's."""
    tokens_per_second: float | None = None
    """Tokens that one device trains on per second, for the hours; left out: `probe`, or no hours."""
    disk_speed: str | None = None
    """Bytes per second, such as 2GiB, that the disk reads and writes, for the hours of a merge."""
    probe: bool = False
    """plan=true: measure matrix products (train.py) or the disk (merge.py) for a second, for the hours."""


@dataclass(frozen=True)
class LoggerConfig:
    name: str = "csv"
    """csv, tensorboard, wandb or none."""
    project: str = "fusion"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    group: str | None = None
    """W&B group; a sweep's own name when left out."""
    offline: bool = True
    """W&B: record locally; the line that uploads it is printed at the end."""


@dataclass(frozen=True)
class PathsConfig:
    cache: str = "cache"
    """Content-addressed results of finished stages, shared by all runs."""
    runs: str = "runs"
    """Where the folders of jobs go."""
