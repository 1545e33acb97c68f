"""Checks of what may change a token's output: padding, batch-mates, order."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..contract import RoutingContext
from ..routing.selection import PRIORITIES
from .check import Checks, close, hold, step
from .router_case import FIELDS, RouterCase, take, with_padding_holding

CHECKS: Checks[RouterCase] = Checks()


@CHECKS.keeps("padding comes out as zero and may hold anything")
def _(case: RouterCase) -> None:
    for training in (False, True):
        layer = case.layer(training=training, balance=case.balance())
        x, context = case.padded()
        assert context.valid_BS is not None
        expected = step(layer, *with_padding_holding(x, context, 0.0, 0))
        hold(not expected["output"][~context.valid_BS].any(), "padding comes out other than zero")
        hold(not expected["gradient of tokens"][~context.valid_BS].any(), "padding gets a gradient")
        for value, ids in ((torch.nan, -12345), (1e30, 10**9)):
            result = step(layer, *with_padding_holding(x, context, value, ids))
            for name, tensor in expected.items():
                hold(torch.equal(result[name], tensor), f"padding of {value} with ids {ids} changes the {name}")


@CHECKS.keeps("padding is the same as no token")
def _(case: RouterCase) -> None:
    layer = case.layer(training=False, balance=case.balance())
    x, context = case.padded()
    n = 4  # real tokens of sequence 1
    padded = step(layer, x[1:2], take(context, slice(1, 2)))
    short = replace(take(context, slice(1, 2), slice(n)), valid_BS=None)
    alone = step(layer, x[1:2, :n], short, seed=7)
    close(padded["output"][:, :n], alone["output"], "the output")
    close(padded["auxiliary loss"], alone["auxiliary loss"], "the auxiliary loss")
    hold(torch.equal(padded["load"], alone["load"]), f"loads {padded['load'].tolist()}, {alone['load'].tolist()}")
    # A sequence of only padding next to it does not count.
    both = layer(x[1:], take(context, slice(1, 3)))
    close(both[:1, :n], alone["output"], "the output beside a sequence of padding")


@CHECKS.keeps("other sequences do not change a sequence's output", lambda c: c.router.depends_on != "batch")
def _(case: RouterCase) -> None:
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


@CHECKS.keeps("other tokens do not change a token's output", lambda c: c.router.depends_on == "token")
def _(case: RouterCase) -> None:
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


@CHECKS.keeps(
    "with capacity by sequence, other sequences do not change a sequence's output",
    lambda c: c.router.depends_on != "batch" and c.has("capacity_factor"),
)
def _(case: RouterCase) -> None:
    x, context = case.tokens(), case.context()
    for priority in PRIORITIES:
        layer = case.layer(capacity_factor=0.5, group="sequence", priority=priority)
        expected = layer(x, context)
        mixed_x = case.tokens(offset=1)
        mixed_x[1] = x[1]
        close(layer(mixed_x, context)[1], expected[1], f"the output at priority={priority!r}")


@CHECKS.keeps("the order of the tokens does not matter", lambda c: not c.router.reads_position)
def _(case: RouterCase) -> None:
    layer = case.layer()
    x, context = case.tokens(), case.context()
    places = torch.tensor([5, 2, 0, 4, 1, 3])
    expected = layer(x, context)[:, places]
    close(layer(x[:, places], take(context, slice(None), places)), expected, "the output of moved tokens")


@CHECKS.keeps("the order of the sequences does not matter", lambda c: not c.router.reads_batch_index)
def _(case: RouterCase) -> None:
    layer = case.layer()
    x, context = case.tokens(), case.context()
    sequences = torch.tensor([2, 0, 1])
    expected = layer(x, context)[sequences]
    close(layer(x[sequences], take(context, sequences)), expected, "the output of moved sequences")


@CHECKS.keeps("later tokens do not change earlier outputs", lambda c: c.router.is_causal)
def _(case: RouterCase) -> None:
    case.config().build(case.dim, causal=True)  # is not rejected
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


@CHECKS.keeps("a causal decoder is rejected", lambda c: not c.router.is_causal)
def _(case: RouterCase) -> None:
    try:
        case.config().build(case.dim, causal=True)
    except ValueError:
        return
    raise AssertionError("is_causal is False, and build(causal=True) goes through")
