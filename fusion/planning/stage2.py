"""The plan of a merge: what it reads and writes, and what it holds in memory, from the sizes of its files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusion.config.schema import MergeConfig
from fusion.config.sizes import num_bytes
from fusion.planning.machine import Machine, free_disk, measured_disk_speed
from fusion.planning.shapes import WEIGHTS
from fusion.planning.text import hours_text, size_text, table

SEARCH = "search"
LIBRARIES = 300 << 20
"""Python and torch in a process."""
MEBI = 1 << 20
SINGLE = 4
"""Bytes of a float32 number."""
COPIES = {"searched": 3, "scored": 2, "measured": 3}
"""Float32 copies of the model that are in memory at once: for merge.scale=search the deltas, the state at one scale
and the model that reads with it; for save=false without the deltas, which are that state; for what is measured on
dialogues the model, the sums and their means."""


@dataclass(frozen=True)
class MergedModel:
    """What comes of a merge, as the headers of its inputs say."""

    num_bytes: int
    """Of its weight files."""
    parameters: int
    largest_whole: int = 0
    """Bytes for the largest tensor that the method works on as a whole."""
    is_measured: bool = False
    """The method weighs by what is measured on dialogues."""
    new_tokens: int = 0
    """Tokens that the base lacks."""


@dataclass(frozen=True)
class Stage2Plan:
    config: MergeConfig
    model: MergedModel
    base_bytes: int
    target_bytes: list[int]
    machine: Machine

    @classmethod
    def of(
        cls,
        config: MergeConfig,
        model: MergedModel,
        base: Path | None,
        targets: Sequence[Path],
        machine: Machine | None = None,
    ) -> "Stage2Plan":
        sizes = [_weight_bytes(target) for target in targets]
        return cls(config, model, _weight_bytes(base) if base else 0, sizes, machine or Machine.here())

    @property
    def is_searched(self) -> bool:
        return self.config.merge.get("scale") == SEARCH

    @property
    def bytes_read(self) -> int:
        """Every input once for the merge, and once before it for a searched scale of a model that is written."""
        return (self.base_bytes + sum(self.target_bytes)) * (2 if self.is_searched and self.config.save else 1)

    @property
    def bytes_written(self) -> int:
        return self.model.num_bytes if self.config.save else 0

    @property
    def memory(self) -> int:
        """The most of: merging (with the deltas, where they stay in memory), reading with them, measuring."""
        is_held = self.is_searched or not self.config.save
        used = [COPIES["searched"]] * self.is_searched + [COPIES["scored"]] * is_held
        used += [COPIES["measured"]] * self.model.is_measured
        single = SINGLE * self.model.parameters
        engine = max(num_bytes(self.config.engine.memory), self.model.largest_whole)
        return max(engine + is_held * single, max(used, default=0) * single) + LIBRARIES

    def problems(self) -> list[str]:
        found = []
        free = free_disk(Path(self.config.paths.runs))
        if self.bytes_written > free:
            found.append(
                f"the merged model takes {size_text(self.bytes_written)}, and {size_text(free)} are free in "
                f"{self.config.paths.runs}; choose another disk with paths.runs=FOLDER"
            )
        if self.model.largest_whole > num_bytes(self.config.engine.memory):
            needed = f"{-(-self.model.largest_whole // MEBI)}MiB"
            found.append(
                f"the method needs {needed} for its largest whole tensor; give engine.memory={needed} or more"
            )
        if self.memory > self.machine.memory:
            found.append(
                f"it takes about {size_text(self.memory)} of memory, and this machine has "
                f"{size_text(self.machine.memory)}; give {self._less}"
            )
        return found

    @property
    def _less(self) -> str:
        """What takes less."""
        choices = ["a number for merge.scale"] * self.is_searched + ["save=true"] * (not self.config.save)
        choices += ["a method that measures nothing"] * self.model.is_measured
        return " and ".join(choices) or "a smaller engine.memory"

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
        if self.model.new_tokens:
            disk += [("new tokens", f"{self.model.new_tokens:,}, behind the base's")]
        disk += [("read", size_text(self.bytes_read)), ("written", size_text(self.bytes_written))]
        disk += [("free", size_text(free_disk(Path(self.config.paths.runs))))]
        memory = [("at the most", size_text(self.memory)), ("this machine has", size_text(self.machine.memory))]
        title = f"{self.config.merge.get('method')} of {len(self.target_bytes)} targets"
        return "\n".join([title, table("disk", disk), table("memory", memory), table("time", [time])])


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob(WEIGHTS))
