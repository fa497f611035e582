"""Hydra's composition with our schemas, and the step from its result to frozen settings."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from fusion.cache import fingerprint
from fusion.config.evaluate import EvaluateConfig
from fusion.config.schema import MergeConfig, TrainConfig

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED = _PACKAGE / "conf"
CONFIG_FOLDER = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent / "conf"
"""In a checkout its `experiments` is a link to the repository's: as a search path of its own, the repository would
turn every folder in it, virtual environments included, into a config group. An installed package has copies."""
SCHEMAS: dict[str, type] = {"train": TrainConfig, "merge": MergeConfig, "evaluate": EvaluateConfig}
LONGEST_NAME = 120

Settings = TypeVar("Settings", TrainConfig, MergeConfig, EvaluateConfig)


def register() -> None:
    """Tell Hydra our schemas and resolver; calling it again changes nothing."""
    for entry, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{entry}_schema", node=overridable(schema), provider="fusion")
    OmegaConf.register_new_resolver("readable", readable_name, replace=True)


def readable_name(overrides: str) -> str:
    """Folder of one job of a sweep: its swept overrides (all, when the command line sweeps none) without slashes."""
    swept = set(_swept_keys())
    pieces = re.split(r",(?=[\w./@]+=)", overrides)
    chosen = [piece for piece in pieces if piece.partition("=")[0] in swept] or pieces
    name = re.sub(r"[^\w.,=+-]+", "-", ",".join(chosen)).strip("-") or "job"
    if len(name) > LONGEST_NAME:
        name = f"{name[:LONGEST_NAME]}-{fingerprint({'overrides': overrides})}"
    return name


def _swept_keys() -> Iterator[str]:
    words = [word for word in sys.argv[1:] if "=" in word and not word.startswith("-")]
    for override in OverridesParser.create().parse_overrides(words):
        if override.is_sweep_override():
            yield override.key_or_group


def to_settings(config: DictConfig, schema: type[Settings]) -> Settings:
    """The composed config as frozen dataclasses; nothing below the entry points sees a DictConfig."""
    plain = OmegaConf.create({key: config[key] for key in schema.__dataclass_fields__})
    OmegaConf.resolve(plain)
    settings = OmegaConf.to_object(OmegaConf.merge(overridable(schema), plain))
    assert isinstance(settings, schema)
    return settings


def overridable(schema: type) -> DictConfig:
    """The schema's node. OmegaConf makes nodes of frozen dataclasses read-only; composing has to write them."""
    node = OmegaConf.structured(schema)
    _clear_read_only(node)
    return node


def _clear_read_only(node: Any) -> None:
    node._set_flag("readonly", None)
    for key in node if isinstance(node, DictConfig) else ():
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _clear_read_only(child)
