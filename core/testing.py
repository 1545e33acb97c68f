"""Conformance of gates: what every router keeps, as named checks. For users' own gates as for those of ``core``.

    from core.testing import check_router, properties

    check_router(MyGate(top_k=2))

or, a line of the report for each property::

    @pytest.mark.parametrize("prop", properties(MyGate(top_k=2)), ids=str)
    def test_my_gate(prop):
        prop.check()

What a gate claims is asked of its config: ``is_causal()``, ``depends_on()``, ``needs()``, ``layer_kind()``,
``layer_options()``, ``balance_terms()``, the costs, and ``exceptions()`` for what its method gives up. Everything runs
on the CPU, on small sizes, and leaves the global random generator as it was.
"""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import MoEConfig
from .contract import RoutingContext, record
from .experts import FFN, FFNExperts
from .flops import count_flops
from .layers import MoE, aux_loss, aux_losses, update_expert_bias
from .routing.balance import TERMS, Balance
from .routing.router import RouterConfig
from .routing.selection import PRIORITIES, Capacity, group_tokens
from .telemetry import RoutingStats

FLOAT32 = 2e-6
"""Bound of an error in float32, over the largest element: sums of a few hundred products, each off by at most 6e-8."""
HIDDEN = 12
IDS = 5
"""Numbers of token ids, tasks, domains and modalities where the config has no field that says."""
FIELDS = ("token_ids_BS", "task_ids_B", "domain_ids_B", "modality_BS")
SIZES = {
    "token_ids_BS": "vocab_size",
    "task_ids_B": "num_tasks",
    "domain_ids_B": "num_domains",
    "modality_BS": "num_modalities",
}


@dataclass(frozen=True)
class Property:
    """One named check of one router.

    Attributes:
        name: what holds, in words.
        check: raises an ``AssertionError`` where it does not.
    """

    name: str
    check: Callable[[], None]

    def __str__(self) -> str:
        return self.name


def properties(router: RouterConfig, *, num_experts: int = 8, dim: int = 16, seed: int = 0) -> list[Property]:
    """The properties that this router claims, each to be checked by itself.

    Args:
        router: any router config that fits ``num_experts``.
        num_experts: E.
        dim: D of the tokens.
        seed: of weights and tokens.

    Raises:
        ValueError: the router does not fit ``num_experts``, or makes an exception of an unknown property.
    """
    case = Case(router, num_experts, dim, seed)
    case.config()
    exceptions = router.exceptions()
    known = {name for name, _, _ in CHECKS}
    for name in exceptions:
        if name not in known:
            raise ValueError(f"{type(router).__name__}.exceptions() names no property: {name!r}")
    return [
        Property(name, partial(_run, case, check))
        for name, applies, check in CHECKS
        if applies(case) and name not in exceptions
    ]


def check_router(router: RouterConfig, *, num_experts: int = 8, dim: int = 16, seed: int = 0) -> None:
    """Check every property that this router claims. See ``properties``.

    Raises:
        AssertionError: naming each property that does not hold, with what was found.
    """
    found = properties(router, num_experts=num_experts, dim=dim, seed=seed)
    failures = []
    for prop in found:
        try:
            prop.check()
        except Exception as error:  # a property that cannot even be run does not hold
            failures.append(f"{prop.name}: {type(error).__name__}: {error}")
    if failures:
        lines = "\n  ".join(failures)
        raise AssertionError(f"{len(failures)} of {len(found)} properties of {router} do not hold:\n  {lines}")


@dataclass(frozen=True)
class Case:
    """A router to be checked, and what its layers and tokens are made of."""

    router: RouterConfig
    num_experts: int
    dim: int
    seed: int

    @property
    def is_pairs(self) -> bool:
        return self.router.layer_kind() == "pairs"

    def has(self, option: str) -> bool:
        """Whether a field of ``MoEConfig`` has a meaning."""
        return option in self.router.layer_options()

    def config(self, **options: Any) -> MoEConfig:
        return MoEConfig(self.num_experts, self.router, FFN(HIDDEN, bias=True), **options)

    def layer(self, *, training: bool = False, **options: Any) -> MoE:
        """A layer whose every weight is away from its initial value, which may be 0 or the same for all experts."""
        with seeded(self.seed):
            layer = self.config(**options).build(self.dim)
            with torch.no_grad():
                for parameter in layer.router.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                if layer.router.expert_bias is not None:
                    layer.router.expert_bias.normal_(std=0.05)
        return layer.train(training)

    def tokens(self, B: int = 3, S: int = 6, offset: int = 0) -> Tensor:
        """(B, S, D); another ``offset`` gives other tokens."""
        return torch.randn(B, S, self.dim, generator=torch.Generator().manual_seed(self.seed + 100 + offset))

    def context(self, B: int = 3, S: int = 6, offset: int = 0, valid_BS: Tensor | None = None) -> RoutingContext:
        """All that a gate may know, in the ranges that the config's fields say."""
        generator = torch.Generator().manual_seed(self.seed + 200 + offset)
        values: dict[str, Tensor] = {}
        for name in FIELDS:
            size = getattr(self.router, SIZES[name], IDS)
            values[name] = torch.randint(size, (B, S) if name.endswith("BS") else (B,), generator=generator)
        return RoutingContext(valid_BS=valid_BS, **values)

    def padded(self) -> tuple[Tensor, RoutingContext]:
        """A batch of a full sequence, one with two places of padding, and one of padding alone."""
        valid_BS = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
        return self.tokens(), self.context(valid_BS=valid_BS)

    def balance(self) -> Balance:
        """Every term that applies, heavy."""
        weights: dict[str, Any] = {name: float(name in self.router.balance_terms()) for name in TERMS}
        return Balance(**weights)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generator of the CPU starts from ``seed`` inside the block and is put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _run(case: Case, check: Callable[[Case], None]) -> None:
    with seeded(case.seed):
        check(case)


Applies = Callable[[Case], bool]
CHECKS: list[tuple[str, Applies, Callable[[Case], None]]] = []


def _property(
    name: str, applies: Applies = lambda case: True
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    def register(check: Callable[[Case], None]) -> Callable[[Case], None]:
        CHECKS.append((name, applies, check))
        return check

    return register


def hold(condition: Any, message: str) -> None:
    """Raise an ``AssertionError`` unless the condition is true: an ``assert`` would be nothing under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def close(found: Tensor, expected: Tensor, what: str, bound: float = FLOAT32) -> None:
    """``found`` is within ``bound`` of the largest element of what is expected."""
    hold(found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    error = (found.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    hold(error <= bound * largest, f"{what} is off by {error:.2e}, its largest element is {largest:.2e}")


def step(layer: MoE, x: Tensor, context: RoutingContext | None, run: Any = None, seed: int = 7) -> dict[str, Tensor]:
    """One step's output, auxiliary loss, loads and gradients, from the same random numbers each time."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    with seeded(seed):
        weight = torch.randn(*x.shape[:-1], x.shape[-1], dtype=x.dtype)
        with record(layer) as tape:
            y = (layer if run is None else run)(x, context)
    (entry,) = tape.entries
    loss = aux_loss(tape)
    ((y * weight).sum() + loss).backward()
    found = {"output": y.detach(), "auxiliary loss": loss.detach(), "load": entry.routing.tokens_per_expert_E}
    grads = {"tokens": x, **dict(layer.named_parameters())}
    return found | {f"gradient of {n}": p.grad.clone() for n, p in grads.items() if p.grad is not None}


def same_step(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    hold(found.keys() == expected.keys(), f"there are {sorted(found)}, expected {sorted(expected)}")
    for name, value in expected.items():
        close(found[name], value, name)


def with_padding_holding(x: Tensor, context: RoutingContext, value: float, ids: int) -> tuple[Tensor, RoutingContext]:
    """The same real tokens, with padding that holds ``value`` and ``ids``."""
    assert context.valid_BS is not None
    empty_B = ~context.valid_BS.any(1)
    changed: dict[str, Any] = {}
    for name in FIELDS:
        old = getattr(context, name)
        changed[name] = old.masked_fill(~context.valid_BS if name.endswith("BS") else empty_B, ids)
    return x.masked_fill(~context.valid_BS[..., None], value), replace(context, **changed)


def take(context: RoutingContext, sequences: Any, places: Any = slice(None)) -> RoutingContext:
    """The context of some sequences and places."""
    values = {f.name: getattr(context, f.name) for f in fields(context)}
    return RoutingContext(
        **{
            name: None if v is None else v[sequences][:, places] if name.endswith("BS") else v[sequences]
            for name, v in values.items()
        }
    )


# What is decided.


@_property("the pairs are counted, within range, and padding is in none", lambda c: c.is_pairs)
def _(case: Case) -> None:
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
        hold(len(pair_N.unique()) == len(pair_N), "a token takes an expert twice")
        for name in ("logits_TE", "scores_TE"):
            tensor = getattr(routing, name)
            if tensor is not None:
                hold(tensor.shape[0] == T, f"{name} has {tensor.shape[0]} rows, not T={T}")
        if routing.scores_TE is not None:
            hold(routing.scores_TE.shape[1] == E, f"scores_TE has {routing.scores_TE.shape[1]} columns, not E={E}")


@_property("without a capacity limit every chosen pair is computed", lambda c: c.is_pairs and c.has("capacity_factor"))
def _(case: Case) -> None:
    for training in (False, True):
        routing = case.layer(training=training).router(*case.padded())
        chosen, computed = routing.chosen_per_expert_E, routing.tokens_per_expert_E
        hold(torch.equal(chosen, computed), f"chosen {chosen.tolist()}, computed {computed.tolist()}")


@_property("an expert computes as many pairs as chose it, up to its capacity", lambda c: c.has("capacity_factor"))
def _(case: Case) -> None:
    B, S, E = 4, 8, case.num_experts
    valid_BS = torch.arange(S) < torch.tensor([8, 5, 8, 0])[:, None]
    x, context = case.tokens(B, S), case.context(B, S, valid_BS=valid_BS)
    groups: tuple[str | int, ...] = ("batch", "sequence", 5)
    router = case.layer().router
    for training, group, priority in itertools.product((False, True), groups, PRIORITIES):
        router.train(training)
        groups_T, num_groups = group_tokens(group, B, S, x.device)
        # 3 / 4 in training and 5 / 4 in evaluation, of K n / E each.
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
    """Computed pairs of each group and expert, (G, E)."""
    kept_N = routing.expert_ids_N < num_experts
    queue = groups_T[routing.token_index_N[kept_N]] * num_experts + routing.expert_ids_N[kept_N]
    return torch.bincount(queue, minlength=num_groups * num_experts).unflatten(0, (num_groups, num_experts))


@_property("nothing is random in evaluation")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.padded()
    before = torch.random.get_rng_state()
    first = layer(x, context)
    hold(torch.equal(torch.random.get_rng_state(), before), "a forward in evaluation draws random numbers")
    torch.manual_seed(case.seed + 1)
    hold(torch.equal(layer(x, context), first), "two forwards in evaluation differ")


@_property("the same seed gives the same training step")
def _(case: Case) -> None:
    layer = case.layer(training=True, balance=case.balance())
    first, second = (step(layer, *case.padded()) for _ in range(2))
    for name, value in first.items():
        hold(torch.equal(second[name], value), f"{name} differs")


@_property("a forward changes no state")
def _(case: Case) -> None:
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


@_property("what the gate needs of the context is asked for by name", lambda c: bool(c.router.needs()))
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.padded()
    for name in case.router.needs():
        for lacking in (None, replace(context, **{name: None})):
            try:
                layer(x, lacking)
            except ValueError as error:
                needed = case.router.needs()
                hold(any(n in str(error) for n in (needed if lacking is None else [name])), f"it does not say: {error}")
            else:
                raise AssertionError(f"without context.{name} there is no ValueError")


# What is computed.


@_property("the output is the sum of its pairs", lambda c: c.is_pairs)
def _(case: Case) -> None:
    for training in (False, True):
        layer = case.layer(training=training)
        x, context = case.padded()
        with seeded(3):
            y = layer(x, context)
        with seeded(3):
            routing = layer.router(x, context)
        experts = layer.experts
        assert isinstance(experts, FFNExperts)
        x_TD = x.flatten(0, 1).double()
        expected = torch.zeros_like(x_TD)
        pairs = zip(
            routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N.tolist(), strict=True
        )
        for t, e, gate in pairs:
            if e == case.num_experts:
                continue
            on_input = layer.router.gates_on == "input"
            h = (gate if on_input else 1.0) * x_TD[t] @ experts.w_in[e].double()
            assert experts.b_in is not None
            assert experts.b_out is not None
            h = F.gelu(h + experts.b_in[e].double())
            expected[t] += (1.0 if on_input else gate) * (h @ experts.w_out[e].double() + experts.b_out[e].double())
        close(y.flatten(0, 1), expected, f"the output in {'training' if training else 'evaluation'}")


@_property("every backend gives the oracle's output and gradients", lambda c: c.has("backend"))
def _(case: Case) -> None:
    for training, backend in itertools.product((False, True), ("cpu", "grouped")):
        options: dict[str, Any] = {"training": training, "balance": case.balance()}
        expected = step(case.layer(backend="eager", **options), *case.padded())
        try:
            same_step(step(case.layer(backend=backend, **options), *case.padded()), expected)
        except AssertionError as error:
            raise AssertionError(f"backend={backend!r}, training={training}: {error}") from None


@_property("the gradient is that of the output, in float64")
def _(case: Case) -> None:
    layer = case.layer().double()
    for parameter in layer.experts.parameters():
        parameter.requires_grad_(False)
    named = {f"router.{n}": p for n, p in layer.router.named_parameters() if p.requires_grad}
    x, context = case.tokens(2, 4).double().requires_grad_(), case.context(2, 4)

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(named, weights, strict=True)), (x, context))

    weights = [p.detach().clone().requires_grad_() for p in named.values()]
    hold(output(x, *weights).dtype == torch.float64, "a float64 layer does not compute in float64")
    torch.autograd.gradcheck(output, (x, *weights), fast_mode=True)


@_property("every weight of the router learns in training", lambda c: any(True for _ in c.layer().router.parameters()))
def _(case: Case) -> None:
    layer = case.layer(training=True, balance=case.balance())
    step(layer, case.tokens(8, 8), case.context(8, 8))
    idle = [
        name
        for name, p in layer.router.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    ]
    hold(not idle, f"no gradient reaches {', '.join(idle)}")


@_property("without tokens there is an output, a loss and a gradient")
def _(case: Case) -> None:
    for training, (B, S) in itertools.product((False, True), ((0, 4), (2, 0))):
        layer = case.layer(training=training, balance=case.balance())
        x = torch.zeros(B, S, case.dim, requires_grad=True)
        with record(layer) as tape:
            y = layer(x, case.context(B, S))
        hold(y.shape == x.shape, f"tokens {tuple(x.shape)} come out as {tuple(y.shape)}")
        loss = aux_loss(tape)
        hold(loss.isfinite(), f"the auxiliary loss of {B} sequences of {S} tokens is {loss}")
        (y.sum() + loss).backward()
        for name, parameter in layer.named_parameters():
            hold(parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")


@_property("half precision and autocast leave the decision in float32")
def _(case: Case) -> None:
    x, context = case.padded()
    x = x.bfloat16().float()
    layer = case.layer()
    expected = layer.router(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer.router(x, context)
        y = layer(x, context)
    hold(y.isfinite().all(), "the output under autocast is not finite")
    for name, value in vars(expected).items():
        if isinstance(value, Tensor):
            other = getattr(found, name)
            hold(other.dtype == value.dtype, f"{name} is {other.dtype} under autocast")
            hold(torch.equal(other, value), f"{name} is another one under autocast")
    layer = layer.bfloat16()
    y = layer(x.bfloat16(), context)
    hold(y.dtype == torch.bfloat16, f"a bfloat16 layer puts out {y.dtype}")
    hold(y.isfinite().all(), "the output in bfloat16 is not finite")
    for name, value in vars(layer.router(x.bfloat16(), context)).items():
        if isinstance(value, Tensor) and value.is_floating_point():
            hold(value.dtype == torch.float32, f"{name} is {value.dtype} in a bfloat16 layer")


# Padding, batch-mates, order.


@_property("padding comes out as zero and may hold anything")
def _(case: Case) -> None:
    for training in (False, True):
        layer = case.layer(training=training, balance=case.balance())
        x, context = case.padded()
        assert context.valid_BS is not None
        expected = step(layer, *with_padding_holding(x, context, 0.0, 0))
        hold(not expected["output"][~context.valid_BS].any(), "padding comes out other than zero")
        hold(not expected["gradient of tokens"][~context.valid_BS].any(), "padding gets a gradient")
        for value, ids in ((torch.nan, -12345), (1e30, 10**9)):
            found = step(layer, *with_padding_holding(x, context, value, ids))
            for name, tensor in expected.items():
                hold(torch.equal(found[name], tensor), f"padding of {value} with ids {ids} changes the {name}")


@_property("padding is the same as no token")
def _(case: Case) -> None:
    layer = case.layer(training=False, balance=case.balance())
    x, context = case.padded()
    n = 4  # real tokens of sequence 1
    padded = step(layer, x[1:2], take(context, slice(1, 2)))
    short = replace(take(context, slice(1, 2), slice(n)), valid_BS=None)
    alone = step(layer, x[1:2, :n], short, seed=7)
    close(padded["output"][:, :n], alone["output"], "the output")
    close(padded["auxiliary loss"], alone["auxiliary loss"], "the auxiliary loss")
    hold(torch.equal(padded["load"], alone["load"]), f"loads {padded['load'].tolist()}, {alone['load'].tolist()}")
    # A sequence of padding alone beside it is no sequence.
    both = layer(x[1:], take(context, slice(1, 3)))
    close(both[:1, :n], alone["output"], "the output beside a sequence of padding")


@_property("other sequences do not change a sequence's output", lambda c: c.router.depends_on() != "batch")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.tokens(), case.context()
    expected = layer(x, context)
    others, their = case.tokens(offset=1), case.context(offset=1)
    for b in range(3):
        mixed_x = others.clone()
        mixed_x[b] = x[b]
        mixed = {name: getattr(their, name).clone() for name in FIELDS}
        for name, values in mixed.items():
            values[b] = getattr(context, name)[b]
        close(layer(mixed_x, RoutingContext(**mixed))[b], expected[b], f"the output of sequence {b} among others")
    close(layer(x[:1], take(context, slice(1)))[0], expected[0], "the output of sequence 0 alone")


@_property("other tokens do not change a token's output", lambda c: c.router.depends_on() == "token")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.tokens(), case.context()
    expected = layer(x, context)
    others, their = case.tokens(offset=1), case.context(offset=1)
    for s in (0, 3, 5):
        mixed_x = others.clone()
        mixed_x[:, s] = x[:, s]
        changed = {name: getattr(their, name).clone() for name in FIELDS if name.endswith("BS")}
        for name, values in changed.items():
            values[:, s] = getattr(context, name)[:, s]
        close(
            layer(mixed_x, replace(context, **changed))[:, s], expected[:, s], f"the output of token {s} among others"
        )


@_property(
    "with capacity by sequence, other sequences do not change a sequence's output",
    lambda c: c.router.depends_on() != "batch" and c.has("capacity_factor"),
)
def _(case: Case) -> None:
    x, context = case.tokens(), case.context()
    for priority in PRIORITIES:
        layer = case.layer(capacity_factor=0.5, group="sequence", priority=priority)
        expected = layer(x, context)
        mixed_x = case.tokens(offset=1)
        mixed_x[1] = x[1]
        close(layer(mixed_x, context)[1], expected[1], f"the output at priority={priority!r}")


@_property("the order of the tokens does not matter")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.tokens(), case.context()
    places = torch.tensor([5, 2, 0, 4, 1, 3])
    expected = layer(x, context)[:, places]
    close(layer(x[:, places], take(context, slice(None), places)), expected, "the output of moved tokens")


@_property("the order of the sequences does not matter")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.tokens(), case.context()
    sequences = torch.tensor([2, 0, 1])
    expected = layer(x, context)[sequences]
    close(layer(x[sequences], take(context, sequences)), expected, "the output of moved sequences")


@_property("later tokens do not change earlier outputs", lambda c: c.router.is_causal())
def _(case: Case) -> None:
    layer = case.config().build(case.dim, causal=True)
    layer = case.layer()
    x, context = case.tokens(), case.context()
    expected = layer(x, context)
    later_x, later = case.tokens(offset=1), case.context(offset=1)
    for s in range(1, 6):
        mixed_x = torch.cat((x[:, :s], later_x[:, s:]), 1)
        changed = {
            name: torch.cat((getattr(context, name)[:, :s], getattr(later, name)[:, s:]), 1)
            for name in FIELDS
            if name.endswith("BS")
        }
        y = layer(mixed_x, replace(context, **changed))
        close(y[:, :s], expected[:, :s], f"the output before place {s}")
    # Nor does it matter whether they are there: a decoder sees a prefix.
    close(layer(x[:, :4], take(context, slice(None), slice(4))), expected[:, :4], "the output of a prefix")


@_property("a causal decoder is refused", lambda c: not c.router.is_causal())
def _(case: Case) -> None:
    try:
        case.config().build(case.dim, causal=True)
    except ValueError:
        return
    raise AssertionError("is_causal() is False, and build(causal=True) goes through")


# Losses and figures.


@_property("the balance losses are finite, and each that applies is there")
def _(case: Case) -> None:
    layer = case.layer(training=True, balance=case.balance())
    with record(layer) as tape:
        layer(*case.padded())
    (entry,) = tape.entries
    hold(entry.terms >= case.router.balance_terms(), "the router does not know its balance terms")
    losses = aux_losses(tape)
    missing = case.router.balance_terms() - losses.terms.keys()
    hold(not missing, f"balance_terms() names what the routing does not allow: {', '.join(sorted(missing))}")
    for name, value in losses.terms.items():
        hold(value.isfinite(), f"{name} is {value}")
    hold(losses.total.isfinite(), f"the auxiliary loss is {losses.total}")
    update_expert_bias(layer, tape)
    update_expert_bias(layer, tape.detach())


@_property("the tape tells loads, drops and entropies")
def _(case: Case) -> None:
    for training in (False, True):
        layer = case.layer(training=training)
        x, context = case.padded()
        with record(layer) as tape, torch.no_grad():
            layer(x, context)
            layer(x, context)
        stats = RoutingStats.from_tape(tape).layers[""]
        hold(int(stats.num_tokens) == 20, f"2 * 10 real tokens are counted as {int(stats.num_tokens)}")
        figures = stats.figures()
        for name, low, high in (
            ("load_imbalance", 1.0, case.num_experts),
            ("entropy", 0.0, 1.0),
            ("load_entropy", 0.0, 1.0),
            ("drop_rate", 0.0, 1.0),
            ("dead_experts", 0, case.num_experts),
        ):
            hold(low - 1e-6 <= figures[name] <= high + 1e-6, f"{name} is {figures[name]}, not in [{low}, {high}]")


# Costs, configuration, state.


@_property("num_params is the sum of numel")
def _(case: Case) -> None:
    config = case.config(num_shared_experts=1)
    layer = config.build(case.dim)
    counted = sum(p.numel() for p in layer.parameters())
    hold(config.num_params(case.dim) == counted, f"num_params is {config.num_params(case.dim)}, counted {counted}")
    of_router = sum(p.numel() for p in layer.router.parameters())
    told = case.router.num_params(case.dim, case.num_experts)
    hold(told == of_router, f"num_params of the router is {told}, counted {of_router}")
    hold(0 < config.active_params(case.dim) <= counted, f"active_params is {config.active_params(case.dim)}")


@_property("flops_per_token is what a counter counts")
def _(case: Case) -> None:
    B, S = 2, 8
    config, layer = case.config(), case.layer()
    x, context = case.tokens(B, S), case.context(B, S)
    counted = count_flops(layer, x, context)
    if not case.is_pairs:
        told = config.flops_per_token(case.dim, tokens_per_sequence=S)
        hold(told * B * S == counted, f"flops_per_token is {told}, counted {counted / (B * S)}")
        return
    rows = int(layer.router(x, context).tokens_per_expert_E.sum())
    expected = count_flops(layer.router, x, context) + rows * config.expert.flops_per_row(case.dim)
    hold(counted == expected, f"the layer costs {counted}, expected {expected}")
    counts = []
    for training in (False, True):
        router = case.layer(training=training).router
        # Of a token more: what is decided once a sequence costs a token nothing.
        longer, shorter = (count_flops(router, case.tokens(B, n), case.context(B, n)) for n in (2 * S, S))
        counts.append((longer - shorter) / (B * S))
    told = case.router.flops_per_token(case.dim, case.num_experts)
    hold(told in counts, f"flops_per_token is {told}, counted {counts[0]} in evaluation and {counts[1]} in training")


@_property("the plain form of the config comes back equal")
def _(case: Case) -> None:
    config = case.config(balance=case.balance())
    plain = json.loads(json.dumps(config.to_dict()))
    hold(MoEConfig.from_dict(plain) == config, f"{MoEConfig.from_dict(plain)} is not {config}")


@_property("saved, loaded, copied and pickled, a layer gives the same output")
def _(case: Case) -> None:
    layer = case.layer()
    x, context = case.padded()
    expected = layer(x, context)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = replace(case, seed=case.seed + 1).layer()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copies = {"loaded": loaded, "copied": copy.deepcopy(layer), "pickled": pickle.loads(pickle.dumps(layer))}
    for how, other in copies.items():
        hold(torch.equal(other(x, context), expected), f"a {how} layer gives another output")


# Compilers.


@_property("torch.compile goes through without a graph break, to the same step")
def _(case: Case) -> None:
    for training in (True, False):
        torch._dynamo.reset()
        layer = case.layer(training=training, balance=case.balance())
        x, context = case.padded()
        expected = step(layer, x, context)
        try:
            same_step(step(layer, x, context, run=torch.compile(layer, backend="eager", fullgraph=True)), expected)
        finally:
            torch._dynamo.reset()


class _Flat(nn.Module):
    """A layer whose context is given as plain tensors: what ``torch.export`` takes."""

    def __init__(self, layer: MoE, names: list[str]) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x: Tensor, *values: Tensor) -> Tensor:
        return self.layer(x, RoutingContext(**dict(zip(self.names, values, strict=True))))


@_property("torch.export goes through, for any number of tokens")
def _(case: Case) -> None:
    names = ["valid_BS", *(n for n in FIELDS if n in case.router.needs() or hasattr(case.router, SIZES[n]))]
    flat = _Flat(case.layer(), names)

    def inputs(B: int, S: int) -> tuple[Tensor, ...]:
        valid_BS = torch.arange(S) < torch.arange(S, S - B, -1)[:, None]
        context = case.context(B, S, valid_BS=valid_BS)
        return case.tokens(B, S), *(getattr(context, name) for name in names)

    dynamic = torch.export.Dim.DYNAMIC  # raises where a size is fixed; a gate may ask for a least length
    of_values = tuple({0: dynamic, 1: dynamic} if n.endswith("BS") else {0: dynamic} for n in names)
    shapes = {"x": {0: dynamic, 1: dynamic}, "values": of_values}
    program = torch.export.export(flat, inputs(3, 6), dynamic_shapes=shapes).module()
    for B, S in ((3, 6), (2, 7)):
        close(program(*inputs(B, S)), flat(*inputs(B, S)), f"the output of {B} sequences of {S} tokens")


__all__ = ["Property", "check_router", "properties"]
