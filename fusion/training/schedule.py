"""The learning rate over a run."""

import math
from collections.abc import Callable

from fusion.config.schema import OptimConfig


def learning_rate(optim: OptimConfig, total_steps: int) -> Callable[[int], float]:
    """Factor on the peak rate at each step: a linear warm-up, then `optim.schedule` down to the final share."""
    warmup = max(1, round(optim.warmup_fraction * total_steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        fall = {"cosine": (1 + math.cos(math.pi * progress)) / 2, "linear": 1 - progress, "constant": 1.0}
        return optim.final_lr_fraction + (1 - optim.final_lr_fraction) * fall[optim.schedule]

    return factor
