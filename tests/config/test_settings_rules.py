"""What types cannot say: every rule that settings break, all at once, each with its key and value."""

from dataclasses import fields, is_dataclass, replace

import pytest

from fusion.cache import fingerprint
from fusion.config import UserError, raise_problems
from fusion.config.compose import LONGEST_NAME, readable_name
from fusion.config.evaluate import EvaluateConfig
from fusion.config.rules import ABOVE_ZERO, AT_LEAST, CHOICES, SHARES, settings_problems
from fusion.config.schema import DataConfig, MergeConfig, ObjectiveConfig, ParallelConfig, TrainConfig, TrainerConfig


def with_value(settings, key, value):
    """`settings` with another value; those of another entry point where this one has no such setting."""
    if key not in set(all_keys(type(settings))):
        settings = next(schema() for schema in (MergeConfig, EvaluateConfig) if key in set(all_keys(schema)))
    table, _, name = key.rpartition(".")
    if table:
        return replace(settings, **{table: replace(getattr(settings, table), **{name: value})})
    return replace(settings, **{name: value})


def all_keys(schema, prefix=""):
    for field in fields(schema):
        value = getattr(schema(), field.name)
        yield f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from all_keys(type(value), f"{prefix}{field.name}.")


def test_the_defaults_break_no_rule():
    assert settings_problems(TrainConfig()) == []
    assert settings_problems(MergeConfig()) == []
    assert settings_problems(EvaluateConfig()) == []


def test_rules_are_about_settings_that_exist():
    keys = {*all_keys(TrainConfig), *all_keys(MergeConfig), *all_keys(EvaluateConfig)}
    assert {*CHOICES, *SHARES, *AT_LEAST, *ABOVE_ZERO} <= keys


BROKEN = [
    *((key, "nonsense") for key in CHOICES),
    *((key, value) for key in SHARES for value in (-0.01, 1.01, float("nan"))),
    *((key, least - 1) for key, least in AT_LEAST.items()),
    *((key, value) for key in ABOVE_ZERO for value in (0.0, -1.0, float("nan"))),
    ("trainer.max_steps", 0),
    ("trainer.max_steps", -2),
    ("trainer.resume", "checkpoints/step-000500"),
    ("pivot.path", ""),
    ("source.path", ""),
    ("data.path", ""),
    ("parallel.devices", 2),
    ("parallel.replicas", 2),
    ("parallel.cpu_offload", True),
    ("parallel.rendezvous", "node0"),
    ("parallel.rendezvous", "node0:"),
    ("optim.betas", (0.9,)),
    ("optim.betas", (0.9, 1.0)),
    ("optim.betas", (-0.1, 0.9)),
    ("source.name", TrainConfig().pivot.name),
    ("teacher.processes", 2),
    ("teacher.placement", "fsdp"),
    ("teacher.placement", "tensor_parallel"),
    ("teacher.worker", 1),
    ("teacher.worker", -1),
    ("pivot.name", "../x"),
    ("source.name", "a/b"),
    ("source.name", ""),
    ("source.members", {"x": {"name": "a/b", "path": "/a"}}),
    ("source.members", {"x": {"pth": "/a"}}),
    ("source.members", {"x": "/a"}),
    ("targets", []),
    ("targets", ""),
    ("targets", None),
    ("targets", [1]),
    ("targets", {"a": "/a"}),
    ("scorers", ["skills", "skils"]),
    ("scorers", ["mt_bench"]),
    ("seeds", []),
    ("seeds", [1, 1]),
]


@pytest.mark.parametrize(("key", "value"), BROKEN, ids=lambda one: str(one))
def test_every_rule(key, value):
    (problem,) = settings_problems(with_value(TrainConfig(), key, value))
    assert key in problem or key.partition(".")[0] in problem


@pytest.mark.parametrize("change", [{"divergence": "jsd"}, {"temperature": 2.0}, {"divergence": "reverse_kl"}])
def test_sft_has_no_divergence(change):
    settings = TrainConfig(objective=ObjectiveConfig(**change))
    assert settings_problems(settings) == []
    sft = replace(settings, objective=replace(settings.objective, name="sft"))
    (problem,) = settings_problems(sft)
    assert "objective.name=sft learns the references alone" in problem


@pytest.mark.parametrize(
    ("parallel", "precision", "problems"),
    [
        (ParallelConfig("fsdp", devices=4, num_nodes=2, replicas=4, rendezvous="[::1]:29400"), "bf16-mixed", []),
        (ParallelConfig("fsdp", devices=2, cpu_offload=True), "32-true", []),
        (ParallelConfig("ddp", devices=2), "bf16-true", []),
        (ParallelConfig("fsdp", devices=4, replicas=3), "32-true", ["4 devices cannot be shared out evenly"]),
        (
            ParallelConfig("fsdp", devices=2),
            "bf16-true",
            ["trainer.precision=bf16-true: parallel=fsdp shards float32"],
        ),
        (ParallelConfig("fsdp1", devices=2), "64-true", ["trainer.precision=64-true: parallel=fsdp1 shards float32"]),
        (
            ParallelConfig("ddp", devices=2, replicas=2, rendezvous="29400"),
            "32-true",
            ["only parallel=fsdp has replicas", "HOST:PORT is expected"],
        ),
    ],
)
def test_what_goes_with_a_way_to_spread(parallel, precision, problems):
    settings = replace(TrainConfig(), parallel=parallel, trainer=TrainerConfig(precision=precision))
    found = settings_problems(settings)
    assert len(found) == len(problems)
    assert all(part in problem for part, problem in zip(problems, found, strict=True))


def test_models_or_runs():
    both = EvaluateConfig(models=["/a"], runs=["/b"])
    assert "models and runs" in " ".join(settings_problems(both))
    (problem,) = settings_problems(EvaluateConfig(models=["/a"], data=DataConfig(path="")))
    assert "data.path is empty" in problem


@pytest.mark.parametrize("key", SHARES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_shares_include_their_ends(key, value):
    assert settings_problems(with_value(TrainConfig(), key, value)) == []


@pytest.mark.parametrize(("key", "least"), AT_LEAST.items())
def test_least_values_are_allowed(key, least):
    assert settings_problems(with_value(TrainConfig(), key, int(least))) == []


def test_all_broken_rules_are_told_at_once():
    settings = TrainConfig()
    broken = {"template": "other", "objective.ce_weight": 2.0, "optim.lr": 0.0, "seed": -1, "data.path": ""}
    for key, value in broken.items():
        settings = with_value(settings, key, value)
    problems = settings_problems(settings)
    assert len(problems) == len(broken)
    assert all(any(problem.startswith(key) for problem in problems) for key in broken)
    assert len(settings_problems(replace(MergeConfig(), seed=-1))) == 1


def test_how_often_a_training_was_broken_off_tells_no_runs_apart():
    """Targets are merged, and jobs skipped, whatever checkpoints there were."""
    settings = TrainConfig()
    for key, value in {"checkpoint_every_steps": 7, "keep_checkpoints": 3, "resume": "never"}.items():
        other = with_value(settings, f"trainer.{key}", value)
        assert other.common(["trainer"]) == settings.common(["trainer"])
        assert other.recipe() == settings.recipe()
        assert fingerprint(other.result_settings()) == fingerprint(settings.result_settings())
    assert with_value(settings, "trainer.epochs", 9).common(["trainer"]) != settings.common(["trainer"])


def test_an_error_carries_its_problems():
    import pickle

    error = UserError(["one", "two"])
    assert error.problems == ["one", "two"]
    assert str(error) == "one\ntwo"
    assert UserError("one").problems == ["one"]
    assert pickle.loads(pickle.dumps(error)).problems == error.problems
    assert isinstance(error, ValueError)
    raise_problems([])
    with pytest.raises(UserError, match="one\ntwo"):
        raise_problems(["one", "two"])


@pytest.mark.parametrize(
    ("argv", "overrides", "name"),
    [
        (["-m", "seed=1,2"], "seed=2", "seed=2"),
        (
            ["-m", "seed=1,2", "source=tiny_a,tiny_b", "trainer.epochs=3"],
            "seed=2,source=tiny_b,trainer.epochs=3",
            "seed=2,source=tiny_b",
        ),
        (["-m", "data.path=/a/b.jsonl,/c.jsonl"], "data.path=/c.jsonl", "data.path=-c.jsonl"),
        (["-m", "seed=range(0,3)", "pivot.path=/x"], "pivot.path=/x,seed=0", "seed=0"),
        (["-m", "seed=1"], "seed=1", "seed=1"),
        (["-m"], "", "job"),
    ],
)
def test_jobs_of_a_sweep_have_readable_names(monkeypatch, argv, overrides, name):
    monkeypatch.setattr("sys.argv", ["train.py", *argv])
    assert readable_name(overrides) == name


def test_long_names_stay_different(monkeypatch):
    swept = [f"{'x' * 200}{number}" for number in range(3)]
    monkeypatch.setattr("sys.argv", ["train.py", "-m", f"data.path={','.join(swept)}"])
    names = {readable_name(f"data.path={one}") for one in swept}
    assert len(names) == 3
    assert all(len(name) < LONGEST_NAME + 20 for name in names)
    assert readable_name(f"data.path={swept[0]}") in names
