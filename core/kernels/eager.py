"""The oracle: loops that read like the equations. Any device, any dtype, differentiable by plain autograd."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..torch_internals import check_not_mapped, is_watched
from .quantized import Weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}
"""Those that a feed-forward expert may have; ``gelu_tanh`` is GELU's approximation."""
SCORE_FUNCS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
    # The floor keeps the gradient finite where the softplus is 0 in float32.
    "sqrt_softplus": lambda logits: F.softplus(logits).clamp_min(1e-30).sqrt(),
}
"""The score functions of ``topk_gate``, of logits (..., E). Each is monotone: scores have the order of the logits."""
ALL_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {**ACTIVATIONS, "identity": torch.clone}
"""Those that kernels know: also none, as between the two products of low-rank experts. A copy, for it is written to."""
_ACCUMULATE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over rows: float32 for half precisions, else ``dtype`` itself."""
    return _ACCUMULATE.get(dtype, dtype)


def check_width(x: Tensor, width: int) -> None:
    """Raise a ``ValueError`` if rows (R, D) are not as wide as the experts' matrices take them.

    For kernels that pad, or read without bounds: they would give numbers when a plain matmul raises.
    """
    if x.shape[1] != width:
        raise ValueError(f"rows have width {x.shape[1]}, the experts' matrices take {width}")


def check_shapes(**tensors: tuple[Weight | None, tuple[int, ...]]) -> None:
    """Raise a ``ValueError`` if a tensor does not have the shape paired with it.

    For kernels that read without bounds.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which must be {tuple(shape)} beside the others")


def check_ffn(x: Tensor, rows: RowIndex, gates_R: Tensor, weights: FFNWeights, activation: str) -> None:
    """Raise a ``ValueError`` if shapes of ``expert_ffn`` do not go together, or for an unknown activation."""
    w_in, w_out, b_in, b_out, w_gate = weights
    (E, D, F), N = w_in.shape, w_out.shape[-1]
    check_shapes(
        w_out=(w_out, (E, F, N)),
        b_in=(b_in, (E, F)),
        b_out=(b_out, (E, N)),
        w_gate=(w_gate, (E, D, F)),
        offsets_E=(rows.offsets_E, (E,)),
        gates_R=(gates_R, (x if rows.row_index_R is None else rows.row_index_R).shape[:1]),
    )
    if activation not in ALL_ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is not one of {', '.join(ALL_ACTIVATIONS)}")


def check_devices(x: Tensor, owner: str, parameters: Mapping[str, Tensor | None]) -> None:
    """Raise a ``ValueError`` if a parameter that tokens are about to meet is on another device than they.

    torch's matmuls on a CPU read a parameter on the meta device, which has no numbers, as whatever lies in memory.

    Args:
        x: the tokens.
        owner: name of the class that has the parameters, for the message.
        parameters: the parameters by name, as in ``nn.Module._parameters``.
    """
    if torch.compiler.is_compiling():
        return
    for name, parameter in parameters.items():
        if parameter is not None and parameter.device != x.device:
            raise ValueError(f"{owner}.{name} is on device {parameter.device}, the tokens are on {x.device}")


def outside_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast, which does not know the meta device."""
    # An exported program keeps the context, for it may run under autocast later.
    is_off = device.type == "meta" or not (torch.compiler.is_compiling() or torch.is_autocast_enabled(device.type))
    return contextlib.nullcontext() if is_off else torch.autocast(device.type, enabled=False)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return True


@dataclass(frozen=True)
class TopK:
    """Scores, chosen experts and gates of T tokens.

    Attributes:
        scores_TE: float32 (T, E), scores of all experts.
        expert_ids_TK: int64 (T, K), ids of the chosen experts, the best first.
        gates_TK: float32 (T, K), their combine weights.
        chosen_per_expert_E: int64 (E,), non-padding tokens that chose each expert; None if the backend did not count
            them.
        sums: sums over the non-padding tokens under their names in ``balance_sums``, from a backend that makes them:
            "score" (E,), the scores over their sum; "square" (1,), the squared logsumexp of the logits.
    """

    scores_TE: Tensor
    expert_ids_TK: Tensor
    gates_TK: Tensor
    chosen_per_expert_E: Tensor | None = None
    sums: dict[str, Tensor] | None = None


def top_k_ids(values: Tensor, k: int) -> Tensor:
    """Return the places of the k largest values of the last axis, the largest first and the lowest of equal ones first.

    ``torch.topk`` promises no order among equal values, and picks different ones on a GPU and on a CPU.

    Args:
        values: (..., E), without a gradient.
        k: in 0 to E.

    Returns:
        int64 (..., k).
    """
    return values.argsort(dim=-1, descending=True, stable=True)[..., :k].contiguous()


def gates_of(logits_TE: Tensor, scores_TE: Tensor, expert_ids_TK: Tensor, score_func: str, normalize: bool) -> Tensor:
    """Return the gates (T, K) of chosen experts: their scores, with ``normalize`` scaled to sum to 1.

    Args:
        logits_TE, scores_TE: (T, E), the scores by ``score_func``.
        expert_ids_TK: int64 (T, K).
        score_func: a key of ``SCORE_FUNCS``; of "softmax" the chosen logits are read, which do not underflow.
        normalize: whether a token's gates are scaled to sum to 1.
    """
    if normalize and score_func == "softmax":
        return logits_TE.gather(-1, expert_ids_TK).softmax(-1)
    gates_TK = scores_TE.gather(-1, expert_ids_TK)
    return gates_TK / gates_TK.sum(-1, keepdim=True).clamp_min(1e-20) if normalize else gates_TK


def topk_gate(
    logits_TE: Tensor,
    top_k: int,
    *,
    score_func: str = "softmax",
    normalize: bool = True,
    bias_E: Tensor | None = None,
    num_groups: int = 1,
    limited_groups: int = 1,
    group_score: str = "top2",
    scale: float = 1.0,
    valid_T: Tensor | None = None,
) -> TopK:
    """Compute the scores, choose the ``top_k`` best experts of each token, and weight them by their gates.

    The choice goes by the logits wherever scores have their order, that is without a bias: large logits have scores
    that float32 cannot tell apart (from 17 on a sigmoid is 1). The lowest of equal experts is taken, and the lowest of
    equal groups.

    Args:
        logits_TE: float32 (T, E).
        top_k: experts per token.
        score_func: a key of ``SCORE_FUNCS``: "softmax", "sigmoid" or "sqrt_softplus".
        normalize: scale a token's gates to sum to 1; for softmax scores: the softmax of the chosen logits.
        bias_E: float32 (E,), added to the scores for the choice only (aux-loss-free balancing, arXiv 2408.15664).
        num_groups, limited_groups: the choice is limited to the best ``limited_groups`` of ``num_groups`` equal groups
            of experts.
        group_score: criterion for a group: "top2", the sum of its two best biased scores (DeepSeek-V3, arXiv
            2412.19437, section 2.1.2); "max", its best one (DeepSeek-V2, arXiv 2405.04434, section 2.2.2).
        scale: factor on the gates.
        valid_T: bool (T,), False for padding: for a backend that counts and sums on the way.
    """
    scores_TE = SCORE_FUNCS[score_func](logits_TE)
    choice_TE = logits_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    if limited_groups < num_groups:
        # Above the -inf of experts outside the groups, whatever the logits are.
        grouped = choice_TE.clamp_min(torch.finfo(choice_TE.dtype).min).unflatten(-1, (num_groups, -1))
        if group_score == "max" or grouped.shape[-1] == 1:
            best = grouped.amax(-1)
        else:  # a sum of two, which has the scores' order and not the logits'
            judged = grouped if bias_E is not None else scores_TE.detach().unflatten(-1, (num_groups, -1))
            best = judged.topk(2, dim=-1).values.sum(-1)
        keep = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top_k_ids(best, limited_groups), True)
        # -inf and not 0: a biased score may be negative, and must still win over an expert outside the groups.
        choice_TE = grouped.masked_fill(~keep.unsqueeze(-1), -torch.inf).flatten(-2)
    expert_ids_TK = top_k_ids(choice_TE, top_k)
    gates_TK = gates_of(logits_TE, scores_TE, expert_ids_TK, score_func, normalize)
    return TopK(scores_TE, expert_ids_TK, gates_TK * scale if scale != 1.0 else gates_TK)


@dataclass(frozen=True)
class Sorted:
    """The order of the pairs by expert.

    Attributes:
        order_R: int64 (R,), the pair of each row.
        inverse_N: int64 (N,), the row of each pair.
        offsets_E: int32 (E,), inclusive counts of rows.
    """

    order_R: Tensor
    inverse_N: Tensor
    offsets_E: Tensor


def count_experts(expert_ids_N: Tensor, num_experts: int) -> Tensor:
    """Count the pairs of each expert, int64 (E,), without pairs of id E. The host does not wait for the device.

    Raises:
        ValueError: ``torch.func.vmap`` maps over the pairs.
    """
    check_not_mapped(expert_ids_N)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=expert_ids_N.device)
    return counts.scatter_add_(0, expert_ids_N, torch.ones_like(expert_ids_N))[:num_experts]


def sort_pairs(expert_ids_N: Tensor, tokens_per_expert_E: Tensor) -> Sorted:
    """Order the pairs by expert, earlier pairs first; pairs with the id E come last.

    Args:
        expert_ids_N: int64 (N,), E if a pair is not computed.
        tokens_per_expert_E: int64 (E,), how many pairs each expert computes.
    """
    order_R = expert_ids_N.argsort(stable=True)
    inverse_N = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.shape[0], device=order_R.device))
    return Sorted(order_R, inverse_N, tokens_per_expert_E.cumsum(0).to(torch.int32))


def capacity_ranks(expert_ids_N: Tensor, priority_N: Tensor, num_experts: int) -> Tensor:
    """Return each pair's place in its expert's queue, 0 first.

    Args:
        expert_ids_N: int64 (N,), a queue number: an expert, or an expert of a group.
        priority_N: int64 (N,), distinct; the lowest is served first.
        num_experts: one more than the highest queue number.
    """
    by_priority = priority_N.argsort()
    by_queue = by_priority[expert_ids_N[by_priority].argsort(stable=True)]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids_N.device)
    counts.scatter_add_(0, expert_ids_N, torch.ones_like(expert_ids_N))
    starts = counts.cumsum(0) - counts
    place = torch.arange(by_queue.shape[0], device=by_queue.device) - starts[expert_ids_N[by_queue]]
    return torch.empty_like(place).scatter_(0, by_queue, place)


def queue_ranks(queue_TK: Tensor, served_T: Tensor | None, num_queues: int) -> Tensor:
    """Return each pair's place in its queue: first choices of all tokens come before second ones (GShard, V-MoE).

    Args:
        queue_TK: int64 (T, K), a queue number below ``num_queues``: an expert, or an expert of a group.
        served_T: int64 (T,), the tokens in the order in which they are served; None: as they come.
        num_queues: one more than the highest queue number.

    Returns:
        int64 (T, K), 0 first.
    """
    T, K = queue_TK.shape
    place_T = torch.arange(T, device=queue_TK.device)
    if served_T is not None:
        place_T = torch.empty_like(place_T).scatter_(0, served_T, place_T)
    priority_TK = torch.arange(K, device=queue_TK.device) * T + place_T[:, None]
    return capacity_ranks(queue_TK.flatten(), priority_TK.flatten(), num_queues).view(T, K)


def whole_ratio(factor: float) -> tuple[int, int]:
    """Return the factor as a ratio of integers: 1.1 is 11 / 10, and 0.3333333333333333 is 1 / 3."""
    # A bounded denominator: 16 digits times the tokens would overflow int64.
    return Fraction(str(factor)).limit_denominator(10**9).as_integer_ratio()


def capacity(ratio: tuple[int, int], top_k: int, num_tokens: int | Tensor, num_experts: int) -> int | Tensor:
    """``ceil(factor * top_k * num_tokens / num_experts)`` in integer arithmetic: 1.1 * 10 stays 11, not 12.

    Args:
        ratio: ``whole_ratio`` of the factor.
        top_k: experts per token.
        num_tokens: non-padding tokens of a group, or int64 of several.
        num_experts: E.
    """
    over, under = ratio
    return -((-num_tokens * (over * top_k)) // (under * num_experts))


class RowIndex(NamedTuple):
    """The token and the expert of each row; rows are sorted by expert.

    Attributes:
        row_index_R: int64 (R,), the token of each row; None if rows are the tokens themselves.
        offsets_E: int32 (E,), inclusive counts of rows; rows past the last offset are not computed.
        inverse_N: int64 (N,), the row of each pair, if pairs are token-major: a faster ``combine`` may use it.
        top_k: K, the pairs of each token, if they are token-major.
    """

    row_index_R: Tensor | None
    offsets_E: Tensor
    inverse_N: Tensor | None = None
    top_k: int | None = None


class FFNWeights(NamedTuple):
    """The weights of E feed-forward experts. Either all matrices are quantized or none is.

    Attributes:
        w_in, w_gate: (E, D, F).
        w_out: (E, F, D_out).
        b_in: (E, F).
        b_out: (E, D_out).
    """

    w_in: Weight
    w_out: Weight
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    w_gate: Weight | None = None


def expert_ffn(x: Tensor, rows: RowIndex, gates_R: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """``y_t = sum of g_r * f_e(x_t)`` over the rows ``r`` of token ``t``, with ``e`` the expert of row ``r``.

    ``f_e(x) = act(x w_in + b_in) w_out + b_out``, or with ``w_gate``
    ``(act(x w_gate) * (x w_in + b_in)) w_out + b_out``.

    Args:
        x: (T, D) tokens.
        rows: the token and the expert of each row.
        gates_R: (R,), the weight of each row.
        weights: the experts, which compute ``f_e``.
        activation: a key of ``ALL_ACTIVATIONS``.

    Returns:
        (T, D_out), in the dtype of ``x``. Tokens without a row are zero.
    """
    act, (w_in, w_out, b_in, b_out, w_gate) = ALL_ACTIVATIONS[activation], weights
    y = torch.zeros(x.shape[0], w_out.shape[-1], dtype=accumulate_dtype(x.dtype), device=x.device)
    start = 0
    for e, end in enumerate(rows.offsets_E.tolist()):
        index = torch.arange(start, end, device=x.device) if rows.row_index_R is None else rows.row_index_R[start:end]
        x_e = x[index]
        h = x_e @ w_in[e]
        if b_in is not None:
            h = h + b_in[e]
        h = act(h) if w_gate is None else act(x_e @ w_gate[e]) * h
        y_e = h @ w_out[e]
        if b_out is not None:
            y_e = y_e + b_out[e]
        y = y.index_add(0, index, y_e.to(y.dtype) * gates_R[start:end, None])
        start = end
    return y.to(x.dtype)


def expert_linear(x_RD: Tensor, w: Weight, offsets_E: Tensor, b: Tensor | None = None) -> Tensor:
    """``y_r = x_r w_e + b_e``, with ``e`` the expert of row ``r``; zero in the rows past the last offset.

    Args:
        x_RD: (R, D) rows sorted by expert.
        w: (E, D, F).
        offsets_E: int32 (E,), inclusive counts.
        b: (E, F).

    Returns:
        (R, F).
    """
    parts, start = [], 0
    for e, end in enumerate(offsets_E.tolist()):
        y_e = x_RD[start:end] @ w[e]
        parts.append(y_e if b is None else y_e + b[e])
        start = end
    return torch.cat((*parts, x_RD.new_zeros(x_RD.shape[0] - start, w.shape[-1])))


def is_full(rows_R: Tensor, offsets_E: Tensor) -> bool:
    """Return whether the host sees, without waiting, that all rows are before the last offset: none is to be masked."""
    return (
        rows_R.device.type == "cpu"
        and not is_watched(rows_R, offsets_E)
        and len(offsets_E) > 0
        and int(offsets_E[-1]) == rows_R.shape[0]
    )


def combine(y_RD: Tensor, rows: RowIndex, gates_R: Tensor | None, num_tokens: int) -> Tensor:
    """Sum the rows of each token, weighted by ``gates_R`` (R,) if given: (R, D) to (T, D).

    Rows past the last offset may hold anything.
    """
    assert rows.row_index_R is not None
    y_RD = y_RD.to(accumulate_dtype(y_RD.dtype))
    if not is_full(y_RD, rows.offsets_E):
        live_R = torch.arange(rows.row_index_R.shape[0], device=y_RD.device) < rows.offsets_E[-1]
        y_RD = torch.where(live_R[:, None], y_RD, 0)
        gates_R = None if gates_R is None else torch.where(live_R, gates_R, 0)
    if gates_R is not None:
        y_RD = y_RD * gates_R[:, None]
    y = torch.zeros(num_tokens, y_RD.shape[-1], dtype=y_RD.dtype, device=y_RD.device)
    return y.index_add(0, rows.row_index_R, y_RD)
