"""The plan of stage 1: what a job of train.py would need of this machine, or of the one that the settings describe."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fusion.config import UserError, raise_problems
from fusion.config.schema import ModelConfig, TrainConfig
from fusion.config.sizes import num_bytes
from fusion.planning.machine import Machine, free_disk, measured_flops
from fusion.planning.reading import Reading, expected_reading
from fusion.planning.shapes import ModelShape, model_shape
from fusion.planning.stage1_memory import WEIGHT, StepNeed, device_type, shards, step_need, teacher_need
from fusion.planning.text import count_text, hours_text, size_text, table

STORED_ROW = {"compact": 25, "exact": 93}
"""Bytes of a top-10 row in a store; others in proportion."""
ALIGNED_ROW, FUSED_TOKEN = 60, 96
"""Bytes of an aligned row, and of a token of the fused targets."""
PUBLISHED_TOP_K = 10
RECOMPUTED = 4 / 3
"""With gradient checkpointing the forward pass is done twice."""


@dataclass(frozen=True)
class Stage1Plan:
    config: TrainConfig
    pivot: ModelShape
    teachers: list[tuple[ModelConfig, ModelShape]]
    """The pivot first; none for sft."""
    reading: Reading
    machine: Machine
    where: str
    """cpu or cuda."""

    @classmethod
    def of(cls, config: TrainConfig, machine: Machine | None = None) -> "Stage1Plan":
        """Raises UserError with everything that is not known well enough for a plan."""
        machine = machine or Machine.here()
        problems: list[str] = []
        shapes: list[tuple[ModelConfig, ModelShape]] = []
        for model in (config.pivot, *config.source.models()):
            try:
                shapes.append((model, model_shape(model, config.world)))
            except UserError as error:
                problems += error.problems
        try:
            reading = expected_reading(config)
        except UserError as error:
            problems += error.problems
        raise_problems(problems)
        teachers = shapes if config.objective.name == "fusion" or config.fusion.keep_pivot_won < 1 else []
        return cls(config, shapes[0][1], teachers, reading, machine, device_type(config.parallel, len(machine.gpus)))

    @property
    def device_memory(self) -> int:
        """Bytes of one device, 0 where they are unknown; on a CPU the processes of a node share its memory."""
        if self.config.estimate.device_memory:
            return num_bytes(self.config.estimate.device_memory)
        if self.where == "cuda":
            return min(self.machine.gpus, default=0)
        if self.machine.has_other_devices and self.config.parallel.accelerator == "auto":
            return 0
        return self.machine.memory // self.config.parallel.devices

    @property
    def step(self) -> StepNeed:
        return step_need(self.config, self.pivot, self.reading, self.where)

    @property
    def teacher_needs(self) -> dict[str, int]:
        where = "cuda" if self.config.teacher.device.startswith("cuda") else self.where
        devices = len(self.machine.gpus) or self.config.parallel.devices
        return {model.name: teacher_need(self.config, model, shape, where, devices) for model, shape in self.teachers}

    @property
    def disk(self) -> dict[str, int]:
        """Bytes by what they are for."""
        teacher, reading = self.config.teacher, self.reading
        kept = teacher.draws if teacher.rows == "random" else teacher.top_k
        row = STORED_ROW[teacher.store] * kept / PUBLISHED_TOP_K
        pairs = max(0, len(self.teachers) - 1)
        state = 3 * WEIGHT[self.config.trainer.precision] * self.pivot.parameters
        return {
            "stores of the teachers": int(len(self.teachers) * reading.rows * row),
            "aligned and fused rows": int(pairs * reading.rows * ALIGNED_ROW + reading.tokens * FUSED_TOKEN),
            "checkpoints": (self.config.trainer.keep_checkpoints + 1) * state if self._keeps_checkpoints else 0,
            "target": self.pivot.parameters * self.pivot.stored_bytes,
        }

    @property
    def steps(self) -> int:
        trainer = self.config.trainer
        whole = -(-trainer.epochs * self.reading.dialogues // trainer.batch_size)
        return whole if trainer.max_steps < 0 else min(whole, trainer.max_steps)

    @property
    def _keeps_checkpoints(self) -> bool:
        every = self.config.trainer.checkpoint_every_steps
        return 0 < every <= self.steps

    @property
    def training_flops(self) -> float:
        """Per token of the dialogues: decoder, attention and head, forward and backward."""
        facts, reading = self.pivot.facts, self.reading
        attention = 12 * facts.layers * facts.heads * facts.head_size * reading.mean_tokens
        head = 6 * self.pivot.head_parameters * reading.rows / reading.tokens
        once = 6 * self.pivot.matrices + attention + head
        return once * (RECOMPUTED if self.config.trainer.gradient_checkpointing else 1)

    def hours(self) -> dict[str, float]:
        """Hours by stage; nothing when no throughput is given or measured."""
        estimate, parallel = self.config.estimate, self.config.parallel
        devices = parallel.devices * parallel.num_nodes
        if estimate.tokens_per_second:
            flops = estimate.tokens_per_second * self.training_flops
        elif estimate.probe:
            flops = measured_flops(self.where, "16" in self.config.trainer.precision)
        else:
            return {}
        trained = self.steps * self.config.trainer.batch_size * self.reading.mean_tokens
        read = sum(2 * (shape.matrices * self.reading.tokens) for _, shape in self.teachers)
        teachers = {"teachers (on one device)": read / flops / 3600} if self.teachers else {}
        return {
            **teachers,
            f"training (on {devices})": trained * self.training_flops / (flops * devices) / 3600,
        }

    def problems(self) -> list[str]:
        """What cannot fit, each with what would help; estimates are counted."""
        return [*self.sure_problems(), *self._likely_problems()]

    def sure_problems(self) -> list[str]:
        """What cannot fit whatever the estimates are worth: weights and optimiser alone, the target alone."""
        step, found = self.step, []
        state = step.weights + step.gradients + step.optimiser
        if self.device_memory and state > self.device_memory:
            found.append(
                f"weights, gradients and optimiser take {size_text(state)} on each device, which has "
                f"{size_text(self.device_memory)}; {self._help(state)}"
            )
        target, free = self.disk["target"], free_disk(Path(self.config.paths.runs))
        if target > free:
            found.append(
                f"the target takes {size_text(target)}, and {size_text(free)} are free in "
                f"{self.config.paths.runs}; choose another disk with paths.runs=FOLDER"
            )
        return found

    def _likely_problems(self) -> Iterator[str]:
        has, step = self.device_memory, self.step
        if not has:
            yield (
                "no GPU is here; parallel.accelerator=cpu trains without one, estimate.device_memory=80GiB plans for "
                "another machine"
            )
        if step.weights + step.gradients + step.optimiser <= has < step.peak:
            yield (
                f"a step takes about {size_text(step.peak)} on each device, which has {size_text(has)}; smaller: "
                "trainer.micro_batch_size, trainer.gradient_checkpointing=true, parallel=fsdp, lora=rank16"
            )
        for name, need in self.teacher_needs.items():
            if has and need > has:
                yield (
                    f"{name} takes about {size_text(need)} to read with, and a device has {size_text(has)}; "
                    "teacher.placement=auto spreads it over the GPUs of a machine, teacher.processes over processes"
                )
        cache, free = sum(self.disk.values()), free_disk(Path(self.config.paths.cache))
        if cache > free:
            yield (
                f"stores, checkpoints and target take about {size_text(cache)}, and {size_text(free)} are free; "
                "other disks: paths.cache=FOLDER paths.runs=FOLDER"
            )

    def _help(self, state: int) -> str:
        enough = -(-state * shards(self.config.parallel) * 5 // (4 * max(self.device_memory, 1)))
        return (
            f"parallel=fsdp over {enough} such devices or more holds them, lora=rank16 needs no optimiser for all "
            "weights, and a smaller pivot is the same recipe: pivot=qwen3_0_6b"
        )

    def text(self) -> str:
        """The whole plan."""
        step, reading, parallel = self.step, self.reading, self.config.parallel
        models = [("pivot " + self.config.pivot.name, count_text(self.pivot.parameters))]
        models += [("source " + model.name, count_text(shape.parameters)) for model, shape in self.teachers[1:]]
        data = [
            ("dialogues", f"{reading.dialogues:,} ({reading.source})"),
            ("tokens", f"{count_text(reading.tokens)}, {reading.mean_tokens} a dialogue"),
            ("optimiser steps", f"{self.steps:,}"),
        ]
        sizes = {
            "weights": step.weights,
            "gradients": step.gradients,
            "optimiser": step.optimiser,
            f"activations of {step.micro_batch}": step.activations,
            "logits chunk and head's gradient": step.logits,
            "gathered weights": step.gathered,
            "update": step.scratch,
            "libraries": step.libraries,
        }
        memory = [(name, size_text(size)) for name, size in sizes.items() if size]
        memory += [("at the most at once", size_text(step.peak))]
        memory += [(f"teacher {name}", size_text(need)) for name, need in self.teacher_needs.items()]
        memory += [("a device has", size_text(self.device_memory) if self.device_memory else "unknown: no GPU here")]
        disk = [(name, size_text(size)) for name, size in self.disk.items() if size]
        disk += [
            ("together", size_text(sum(self.disk.values()))),
            ("free", size_text(free_disk(Path(self.config.paths.cache)))),
        ]
        hours = [(name, hours_text(spent)) for name, spent in self.hours().items()]
        hours = hours or [("unknown", "estimate.probe=true measures, estimate.tokens_per_second=NUMBER tells")]
        where = f"{parallel.devices * parallel.num_nodes} x {self.where}, parallel={parallel.name}"
        return "\n".join(
            [
                table("parameters", models),
                table("data", data),
                table(f"memory of a device ({where}, {self.config.trainer.precision})", memory),
                table("disk", disk),
                table("time", hours),
            ]
        )
