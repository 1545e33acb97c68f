"""A network with MoE layers begins as a dense one: its outputs are those, and what does not fit is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core
from apps.nets.upcycling import begin_as


def net(*ffns):
    return nn.Sequential(nn.Linear(3, 4), *(ffn.build(4) for ffn in ffns))


DENSE = core.DenseFFN(6, "gelu_tanh")
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(6, "gelu_tanh", bias=True))


@pytest.mark.parametrize("start", ["copy", core.convert.DropStart(0.0)])
def test_the_outputs_are_the_dense_networks(start):
    dense, sparse, other = net(DENSE, DENSE), net(DENSE, MOE), net(DENSE, DENSE)
    begin_as(sparse, dense, MOE, start)
    begin_as(other, dense, None)  # without a mixture it is the dense network itself
    x = torch.randn(2, 5, 3)
    assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)
    assert_close(sparse[2].experts.w_in[3], dense[2].w_in.weight.T)
    assert torch.equal(other(x), dense(x))


def test_each_layer_has_gates_of_its_own():
    sparse, again, other = net(MOE, MOE), net(MOE, MOE), net(MOE, MOE)
    dense = net(DENSE, DENSE)
    begin_as(sparse, dense, MOE, seed=1)
    begin_as(again, dense, [MOE, MOE], seed=1)
    begin_as(other, dense, MOE, seed=3)
    gates = [model[i].router.gate.weight for model in (sparse, other) for i in (1, 2)]
    assert len({tuple(gate.flatten().tolist()) for gate in gates}) == 4
    assert torch.equal(gates[0], again[1].router.gate.weight)


TOP1 = core.MoEConfig(4, core.TokenChoice(1), MOE.expert)
OTHERS = {
    r"layer '1' has experts FFN\(hidden_dim=6.*set moe.expert to that kind and width": core.FFN(6, "gelu_tanh"),
    "begin as is FFN": core.FFN(8, "gelu_tanh", bias=True),
    "the network that they begin as is FFN": core.FFN(6, "gelu", bias=True),
}


@pytest.mark.parametrize(
    ("sparse", "dense", "moe", "message"),
    [
        *(((moe,), (DENSE,), moe, text) for text, own in OTHERS.items() for moe in [replace(MOE, expert=own)]),
        ((TOP1,), (DENSE,), TOP1, r"layer '1' cannot begin as the dense network: .* do not sum to a constant"),
        ((MOE, DENSE), (DENSE, core.DenseFFN(7)), MOE, r"differs outside its MoE layers: 2\.w_in\.weight"),
    ],
    ids=["no biases", "width", "activation", "one by its score", "outside"],
)
def test_what_does_not_fit_is_refused(sparse, dense, moe, message):
    with pytest.raises(ValueError, match=message):
        begin_as(net(*sparse), net(*dense), moe)
