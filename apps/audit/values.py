"""Experts, routers and biases whose numbers are wrong: each tensor is read once, a part at a time."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from apps.audit.checkpoint import Faults, Part, Weights
from apps.base.progress import each

_TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k")
READ = 1 << 20
"""Numbers that are read at once: they stay in a core's cache."""
OTHER_SCALE, OTHER_ROW, FAR = 4.0, 100.0, 6.0
"""An expert, or a router's row, has another scale if its root mean square is this factor away from the median of its
siblings, and its robust z-score (of logarithms, over 1.4826 times the median absolute deviation) is this large. A
dequantization that was left out is a factor of 100 or more."""
ERRORS = 4.0
"""Standard errors within which a matrix has the standard deviation, mean and kurtosis of its initialization."""
CHANCE = 0.01
"""An expert is untrained if fewer trained ones of its layer than this would look so by chance, in expectation."""
UNTRAINED = 0.9
"""Share of the matrices that look untrained from which the whole model is."""


class Stats:
    """The numbers of a tensor.

    Args:
        part: the tensor.
        std: standard deviation of the initialization. The defaults of linear layers are tried too: a Gaussian of 1 /
            sqrt(inputs), and a uniform distribution of 1 / sqrt(3 inputs).

    Attributes:
        sums: sums of the first, second and fourth powers.
        log: logarithm of the root mean square. error: its standard error for a Gaussian, or rounding of bfloat16.
        kurtosis: fourth moment over the squared second one; 3 for a Gaussian. bar: ``ERRORS`` standard errors of it.
        is_constant: whether all numbers are equal.
        is_new: whether it looks like an initialization.
    """

    def __init__(self, part: Part, std: float) -> None:
        flat, sizes, sums = part.tensor.reshape(-1), part.tensor.shape, torch.zeros(3, dtype=torch.float64)
        for x in flat.split(READ):
            square = x.float() ** 2
            sums += torch.stack((x.float().sum(), square.sum(), torch.dot(square, square)))
        self.part, self.sums, size = part, tuple(sums.tolist()), len(flat)
        first, second, fourth = self.sums
        self.log = 0.5 * math.log(max(second / size, 1e-60)) if math.isfinite(second) else 0.0
        self.error, self.bar = max((2 * size) ** -0.5, 2**-11), ERRORS * (24 / size) ** 0.5
        self.kurtosis = fourth / size * math.exp(-4 * self.log)
        starts = [(3.0, std), *((3.0, n**-0.5) for n in sizes), *((1.8, (3 * n) ** -0.5) for n in sizes)]
        near = (abs(self.log - math.log(start)) for shape, start in starts if abs(self.kurtosis - shape) < self.bar)
        is_centered = abs(first) < ERRORS * math.sqrt(second)
        self.is_new = part.is_plain and is_centered and min(near, default=1.0) < ERRORS * self.error
        self.is_constant = second * size - first**2 < 1e-6 * second * size + 1e-60 and bool(
            (flat.float() == flat[0].float()).all()
        )


def find_wrong_values(weights: Weights, parts: Sequence[Part], faults: Faults) -> bool:
    """Note experts and router rows whose numbers differ from their siblings', and return whether all experts look
    untrained.

    An expert looks untrained if its matrices have standard deviation, mean and kurtosis of an initialization and most
    siblings have not. The chance that a trained one has them is estimated for each matrix from the siblings: the
    density of a Student's distribution of their logarithms, whose tails are as heavy as those of trained layers, times
    the share of them with such a kurtosis.
    """
    stds = map(weights.config.get, ("initializer_range", "init_std"))
    std = next((std for std in stds if isinstance(std, float) and std > 0), 0.02)
    alike, new = defaultdict[tuple[str, str], list[Stats]](list), list[bool]()
    twins, untrained = defaultdict[Any, list[Part]](list), dict[Any, tuple[float, list[str]]]()
    for part in each(parts, "tensors of experts", len(parts)):
        stats = Stats(part, std) if part.tensor is not None and part.tensor.numel() else None
        if stats and not all(map(math.isfinite, stats.sums[:2])):
            faults["not_finite", "it holds NaN or infinity"].append(part.name)
        elif stats and (part.is_matrix or part.is_router):
            alike[part.layer, part.tail].append(stats)
            new += [stats.is_new] if part.is_matrix and part.is_plain else []
    varied = {tail for (_, tail), of in alike.items() for s in of if not s.is_constant}
    for (layer, tail), of in alike.items():
        for s in of:
            if not s.is_constant:
                twins[layer, tail, s.sums].append(s.part)
            elif tail in varied:
                faults["constant", f"all of its numbers are {float(s.part.tensor.flatten()[0]):g}"].append(s.part.name)
        plain = [s for s in of if s.part.is_plain and not s.is_constant]
        middle = median(s.log for s in plain or of)
        spread = max(1.4826 * median(abs(s.log - middle) for s in plain or of), of[0].error)
        for s in plain:
            z, bound = (s.log - middle) / spread, OTHER_ROW if s.part.is_router else OTHER_SCALE
            if abs(s.log - middle) > math.log(bound) and abs(z) > FAR:
                evidence = f"its root mean square is {math.exp(s.log):.3g}, the median {math.exp(middle):.3g}"
                faults["other_scale", evidence].append(s.part.name)
            if s.is_new and s.part.is_matrix and 2 * sum(other.is_new for other in plain) < len(plain):
                near = sum(abs(other.kurtosis - s.kurtosis) < s.bar for other in plain) / len(plain)
                chance = min(1.0, ERRORS * s.error / spread * (1 + z * z / 3) ** -2) * near
                before, names = untrained.get((layer, s.part.expert), (len(plain), []))
                untrained[layer, s.part.expert] = before * chance, [*names, s.part.name]
    for (layer, _, _), same in twins.items():
        same = [part for part in same if torch.equal(part.tensor.view(torch.uint8), same[0].tensor.view(torch.uint8))]
        if len(same) > 1:
            experts = ", ".join(str(part.expert) for part in same)
            faults["equal_experts", f"experts {experts} of {layer.rstrip('.')} are equal"] += [p.name for p in same]
    for chance, names in untrained.values():
        if chance < CHANCE:
            faults["untrained", "it looks like its initialization, and its siblings do not"] += names
    return bool(new) and sum(new) >= UNTRAINED * len(new)


def find_pinned(weights: Weights, parts: Sequence[Part], faults: Faults) -> None:
    """Note selection biases by which an expert is always or never chosen: scores lie in 0..1, so a gap over 1 decides.

    An expert is never chosen if K others of its group are ahead of it, and always if it is ahead of all but K - 1. If K
    is unknown, half of the experts or all others have to be.
    """
    top_k, groups = weights.number(*_TOP_K), weights.number("n_group") or 1
    for part in parts:
        is_bias = part.tensor is not None and part.tail.endswith(("expert_bias", "correction_bias"))
        bias_E = part.tensor.float().flatten() if is_bias else torch.empty(0)
        groups = groups if len(bias_E) % groups == 0 else 1
        for e, bias in enumerate(bias_E.tolist()):
            ahead = int((bias_E.chunk(groups)[e * groups // len(bias_E)] > bias + 1).sum())
            behind = int((bias_E < bias - 1).sum()) if groups == 1 else 0
            if ahead >= (top_k or len(bias_E) / 2) or behind > max(len(bias_E) - 1 - (top_k or 1), 0):
                evidence = f"{'never' if ahead else 'always'} chosen: its {bias:.3g} is over 1 away from the others"
                faults["pinned_choice", evidence].append(f"{part.name}[{e}]")
