"""The fused gate: scores, choice, gates, loads and the sums of the balance losses, in one pass over the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..eager import TopK, check_shapes
from ..fallback import warn_once
from .environment import MAX_EXPERTS
from .launch import Launch, power_of_two

NUMBERS = 1024
"""Logits that a program holds at once."""
TOKENS_OF_A_SUM = 16
"""Fewest tokens that share a row of counts and sums: with one token a row these would be as large as the logits."""
BLOCKS_AT_A_TIME = 256
"""Rows of counts and sums that a program adds up side by side, for its few experts."""


def _tokens_at_a_time(columns: int) -> int:
    return max(1, min(64, NUMBERS // columns))


def choose(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    valid_T: Tensor | None,
    top_k: int,
    softmax: bool,
    normalize: bool,
    num_groups: int,
    limited_groups: int,
    best_two: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return scores, ids, gates, loads, score sums and the square sum; see ``TopK``."""
    logits_TE = logits_TE.contiguous()
    (T, E), like = logits_TE.shape, logits_TE
    limited = limited_groups if limited_groups < num_groups else 0
    groups = num_groups if limited else 1
    groups_pow2, within_pow2 = power_of_two(groups), power_of_two(E // groups)
    high = _tokens_at_a_time(groups_pow2 * within_pow2)
    steps = max(1, TOKENS_OF_A_SUM // high)
    blocks = -(-T // (high * steps))
    scores_TE, gates_TK = like.new_empty(T, E), like.new_empty(T, top_k)
    ids_TK = like.new_empty(T, top_k, dtype=torch.int64)
    counts = like.new_empty(blocks, E, dtype=torch.int32)
    score_sums, square_sums = like.new_empty(blocks, E), like.new_empty(blocks)
    if T:
        Launch(
            "gate.choose",
            (
                logits_TE,
                like if bias_E is None else bias_E.contiguous(),
                like if valid_T is None else valid_T.contiguous().view(torch.uint8),
                scores_TE,
                ids_TK,
                gates_TK,
                counts,
                score_sums,
                square_sums,
                T,
                E,
                groups,
                float(scale),
            ),
            {
                "SOFTMAX": softmax,
                "NORMALIZE": normalize,
                "BIASED": bias_E is not None,
                "MASKED": valid_T is not None,
                "TOP_K": top_k,
                "LIMITED": limited,
                "BEST_TWO": best_two and E // groups > 1,
                "BLOCK_T": high,
                "STEPS": steps,
                "GROUPS_POW2": groups_pow2,
                "IN_GROUP_POW2": within_pow2,
            },
            lambda _: blocks,
        ).run()
    chosen_E, score_sum_E, square_sum = like.new_empty(E, dtype=torch.int64), like.new_empty(E), like.new_empty(1)
    wide = min(power_of_two(E), 8)
    Launch(
        "gate.totals",
        (counts, score_sums, square_sums, chosen_E, score_sum_E, square_sum, blocks, E),
        {"BLOCK_B": BLOCKS_AT_A_TIME, "BLOCK_E": wide},
        lambda _: -(-E // wide),
    ).run()
    return scores_TE, ids_TK, gates_TK, chosen_E, score_sum_E, square_sum


_gate = torch.library.custom_op("moesaic::triton_gate", choose, mutates_args=())


@_gate.register_fake
def _(logits_TE, bias_E, valid_T, top_k, *rest):
    T, E = logits_TE.shape
    return (
        logits_TE.new_empty(T, E),
        logits_TE.new_empty(T, top_k, dtype=torch.int64),
        logits_TE.new_empty(T, top_k),
        logits_TE.new_empty(E, dtype=torch.int64),
        logits_TE.new_empty(E),
        logits_TE.new_empty(1),
    )


def choose_grad(
    dscores_TE: Tensor | None,
    dgates_TK: Tensor,
    dscore_sum_E: Tensor,
    dsquare_sum: Tensor,
    logits_TE: Tensor,
    scores_TE: Tensor,
    ids_TK: Tensor,
    valid_T: Tensor | None,
    softmax: bool,
    normalize: bool,
    scale: float,
) -> Tensor:
    """Return the gradient of the logits."""
    logits_TE = logits_TE.contiguous()
    dlogits_TE = torch.empty_like(logits_TE)
    (T, E), K = logits_TE.shape, ids_TK.shape[1]
    if T == 0:
        return dlogits_TE
    high = _tokens_at_a_time(power_of_two(E))
    dscores = scores_TE if dscores_TE is None else dscores_TE.contiguous()
    grads = (dscores, *(t.contiguous() for t in (dgates_TK, dscore_sum_E, dsquare_sum)))
    valid = logits_TE if valid_T is None else valid_T.contiguous().view(torch.uint8)
    Launch(
        "gate.choose_grad",
        (logits_TE, scores_TE, ids_TK, valid, *grads, dlogits_TE, T, E, float(scale)),
        {
            "SOFTMAX": softmax,
            "NORMALIZE": normalize,
            "MASKED": valid_T is not None,
            "DSCORES": dscores_TE is not None,
            "TOP_K": K,
            "BLOCK_T": high,
            "E_POW2": power_of_two(E),
        },
        lambda _: -(-T // high),
    ).run()
    return dlogits_TE


_gate_backward = torch.library.custom_op("moesaic::triton_gate_backward", choose_grad, mutates_args=())


@_gate_backward.register_fake
def _(dscores_TE, dgates_TK, dscore_sum_E, dsquare_sum, logits_TE, *rest):
    return torch.empty_like(logits_TE, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    logits_TE, _, valid_T, _, ctx.softmax, ctx.normalize, *_, ctx.scale = inputs
    scores_TE, ids_TK, _, counts, *_ = output
    ctx.mark_non_differentiable(ids_TK, counts)
    ctx.set_materialize_grads(False)  # or the scores, which seldom have a gradient, would be given T E zeros
    ctx.save_for_backward(logits_TE, scores_TE, ids_TK, valid_T)


def _backward(ctx, dscores_TE, _ids, dgates_TK, _counts, dscore_sum_E, dsquare_sum):
    logits_TE, scores_TE, ids_TK, valid_T = ctx.saved_tensors
    if all(d is None for d in (dscores_TE, dgates_TK, dscore_sum_E, dsquare_sum)):
        return (None,) * 10
    zeros = logits_TE.new_zeros
    dlogits_TE = _gate_backward(
        dscores_TE,
        zeros(ids_TK.shape) if dgates_TK is None else dgates_TK,
        zeros(logits_TE.shape[1]) if dscore_sum_E is None else dscore_sum_E,
        zeros(1) if dsquare_sum is None else dsquare_sum,
        logits_TE,
        scores_TE,
        ids_TK,
        valid_T,
        ctx.softmax,
        ctx.normalize,
        ctx.scale,
    )
    return dlogits_TE, *[None] * 9


_gate.register_autograd(_backward, setup_context=_setup)


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
    """Choose as ``eager.topk_gate`` does, which itself computes the scores "sqrt_softplus".

    Raises:
        ValueError: ``top_k`` is not in 1 to E, an unknown ``score_func``, or a bias or mask of another shape.
    """
    T, E = logits_TE.shape
    check_shapes(bias_E=(bias_E, (E,)), valid_T=(valid_T, (T,)))
    if not 1 <= top_k <= E:
        raise ValueError(f"top_k={top_k} is not in 1 to {E}, the experts")
    if score_func not in eager.SCORE_FUNCS:
        raise ValueError(f"score_func={score_func!r} is not one of {', '.join(eager.SCORE_FUNCS)}")
    if logits_TE.shape[1] > MAX_EXPERTS:
        warn_once(f"the fused gate takes at most {MAX_EXPERTS} experts, not {logits_TE.shape[1]}: using 'eager'")
    if logits_TE.shape[1] > MAX_EXPERTS or score_func == "sqrt_softplus":
        return eager.topk_gate(
            logits_TE,
            top_k,
            score_func=score_func,
            normalize=normalize,
            bias_E=bias_E,
            num_groups=num_groups,
            limited_groups=limited_groups,
            group_score=group_score,
            scale=scale,
        )
    scores_TE, ids_TK, gates_TK, counts_E, score_sum_E, square_sum = _gate(
        logits_TE,
        bias_E,
        valid_T,
        top_k,
        score_func == "softmax",
        normalize,
        num_groups,
        limited_groups,
        group_score != "max",
        scale,
    )
    return TopK(scores_TE, ids_TK, gates_TK, counts_E, {"score": score_sum_E, "square": square_sum})
