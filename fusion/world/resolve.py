"""`world:NAME` in the settings becomes a real path, and the world is built when something asks for it."""

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.config import UserError
from fusion.config.schema import DataConfig, TrainConfig
from fusion.config.world import WorldConfig

if TYPE_CHECKING:
    from fusion.world.world import World

PREFIX = "world:"


def with_world(config: TrainConfig) -> tuple[TrainConfig, dict[str, list[str]]]:
    """Settings without `world:` paths, and the skills that each source of the world is strong in.

    The world is built only when a setting refers to it. UserError for names that the world does not have.
    """
    if not _mentions(config):
        return config, {}
    from fusion.world.world import ensure_world

    world = ensure_world(config.world, Path(config.paths.cache))
    members = {
        name: {**member, "path": _model(world, member["path"])} for name, member in config.source.members.items()
    }
    resolved = replace(
        config,
        pivot=_resolved_model(config.pivot, world),
        source=replace(_resolved_model(config.source, world), members=members),
        data=_resolved_data(config.data, world),
    )
    return resolved, {name: list(skills) for name, skills in world.strong_skills.items()}


def with_world_paths(
    models: Sequence[str], data: DataConfig, config: WorldConfig, cache: Path
) -> tuple[list[str], DataConfig]:
    """The same for bare paths of models and their dialogues."""
    if not any(path.startswith(PREFIX) for path in models) and not _mentions(data):
        return list(models), data
    from fusion.world.world import ensure_world

    world = ensure_world(config, cache)
    return [_model(world, path) for path in models], _resolved_data(data, world)


def _mentions(value: Any) -> bool:
    if is_dataclass(value):
        return any(_mentions(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return any(_mentions(item) for item in value.values())
    return isinstance(value, str) and value.startswith(PREFIX)


def _resolved_model(model: Any, world: "World") -> Any:
    return replace(model, path=_model(world, model.path))


def _model(world: "World", path: str) -> str:
    if not path.startswith(PREFIX):
        return path
    folder = world.model_path(path.removeprefix(PREFIX))
    if not folder.is_dir():
        names = ", ".join(sorted(known.name for known in folder.parent.iterdir()))
        raise UserError(f"path={path}: the world has no such model; it has {names}")
    return str(folder)


def _resolved_data(data: DataConfig, world: "World") -> DataConfig:
    def resolved(path: str) -> str:
        if not path.startswith(PREFIX):
            return path
        file = world.dialogues_path(path.removeprefix(PREFIX))
        if not file.is_file():
            raise UserError(f"data: {path}: the world has the dialogues train, heldout and test")
        return str(file)

    return replace(
        data,
        path=resolved(data.path),
        heldout_path=resolved(data.heldout_path) if data.heldout_path else None,
        test_path=resolved(data.test_path) if data.test_path else None,
    )
