"""Every YAML that comes with the program composes to typed settings that break no rule."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from fusion.config.check import command_line_problems
from fusion.config.compose import CONFIG_FOLDER, SCHEMAS, register, to_settings
from fusion.config.rules import settings_problems
from fusion.merging import check_parameters

REPOSITORY = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))
GROUP_FILES = sorted(
    path for path in CONFIG_FOLDER.glob("*/*.yaml") if path.parent.name not in ("experiments", "model")
)

NEED_PLUGINS = {
    "launcher": {"joblib": "joblib", "submitit_local": "submitit", "slurm": "submitit", "ray": "ray"},
    "hparams_search": {"merge_weights": "optuna", "merge_method": "optuna", "distillation": "optuna"},
}
"""Group -> option -> the extra that it needs."""
ASK_FOR_A_PATH = ("hf", "hub", "jsonl", "sharegpt", "alpaca")


def groups_of(entry):
    defaults = OmegaConf.load(CONFIG_FOLDER / f"{entry}.yaml").defaults
    return {str(group): option for one in defaults if not isinstance(one, str) for group, option in one.items()}


def settings_of(entry, *overrides):
    register()
    with initialize_config_dir(str(CONFIG_FOLDER), version_base="1.3"):
        return to_settings(compose(entry, overrides=list(overrides)), SCHEMAS[entry])


def rows_of(entry):
    """Command lines that choose every option of every group at least once."""
    options = {group: [path.stem for path in GROUP_FILES if path.parent.name == group] for group in groups_of(entry)}
    options = {group: names for group, names in options.items() if names and group not in NEED_PLUGINS}
    longest = max(map(len, options.values()))
    renamed = ["source.name=other"] if "source" in options else []  # a model may be pivot and source of one row
    return [
        [*(f"{group}={names[row % len(names)]}" for group, names in options.items()), *renamed]
        for row in range(longest)
    ]


def test_every_folder_is_a_group_of_an_entry():
    named = {group for entry in SCHEMAS for group in groups_of(entry)}
    assert {path.parent.name for path in GROUP_FILES} <= named


@pytest.mark.parametrize("row", [[entry, *row] for entry in SCHEMAS for row in rows_of(entry)], ids=" ".join)
def test_every_option_of_every_group(row):
    entry, *overrides = row
    settings = settings_of(entry, *overrides)
    assert isinstance(settings, SCHEMAS[entry])
    empty = {problem.partition(".path is empty")[0] for problem in settings_problems(settings)}
    assert empty <= {"pivot", "source", "data"}  # options for the user's own files ask for a path, and for no more
    if empty:
        assert {f"{group}={option}" for group in empty for option in ASK_FOR_A_PATH} & set(overrides)
        given = settings_of(entry, *overrides, *(f"{group}.path=/some/where" for group in empty))
        assert settings_problems(given) == []


@pytest.mark.parametrize("path", sorted((CONFIG_FOLDER / "merge").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_merge_method_takes_its_parameters(path):
    given = OmegaConf.to_object(OmegaConf.load(path))
    assert given.pop("method") == path.stem
    assert given.pop("scale") == 1.0
    assert check_parameters(path.stem, given, num_targets=2) == []


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment(path):
    working = []
    for entry in SCHEMAS:
        try:
            settings = settings_of(entry, f"experiments={path.stem}")
        except HydraException:
            continue
        assert settings_problems(settings) == []
        working.append(entry)
    assert working


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, needed in NEED_PLUGINS.items() for option in needed]
)
def test_what_needs_a_plugin_composes_or_says_which(group, option):
    assert {path.stem for path in (CONFIG_FOLDER / group).glob("*.yaml")} == set(NEED_PLUGINS[group])
    entry = "merge" if option.startswith("merge") else "train"
    extra = NEED_PLUGINS[group][option]
    register()
    found = command_line_problems(entry, ["-m", f"{group}={option}"])
    kind = "sweeper" if extra == "optuna" else "launcher"
    if find_spec("hydra_plugins") and find_spec(f"hydra_plugins.hydra_{extra}_{kind}"):
        assert found == []
    else:
        (problem,) = found
        assert problem.endswith(f"is not installed; pip install 'fusion-chat[{extra}]'")


def test_experiments_are_found_from_the_config_folder():
    assert (CONFIG_FOLDER / "experiments").resolve() == REPOSITORY / "experiments"


@pytest.mark.parametrize("entry", SCHEMAS)
def test_the_defaults_name_every_setting_and_group(entry):
    settings = settings_of(entry)
    assert settings_problems(settings) == []
    tables = {name for name, value in vars(settings).items() if hasattr(value, "__dataclass_fields__")}
    assert tables <= set(groups_of(entry))


def test_the_published_recipe_is_one_word_away():
    settings = settings_of("train", "pivot=hf", "pivot.path=/a", "source=hf", "source.path=/b")
    assert (settings.trainer.epochs, settings.trainer.batch_size) == (3, 128)
    assert settings.objective.ce_weight == 0.9
    assert (settings.optim.lr, settings.optim.schedule, settings.optim.warmup_fraction) == (5e-6, "cosine", 0.03)
    assert (settings.teacher.top_k, settings.teacher.temperature) == (10, 1.0)


def test_many_sources_in_one():
    members = settings_of("train", "source=tiny_all", "+source.members.tiny_b.revision=abc").source.members
    assert list(members) == ["tiny_a", "tiny_b", "tiny_c"]
    assert members["tiny_b"]["path"] == "world:tiny_b"
    assert members["tiny_b"]["revision"] == "abc"
