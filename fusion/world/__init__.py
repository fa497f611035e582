"""The built-in tiny world: a pivot, its sources and their dialogues, made on the spot, offline, on a CPU."""

from fusion.world.world import World, ensure_world

__all__ = ["World", "ensure_world"]
