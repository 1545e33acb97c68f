"""The rules: figures of a layer in, findings out. Every threshold has its reason next to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from .figures import LayerFigures, explained
from .finding import Finding
from .movement import Moved
from .step import StepFigures

ENOUGH = 30
"""Decided pairs an expert at balance, below which loads say nothing: of 30 an expert with a tenth of its share still
gets one in 19 of 20 cases (``1 - exp(-3)``)."""
COLLAPSED = 0.25
"""Experts in use beyond the K that every token has to take, as a part of those there are beyond K."""
MOST_TAKEN = 0.5
"""Share of the experts that a token takes, above which loads are not called collapsed."""
SAME_EXPERTS = 1.1
"""Experts in use by a modality over those that each of its tokens takes: nearly all of them take the same, as the
rarer modality's do where losses look at all tokens alone (LIMoE, arXiv 2206.02770)."""
STARVED = 0.25
"""Computed pairs a token of a modality over those of any: the others have crowded three quarters of its tokens out."""
DROPPED = 0.15
"""Dropped pairs beyond chance. Capacity factors of 1.0 to 1.25 drop up to a tenth at balance of real batches, without
a loss of quality (arXiv 2202.08906, section 4.4)."""
BY_PLACE = 0.9
"""Share of the experts' entropy that the place explains. An image's places differ in what they show: in short healthy
trainings on digits of 8 x 8 they explain up to 0.71."""
BY_CLASS = 0.8
"""Share that the class explains. Late layers do part by class (arXiv 2106.05974, figure 7), and that is no fault; from
0.8 on a batch of few classes leaves most experts idle."""
LARGE_LOGIT = 64.0
"""Bfloat16 numbers of 64 and more lie 0.5 apart, a factor of 1.6 in a gate (arXiv 2202.08906, section 3.3)."""
DRIFT, HIGH_LEVEL = 3.0, 16.0
"""Growth of ``logsumexp`` since the first look, and the level from which it counts; it starts at log E, 2 to 5."""
FLAT = 1e-5
"""Spread of a token's logits, relative to the largest or to 1: a hundred roundings of float32, so that the order of the
experts is chance and the probabilities are equal."""
BLIND = 0.01
"""Share of the logits' variance that is the tokens': below it fixed preferences are ten times as large as what a token
can add."""
PLACE_ONLY = 0.98
"""Share of the tokens' part of the variance that the place explains, from which the token itself has no say."""
ALIKE = 0.02
"""Distance of two experts' outputs, 1 for unrelated ones: 0.02 is a correlation of 0.98."""
POLARIZED = 0.95
"""Mean weight of one expert under a gate: the others together have a twentieth."""
NO_GRADIENT = 1e-6
"""The task's gradient in the router over that in the experts; float32 rounds at 1e-7."""
SILENT, DOUBLED = 0.1, 1.5
"""How often the balance loss is in the loss, from below and from above: 1 is right."""
PADDING = 0.01
"""Share of padding among the tokens that a balance loss counts."""
ROUTER_STOOD = 0.03
"""Movement of the router's weights over the median of the other matrices. Adam moves all by about the learning rate."""
EXPERTS_STOOD = 0.1
"""Movement of the experts' weights over it. They see K / E of the tokens, which Adam's step does not depend on."""
BEGAN = 1e-4
"""Movement of the other matrices from which a training has begun: a tenth of a step at a learning rate of 1e-3."""


REMEDIES = {
    "collapsed_load": "",
    "dead_experts": "; or take them away by moesaic convert prune",
    "drops": "raise eval_capacity_factor (inf drops none) and capacity_factor, or balance the loads",
    "skew_by_place": "give the gate the token without its position, or add positions in attention alone",
    "skew_by_class": "shuffle the batches, and balance within a sequence by balance.sequence_balance",
    "starved_modality": "give the layer more room (capacity_factor, eval_capacity_factor), and ",
    "collapsed_modality": "give the layer ",
    "logits_overflow": "set balance.router_z_loss to 0.001, lower the router learning rate (optimizer.router_lr_scale)",
    "logits_drift": "set balance.router_z_loss to 0.001, or lower the router learning rate (optimizer.router_lr_scale)",
    "flat_logits": "look at the gate's weights and input: both must differ from 0 by more than rounding; start the "
    "gate again",
    "token_blind": "look at what the gate is given: a norm of weight 0, a detached or constant input; start the gate "
    "again",
    "polarized_gates": "set expert_dropout to 0.1, a balance loss on the gates, or a lower learning rate of the router",
    "same_experts": "start the experts apart (--noise of moesaic convert upcycle, start='split'), or give them a "
    "balance loss; moesaic convert prune --merge makes one of each such group",
    "no_router_gradient": "with top_k=1 leave gates as they are (normalize=False); look for a detach, and for "
    "requires_grad=False",
    "silent_balance": "add core.aux_loss(tape) to the loss, not detached; with transformers set "
    "output_router_logits=True",
    "doubled_balance": "add core.aux_loss(tape) once: SparseModule and sparsify's modules add it by themselves",
    "balance_over_padding": "give the layer RoutingContext(valid_BS=...), and models of transformers an attention_mask",
    "gates_at_start": "raise optimizer.router_lr_scale; look whether the optimizer has the router's weights",
    "slow_experts": "raise optimizer.expert_lr_scale; look whether the optimizer has the experts' weights",
}
"""The remedy of each finding, or the part of it that does not depend on the layer."""


def _error(layer: str, name: str, evidence: str, remedy: str = "", **figures: float) -> Finding:
    return Finding(name, layer, "error", evidence, remedy or REMEDIES[name], figures)


def _warning(layer: str, name: str, evidence: str, remedy: str = "", **figures: float) -> Finding:
    return Finding(name, layer, "warning", evidence, remedy or REMEDIES[name], figures)


def load_findings(layer: str, f: LayerFigures, used_E: Tensor | None = None) -> Iterator[Finding]:
    """Yield findings from loads, drops and places.

    Args:
        layer: the router's name.
        f: its figures.
        used_E: (E,), pairs that chose each expert by all routers of the layer, if there are several: one task may use
            experts that another ignores. None: there is one router.
    """
    E, K = f.num_experts, f.pairs_per_token
    if f.kind == "pairs" and not f.facts.by_data and f.decided_pairs >= ENOUGH * E and K < 0.9 * E:
        dead = int(((f.chosen_E if used_E is None else used_E) == 0).sum())
        in_use, least = f.experts_in_use, max(K, 1.0)
        balance = (
            "raise the weight of balance.load_balancing_loss, or lower the learning rate"
            if f.facts.is_balanced
            else "give the layer a balance: balance.load_balancing_loss of 0.01, or a router with expert_bias"
        )
        # Of tokens that take most experts, and not equally many, an even share is not known.
        if K <= MOST_TAKEN * E and (in_use - least) / (E - least) < COLLAPSED:
            seen = f"{in_use:.1f} of {E} experts are in use, and every token takes {K:.1f}; {dead} got none"
            yield _error(layer, "collapsed_load", seen, balance, experts_in_use=in_use, dead=dead)
        elif dead:
            pairs, found = f.chosen_E.sum(), _error if 2 * dead >= E else _warning
            seen = f"{dead} of {E} experts got none of {pairs:,.0f} pairs, {pairs / E:,.0f} each at balance"
            yield found(layer, "dead_experts", seen, balance + REMEDIES["dead_experts"], dead=dead)
    if f.kind == "pairs" and f.drop_rate > DROPPED + 2 * f.chance_drop_rate:
        seen = f"{f.drop_rate:.0%} of the pairs had no room, {f.chance_drop_rate:.0%} would have none by chance"
        yield _warning(layer, "drops", seen, drop_rate=f.drop_rate, by_chance=f.chance_drop_rate)
    if f.kind == "pairs" and not f.facts.by_data and not f.facts.reads_position:
        by_place = explained(f.place_PE)
        if by_place > BY_PLACE and f.decided_pairs >= ENOUGH * E:
            seen = f"the place in the sequence decides {by_place:.0%} of which expert computes"
            yield _warning(layer, "skew_by_place", seen, explained=by_place)
    if f.class_CE is not None and not f.facts.by_data and f.decided_pairs >= ENOUGH * E:
        by_class = explained(f.class_CE)
        if by_class > BY_CLASS:
            seen = f"the class decides {by_class:.0%} of which expert computes"
            yield _warning(layer, "skew_by_class", seen, explained=by_class)


def modality_findings(layer: str, f: LayerFigures, names: Sequence[str] = ()) -> Iterator[Finding]:
    """Yield findings from the loads of each modality, if there are several.

    Args:
        layer: the router's name.
        f: its figures.
        names: names of the modalities, by number; those without one are called by their number.
    """
    modalities = [g for g, tokens in enumerate(f.modality_tokens_G.tolist()) if tokens]
    if f.kind != "pairs" or len(modalities) < 2:
        return
    E, of_all = f.num_experts, float(f.modality_GE.sum() / f.modality_tokens_G.sum())
    losses = (
        f"balance.global_entropy and balance.local_entropy of 0.01 with num_modalities={modalities[-1] + 1}; "
        "entropy_threshold=log(n) asks for n experts a modality"
    )
    for g in modalities:
        name = names[g] if g < len(names) else f"modality {g}"
        tokens, pairs = float(f.modality_tokens_G[g]), float(f.modality_GE[g].sum())
        K, in_use = pairs / tokens, f.experts_of_modality(g)
        if tokens >= ENOUGH and K < STARVED * of_all:
            seen = f"{K:.2g} experts compute a token of {name}, and {of_all:.2g} one of any modality"
            remedy = REMEDIES["starved_modality"] + losses
            yield _error(layer, "starved_modality", seen, remedy, modality=g, experts_a_token=K, of_all=of_all)
        # Where all tokens take the same experts, the layer has collapsed, whatever their modality.
        elif (
            not f.facts.by_data
            and K <= MOST_TAKEN * E
            and f.decided(pairs) >= ENOUGH * E
            and in_use < SAME_EXPERTS * max(K, 1.0) <= f.experts_in_use
        ):
            seen = f"the tokens of {name} use {in_use:.1f} of {E} experts, and each takes {K:.1f}"
            remedy = REMEDIES["collapsed_modality"] + losses
            yield _warning(layer, "collapsed_modality", seen, remedy, modality=g, experts_in_use=in_use)


def logit_findings(layer: str, f: LayerFigures, first_level: float | None = None) -> Iterator[Finding]:
    """Yield findings from the logits; ``first_level`` is their level at the first look, if there was an earlier one."""
    if not len(f.logit_M):
        return
    if f.not_finite or f.largest >= LARGE_LOGIT:
        seen = f"{f.not_finite:,} logits are not finite" if f.not_finite else f"the largest logit is {f.largest:.3g}"
        found = _error if f.not_finite else _warning
        yield found(layer, "logits_overflow", seen, largest=f.largest, not_finite=f.not_finite)
    elif first_level is not None and f.rms_level > max(HIGH_LEVEL, DRIFT * first_level):
        yield drift_finding(layer, first_level, f.rms_level)
    # With one expert in reach a token has no choice, and its logit less the mean is 0.
    if f.facts.by_data or f.num_logits.sum() <= f.num_tokens:
        return
    if f.spread < FLAT * max(f.largest, 1.0):
        seen = (
            f"a token's logits differ by {f.spread:.1g} (standard deviation), so the router prefers none of the "
            f"{f.num_experts} experts and rounding or ties choose"
        )
        yield _error(layer, "flat_logits", seen, spread=f.spread)
        return
    if f.decisions < ENOUGH:
        return
    of_tokens, of_experts = f.token_variance, f.expert_variance
    share = of_tokens / (of_tokens + of_experts)
    by_place = None if f.facts.reads_position else f.place_share
    # One expert that is out of play makes a large variance too, but leaves tokens a choice among the others.
    is_constant = f.kind == "pairs" and f.experts_in_use < 1.05 * max(f.pairs_per_token, 1.0)
    if (share < BLIND and is_constant) or of_tokens < 1e-12:
        seen = f"the tokens make {share:.1%} of the variance of the logits, fixed preferences the rest"
        yield _error(layer, "token_blind", seen, token_share=share)
    elif by_place is not None and by_place > PLACE_ONLY:
        seen = f"the place makes {by_place:.1%} of how the logits differ between tokens"
        remedy = "give the gate the hidden state and not the position's embedding"
        yield _error(layer, "token_blind", seen, remedy, place_share=by_place)


def drift_finding(layer: str, first: float, last: float) -> Finding:
    """Return the finding that the logits' level has grown."""
    seen = f"logsumexp of the logits has grown from {first:.1f} to {last:.1f} (root mean square)"
    return _warning(layer, "logits_drift", seen, first=first, last=last)


def gate_findings(layer: str, f: LayerFigures) -> Iterator[Finding]:
    """Yield findings from the gates of a multi-task layer."""
    if f.kind != "gates" or f.num_experts < 2 or f.num_tokens < ENOUGH:
        return
    mean_E = f.mean_gates()
    largest = float(mean_E.max() / mean_E.sum().clamp_min(1e-12))
    if largest > POLARIZED:
        others = f"{f.num_experts - 1} others the rest"
        seen = f"the gate gives expert {int(mean_E.argmax())} {largest:.0%} of its weight, and {others}"
        yield _warning(layer, "polarized_gates", seen, largest=largest)


def alike_findings(layer: str, distance_EE: Tensor) -> Iterator[Finding]:
    """Yield findings about experts with the same outputs for the same tokens."""
    upper = torch.ones_like(distance_EE, dtype=torch.bool).triu(1)
    known = distance_EE[upper & ~distance_EE.isnan()]
    same = int((known < ALIKE).sum())
    if same:
        nearest, found = float(known.min()), _error if same == len(known) else _warning
        how = f"(nearest: a distance of {nearest:.2g}, unrelated ones have 1)"
        seen = f"{same} of {len(known)} pairs of experts put out the same for the same tokens {how}"
        yield found(layer, "same_experts", seen, pairs=same, nearest=nearest)


def step_findings(layer: str, s: StepFigures) -> Iterator[Finding]:
    """Yield findings from the gradients of a training step."""
    none = s.router_gradient is not None and s.router_gradient < NO_GRADIENT
    if none or (s.is_frozen and s.is_balanced):
        seen = "no weight of the router trains, though its balance loss has a weight"
        if none:
            seen = f"the task's gradient in the router is {s.router_gradient:.0e} of that in the experts"
        yield _error(layer, "no_router_gradient", seen, router_gradient=s.router_gradient or 0.0)
    if s.over_padding:
        yield _warning(layer, "balance_over_padding", "the balance loss is that of all tokens, padding included")
    if s.times is None or not s.is_balanced:
        return
    if s.times < SILENT:
        seen = f"the balance loss has a weight, and is {abs(s.times):.2g} times in the loss that is minimized"
        yield _error(layer, "silent_balance", seen, times=s.times)
    elif s.times > DOUBLED:
        seen = f"the balance loss is {s.times:.2g} times in the loss that is minimized"
        yield _error(layer, "doubled_balance", seen, times=s.times)


def padding_findings(layer: str, f: LayerFigures) -> Iterator[Finding]:
    """Yield a finding if a balance loss counts padding."""
    wrong, counted = f.padding
    if counted and wrong / counted > PADDING:
        seen = f"{wrong / counted:.0%} of the {counted:,} tokens that its loss counts are padding"
        yield _warning(layer, "balance_over_padding", seen)


def movement_findings(moved: Mapping[str, Moved]) -> Iterator[Finding]:
    """Yield findings about parts of the layers that did not change while the rest of the model did."""
    for layer, m in moved.items():
        if m.rest is None or m.rest < BEGAN:
            continue
        if m.router is not None and m.router < ROUTER_STOOD * m.rest:
            seen = f"the router has moved {m.router:.1e} since the start, the other matrices {m.rest:.1e}"
            yield _error(layer, "gates_at_start", seen, router=m.router, rest=m.rest)
        if m.experts is not None and m.experts < EXPERTS_STOOD * m.rest:
            seen = f"the experts have moved {m.experts:.1e} since the start, the other matrices {m.rest:.1e}"
            yield _warning(layer, "slow_experts", seen, experts=m.experts, rest=m.rest)
