"""Multi-task layers leave on the tape: entries, figures and losses of each gate; expert dropout."""

from __future__ import annotations

import pytest
import torch
from gated import DENSE, TASKS, D, build, context, copied, examples, expert
from torch import Tensor, nn

import core

# The tape.


class Net(nn.Module):
    """A model with a layer inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.shared = layer
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(TASKS))

    def forward(self, x: Tensor, known: core.RoutingContext | None = None) -> Tensor:
        return torch.cat([head(y) for head, y in zip(self.heads, self.shared(x, known), strict=True)], -1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mmoe", ["task0", "task1", "task2"]),
        ("omoe", ["tasks"]),
        (
            "ple uneven",
            ["level0.task0", "level0.task1", "level0.task2", "level0.shared"] + [f"level1.task{k}" for k in range(3)],
        ),
        ("home", ["level0.category0", "level0.category1", "level0.shared"] + [f"level1.task{k}" for k in range(3)]),
        ("top-k", ["task0", "task1", "task2"]),
        ("shared top-k", ["selection", "task0", "task1", "task2"]),
    ],
)
def test_each_gate_has_an_entry(name, expected):
    model = Net(build(name))
    assert list(core.moe_layers(model)) == ["shared"]
    with core.record(model) as tape:
        model(examples(5))
    assert [e.name for e in tape.entries] == [f"shared.{end}" for end in expected]
    assert list(core.RoutingStats.from_tape(tape).layers) == [f"shared.{end}" for end in expected]
    model(examples(5))
    assert len(tape) == len(expected)  # nothing is added after the block


def test_dense_entries_hold_the_gates_without_padding_and_the_experts_names():
    layer, x, shared = build("cgc"), examples(5), ("shared0", "shared1", "shared2")
    with core.record(layer) as tape:
        layer(x)
    first, second, _ = tape.entries
    gates = (x @ layer.router.weight[1].T).softmax(-1)
    torch.testing.assert_close(second.routing.evidence.scores_TE, gates)
    assert first.routing.gates_BtE.shape == (5, TASKS, 5)
    assert first.routing.expert_names == (*shared, "task0.0", "task0.1")
    assert second.routing.expert_names == (*shared, "task1.0", "task1.1")
    assert second.routing.evidence.scores_TE.requires_grad
    assert not second.detach().routing.gates_BtE.requires_grad
    with core.record(layer := build("uneven cgc")) as tape:  # own experts: 2, none and 1
        layer(x)
    second, third = tape.entries[1:]
    assert second.routing.expert_names == shared
    assert third.routing.expert_names == (*shared, "task2.0")
    logits = x @ layer.router.weight[8:].T
    torch.testing.assert_close(third.routing.evidence.logits_TE, logits)
    torch.testing.assert_close(third.routing.evidence.scores_TE, logits.softmax(-1))


def test_names_of_a_shared_gates_experts():
    with core.record(layer := build("domain ple")) as tape:
        layer(examples(5), context("domain ple", 5))
    names = {e.name: e.routing for e in tape.entries}
    shared = names["level0.shared"]
    # Self-gates are in nobody's softmax.
    assert shared.expert_names == ("shared0", "shared1", "task0.0", "task1.0", "task2.0", "domain.0")
    assert shared.evidence.scores_TE.shape == (5, 6)
    assert names["level1.task2"].expert_names == ("shared0", "shared1", "task2.0", "domain.0")


def test_figures_of_a_dense_gate_by_hand():
    # Gates of two real examples and a padded one: masses 0.9 + 0.5 = 1.4, 0.1 + 0.5 = 0.6 and 0 of 2.
    gates = torch.tensor([[[0.9, 0.1, 0.0]], [[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]]])
    routing = core.DenseRouting(gates, 0, 3, valid_T=torch.tensor([True, True, False]))
    entry = core.Entry("l", routing, None, core.Balance())
    stats = core.RoutingStats.from_tape(core.Tape((entry, entry))).layers["l"]
    torch.testing.assert_close(stats.mean_gates, torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64))
    assert stats.num_tokens == 4
    assert stats.load_imbalance == pytest.approx(0.7 * 3)
    assert stats.dead_experts == 1
    assert stats.drop_rate == 0
    # -(0.7 log 0.7 + 0.3 log 0.3) = 0.61086, over log 3.
    assert stats.load_entropy == pytest.approx(0.61086 / 1.098612, abs=1e-5)
    # Entropies 0.32508 and 0.69315, their mean over log 3.
    assert stats.entropy == pytest.approx(0.509117 / 1.098612, abs=1e-5)


def test_mean_gates_of_a_sparse_router_by_hand():
    layer = core.MMoE(3, core.MLP((6,)), core.TokenChoice(2, normalize=False)).build(2, 1)
    with torch.no_grad():
        # Logits (log 2, log 1, log 1) at x = (1, 0), (0, log 4, 0) at x = (0, 1).
        layer.router[0].gate.weight.copy_(torch.tensor([[2.0, 1.0], [1.0, 4.0], [1.0, 1.0]]).log() + 0.0)
        layer.router[0].gate.weight[2] -= 1e-3  # breaks the ties
    with core.record(layer) as tape:
        layer(torch.eye(2))
    stats = core.RoutingStats.from_tape(tape).layers["task0"]
    # Scores 2/4, 1/4 of the first example and 1/6, 4/6 of the second, over two examples.
    torch.testing.assert_close(
        stats.mean_gates, torch.tensor([1 / 3, 11 / 24, 0], dtype=torch.float64), rtol=0, atol=1e-3
    )
    assert stats.chosen_per_expert.tolist() == [2, 2, 0]


def test_the_balance_losses_are_each_gates_own():
    layer = build("top-k", balance=core.Balance(load_balancing_loss=0.5, router_z_loss=0.25))
    x = examples(12)
    with core.record(layer) as tape:
        layer(x)
    expected = 0.0
    for task in range(TASKS):
        single = core.MoEConfig(8, core.TokenChoice(2), core.MLP((6,)), balance=layer.balance).build(D)
        single.router.load_state_dict(layer.router[task].state_dict())
        with core.record(single) as own:
            single(x)
        expected = expected + core.aux_loss(own)
    torch.testing.assert_close(core.aux_loss(tape), expected)


def test_dense_gates_have_no_loss_unless_asked():
    for name in DENSE:
        with core.record(layer := build(name)) as tape:
            layer(examples(5))
        assert core.aux_loss(tape) == 0
        assert core.aux_losses(tape).terms == {}


def test_the_losses_of_dense_gates_by_hand():
    # Two experts; gates of task 0: (1/2, 1/2) on both examples, of task 1: (3/4, 1/4).
    layer = core.MMoE(2, core.MLP((1,)), balance=core.Balance(router_z_loss=1.0, importance=1.0)).build(1, 2)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[[0.0], [0.0]], [[3.0], [1.0]]]).clamp_min(1.0).log())
    with core.record(layer) as tape:
        layer(torch.ones(2, 1))
    actual = core.aux_losses(tape)
    # Importance: 0, and masses 1.5, 0.5: variance 0.25 over mean^2 1. z: log(2)^2 and log(4)^2.
    z = (0.693147**2 + 1.386294**2) / 2
    torch.testing.assert_close(actual.terms["importance"], torch.tensor(0.125))
    torch.testing.assert_close(actual.terms["router_z_loss"], torch.tensor(z))
    torch.testing.assert_close(actual.total, torch.tensor(0.25 + 2 * z))


def test_each_tasks_bias_moves_by_its_own_load():
    layer = core.MMoE(4, core.MLP((6,)), core.TokenChoice(1, expert_bias=True, bias_update_rate=0.5)).build(D, 2)
    model = Net(layer)
    with torch.no_grad():
        for task, e in enumerate((1, 3)):
            layer.router[task].gate.weight.copy_(torch.eye(4)[e][:, None] * 5.0)
    with core.record(model) as tape:
        layer(examples(8).abs())
    core.update_expert_bias(model, tape)
    # All 8 examples on one expert: it falls, the others (mean load 2, theirs 0) rise.
    assert layer.router[0].expert_bias.tolist() == [0.5, -0.5, 0.5, 0.5]
    assert layer.router[1].expert_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    model.eval()
    core.update_expert_bias(model, tape)
    assert layer.router[1].expert_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    layer = core.MMoE(4, core.MLP((6,)), core.DenseToSparse(anneal_steps=10)).build(D, 2)
    with core.record(layer) as tape:
        layer(examples(8))
    core.update_expert_bias(layer, tape)
    assert [int(r.num_steps) for r in layer.routers().values()] == [1, 1]


# Expert dropout.


@pytest.mark.parametrize("name", ["mmoe", "ple", "shared top-k"])
def test_expert_dropout_acts_in_training_alone_and_keeps_the_sum(name):
    layer, x = build(name, expert_dropout=0.5), examples(64)
    plain = copied(build(name), layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    assert not torch.allclose(layer.train()(x), plain(x))
    # Experts that all give 1 show the sum of the weights: 1 whatever is left out.
    for experts in layer.experts if isinstance(layer.experts, nn.ModuleList) else [layer.experts]:
        for parameter_name, parameter in experts.named_parameters():
            nn.init.constant_(parameter, float(parameter_name.startswith("b")))
            if parameter_name.startswith("w"):
                nn.init.zeros_(parameter)
    torch.testing.assert_close(layer(x), torch.ones(TASKS, 64, 6))


def test_an_expert_is_left_out_as_often_as_asked():
    from core.routing.multi_gate import dropped_experts

    weights = torch.rand(20_000, 2, 4) + 0.1
    dropped = dropped_experts(weights, 0.3)
    # 160 000 draws: 0.3 - 0.3^4 / 4, as one of four stays where all were drawn; 5 deviations are 0.6 %.
    assert abs(dropped.double().mean().item() - (0.3 - 0.3**4 / 4)) < 0.006
    assert not dropped.all(-1).any()
    # At 0.99 mostly one stays, and it is never one of weight 0.
    weights[..., 2:] = 0
    dropped = dropped_experts(weights, 0.99)
    assert not dropped[..., :2].all(-1).any()


def test_dropped_gates_are_the_softmax_of_the_others():
    layer = build("mmoe", expert_dropout=0.4).train()
    x = examples(30)
    with core.record(layer) as tape:
        torch.manual_seed(3)
        y = layer(x)
    logits = torch.stack([x @ w.T for w in layer.router.weight], 1)
    torch.manual_seed(3)
    draw = torch.rand(30, TASKS, 5)
    dropped = (draw < 0.4) & (draw < draw.amax(-1, keepdim=True))
    gates = logits.masked_fill(dropped, -torch.inf).softmax(-1)
    outputs = torch.stack([expert(layer.experts, e, x) for e in range(5)])
    torch.testing.assert_close(y, torch.einsum("bte,ebh->tbh", gates, outputs), rtol=1e-5, atol=1e-5)
    # The tape has the gates as they are without it.
    torch.testing.assert_close(tape.entries[0].routing.gates_BtE, logits.softmax(-1))
