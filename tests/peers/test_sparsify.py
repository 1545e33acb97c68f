"""Networks of timm, transformers, open_clip and torch-rechub made sparse: they begin as they were, and train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import MLP, GeneralFFN, MoEConfig, TokenChoice, dense_twin, moe_layers, sparsify, summary
from core.convert import SparseFFN

MOE = MoEConfig(4, TokenChoice(2))


def check_begins_and_trains(
    dense: nn.Module,
    call: Callable[[nn.Module], Tensor],
    modules: str | list[str],
    layers: int,
) -> nn.Module:
    """Check that the sparse model computes what the dense one does, to 1e-6, and that its layers get gradients."""
    dense.eval()
    sparse = sparsify(dense, MOE, modules)
    with torch.no_grad():
        y, expected = call(sparse), call(dense)
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    result = summary(sparse)
    assert (len(result.replaced), result.recognized, len(moe_layers(sparse))) == (layers, layers, layers)
    sparse.train()
    call(sparse).square().sum().backward()
    for layer in moe_layers(sparse).values():
        # Equal experts under normalized gates leave the gate a gradient of zero, but for rounding.
        assert all(p.grad is not None for p in layer.parameters())
        assert all(p.grad.any() for p in layer.experts.parameters())
    return sparse


def varied(model: nn.Module) -> nn.Module:
    """Return a model whose layer scales and norms are not at their start, where they would hide a network."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name or "gamma" in name else tensor.normal_()
    return model


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("name", "options", "modules"),
    [
        ("vit_tiny_patch16_224", VIT, "blocks.*.mlp"),
        ("vit_tiny_patch16_224", {**VIT, "proj_drop_rate": 0.1}, "blocks.*.mlp"),
        ("eva02_tiny_patch14_224", VIT, "blocks.*.mlp"),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 8)}, "stages.*.blocks.*.mlp"),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8,) * 4, "conv_mlp": True}, "stages.*.blocks.*.mlp"),
    ],
)
def test_timm(name, options, modules):
    timm = pytest.importorskip("timm")
    dense = varied(timm.create_model(name, num_classes=3, **options))
    size = 64 if "convnext" in name else options["img_size"]
    x = torch.randn(2, 3, size, size)
    layers = 4 if "convnext" in name else 2
    check_begins_and_trains(dense, lambda model: model(x), modules, layers)


@pytest.mark.parametrize("bias", [True, False, (True, False)])
@pytest.mark.parametrize("kind", ["Mlp", "GluMlp", "SwiGLUPacked", "SwiGLU", "GatedMlp", "ConvMlp"])
def test_networks_of_timm(kind, bias):
    layers = pytest.importorskip("timm.layers")
    dense = varied(getattr(layers, kind)(8, 12, bias=bias, drop=0.1))
    x = torch.randn(2, 8, 3, 4) if kind == "ConvMlp" else torch.randn(2, 5, 8)
    sparse = check_begins_and_trains(dense, lambda model: model(x), "", 1)
    assert sparse.config.expert.dropout == 0.1
    assert sparse.dropout.p == (0.0 if kind == "ConvMlp" else 0.1)


def last(output: Any) -> Tensor:
    return output.last_hidden_state


IDS = torch.arange(14).view(2, 7)
SIZES = {
    "vocab_size": 20,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
T5 = {"vocab_size": 20, "d_model": 16, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
DISTIL = {"vocab_size": 20, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
ALBERT = {**SIZES, "embedding_size": 8, "num_hidden_groups": 2}
BART = {
    **{f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{"vocab_size": 20, "d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "pad_token_id": 0},
    **{"bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0, "activation_dropout": 0.1},
}
OPT = {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}
BART_BLOCKS = ["encoder.layers.*", "decoder.layers.*"]
T5_BLOCKS = [f"{side}.block.*.layer.*.DenseReluDense" for side in ("encoder", "decoder")]


@pytest.mark.parametrize(
    ("kind", "options", "modules"),
    [
        ("Bert", SIZES, "encoder.layer.*"),
        ("Roberta", SIZES, "encoder.layer.*"),
        ("Albert", ALBERT, "encoder.albert_layer_groups.*.albert_layers.*"),
        ("Bart", BART, BART_BLOCKS),
        ("Marian", BART, BART_BLOCKS),
        ("FSMT", {**BART, "langs": ["en", "de"], "src_vocab_size": 20, "tgt_vocab_size": 20}, BART_BLOCKS),
        ("OPT", OPT, "decoder.layers.*"),
        ("T5", T5, T5_BLOCKS),
        ("T5", {**T5, "feed_forward_proj": "gated-gelu"}, T5_BLOCKS),
        ("Llama", {**SIZES, "mlp_bias": True}, "layers.*.mlp"),
        ("Mistral", {**SIZES, "num_key_value_heads": 2}, "layers.*.mlp"),
        ("Qwen2", {**SIZES, "num_key_value_heads": 2}, "layers.*.mlp"),
        ("Gemma", {**SIZES, "num_key_value_heads": 2, "head_dim": 8}, "layers.*.mlp"),
        ("Phi3", {**SIZES, "num_key_value_heads": 2}, "layers.*.mlp"),
        ("GPT2", GPT2, "h.*.mlp"),
        ("DistilBert", DISTIL, "transformer.layer.*.ffn"),
    ],
)
def test_transformers(kind, options, modules):
    transformers = pytest.importorskip("transformers")
    dense = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    both = kind in ("T5", "Bart", "Marian", "FSMT")
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS} if both else {})}
    sparse = check_begins_and_trains(dense, lambda model: last(model(**inputs)), modules, 4 if both else 2)
    layouts = {m.layout for m in sparse.modules() if isinstance(m, SparseFFN)}
    assert layouts == {"sequence_first" if kind == "FSMT" else "tokens"}


def test_the_hidden_dropout_of_bart_goes_into_the_experts():
    transformers = pytest.importorskip("transformers")
    dense = transformers.BartModel(transformers.BartConfig(**BART))
    block = sparsify(dense, MOE, BART_BLOCKS).encoder.layers[0]
    assert block.fc1.config.expert == GeneralFFN(24, "gelu", dropout=0.1)
    assert block.activation_dropout == 0.0
    twin = dense_twin(dense, sparsify(dense, MOE, BART_BLOCKS)).encoder.layers[0]
    # Two experts of 24 units, and a gate of 4 x 16 that costs as much as two units.
    assert (twin.fc1.out_features, twin.fc2.in_features, twin.activation_dropout) == (50, 50, 0.1)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_towers_of_open_clip(quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": 32, "patch_size": 8, "image_size": 16, "head_width": 16}
    text = {"context_length": 7, "vocab_size": 20, "width": 32, "heads": 2, "layers": 2}
    dense = open_clip.CLIP(16, vision, text, quick_gelu=quick_gelu)
    images, towers = torch.randn(2, 3, 16, 16), ["visual.transformer.resblocks.*.mlp", "transformer.resblocks.*.mlp"]

    def features(model):
        return torch.cat(model(images, IDS)[:2])

    check_begins_and_trains(dense, features, towers, 4)


def test_mmoe_of_torch_rechub():
    pytest.importorskip("torch_rechub")
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import MMOE

    features = [DenseFeature(f"f{i}") for i in range(6)]
    tower = {"dims": [4]}
    experts = {"dims": [8, 6], "dropout": 0.1}
    dense = varied(MMOE(features, ["classification", "regression"], 3, experts, [tower, tower]))
    x = {f"f{i}": torch.randn(40) for i in range(6)}
    sparse = check_begins_and_trains(dense, lambda model: model(x), "experts.*", 3)
    assert sparse.experts[0].config.expert == MLP((8, 6), norm="batch", dropout=0.1)
    with pytest.raises(ValueError, match=r"module 'towers.0': an MLP of torch-rechub .* output_layer=False"):
        sparsify(dense, MOE, "towers.*")
