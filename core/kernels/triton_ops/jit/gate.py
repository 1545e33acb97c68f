"""The gate in one pass over the logits: scores, choice, gates, counts, and the sums of the balance losses; and the sums
of its blocks."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _expert_of(column, E, num_groups, IN_GROUP_POW2: tl.constexpr):
    """Return the expert of a column, -1 where it is padding: groups lie side by side, each padded to a power of two."""
    size = E // num_groups
    within = column % IN_GROUP_POW2
    group = column // IN_GROUP_POW2
    return tl.where((within < size) & (group < num_groups), group * size + within, -1)


@triton.jit
def _comparable(choice, expert):
    """Return the numbers that experts are chosen by, all finite; -inf in the columns of padding.

    NaN and -inf are beneath all numbers: a maximum's place among NaN is unreliable, a -inf would be taken again, and a
    token whose ids and counts differ would move the rows of the others."""
    lowest = -1e38  # twice it is a number too
    choice = tl.where(choice > lowest, choice, lowest)
    return tl.where(expert[None, :] >= 0, choice, float("-inf"))


@triton.jit(do_not_specialize=["T"])
def choose(
    Logits,
    Bias,
    Valid,
    Scores,
    Ids,
    Gates,
    Counts,
    ScoreSums,
    SquareSums,
    T,
    E,
    num_groups,
    scale,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    MASKED: tl.constexpr,
    TOP_K: tl.constexpr,
    LIMITED: tl.constexpr,
    BEST_TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    STEPS: tl.constexpr,
    GROUPS_POW2: tl.constexpr,
    IN_GROUP_POW2: tl.constexpr,
):
    """Logits float32 (T, E) to Scores (T, E), Ids int64 (T, K), Gates (T, K), and of each block of ``STEPS * BLOCK_T``
    tokens, non-padding ones only: Counts int32 (blocks, E), ScoreSums (blocks, E) of the scores over their sum,
    SquareSums (blocks,) of the squared logsumexp. ``LIMITED``: groups a token may take experts of, 0 for no limit.
    ``BEST_TWO``: a group is judged by its two best."""
    COLUMNS: tl.constexpr = GROUPS_POW2 * IN_GROUP_POW2
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    expert = _expert_of(column, E, num_groups, IN_GROUP_POW2)
    counts = tl.zeros((COLUMNS,), tl.int32)
    score_sums = tl.zeros((COLUMNS,), tl.float32)
    square_sum = 0.0
    for step in range(STEPS):
        t = (block * STEPS + step) * BLOCK_T + tl.arange(0, BLOCK_T)
        here = (t[:, None] < T) & (expert[None, :] >= 0)
        at = t[:, None] * E + expert[None, :]
        logits = tl.load(Logits + at, mask=here, other=float("-inf"))
        # A row of only -inf, from padding tokens of the block: shifted by 0.
        top = tl.max(logits, 1)
        top = tl.where(top == float("-inf"), 0.0, top)
        powers = tl.exp(logits - top[:, None])
        power_sum = tl.sum(powers, 1)
        power_sum = tl.where(power_sum == 0.0, 1.0, power_sum)
        if SOFTMAX:
            scores = powers / power_sum[:, None]
            share = scores
        else:
            scores = tl.where(expert[None, :] >= 0, tl.sigmoid(logits), 0.0)
            share = scores / tl.maximum(tl.sum(scores, 1), 1e-20, propagate_nan=tl.PropagateNan.ALL)[:, None]
        tl.store(Scores + at, scores, mask=here)
        # Maxima pass NaN over, and the choice does: the gates must say it, or a token of NaN ends as one of zeros.
        wrong = tl.sum((scores != scores).to(tl.int32), 1) > 0

        # By the logits wherever scores have their order: scores of large logits are equal in float32.
        choice = logits
        if BIASED:
            choice = scores + tl.load(Bias + expert, mask=expert >= 0, other=0.0)[None, :]
        choice = _comparable(choice, expert)
        if LIMITED > 0:
            grouped = tl.reshape(choice, (BLOCK_T, GROUPS_POW2, IN_GROUP_POW2))
            best = tl.max(grouped, 2)
            if BEST_TWO:
                judged = grouped
                if not BIASED:  # a sum of two has the scores' order and not the logits'
                    judged = tl.reshape(_comparable(scores, expert), (BLOCK_T, GROUPS_POW2, IN_GROUP_POW2))
                within = tl.arange(0, IN_GROUP_POW2)
                first = tl.argmax(judged, 2)
                others = tl.where(within[None, None, :] == first[:, :, None], float("-inf"), judged)
                best = tl.max(judged, 2) + tl.max(others, 2)
            group = tl.arange(0, GROUPS_POW2)
            best = tl.where(group[None, :] < num_groups, best, float("-inf"))
            kept = tl.zeros((BLOCK_T, GROUPS_POW2), tl.int32)
            for _ in range(LIMITED):
                taken = group[None, :] == tl.argmax(best, 1)[:, None]
                kept = tl.where(taken, 1, kept)
                best = tl.where(taken, float("-inf"), best)
            grouped = tl.where(kept[:, :, None] > 0, grouped, float("-inf"))
            choice = tl.reshape(grouped, (BLOCK_T, COLUMNS))

        real = t < T
        if MASKED:
            real = real & (tl.load(Valid + t, mask=t < T, other=0) != 0)
        counted = tl.zeros((BLOCK_T, COLUMNS), tl.int32)
        total = tl.zeros((BLOCK_T,), tl.float32)
        largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        if NORMALIZE and SOFTMAX:
            # The softmax of the chosen logits, whose largest need not be the first: a bias changes the order.
            rest = choice
            for _ in range(TOP_K):
                taken = column[None, :] == tl.argmax(rest, 1)[:, None]
                largest = tl.maximum(largest, tl.max(tl.where(taken, logits, float("-inf")), 1))
                rest = tl.where(taken, float("-inf"), rest)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
        rest = choice
        for k in range(TOP_K):
            taken = column[None, :] == tl.argmax(rest, 1)[:, None]
            # At least 0 and below E whatever the logits are: nothing else may become an address.
            chosen = tl.minimum(tl.maximum(tl.sum(tl.where(taken, expert[None, :], 0), 1), 0), E - 1)
            if NORMALIZE and SOFTMAX:
                gate = tl.exp(tl.max(tl.where(taken, logits, float("-inf")), 1) - largest)
            else:
                gate = tl.sum(tl.where(taken, scores, 0.0), 1)
            total += gate
            counted += taken.to(tl.int32)
            tl.store(Ids + t * TOP_K + k, chosen.to(tl.int64), mask=t < T)
            if not NORMALIZE:
                tl.store(Gates + t * TOP_K + k, tl.where(wrong, float("nan"), gate * scale), mask=t < T)
            rest = tl.where(taken, float("-inf"), rest)
        if NORMALIZE:
            total = tl.maximum(total, 1e-20)
            rest = choice
            for k in range(TOP_K):
                taken = column[None, :] == tl.argmax(rest, 1)[:, None]
                if SOFTMAX:
                    gate = tl.exp(tl.max(tl.where(taken, logits, float("-inf")), 1) - largest)
                else:
                    gate = tl.sum(tl.where(taken, scores, 0.0), 1)
                tl.store(Gates + t * TOP_K + k, tl.where(wrong, float("nan"), gate / total * scale), mask=t < T)
                rest = tl.where(taken, float("-inf"), rest)

        counts += tl.sum(tl.where(real[:, None], counted, 0), 0)
        score_sums += tl.sum(tl.where(real[:, None], share, 0.0), 0)
        lse = tl.log(power_sum) + top
        square_sum += tl.sum(tl.where(real, lse * lse, 0.0), 0)

    kept_column = (expert >= 0) & (expert < E)
    tl.store(Counts + block * E + expert, counts, mask=kept_column)
    tl.store(ScoreSums + block * E + expert, score_sums, mask=kept_column)
    tl.store(SquareSums + block, square_sum)


@triton.jit(do_not_specialize=["blocks"])
def totals(
    Counts,
    ScoreSums,
    SquareSums,
    Chosen,
    ScoreSum,
    SquareSum,
    blocks,
    E,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add up what ``choose`` wrote for each block of tokens: Chosen int64 (E,), ScoreSum (E,), SquareSum (1,)."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_B, BLOCK_E), tl.int32)
    scores = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    squares = tl.zeros((BLOCK_B,), tl.float32)
    for begin in range(0, blocks, BLOCK_B):
        block = begin + tl.arange(0, BLOCK_B)
        mask = (block[:, None] < blocks) & (e[None, :] < E)
        at = block.to(tl.int64)[:, None] * E + e[None, :]
        counts += tl.load(Counts + at, mask=mask, other=0)
        scores += tl.load(ScoreSums + at, mask=mask, other=0.0)
        squares += tl.load(SquareSums + block, mask=block < blocks, other=0.0)
    tl.store(Chosen + e, tl.sum(counts, 0).to(tl.int64), mask=e < E)
    tl.store(ScoreSum + e, tl.sum(scores, 0), mask=e < E)
    if tl.program_id(0) == 0:
        tl.store(SquareSum, tl.sum(squares, 0))


@triton.jit(do_not_specialize=["T"])
def choose_grad(
    Logits,
    Scores,
    Ids,
    Valid,
    DScores,
    DGates,
    DScoreSum,
    DSquareSum,
    DLogits,
    T,
    E,
    scale,
    SOFTMAX: tl.constexpr,
    NORMALIZE: tl.constexpr,
    MASKED: tl.constexpr,
    DSCORES: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    E_POW2: tl.constexpr,
):
    """Compute the gradient of the logits from the gradients of scores (T, E), zero without ``DSCORES``, gates (T, K),
    score sums (E,) and square sum (1,)."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, E_POW2)
    here = (t[:, None] < T) & (e[None, :] < E)
    at = t[:, None] * E + e[None, :]
    logits = tl.load(Logits + at, mask=here, other=float("-inf"))
    scores = tl.load(Scores + at, mask=here, other=0.0)
    dscores = tl.zeros((BLOCK_T, E_POW2), tl.float32)
    if DSCORES:
        dscores = tl.load(DScores + at, mask=here, other=0.0)
    real = t < T
    if MASKED:
        real = real & (tl.load(Valid + t, mask=t < T, other=0) != 0)
    dsum = tl.load(DScoreSum + e, mask=e < E, other=0.0)[None, :]
    if SOFTMAX:
        dscores += tl.where(real[:, None], dsum, 0.0)
    else:
        score_sum = tl.maximum(tl.sum(scores, 1), 1e-20)[:, None]
        within = tl.sum(dsum * scores, 1)[:, None] / score_sum
        dscores += tl.where(real[:, None], (dsum - within) / score_sum, 0.0)

    direct = tl.zeros((BLOCK_T, E_POW2), tl.float32)
    if NORMALIZE:
        # g_k = scale * v_k / sum of v, with v the scores, or for softmax the exponentials of the logits.
        largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
        if SOFTMAX:
            for k in range(TOP_K):
                chosen = e[None, :] == tl.load(Ids + t * TOP_K + k, mask=t < T, other=-1)[:, None]
                largest = tl.maximum(largest, tl.max(tl.where(chosen, logits, float("-inf")), 1))
            largest = tl.where(largest == float("-inf"), 0.0, largest)
        total = tl.zeros((BLOCK_T,), tl.float32)
        mean = tl.zeros((BLOCK_T,), tl.float32)
        for k in range(TOP_K):
            chosen = e[None, :] == tl.load(Ids + t * TOP_K + k, mask=t < T, other=-1)[:, None]
            dgate = tl.load(DGates + t * TOP_K + k, mask=t < T, other=0.0) * scale
            if SOFTMAX:
                value = tl.exp(tl.max(tl.where(chosen, logits, float("-inf")), 1) - largest)
            else:
                value = tl.sum(tl.where(chosen, scores, 0.0), 1)
            total += value
            mean += dgate * value
        total = tl.maximum(total, 1e-20)
        mean = mean / total
        for k in range(TOP_K):
            chosen = e[None, :] == tl.load(Ids + t * TOP_K + k, mask=t < T, other=-1)[:, None]
            dgate = tl.load(DGates + t * TOP_K + k, mask=t < T, other=0.0) * scale
            if SOFTMAX:
                value = tl.exp(tl.max(tl.where(chosen, logits, float("-inf")), 1) - largest)
                direct += tl.where(chosen, (value / total * (dgate - mean))[:, None], 0.0)
            else:
                dscores += tl.where(chosen, ((dgate - mean) / total)[:, None], 0.0)
    else:
        for k in range(TOP_K):
            chosen = e[None, :] == tl.load(Ids + t * TOP_K + k, mask=t < T, other=-1)[:, None]
            dgate = tl.load(DGates + t * TOP_K + k, mask=t < T, other=0.0) * scale
            dscores += tl.where(chosen, dgate[:, None], 0.0)

    if SOFTMAX:
        dlogits = scores * (dscores - tl.sum(dscores * scores, 1)[:, None]) + direct
    else:
        dlogits = dscores * scores * (1.0 - scores)
    top = tl.max(logits, 1)
    top = tl.where(top == float("-inf"), 0.0, top)
    powers = tl.exp(logits - top[:, None])
    power_sum = tl.sum(powers, 1)
    power_sum = tl.where(power_sum == 0.0, 1.0, power_sum)
    lse = tl.log(power_sum) + top
    dsquare = tl.load(DSquareSum) * 2.0 * lse
    dlogits += tl.where(real[:, None], dsquare[:, None] * powers / power_sum[:, None], 0.0)
    # The gates of a token with a score of NaN are NaN, whichever experts it was given.
    wrong = tl.sum((scores != scores).to(tl.int32), 1) > 0
    tl.store(DLogits + at, tl.where(wrong[:, None], float("nan"), dlogits), mask=here)
