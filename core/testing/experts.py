"""Checks of experts: their outputs, their costs, and properties that survive copies, graphs and half precision."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..convert.reduce.merge import can_join, joined
from ..dispatch import LocalDispatcher
from ..experts import Experts
from ..experts.base import COMMON
from ..flops import count_flops
from ..routing.pairs.token_choice import TokenChoice
from .check import Checks, close, hold, step
from .expert_case import ExpertCase

CHECKS: Checks[ExpertCase] = Checks()
FLOAT64 = 1e-12


def computed(experts: Experts, x_TD: Tensor, case: ExpertCase, gates_N: Tensor | None = None) -> Tensor:
    """Return the tokens after the experts of ``case.routing``, (T, D_out), by the dispatcher."""
    dispatcher, routing = LocalDispatcher(), case.routing(len(x_TD), dtype=x_TD.dtype)
    if gates_N is not None:
        routing = type(routing)(**{**vars(routing), "gates_N": gates_N})
    dispatcher.backend = experts.backend
    return dispatcher.combine(experts(dispatcher.dispatch(x_TD, routing)))


@CHECKS.keeps("an expert computes its rows as it does alone, in output and all gradients")
def _(case: ExpertCase) -> None:
    for training in (False, True):
        experts = case.experts(training=training).double()
        alone = [case.one(e, experts) for e in range(case.num_experts)]
        routing = case.routing(dtype=torch.float64)
        x, x_alone = (case.tokens().double().requires_grad_() for _ in range(2))
        gates, gates_alone = (routing.gates_N.clone().requires_grad_() for _ in range(2))
        state = torch.random.get_rng_state()
        y = computed(experts, x, case, gates)
        if training and not torch.equal(torch.random.get_rng_state(), state):
            continue  # dropout: by itself, an expert would get other random numbers
        expected = torch.zeros_like(y)
        for e, expert in enumerate(alone):
            # All rows of an expert at once: norms may take statistics over them.
            own = (routing.expert_ids_N == e).nonzero()[:, 0]
            if len(own):
                token = routing.token_index_N[own]
                f = expert(x_alone[token], "each")[:, 0]
                expected = expected.index_add(0, token, f * gates_alone[own, None])
        close(y, expected, "the output", FLOAT64)
        if not (y.requires_grad and expected.requires_grad):
            hold(not expected.any(), "the output has no gradient, and is not zero")
            continue
        weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
        (y * weight).sum().backward()
        (expected * weight).sum().backward()
        pairs: list[tuple[str, Tensor | None, Tensor | None]] = [("the tokens", x.grad, x_alone.grad)]
        pairs.append(("the gates", gates.grad, gates_alone.grad))
        for e, expert in enumerate(alone):
            grads = gradients_of(experts, e)
            theirs = [(n, p) for n, p in expert.named_parameters() if n in grads]
            pairs += [(f"{n} of expert {e}", grads[n], _first(p.grad)) for n, p in theirs]
        for name, p in experts.named_parameters():
            if is_common(name):  # each expert adds to its gradient
                each = [g for g in (expert.get_parameter(name).grad for expert in alone) if g is not None]
                pairs.append((name, p.grad, torch.stack(each).sum(0) if each else None))
        for name, actual, wanted in pairs:
            if actual is None or wanted is None:  # no row, no gradient, which is as good as zero
                given = wanted if actual is None else actual
                hold(given is None or not given.any(), f"there is a gradient of {name} on one side alone")
            else:
                close(actual, wanted, f"the gradient of {name}", FLOAT64)


def gradients_of(experts: Experts, e: int) -> dict[str, Tensor | None]:
    """Return the gradients of the parameters that expert ``e`` has alone, by the names that ``weights_of`` gives."""
    grads: dict[str, Tensor | None] = {}
    stacked = {p.data_ptr(): p for p in experts.parameters()}
    for name, view in experts.weights_of(e).items():
        if is_common(name):
            continue
        owner = next((p for p in stacked.values() if _holds(p, view)), None)
        row = None if owner is None else (view.data_ptr() - owner.data_ptr()) // (owner[0].numel() * owner.itemsize)
        grads[name] = None if owner is None or row is None or owner.grad is None else owner.grad[row]
    return grads


def is_common(name: str) -> bool:
    """Return whether all experts share the parameter of this name."""
    return name.startswith(f"{COMMON}.")


def _holds(parameter: Tensor, view: Tensor) -> bool:
    start, size = parameter.data_ptr(), parameter.numel() * parameter.itemsize
    return start <= view.data_ptr() < start + size


def _first(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad[0]


@CHECKS.keeps("the gradient is the derivative of the output, in float64")
def _(case: ExpertCase) -> None:
    experts, x = case.experts().double(), case.tokens(5).double().requires_grad_()
    named = {n: p for n, p in experts.named_parameters() if p.requires_grad}

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        moved = dict(zip(named, weights, strict=True))
        y: Tensor = torch.func.functional_call(experts, moved, (x, "each"))
        return y

    if output(x, *named.values()).requires_grad:
        weights = [p.detach().clone().requires_grad_() for p in named.values()]
        torch.autograd.gradcheck(output, (x, *weights), fast_mode=True)


@CHECKS.keeps("an expert that no token takes has no gradient, and padding reaches nobody")
def _(case: ExpertCase) -> None:
    x, context = case.batch(), case.padding()
    assert context.valid_BS is not None
    layer = case.layer(training=True)
    expected = step(layer, x, context)
    held = x.masked_fill(~context.valid_BS[..., None], torch.nan)
    same = step(layer, held, context)
    for name, value in same.items():
        hold(value.isfinite().all() or name == "gradient of tokens", f"{name} is not finite with NaN in padding")
        if name != "gradient of tokens":
            close(value, expected[name], f"{name} with NaN in padding")
    experts = case.experts(training=True)
    y = computed(experts, case.tokens().requires_grad_(), case)
    if case.num_experts >= 4 and y.requires_grad:
        y.sum().backward()
        for name, grad in gradients_of(experts, case.num_experts - 1).items():
            hold(grad is None or not grad.any(), f"{name} of an idle expert has a gradient")


@CHECKS.keeps("without tokens, with one and with padding alone there is an output and a gradient")
def _(case: ExpertCase) -> None:
    for training, (B, S, padding) in itertools.product((False, True), ((0, 4, 0), (2, 0, 0), (1, 1, 0), (2, 3, 1))):
        layer = case.layer(training=training)
        x = case.batch(B, S).requires_grad_()
        context = type(case.padding())(torch.zeros(x.shape[:2], dtype=torch.bool)) if padding else None
        y = layer(x, context)
        width = case.expert.out_dim(case.dim)
        shape = tuple(y.shape)
        hold(shape == (*x.shape[:2], width), f"tokens {tuple(x.shape)} come out as {shape}, not {width} wide")
        hold(y.isfinite().all(), f"the output of {B} sequences of {S} tokens is not finite")
        if y.requires_grad:
            y.sum().backward()
        for name, parameter in layer.named_parameters():
            hold(parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")


@CHECKS.keeps("all tokens through each expert, and summed, are its rows")
def _(case: ExpertCase) -> None:
    experts = case.experts()
    x_TD = case.tokens(7)
    alone = torch.stack([case.one(e, experts)(x_TD, "each")[:, 0] for e in range(case.num_experts)], 1)
    close(experts(x_TD, "each"), alone, "the output of each expert")
    close(experts(x_TD, "dense"), alone.sum(1), "the sum of all experts", 2e-5)


def _merges(case: ExpertCase) -> bool:
    try:
        case.experts()(case.tokens(4)[None], "merged", torch.full((1, case.num_experts), 1.0 / case.num_experts))
    except NotImplementedError:
        return False
    return True


@CHECKS.keeps("a merged expert is the one whose parameters are the weighted sum", _merges)
def _(case: ExpertCase) -> None:
    experts, x_GSD = case.experts(), case.batch(2, 5)
    weights_GE = torch.rand(2, case.num_experts, generator=torch.Generator().manual_seed(1)).softmax(-1)
    y_GSD = experts(x_GSD, "merged", weights_GE)
    for g, weights_E in enumerate(weights_GE):
        merged = case.one(0, experts)
        with torch.no_grad():
            for name, parameter in merged.named_parameters():
                stack = torch.stack([experts.weights_of(e)[name] for e in range(case.num_experts)])
                parameter[0] = torch.tensordot(weights_E, stack, 1)
        close(y_GSD[g], merged(x_GSD[g], "each")[:, 0], f"the output of group {g}", 1e-5)


@CHECKS.keeps("experts joined into one are their sum, each by its gate", lambda case: can_join(case.experts()))
def _(case: ExpertCase) -> None:
    experts, x_TD = case.experts().double(), case.tokens(7).double()
    chosen, gates_K = [case.num_experts - 1, 0], torch.tensor([0.25, -1.5], dtype=torch.float64)
    expected = sum(gate * case.one(e, experts)(x_TD, "dense") for e, gate in zip(chosen, gates_K, strict=True))
    close(joined(experts, chosen, gates_K)(x_TD, "dense"), expected, "the output", FLOAT64)


@CHECKS.keeps("weights_of gives views of one expert, and init_each starts each by itself")
def _(case: ExpertCase) -> None:
    experts, x_TD = case.experts(), case.tokens(5)
    hold(experts.num_local_experts == case.num_experts, f"num_local_experts is {experts.num_local_experts}")
    before = experts(x_TD, "each").detach()
    own = experts.weights_of(0)
    parameters = {n for n, _ in case.one(0, experts).named_parameters() if not is_common(n)}
    with torch.no_grad():
        for name in parameters:
            own[name].add_(1.0)
    after = experts(x_TD, "each").detach()
    hold(torch.equal(after[:, 1:], before[:, 1:]), "writing to expert 0 changes another expert")
    hold(not parameters or not torch.equal(after[:, 0], before[:, 0]), "writing to expert 0 changes nothing")
    shapes: list[tuple[int, ...]] = []

    def fill(matrix: Tensor) -> None:
        shapes.append(tuple(matrix.shape))
        matrix.fill_(0.5)

    experts.init_each(fill)
    hold(all(len(shape) >= 2 for shape in shapes), f"init_each fills {shapes}, which are no matrices")
    for out_of_range in (-1, case.num_experts):
        try:
            experts.weights_of(out_of_range)
        except ValueError:
            continue
        raise AssertionError(f"weights_of({out_of_range}) is no ValueError")


@CHECKS.keeps("num_params and active_params are the sums of numel")
def _(case: ExpertCase) -> None:
    config = case.config()
    layer = config.build(case.dim)
    counted = sum(p.numel() for p in layer.parameters())
    hold(config.num_params(case.dim) == counted, f"num_params is {config.num_params(case.dim)}, counted {counted}")
    routed = sum(p.numel() for name, p in layer.experts.named_parameters() if not is_common(name))
    active = counted - routed + round(routed * config.router.pairs_per_token(case.num_experts) / case.num_experts)
    stated = config.active_params(case.dim)
    hold(abs(stated - active) <= 1, f"active_params is {stated}, counted {active}")


@CHECKS.keeps("flops_per_row is what a counter counts")
def _(case: ExpertCase) -> None:
    experts, x_TD = case.experts(), case.tokens()
    counts = case.routing().tokens_per_expert_E.tolist()
    kinds = case.expert.of_each(case.num_experts)
    expected = sum(n * kind.flops_per_row(case.dim) for n, kind in zip(counts, kinds, strict=True))
    counted = count_flops(computed, experts, x_TD, case)
    hold(counted == expected, f"{counts} rows cost {counted}, expected {expected}")


@CHECKS.keeps("gates may scale the input")
def _(case: ExpertCase) -> None:
    router = TokenChoice(top_k=1, score_func="sigmoid", gates_on="input")
    layer = case.layer(router=router).double()
    x = case.batch(2, 4).double()
    y_TD = layer(x).reshape(8, -1)  # the tokens of a row lie side by side
    x_TD = x.reshape(8, -1)
    routing = layer.router(x_TD.unflatten(0, (2, 4)))
    for t, (e, gate) in enumerate(zip(routing.expert_ids_N.tolist(), routing.gates_N.tolist(), strict=True)):
        expected = case.one(e, layer.experts)(gate * x_TD[t : t + 1], "each")[0, 0]
        close(y_TD[t], expected, f"row {t}", 1e-6)


@CHECKS.keeps("half precision and autocast give the float32 output, rounded")
def _(case: ExpertCase) -> None:
    x = case.batch().bfloat16().float()
    layer = case.layer().bfloat16().float()  # the numbers that half precision holds
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = layer(x)
    close(under_autocast.float(), expected, "the output under autocast", 3e-2)
    y = layer.bfloat16()(x.bfloat16())
    hold(y.dtype == torch.bfloat16, f"a bfloat16 layer puts out {y.dtype}")
    close(y.float(), expected, "the output in bfloat16", 3e-2)


@CHECKS.keeps("torch.export goes through, for any number of tokens")
def _(case: ExpertCase) -> None:
    layer, dynamic = case.layer(), torch.export.Dim.DYNAMIC  # raises where a size is fixed
    program = torch.export.export(layer, (case.batch(3, 6),), dynamic_shapes=({0: dynamic, 1: dynamic}, None)[:1])
    for B, S in ((3, 6), (2, 7)):
        x = case.batch(B, S)
        close(program.module()(x), layer(x), f"the output of {B} sequences of {S} tokens")
