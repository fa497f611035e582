"""Settings of scores and sample answers, and of the evaluation's endpoints, generation and benchmarks."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class EvaluationConfig:
    name: str = "skills"
    """`skills` scores test dialogues by exact match and held-out dialogues by NLL per byte; `none` scores nothing."""
    batch_tokens: int = 8192
    """Tokens per forward pass, padding included."""
    samples: int = 1
    """Answers of every category that are written out, for reading side by side; 0: none."""
    sample_tokens: int = 64
    """Length at which such an answer is cut."""


@dataclass(frozen=True)
class EndpointConfig:
    base_url: str = ""
    """Any OpenAI-compatible endpoint, for instance https://api.openai.com/v1 or http://localhost:8000/v1."""
    model: str = ""
    """Name of the judging model at the endpoint; published numbers name theirs with its date."""
    key_variable: str = ""
    """Environment variable that holds the key, which is never a setting itself. Empty: the endpoint asks for none."""
    concurrency: int = 8
    """Questions that are under way at the same time."""
    timeout_s: float = 120.0
    """Seconds after which an answer counts as lost and is asked for again."""
    retries: int = 6
    """How often a question is asked again after time-outs, status 408, 429 and 5xx, and replies that are no JSON."""
    first_wait_s: float = 1.0
    """Seconds before the first repetition; they double with every further one, up to a minute."""
    input_price: float = 0.0
    """US dollars per million tokens that the endpoint reads, for the cost counter."""
    output_price: float = 0.0
    """US dollars per million tokens that the endpoint writes."""


@dataclass(frozen=True)
class GenerationConfig:
    base_url: str = ""
    """An OpenAI-compatible server that serves the models under their names; empty: transformers generates here."""
    key_variable: str = ""
    """Environment variable that holds the server's key; empty: it asks for none."""
    concurrency: int = 16
    """Server: dialogues under way at the same time."""
    timeout_s: float = 600.0
    """Server: seconds after which an answer counts as lost and is asked for again."""
    batch_size: int = 8
    """transformers: dialogues that are generated side by side. Fixed batches keep the bytes of a resumed run."""
    max_new_tokens: int = 1024
    """Longest answer; what is longer is cut."""


@dataclass(frozen=True)
class MTBenchConfig:
    questions: str = "HuggingFaceH4/mt_bench_prompts"
    """Hub id, or a JSONL file in FastChat's format (question_id, category, turns)."""
    references: str = ""
    """JSONL file of reference answers in FastChat's format; empty: those that come with the questions."""
    prompts: str = ""
    """FastChat's judge_prompts.jsonl, for numbers to compare with published ones; empty: the built-in prompts."""
    limit: int | None = None
    """Ask only this many questions, the first ones."""


@dataclass(frozen=True)
class AlpacaEvalConfig:
    questions: str = "tatsu-lab/alpaca_eval"
    """Hub id, or a JSON file in alpaca_eval's format (instruction, output, generator, dataset) with the baseline's
    answers."""
    prompts: str = ""
    """A prompt in alpaca_eval's format, for numbers to compare with published ones; empty: the built-in prompt."""
    gamed: str = "tatsu-lab/alpaca_eval"
    """Hub id, or df_gamed.csv, with the annotations and difficulties that the published length control uses; empty: a
    regression on lengths alone."""
    both_orders: bool = True
    """Show every pair of answers in both orders, which cancels a judge's liking for a place; published: one order."""
    temperature: float = 0.7
    """Temperature of the models' answers."""
    limit: int | None = None
    """Ask only this many questions, the first ones."""


@dataclass(frozen=True)
class LMEvalConfig:
    tasks: list[str] = field(default_factory=lambda: ["arc_easy"])
    """Tasks of the EleutherAI harness."""
    include_path: str = ""
    """Folder with task definitions of your own."""
    num_fewshot: int | None = None
    """Examples before every question; left out: as the task says."""
    chat_template: bool = True
    """Ask in the model's chat template."""
    batch_size: int = 8
    """Requests side by side."""
    limit: int | None = None
    """Ask only this many items per task, the first ones."""
