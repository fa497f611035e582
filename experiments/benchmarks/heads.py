"""Forward and backward pass of a head and its loss, on random hidden states: sparse, and two dense ways.

As a command, `python heads.py WAY TOKENS VOCABULARY HIDDEN` prints bytes of this process: before, with hidden states,
head and sparse targets in memory, and at the most during both passes.

Tensor legend: B dialogues, T tokens of all of them, R supervised rows, H hidden size, V vocabulary, K target entries,
column 0 the reference.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peaks import Peak, peak_of_process, print_peak
from torch import Tensor
from torch.nn.functional import cross_entropy

from fusion.objective.divergence import FORWARD_KL, Divergence
from fusion.objective.head import Head
from fusion.objective.head_loss import TOKENS, rows_per_chunk
from fusion.objective.products import Product, product_with
from fusion.objective.target_form import TargetForm
from fusion.objective.target_loss import Targets, target_loss

DIALOGUES = 4
TOP_K = 10
CE_WEIGHT = 0.9
CPU = torch.device("cpu")
BUCKET = TargetForm(tail="bucket")
IGNORED = -100


@dataclass(frozen=True)
class Passes:
    """Ways from hidden states to gradients of hidden states and head; every way is a call without arguments."""

    hidden_TH: Tensor
    weight_VH: Tensor
    rows_R: Tensor
    targets: Targets

    @classmethod
    def random(cls, tokens: int, vocab: int, hidden: int, supervised: float = 1.0) -> "Passes":
        """Float32, with top-10 targets that have no token twice, for that share of the tokens."""
        draw = torch.Generator().manual_seed(0)
        hidden_TH = torch.randn(tokens, hidden, generator=draw).requires_grad_()
        weight_VH = (torch.randn(vocab, hidden, generator=draw) / hidden**0.5).requires_grad_()
        rows_R = torch.randperm(tokens, generator=draw)[: round(supervised * tokens)].sort().values
        gold_R1, first_R1 = torch.randint(vocab, (2, len(rows_R), 1), generator=draw)
        fused_RK = (first_R1 + torch.arange(TOP_K) * (vocab // TOP_K)) % vocab
        weights_RK = torch.rand(len(rows_R), TOP_K, generator=draw)
        weights_RK = torch.cat([torch.ones_like(gold_R1), weights_RK / weights_RK.sum(-1, keepdim=True)], dim=1)
        return cls(hidden_TH, weight_VH, rows_R, Targets(torch.cat([gold_R1, fused_RK], dim=1), weights_RK))

    @property
    def ways(self) -> dict[str, Callable[[], object]]:
        return {
            "fusion": self.fusion,
            "sft": self.sft,
            "dense": self.dense,
            "released": self.released,
            "dense sft": self.dense_sft,
            "products": self.products,
            "products by torch.mm": partial(self.products, torch.mm),
            "tail bucket": partial(self.fusion, BUCKET),
            "jsd": partial(self.fusion, BUCKET, Divergence("jsd", 2.0)),
        }

    def fusion(self, form: TargetForm | None = None, divergence: Divergence = FORWARD_KL) -> None:
        self._back(self._sparse(self.targets, form or TargetForm(), CE_WEIGHT, divergence))

    def sft(self) -> None:
        """The same kernel with the references alone."""
        references = Targets(*(column_RK[:, :1] for column_RK in self.targets))
        self._back(self._sparse(references, TargetForm(), 1.0, FORWARD_KL))

    def _sparse(self, targets: Targets, form: TargetForm, ce_weight: float, divergence: Divergence) -> Tensor:
        hidden_RH = self.hidden_TH[self.rows_R]
        return target_loss(hidden_RH, Head(self.weight_VH), targets, form, ce_weight, divergence=divergence).loss

    def dense(self) -> None:
        """Logits of all tokens, one log-softmax, one dense target distribution."""
        targets_TV = self.dense_targets()
        logprobs_TV = (self.hidden_TH @ self.weight_VH.T).log_softmax(-1)
        ce = -logprobs_TV[self.rows_R, self.targets.ids_RK[:, 0]].sum()
        fusion = -(targets_TV * logprobs_TV).sum()
        self._back(CE_WEIGHT * ce + (1 - CE_WEIGHT) * fusion)

    def released(self) -> None:
        """What the authors' program does (https://github.com/fanqiwan/FuseAI): the model's own cross-entropy on a copy
        of the logits, a dense distribution of the pivot and one of the source, the winner's of every dialogue, and
        its cross-entropy. Here the distributions are float32, made without a loop, and unsupervised rows are zero.
        """
        pivot_BTV, source_BTV = (self.dense_targets().unflatten(0, (DIALOGUES, -1)) for _ in range(2))
        wins_B11 = (torch.arange(DIALOGUES) % 2 > 0)[:, None, None]
        targets_BTV = torch.where(wins_B11, source_BTV, pivot_BTV)
        logits_TV = self.hidden_TH @ self.weight_VH.T
        ce = cross_entropy(logits_TV.clone(), self._labels(), ignore_index=IGNORED, reduction="sum")
        fusion = cross_entropy(logits_TV, targets_BTV.flatten(0, 1), reduction="none").sum()
        self._back(CE_WEIGHT * ce + (1 - CE_WEIGHT) * fusion)

    def dense_sft(self) -> None:
        logits_TV = self.hidden_TH @ self.weight_VH.T
        self._back(cross_entropy(logits_TV, self._labels(), ignore_index=IGNORED, reduction="sum"))

    @torch.no_grad()
    def products(self, product: Product | None = None) -> None:
        """The three products of every chunk that no loss can do without, and nothing else."""
        product, gradient_VH = product or product_with(self.weight_VH), torch.zeros_like(self.weight_VH)
        for hidden_RH in self.hidden_TH[self.rows_R].split(rows_per_chunk(len(self.weight_VH), CPU)):
            logits_RV = product(hidden_RH, self.weight_VH.T)
            product(logits_RV, self.weight_VH)
            for slice_VH, slice_RV in zip(gradient_VH.split(TOKENS), logits_RV.split(TOKENS, dim=1), strict=True):
                slice_VH += product(slice_RV.T, hidden_RH)

    def dense_targets(self) -> Tensor:
        targets_TV = torch.zeros(len(self.hidden_TH), len(self.weight_VH))
        targets_TV[self.rows_R[:, None], self.targets.ids_RK[:, 1:]] = self.targets.weights_RK[:, 1:]
        return targets_TV

    def _labels(self) -> Tensor:
        labels_T = torch.full((len(self.hidden_TH),), IGNORED)
        labels_T[self.rows_R] = self.targets.ids_RK[:, 0]
        return labels_T

    def _back(self, loss: Tensor) -> None:
        self.hidden_TH.grad = self.weight_VH.grad = None
        loss.backward()

    def gradients(self, way: str) -> list[Tensor]:
        self.ways[way]()
        assert self.hidden_TH.grad is not None
        assert self.weight_VH.grad is not None
        return [self.hidden_TH.grad, self.weight_VH.grad]


def peak_of(way: str, tokens: int, vocab: int, hidden: int) -> Peak:
    """The peak of both passes in a process of its own."""
    return peak_of_process(__file__, way, tokens, vocab, hidden)


def main(way: str, tokens: str, vocab: str, hidden: str) -> None:
    torch.set_num_threads(1)
    Passes.random(4 * DIALOGUES, int(vocab), int(hidden)).ways[way]()  # kernels are loaded now
    print_peak(Passes.random(int(tokens), int(vocab), int(hidden)).ways[way])


if __name__ == "__main__":
    main(*sys.argv[1:])
