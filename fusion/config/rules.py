"""What types cannot say: ranges and choices of single settings, and combinations that make no sense."""

import difflib
import re
from collections.abc import Iterator
from pathlib import Path

from fusion.config.evaluate import EvaluateConfig, evaluate_problems
from fusion.config.machine import EngineConfig, EstimateConfig
from fusion.config.schema import MergeConfig, ModelConfig, TrainConfig
from fusion.config.sizes import num_bytes

DTYPES = ("float32", "bfloat16", "float16", "auto")
CHOICES: dict[str, tuple[str, ...]] = {
    "template": ("shared", "native"),
    "pivot.dtype": DTYPES,
    "source.dtype": DTYPES,
    "dtype": DTYPES,
    "teacher.rows": ("top_k", "nucleus", "random"),
    "teacher.store": ("compact", "exact"),
    "teacher.placement": ("single", "auto", "tensor_parallel", "fsdp"),
    "alignment.path": ("bytes", "dtw"),
    "alignment.tail": ("scale", "bucket"),
    "alignment.fallback": ("gold", "pivot", "skip"),
    "data.form": ("auto", "messages", "sharegpt", "alpaca"),
    "data.long": ("cut", "split"),
    "fusion.unit": ("byte", "token"),
    "fusion.level": ("dialogue", "span", "token"),
    "objective.name": ("fusion", "sft"),
    "objective.divergence": ("forward_kl", "reverse_kl", "jsd"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "trainer.precision": ("32-true", "bf16-mixed", "bf16-true", "64-true"),
    "parallel.name": ("single", "ddp", "fsdp", "fsdp1"),
    "parallel.accelerator": ("auto", "cpu", "gpu"),
    "vocabulary": ("error", "base", "union", "intersect"),
    "sweep": ("separate", "fused"),
    "pairs": ("all", "first", "next"),
    "evaluation.name": ("skills", "none"),
    "search_value": ("heldout_won",),
    "logger.name": ("csv", "tensorboard", "wandb", "none"),
}
SHARES = (
    "teacher.top_p",
    "objective.ce_weight",
    "fusion.keep_pivot_won",
    "data.heldout_fraction",
    "optim.warmup_fraction",
    "optim.final_lr_fraction",
    "lora.dropout",
)
AT_LEAST: dict[str, float] = {
    "data.max_length": 2,
    "data.limit": 1,
    "data.num_dialogues": 1,
    "teacher.top_k": 1,
    "teacher.batch_tokens": 1,
    "teacher.shard_dialogues": 1,
    "teacher.draws": 1,
    "teacher.processes": 1,
    "teacher.workers": 1,
    "alignment.dtw_sample": 0,
    "alignment.shard_dialogues": 1,
    "trainer.epochs": 1,
    "trainer.batch_size": 1,
    "trainer.micro_batch_size": 0,
    "trainer.micro_batch_tokens": 0,
    "trainer.log_every_steps": 1,
    "trainer.data_workers": 0,
    "trainer.checkpoint_every_steps": 0,
    "trainer.keep_checkpoints": 1,
    "lora.rank": 0,
    "objective.chunk_rows": 0,
    "optim.weight_decay": 0,
    "optim.grad_clip": 0,
    "parallel.devices": 1,
    "parallel.num_nodes": 1,
    "parallel.replicas": 1,
    "evaluation.batch_tokens": 1,
    "evaluation.samples": 0,
    "evaluation.sample_tokens": 1,
    "batch_tokens": 1,
    "judge.concurrency": 1,
    "judge.retries": 0,
    "judge.first_wait_s": 0,
    "judge.input_price": 0,
    "judge.output_price": 0,
    "generation.concurrency": 1,
    "generation.batch_size": 1,
    "generation.max_new_tokens": 1,
    "mt_bench.limit": 1,
    "alpaca_eval.limit": 1,
    "alpaca_eval.temperature": 0,
    "lm_eval.limit": 1,
    "lm_eval.batch_size": 1,
    "lm_eval.num_fewshot": 0,
    "seed": 0,
    "threads": 1,
    "engine.threads": 0,
    "estimate.tokens_per_dialogue": 1,
}
LEAST_MEMORY = 64 << 20
LEAST_SHARD = 1 << 10
DEVICE = re.compile(r"cpu|cuda(:\d+)?")
RENDEZVOUS = re.compile(r"\S+:\d+")
NAME = re.compile(r"(?!\.)[^/\\\0]+")
ABOVE_ZERO = (
    *("optim.lr", "lora.alpha", "trainer.peak_tflops", "teacher.temperature", "objective.temperature"),
    *("estimate.tokens_per_second", "judge.timeout_s", "generation.timeout_s"),
)


def settings_problems(settings: TrainConfig | MergeConfig | EvaluateConfig) -> list[str]:
    """Every rule that the settings break, one sentence each."""
    problems = [*_choices(settings), *_ranges(settings)]
    if isinstance(settings, EvaluateConfig):
        return [*problems, *evaluate_problems(settings)]
    problems += _combinations(settings) if isinstance(settings, TrainConfig) else _merge_problems(settings)
    return [*problems, *_estimate(settings.estimate)]


def _value(settings: object, key: str) -> object:
    """The setting at a dotted key; None where this entry point has no such setting."""
    for part in key.split("."):
        settings = getattr(settings, part, None)
    return settings


def _choices(settings: object) -> Iterator[str]:
    for key, choices in CHOICES.items():
        value = _value(settings, key)
        if value is not None and value not in choices:
            yield f"{key}={value}: choose one of {', '.join(choices)}"


def _ranges(settings: object) -> Iterator[str]:
    for key in (*SHARES, *AT_LEAST, *ABOVE_ZERO):
        value = _value(settings, key)
        if not isinstance(value, int | float):
            continue
        if key in SHARES and not 0 <= value <= 1:
            yield f"{key}={value}: a share between 0 and 1 is expected"
        if key in AT_LEAST and not value >= AT_LEAST[key]:
            yield f"{key}={value}: at least {AT_LEAST[key]:g} is expected"
        if key in ABOVE_ZERO and not value > 0:
            yield f"{key}={value}: a number above 0 is expected"


def _estimate(estimate: EstimateConfig) -> Iterator[str]:
    for name in ("device_memory", "disk_speed"):
        try:
            num_bytes(getattr(estimate, name) or "0")
        except ValueError as error:
            yield f"estimate.{name}: {error}"


def _merge_problems(settings: MergeConfig) -> Iterator[str]:
    targets = settings.targets
    if not (isinstance(targets, str) or (isinstance(targets, list) and all(isinstance(one, str) for one in targets))):
        yield (
            f"targets={targets}: latest, a folder or a list of folders is expected, such as targets=[runs/a,runs/b]; "
            "a name that reads like a number needs quotes: targets=[\\'1\\']"
        )
    elif not targets:
        yield "targets is empty: there is nothing to merge; name the folders: targets=[FOLDER,FOLDER]"
    yield from engine_problems(settings.engine)


def engine_problems(engine: EngineConfig) -> Iterator[str]:
    try:
        if num_bytes(engine.memory) < LEAST_MEMORY:
            yield f"engine.memory={engine.memory}: at least 64MiB is expected"
    except ValueError as error:
        yield f"engine.memory: {error}"
    yield from shard_problems(engine)
    if not DEVICE.fullmatch(engine.device):
        yield f"engine.device={engine.device}: choose cpu, cuda or cuda:N"


def shard_problems(engine: EngineConfig) -> Iterator[str]:
    try:
        if num_bytes(engine.shard_size) < LEAST_SHARD:
            yield f"engine.shard_size={engine.shard_size}: at least 1KiB is expected"
    except ValueError as error:
        yield f"engine.shard_size: {error}"


def _combinations(settings: TrainConfig) -> Iterator[str]:
    teacher = settings.teacher
    if teacher.worker is not None and not 0 <= teacher.worker < teacher.workers:
        yield f"teacher.worker={teacher.worker}: a number from 0 to below {teacher.workers} is expected"
    if teacher.processes > 1 and teacher.placement not in ("tensor_parallel", "fsdp"):
        yield f"teacher.processes={teacher.processes}: only placement=tensor_parallel and fsdp split a model"
    if teacher.placement in ("tensor_parallel", "fsdp") and teacher.processes < 2:
        yield f"teacher.processes={teacher.processes}: placement={teacher.placement} needs 2 or more"
    objective = settings.objective
    if objective.name == "sft" and (objective.divergence != "forward_kl" or objective.temperature != 1):
        yield (
            f"objective.divergence={objective.divergence}, objective.temperature={objective.temperature:g}: "
            "objective.name=sft learns the references alone; leave them out, or choose objective=paper"
        )
    yield from _parallel(settings)
    if len(settings.optim.betas) != 2 or not all(0 <= beta < 1 for beta in settings.optim.betas):
        yield f"optim.betas={list(settings.optim.betas)}: two numbers from 0 to below 1 are expected"
    if settings.trainer.max_steps < -1 or settings.trainer.max_steps == 0:
        yield f"trainer.max_steps={settings.trainer.max_steps}: a positive number is expected, or -1 for all epochs"
    resume = settings.trainer.resume
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        yield f"trainer.resume={resume}: no such folder; auto, never or the folder of a checkpoint is expected"
    for group in ("pivot", "source"):
        model = getattr(settings, group)
        if not model.path and not getattr(model, "members", None):
            yield f"{group}.path is empty; give a model folder or a hub id, for instance {group}.path=/models/a"
    yield from _names(settings)
    if settings.source.name == settings.pivot.name:
        yield f"source.name={settings.source.name} is the pivot's name too; give them different names"
    if not settings.data.path:
        yield "data.path is empty; give a JSONL or Parquet file, a dataset folder or a hub id"


def _names(settings: TrainConfig) -> Iterator[str]:
    """Names become parts of folders' names; and members of a source are tables that no type has checked."""
    members = settings.source.members
    named = {"pivot.name": settings.pivot.name, "source.name": settings.source.name}
    named |= {f"source.members.{key}": one.get("name", key) for key, one in members.items() if isinstance(one, dict)}
    for key, name in named.items():
        if not NAME.fullmatch(str(name)):
            yield f"{key}={name}: a name without slashes is expected, since folders are called by it"
    known = list(ModelConfig.__dataclass_fields__)
    for key, one in members.items():
        if not isinstance(one, dict):
            yield f"source.members.{key}={one}: the settings of a source are expected, such as {{path: FOLDER}}"
            continue
        for word in sorted(one.keys() - set(known)):
            near = difflib.get_close_matches(str(word), known, n=1)
            meant = f"did you mean `{near[0]}`? " if near else ""
            yield f"source.members.{key}.{word}: a source has no such setting; {meant}it has {', '.join(known)}"


def _parallel(settings: TrainConfig) -> Iterator[str]:
    parallel, precision = settings.parallel, settings.trainer.precision
    devices = parallel.devices * parallel.num_nodes
    if parallel.name == "single" and devices > 1:
        yield f"parallel=single trains on one device, not on {devices}; leave parallel.devices and num_nodes at 1"
    if parallel.name != "fsdp" and (parallel.replicas > 1 or parallel.cpu_offload):
        given = f"parallel.replicas={parallel.replicas}, parallel.cpu_offload={parallel.cpu_offload}"
        yield f"{given}: only parallel=fsdp has replicas and offloads, not parallel={parallel.name}"
    elif parallel.replicas > 1 and devices % parallel.replicas:
        yield f"parallel.replicas={parallel.replicas}: {devices} devices cannot be shared out evenly among them"
    if parallel.name in ("fsdp", "fsdp1") and precision not in ("32-true", "bf16-mixed"):
        yield (
            f"trainer.precision={precision}: parallel={parallel.name} shards float32 weights; choose bf16-mixed, "
            "which computes in bfloat16, or 32-true"
        )
    if parallel.rendezvous is not None and not RENDEZVOUS.fullmatch(parallel.rendezvous):
        yield f"parallel.rendezvous={parallel.rendezvous}: HOST:PORT is expected, for instance node0:29400"
