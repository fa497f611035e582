"""Every setting of `evaluate.py`, typed, with one sentence each."""

from dataclasses import dataclass, field

from fusion.config.evaluation import (
    AlpacaEvalConfig,
    EndpointConfig,
    GenerationConfig,
    LMEvalConfig,
    MTBenchConfig,
)
from fusion.config.schema import DataConfig, PathsConfig
from fusion.config.world import WorldConfig

SCORERS = ("skills", "heldout", "mt_bench", "alpaca_eval", "lm_eval")
JUDGED = ("mt_bench", "alpaca_eval")


@dataclass(frozen=True)
class EvaluateConfig:
    """Scores of any models, and the tests that tell gains from noise."""

    models: list[str] = field(default_factory=list)
    """Model folders, hub ids or `world:NAME`; the first one is the reference of the table's marks. Neither models nor
    runs: the newest run."""
    runs: list[str] = field(default_factory=list)
    """Folders of train.py and merge.py, or folders above them: all models that they compared, over all their seeds, on
    the dialogues of each run."""
    only: list[str] = field(default_factory=list)
    """`runs`: models of the tables in this order, by kind (pivot, source, sft, target, merged) or name ('merged sce');
    of each seed, best_target: the target with the lowest NLL on held-out dialogues; best_target_of_test: with the
    highest test score, which is too good; best_found: the merge of a search (hparams_search) with the lowest search
    value. Empty: all models."""
    pairs: str = "all"
    """Which models are compared, and corrected for together: all (every two), first (each with the first one) or next
    (each with the one before it)."""
    scorers: list[str] = field(default_factory=lambda: ["skills", "heldout"])
    """skills, heldout (NLL per byte by category; `models`: of data.heldout_path, else of all of data.path), mt_bench,
    alpaca_eval, lm_eval."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """`models`: repetitions of generation, each with a seed of its own."""
    seed: int = 0
    """Decides the built-in world; the draws of the statistics are the same in every evaluation."""
    dtype: str = "auto"
    """Arithmetic of the weights: float32, bfloat16, float16 or auto (as stored)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models; leave off unless you have read that code."""
    batch_tokens: int = 8192
    """skills, heldout: tokens per forward pass, padding included."""
    threads: int = 1
    """CPU threads of matrix products; a setting, not the machine's choice, because sums may differ in the last bit."""
    world: WorldConfig = field(default_factory=WorldConfig)
    data: DataConfig = field(default_factory=DataConfig)
    judge: EndpointConfig = field(default_factory=EndpointConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    mt_bench: MTBenchConfig = field(default_factory=MTBenchConfig)
    alpaca_eval: AlpacaEvalConfig = field(default_factory=AlpacaEvalConfig)
    lm_eval: LMEvalConfig = field(default_factory=LMEvalConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)

    @property
    def reads_dialogues(self) -> bool:
        """Whether a scorer needs `data`."""
        return bool({"skills", "heldout"} & set(self.scorers))


def evaluate_problems(settings: EvaluateConfig) -> list[str]:
    """What the settings of `evaluate.py` ask for and cannot have."""
    problems = [
        f"scorers: {name} is not a scorer; choose from {', '.join(SCORERS)}"
        for name in settings.scorers
        if name not in SCORERS
    ]
    if not settings.scorers:
        problems.append(f"scorers=[]: name one or more of {', '.join(SCORERS)}")
    if settings.models and settings.runs:
        problems.append("models and runs: give one of the two; runs bring their own dialogues and seeds")
    if settings.models and settings.only:
        problems.append("models and only: give one of the two; only chooses among the models of runs")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        problems.append(f"seeds={settings.seeds}: one or more different whole numbers are expected")
    if settings.models and settings.reads_dialogues and not settings.data.path:
        problems.append("data.path is empty; give a JSONL or Parquet file, a dataset folder or a hub id")
    judged = [name for name in settings.scorers if name in JUDGED]
    if judged and not settings.judge.base_url:
        problems.append(
            f"scorers: {' and '.join(judged)}: a judge is needed; judge=openai, or judge=local judge.base_url=http://HOST:PORT/v1"
        )
    return problems
