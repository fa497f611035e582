"""Every setting of the two entry points, typed, with one sentence each. Light: importing it loads no model library."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fusion.cache import fingerprint
from fusion.config.evaluation import EvaluationConfig
from fusion.config.machine import EngineConfig, EstimateConfig, LoggerConfig, PathsConfig
from fusion.config.shape import ShapeConfig
from fusion.config.world import WorldConfig

BASELINE_RECIPE = ("objective", "optim", "trainer", "lora")
RECIPE = ("teacher", "alignment", "fusion", *BASELINE_RECIPE)
ATTEMPT = ("checkpoint_every_steps", "keep_checkpoints", "resume")
"""Settings of the trainer about the attempts that a training may take."""
MACHINERY = {
    *("device", "placement", "processes", "workers", "worker", "batch_tokens", "shard_dialogues"),
    *("dtw_sample", "chunk_rows", "progress_bar", "peak_tflops", "log_every_steps", "data_workers"),
    *("micro_batch_size", "micro_batch_tokens", "packing", "gradient_checkpointing", "compile"),
    *ATTEMPT,
}
"""Settings of these groups that are about how and where, not about what."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "tiny"
    """Short name that tables, folders and logs use."""
    path: str = "world:pivot"
    """Local folder, hub id, or `world:NAME` for a model of the built-in world."""
    revision: str | None = None
    """Commit or tag on the hub; pin it for reproducible runs."""
    dtype: str = "float32"
    """Arithmetic of the weights when the model is read as a teacher: float32, bfloat16, float16 or auto."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; leave off unless you have read that code."""
    chat_template: str | None = None
    """Jinja file, or a built-in name (plain, chatml), that replaces the tokeniser's own chat template."""
    end_of_turn: str | None = None
    """Token that ends an assistant turn; found by rendering a probe dialogue when left out."""
    shape: ShapeConfig = field(default_factory=ShapeConfig)

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "ModelConfig":
        return ModelConfig(**{**plain, "shape": ShapeConfig(**plain.get("shape", {}))})


@dataclass(frozen=True)
class SourceConfig(ModelConfig):
    name: str = "tiny_a"
    """Short name that tables, folders and logs use."""
    path: str = "world:tiny_a"
    """Local folder, hub id, or `world:NAME` for a model of the built-in world."""
    members: dict[str, Any] = field(default_factory=dict)
    """Several sources fused into one target (many-to-one): name -> the settings of a source."""

    def models(self) -> list[ModelConfig]:
        """The source, or the members of a many-to-one source."""
        known = ModelConfig.__dataclass_fields__
        return [
            ModelConfig(**{"name": name, **{key: value for key, value in member.items() if key in known}})
            for name, member in (self.members or {self.name: vars(self)}).items()
        ]


@dataclass(frozen=True)
class DataConfig:
    name: str = "world"
    """Short name of the dialogues."""
    path: str = "world:train"
    """JSONL or Parquet file, local dataset folder, hub id, or `world:train`."""
    split: str = "train"
    """Split to read when the path is a dataset folder or a hub id."""
    heldout_path: str | None = None
    """Dialogues kept for validation and the scale search; `world:heldout`, or left out to split them off `path`."""
    heldout_fraction: float = 0.05
    """Share of `path` that is kept out of training, drawn by content hash, when there is no `heldout_path`."""
    test_path: str | None = None
    """Dialogues whose last assistant turn is the right answer; scored by exact match per `category`."""
    max_length: int = 2048
    """Tokens per dialogue and model; what is longer is cut at the end, unless `long` says otherwise."""
    form: str = "auto"
    """Form of the rows: messages, sharegpt (`conversations` of `from` and `value`), alpaca (`instruction`, `input`,
    `output`), or auto to see it in each row's keys."""
    clean: bool = False
    """Mend rows instead of refusing the file: what comes before the first user turn, from the first empty turn or
    unknown speaker on, and behind the last answer goes; rows without an answer left are dropped and counted."""
    long: str = "cut"
    """What happens to dialogues of more than max_length tokens of the pivot: cut (at the end) or split (between turns,
    each piece with the system message; as FuseChat-Mixture was made)."""
    num_dialogues: int | None = None
    """Dialogues of a dataset of the hub, as far as known, for `plan=true`; files on the disk are counted."""
    limit: int | None = None
    """Read at most this many dialogues, the first ones of the file."""


@dataclass(frozen=True)
class TeacherConfig:
    rows: str = "top_k"
    """What is kept of a row: top_k (paper), nucleus (the fewest candidates that hold top_p, at most top_k) or random
    (unbiased draws, arXiv 2503.16870)."""
    top_k: int = 10
    """Next-token candidates kept per supervised row (paper: 10)."""
    top_p: float = 0.98
    """rows=nucleus: probability mass that the kept candidates hold together."""
    draws: int = 50
    """rows=random: draws with replacement per row; a candidate's weight is its share of the draws."""
    temperature: float = 1.0
    """Teacher temperature (paper: 1)."""
    batch_tokens: int = 4096
    """Tokens per forward pass, padding included."""
    shard_dialogues: int = 512
    """Dialogues per shard of the distribution store; a killed pass loses at most one shard."""
    device: str = "auto"
    """Where teachers run: auto, cpu, cuda, cuda:1, ..."""
    store: str = "compact"
    """compact: packed ids and 8-bit log-probabilities, some 25 bytes per row; exact: 32-bit numbers."""
    placement: str = "single"
    """single: the whole model on `device`; auto: spread over the machine's devices (needs accelerate);
    tensor_parallel or fsdp: split over `processes` processes."""
    processes: int = 1
    """placement=tensor_parallel or fsdp: processes (one per device) that read together."""
    workers: int = 1
    """Jobs that share a teacher pass; each reads its own shards, the bytes are those of one job."""
    worker: int | None = None
    """Number of this job among `workers`, from 0: it reads its shards and stops before the training. Left out: the job
    reads what is missing and goes on."""


@dataclass(frozen=True)
class AlignmentConfig:
    name: str = "ms"
    """Strategy: em, mined, ms, ms_released, strict, bpm, canonical, alm, uld, random, or a dotted path of your own."""
    path: str = "bytes"
    """Which source row stands beside a pivot row, for rows and statistics: bytes (both have read the same) or dtw (the
    authors' dynamic-programming path)."""
    tail: str = "scale"
    """Teacher mass that no pivot token gets: scale (what is mapped is scaled to 1) or bucket (it stays apart, as mass
    of all other tokens)."""
    fallback: str = "gold"
    """What a row without an aligned source row learns: gold (the reference token), pivot (its own row) or skip."""
    dtw_sample: int = 50
    """Dialogues on which the report compares the authors' path with exact bytes, drawn by content hash; 0: none."""
    shard_dialogues: int = 1024
    """Dialogues per shard of the aligned rows; a killed alignment loses at most one shard."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further options of the strategy."""


@dataclass(frozen=True)
class FusionConfig:
    name: str = "min_ce"
    """Fusion function: min_ce, avg_ce, source_only or pivot_only."""
    level: str = "dialogue"
    """What is decided at once: dialogue (paper), span (between byte boundaries that all models share) or token."""
    unit: str = "byte"
    """What cross-entropies are divided by before they are compared: byte, or token as in the paper."""
    keep_pivot_won: float = 1.0
    """Share of the dialogues won by the pivot that stay in training, drawn by content hash (paper: 1)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    name: str = "fusion"
    """`fusion` distils the fused distributions; `sft` trains on the reference tokens alone."""
    ce_weight: float = 0.9
    """The paper's lambda: weight of the reference's cross-entropy; the fused distribution has the rest."""
    divergence: str = "forward_kl"
    """forward_kl (paper), reverse_kl or jsd: how far the model is from a fused distribution. The other two look at its
    tokens alone, and with `alignment.tail=bucket` at all the rest as one token more."""
    temperature: float = 1.0
    """Of the model's logits in the divergence, which is multiplied by its square; `teacher.temperature` is the
    teachers'."""
    chunk_rows: int = 0
    """Supervised rows whose logits exist at the same time; 0 fits the vocabulary and the device."""


@dataclass(frozen=True)
class OptimConfig:
    lr: float = 5e-6
    """Peak learning rate."""
    schedule: str = "cosine"
    """Learning rate after the warm-up: cosine, linear or constant."""
    warmup_fraction: float = 0.03
    """Share of all steps in which the learning rate rises from zero."""
    final_lr_fraction: float = 0.0
    """Learning rate of the last step, as a share of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's momentum coefficients."""
    grad_clip: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""


@dataclass(frozen=True)
class TrainerConfig:
    epochs: int = 3
    """Passes over the dialogues."""
    batch_size: int = 128
    """Dialogues per optimiser step, over all devices and accumulation steps."""
    micro_batch_size: int = 0
    """Dialogues per forward pass and device; 0 means the whole batch at once."""
    micro_batch_tokens: int = 0
    """Tokens per forward pass and device, padding included; a longer dialogue goes alone. 0: only `micro_batch_size`
    counts."""
    packing: bool = False
    """Put the dialogues of a micro-batch one behind the other instead of padding them; none sees another. With sdpa or
    eager attention this costs what one text of that length does, so choose a small `micro_batch_tokens`."""
    max_steps: int = -1
    """Stop after this many optimiser steps; -1 means all epochs."""
    precision: str = "32-true"
    """Lightning's precision word, for instance 32-true, bf16-mixed or bf16-true."""
    log_every_steps: int = 10
    """Optimiser steps between two log lines."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile every decoder layer with torch.compile: slow to start, faster on GPUs."""
    data_workers: int = 0
    """Processes that read batches ahead; 0 reads them in the training process."""
    checkpoint_every_steps: int = 500
    """Optimiser steps between two checkpoints, in `checkpoints` of the job's folder; a training of so many steps has
    one at its end too. 0: only when the job is told to end (SIGTERM). They go when the job is finished."""
    keep_checkpoints: int = 1
    """How many checkpoints stay; older ones are deleted."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of the same settings in the job's folder; never; or a checkpoint's
    folder."""
    progress_bar: bool = True
    """Show the training's progress: a bar on a terminal, a line every `log_every_steps` in a log file."""
    peak_tflops: float | None = None
    """What a device could compute in `precision`, in 10^12 FLOP/s, for the metric mfu; known GPUs need none."""


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of low-rank adapters that are trained instead of the weights (needs peft); 0: all weights are trained."""
    alpha: float = 16.0
    """The adapters' output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapters."""
    modules: list[str] = field(default_factory=lambda: ["all-linear"])
    """Ends of the names of adapted modules, or all-linear for every linear layer but the head."""


@dataclass(frozen=True)
class ParallelConfig:
    name: str = "single"
    """single: one process on one device; ddp: a whole model on every device; fsdp: weights, gradients and optimiser
    sharded over devices (FSDP2); fsdp1: the same by the older FullyShardedDataParallel (GPUs only)."""
    devices: int = 1
    """Processes per node; the job asserts that it got them."""
    num_nodes: int = 1
    """Nodes; start the same command on each."""
    rendezvous: str | None = None
    """num_nodes above 1: HOST:PORT of the first node; found from Slurm's variables when left out."""
    replicas: int = 1
    """fsdp: groups of devices that hold a whole model each, sharded within the group (HSDP)."""
    cpu_offload: bool = False
    """fsdp: weights and optimiser live in the CPU's memory and visit the device."""
    accelerator: str = "auto"
    """auto, cpu or gpu."""


@dataclass(frozen=True)
class TrainConfig:
    """Stage 1: one target from a pivot and a source."""

    seed: int = 0
    """Decides everything drawn: the built-in world, the order of dialogues, dropout."""
    template: str = "shared"
    """shared: every model reads the pivot's rendering (paper); native: each model reads its own chat template."""
    threads: int = 1
    """CPU threads of matrix products; a setting, not the machine's choice, because sums may differ in the last bit."""
    skip_finished: bool = True
    """Do not run a job again whose folder holds a finished result of the same settings."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""
    plan: bool = False
    """Tell what the job would need, and whether this machine has it; nothing is run."""
    search_value: str | None = None
    """What a search over settings (`hparams_search`) minimises: heldout_won, the cross-entropy on held-out dialogues
    that a source won; left out: nothing is measured for a search."""
    pivot: ModelConfig = field(default_factory=ModelConfig)
    source: SourceConfig = field(default_factory=SourceConfig)
    world: WorldConfig = field(default_factory=WorldConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    alignment: AlignmentConfig = field(default_factory=AlignmentConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    @property
    def is_baseline(self) -> bool:
        """Whether no source has a say: neither in what a dialogue teaches, nor in which dialogues are kept."""
        return self.objective.name == "sft" and self.fusion.keep_pivot_won == 1

    def result_settings(self) -> dict[str, Any]:
        """Settings that can change the result of a job."""
        return _without_records(self)

    def recipe(self) -> dict[str, Any]:
        """What tells apart targets of the same models and dialogues: the settings of the method, by group."""
        groups = BASELINE_RECIPE if self.is_baseline else RECIPE
        chosen = {group: asdict(getattr(self, group)) for group in groups}
        return {
            "template": self.template,
            **{group: {key: one[key] for key in one if key not in MACHINERY} for group, one in chosen.items()},
        }

    def common(self, names: Sequence[str]) -> str:
        """Fingerprint of the named settings: runs that agree in it can be compared in all else."""
        return fingerprint({name: _deciding(getattr(self, name)) for name in names})


@dataclass(frozen=True)
class MergeConfig:
    """Stage 2: one model from the targets."""

    seed: int = 0
    """Decides random masks (DARE) and which stage-1 runs `targets: latest` prefers."""
    targets: Any = "latest"
    """`latest` (the last stage-1 runs), or a list of run folders or model folders."""
    base: str | None = None
    """The pivot that the targets started from; read from their lineage when left out."""
    sft: str | None = None
    """An SFT-only run to show beside the targets; the matching one of `paths.runs` when left out."""
    vocabulary: str = "error"
    """Targets with other tokens than the base's: refused (`error`), or the merged model has the base's tokens
    (`base`), the targets' too (`union`) or those that all have (`intersect`)."""
    threads: int = 1
    """CPU threads of matrix products; a setting, not the machine's choice, because sums may differ in the last bit."""
    skip_finished: bool = True
    """Do not run a job again whose folder holds a finished result of the same settings."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by."""
    save: bool = True
    """Write the merged model into `model` of the job's folder; false: merge into the model that is scored, and keep
    its scores alone."""
    sweep: str = "separate"
    """Jobs of one -m command: separate (one after the other) or fused (jobs of the same targets are merged in one pass
    that reads every input once; the models are the same, byte for byte)."""
    plan: bool = False
    """Tell what the job would need, and whether this machine has it; nothing is run."""
    search_value: str | None = None
    """What a search over settings (`hparams_search`) minimises: heldout_won, the cross-entropy on held-out dialogues
    that a source won; left out: nothing is measured for a search."""
    search: dict[str, float] = field(default_factory=dict)
    """Numbers that a search varies, for other settings to refer to: merge.weight=["${search.a}","${search.b}"]."""
    merge: dict[str, Any] = field(default_factory=dict)
    """The method, its `scale` (a number, or `search`) and its own parameters."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    estimate: EstimateConfig = field(default_factory=EstimateConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    def result_settings(self) -> dict[str, Any]:
        """Settings that can change the result of a job, its inputs apart."""
        merge = {name: _in_order(value) for name, value in self.merge.items()}
        return {**_without_records(self), "merge": merge}


def _in_order(value: Any) -> Any:
    """`value` with mappings as lists of pairs: of patterns for tensors, the first that fits decides."""
    return [[key, _in_order(one)] for key, one in value.items()] if isinstance(value, dict) else value


def _without_records(settings: TrainConfig | MergeConfig) -> dict[str, Any]:
    ignored = {
        *("logger", "paths", "tags", "skip_finished", "plan", "estimate"),
        *("targets", "base", "sft", "engine", "sweep"),
    }
    return {name: _deciding(value) for name, value in vars(settings).items() if name not in ignored}


def _deciding(settings: Any) -> Any:
    """What of a table decides about results: nothing about attempts, and no facts that only plans read."""
    if not isinstance(settings, ModelConfig | DataConfig | TrainerConfig):
        return settings
    left_out = (*ATTEMPT, "shape", "num_dialogues")
    return {name: value for name, value in vars(settings).items() if name not in left_out}
