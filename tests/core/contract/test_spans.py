"""Tests of the names that a profiler shows."""

from collections import Counter

import pytest
import torch
from torch.profiler import profile

import core

PARTS = ("moe.router", "moe.dispatch", "moe.experts", "moe.combine")


def calls(layer, x):
    with profile() as trace:
        layer(x)
    return Counter(event.name for event in trace.events() if event.name.startswith("moe."))


@pytest.mark.parametrize(
    "router", [core.TokenChoice(2), core.ExpertChoice(), core.SoftSlots(1), core.TokenRounding(2, tile=2)]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_profiler_shows_each_part_of_a_layer_once(router, training):
    layer = core.MoEConfig(4, router).build(8).train(training)
    assert calls(layer, torch.randn(2, 3, 8)) == dict.fromkeys(PARTS, 1)


def test_a_layer_of_several_gates_is_shown_too_and_a_spans_arguments_are_the_functions():
    layer = core.MMoE(4, core.MLP((8, 6))).build(8, num_tasks=3)
    assert set(calls(layer, torch.randn(5, 8))) >= {"moe.router", "moe.experts"}

    @core.contract.span("moe.part")
    def halved(x: int, by: int = 2) -> float:
        """Halve."""
        return x / by

    assert (halved(3), halved(3, by=3), halved.__name__, halved.__doc__) == (1.5, 1.0, "halved", "Halve.")
