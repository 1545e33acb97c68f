"""Experts of several layers against modules of torch, and the fast paths against the loop."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from core import MLP, Experts, MoEConfig, Rows, TokenChoice
from core.experts import MLPExperts

ACTIVATION = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
CONFIGS = [
    MLP(),
    MLP((12, 10), "gelu"),
    MLP((12,), "silu", norm="batch"),
    MLP((12, 10, 6), "silu", norm="batch"),
    MLP((12, 10), "relu", norm="layer"),
]
LAYERS = [MLP((12, 10)), MLP((12,), "silu", norm="batch"), MLP((12,), norm="layer")]
BACKENDS = ["eager", "cpu", "grouped", "triton"]
E, D = 4, 8


def network(experts: MLPExperts, e: int) -> nn.Sequential:
    """Expert ``e`` of modules of torch, with its weights and statistics."""
    modules: list[nn.Module] = []
    for i, width in enumerate(experts.hidden_dims):
        w, b = getattr(experts, f"w_{i}"), getattr(experts, f"b_{i}")
        linear = nn.Linear(w.shape[1], width, bias=b is not None)
        copies = [(linear.weight, w[e].t()), *([(linear.bias, b[e])] if b is not None else [])]
        modules.append(linear)
        if experts.norm is not None:
            norm = nn.BatchNorm1d(width) if experts.norm == "batch" else nn.LayerNorm(width)
            modules.append(norm)
            copies += [(norm.weight, getattr(experts, f"norm_weight_{i}")[e])]
            copies += [(norm.bias, getattr(experts, f"norm_bias_{i}")[e])]
            if experts.norm == "batch":
                copies += [(getattr(norm, n), getattr(experts, f"{n}_{i}")[e]) for n in ("running_mean", "running_var")]
        modules.append(ACTIVATION[experts.activation]())
        with torch.no_grad():
            for to, value in copies:
                to.copy_(value)
    return nn.Sequential(*modules).train(experts.training)


def build(config: MLP, backend: str = "auto", num_experts: int = E) -> MLPExperts:
    """Experts with norms away from where they start."""
    experts = config.build(num_experts, D)
    experts.backend = backend
    with torch.no_grad():
        for name, tensor in [*experts.named_parameters(), *experts.named_buffers()]:
            if "norm" in name or "running" in name:
                tensor.add_(torch.rand_like(tensor))
    return experts


def rows_of(x: Tensor, counts: list[int], tail: int = 0) -> Rows:
    """Each expert takes the next ``counts`` of the tokens; ``tail`` rows that nobody computes follow."""
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    assert len(x) == sum(counts) + tail
    return Rows(x, torch.arange(len(x)), offsets, torch.ones(len(x)), len(x))


def gradients(experts: MLPExperts, x: Tensor, run) -> dict[str, Tensor]:
    """Output, all gradients and buffers of one pass."""
    experts.zero_grad()
    x = x.clone().requires_grad_()
    y = run(experts, x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    (y * weight).sum().backward()
    actual = {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in experts.named_parameters()}
    return actual | {n: b.clone() for n, b in experts.named_buffers()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4, atol: float = 2e-5) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_each_equals_networks_of_torch_modules(config, training):
    experts = build(config).train(training)
    networks = [network(experts, e) for e in range(E)]
    for _ in range(3):  # running statistics move in training
        x = torch.randn(9, D)
        actual = experts(x, "each")
        expected = torch.stack([net(x) for net in networks], 1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    if config.norm == "batch":
        for e, net in enumerate(networks):
            for name in ("running_mean", "running_var"):
                expected = getattr(net[1], name)
                torch.testing.assert_close(getattr(experts, f"{name}_0")[e], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config, training, backend",
    [(c, t, b) for i, c in enumerate(CONFIGS) for t in (True, False) for b in (BACKENDS[i % 3], BACKENDS[-1 - i % 2])],
    ids=str,
)
def test_rows_equal_networks_of_torch_modules(config, training, backend):
    experts = build(config, backend).train(training)
    networks = [network(experts, e) for e in range(E)]
    x = torch.randn(13, D)
    out = experts(rows_of(x, [4, 0, 6, 2], tail=1))
    assert (out.weighted, out.combined) == (False, False)
    expected = torch.cat(
        (networks[0](x[:4]), networks[2](x[4:10]), networks[3](x[10:12]), torch.zeros(1, out.x.shape[1]))
    )
    torch.testing.assert_close(out.x, expected, rtol=1e-4, atol=1e-5)
    if config.norm == "batch":
        for e in (0, 1, 2, 3):
            torch.testing.assert_close(experts.running_var_0[e], networks[e][1].running_var, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_rows_equal_the_loop_in_output_gradients_and_statistics(config, backend):
    # Float32 sums over 100 rows in another order: 2e-5 of numbers around 1, 1e-4 of the larger ones.
    for counts in ([0, 0, 0, 0], [1, 0, 0, 0], [2, 0, 4, 1], [25, 25, 25, 25], [25, 0, 50, 25], [0, 0, 100, 0]):
        oracle = build(config, "eager")
        fast = copy.deepcopy(oracle)
        fast.backend = backend

        def run(experts: MLPExperts, x: Tensor, counts: list[int] = counts) -> Tensor:
            return experts(rows_of(x, counts)).x

        x = torch.randn(sum(counts), D)
        assert_same(gradients(fast, x, run), gradients(oracle, x, run))


@pytest.mark.parametrize("counts", [None, (4,), (2, 2), (1, 3), (2, 1), (1, 1, 1, 1), (2, 0, 0)], ids=str)
@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_each_equals_the_loop_in_output_gradients_and_statistics(config, counts):
    # In float64: how far sums over 100 rows in another order are apart in float32 depends on the machine.
    oracle = build(config, "eager").double()
    fast = copy.deepcopy(oracle)
    fast.backend = "auto"

    def run(experts: MLPExperts, x: Tensor) -> Tensor:
        return experts(x, "each", counts)

    for size in (0, 1, 7, 100):
        x = torch.randn(*(() if counts is None else (len(counts),)), size, D, dtype=torch.float64)
        assert_same(gradients(fast, x, run), gradients(oracle, x, run), rtol=1e-10, atol=1e-10)


def test_each_gives_every_expert_its_groups_input():
    experts = build(MLP((12, 10)))
    x = torch.randn(3, 5, D)
    actual = experts(x, "each", (2, 0, 1))
    inputs = (x[0], x[0], x[2])
    expected = torch.stack([network(experts, e)(x_e) for e, x_e in enumerate(inputs)], 1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_is_not_in_the_statistics(training, backend):
    experts = build(MLP((12, 10), "silu", norm="batch"), backend).train(training)
    other = copy.deepcopy(experts)
    real = torch.tensor([True, False, True, True, False, True])
    x = torch.randn(6, D)
    actual = experts(x.masked_fill(~real[:, None], 0.0), "each", None, real)
    torch.testing.assert_close(actual[real], other(x[real], "each"), rtol=1e-4, atol=1e-5)
    assert_same(dict(experts.named_buffers()), dict(other.named_buffers()))


def test_batch_norm_by_hand():
    # One expert, one feature, w = 1: rows 1, 3 and 8 have mean 4, variance (9 + 1 + 16) / 3 = 26 / 3, unbiased 13.
    experts = MLP((1,), "relu", norm="batch").build(1, 1)
    with torch.no_grad():
        experts.w_0.fill_(1.0)
    y = experts(torch.tensor([[1.0], [3.0], [8.0]]), "each")
    # (8 - 4) / sqrt(26 / 3 + 1e-5) = 1.3587; below the mean relu gives 0.
    torch.testing.assert_close(y.flatten(), torch.tensor([0.0, 0.0, 4 / (26 / 3 + 1e-5) ** 0.5]))
    # Momentum 0.1: 0.9 * 0 + 0.1 * 4 and 0.9 * 1 + 0.1 * 13.
    torch.testing.assert_close(experts.running_mean_0, torch.tensor([[0.4]]))
    torch.testing.assert_close(experts.running_var_0, torch.tensor([[2.2]]))


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_an_expert_with_one_row_uses_the_running_statistics_which_stay(backend):
    experts = build(MLP((12,), norm="batch"), backend)
    networks = [network(experts, e) for e in range(E)]
    before = experts.running_var_0.clone()
    x = torch.randn(4, D)
    one = copy.deepcopy(experts)
    assert torch.equal(one(x[:1], "each"), copy.deepcopy(experts).eval()(x[:1], "each"))
    assert torch.equal(one.running_var_0, before)
    y = experts(rows_of(x, [1, 3, 0, 0])).x
    torch.testing.assert_close(y[:1], networks[0].eval()(x[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(y[1:], networks[1](x[1:]), rtol=1e-4, atol=1e-5)
    moved = (experts.running_var_0 != before).any(1)
    assert moved.tolist() == [False, True, False, False]


@pytest.mark.parametrize("config, backend", list(zip(CONFIGS[1:], BACKENDS, strict=True)), ids=str)
def test_rows_past_the_end_may_hold_nan(config, backend):
    experts = build(config, backend)
    x = torch.randn(9, D)
    x[7:] = torch.nan
    actual = gradients(experts, x, lambda e, x: e(rows_of(x, [2, 5, 0, 0], tail=2)).x)
    assert all(value.isfinite().all() for value in actual.values())
    assert not actual["y"][7:].any()
    assert not actual["dx"][7:].any()


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    experts = MLP((200,), dropout=0.25).build(1, D)
    x = torch.randn(50, D)
    kept = experts.eval()(x, "each")
    actual = experts.train()(x, "each")
    where = kept > 0
    ratio = actual[where] / kept[where]
    # Kept features are divided by 1 - 0.25; of about 5000 a quarter is 0, give or take 5 deviations of 0.6 %.
    torch.testing.assert_close(ratio.round(decimals=3).unique(), torch.tensor([0.0, 1.333]))
    assert abs((ratio == 0).double().mean().item() - 0.25) < 0.031
    rows = experts(rows_of(x, [50])).x
    assert (rows == 0).sum() > (kept[:, 0] == 0).sum()


def test_costs_by_hand():
    # 8 x 12 + 12 biases, 12 x 10 + 10 biases; two a multiply-add: 2 * (96 + 120).
    assert MLP((12, 10)).num_params(8) == 96 + 12 + 120 + 10
    assert MLP((12, 10)).flops_per_row(8) == 432
    # Batch norm: weight and bias in place of the product's bias; layer norm: besides it.
    assert MLP((12,), norm="batch").num_params(8) == 96 + 24
    assert MLP((12,), norm="layer").num_params(8) == 96 + 12 + 24


def test_widths_are_a_tuple_of_which_the_last_is_the_output_s():
    with pytest.raises(ValueError, match="out_dim=5 is not 10, the last of hidden_dims"):
        MLP((12, 10)).build(E, D, 5)
    assert MLP((12, 10)).build(E, D, 10)(torch.randn(1, D), "each").shape == (1, E, 10)
    with pytest.raises(NotImplementedError, match="batch"):
        build(MLP(norm="batch"))(torch.randn(1, 2, D), "merged", torch.ones(1, E))
    assert MLP([12, 10]) == MLP((12, 10))
    config = MoEConfig(E, TokenChoice(1), MLP((12, 8), "silu", "batch", 0.1))
    plain = config.to_dict()
    assert plain["expert"]["init_args"]["hidden_dims"] == [12, 8]
    assert MoEConfig.from_dict(plain) == config


def test_experts_of_ones_own_have_each_without_writing_it():
    class Scale(Experts):
        """Expert e multiplies by its number."""

        num_experts = 3

        def compute_rows(self, rows: Rows) -> Rows:
            x, starts = rows.materialize(), [0, *rows.offsets_E.tolist()]
            parts = [x[start:end] * e for e, (start, end) in enumerate(pairwise(starts))]
            return rows.with_output(torch.cat(parts))

    x = torch.randn(4, D)
    torch.testing.assert_close(Scale()(x, "each"), torch.stack((0 * x, x, 2 * x), 1))
    two = torch.randn(2, 4, D)
    torch.testing.assert_close(Scale()(two, "each", (1, 1)), torch.stack((0 * two[0], two[1]), 1))
