"""SMES: the tasks' gates choose together, and an expert computes an example once, whatever the number of tasks."""

from __future__ import annotations

import pytest
import torch
from gated import TASKS, D, build, copied, examples, expert
from stepped import assert_same
from torch import Tensor

import core
from core.routing.multi_gate import expected_experts


def typed(shared_top_k: int, private_top_k: int, **options) -> core.MultiGateLayer:
    """Return a layer of two tasks for x = 1: their gates are 4/8, 1/8, 3/8, 0 and 2/8, 1/8, 0, 5/8, and expert e gives
    10^e."""
    layer = core.SMES(4, core.MLP((1,)), shared_top_k, private_top_k, **options).build(1, 2)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[4.0, 1, 3, 1e-20], [2.0, 1, 1e-20, 5]]).log()[..., None])
        layer.experts.w_0.zero_()
        layer.experts.b_0.copy_(10.0 ** torch.arange(4)[:, None])
    return layer


def loop(layer, x: Tensor, shared: int, private: int) -> Tensor:
    """Return the outputs example by example and task by task, as the equation reads."""
    outputs = []
    for row in x:
        logits = layer.router(row[None, None]).task_TtE[0]
        order = logits.softmax(-1).mean(0).argsort(descending=True).tolist()
        chosen_by_all, others, of_tasks = order[:shared], order[shared:], []
        for task in range(len(logits)):
            own = sorted(others, key=lambda e, task=task: -logits[task, e].item())[:private]
            chosen = chosen_by_all + own
            gates = logits[task, chosen].softmax(-1)
            of_tasks.append(sum(g * expert(layer.experts, e, row) for g, e in zip(gates, chosen, strict=True)))
        outputs.append(torch.stack(of_tasks))
    return torch.stack(outputs, 1)


def test_the_output_by_hand():
    # The mean gates are 6/16, 2/16, 3/16 and 5/16, so S is expert 0. Besides, task 0 takes expert 2, with gates 4/7 and
    # 3/7, and task 1 takes expert 3, with gates 2/7 and 5/7.
    y = typed(1, 1)(torch.ones(1, 1))
    torch.testing.assert_close(y.flatten(), torch.tensor([(4 * 1 + 3 * 100) / 7, (2 * 1 + 5 * 1000) / 7]))


@pytest.mark.parametrize("shared, private", [(1, 1), (2, 2), (3, 0), (0, 3), (8, 0), (1, 7)])
def test_outputs_and_gradients_equal_the_loop(shared, private):
    torch.manual_seed(1)
    layer = core.SMES(8, core.MLP((7, 6)), shared, private, init_scale=9.0).build(D, TASKS)
    x, weight = examples(6).requires_grad_(), torch.randn(TASKS, 6, 6)
    steps = []
    for y in (layer(x), loop(layer, x, shared, private)):
        grads = torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])
        steps.append({str(i): value for i, value in enumerate((y, *grads))})
    assert_same(*steps, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["smes", "smes of FFN", "top-k", "expert choice", "threshold", "relu", "null experts"])
def test_an_expert_computes_an_example_once(name):
    layer, x, computed = build(name), examples(40), []
    layer.experts.register_forward_pre_hook(lambda module, args: computed.append(args[0]))
    with core.record(layer) as tape:
        layer(x)
    (rows,) = computed
    tasks = [entry.routing for entry in tape.entries if "task" in entry.name]
    pairs = [zip(r.token_index_N.tolist(), r.expert_ids_N.tolist(), strict=True) for r in tasks]
    asked = [pair for of_task in pairs for pair in of_task if pair[1] < 8]
    assert int(rows.offsets_E[-1]) == len(set(asked)) < len(asked)


def test_the_computed_pairs_are_an_entry_and_carry_the_losses_of_all_gates():
    # As above, with three examples: both tasks ask for expert 0, one for 2 and one for 3.
    layer = typed(1, 1, balance=core.Balance(load_balancing_loss=0.5, router_z_loss=0.0))
    with core.record(layer) as tape:
        layer(torch.ones(3, 1))
    assert [entry.name for entry in tape.entries] == ["selection", "task0", "task1"]
    assert [entry.routing.tokens_per_expert_E.tolist() for entry in tape.entries] == [
        [3, 0, 3, 3],
        [3, 0, 3, 0],
        [3, 0, 0, 3],
    ]
    # f = 2/4, 0, 1/4, 1/4 and P = 6/16, 2/16, 3/16, 5/16: 4 (6/32 + 3/64 + 5/64) = 5/4.
    losses = core.aux_losses(tape)
    assert losses.terms["load_balancing_loss"].item() == pytest.approx(5 / 4)
    assert losses.total.item() == pytest.approx(5 / 8)
    # Gates of the computed pairs, the mean over the tasks: (4/7 + 2/7) / 2 of expert 0, 3/14 of 2, 5/14 of 3.
    selection = tape.entries[0].routing
    gates = torch.zeros(5).index_add(0, selection.expert_ids_N, selection.gates_N.detach()) / 3
    assert gates.tolist() == pytest.approx([3 / 7, 0, 3 / 14, 5 / 14, 0])


def test_expert_dropout_leaves_out_experts_that_a_task_chose():
    layer, x = build("smes", expert_dropout=0.5), examples(64)
    plain = copied(build("smes"), layer.state_dict())
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    with core.record(layer.train()) as tape:
        assert not torch.allclose(layer(x), plain(x))
    with core.record(plain.train()) as clean:
        plain(x)
    # The tape has the gates as they are without it.
    for entry, other in zip(tape.entries[1:], clean.entries[1:], strict=True):
        torch.testing.assert_close(entry.routing.gates_N, other.routing.gates_N)
    with torch.no_grad():  # experts that all give 1 show the sum of the gates
        layer.experts.w_0.zero_()
        layer.experts.b_0.fill_(1.0)
    torch.testing.assert_close(layer(x), torch.ones(TASKS, 64, 6))


def test_dense_training_shows_half_of_the_examples_all_experts():
    layer, x = build("smes", dense_training=True), examples(2000)
    sparse = copied(build("smes"), layer.state_dict())
    dense = copied(core.MMoE(8, core.MLP((6,))).build(D, TASKS), layer.state_dict())
    y, few, every = layer(x), sparse(x), dense(x)
    is_few_T = torch.isclose(y, few, rtol=1e-4, atol=1e-5).all(-1).all(0)
    is_every_T = torch.isclose(y, every, rtol=1e-4, atol=1e-5).all(-1).all(0)
    assert (is_few_T | is_every_T).all()
    assert 0.44 < is_every_T.double().mean() < 0.56  # 1/2, with a standard deviation of 0.011
    torch.testing.assert_close(layer.eval()(x), few)


def test_the_expected_number_of_experts():
    # 2 of 4 by each of two tasks: a given expert is missed by both with probability 1/4, so 3 of 4 are taken.
    assert expected_experts(4, 2, 2) == 3
    assert expected_experts(4, 2, 1) == 2
    assert expected_experts(4, 9, 3) == 4


# ReLU gates: dense in training, sparse in evaluation.


def test_relu_gates_train_both_gates_of_each_task_and_evaluate_with_one():
    config = core.MMoE(8, core.MLP((6,)), core.ReLURouting(2, dense_training=True, l1_start=0.5))
    layer, x = config.build(D, TASKS), examples(64)
    with core.record(layer) as tape:
        loss = layer(x).square().sum()
    (loss + core.aux_losses(tape).total).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in layer.parameters())
    layer.eval()
    y = layer(x)
    with torch.no_grad():
        for router in layer.routers().values():
            router.dense_gate.weight.fill_(torch.nan)
    assert torch.equal(layer(x), y)
    for task, router in enumerate(layer.routers().values()):
        gates = (x @ router.gate.weight.T + router.gate.bias).relu()
        expected = sum(gates[:, [e]] * expert(layer.experts, e, x) for e in range(8))
        torch.testing.assert_close(y[task], expected, rtol=1e-4, atol=1e-5)


def test_each_task_holds_its_own_number_of_experts():
    layer, x = core.MMoE(8, core.MLP((6,)), core.ReLURouting(2, l1_start=0.5, l1_factor=2.0)).build(D, 2), examples(64)
    with torch.no_grad():  # task 0 takes all experts, task 1 one
        for router, positive in zip(layer.routers().values(), (8, 1), strict=True):
            router.gate.weight.zero_()
            router.gate.bias.copy_(torch.where(torch.arange(8) < positive, 1.0, -1.0))
    with core.record(layer) as tape:
        layer(x)
    core.update_expert_bias(layer, tape)
    assert [float(router.l1_weight) for router in layer.routers().values()] == [1.0, 0.25]
