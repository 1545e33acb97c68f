"""Layers whose parameters are on the meta device: all of them, which gives shapes, or one that was never loaded."""

import pytest
import torch
from torch import Tensor, nn

import core
from core import CGC, FFN, MLP, PLE, MMoE, MoEConfig, RoutingContext, SoftSlots, SwiGLU, TokenChoice
from core.routing.router import RouterConfig
from core.routing.soft.soft import Merge

B, S, D, E = 2, 6, 8, 8
ROUTERS: dict[str, RouterConfig] = {
    "token_choice": TokenChoice(noise="learned", expert_bias=True, gate_bias=True),
    "groups": core.Hierarchical(),
    "adaptive": core.DynamicThreshold(),
    "smooth": core.DSelectK(),
    "learned": core.Cosine(),
    "assignment": core.Sinkhorn(),
    "per_sequence": core.Task(num_tasks=3),
    "fixed": core.Hash(vocab_size=7),
    "expert_choice": core.ExpertChoice(),
    "soft": SoftSlots(2),
}


def inputs(device: str) -> tuple[Tensor, RoutingContext]:
    ids = torch.zeros(B, S, dtype=torch.int64, device=device)
    return torch.randn(B, S, D, device=device), RoutingContext(token_ids_BS=ids, task_ids_B=ids[:, 0])


LAYERS = {
    **{f"router {module}": MoEConfig(E, router) for module, router in ROUTERS.items()},
    "swiglu": MoEConfig(E, TokenChoice(2), SwiGLU(8), capacity_factor=1.0),
    "mlp": MoEConfig(E, TokenChoice(2), MLP((D,), norm="batch")),
    "mlp in slots": MoEConfig(E, SoftSlots(1), MLP((D,), norm="layer")),
    "merged": MoEConfig(E, Merge("smear"), FFN(8, bias=True)),
    "merged mlp": MoEConfig(E, Merge("meo"), MLP((D,))),
    "shared": MoEConfig(E, TokenChoice(2), FFN(8), num_shared_experts=2, shared_gate="mix"),
    "input gates": MoEConfig(E, TokenChoice(1, gates_on="input"), FFN(8)),
    "mmoe": MMoE(4, MLP((D,), "silu", "batch"), feature_gate=2, self_gate=2),
    "cgc": CGC(2, FFN(8), 2),
    "ple": PLE(2, SwiGLU(8), 1, 2),
    "sparse": MMoE(4, MLP((D,)), TokenChoice(2)),
    "selected": MMoE(4, FFN(8), TokenChoice(2), "shared"),
}


def build(name: str) -> tuple[nn.Module, tuple[object, ...]]:
    """The layer of this name, with real parameters, and inputs for it."""
    config = LAYERS[name]
    if isinstance(config, MoEConfig):
        return config.build(D), inputs("cpu")
    return config.build(D, 2), (torch.randn(5, D),)


def to_meta(value: object) -> object:
    if isinstance(value, RoutingContext):
        return RoutingContext(**{k: None if v is None else v.to("meta") for k, v in vars(value).items()})
    assert isinstance(value, Tensor)
    return value.to("meta")


@pytest.mark.parametrize("name", LAYERS)
def test_a_parameter_that_was_not_loaded_is_named(name):
    layer, args = build(name)
    complete = layer.state_dict()
    layer(*args)
    for missing, _ in layer.named_parameters():
        layer, args = build(name)
        layer.to("meta").load_state_dict({k: v for k, v in complete.items() if k != missing}, strict=False, assign=True)
        with pytest.raises(ValueError, match=rf"\.{missing.split('.')[-1]} is on device meta, the tokens are on cpu$"):
            layer(*args)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_the_meta_device_gives_shapes(name):
    layer, args = build(name)
    expected = {training: layer.train(training)(*args) for training in (True, False)}
    layer.to("meta")
    for training, wanted in expected.items():
        y = layer.train(training)(*(to_meta(arg) for arg in args))
        assert (y.shape, y.dtype, y.device.type) == (wanted.shape, wanted.dtype, "meta")
        y.sum().backward()
    experts = next(p for key, p in layer.named_parameters() if "experts" in key)
    assert experts.grad.shape == experts.shape
    assert experts.grad.is_meta


@pytest.mark.parametrize("backend", ["eager", "cpu", "grouped", "triton"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_backend_gives_shapes_on_the_meta_device(backend, dtype):
    layer = MoEConfig(E, TokenChoice(2), SwiGLU(8), backend=backend).build(D).to("meta", dtype)
    x = torch.randn(B, S, D, device="meta", dtype=dtype)
    assert (layer(x).shape, layer(x).dtype) == ((B, S, D), dtype)
