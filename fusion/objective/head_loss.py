"""Losses of a language model's head, without logits of the size [tokens, vocabulary].

A loss sees only a few numbers of a row (`Seen`): single logits and log-sum-exps. Its derivatives by them, the pulls,
are all that the gradient of the row's logits z needs,

    dz = pull of the log-sum-exp * softmax(z) + scatter(pulls of single logits),

so the logits of a chunk of rows become their own gradient while they exist, in the forward pass: what waits for the
backward pass has the sizes of hidden states, head and bias. Within a chunk, blocks of rows that fit a cache are worked
on in float32; products of matrices see the whole chunk, in the dtype of the hidden states or of autocast.

Tensor legend: T rows, H hidden size, V vocabulary, K asked tokens per row, P most likely tokens; R rows of a chunk,
B rows of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusion.objective.head import Head, whole_head
from fusion.objective.products import product_with
from fusion.planning import step_memory

CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 24
"""Logits of one block."""
TOKENS = 2048
"""Rows of the head whose gradient is multiplied at once, where the product is a tensor of its own."""


class Question(NamedTuple):
    """What a loss wants to know of every row."""

    ids_TK: Tensor
    """int64: tokens whose logits it wants; repeats are welcome."""
    support_TK: Tensor | None = None
    """bool: the entries whose tokens are the row's support; where given, `outside` is answered."""
    temperature: float = 1.0
    """Of `tempered` and `outside`."""
    most_likely: int = 0
    """Asks for the logits of the P = min(most_likely, V) most likely tokens."""


class Seen(NamedTuple):
    """What a loss sees of rows, in float32 (float64 for float64 input)."""

    logits_TK: Tensor
    normaliser_T1: Tensor
    """Log-sum-exp of all logits."""
    tempered_T1: Tensor
    """Log-sum-exp of all logits / temperature."""
    outside_T1: Tensor
    """Log-sum-exp of logits / temperature of the tokens outside the support; -inf where there are none."""
    likely_TP: Tensor
    """Logits of the most likely tokens, falling."""

    def of(self, rows: slice) -> "Seen":
        return Seen(*(part[rows] for part in self))


RowLoss = Callable[[slice, Seen], Sequence[Tensor]]
"""Terms of the loss, scalars, of the rows at these places: differentiable by every part of `Seen`."""


class HeadLoss(NamedTuple):
    loss: Tensor
    """Scalar, differentiable once."""
    seen: Seen
    """Of all rows; detached, for reports."""


@torch.compiler.disable
def head_loss(
    hidden_TH: Tensor,
    head: Head,
    question: Question,
    row_loss: RowLoss,
    *,
    joins_rows: bool = False,
    chunk_size: int | None = None,
) -> HeadLoss:
    """Sum of `row_loss` over all rows, differentiable with respect to hidden states, weight and bias of the head.

    Args:
        joins_rows: the loss is no sum over rows, so `row_loss` has to see all of them at once. Where they are more
            than a chunk, logits are computed twice.
        chunk_size: rows whose logits exist at the same time; None takes what `rows_per_chunk` gives.

    Peak memory is that of the gradients, one chunk and a few blocks; what needs no gradient gets none. The gradients
    are handed on by the first backward pass; where the graph is kept, another one computes them again.

    Raises:
        ValueError: shapes do not fit.
    """
    head = whole_head(head)
    require_fit(hidden_TH, head.weight_VH, question.ids_TK)
    chunk = chunk_size or rows_per_chunk(len(head.weight_VH), hidden_TH.device)
    task = _Task(head.scale, head.softcap, question, row_loss, joins_rows, chunk, torch.is_grad_enabled())
    loss, *seen = _HeadLossFunction.apply(hidden_TH, head.weight_VH, head.bias_V, task)
    return HeadLoss(loss, Seen(*seen))


def require_fit(hidden_TH: Tensor, head_VH: Tensor, ids_TK: Tensor) -> None:
    """Raises ValueError for shapes that do not belong together."""
    if hidden_TH.ndim != 2 or head_VH.ndim != 2 or hidden_TH.shape[1] != head_VH.shape[1]:
        raise ValueError(f"hidden {tuple(hidden_TH.shape)} and head {tuple(head_VH.shape)} do not fit each other")
    if ids_TK.ndim != 2 or len(ids_TK) != len(hidden_TH):
        raise ValueError(f"targets {tuple(ids_TK.shape)} do not fit {len(hidden_TH)} rows")


def rows_per_chunk(vocab_size: int, device: torch.device) -> int:
    """Rows whose logits exist at the same time, unless the settings say otherwise."""
    return step_memory.rows_per_chunk(vocab_size, device.type)


class _Task(NamedTuple):
    scale: float
    softcap: float | None
    question: Question
    row_loss: RowLoss
    joins_rows: bool
    chunk_size: int
    is_differentiated: bool


class _Gradients(NamedTuple):
    """None where no gradient is needed."""

    hidden_TH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


class _HeadLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, task: _Task
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(hidden_TH, weight_VH, bias_V)
        ctx.task, ctx.needs = task, [task.is_differentiated and needed for needed in ctx.needs_input_grad]
        work = _Work((hidden_TH, weight_VH, bias_V), task, ctx.needs)
        loss = work.run()
        ctx.gradients = work.gradients
        ctx.mark_non_differentiable(*work.seen)
        return loss, *work.seen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the gradient would take it for a constant
            raise RuntimeError("this loss is differentiable once; create_graph=True is not supported")
        inputs = ctx.saved_tensors
        found, ctx.gradients = ctx.gradients, None
        if found is None:
            work = _Work(inputs, ctx.task, ctx.needs)
            work.run()
            found = work.gradients
        pairs = zip(found, inputs, strict=True)
        return *(None if one is None else _scaled(one, grads[0]).to(like.dtype) for one, like in pairs), None


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """In place where the gradient is as exact as the scale: a head's gradient is the largest tensor around."""
    return gradient.to(scale.dtype).mul_(scale)


class _Work:
    """One pass over all chunks."""

    def __init__(self, inputs: tuple[Tensor, Tensor, Tensor | None], task: _Task, needs: Sequence[bool]) -> None:
        hidden_TH, weight_VH, bias_V = inputs
        dtype, self.exact = _matmul_dtype(hidden_TH), torch.promote_types(hidden_TH.dtype, torch.float32)
        self.task, self.question = task, task.question
        self.hidden_TH, self.weight_VH = hidden_TH.to(dtype), weight_VH.to(dtype)
        self.head = Head(self.weight_VH, bias_V, task.scale, task.softcap)
        self.product = product_with(self.weight_VH)
        self.gradients = _Gradients(
            torch.empty_like(hidden_TH) if needs[0] else None,
            torch.zeros_like(weight_VH, dtype=self.exact) if needs[1] else None,
            torch.zeros_like(bias_V, dtype=self.exact) if needs[2] and bias_V is not None else None,
        )
        self.block_rows = max(1, (CPU_BLOCK if hidden_TH.device.type == "cpu" else GPU_BLOCK) // len(weight_VH))
        self.seen = self._empty(len(hidden_TH), min(self.question.most_likely, len(weight_VH)))
        self.likely_ids_TP = torch.zeros_like(self.seen.likely_TP, dtype=torch.int64)

    def _empty(self, rows: int, likely: int) -> Seen:
        widths = (self.question.ids_TK.shape[1], 1, 1, 1, likely)
        return Seen(*(self.hidden_TH.new_full((rows, width), -torch.inf, dtype=self.exact) for width in widths))

    def run(self) -> Tensor:
        """The loss; `seen` and `gradients` are filled on the way."""
        with torch.no_grad(), torch.autocast(self.hidden_TH.device.type, enabled=False):
            several = len(self.hidden_TH) > self.task.chunk_size
            return self._run_joined() if self.task.joins_rows and several else self._run_by_chunk()

    def _run_by_chunk(self) -> Tensor:
        loss = self.hidden_TH.new_zeros((), dtype=self.exact)
        for rows in self._chunks():
            products_RV = self._products(rows)
            self._look(rows, products_RV)
            terms, pulls = self._judge(rows)
            for term in terms:
                loss += term
            if pulls is not None:
                self._pull(rows, products_RV, pulls)
            del products_RV  # or it would exist beside the next chunk's
        return loss

    def _run_joined(self) -> Tensor:
        for rows in self._chunks():
            self._look(rows, self._products(rows))
        terms, pulls = self._judge(slice(0, len(self.hidden_TH)))
        if pulls is not None:
            for rows in self._chunks():
                self._pull(rows, self._products(rows), pulls.of(rows))
        return torch.stack(list(terms)).sum().to(self.exact)

    def _chunks(self) -> Iterator[slice]:
        step = self.task.chunk_size
        return (slice(start, start + step) for start in range(0, len(self.hidden_TH), step))

    def _blocks(self, rows: slice, products_RV: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Places among all rows, and their part of the chunk."""
        for start in range(0, len(products_RV), self.block_rows):
            products_BV = products_RV[start : start + self.block_rows]
            yield slice(rows.start + start, rows.start + start + len(products_BV)), products_BV

    def _products(self, rows: slice) -> Tensor:
        return self.product(self.hidden_TH[rows], self.weight_VH.T)

    def _look(self, rows: slice, products_RV: Tensor) -> None:
        """Fill `seen` for these rows."""
        temperature, likely = self.question.temperature, self.seen.likely_TP.shape[1]
        for places, products_BV in self._blocks(rows, products_RV):
            seen, logits_BV = self.seen.of(places), self.head.logits(products_BV)
            torch.gather(logits_BV, -1, self.question.ids_TK[places], out=seen.logits_TK)
            torch.logsumexp(logits_BV, -1, keepdim=True, out=seen.normaliser_T1)
            if temperature == 1:
                seen.tempered_T1.copy_(seen.normaliser_T1)
            else:
                torch.logsumexp(logits_BV / temperature, -1, keepdim=True, out=seen.tempered_T1)
            if self.question.support_TK is not None:
                torch.logsumexp(self._outside(places, logits_BV), -1, keepdim=True, out=seen.outside_T1)
            if likely:
                torch.topk(logits_BV, likely, -1, out=(seen.likely_TP, self.likely_ids_TP[places]))

    def _outside(self, places: slice, logits_BV: Tensor) -> Tensor:
        """Tempered logits, -inf in the support: log(1 - sum of the others) would cancel where the tail is small."""
        assert self.question.support_TK is not None
        least_BK = torch.where(self.question.support_TK[places], -torch.inf, torch.inf).to(self.exact)
        outside_BV = logits_BV / self.question.temperature
        return outside_BV.scatter_reduce_(-1, self.question.ids_TK[places], least_BK, "amin")

    def _judge(self, rows: slice) -> tuple[Sequence[Tensor], Seen | None]:
        """The terms of the loss of these rows, and their pulls where a gradient is needed."""
        seen = self.seen.of(rows)
        if all(gradient is None for gradient in self.gradients):
            return self.task.row_loss(rows, seen), None
        with torch.enable_grad():
            leaves = [part.detach().requires_grad_() for part in seen]
            terms = self.task.row_loss(rows, Seen(*leaves))
            total = torch.stack(list(terms)).sum()
            pulls = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        return [term.detach() for term in terms], Seen(*pulls)

    def _pull(self, rows: slice, products_RV: Tensor, pulls: Seen) -> None:
        """Add these rows to the gradients; their products are overwritten."""
        for places, products_BV in self._blocks(rows, products_RV):
            here = slice(places.start - rows.start, places.stop - rows.start)
            self._to_gradient(places, products_BV, pulls.of(here))
        hidden_TH, weight_VH, bias_V = self.gradients
        if hidden_TH is not None:
            hidden_TH[rows] = self.product(products_RV, self.weight_VH)
        if weight_VH is not None:
            self._add_product(weight_VH, products_RV, self.hidden_TH[rows])
        if bias_V is not None:
            bias_V += products_RV.sum(0, dtype=self.exact)

    def _to_gradient(self, places: slice, products_BV: Tensor, pulls: Seen) -> None:
        """Overwrite products by the gradient of the loss by them."""
        seen, logits_BV, temperature = self.seen.of(places), self.head.logits(products_BV), self.question.temperature
        gradient_BV = (logits_BV - seen.normaliser_T1).exp_()
        gradient_BV.mul_(pulls.normaliser_T1 + pulls.tempered_T1 if temperature == 1 else pulls.normaliser_T1)
        gradient_BV.scatter_add_(-1, self.question.ids_TK[places], pulls.logits_TK)
        gradient_BV.scatter_add_(-1, self.likely_ids_TP[places], pulls.likely_TP)
        if temperature != 1:
            shares_BV = (logits_BV / temperature).sub_(seen.tempered_T1).exp_()
            gradient_BV += shares_BV.mul_(pulls.tempered_T1 / temperature)
        if self.question.support_TK is not None:
            own_B1 = torch.where(seen.outside_T1 > -torch.inf, seen.outside_T1, torch.inf)
            shares_BV = self._outside(places, logits_BV).sub_(own_B1).exp_()
            gradient_BV += shares_BV.mul_(pulls.outside_T1 / temperature)
        products_BV.copy_(self.head.back_to_products_(gradient_BV, logits_BV))

    def _add_product(self, total_VH: Tensor, gradient_RV: Tensor, hidden_RH: Tensor) -> None:
        if self.product is torch.mm and total_VH.dtype == hidden_RH.dtype:
            total_VH.addmm_(gradient_RV.T, hidden_RH)
            return
        for start in range(0, len(total_VH), TOKENS):
            tokens = slice(start, start + TOKENS)
            total_VH[tokens] += self.product(gradient_RV[:, tokens].T, hidden_RH)


def _matmul_dtype(hidden_TH: Tensor) -> torch.dtype:
    device = hidden_TH.device.type
    if hidden_TH.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return hidden_TH.dtype
