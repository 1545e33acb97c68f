"""Schedules and steps by hand, which parameter is in which group, and gradients that are sparse tensors of rows."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny_app import TinyModule
from torch import nn
from trainings import MOE, fit

import core
from apps.train.optim import optimizers
from apps.train.optim.muon import MuonAdamW, orthogonalized
from apps.train.optim.optimizers import OptimizerConfig, build_optimizer, parameter_groups
from apps.train.optim.row_gradients import check_processes, clip_with_rows


def test_warm_up_then_cosine_by_hand():
    config = OptimizerConfig(warmup_steps=2, min_lr_ratio=0.1)
    # 2 steps up (1/2, 2/2), then 8 steps down: half way, at step 6, 0.1 + 0.9 * (1 + cos(pi/2)) / 2 = 0.55.
    assert [config.factor(s, 10) for s in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert config.factor(50, 10) == pytest.approx(0.1)
    assert OptimizerConfig(warmup_steps=0.25).num_warmup_steps(40) == 10
    assert OptimizerConfig(warmup_steps=0.25).factor(5, math.inf) == 1.0
    assert OptimizerConfig(warmup_steps=0, schedule="constant").factor(9, 10) == 1.0
    # Of 8 steps down, 2 are a quarter of the way from 1 to 0.1, and all end there.
    linear = OptimizerConfig(warmup_steps=2, schedule="linear", min_lr_ratio=0.1)
    assert [linear.factor(s, 10) for s in (0, 2, 4, 10)] == pytest.approx([0.5, 1.0, 0.775, 0.1])
    assert linear.factor(5, math.inf) == 1.0


def test_warm_up_then_inverse_root_by_hand():
    config = OptimizerConfig(warmup_steps=4, schedule="inverse_sqrt")
    # Up by quarters; at the n-th step, which is number n - 1, sqrt(4 / n): 1 at the 4th, 1/2 at the 16th, 1/5 at the
    # 100th. The length of the run has no say.
    for total in (100, math.inf):
        assert [config.factor(s, total) for s in (0, 3, 15, 99)] == pytest.approx([0.25, 1.0, 0.5, 0.2])
    floored = dataclasses.replace(config, min_lr_ratio=0.4)
    assert [floored.factor(s, 100) for s in (0, 15, 99)] == pytest.approx([0.25, 0.5, 0.4])
    # A fraction of all steps: 0.04 of 100 are 4. None: it falls from the first step on.
    assert dataclasses.replace(config, warmup_steps=0.04).factor(15, 100) == pytest.approx(0.5)
    assert [dataclasses.replace(config, warmup_steps=0).factor(s, 100) for s in (0, 3)] == pytest.approx([1.0, 0.5])


def test_groups_hold_each_parameter_once_and_spare_biases_and_norms():
    module = TinyModule(3, moe=MOE)
    config = OptimizerConfig(
        lr=1.0, weight_decay=0.5, router_lr_scale=0.1, expert_lr_scale=2.0, expert_weight_decay_scale=3.0
    )
    groups = {g["name"]: g for g in parameter_groups(module, config)}
    names = {id(p): n for n, p in module.named_parameters()}
    members = {g: sorted(names[id(p)] for p in group["params"]) for g, group in groups.items()}
    assert members == {
        "router": ["net.3.router.gate.weight"],
        "experts": ["net.3.experts.w_in", "net.3.experts.w_out"],
        "experts_no_decay": ["net.3.experts.b_in", "net.3.experts.b_out"],
        "rest": ["net.0.weight", "net.4.weight"],
        "rest_no_decay": ["net.0.bias", "net.1.bias", "net.1.weight", "net.4.bias"],
    }
    rates = {g: (group["lr"], group["weight_decay"]) for g, group in groups.items()}
    assert rates == {
        "router": (0.1, 0.5),
        "experts": (2.0, 1.5),
        "experts_no_decay": (2.0, 0.0),
        "rest": (1.0, 0.5),
        "rest_no_decay": (1.0, 0.0),
    }


def test_parts_of_a_model_have_rates_and_optimizers_of_their_own():
    config = OptimizerConfig(lr=1.0, expert_lr_scale=2.0, lr_scales={"net.3": 0.5, "net.3.router": 0.25, "net.4": 0.0})
    rates = {g["name"]: g["lr"] for g in parameter_groups(TinyModule(3, moe=MOE), config)}
    assert rates == {
        "net.3.router_router": 0.25,  # the longer beginning counts
        "net.3_experts": 1.0,  # 0.5 times the experts' 2
        "net.3_experts_no_decay": 1.0,
        "net.4_rest": 0.0,
        "net.4_rest_no_decay": 0.0,
        "rest": 1.0,
        "rest_no_decay": 1.0,
    }
    config = OptimizerConfig("muon", adamw_parts=["net.3", "net.3.experts"])
    groups = {g["name"]: g["muon"] for g in parameter_groups(TinyModule(3, moe=MOE), config)}
    assert groups == {
        "rest_matrices": True,
        "rest_no_decay": False,
        "router": False,
        "experts": False,  # without adamw_parts experts_matrices, True
        "experts_no_decay": False,
    }
    for_experts = parameter_groups(TinyModule(3, moe=MOE), OptimizerConfig("muon", adamw_parts=["experts"]))
    assert {g["name"] for g in for_experts if g["muon"]} == {"rest_matrices"}
    assert parameter_groups(TinyModule(3), OptimizerConfig("muon", adamw_parts=["experts"]))  # a dense one has none


def groups_of(**options):
    return parameter_groups(TinyModule(3), OptimizerConfig(**options))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OptimizerConfig(warmup_steps=2.5), r"optimizer\.warmup_steps="),
        (lambda: OptimizerConfig(fused=True, name="muon"), r"optimizer\.fused="),
        (
            lambda: groups_of(lr_scales={"tower": 0.1}),
            r"lr_scales has 'tower', .*: its parts are \['net'\]",
        ),
        (
            lambda: groups_of(name="muon", adamw_parts=["tower"]),
            r"adamw_parts has 'tower', which is no part",
        ),
        (lambda: MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "muon": True}]), r"of shape \(3,\) is none"),
    ],
)
def test_wrong_options_and_what_a_model_lacks_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_frozen_parameter_and_a_model_s_own_exemptions_are_honored():
    module = TinyModule(3)
    module.net[0].weight.requires_grad = False
    module.net.no_weight_decay = lambda: {"3.weight"}
    groups = {g["name"]: len(g["params"]) for g in parameter_groups(module, OptimizerConfig())}
    assert groups == {"rest_no_decay": 5}


@pytest.mark.parametrize("expert", [core.IA3(), core.Constant(mix=True)])
def test_vectors_of_experts_do_not_decay(expert):
    layer = core.MoEConfig(4, expert=expert).build(8)
    decays = {id(p): g["weight_decay"] for g in parameter_groups(layer, OptimizerConfig("muon")) for p in g["params"]}
    names = {name: decays[id(p)] for name, p in layer.experts.named_parameters()}
    assert names == {"v": 0.0} | ({"w_mix": 0.05} if isinstance(expert, core.Constant) else {})


@pytest.mark.parametrize(
    ("precision", "clip", "fused", "on_cuda", "expected"),
    [
        ("bf16-mixed", 1.0, None, True, True),
        ("bf16-mixed", None, None, True, True),
        ("bf16-mixed", 1.0, None, False, None),
        ("bf16-mixed", 1.0, False, True, None),
        ("16-mixed", None, None, True, True),
        ("16-mixed", 1.0, None, True, None),  # Lightning: the fused step unscales, and clipping would come too early
    ],
)
def test_adamw_is_fused_on_a_gpu_where_lightning_allows_it(precision, clip, fused, on_cuda, expected, monkeypatch):
    monkeypatch.setattr(optimizers, "_on_cuda", lambda tensors: on_cuda)
    module = TinyModule(3, optimizer=OptimizerConfig(fused=fused))
    plugin = MixedPrecision("bf16-mixed", "cpu")  # a CPU has no 16-mixed
    plugin.scaler = object() if precision == "16-mixed" else None
    module._trainer = SimpleNamespace(precision_plugin=plugin, gradient_clip_val=clip, world_size=1)
    assert module.configure_optimizers()["optimizer"].defaults["fused"] is expected


def test_a_fused_step_and_clipping_go_together_under_bf16_mixed(tmp_path):
    module = TinyModule(3, optimizer=OptimizerConfig(fused=True))
    fit(module, tmp_path, precision="bf16-mixed", gradient_clip_val=1.0)
    assert module.trainer.global_step == 9


def test_orthogonalized_matrices_have_singular_values_near_one_and_the_same_singular_vectors():
    torch.manual_seed(0)
    for shape in ((6, 10), (10, 6), (8, 8)):
        g = torch.randn(3, *shape, dtype=torch.float64)
        o = orthogonalized(g)
        assert o.shape == g.shape
        s = torch.linalg.svdvals(o)
        assert s.min() > 0.5
        assert s.max() < 1.3
        # The iteration is an odd polynomial of the singular values: U and V stay, so U^T O V is diagonal.
        u, _, vh = torch.linalg.svd(g, full_matrices=False)
        d = u.mT @ o @ vh.mT
        torch.testing.assert_close(d, torch.diag_embed(d.diagonal(dim1=-2, dim2=-1)), atol=1e-10, rtol=0)
        # Matrix by matrix; zeros stay.
        g[1] = 0
        torch.testing.assert_close(orthogonalized(g), torch.stack([o[0], g[1], orthogonalized(g[2])]))


def test_a_step_by_hand():
    # g = diag(3, 0), momentum 0.5 from zero: m = 1.5 at (0, 0), look-ahead (g + m) / 2 = 2.25, scaled to 1. Each of
    # five iterations takes x to 3.4445 x - 4.775 x^3 + 2.0315 x^5; the step is lr * 0.2 * sqrt(2) * x, decay 1 - 0.05.
    x = 1.0
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    w = nn.Parameter(torch.eye(2, dtype=torch.float64))
    b = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = MuonAdamW(
        [{"params": [w], "muon": True, "weight_decay": 0.5}, {"params": [b]}], momentum=0.5, lr=0.1, weight_decay=0.0
    )
    w.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    b.grad = torch.tensor([2.0, -5.0], dtype=torch.float64)
    optimizer.step()
    expected = torch.tensor([[0.95 - 0.1 * 0.2 * 2**0.5 * x, 0.0], [0.0, 0.95]], dtype=torch.float64)
    torch.testing.assert_close(w.detach(), expected)
    # AdamW's first step is lr times the sign.
    torch.testing.assert_close(b.detach(), torch.tensor([0.9, 1.1], dtype=torch.float64))


def test_other_groups_step_as_adamw_does_and_the_state_is_restored():
    torch.manual_seed(0)
    config = OptimizerConfig(name="muon", lr=0.01)

    def made() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
        return net, build_optimizer(net, config)

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()

    net, optimizer = made()
    train(net, optimizer, range(6))
    first, first_optimizer = made()
    train(first, first_optimizer, range(3))
    again, again_optimizer = made()
    again.load_state_dict(first.state_dict())
    again_optimizer.load_state_dict(first_optimizer.state_dict())
    train(again, again_optimizer, range(3, 6))
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_matrices_of_experts_and_linear_layers_are_muons_and_the_read_out_is_not():
    class Net(nn.Module):
        readout = ("head",)

        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.mix = nn.Linear(8, 8)
            self.moe = core.MoEConfig(4, expert=core.FFN(6, bias=True), num_shared_experts=1).build(8)
            self.head = nn.Linear(8, 3)

    net = Net()
    names = {id(p): n for n, p in net.named_parameters()}
    groups = parameter_groups(net, OptimizerConfig(name="muon"))
    muon = {names[id(p)] for g in groups if g["muon"] for p in g["params"]}
    assert muon == {"mix.weight"} | {
        f"moe.{e}.w_{side}" for e in ("experts", "shared_experts") for side in ("in", "out")
    }
    scaled = parameter_groups(net, OptimizerConfig(lr=1.0, expert_lr_scale=0.5))
    assert {names[id(p)] for g in scaled if g["lr"] == 0.5 for p in g["params"]} == {
        n for n in names.values() if "experts." in n
    }
    assert sum(len(g["params"]) for g in groups) == len(names)
    assert not any("muon" in g for g in parameter_groups(net, OptimizerConfig()))


def test_convolutions_are_flattened_for_muon_but_for_those_of_patches_and_of_single_channels():
    torch.manual_seed(0)
    patches, mixes, depthwise = nn.Conv2d(1, 4, 2, 2), nn.Conv2d(4, 6, 3), nn.Conv2d(6, 6, 3, groups=6)
    net = nn.Sequential(patches, mixes, depthwise, nn.Conv2d(6, 5, 1))
    groups = parameter_groups(net, OptimizerConfig(name="muon"))
    flattened = [p for g in groups if g["flattened"] for p in g["params"]]
    assert {id(p) for p in flattened} == {id(mixes.weight), id(net[3].weight)}
    assert [g["name"] for g in groups if g["muon"]] == ["rest_convolutions"]
    # A step is that of the matrix of the same numbers.
    matrix = nn.Parameter(mixes.weight.detach().flatten(1).clone())
    mixes.weight.grad = torch.randn_like(mixes.weight)
    matrix.grad = mixes.weight.grad.flatten(1)
    for parameter, options in ((mixes.weight, {"flattened": True}), (matrix, {})):
        MuonAdamW([{"params": [parameter], "muon": True, **options}], lr=0.1).step()
    assert torch.equal(mixes.weight.flatten(1), matrix)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stacked_norms_neither_decay_nor_are_matrices(name):
    net = core.MMoE(4, core.MLP((8, 6), norm="batch")).build(5, num_tasks=2)
    groups = parameter_groups(net, OptimizerConfig(name=name))
    names = {id(p): n for n, p in net.named_parameters()}
    norms = [g for g in groups for p in g["params"] if "norm_" in names[id(p)]]
    assert len(norms) == 4
    assert all(g["weight_decay"] == 0 and not g.get("muon") for g in norms)


# With betas of 0 a row without a gradient stays under dense Adam too, and the large eps lets the size of a gradient
# count. So both kinds of gradients train alike.
ROW_ADAM = OptimizerConfig(name="row_adam", lr=0.05, weight_decay=0.0, betas=(0.0, 0.0), eps=0.1)


def module(row_sparse: bool, optimizer: OptimizerConfig = ROW_ADAM, **options) -> TinyModule:
    torch.manual_seed(0)
    moe = core.MoEConfig(16, core.ProductKeys(top_k=2, heads=2), core.PEER(row_sparse=row_sparse))
    return TinyModule(3, moe=moe, optimizer=optimizer, **options)


def weights(trained: TinyModule) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in trained.named_parameters()}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipped_and_accumulated_rows_train_as_dense_gradients(algorithm, tmp_path):
    options = {"gradient_clip_val": 0.02, "gradient_clip_algorithm": algorithm, "accumulate_grad_batches": 2}
    trained = []
    for row_sparse in (False, True):
        trained.append(module(row_sparse))
        torch.manual_seed(1)
        fit(trained[-1], tmp_path / str(row_sparse), **options)
    torch.testing.assert_close(weights(trained[1]), weights(trained[0]), rtol=1e-4, atol=1e-6)
    torch.manual_seed(1)
    fit(free := module(True), tmp_path / "free", accumulate_grad_batches=2)
    assert not torch.allclose(free.net[3].experts.u, trained[1].net[3].experts.u, rtol=0, atol=1e-3)  # it did clip


def test_a_resumed_run_ends_where_one_run_ends(tmp_path):
    config = OptimizerConfig(name="row_adam", lr=0.05, schedule="constant", warmup_steps=2)
    options = {"gradient_clip_val": 0.1}
    whole, rest = (module(True, config, ema_decay=0.9) for _ in range(2))
    for name, trained, epochs in (("whole", whole, 2), ("parts", module(True, config, ema_decay=0.9), 1)):
        torch.manual_seed(1)
        fit(trained, tmp_path / name, max_epochs=epochs, **options)
    fit(rest, tmp_path / "parts", max_epochs=2, ckpt_path=str(tmp_path / "parts" / "last.ckpt"), **options)
    torch.testing.assert_close(weights(rest), weights(whole), rtol=0, atol=0)


def test_clipping_by_hand():
    # A row picked twice counts once, as its sum: the gradient is (3, 0) + (0, 4) in row 1, of norm 5.
    table = nn.Parameter(torch.zeros(4, 2))
    table.grad = torch.sparse_coo_tensor([[1, 1]], [[3.0, 0.0], [0.0, 4.0]], (4, 2), check_invariants=True)
    assert clip_with_rows([table], 1.0, "norm")
    torch.testing.assert_close(table.grad.to_dense()[1], torch.tensor([0.6, 0.8]))
    assert clip_with_rows([table], 0.7, "value")
    torch.testing.assert_close(table.grad.to_dense()[1], torch.tensor([0.6, 0.7]))
    table.grad = torch.ones(4, 2)
    assert not clip_with_rows([table], 1.0, "norm")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_optimizer_that_takes_no_rows_is_refused_with_a_remedy(name):
    config = OptimizerConfig(name=name)
    with pytest.raises(ValueError, match=rf"'{name}' takes no sparse .* net\.3\.experts makes: .*row_adam"):
        module(True, config).configure_optimizers()
    with pytest.raises(ValueError, match="which 0 makes"):
        build_optimizer(nn.Sequential(nn.Embedding(4, 2, sparse=True)), config)
    module(False, config).configure_optimizers()


def test_rows_on_several_processes_are_refused():
    check_processes(module(True), 1)
    check_processes(module(False), 2)
    with pytest.raises(ValueError, match=r"row_sparse=True of net\.3\.experts is for one process, and this run has 2"):
        check_processes(module(True), 2)
