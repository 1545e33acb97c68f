"""Multi-task layers against their equations, each other, and the routers' own layer."""

from __future__ import annotations

import pytest
import torch
from gated import ALL, SPARSE, TASKS, D, assert_same_with_gradients, build, copied, examples, expert
from stepped import assert_same, step
from torch import nn

import core
from core import CGC, MLP, PLE, MMoE, MoEConfig, OMoE, RoutingContext, TokenChoice

# The equations.


def test_mmoe_by_hand():
    # Two experts of one feature on x = (1, 2): relu(1 * 1 + 0 * 2) = 1 and relu(0 * 1 + 3 * 2 + 1) = 7.
    # Task 0 has logits (0, 0): (1 + 7) / 2 = 4. Task 1 has (log 3, 0), gates 3/4 and 1/4: 0.75 + 1.75 = 2.5.
    layer = MMoE(2, MLP((1,))).build(2, 2)
    with torch.no_grad():
        layer.experts.w_0.copy_(torch.tensor([[[1.0], [0.0]], [[0.0], [3.0]]]))
        layer.experts.b_0.copy_(torch.tensor([[0.0], [1.0]]))
        layer.router.weight.copy_(torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 0.0]]]).log1p())
        layer.router.weight[1, 0, 0] = torch.tensor(3.0).log()
    torch.testing.assert_close(layer(torch.tensor([[1.0, 2.0]])).flatten(), torch.tensor([4.0, 2.5]))


def own_experts(config: CGC) -> list[range]:
    """Return the numbers of each task's own experts within its level; those of its self-gate are left out."""
    counts, first, own = config.num_task_experts, config.num_experts, []
    for count in counts if isinstance(counts, tuple) else (counts,) * TASKS:
        own.append(range(first, first + count))
        first += count + config.self_gate
    return own


def gate_rows(gates, own: list[range], num_shared: int) -> list[torch.Tensor]:
    """Return each task's rows of the gates' weights, whether they are stacked or one after another."""
    return list(gates.weight.flatten(0, -2).split([num_shared + len(experts) for experts in own]))


@pytest.mark.parametrize("name", ["cgc", "uneven cgc"])
def test_cgc_equals_its_equation(name):
    layer, x, own = build(name), examples(5), own_experts(ALL[name])
    y, rows = layer(x), gate_rows(layer.router, own, 3)
    for task in range(TASKS):
        # Experts: three shared, then the task's own.
        gates = (x @ rows[task].T).softmax(-1)
        expected = sum(gates[:, [i]] * expert(layer.experts, e, x) for i, e in enumerate((0, 1, 2, *own[task])))
        torch.testing.assert_close(y[task], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ple", "uneven ple"])
def test_ple_equals_its_equations(name):
    layer, x, own = build(name), examples(5).requires_grad_(), own_experts(ALL[name])
    y = layer(x)
    # Two shared experts, and each task's own. Level by level: inputs of the tasks and of the shared ones.
    tasks, shared = [x] * TASKS, x
    for level in range(3):
        gates, experts = layer.router[level], layer.experts[level]
        rows, biases = gate_rows(gates, own, 2), [0.0] * TASKS
        if gates.bias is not None:
            biases = gates.bias.flatten().split([len(w) for w in rows])
        outputs = [expert(experts, e, shared) for e in (0, 1)]
        outputs += [expert(experts, e, tasks[k]) for k in range(TASKS) for e in own[k]]
        new = []
        for k in range(TASKS):
            g = (tasks[k] @ rows[k].T + biases[k]).softmax(-1)
            new.append(sum(g[:, [i]] * outputs[e] for i, e in enumerate((0, 1, *own[k]))))
        if level < 2:
            logits = shared @ gates.shared_weight.T
            g = (logits if gates.shared_bias is None else logits + gates.shared_bias).softmax(-1)
            shared = sum(g[:, [e]] * output for e, output in enumerate(outputs))
        else:
            assert gates.shared_weight is None
        tasks = new
    assert_same_with_gradients(layer, x, y, torch.stack(tasks))


def test_a_list_of_equal_numbers_is_that_number():
    one, listed = (CGC(3, MLP((6,)), own).build(D, TASKS) for own in (2, (2, 2, 2)))
    copied(listed, one.state_dict())
    assert_same(step(one, examples(6)), step(listed, examples(6)), rtol=0, atol=0)


def test_uneven_self_gates_and_domains_equal_their_equation():
    # Two shared experts; own, self-gate's: task 0 has 1 and 1, task 1 none and 1, task 2 has 2 and 1; then 2 a domain.
    config = CGC(2, MLP((6,)), (1, 0, 2), num_domain_experts=2, self_gate=1)
    torch.manual_seed(0)
    layer, x, domains = config.build(D, TASKS, 3), examples(4), [2, 0, 1, 2]
    y, own = layer(x, RoutingContext(domain_ids_B=torch.tensor(domains))), own_experts(config)
    assert own == [range(2, 3), range(4, 4), range(5, 7)]
    rows = layer.router.weight.split([5, 4, 6])
    for b, d in enumerate(domains):
        for k in range(TASKS):
            ids = (0, 1, *own[k], 8 + 2 * d, 9 + 2 * d)
            outputs = torch.stack([expert(layer.experts, e, x[b]) for e in ids])
            switch = (layer.router.self_weight[k, 0] @ x[b]).sigmoid()
            expected = (rows[k] @ x[b]).softmax(-1) @ outputs + switch * expert(layer.experts, own[k].stop, x[b])
            torch.testing.assert_close(y[k, b], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [MMoE, OMoE, CGC, PLE])
def test_gates_with_a_hidden_layer_and_biases_equal_their_equation(kind):
    options = {"num_task_experts": 1} if issubclass(kind, CGC) else {}
    config = kind(2, MLP((6,)), **options, gate_hidden_dims=(5,), gate_bias=True)
    layer, x = config.build(D, 2), examples(4)
    assert config.num_params(D, 2) == sum(p.numel() for p in layer.parameters())
    assert config.flops_per_token(D, 2) * 4 == core.count_flops(layer, x)
    gates = layer.router[0] if kind is PLE else layer.router
    with torch.no_grad():
        for bias in (gates.bias, gates.shared_bias):
            if bias is not None:
                bias.normal_()
    logits = gates(x[None])
    for k in range(gates.weight.shape[0]):
        hidden = (x @ gates.hidden_weight_0[k] + gates.hidden_bias_0[k]).relu()
        torch.testing.assert_close(logits.task_TtE[:, k], hidden @ gates.weight[k].T + gates.bias[k])
    if kind is PLE:  # the shared representation's gate is the last
        hidden = (x @ gates.hidden_weight_0[2] + gates.hidden_bias_0[2]).relu()
        torch.testing.assert_close(logits.shared_TE, hidden @ gates.shared_weight.T + gates.shared_bias)
        assert layer.router[1].shared_weight is None
    step(layer, x)
    assert all(p.grad is not None for p in layer.parameters())


def test_feature_gates_scale_each_experts_input():
    layer, x = build("mmoe", feature_gate=2), examples(5)
    gates = torch.stack([x @ w.T for w in layer.router.weight], 1).softmax(-1)
    outputs = []
    for e in range(5):
        scale = 2 * (x @ layer.feature_gate.down[e] @ layer.feature_gate.up[e]).sigmoid()
        outputs.append(expert(layer.experts, e, x * scale))
    expected = torch.einsum("bte,ebh->tbh", gates, torch.stack(outputs))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    gated = PLE(2, MLP((6,)), 1, feature_gate=2).build(D, TASKS)  # starts as if they were not there
    state = {n: v for n, v in gated.state_dict().items() if not n.startswith("feature_gates")}
    plain = copied(PLE(2, MLP((6,)), 1).build(D, TASKS), state)
    torch.testing.assert_close(gated(x), plain(x), rtol=1e-5, atol=1e-6)


def test_domain_experts_compute_their_domains_examples():
    # Three shared experts; those of domain d are number 3 + 2 d and 4 + 2 d.
    layer, x = build("domain mmoe"), examples(6)
    domains = torch.tensor([3, 0, 0, 2, 3, 3])
    y = layer(x, RoutingContext(domain_ids_B=domains))
    for b, d in enumerate(domains.tolist()):
        seen = x[b] + layer.router.domain.weight[d]
        outputs = torch.stack([expert(layer.experts, e, x[b]) for e in (0, 1, 2, 3 + 2 * d, 4 + 2 * d)])
        for task in range(TASKS):
            gates = (layer.router.weight[task] @ seen).softmax(-1)
            torch.testing.assert_close(y[task, b], gates @ outputs, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    # Domain 1 is absent: its experts 5 and 6 get no gradient.
    assert layer.experts.w_0.grad.flatten(1).any(1).tolist() == [e not in (5, 6) for e in range(11)]
    assert layer.router.domain.weight.grad.any(1).tolist() == [True, False, True, True]


@pytest.mark.parametrize("name", ["top-k", "top-k of FFN", "input gates", "expert choice", "threshold", "dselect-k"])
def test_each_task_of_a_sparse_layer_equals_a_layer_of_its_router(name):
    layer, x = build(name), examples(12)
    config = SPARSE[name]
    for task in range(TASKS):
        single = MoEConfig(8, config.router, config.expert, group="batch").build(D)
        single.experts.load_state_dict(layer.experts.state_dict())
        single.router.load_state_dict(layer.router[task].state_dict())
        torch.testing.assert_close(layer(x)[task], single(x), rtol=1e-5, atol=1e-6)


def test_a_shared_selection_is_weighted_by_each_task():
    layer, x = build("shared sigmoid"), examples(5)
    chosen = (x @ layer.router[0].gate.weight.T).sigmoid().topk(3, -1)
    for b in range(5):
        p, ids = chosen.values[b], chosen.indices[b]
        outputs = torch.stack([expert(layer.experts, int(e), x[b]) for e in ids])
        for task in range(TASKS):
            weights = p * (layer.router[1].weight[task, ids] @ x[b]).exp()
            expected = p.sum() * weights / weights.sum() @ outputs
            torch.testing.assert_close(layer(x)[task, b], expected, rtol=1e-5, atol=1e-5)
    # normalize=False: the task's gate over one expert is 1, and the sum of the router's gates is its score.
    layer = MMoE(4, MLP((6,)), TokenChoice(1), "shared").build(D, 2)
    layer(examples(6)).sum().backward()
    assert layer.router[0].gate.weight.grad.abs().sum() > 0
    for options in ({"gate_hidden_dims": (4,)}, {"gate_bias": True}):
        with pytest.raises(ValueError, match="does not apply with a router"):
            MMoE(4, router=TokenChoice(2), **options)


# How they relate.


def test_mmoe_of_equal_gates_is_omoe_is_a_dense_mixture():
    x, omoe = examples(6), build("omoe")
    mmoe = MMoE(5, MLP((6,))).build(D, TASKS)
    mixture = MoEConfig(5, core.Dense(), MLP((6,))).build(D)
    with torch.no_grad():
        mmoe.router.weight.copy_(omoe.router.weight.expand(TASKS, -1, -1))
        mixture.router.gate.weight.copy_(omoe.router.weight[0])
    for layer in (mmoe, mixture):
        layer.experts.load_state_dict(omoe.experts.state_dict())
    torch.testing.assert_close(omoe(x), mmoe(x))
    torch.testing.assert_close(omoe(x), mixture(x).expand(TASKS, -1, -1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cgc", "ple", "home ple", "uneven ple", "uneven home ple"])
def test_a_tasks_gradient_reaches_its_own_and_the_shared_experts_alone(name):
    layer, config = build(name), ALL[name]
    layer.eval()  # batch statistics would couple nothing here, but one expert's rows are all examples
    layer(examples(6))[1].square().sum().backward()
    experts = layer.experts[-1] if isinstance(layer.experts, nn.ModuleList) else layer.experts
    touched = experts.w_0.grad.flatten(1).any(1).tolist()
    own = own_experts(config)[1]
    reached = {*range(config.num_experts), *range(own.start, own.stop + config.self_gate)}
    assert touched == [e in reached for e in range(len(touched))]
