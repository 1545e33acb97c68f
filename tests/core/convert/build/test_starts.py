"""What experts begin as: virtual groups, redrawn units, and a network's own units divided among them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core import FFN, Cosine, DenseFFN, GeneralFFN, MoEConfig, Random, SwiGLU, TokenChoice, record, sparsify
from core.convert import DropStart, GranularStart, SplitStart, Start
from core.convert.read.neurons import balanced_clusters, random_groups


def network(gated: bool = False, bias: bool = True) -> nn.Module:
    return DenseFFN(24, "silu" if gated else "relu", gated=gated, bias=bias).build(8)


NETWORKS = [(False, True), (False, False), (True, True), (True, False)]
ALL = MoEConfig(4, TokenChoice(4, normalize="unit"))


def check_same(sparse: nn.Module, dense: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        y, expected = sparse(x), dense(x)
    assert (y - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    ("network_of", "router"),
    zip(
        NETWORKS,
        [
            TokenChoice(2),
            TokenChoice(1),
            TokenChoice(1, score_func="sigmoid", normalize=None, scale=2.0),
            TokenChoice(2, gate_bias=True, normalize="unit"),
        ],
        strict=True,
    ),
)
def test_granular_experts_begin_as_the_network(network_of, router):
    dense, x = network(*network_of), torch.randn(3, 7, 8)
    sparse = sparsify(dense, MoEConfig(3, router, granularity=4), "", start=GranularStart())
    check_same(sparse, dense, x)
    assert (sparse.moe.num_experts, sparse.config.expert.hidden_dim) == (12, 6)
    with record(sparse) as tape:
        sparse(x)
    # A token takes whole groups: experts 0 to 3, 4 to 7, or 8 to 11.
    groups_TK = tape.entries[0].routing.expert_ids_N.view(21, -1).sort(-1).values // 4
    assert (groups_TK.view(21, -1, 4) == groups_TK.view(21, -1, 4)[..., :1]).all()
    assert groups_TK.unique().numel() > 1


def test_the_experts_of_a_group_are_the_network_s_shards():
    dense = network(bias=False)
    sparse = sparsify(dense, MoEConfig(2, TokenChoice(1), granularity=3), "", start="granular")
    w_in, w_out = (getattr(sparse.moe.experts, name) for name in ("w_in", "w_out"))
    for group in (0, 3):
        assert torch.equal(torch.cat(tuple(w_in[group : group + 3]), -1), dense.w_in.weight.t())
        # Three experts of a group share the gates' sum of 1, so each of their outputs counts three times.
        torch.testing.assert_close(torch.cat(tuple(w_out[group : group + 3])), 3 * dense.w_out.weight.t())
    gate = sparse.moe.router.gate.weight
    assert torch.equal(gate[0::3], gate[2::3])
    assert not torch.equal(gate[0], gate[3])


@pytest.mark.parametrize("network_of", NETWORKS)
def test_a_share_of_units_is_drawn_anew_in_each_expert(network_of):
    dense = network(*network_of)
    experts = sparsify(dense, MoEConfig(3, TokenChoice(2)), "", start=DropStart(0.25)).moe.experts
    old = sparsify(dense, MoEConfig(3, TokenChoice(2)), "").moe.experts
    changed = []
    for e in range(3):
        new, before = experts.weights_of(e), old.weights_of(e)
        for name in ("b_in", "b_gate", "b_out"):
            assert name not in new or torch.equal(new[name], before[name])
        units = [(new[name] != before[name]).all(0) for name in ("w_in", "w_gate") if name in new]
        units.append((new["w_out"] != before["w_out"]).all(1))
        kept = [(new[name] == before[name]).all(0) for name in ("w_in", "w_gate") if name in new]
        kept.append((new["w_out"] == before["w_out"]).all(1))
        assert all(torch.equal(unit, units[0]) for unit in units)  # whole units: their columns and their row
        assert all(torch.equal(keep, ~units[0]) for keep in kept)
        assert units[0].sum() == 6
        changed.append(units[0])
    assert not torch.equal(changed[0], changed[1])


def test_units_are_drawn_by_the_mean_and_deviation_of_what_they_were():
    dense = DenseFFN(400, "relu", bias=False).build(50)
    with torch.no_grad():
        dense.w_in.weight.normal_(3.0, 2.0)
    experts = sparsify(dense, MoEConfig(2, TokenChoice(2)), "", start=DropStart(1.0)).moe.experts
    assert experts.w_in.mean().item() == pytest.approx(3.0, abs=0.05)
    assert experts.w_in.std().item() == pytest.approx(2.0, abs=0.05)
    assert not (experts.w_in[0] == dense.w_in.weight.t()).any()


@pytest.mark.parametrize("by", ["clusters", "coactivation", "random"])
@pytest.mark.parametrize("network_of", NETWORKS)
def test_all_parts_of_a_network_are_the_network(network_of, by):
    dense, x = network(*network_of), torch.randn(3, 7, 8)
    inputs = x if by == "coactivation" else None
    sparse = sparsify(dense, ALL, "", start=SplitStart(by), inputs=inputs)
    check_same(sparse, dense, x)
    gated, bias = network_of
    narrow = GeneralFFN(6, "silu", True, True, True) if bias else SwiGLU(6)
    assert sparse.config.expert == (narrow if gated else FFN(6, "relu", bias=bias))
    # Each unit is in one expert.
    columns = torch.cat(tuple(sparse.moe.experts.w_in), -1)
    assert columns.sort(-1).values.equal(dense.w_in.weight.t().sort(-1).values)


def test_the_output_bias_counts_once_whatever_the_experts_of_a_token():
    dense = network()
    with torch.no_grad():
        dense.w_out.weight.zero_()
    sparse = sparsify(dense, MoEConfig(4, TokenChoice(2, normalize="unit")), "", start="split")
    torch.testing.assert_close(sparse(torch.randn(5, 8)), dense.w_out.bias.expand(5, 8))


def test_even_gates_of_another_size_are_made_up_for():
    """``Random(2)`` gives each of two experts a gate of 1/2; the parts count fully all the same."""
    dense = network(bias=False)
    sparse = sparsify(dense, MoEConfig(2, Random(2)), "", start="split")
    check_same(sparse, dense, torch.randn(5, 8))


PLANTED = torch.tensor([2, 0, 1, 3, 1, 0, 2, 3, 3, 2, 0, 1])
"""Twelve units in four groups of three."""


@pytest.mark.parametrize("by", ["clusters", "coactivation"])
def test_units_that_work_together_come_into_one_expert(by):
    # Unit u looks at feature PLANTED[u] alone, so that units of a group answer the same tokens.
    dense = nn.Sequential(nn.Linear(4, 12, bias=False), nn.ReLU(), nn.Linear(12, 4, bias=False))
    with torch.no_grad():
        dense[0].weight.copy_(F.one_hot(PLANTED, 4) * torch.rand(12, 1).add(0.5))
    x = torch.eye(4).repeat(5, 1)
    moe = MoEConfig(4, TokenChoice(1, normalize="unit"))
    sparse = sparsify(dense, moe, "", start=SplitStart(by), inputs=x if by == "coactivation" else None)
    groups = {tuple(sorted(w.abs().sum(1).nonzero().flatten().tolist())) for w in sparse.moe.experts.w_in}
    assert groups == {(0,), (1,), (2,), (3,)}
    # The gate knows which expert answers a token: one of four experts computes the network.
    check_same(sparse, dense, x)


def test_clusters_are_equal_in_size():
    features = torch.cat((torch.randn(9, 5) + 4, torch.randn(3, 5) - 4))
    groups = balanced_clusters(features, 3, torch.Generator().manual_seed(0))
    assert groups.shape == (3, 4)
    assert groups.flatten().sort().values.tolist() == list(range(12))
    assert {9, 10, 11} < set(groups[[11 in group for group in groups.tolist()].index(True)].tolist())
    dealt = random_groups(12, 3, torch.Generator().manual_seed(0))
    assert dealt.flatten().sort().values.tolist() == list(range(12))
    assert not torch.equal(dealt, torch.arange(12).view(3, 4))


def test_inputs_reach_the_networks_of_a_whole_model():
    model = nn.Sequential(nn.Linear(3, 8), nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0))
    sparse = sparsify(model, ALL, "1", start=SplitStart("coactivation"), inputs=(torch.randn(4, 2, 3),))
    check_same(sparse.eval(), model.eval(), torch.randn(4, 2, 3))


class Halves(Start):
    """A start of one's own: every expert is half of the network."""

    name = "halves"

    def fill(self, part, layer, generator, known):
        for e in range(layer.num_experts):
            for name, tensor in layer.experts.weights_of(e).items():
                tensor.copy_(part.weights[name] * (0.5 if name in ("w_out", "b_out") else 1.0))


def test_a_start_of_one_s_own():
    dense, x = network(), torch.randn(5, 8)
    torch.testing.assert_close(sparsify(dense, MoEConfig(3, TokenChoice(2)), "", start=Halves())(x), dense(x) / 2)


@pytest.mark.parametrize(
    ("moe", "start", "message"),
    [
        (MoEConfig(4), "granular", r"start='granular' needs granularity above 1"),
        (MoEConfig(4, granularity=5), "granular", r"granularity=5 does not divide hidden_dim=24"),
        (MoEConfig(4, Cosine(2), granularity=2), "granular", r"start='granular' needs a router with a linear gate"),
        (MoEConfig(5, TokenChoice(5, normalize="unit")), "split", r"num_experts=5 does not divide the network's 24"),
        (MoEConfig(4, TokenChoice(4)), "split", r"are not equal, so that start='split' .* normalize='unit'"),
        (ALL, SplitStart("coactivation"), r"SplitStart\(by='coactivation', shared=0\) needs inputs of the model"),
        (MoEConfig(4, granularity=2), "drop", r"granularity=2 makes experts narrower than the network"),
    ],
)  # fmt: skip
def test_bad_input(moe, start, message):
    with pytest.raises(ValueError, match=message):
        sparsify(network(), moe, "", start=start)


def test_bad_options():
    with pytest.raises(ValueError, match=r"CopyStart\(\) does not read inputs"):
        sparsify(network(), MoEConfig(4), "", inputs=torch.randn(3, 8))
    model = nn.Sequential(network())
    model[0].other = network()
    with pytest.raises(ValueError, match=r"module '0.other' is not called in a forward of these inputs"):
        sparsify(model, ALL, "0.other", start=SplitStart("coactivation"), inputs=torch.randn(3, 8))
    stack = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU())
    for start in ("drop", "split", "granular"):
        with pytest.raises(ValueError, match=r"hidden"):
            sparsify(stack, MoEConfig(2, TokenChoice(2), granularity=2 if start == "granular" else 1), "", start=start)
