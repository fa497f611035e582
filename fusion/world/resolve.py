"""`world:NAME` in the settings becomes a real path, and the world is built when something asks for it.

Paths of what lies on this machine become absolute: records name them, and are read from other folders later.
"""

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
    world = _world(config.world, Path(config.paths.cache)) if _mentions(config) else None
    members = {
        name: {**member, "path": _model(world, member["path"])} if member.get("path") else member
        for name, member in config.source.members.items()
    }
    resolved = replace(
        config,
        pivot=_resolved_model(config.pivot, world),
        source=replace(_resolved_model(config.source, world), members=members),
        data=_resolved_data(config.data, world),
    )
    return resolved, {name: list(skills) for name, skills in world.strong_skills.items()} if world else {}


def with_world_paths(
    models: Sequence[str], data: DataConfig, config: WorldConfig, cache: Path
) -> tuple[list[str], DataConfig]:
    """The same for bare paths of models and their dialogues."""
    is_asked = any(path.startswith(PREFIX) for path in models) or _mentions(data)
    world = _world(config, cache) if is_asked else None
    return [_model(world, path) for path in models], _resolved_data(data, world)


def _world(config: WorldConfig, cache: Path) -> "World":
    from fusion.world.world import ensure_world

    return ensure_world(config, cache)


def _mentions(value: Any) -> bool:
    if is_dataclass(value):
        return any(_mentions(getattr(value, field.name)) for field in fields(value))
    if isinstance(value, dict):
        return any(_mentions(item) for item in value.values())
    return isinstance(value, str) and value.startswith(PREFIX)


def _resolved_model(model: Any, world: "World | None") -> Any:
    return replace(model, path=_model(world, model.path))


def _located(path: str) -> str:
    """The absolute path of what lies here; all else (ids of the hub, what is missing) as it is."""
    return str(Path(path).absolute()) if path and Path(path).exists() else path


def _model(world: "World | None", path: str) -> str:
    if world is None or not path.startswith(PREFIX):
        return _located(path)
    folder = world.model_path(path.removeprefix(PREFIX))
    if not folder.is_dir():
        names = ", ".join(sorted(known.name for known in folder.parent.iterdir()))
        raise UserError(f"path={path}: the world has no such model; it has {names}")
    return str(folder.absolute())


def _resolved_data(data: DataConfig, world: "World | None") -> DataConfig:
    def resolved(path: str) -> str:
        if world is None or not path.startswith(PREFIX):
            return _located(path)
        file = world.dialogues_path(path.removeprefix(PREFIX))
        if not file.is_file():
            raise UserError(f"data: {path}: the world has the dialogues train, heldout and test")
        return str(file.absolute())

    return replace(
        data,
        path=resolved(data.path),
        heldout_path=resolved(data.heldout_path) if data.heldout_path else None,
        test_path=resolved(data.test_path) if data.test_path else None,
    )
