"""The objective: fusion functions choose one sparse target per row, the loss of its kind distils it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusion.objective.sparse_loss import sparse_cross_entropy

__all__ = ["sparse_cross_entropy"]


def __getattr__(name: str) -> object:
    """Load torch only when the loss is asked for."""
    if name in __all__:
        from fusion.objective import sparse_loss

        return getattr(sparse_loss, name)
    raise AttributeError(name)
