"""The schedule by hand, and which parameter is in which group."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
from lightning.pytorch.plugins import MixedPrecision
from tiny_app import TinyModule
from trainings import MOE, fit

import core
from apps.train.optim import optimizers
from apps.train.optim.optimizers import OptimizerConfig, parameter_groups


def test_warm_up_then_cosine_by_hand():
    config = OptimizerConfig(warmup_steps=2, min_lr_ratio=0.1)
    # 2 steps up (1/2, 2/2), then 8 steps down: half way, at step 6, 0.1 + 0.9 * (1 + cos(pi/2)) / 2 = 0.55.
    assert [config.factor(s, 10) for s in (0, 1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    assert config.factor(50, 10) == pytest.approx(0.1)
    assert OptimizerConfig(warmup_steps=0.25).num_warmup_steps(40) == 10
    assert OptimizerConfig(warmup_steps=0.25).factor(5, math.inf) == 1.0
    assert OptimizerConfig(warmup_steps=0, schedule="constant").factor(9, 10) == 1.0


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


@pytest.mark.parametrize(
    "wrong",
    [
        {"warmup_steps": 2.5},
        {"fused": True, "name": "muon"},
    ],
)
def test_a_wrong_optimizer_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=rf"optimizer\.{next(iter(wrong))}="):
        OptimizerConfig(**wrong)


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


def test_parts_of_a_model_have_learning_rates_of_their_own():
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


def test_a_part_that_the_model_lacks_is_refused():
    with pytest.raises(
        ValueError, match=r"lr_scales has 'tower', which is no part of the model: its parts are \['net'\]"
    ):
        parameter_groups(TinyModule(3), OptimizerConfig(lr_scales={"tower": 0.1}))
    with pytest.raises(ValueError, match=r"adamw_parts has 'tower', which is no part of the model"):
        parameter_groups(TinyModule(3), OptimizerConfig("muon", adamw_parts=["tower"]))


def test_adamw_moves_the_parts_that_are_named_under_muon():
    config = OptimizerConfig("muon", adamw_parts=["net.3", "net.3.experts"])
    groups = {g["name"]: g["muon"] for g in parameter_groups(TinyModule(3, moe=MOE), config)}
    assert groups == {
        "rest_matrices": True,
        "rest_no_decay": False,
        "router": False,
        "experts": False,  # without adamw_parts experts_matrices, True
        "experts_no_decay": False,
    }


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
