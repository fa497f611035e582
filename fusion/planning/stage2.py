"""The plan of a merge: what it reads and writes, and what it holds in memory, from the sizes of its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.config.schema import MergeConfig
from fusion.config.sizes import num_bytes
from fusion.planning.machine import Machine, free_disk, measured_disk_speed
from fusion.planning.shapes import WEIGHTS, counted_weights
from fusion.planning.text import hours_text, size_text, table

SEARCH = "search"
LIBRARIES = 300 << 20
"""Python and torch in a process."""
SEARCHED_COPIES = 3
"""merge.scale=search: deltas in float32, the state at one scale and the model that reads with it, in memory."""


@dataclass(frozen=True)
class Stage2Plan:
    config: MergeConfig
    base_bytes: int
    target_bytes: list[int]
    parameters: int
    machine: Machine

    @classmethod
    def of(
        cls, config: MergeConfig, base: Path | None, targets: Sequence[Path], machine: Machine | None = None
    ) -> "Stage2Plan":
        sizes = [_weight_bytes(target) for target in targets]
        counted, _ = counted_weights(base or targets[0])
        return cls(config, _weight_bytes(base) if base else 0, sizes, counted, machine or Machine.here())

    @property
    def is_searched(self) -> bool:
        return self.config.merge.get("scale") == SEARCH

    @property
    def bytes_read(self) -> int:
        """Every input once for the merge, and once before it for a searched scale."""
        return (self.base_bytes + sum(self.target_bytes)) * (2 if self.is_searched else 1)

    @property
    def bytes_written(self) -> int:
        return self.base_bytes or self.target_bytes[0]

    @property
    def memory(self) -> int:
        searched = 4 * SEARCHED_COPIES * self.parameters if self.is_searched else 0
        return max(num_bytes(self.config.engine.memory), searched) + LIBRARIES

    def problems(self) -> list[str]:
        found = []
        free = free_disk(Path(self.config.paths.runs))
        if self.bytes_written > free:
            found.append(
                f"the merged model takes {size_text(self.bytes_written)}, and {size_text(free)} are free in "
                f"{self.config.paths.runs}; choose another disk with paths.runs=FOLDER"
            )
        if self.memory > self.machine.memory:
            less = "a number for merge.scale" if self.is_searched else "a smaller engine.memory"
            found.append(
                f"it takes about {size_text(self.memory)} of memory, and this machine has "
                f"{size_text(self.machine.memory)}; give {less}"
            )
        return found

    def text(self) -> str:
        """The whole plan."""
        speed = num_bytes(self.config.estimate.disk_speed or "0") or (
            measured_disk_speed(Path(self.config.paths.runs)) if self.config.estimate.probe else 0
        )
        time = ("unknown", "estimate.probe=true measures, estimate.disk_speed=2GiB tells")
        if speed:
            time = ("reading and writing", hours_text((self.bytes_read + self.bytes_written) / speed / 3600))
        each = ", ".join(size_text(size) for size in self.target_bytes)
        disk = [("targets", each), ("base", size_text(self.base_bytes) if self.base_bytes else "none")]
        disk += [("read", size_text(self.bytes_read)), ("written", size_text(self.bytes_written))]
        disk += [("free", size_text(free_disk(Path(self.config.paths.runs))))]
        memory = [("at the most", size_text(self.memory)), ("this machine has", size_text(self.machine.memory))]
        title = f"{self.config.merge.get('method')} of {len(self.target_bytes)} targets"
        return "\n".join([title, table("disk", disk), table("memory", memory), table("time", [time])])


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS))
