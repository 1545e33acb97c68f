"""Experts compared on the same examples."""

import torch
from torch import nn

from core import MLP, STAR, MMoE, RoutingContext
from core.diagnose.alike import Inputs, _distances, _products


def test_the_same_outputs_have_a_distance_of_0_and_likeness_by_design_is_not_compared():
    # Two domains of a star start as one network; copies among MMoE's experts have a distance of 0.
    known = RoutingContext(domain_ids_B=torch.tensor([0, 1, 1, 0]))
    model = nn.ModuleDict({"star": STAR(expert=MLP((6,))).build(5, 1, 2), "mmoe": MMoE(2, MLP((6,))).build(5, 1)})
    with torch.no_grad():
        for parameter in model["mmoe"].experts.parameters():
            parameter[1] = parameter[0]
    inputs = Inputs(model)
    with inputs.listening():
        model["star"](torch.randn(4, 5), known)
        model["mmoe"](torch.randn(4, 5))
    distances = inputs.distances()
    assert (list(distances), distances["mmoe"][0, 1]) == (["mmoe"], 0)
    # Outputs (1, 0), (0, 1), (1, 0) and nothing: unrelated 1, the same 0, and nothing can be said of nothing.
    y_TED = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]]).double()
    distance = _distances(_products(y_TED))
    assert (distance[0, 1], distance[0, 2]) == (1, 0)
    assert distance[3, 3].isnan()
