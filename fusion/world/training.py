"""A plain training loop, from random weights to a small chat model.

Tensor legend: B dialogues of a batch, N their longest length, S supervised tokens, H hidden size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from random import Random

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fusion.config.world import TinyModelConfig, WorldConfig
from fusion.dialogues.encode import Encoded

POOL_BATCHES = 16
BETAS = (0.9, 0.98)


def train(
    model: PreTrainedModel,
    examples: Sequence[Encoded],
    settings: TinyModelConfig,
    config: WorldConfig,
    seed: str,
    on_step: Callable[[int], None],
) -> None:
    """Train `model` in place on the supervised tokens of `examples`; `on_step` hears the number of finished steps."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=config.weight_decay, fused=True
    )
    batches = bucketed_batches([len(example.ids_N) for example in examples], config.batch_size, Random(seed))
    model.train()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * schedule(step, settings.steps, config)
        supervised_loss(model, [examples[i] for i in next(batches)]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1)
    model.eval()


def supervised_loss(model: PreTrainedModel, examples: Sequence[Encoded]) -> torch.Tensor:
    """Mean negative log-likelihood of the supervised tokens; only their rows go through the output head."""
    longest = max(len(example.ids_N) for example in examples)
    ids_BN = torch.zeros(len(examples), longest, dtype=torch.long)
    rows, targets = [], []
    for number, example in enumerate(examples):
        ids_BN[number, : len(example.ids_N)] = torch.from_numpy(example.ids_N)
        rows.append(example.rows_R + number * longest)
        targets.append(example.ids_N[example.rows_R + 1])
    rows_S = torch.from_numpy(np.concatenate(rows))
    targets_S = torch.from_numpy(np.concatenate(targets)).long()
    # Causal attention and padding on the right: no supervised row sees a padded position, so no mask is needed.
    hidden_BNH = model.base_model(input_ids=ids_BN, use_cache=False).last_hidden_state
    return cross_entropy(model.get_output_embeddings()(hidden_BNH.flatten(0, 1)[rows_S]), targets_S)


def schedule(step: int, steps: int, config: WorldConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine down to `final_learning_rate_share`."""
    warmup = max(1, round(config.warmup_share * steps))
    if step < warmup:
        return (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return config.final_learning_rate_share + (1 - config.final_learning_rate_share) * cosine


def bucketed_batches(lengths: Sequence[int], batch_size: int, rng: Random) -> Iterator[list[int]]:
    """Batches of example numbers without end: shuffled every epoch, then sorted by length inside pools of batches."""
    order = list(range(len(lengths)))
    while True:
        rng.shuffle(order)
        for start in range(0, len(order), POOL_BATCHES * batch_size):
            pool = sorted(order[start : start + POOL_BATCHES * batch_size], key=lengths.__getitem__)
            batches = [pool[i : i + batch_size] for i in range(0, len(pool), batch_size)]
            rng.shuffle(batches)
            yield from batches
