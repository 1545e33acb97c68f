"""Multi-task layers against their equations, each other, and the routers' own layer."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import core
from core import (
    CGC,
    FFN,
    MLP,
    PLE,
    Balance,
    DenseRouting,
    DSelectK,
    ExpertChoice,
    Hash,
    Merge,
    MMoE,
    MoEConfig,
    MultiGateConfig,
    NullExperts,
    OMoE,
    RoutingContext,
    RoutingStats,
    SoftSlots,
    SwiGLU,
    Tape,
    Threshold,
    TokenChoice,
    active_params,
    aux_loss,
    aux_losses,
    count_flops,
    moe_layers,
    record,
    update_expert_bias,
)

D, TASKS, DOMAINS = 9, 3, 4
HOME = {"expert": MLP((6,), "silu", "batch"), "feature_gate": 2, "self_gate": 2}
DENSE: dict[str, MultiGateConfig] = {
    "mmoe": MMoE(5, MLP((7, 6))),
    "omoe": OMoE(5, MLP((6,))),
    "cgc": CGC(3, MLP((6,)), 2),
    "ple": PLE(2, MLP((6,)), 2, 3),
    "ple uneven": PLE(3, MLP((7, 6)), 1, 2),
    "ple without own": PLE(3, MLP((6,)), 0, 2),
    "home mmoe": MMoE(5, **HOME),
    "home ple": PLE(2, num_task_experts=2, **HOME),
    "one self gate": CGC(3, MLP((6,)), 0, self_gate=1),
    "ffn": MMoE(4, FFN(12, bias=True)),
    "swiglu ple": PLE(2, SwiGLU(12), 1, 2),
}
DOMAIN: dict[str, MultiGateConfig] = {
    "domain mmoe": MMoE(3, MLP((6,)), num_domain_experts=2),
    "domain ple": PLE(2, MLP((6,), norm="batch"), 1, 2, num_domain_experts=1, self_gate=1),
    "domain gates": CGC(3, MLP((6,)), 1),
}
SPARSE: dict[str, MultiGateConfig] = {
    "top-k": MMoE(8, MLP((6,)), TokenChoice(2)),
    "top-k of FFN": MMoE(8, FFN(12), TokenChoice(2)),
    "top-1, batch norm": MMoE(8, MLP((6,), norm="batch"), TokenChoice(1)),
    "input gates": MMoE(8, MLP((6,)), TokenChoice(2, gates_on="input")),
    "dselect-k": MMoE(8, MLP((6,)), DSelectK(2)),
    "expert choice": MMoE(8, MLP((6,)), ExpertChoice(2.0)),
    "threshold": MMoE(8, MLP((6,)), Threshold(0.2, second="threshold")),
    "null experts": MMoE(8, MLP((6,)), NullExperts(4, num_null_experts=8)),
    "shared top-k": MMoE(8, MLP((6,)), TokenChoice(3), "shared"),
    "shared top-k of FFN": MMoE(8, FFN(12), TokenChoice(3), "shared"),
    "shared sigmoid": MMoE(8, MLP((6,)), TokenChoice(3, score_func="sigmoid", normalize=False), "shared"),
    "shared expert choice": MMoE(8, MLP((6,)), ExpertChoice(2.0), "shared"),
    "shared dselect-k": MMoE(8, MLP((6,)), DSelectK(2), "shared"),
}
ALL = DENSE | DOMAIN | SPARSE
FIXED = [n for n in ALL if n not in ("dselect-k", "threshold", "null experts", "shared dselect-k")]  # of a known cost


def build(name: str, seed: int = 0, **options) -> core.MultiGateLayer:
    """A layer whose gates and norms are away from where they start."""
    config = ALL[name] if not options else type(ALL[name])(**{**vars(ALL[name]), **options})
    torch.manual_seed(seed)
    layer = config.build(D, TASKS, DOMAINS if name in DOMAIN else 0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return layer


def context(name: str, B: int, valid_B: Tensor | None = None) -> RoutingContext | None:
    if name not in DOMAIN:
        return None if valid_B is None else RoutingContext(valid_BS=valid_B)
    ids = torch.randint(DOMAINS, (B,), generator=torch.Generator().manual_seed(3))
    return RoutingContext(domain_ids_B=ids, valid_BS=valid_B)


def examples(B: int, seed: int = 5) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


def step(layer: nn.Module, x: Tensor, known: RoutingContext | None = None, run=None) -> dict[str, Tensor]:
    """Output, auxiliary loss and all gradients of one pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with record(layer) as tape:
        y = (layer if run is None else run)(x, known)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    ((y * weight).sum() + aux_loss(tape)).backward()
    found = {"y": y.detach(), "aux": aux_loss(tape).detach(), "dx": x.grad}
    return found | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def expert(layer_experts, e: int, x: Tensor) -> Tensor:
    """Expert e of plain MLP experts, layer by layer."""
    for i in range(len(layer_experts.hidden_dims)):
        x = (x @ getattr(layer_experts, f"w_{i}")[e] + getattr(layer_experts, f"b_{i}")[e]).relu()
    return x


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


def test_a_gate_that_is_one_hot_gives_that_experts_output():
    layer = build("mmoe")
    x = examples(4).abs()
    with torch.no_grad():
        layer.router.weight.zero_()
        for task, e in enumerate((3, 0, 3)):
            layer.router.weight[task, e] = 1000.0  # on positive features the other logits are far below
    y = layer(x)
    for task, e in enumerate((3, 0, 3)):
        torch.testing.assert_close(y[task], expert(layer.experts, e, x), rtol=1e-5, atol=1e-6)


def test_cgc_equals_its_equation():
    layer, x = build("cgc"), examples(5)
    y = layer(x)
    for task in range(TASKS):
        # Experts: three shared, then two of each task.
        own = [0, 1, 2, 3 + 2 * task, 4 + 2 * task]
        gates = (x @ layer.router.weight[task].T).softmax(-1)
        expected = sum(gates[:, [i]] * expert(layer.experts, e, x) for i, e in enumerate(own))
        torch.testing.assert_close(y[task], expected, rtol=1e-5, atol=1e-6)


def test_ple_equals_its_equations():
    layer, x = build("ple"), examples(5)
    y = layer(x)
    # Two shared experts, two of each of three tasks. Level by level: inputs of the tasks and of the shared ones.
    tasks, shared = [x] * TASKS, x
    for level in range(3):
        gates, experts = layer.router[level], layer.experts[level]
        outputs = [expert(experts, e, shared) for e in (0, 1)]
        outputs += [expert(experts, 2 + 2 * k + i, tasks[k]) for k in range(TASKS) for i in range(2)]
        new = []
        for k in range(TASKS):
            own = (0, 1, 2 + 2 * k, 3 + 2 * k)
            g = (tasks[k] @ gates.weight[k].T).softmax(-1)
            new.append(sum(g[:, [i]] * outputs[e] for i, e in enumerate(own)))
        if level < 2:
            g = (shared @ gates.shared_weight.T).softmax(-1)
            shared = sum(g[:, [e]] * output for e, output in enumerate(outputs))
        else:
            assert gates.shared_weight is None
        tasks = new
    torch.testing.assert_close(y, torch.stack(tasks), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_self_gates_add_experts_outside_the_softmax(count):
    config = CGC(2, MLP((6,)), 1, self_gate=count)
    layer, plain = config.build(D, 2), CGC(2, MLP((6,)), 1).build(D, 2)
    x = examples(5)
    # Order: two shared, then of each task one in the softmax and the self-gate's.
    first = [2, 2 + 1 + count]
    with torch.no_grad():
        plain.router.weight.copy_(layer.router.weight)
        for name, p in plain.experts.named_parameters():
            p.copy_(getattr(layer.experts, name)[[0, 1, *first]])
    base, y = plain(x), layer(x)
    for task in range(2):
        logits = x @ layer.router.self_weight[task].T
        gates = logits.sigmoid() if count == 1 else logits.softmax(-1)
        added = sum(gates[:, [i]] * expert(layer.experts, first[task] + 1 + i, x) for i in range(count))
        torch.testing.assert_close(y[task], base[task] + added, rtol=1e-5, atol=1e-6)


def test_feature_gates_scale_each_experts_input():
    layer, x = build("mmoe", feature_gate=2), examples(5)
    gates = torch.stack([x @ w.T for w in layer.router.weight], 1).softmax(-1)
    outputs = []
    for e in range(5):
        scale = 2 * (x @ layer.feature_gate.down[e] @ layer.feature_gate.up[e]).sigmoid()
        outputs.append(expert(layer.experts, e, x * scale))
    expected = torch.einsum("bte,ebh->tbh", gates, torch.stack(outputs))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_feature_gates_start_as_if_they_were_not_there():
    torch.manual_seed(0)
    gated = PLE(2, MLP((6,)), 1, feature_gate=2).build(D, TASKS)
    plain = PLE(2, MLP((6,)), 1).build(D, TASKS)
    plain.load_state_dict({n: v for n, v in gated.state_dict().items() if not n.startswith("feature_gates")})
    x = examples(5)
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


def test_an_absent_domains_experts_get_no_gradient():
    layer = build("domain mmoe")
    layer(examples(4), RoutingContext(domain_ids_B=torch.tensor([0, 2, 2, 0]))).sum().backward()
    touched = layer.experts.w_0.grad.flatten(1).any(1)
    # Shared 0 to 2, then domains 0, 1, 2, 3 with two each.
    assert touched.tolist() == [True] * 3 + [True] * 2 + [False] * 2 + [True] * 2 + [False] * 2
    assert layer.router.domain.weight.grad.any(1).tolist() == [True, False, True, False]


@pytest.mark.parametrize("name", ["top-k", "top-k of FFN", "input gates", "expert choice", "threshold", "dselect-k"])
def test_each_task_of_a_sparse_layer_equals_a_layer_of_its_router(name):
    layer, x = build(name), examples(12)
    config = SPARSE[name]
    for task in range(TASKS):
        single = MoEConfig(8, config.router, config.expert, group="batch").build(D)
        single.experts.load_state_dict(layer.experts.state_dict())
        single.router.load_state_dict(layer.router[task].state_dict())
        torch.testing.assert_close(layer(x)[task], single(x), rtol=1e-5, atol=1e-6)


def test_top_k_of_all_experts_equals_the_dense_layer():
    dense = MMoE(4, MLP((6,))).build(D, TASKS)
    every = MMoE(4, MLP((6,)), TokenChoice(4, normalize=True)).build(D, TASKS)
    shared = MMoE(4, MLP((6,)), TokenChoice(4, normalize=True), "shared").build(D, TASKS)
    with torch.no_grad():
        for layer in (every, shared):
            layer.experts.load_state_dict(dense.experts.state_dict())
        for task in range(TASKS):
            every.router[task].gate.weight.copy_(dense.router.weight[task])
        # A uniform selection leaves the tasks' gates alone.
        shared.router[0].gate.weight.zero_()
        shared.router[1].weight.copy_(dense.router.weight)
    x = examples(7)
    torch.testing.assert_close(every(x), dense(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shared(x), dense(x), rtol=1e-5, atol=1e-6)


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


def test_a_shared_selection_of_one_expert_trains_its_router():
    # normalize=False: the task's gate over one expert is 1, and the sum of the router's gates is its score.
    layer = MMoE(4, MLP((6,)), TokenChoice(1), "shared").build(D, 2)
    layer(examples(6)).sum().backward()
    assert layer.router[0].gate.weight.grad.abs().sum() > 0


# How they relate.


def copied(to: nn.Module, source: dict[str, Tensor]) -> nn.Module:
    to.load_state_dict(source)
    return to


def test_cgc_without_task_experts_is_mmoe():
    cgc, x = CGC(5, MLP((7, 6)), 0).build(D, TASKS), examples(6)
    mmoe = copied(MMoE(5, MLP((7, 6))).build(D, TASKS), cgc.state_dict())
    assert_same(step(cgc, x), step(mmoe, x), rtol=0, atol=0)


def test_ple_of_one_level_is_cgc():
    x, cgc = examples(6), CGC(3, MLP((6,)), 2).build(D, TASKS)
    state = {
        n.replace("router.", "router.routers.0.").replace("experts.", "experts.0."): v
        for n, v in cgc.state_dict().items()
    }
    ple = copied(PLE(3, MLP((6,)), 2, 1).build(D, TASKS), state)
    assert torch.equal(ple(x), cgc(x))


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


@pytest.mark.parametrize("name", ["cgc", "ple", "home ple"])
def test_a_tasks_gradient_reaches_its_own_and_the_shared_experts_alone(name):
    layer, config = build(name), ALL[name]
    layer.eval()  # batch statistics would couple nothing here, but one expert's rows are all examples
    layer(examples(6))[1].square().sum().backward()
    experts = layer.experts[-1] if isinstance(layer.experts, nn.ModuleList) else layer.experts
    touched = experts.w_0.grad.flatten(1).any(1).tolist()
    own, shared = config.num_task_experts + config.self_gate, config.num_experts
    assert touched == [True] * shared + [False] * own + [True] * own + [False] * own


def test_a_tasks_gradient_reaches_its_own_gate_and_chosen_experts_alone():
    layer, x = build("top-k"), examples(6)
    with record(layer) as tape:
        y = layer(x)
    y[1].square().sum().backward()
    chosen = tape.entries[1].routing.tokens_per_expert_E > 0
    assert torch.equal(layer.experts.w_0.grad.flatten(1).any(1), chosen)
    assert [p.gate.weight.grad is not None and bool(p.gate.weight.grad.any()) for p in layer.router.routers] == [
        False,
        True,
        False,
    ]


# Fast paths, sizes, dtypes.


@pytest.mark.parametrize("B", [0, 1, 7, 100, 600])
@pytest.mark.parametrize("name", ALL)
def test_the_fast_path_equals_the_loop_in_output_and_gradients(name, B):
    # Float32 sums over 600 examples in another order: up to 2e-4 of gradients around 100.
    oracle = build(name, backend="eager")
    fast = build(name)
    assert fast.experts is not oracle.experts
    known = context(name, B)
    assert_same(step(fast, examples(B), known), step(oracle, examples(B), known), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("B", [7, 100, 600])
@pytest.mark.parametrize("selection", ["task", "shared"])
@pytest.mark.parametrize("load", ["all on one", "one is empty"])
def test_the_fast_path_equals_the_loop_at_uneven_loads(load, selection, B):
    layers = []
    for backend in ("eager", "auto"):
        config = MMoE(6, MLP((7, 6)), TokenChoice(1 if load == "all on one" else 3), selection, backend=backend)
        torch.manual_seed(0)
        layer = config.build(D, TASKS)
        with torch.no_grad():
            for router in layer.routers().values():
                if load == "all on one":
                    router.gate.weight.copy_(torch.eye(6)[4][:, None] * 20.0)
                else:
                    router.gate.weight[2] = -20.0
        layers.append(layer)
    x = examples(B).abs()
    with record(layers[1]) as tape:
        layers[1](x)
    loads = tape.entries[0].routing.tokens_per_expert_E
    assert loads.tolist() == [0, 0, 0, 0, B, 0] if load == "all on one" else loads[2] == 0
    assert_same(step(layers[1], x), step(layers[0], x), rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name):
    # In evaluation: batch norm's statistics stay. test_mlp_experts.py has them in training.
    layer = build(name).double().eval()
    known = context(name, 3)
    names = [n for n, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, known))

    assert torch.autograd.gradcheck(run, (examples(3).double().requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_shapes(name):
    layer = build(name).eval()
    width = ALL[name].out_dim(D)
    assert width == (D if "ffn" in name.lower() or "swiglu" in name else 6)
    x = examples(12)
    known = context(name, 12)
    flat = layer(x, known)
    assert flat.shape == (TASKS, 12, width)
    if name not in DOMAIN:  # an id a sequence
        torch.testing.assert_close(layer(x.reshape(3, 4, D)), flat.reshape(TASKS, 3, 4, width), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer(x.reshape(2, 2, 3, D)).flatten(1, 3), flat, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="at least"):
        layer(torch.randn(D), known)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ALL)
def test_padding_may_hold_nan_and_is_zero_and_nowhere(name, training):
    layer = build(name).train(training)
    other = copy.deepcopy(layer)
    valid = torch.tensor([True, True, False, True, False, True, True])
    x = examples(7)
    known = context(name, 7, valid)
    domains = None if known.domain_ids_B is None else known.domain_ids_B[valid]
    if known.domain_ids_B is not None:
        known = RoutingContext(valid, domain_ids_B=known.domain_ids_B.masked_fill(~valid, 99))
    found = step(layer, x.masked_fill(~valid[:, None], torch.nan), known)
    kept = step(other, x[valid], None if domains is None else RoutingContext(domain_ids_B=domains))
    assert not found["y"][:, ~valid].any()
    assert not found["dx"][~valid].any()
    torch.testing.assert_close(found["aux"], kept["aux"], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found["y"][:, valid].isfinite(), torch.ones_like(kept["y"], dtype=torch.bool))
    if "null" not in name:
        torch.testing.assert_close(found["y"][:, valid], kept["y"], rtol=1e-4, atol=1e-5)
    assert all(value.isfinite().all() for value in found.values())
    assert_same(dict(layer.named_buffers()), dict(other.named_buffers()))


@pytest.mark.parametrize("name", ALL)
def test_under_autocast_gates_stay_in_float32(name):
    layer = build(name).eval()
    x, known = examples(20), context(name, 20)
    with record(layer) as tape:
        exact = layer(x, known)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x, known)
    assert y.dtype == torch.bfloat16
    half = len(tape) // 2
    for before, cast in zip(tape.entries[:half], tape.entries[half:], strict=True):
        assert cast.routing.scores_TE.dtype == torch.float32
        if "level1" not in cast.name and "level2" not in cast.name:  # those see inputs in bfloat16
            assert torch.equal(cast.routing.scores_TE, before.routing.scores_TE)
    # A few products rounded to 8 bits, 2^-8 each, of the largest output.
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("name", ["mmoe", "cgc", "home ple", "domain mmoe", "top-k", "shared top-k"])
def test_a_layer_in_bfloat16(name):
    layer = build(name).bfloat16()
    y = layer(examples(6).bfloat16(), context(name, 6))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


# State.


@pytest.mark.parametrize("name", ALL)
def test_copies_pickles_and_states_are_the_same_layer(name):
    layer = build(name)
    x, known = examples(6), context(name, 6)
    layer(x, known)  # moves the statistics of batch norm
    layer.eval()
    y = layer(x, known)
    assert torch.equal(copy.deepcopy(layer)(x, known), y)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, known), y)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = build(name, seed=1).eval()
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(x, known), y)


@pytest.mark.parametrize("name", ALL)
def test_a_config_is_plain_dicts_and_back(name):
    config = ALL[name]
    plain = json.loads(json.dumps(config.to_dict()))
    assert plain["class_path"] == f"core.{type(config).__name__}"
    assert MultiGateConfig.from_dict(plain) == config
    assert type(config).from_dict(plain["init_args"]) == config


def test_a_dict_of_another_class_is_refused():
    with pytest.raises(ValueError, match=r"core\.TokenChoice' is not a multi-gate config"):
        MultiGateConfig.from_dict({"class_path": "core.TokenChoice", "init_args": {}})
    with pytest.raises(ValueError, match="not a multi-gate config"):
        PLE.from_dict(MMoE().to_dict())
    with pytest.raises(ValueError, match="CGC has no field 'router'"):
        CGC.from_dict({"router": None})


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["mmoe", "cgc", "home ple", "domain mmoe", "top-k", "shared top-k"])
def test_the_compiled_layer_equals_eager(name):
    layer = build(name)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x, known = examples(6), context(name, 6)
    other = copy.deepcopy(layer)
    assert_same(step(layer, x, known, compiled), step(other, x, known), rtol=1e-5, atol=1e-5)
    assert_same(dict(layer.named_buffers()), dict(other.named_buffers()))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["mmoe", "omoe", "home ple", "domain ple", "top-k", "shared top-k"])
def test_the_exported_layer_serves_other_batches(name):
    layer = build(name).eval()
    known = context(name, 6)
    batch = torch.export.Dim("batch", min=1, max=512)
    shapes = {"x": {0: batch}}
    model: nn.Module = layer
    if name in DOMAIN:

        class WithDomains(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer

            def forward(self, x: Tensor, domains: Tensor) -> Tensor:
                return self.layer(x, RoutingContext(domain_ids_B=domains))

        model, shapes = WithDomains(), {"x": {0: batch}, "domains": {0: batch}}
    args = (examples(6),) if known is None else (examples(6), known.domain_ids_B)
    program = torch.export.export(model, args, dynamic_shapes=shapes).module()
    for B in (1, 6, 40):
        known = context(name, B)
        args = (examples(B),) if known is None else (examples(B), known.domain_ids_B)
        torch.testing.assert_close(program(*args), layer(examples(B), known), rtol=1e-5, atol=1e-5)


# Costs.


@pytest.mark.parametrize("num_tasks", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_parameters_equal_the_formulas(name, num_tasks):
    config, domains = ALL[name], DOMAINS if name in DOMAIN else 0
    layer = config.build(D, num_tasks, domains)
    assert sum(p.numel() for p in layer.parameters()) == config.num_params(D, num_tasks, domains)
    assert active_params(layer) == config.active_params(D, num_tasks, domains)


@pytest.mark.parametrize("name", FIXED)
def test_counted_flops_equal_the_formula(name):
    config, domains = ALL[name], DOMAINS if name in DOMAIN else 0
    counted = count_flops(build(name).eval(), examples(16), context(name, 16))
    assert counted == 16 * config.flops_per_token(D, TASKS, domains, batch_size=16)


@pytest.mark.parametrize("name", ["dselect-k", "threshold", "null experts", "shared dselect-k"])
def test_only_chosen_rows_are_computed_and_counted(name):
    config, layer, x = ALL[name], build(name).eval(), examples(16)
    with record(layer) as tape:
        layer(x)
    routed = [e for e in tape.entries if not isinstance(e.routing, DenseRouting)]
    rows = sum(int(e.routing.tokens_per_expert_E.sum()) for e in routed)
    gates = len(routed) * config.router.flops_per_token(D, 8) * 16
    gates += 2 * D * 8 * TASKS * 16 if config.selection == "shared" else 0
    assert 0 < rows < 8 * 16 * len(routed)
    assert count_flops(layer, x) == gates + rows * config.expert.flops_per_row(D)


def test_costs_by_hand():
    # MMoE, D=9, 3 tasks, 5 experts of 9 -> 7 -> 6. Parameters: experts 5 * (9 * 7 + 7 + 7 * 6 + 6) = 590, gates 135.
    # FLOPs: experts 2 * 5 * (63 + 42) = 1050, gates 2 * 135 = 270, weighted sums 2 * 3 * 5 * 6 = 180.
    mmoe = ALL["mmoe"]
    assert mmoe.num_params(9, 3) == mmoe.active_params(9, 3) == 725
    assert mmoe.flops_per_token(9, 3) == 1500
    # CGC: 3 shared and 2 for each of 3 tasks: 9 experts of 9 * 6 + 6, three gates over 5.
    cgc = ALL["cgc"]
    assert cgc.num_params(9, 3) == 9 * 60 + 3 * 5 * 9
    assert cgc.flops_per_token(9, 3) == 2 * (9 * 54 + 15 * 9 + 15 * 6)
    # Sparse: 8 experts of 60; each of 3 tasks routes (2 * 9 * 8) and computes 2 rows of 2 * 54.
    sparse = ALL["top-k"]
    assert sparse.num_params(9, 3) == 8 * 60 + 3 * 72
    assert sparse.active_params(9, 3) == 6 * 60 + 3 * 72
    assert sparse.flops_per_token(9, 3) == 3 * (144 + 2 * 108)
    # One selection for all: one route, 3 rows, and three gates of 2 * 9 * 8.
    assert ALL["shared top-k"].flops_per_token(9, 3) == 144 + 3 * 108 + 3 * 144
    # Two of each domain's experts (of 4 domains) beside 3: 11 experts held, 5 taken; gates over 5 and 4 vectors.
    domain = ALL["domain mmoe"]
    assert domain.num_params(9, 3, 4) == 11 * 60 + 3 * 5 * 9 + 4 * 9
    assert domain.active_params(9, 3, 4) == 5 * 60 + 3 * 5 * 9 + 4 * 9


def test_many_small_experts_cost_a_part_of_the_dense_layer():
    # E=64 of 16, K=4, D=128: dense 64 rows of 4096 FLOPs; each task 4 rows and a gate of 2 * 128 * 64.
    dense, sparse = MMoE(64), MMoE(64, router=TokenChoice(4))
    assert dense.flops_per_token(128, 2) == 64 * 4096 + 2 * 2 * 64 * (128 + 16)
    assert sparse.flops_per_token(128, 2) == 2 * (4 * 4096 + 2 * 128 * 64)


# The tape.


class Net(nn.Module):
    """A model with a layer inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.shared = layer
        self.heads = nn.ModuleList(nn.Linear(6, 1) for _ in range(TASKS))

    def forward(self, x: Tensor, known: RoutingContext | None = None) -> Tensor:
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
        ("top-k", ["task0", "task1", "task2"]),
        ("shared top-k", ["selection", "task0", "task1", "task2"]),
    ],
)
def test_each_gate_has_an_entry(name, expected):
    model = Net(build(name))
    assert list(moe_layers(model)) == ["shared"]
    with record(model) as tape:
        model(examples(5))
    assert [e.name for e in tape.entries] == [f"shared.{end}" for end in expected]
    assert list(RoutingStats.from_tape(tape).layers) == [f"shared.{end}" for end in expected]
    model(examples(5))
    assert len(tape) == len(expected)  # nothing is added after the block


def test_dense_entries_hold_the_gates_and_the_experts_names():
    layer, x = build("cgc"), examples(5)
    with record(layer) as tape:
        layer(x)
    first, second, _ = tape.entries
    gates = (x @ layer.router.weight[1].T).softmax(-1)
    torch.testing.assert_close(second.routing.scores_TE, gates)
    assert first.routing.gates_BtE.shape == (5, TASKS, 5)
    assert first.routing.expert_names == ("shared0", "shared1", "shared2", "task0.0", "task0.1")
    assert second.routing.expert_names == ("shared0", "shared1", "shared2", "task1.0", "task1.1")
    assert second.routing.scores_TE.requires_grad
    assert not second.detach().routing.gates_BtE.requires_grad


def test_names_of_a_shared_gates_experts():
    with record(layer := build("domain ple")) as tape:
        layer(examples(5), context("domain ple", 5))
    names = {e.name: e.routing for e in tape.entries}
    shared = names["level0.shared"]
    # Self-gates are in nobody's softmax.
    assert shared.expert_names == ("shared0", "shared1", "task0.0", "task1.0", "task2.0", "domain.0")
    assert shared.scores_TE.shape == (5, 6)
    assert names["level1.task2"].expert_names == ("shared0", "shared1", "task2.0", "domain.0")


def test_figures_of_a_dense_gate_by_hand():
    # Gates of two real examples and a padded one: masses 0.9 + 0.5 = 1.4, 0.1 + 0.5 = 0.6 and 0 of 2.
    gates = torch.tensor([[[0.9, 0.1, 0.0]], [[0.5, 0.5, 0.0]], [[0.0, 0.0, 0.0]]])
    routing = DenseRouting(gates, 0, 3, valid_T=torch.tensor([True, True, False]))
    entry = core.Entry("l", routing, None, Balance())
    stats = RoutingStats.from_tape(Tape((entry, entry))).layers["l"]
    torch.testing.assert_close(stats.mean_gates, torch.tensor([0.7, 0.3, 0.0], dtype=torch.float64))
    assert stats.num_tokens == 4
    assert stats.load_imbalance == pytest.approx(0.7 * 3)
    assert stats.dead_experts == 1
    assert stats.drop_rate == 0
    # -(0.7 log 0.7 + 0.3 log 0.3) = 0.61086; exp of it is 1.842 experts of 3.
    assert stats.utilisation == pytest.approx(1.842 / 3, abs=2e-4)
    # Entropies 0.32508 and 0.69315, their mean over log 3.
    assert stats.entropy == pytest.approx(0.509117 / 1.098612, abs=1e-5)


def test_mean_gates_of_a_sparse_router_by_hand():
    layer = MMoE(3, MLP((6,)), TokenChoice(2, normalize=False)).build(2, 1)
    with torch.no_grad():
        # Logits (log 2, log 1, log 1) at x = (1, 0), (0, log 4, 0) at x = (0, 1).
        layer.router[0].gate.weight.copy_(torch.tensor([[2.0, 1.0], [1.0, 4.0], [1.0, 1.0]]).log() + 0.0)
        layer.router[0].gate.weight[2] -= 1e-3  # breaks the ties
    with record(layer) as tape:
        layer(torch.eye(2))
    stats = RoutingStats.from_tape(tape).layers["task0"]
    # Scores 2/4, 1/4 of the first example and 1/6, 4/6 of the second, over two examples.
    torch.testing.assert_close(
        stats.mean_gates, torch.tensor([1 / 3, 11 / 24, 0], dtype=torch.float64), rtol=0, atol=1e-3
    )
    assert stats.chosen_per_expert.tolist() == [2, 2, 0]


def test_the_balance_losses_are_each_gates_own():
    layer = build("top-k", balance=Balance(load_balancing=0.5, router_z=0.25))
    x = examples(12)
    with record(layer) as tape:
        layer(x)
    expected = 0.0
    for task in range(TASKS):
        single = MoEConfig(8, TokenChoice(2), MLP((6,)), balance=layer.balance).build(D)
        single.router.load_state_dict(layer.router[task].state_dict())
        with record(single) as own:
            single(x)
        expected = expected + aux_loss(own)
    torch.testing.assert_close(aux_loss(tape), expected)


def test_dense_gates_have_no_loss_unless_asked():
    for name in DENSE:
        with record(layer := build(name)) as tape:
            layer(examples(5))
        assert aux_loss(tape) == 0
        assert aux_losses(tape).terms == {}


def test_the_losses_of_dense_gates_by_hand():
    # Two experts; gates of task 0: (1/2, 1/2) on both examples, of task 1: (3/4, 1/4).
    layer = MMoE(2, MLP((1,)), balance=Balance(router_z=1.0, importance=1.0)).build(1, 2)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[[0.0], [0.0]], [[3.0], [1.0]]]).clamp_min(1.0).log())
    with record(layer) as tape:
        layer(torch.ones(2, 1))
    found = aux_losses(tape)
    # Importance: 0, and masses 1.5, 0.5: variance 0.25 over mean^2 1. z: log(2)^2 and log(4)^2.
    z = (0.693147**2 + 1.386294**2) / 2
    torch.testing.assert_close(found.terms["importance"], torch.tensor(0.125))
    torch.testing.assert_close(found.terms["router_z"], torch.tensor(z))
    torch.testing.assert_close(found.total, torch.tensor(0.25 + 2 * z))


def test_each_tasks_bias_moves_by_its_own_load():
    layer = MMoE(4, MLP((6,)), TokenChoice(1, expert_bias=True, bias_update_rate=0.5)).build(D, 2)
    model = Net(layer)
    with torch.no_grad():
        for task, e in enumerate((1, 3)):
            layer.router[task].gate.weight.copy_(torch.eye(4)[e][:, None] * 5.0)
    with record(model) as tape:
        layer(examples(8).abs())
    update_expert_bias(model, tape)
    # All 8 examples on one expert: it falls, the others (mean load 2, theirs 0) rise.
    assert layer.router[0].expert_bias.tolist() == [0.5, -0.5, 0.5, 0.5]
    assert layer.router[1].expert_bias.tolist() == [0.5, 0.5, 0.5, -0.5]
    model.eval()
    update_expert_bias(model, tape)
    assert layer.router[1].expert_bias.tolist() == [0.5, 0.5, 0.5, -0.5]


def test_annealing_routers_count_the_steps():
    layer = MMoE(4, MLP((6,)), core.DenseToSparse(anneal_steps=10)).build(D, 2)
    with record(layer) as tape:
        layer(examples(8))
    update_expert_bias(layer, tape)
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
    assert_sum = layer(x).sum()
    assert assert_sum.isfinite()


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
    with record(layer) as tape:
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


# Bad input.


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MMoE(0), "num_experts=0 is not at least 1"),
        (lambda: CGC(2, num_task_experts=-1), "num_task_experts=-1 is negative"),
        (lambda: PLE(num_levels=0), "num_levels=0 is not at least 1"),
        (lambda: MMoE(expert_dropout=1.0), "expert_dropout=1.0 is not in"),
        (lambda: MMoE(self_gate=-1), "self_gate=-1 is negative"),
        (lambda: MMoE(backend="gpu"), "backend='gpu' is not one of"),
        (lambda: MMoE(init_scale=0.0), "init_scale=0.0 is not a positive number"),
        (lambda: MMoE(selection="shared"), "selection='shared' needs a router"),
        (lambda: MMoE(4, router=TokenChoice(2), selection="both"), "selection='both' is not one of task, shared"),
        (lambda: MMoE(4, router=TokenChoice(9)), "top_k=9 exceeds num_experts=4"),
        (lambda: MMoE(4, router=SoftSlots()), "SoftSlots .* mixes: not for MMoE"),
        (lambda: MMoE(4, router=Merge()), "Merge.* mixes: not for MMoE"),
        (lambda: MMoE(4, router=TokenChoice(2), feature_gate=2), "feature_gate=2 does not apply with a router"),
        (lambda: MMoE(4, router=TokenChoice(2), expert_dropout=0.1), "expert_dropout=0.1 does not apply"),
        (lambda: MMoE(4, router=TokenChoice(2, gates_on="input"), selection="shared"), "gates_on='input'"),
        (lambda: MMoE(4, balance=Balance(load_balancing=0.5)), "load_balancing=0.5 does not apply to MMoE"),
        (lambda: MMoE(4, router=TokenChoice(2), balance=Balance(adaptive=True)), "adaptive=True"),
        (lambda: MMoE(4).build(D, 0), "num_tasks=0 is not at least 1"),
        (lambda: MMoE(4).build(0, 1), "dim=0 is not at least 1"),
        (lambda: MMoE(4).build(D, 1, -1), "num_domains=-1 is negative"),
        (lambda: MMoE(4, num_domain_experts=1).build(D, 2), "num_domain_experts=1 needs num_domains"),
        (lambda: MMoE(4, num_domain_experts=1).num_params(D, 2), "num_domain_experts=1 needs num_domains"),
    ],
)
def test_bad_options_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "known, message",
    [
        (None, "needs context.domain_ids_B, which is None"),
        (RoutingContext(), "needs context.domain_ids_B, which is None"),
        (RoutingContext(domain_ids_B=torch.tensor([0, 1])), r"shape \(2,\)"),
        (RoutingContext(domain_ids_B=torch.tensor([0, 1, 4])), r"holds 4, which is not in range\(4\)"),
        (RoutingContext(domain_ids_B=torch.tensor([0, 1, -1])), "holds -1"),
        (RoutingContext(valid_BS=torch.ones(2, dtype=torch.bool)), r"valid_BS has shape \(2,\)"),
        (RoutingContext(valid_BS=torch.ones(3)), "it must be bool"),
    ],
)
@pytest.mark.parametrize(
    "config", [MMoE(3, MLP((6,)), num_domain_experts=1), MMoE(3, MLP((6,)), TokenChoice(2))], ids=str
)
def test_a_bad_context_is_refused(config, known, message):
    layer = config.build(D, TASKS, DOMAINS)
    with pytest.raises(ValueError, match=message):
        layer(examples(3), known)


def test_a_router_that_needs_ids_says_so():
    layer = MMoE(4, MLP((6,)), Hash(10)).build(D, 2)
    with pytest.raises(ValueError, match="token_ids_BS"):
        layer(examples(3))
    layer(examples(3), RoutingContext(token_ids_BS=torch.tensor([[1], [2], [9]])))
