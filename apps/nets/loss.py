"""Losses over a large vocabulary of items or subwords, without all logits in memory at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from apps.base.machine import host_waits_for
from core.kernels.cpu.products import addmm_, mm

CHUNK_ELEMENTS = 2**21
"""Logits at a time: 4 MB in bfloat16."""

LEAST_ROWS = 64
"""Fewest rows of logits at a time: each chunk reads the whole vocabulary's vectors. A loss of 512 rows over 152,000
vectors of 512 numbers takes 3.4 s by 64 rows, 8.5 s by 13 rows (2^21 logits), 2.9 s at once (one Xeon core)."""


def chunk_rows(num_rows: int, vocab_size: int) -> int:
    """Return how many of the rows have their logits in memory at a time."""
    return min(max(LEAST_ROWS, CHUNK_ELEMENTS // max(vocab_size, 1)), max(num_rows, 1))


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient of a chunk is worked out while its logits are there, so that no logit is kept or computed twice.

    Smoothing takes no pass over the logits: their mean over the vocabulary is ``h`` times the mean row of ``W``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        weight_VD: Tensor,
        target_T: Tensor,
        smoothing: float,
        left_out_TX: Tensor | None,
        real_T: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        T, V = len(h_TD), len(weight_VD)
        h_dtype, weight_dtype = h_TD.dtype, weight_VD.dtype
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        h_TD, weight_VD = h_TD.to(dtype), weight_VD.to(dtype)
        if real_T is not None:
            h_TD = h_TD.masked_fill(~real_T[:, None], 0)
        weight_DV = weight_VD.t().contiguous()
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        dh_TD = torch.empty_like(h_TD) if wants_h else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=exact) if wants_weight else None
        total = torch.zeros((), dtype=exact, device=h_TD.device)
        rows = chunk_rows(T, V)
        # One buffer for all chunks: fresh memory of this size costs more than the computation in it.
        logits_rV, p_rV = (h_TD.new_empty(rows, V) for _ in range(2))
        for start in range(0, T, rows):
            h_tD, target_t1 = h_TD[start : start + rows], target_T[start : start + rows, None]
            logits_tV, p_tV = logits_rV[: len(h_tD)], p_rV[: len(h_tD)]
            mm(h_tD, weight_DV, out=logits_tV)
            target_logit_t1 = logits_tV.gather(1, target_t1)
            if left_out_TX is not None:
                left_out_tX = left_out_TX[start : start + rows]
                logits_tV.scatter_(1, torch.where(left_out_tX < 0, target_t1, left_out_tX), -torch.inf)
                logits_tV.scatter_(1, target_t1, target_logit_t1)
            torch.softmax(logits_tV, -1, out=p_tV)  # float32 inside, whatever goes in and out
            loss_t1 = _log_sum(logits_tV, p_tV) - (1 - smoothing) * target_logit_t1.to(exact)
            if real_T is not None:
                loss_t1 = loss_t1.masked_fill(~real_T[start : start + rows, None], 0)
            total += loss_t1.sum()
            if not (wants_h or wants_weight):
                continue
            d_tV = p_tV.scatter_add_(1, target_t1, torch.full_like(target_t1, smoothing - 1, dtype=dtype))
            if dh_TD is not None:
                mm(d_tV, weight_VD, out=dh_TD[start : start + rows])
            if dweight_VD is not None:
                addmm_(dweight_VD, d_tV.t(), h_tD)
        if smoothing:
            sum_D, mean_D = h_TD.sum(0, dtype=exact), weight_VD.mean(0, dtype=exact)
            total -= smoothing * sum_D.dot(mean_D)
            dh_TD = None if dh_TD is None else dh_TD - smoothing * mean_D
            dweight_VD = None if dweight_VD is None else dweight_VD.sub_(smoothing / V * sum_D)
        if dh_TD is not None and real_T is not None:
            dh_TD.masked_fill_(~real_T[:, None], 0)
        count = _count(T, real_T)
        # The mean's denominator comes last: shares of 1 / T would lose digits in bfloat16.
        if dh_TD is not None:
            dh_TD = (dh_TD / count).to(h_dtype)
        if dweight_VD is not None:
            dweight_VD = (dweight_VD / count).to(weight_dtype)
        ctx.grads = dh_TD, dweight_VD
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        scaled = (None if g is None else g * grad.to(g.dtype) for g in ctx.grads)
        return *scaled, None, None, None, None, None  # type: ignore[return-value]


def _count(num_rows: int, real_T: Tensor | None) -> int | Tensor:
    """Return the number of rows that count, at least 1."""
    return max(num_rows, 1) if real_T is None else real_T.sum().clamp_min(1)


def _log_sum(logits_tV: Tensor, p_tV: Tensor) -> Tensor:
    """Return ``logsumexp``, (t, 1), as ``max - log p[max]``: the sum of the softmax is not made again."""
    exact = torch.promote_types(logits_tV.dtype, torch.float32)
    top_t1, p_top_t1 = (x.amax(1, keepdim=True).to(exact) for x in (logits_tV, p_tV))
    return top_t1 - p_top_t1.log()


def linear_cross_entropy(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    left_out: Tensor | None = None,
    real: Tensor | None = None,
) -> Tensor:
    """Return the mean over the rows of ``-sum_v q_v log softmax(h W^T)_v``, in chunks of rows; 0 without rows.

    q is ``1 - label_smoothing`` at the target, and ``label_smoothing / V`` more everywhere. Under autocast the matmuls
    are in its dtype and the softmax in float32. One backward, not differentiable twice.

    Args:
        h: (T, D).
        weight: (V, D).
        target: int64 (T,), in ``range(V)``.
        label_smoothing: share of the target spread evenly over the vocabulary.
        left_out: int64 (T, X), columns that are not candidates of a row, so that its softmax leaves them out; -1 names
            none, and a row's target is a candidate always. It only goes with ``label_smoothing=0``.
        real: bool (T,), the rows that count; the others may hold anything and get gradients of 0. None: all rows.

    Returns:
        (), float32, or float64 if ``h`` is.
    """
    assert left_out is None or label_smoothing == 0
    dtype = _dtype_of_products(h, weight)
    with torch.autocast(h.device.type, enabled=False):
        return _LinearCrossEntropy.apply(h, weight, target, label_smoothing, left_out, real, dtype)


def _dtype_of_products(h: Tensor, weight: Tensor) -> torch.dtype:
    kind = h.device.type
    autocast = torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else torch.promote_types(h.dtype, weight.dtype)


class _LinearDivergence(torch.autograd.Function):
    """The function works out the gradient of a chunk while its logits are there, as ``_LinearCrossEntropy`` does."""

    @staticmethod
    def forward(
        ctx: Any, h_TD: Tensor, weight_VD: Tensor, teacher: OutputLogits, temperature: float, dtype: torch.dtype
    ) -> Tensor:
        T, V = len(h_TD), len(weight_VD)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        wants_h, wants_weight = ctx.needs_input_grad[:2]
        h, weight, teacher_h = h_TD.to(dtype), weight_VD.to(dtype), teacher.h_TD.to(dtype)
        weight_DV, teacher_DV = weight.t().contiguous(), teacher.weight_VD.to(dtype).t().contiguous()
        dh_TD = torch.empty_like(h_TD) if wants_h else None
        dweight_VD = torch.zeros_like(weight, dtype=exact) if wants_weight else None
        total = torch.zeros((), dtype=exact, device=h_TD.device)
        count, rows = _count(T, teacher.real_T), chunk_rows(T, V)
        for start in range(0, T, rows):
            part = slice(start, start + rows)
            log_q_tV = (mm(h[part], weight_DV).to(exact) / temperature).log_softmax(-1)
            log_p_tV = (mm(teacher_h[part], teacher_DV).to(exact) / temperature).log_softmax(-1)
            p_tV = log_p_tV.exp()
            total += (p_tV * (log_p_tV - log_q_tV)).sum()
            if not (wants_h or wants_weight):
                continue
            d_tV = (log_q_tV.exp_().sub_(p_tV) / temperature).to(dtype)
            if dh_TD is not None:
                dh_TD[part] = mm(d_tV, weight) / count
            if dweight_VD is not None:
                addmm_(dweight_VD, d_tV.t(), h[part])
        ctx.grads = dh_TD, None if dweight_VD is None else (dweight_VD / count).to(weight_VD.dtype)
        return total / count

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        scaled = (None if g is None else g * grad.to(g.dtype) for g in ctx.grads)
        return *scaled, None, None, None  # type: ignore[return-value]


@dataclass(frozen=True)
class OutputLogits:
    """The logits ``h W^T`` of T targets over a vocabulary, not computed yet.

    Attributes:
        h_TD: (T, D).
        weight_VD: (V, D).
        real_T: bool (T,), False for rows that are 0 and no targets, as they stay in padded texts; None: all are.
    """

    h_TD: Tensor
    weight_VD: Tensor
    real_T: Tensor | None = None

    @classmethod
    def of_real(cls, h_BLD: Tensor, real_BL: Tensor, weight_VD: Tensor, packed: bool = False) -> OutputLogits:
        """Return the logits of the tokens where ``real_BL``, bool (B, L), is True.

        The others are left out if ``packed``, and on a CPU. Elsewhere the host would wait for their number, so they
        stay as rows of 0.
        """
        if packed or not host_waits_for(h_BLD.device):
            return cls(h_BLD[real_BL], weight_VD)
        return cls(h_BLD.masked_fill(~real_BL[..., None], 0).flatten(0, 1), weight_VD, real_BL.flatten())

    def cross_entropy(self, target_T: Tensor, label_smoothing: float) -> Tensor:
        """Return ``linear_cross_entropy`` of the targets."""
        return linear_cross_entropy(self.h_TD, self.weight_VD, target_T, label_smoothing, real=self.real_T)

    def scores(self, target_T: Tensor) -> TargetScores:
        """Return ``target_scores`` of the targets."""
        return target_scores(self.h_TD, self.weight_VD, target_T)

    def divergence(self, teacher: OutputLogits | LogProbs, temperature: float) -> Tensor:
        """Return the mean over the T targets of ``KL(teacher || self)``, (), in chunks of rows; 0 without rows.

        The dtypes are as in ``linear_cross_entropy``. One backward, which gives the teacher no gradient.

        Args:
            teacher: logits of the same targets; its D may be another.
            temperature: divides both logits.
        """
        if isinstance(teacher, LogProbs):
            raise ValueError("the teacher copies from the source, and the model does not: both need the same copy")
        h, weight = self.h_TD, self.weight_VD
        dtype = _dtype_of_products(h, weight)
        with torch.autocast(h.device.type, enabled=False):
            return _LinearDivergence.apply(h, weight, teacher, temperature, dtype)


@dataclass(frozen=True)
class LogProbs:
    """The log-probabilities of T targets over a vocabulary, with the methods of ``OutputLogits``.

    Attributes:
        log_p_TV: float32 (T, V); float64 if the model is.
    """

    log_p_TV: Tensor
    real_T: ClassVar[None] = None

    def cross_entropy(self, target_T: Tensor, label_smoothing: float) -> Tensor:
        nll_T = -self.log_p_TV.gather(1, target_T[:, None]).squeeze(1)
        smooth_T = -self.log_p_TV.mean(1) if label_smoothing else nll_T
        return torch.lerp(nll_T, smooth_T, label_smoothing).sum() / max(len(target_T), 1)

    def scores(self, target_T: Tensor) -> TargetScores:
        nll_T = -self.log_p_TV.gather(1, target_T[:, None]).squeeze(1)
        return TargetScores(nll_T.detach(), self.log_p_TV.argmax(1) == target_T)

    def divergence(self, teacher: OutputLogits | LogProbs, temperature: float) -> Tensor:
        if not isinstance(teacher, LogProbs):
            raise ValueError("the model copies from the source, and the teacher does not: both need the same copy")
        log_q_TV, log_p_TV = ((own.log_p_TV / temperature).log_softmax(-1) for own in (self, teacher))
        return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum() / max(len(log_q_TV), 1)


class TargetScores(NamedTuple):
    """The probability and the rank that a model gives each target.

    Attributes:
        nll_T: float32 (T,), ``-log softmax(h W^T)[target]``; float64 if ``h`` is.
        is_first_T: bool (T,), no other has a higher logit, and none before it the same.
    """

    nll_T: Tensor
    is_first_T: Tensor


@torch.no_grad()
def target_scores(h: Tensor, weight: Tensor, target: Tensor) -> TargetScores:
    """Return the negative log likelihood of each row's target, and whether it comes first, in chunks of rows.

    It computes in float32 also under autocast: in bfloat16 the highest logits tie. See ``linear_cross_entropy``.
    """
    dtype = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
    nll_T = torch.empty(len(h), dtype=dtype, device=h.device)
    is_first_T = torch.empty(len(h), dtype=torch.bool, device=h.device)
    rows = chunk_rows(len(h), len(weight))
    with torch.autocast(h.device.type, enabled=False):
        weight_DV = weight.to(dtype).t().contiguous()
        for start in range(0, len(h), rows):
            part = slice(start, start + rows)
            logits_tV, target_t = mm(h[part].to(dtype), weight_DV), target[part]
            nll_T[part] = logits_tV.logsumexp(-1) - logits_tV.gather(1, target_t[:, None]).squeeze(1)
            is_first_T[part] = logits_tV.argmax(-1) == target_t
    return TargetScores(nll_T, is_first_T)
