"""Checks of the output: the sum of the pairs, gradients, dtypes."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import record
from ..experts import FFNExperts
from ..layers import aux_loss
from .check import Checks, close, hold, step, tensors
from .router_case import RouterCase, seeded

CHECKS: Checks[RouterCase] = Checks()


@CHECKS.keeps("the output is the sum of its pairs", lambda c: c.is_pairs)
def _(case: RouterCase) -> None:
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


@CHECKS.keeps("the gradient is that of the output, in float64", lambda c: c.router.has_exact_gradient)
def _(case: RouterCase) -> None:
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


@CHECKS.keeps(
    "every weight of the router learns in training", lambda c: any(True for _ in c.layer().router.parameters())
)
def _(case: RouterCase) -> None:
    layer = case.layer(training=True, balance=case.balance())
    step(layer, case.tokens(8, 8), case.context(8, 8))
    idle = [
        name
        for name, p in layer.router.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.abs().max() > 0)
    ]
    hold(not idle, f"no gradient reaches {', '.join(idle)}")


@CHECKS.keeps("without tokens, with one and with padding alone there is an output, a loss and a gradient")
def _(case: RouterCase) -> None:
    batches = ((0, 4, False), (2, 0, False), (1, 1, False), (2, 3, True))
    for training, (B, S, padding) in itertools.product((False, True), batches):
        layer = case.layer(training=training, balance=case.balance())
        x = case.tokens(B, S).requires_grad_()
        context = case.context(B, S, valid_BS=torch.zeros(B, S, dtype=torch.bool) if padding else None)
        with record(layer) as tape:
            y = layer(x, context)
        hold(y.shape == x.shape, f"tokens {tuple(x.shape)} come out as {tuple(y.shape)}")
        (entry,) = tape.entries
        hold(not padding or not entry.routing.tokens_per_expert_E.any(), "padding alone is computed by an expert")
        loss = aux_loss(tape)
        hold(loss.isfinite(), f"the auxiliary loss of {B} sequences of {S} tokens is {loss}")
        (y.sum() + loss).backward()
        for name, parameter in layer.named_parameters():
            hold(parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite")


@CHECKS.keeps("half precision and autocast leave the decision in float32")
def _(case: RouterCase) -> None:
    x, context = case.padded()
    x = x.bfloat16().float()
    layer = case.layer()
    expected = layer.router(x, context)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = tensors(layer.router(x, context))
        y = layer(x, context)
    hold(y.isfinite().all(), "the output under autocast is not finite")
    for name, value in tensors(expected).items():
        other = under_autocast[name]
        hold(other.dtype == value.dtype, f"{name} is {other.dtype} under autocast")
        hold(torch.equal(other, value), f"{name} is another one under autocast")
    layer = layer.bfloat16()
    y = layer(x.bfloat16(), context)
    hold(y.dtype == torch.bfloat16, f"a bfloat16 layer puts out {y.dtype}")
    hold(y.isfinite().all(), "the output in bfloat16 is not finite")
    for name, value in tensors(layer.router(x.bfloat16(), context)).items():
        if value.is_floating_point():
            hold(value.dtype == torch.float32, f"{name} is {value.dtype} in a bfloat16 layer")
