"""Dense twins of timm's and transformers' models: they begin as the model, and cost what its sparse version does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import MoEConfig, TokenChoice, count_flops, dense_twin, sparsify
from core.convert import twin_widths

MOE = MoEConfig(4, TokenChoice(2))
DIM = 16


def num_params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_twins(
    dense: nn.Module, call: Callable[[nn.Module], Tensor], modules: str, tokens: int, matrices: int
) -> None:
    """Check the twins of equal FLOPs and of equal parameters of a model whose layers see so many tokens.

    Args:
        dense: the model, with networks of width ``DIM`` and biases or none.
        call: calls a model.
        modules: pattern of the networks.
        tokens: number of tokens in each layer, of one call.
        matrices: matrices of a network, 2 or 3.
    """
    dense.eval()
    sparse = sparsify(dense, MOE, modules)
    with torch.no_grad():
        expected = call(dense)
        flops = count_flops(call, sparse)
        for cost in ("flops", "params"):
            twin = dense_twin(dense, like=sparse, cost=cost)
            y = call(twin)
            assert (y - expected).norm() <= 1e-6 * expected.norm()
            widths = list(twin_widths(dense, sparse, cost).values())
            assert len(widths) == 2
            # A layer's cost is off by half a unit's at most.
            if cost == "flops":
                unit = 2 * matrices * DIM
                assert abs(count_flops(call, twin) - flops) <= tokens * len(widths) * unit / 2
                assert count_flops(call, twin) - flops == tokens * sum(w.cost - w.target for w in widths)
            else:
                assert abs(num_params(twin) - num_params(sparse)) <= len(widths) * (matrices * DIM + 2) / 2
                assert num_params(twin) - num_params(sparse) == sum(w.cost - w.target for w in widths)
    twin.train()
    call(twin).square().sum().backward()
    for name in twin_widths(dense, sparse, "params"):
        assert all(p.grad is not None for p in twin.get_submodule(name).parameters())


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 2, "num_classes": 3}


@pytest.mark.parametrize(
    ("name", "matrices"),
    [("vit_tiny_patch16_224", 2), ("eva02_tiny_patch14_224", 3)],
)
def test_timm(name, matrices):
    timm = pytest.importorskip("timm")
    dense, x = timm.create_model(name, **VIT), torch.randn(3, 3, 16, 16)
    # 2 x 2 patches and the class token.
    check_twins(dense, lambda model: model(x), "blocks.*.mlp", tokens=3 * 5, matrices=matrices)


@pytest.mark.parametrize("kind", ["GluMlp", "SwiGLUPacked", "GatedMlp"])
def test_networks_of_timm(kind):
    layers = pytest.importorskip("timm.layers")
    dense = nn.ModuleDict({"a": getattr(layers, kind)(DIM, 24), "b": getattr(layers, kind)(DIM, 24)})
    x = torch.randn(2, 5, DIM)
    matrices = 2 if kind == "GatedMlp" else 3
    check_twins(dense, lambda model: model["b"](model["a"](x)), "*", tokens=10, matrices=matrices)


IDS = torch.arange(14).view(2, 7)
SIZES = {
    "vocab_size": 20,
    "hidden_size": DIM,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5 = {"vocab_size": 20, "d_model": DIM, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 20, "n_embd": DIM, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
T5_BLOCKS = "block.*.layer.*.DenseReluDense"


@pytest.mark.parametrize(
    ("kind", "options", "modules", "matrices"),
    [
        ("BertModel", SIZES, "encoder.layer.*", 2),
        ("T5EncoderModel", T5, f"encoder.{T5_BLOCKS}", 2),
        ("T5EncoderModel", {**T5, "feed_forward_proj": "gated-gelu"}, f"encoder.{T5_BLOCKS}", 3),
        ("LlamaModel", SIZES, "layers.*.mlp", 3),
        ("Phi3Model", {**SIZES, "num_key_value_heads": 2}, "layers.*.mlp", 3),
        ("GPT2Model", GPT2, "h.*.mlp", 2),
    ],
)
def test_transformers(kind: str, options: dict[str, Any], modules: str, matrices: int):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, kind.replace("EncoderModel", "").replace("Model", "") + "Config")
    dense = getattr(transformers, kind)(config(**options))
    check_twins(dense, lambda model: model(input_ids=IDS).last_hidden_state, modules, tokens=14, matrices=matrices)


def test_a_tower_of_open_clip():
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": DIM, "patch_size": 8, "image_size": 16, "head_width": 8}
    text = {"context_length": 7, "vocab_size": 20, "width": DIM, "heads": 2, "layers": 1}
    dense, x = open_clip.CLIP(16, vision, text), torch.randn(2, 3, 16, 16)
    # 2 x 2 patches and the class token.
    modules = "visual.transformer.resblocks.*.mlp"
    check_twins(dense, lambda model: model.encode_image(x), modules, tokens=2 * 5, matrices=2)


def test_experts_of_torch_rechub():
    pytest.importorskip("torch_rechub")
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import MMOE

    features, tower = [DenseFeature(f"f{i}") for i in range(6)], {"dims": [4]}
    dense = MMOE(features, ["classification", "regression"], 3, {"dims": [8, 6]}, [tower, tower]).eval()
    twin = dense_twin(dense, like=sparsify(dense, MOE, "experts.*"))
    # Two experts of 2 * (6 * 8 + 8 * 6) FLOPs and a gate of 2 * 6 * 4 cost 432; a unit costs 2 * (6 + 6): 18.
    assert [[m.out_features for m in expert.mlp if isinstance(m, nn.Linear)] for expert in twin.experts] == [
        [18, 6]
    ] * 3
    x = {f"f{i}": torch.randn(40) for i in range(6)}
    y, expected = twin(x), dense(x)
    assert (y - expected).norm() <= 1e-6 * expected.norm()
