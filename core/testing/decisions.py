"""Checks of the decision: pairs, capacity, randomness, state, and the context that a gate asks for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..contract import record
from ..routing.selection import PRIORITIES, Capacity, group_tokens
from .check import Checks, hold
from .router_case import RouterCase, seeded

CHECKS: Checks[RouterCase] = Checks()


@CHECKS.keeps("the pairs are counted, within range, and padding is in none", lambda c: c.is_pairs)
def _(case: RouterCase) -> None:
    E = case.num_experts
    for training, padded in itertools.product((False, True), (False, True)):
        x, context = case.padded() if padded else (case.tokens(), case.context())
        T = x.shape[0] * x.shape[1]
        routing = case.layer(training=training).router(x, context)
        token_N, ids_N, gates_N = routing.token_index_N, routing.expert_ids_N, routing.gates_N
        hold(routing.num_tokens == T, f"num_tokens is {routing.num_tokens}, the tokens are {T}")
        hold(token_N.shape == ids_N.shape == gates_N.shape, "token_index_N, expert_ids_N and gates_N differ in length")
        for name, tensor in (("token_index_N", token_N), ("expert_ids_N", ids_N)):
            hold(tensor.dtype == torch.int64, f"{name} is {tensor.dtype}, not int64")
        hold(gates_N.dtype == torch.float32, f"gates_N is {gates_N.dtype}, not float32")
        hold(gates_N.isfinite().all(), "a gate is not finite")
        hold(token_N.min() >= 0, "a token index is negative")
        hold(token_N.max() < T, f"a token index is {token_N.max()}, not below T={T}")
        hold(ids_N.min() >= 0, "an expert id is negative")
        hold(ids_N.max() <= E, f"an expert id is {ids_N.max()}, above E={E}")
        computed_N = ids_N < E
        counts = torch.bincount(ids_N, minlength=E + 1)[:E]
        hold(torch.equal(routing.tokens_per_expert_E, counts), "tokens_per_expert_E is not the count of expert_ids_N")
        hold((routing.chosen_per_expert_E >= counts).all(), "fewer pairs chose an expert than it computes")
        hold(not gates_N[~computed_N].any(), "the gate of a pair that is not computed is not 0")
        if routing.top_k is not None:
            places = torch.arange(T * routing.top_k) // routing.top_k
            hold(torch.equal(token_N, places), "top_k is given, and the pairs are not token-major")
        if context.valid_BS is not None:
            hold(routing.valid_T is not None, "valid_T is None although there is padding")
            hold(context.valid_BS.flatten()[token_N[computed_N]].all(), "a pair of padding is computed")
        pair_N = token_N[computed_N] * E + ids_N[computed_N]
        if not case.router.repeats_experts:
            hold(len(pair_N.unique()) == len(pair_N), "a token takes an expert twice")
        for name in ("logits_TE", "scores_TE"):
            tensor = getattr(routing.evidence, name)
            if tensor is not None:
                hold(tensor.shape[0] == T, f"{name} has {tensor.shape[0]} rows, not T={T}")
        scores_TE = routing.evidence.scores_TE
        if scores_TE is not None:
            hold(scores_TE.shape[1] == E, f"scores_TE has {scores_TE.shape[1]} columns, not E={E}")


@CHECKS.keeps(
    "without a capacity limit every chosen pair is computed", lambda c: c.is_pairs and c.has("capacity_factor")
)
def _(case: RouterCase) -> None:
    for training in (False, True):
        routing = case.layer(training=training).router(*case.padded())
        chosen, computed = routing.chosen_per_expert_E, routing.tokens_per_expert_E
        hold(torch.equal(chosen, computed), f"chosen {chosen.tolist()}, computed {computed.tolist()}")


@CHECKS.keeps("an expert computes as many pairs as chose it, up to its capacity", lambda c: c.has("capacity_factor"))
def _(case: RouterCase) -> None:
    B, S, E = 4, 8, case.num_experts
    valid_BS = torch.arange(S) < torch.tensor([8, 5, 8, 0])[:, None]
    x, context = case.tokens(B, S), case.context(B, S, valid_BS=valid_BS)
    groups: tuple[str | int, ...] = ("batch", "sequence", 5)
    router = case.layer().router
    for training, group, priority in itertools.product((False, True), groups, PRIORITIES):
        router.train(training)
        groups_T, num_groups = group_tokens(group, B, S, x.device)
        # The capacity is 3 / 4 of K n / E in training and 5 / 4 of it in evaluation.
        over = 3 if training else 5
        router.capacity = Capacity(0.75, 1.25, priority, group)
        with seeded(1):
            limited = router(x, context)
        router.capacity = Capacity()
        with seeded(1):
            free = router(x, context)
        where = f"{'training' if training else 'evaluation'}, group={group!r}, priority={priority!r}"
        hold(torch.equal(limited.chosen_per_expert_E, free.chosen_per_expert_E), f"{where}: chosen_per_expert_E moved")
        K = limited.top_k
        hold(K is not None, "capacity is counted in places of a token, and top_k is None")
        real_G = torch.zeros(num_groups, dtype=torch.int64).index_add(0, groups_T, valid_BS.flatten().long())
        capacity_G = -((-real_G * K * over) // (4 * E))
        chosen_GE, computed_GE = (_loads(r, groups_T, num_groups, E) for r in (free, limited))
        expected_GE = chosen_GE.minimum(capacity_G[:, None])
        hold(
            torch.equal(computed_GE, expected_GE),
            f"{where}: an expert of a group computes {computed_GE.tolist()} pairs of {chosen_GE.tolist()} chosen, "
            f"with room for {capacity_G.tolist()}",
        )


def _loads(routing: Any, groups_T: Tensor, num_groups: int, num_experts: int) -> Tensor:
    """Return the number of computed pairs of each group and expert, (G, E)."""
    kept_N = routing.expert_ids_N < num_experts
    queue = groups_T[routing.token_index_N[kept_N]] * num_experts + routing.expert_ids_N[kept_N]
    return torch.bincount(queue, minlength=num_groups * num_experts).unflatten(0, (num_groups, num_experts))


@CHECKS.keeps("a forward changes no state", lambda c: not c.router.moves_statistics)
def _(case: RouterCase) -> None:
    for training in (False, True):
        layer = case.layer(training=training)
        before = {
            name: value.clone() for name, value in itertools.chain(layer.named_parameters(), layer.named_buffers())
        }
        first = layer.state_dict().keys()
        with record(layer):
            layer(*case.padded())
        after = dict(itertools.chain(layer.named_parameters(), layer.named_buffers()))
        hold(layer.state_dict().keys() == first, "the state has other entries after a forward")
        for name, value in before.items():
            hold(torch.equal(after[name], value), f"a forward in {'training' if training else 'evaluation'}: {name}")


@CHECKS.keeps("what the gate needs of the context is asked for by name", lambda c: bool(c.router.needs))
def _(case: RouterCase) -> None:
    layer = case.layer()
    x, context = case.padded()
    for name in case.router.needs:
        for lacking in (None, replace(context, **{name: None})):
            try:
                layer(x, lacking)
            except ValueError as error:
                needed = case.router.needs
                hold(any(n in str(error) for n in (needed if lacking is None else [name])), f"it does not say: {error}")
            else:
                raise AssertionError(f"without context.{name} there is no ValueError")
