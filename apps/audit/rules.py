"""The rules: what is missing in a checkpoint or differs from its siblings in name, shape, dtype or numbers.

Each tensor is read once, a part at a time, and every threshold has its reason."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from apps.audit.checkpoint import SIDE, Faults, Part, Weights, read_parts, template
from apps.base.progress import each

MOST = 0.75
"""Share of the siblings that must agree on a shape before another one is a fault: some models have experts of two
widths."""
_NETWORK = re.compile(r"(?<!shared_)(?:mlp|ffn|feed_forward|moe|mixer|experts)\.(?!gate\.|router|shared|.*bias)|\bfc\d")
_WIDTHS = ("moe_intermediate_size", "ffn_hidden_size", "intermediate_size", "d_ff", "encoder_ffn_dim")
_TARGETS = re.compile(r"all-linear|experts|\b((gate|up|down|gate_up)_proj|w[123io]|fc[12]|(in|out)put_linear)\b")
_TIED = re.compile(r"(^|\.)(lm_head|shared|embed_tokens|wte|word_embeddings)\.weight$")
_TOP_K = ("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "top_k")
READ = 1 << 20
"""Numbers that are read at once: they stay in a core's cache."""
OTHER_SCALE, OTHER_ROW, FAR = 4.0, 100.0, 6.0
"""An expert, or a router's row, has another scale if its root mean square is this factor away from the median of its
siblings, and its robust z-score (of logarithms, over 1.4826 times the median absolute deviation) is this large. A
dequantization that was left out is a factor of 100 or more."""
ERRORS = 4.0
"""Standard errors within which a matrix has the standard deviation, mean and kurtosis of its initialization."""
CHANCE = 1e-3
"""An expert is untrained if fewer trained ones of its layer than this would look so by chance, in expectation."""


def find_holes(weights: Weights, parts: Sequence[Part], faults: Faults) -> None:
    """Note experts and tensors that are missing, or have other names than their siblings."""
    kinds = defaultdict[str, dict[str, dict[int, dict[str, Part]]]](lambda: defaultdict(lambda: defaultdict(dict)))
    for part in parts:
        # Rows of this project's routers may be tasks or empty choices; published ones have a row an expert.
        if part.expert is not None and (weights.num_experts or not part.is_router):
            form = re.sub(r"\.(qweight|weight_packed)$", ".weight", part.tail)  # its tail if it was not quantized
            kinds[template(part.layer)][part.layer][part.expert][form] = part
    if weights.num_experts > 1 and not any(part.is_matrix for part in parts):
        faults["missing_tensor", f"config.json says {weights.num_experts}, no file holds one"].append("experts")
    for layers in kinds.values():
        experts = [held for layer in layers.values() for held in layer.values()]
        counts = Counter(form for held in experts for form in held)
        usual = {f: p.tail for held in experts for f, p in held.items() if 2 * counts[f] >= len(experts)}
        number = weights.num_experts or 1 + max(e for layer in layers.values() for e in layer)
        if all(part.is_router for held in experts for part in held.values()):
            faults["missing_tensor", "there is a router and no expert"] += [f"{name}experts" for name in layers]
        for name in dict.fromkeys([*layers, *_empty_layers(weights, next(iter(layers)))]):
            layer = layers.get(name, {})
            evidence = f"no file holds it, and {name.rstrip('.')} has {number} experts"
            for e in sorted({*range(number), *layer}):
                held = layer.get(e, {})
                # An unquantized expert needs no scales; ``find_odd`` names the mix.
                plain = any(part.is_matrix and part.is_plain for part in held.values())
                free = {form for form in {*usual, *held} if SIDE.search(form) and (form in held or plain)}
                lost = sorted(usual[form] for form in usual.keys() - held.keys() - free)
                own = [part.name for form, part in held.items() if e >= number or form not in usual.keys() | free]
                if own:
                    why = f"its siblings have {lost[0]}" if lost else f"{number} siblings have none such"
                    faults["skipped_tensor", f"no loader reads it: {why}"] += own
                elif lost:
                    faults["missing_tensor", evidence] += [name + tail.replace("*", str(e)) for tail in lost]


def _empty_layers(weights: Weights, like: str) -> list[str]:
    """Return the MoE layers named as ``like`` that have neither experts nor a dense network."""
    match = re.match(r"(.*?)(?<![^.])\d+(\..*)", like)
    head, tail = match.groups() if match else ("", "")
    own = [re.match(rf"{re.escape(head)}(\d+)\.", name) for name in weights.known if match]
    filled = {int(m[1]) for m in own if m and _NETWORK.search(m.string)}
    last = max([weights.number("num_hidden_layers") - 1 if head == "model.layers." else -1, *filled])
    return [f"{head}{i}{tail}" for i in range(last + 1) if i not in filled]


def find_odd(weights: Weights, parts: Sequence[Part], faults: Faults) -> None:
    """Note matrices of another shape or dtype than their siblings, or than the configuration says."""
    dim, hidden = weights.number("hidden_size", "d_model"), weights.number(*_WIDTHS)
    widths = [{dim, hidden}, {dim, 2 * hidden}]
    alike, dtypes = defaultdict[Any, list[Part]](list), defaultdict[str, list[Part]](list)
    for part in parts:
        if part.is_matrix:
            alike[template(part.layer), part.tail, part.is_plain].append(part)
            dtypes[part.layer].append(part)
    for (kind, _, plain), same in alike.items():
        usual, count = Counter(tuple(part.tensor.shape) for part in same).most_common(1)[0]
        for part in same:
            shape = tuple(part.tensor.shape)
            if shape != usual and count >= MOST * len(same):
                faults["wrong_shape", f"it is {shape}, and {count} siblings are {usual}"].append(part.name)
            elif plain and "attention" not in kind and dim * hidden and {*shape} not in widths:
                faults["wrong_shape", f"it is {shape}, config.json says {dim} and {hidden}"].append(part.name)
    for same in dtypes.values():
        few, most = sorted(([p for p in same if p.is_plain == plain] for plain in (True, False)), key=len)
        if few:
            evidence = f"it is {few[0].tensor.dtype}, and {len(most)} siblings are {most[0].tensor.dtype}"
            faults["mixed_dtypes", evidence] += [part.name for part in few]


def find_uncovered(adapter: Sequence[Part], settings: dict[str, Any], faults: Faults) -> None:
    """Note experts that an adapter does not change although it changes others or targets them.

    Args:
        adapter: its tensors.
        settings: ``adapter_config.json``. If the base model is not a folder of this machine, its experts are taken from
            the adapter's names.
        faults: takes the findings.
    """
    base = Path(str(settings.get("base_model_name_or_path")))
    covered = {(part.layer, part.expert) for part in adapter}
    numbers = [e for _, e in covered if e is not None]
    wanted = {(layer, e) for layer, _ in covered for e in range(max(numbers, default=-1) + 1)}
    if base.is_dir():
        of_base = read_parts(Weights(base, Faults(list)), Faults(list))
        wanted = {(part.layer, part.expert or 0) for part in of_base if part.is_matrix}
    left = sorted(pair for pair in wanted - covered if (pair[0], None) not in covered)
    if left and (covered or _TARGETS.search(f"{settings.get('target_modules')} {settings.get('target_parameters')}")):
        evidence = f"the adapter covers {len(wanted) - len(left)} of {len(wanted)} experts"
        faults["uncovered_experts", evidence] += [f"{layer}experts.{e}" for layer, e in left]


def find_untied(weights: Weights, faults: Faults) -> None:
    """Note an output layer that is not the embedding although the configuration ties the two."""
    own = {name: t for name in weights.known if _TIED.search(name) and (t := weights.get(name)) is not None}
    for head in own if weights.config.get("tie_word_embeddings") is True else ():
        like = [t for name, t in own.items() if not name.endswith("lm_head.weight")]
        if head.endswith("lm_head.weight") and like and not any(torch.equal(own[head], t) for t in like):
            faults["untied_weights", "config.json ties it to the embedding, which has other values"].append(head)


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
        is_constant: whether the standard deviation is under a thousandth of the root mean square.
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
        self.is_constant = second * size - first**2 < 1e-6 * second * size + 1e-60


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
                faults["constant", f"its numbers are all {float(s.part.tensor.flatten()[0]):g}"].append(s.part.name)
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
                chance = min(1.0, ERRORS * s.error / spread * (1 + z * z / 5) ** -3) * near
                before, names = untrained.get((layer, s.part.expert), (len(plain), []))
                untrained[layer, s.part.expert] = before * chance, [*names, s.part.name]
    for same in twins.values():
        same = [part for part in same if torch.equal(part.tensor.view(torch.uint8), same[0].tensor.view(torch.uint8))]
        if len(same) > 1:
            faults["equal_experts", f"the same numbers as expert {same[0].expert}"] += [part.name for part in same]
    for chance, names in untrained.values():
        if chance < CHANCE:
            faults["untrained", "it looks like its initialization, and its siblings do not"] += names
    return bool(new) and sum(new) >= 0.9 * len(new)  # a few miss the bounds by chance


def find_pinned(weights: Weights, parts: Sequence[Part], faults: Faults) -> None:
    """Note selection biases by which an expert is always or never chosen: scores lie in 0..1, so a gap over 1 decides.

    An expert is never chosen if K others of its group are ahead of it, and always if it is ahead of all but K - 1. If K
    is unknown, half of the experts or all others have to be.
    """
    top_k, groups = weights.number(*_TOP_K), weights.number("n_group") or 1
    for part in parts:
        is_bias = part.tensor is not None and part.tail.endswith(("expert_bias", "correction_bias"))
        bias_E = part.tensor.float().flatten() if is_bias else torch.empty(0)
        size = max(len(bias_E) // groups, 1)
        for e, bias in enumerate(bias_E.tolist()):
            ahead = int((bias_E[e // size * size :][:size] > bias + 1).sum())
            behind = int((bias_E < bias - 1).sum()) if groups == 1 else 0
            if ahead >= (top_k or len(bias_E) / 2) or behind > max(len(bias_E) - 1 - (top_k or 1), 0):
                evidence = f"{'never' if ahead else 'always'} chosen: its {bias:.3g} is over 1 away from the others"
                faults["pinned_choice", evidence].append(f"{part.name}[{e}]")
