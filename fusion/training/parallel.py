"""How one training run is spread over devices."""

from collections.abc import Iterator
from contextlib import contextmanager

from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch.distributed.fsdp import FSDPModule

from fusion.training.student import Student


@contextmanager
def accumulating(strategy: Strategy, student: Student) -> Iterator[None]:
    """Gradients of a backward pass in here stay on their device: those of a later micro-batch bring them along."""
    if isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(False)
        yield
        student.set_requires_gradient_sync(True)
    elif isinstance(strategy, DDPStrategy):
        with strategy.block_backward_sync():
            yield
    else:
        yield
