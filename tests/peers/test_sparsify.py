"""Networks of timm, transformers, open_clip and torch-rechub made sparse: they begin as they were, and train.

Their dense twins begin as the model too, and cost what its sparse version does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import MLP, GeneralFFN, MoEConfig, TokenChoice, count_flops, dense_twin, moe_layers, sparsify, summary
from core.convert import SparseFFN, twin_widths

MOE = MoEConfig(4, TokenChoice(2))
DIM = 16
IDS = torch.arange(14).view(2, 7)
Call = Callable[[nn.Module], Tensor]


def check_begins_and_trains(
    dense: nn.Module, call: Call, modules: str | list[str], layers: int, twin: tuple[int, Sequence[int]] | None = None
) -> Any:
    """Check that the sparse model computes what the dense one does, to 1e-6, and that its layers get gradients.

    Args:
        dense: the model.
        call: calls a model.
        modules: patterns of the networks, and ``layers``, how many there are.
        twin: to check the twins of equal FLOPs and parameters too, how many matrices a network of width ``DIM`` has,
            and how many tokens each layer sees in one call.
    """
    dense.eval()
    sparse = sparsify(dense, MOE, modules)
    with torch.no_grad():
        y, expected = call(sparse), call(dense)
    assert (y - expected).norm() <= 1e-6 * expected.norm()
    result = summary(sparse)
    assert (len(result.replaced), result.recognized, len(moe_layers(sparse))) == (layers, layers, layers)
    if twin is not None:
        check_twins(dense, sparse, call, *twin)
    sparse.train()
    call(sparse).square().sum().backward()
    for layer in moe_layers(sparse).values():
        # Equal experts under normalized gates leave the gate a gradient of zero, but for rounding.
        assert all(p.grad is not None for p in layer.parameters())
        assert all(p.grad.any() for p in layer.experts.parameters())
    return sparse


def check_twins(dense: nn.Module, sparse: nn.Module, call: Call, matrices: int, tokens: Sequence[int]) -> None:
    def cost_of(model: nn.Module, cost: str) -> float:
        return count_flops(call, model) if cost == "flops" else sum(p.numel() for p in model.parameters())

    for cost, unit, calls in (
        ("flops", 2 * matrices * DIM, tokens),
        ("params", matrices * DIM + 2, [1] * len(tokens)),  # a unit has one bias or two
    ):
        widths = twin_widths(dense, sparse, cost)
        with torch.no_grad():
            expected, twin = call(dense), dense_twin(dense, like=sparse, cost=cost)
            assert (call(twin) - expected).norm() <= 1e-6 * expected.norm()
            more = cost_of(twin, cost) - cost_of(sparse, cost)
        assert abs(more) <= sum(calls) * unit / 2  # a layer's cost is off by half a unit's at most
        assert more == sum(n * (w.cost - w.target) for n, w in zip(calls, widths.values(), strict=True))
    twin.train()
    call(twin).square().sum().backward()
    assert all(p.grad is not None for name in widths for p in twin.get_submodule(name).parameters())


def varied(model: nn.Module) -> nn.Module:
    """Return a model whose layer scales and norms are not at their start, where they would hide a network."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name or "gamma" in name else tensor.normal_()
    return model


VIT = {"img_size": 16, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 2}
CONVNEXT = {"depths": (1,) * 4, "dims": (8,) * 4}
VIT_TOKENS = [2 * 5] * 2  # 2 x 2 patches and the class token of two images


@pytest.mark.parametrize(
    ("name", "options", "twin"),
    [
        ("vit_tiny_patch16_224", VIT, (2, VIT_TOKENS)),
        ("vit_tiny_patch16_224", {**VIT, "proj_drop_rate": 0.1}, None),
        ("eva02_tiny_patch14_224", VIT, (3, VIT_TOKENS)),
        ("convnext_atto", CONVNEXT, None),
        ("convnext_atto", {**CONVNEXT, "conv_mlp": True}, None),
    ],
)
def test_timm(name, options, twin):
    timm = pytest.importorskip("timm")
    dense = varied(timm.create_model(name, num_classes=3, **options))
    modules, layers, size = ("stages.*.blocks.*.mlp", 4, 64) if "conv" in name else ("blocks.*.mlp", 2, 16)
    x = torch.randn(2, 3, size, size)
    check_begins_and_trains(dense, lambda model: model(x), modules, layers, twin)


@pytest.mark.parametrize("bias", [True, False, (True, False)])
@pytest.mark.parametrize("kind", ["Mlp", "GluMlp", "SwiGLUPacked", "SwiGLU", "GatedMlp", "ConvMlp"])
def test_networks_of_timm(kind, bias):
    layers = pytest.importorskip("timm.layers")
    dense = varied(getattr(layers, kind)(DIM, 24, bias=bias, drop=0.1))
    x = torch.randn(2, DIM, 3, 4) if kind == "ConvMlp" else torch.randn(2, 5, DIM)
    matrices = {"GluMlp": 3, "SwiGLUPacked": 3, "GatedMlp": 2}.get(kind) if bias is True else None
    twin = None if matrices is None else (matrices, [10])
    sparse = check_begins_and_trains(dense, lambda model: model(x), "", 1, twin)
    assert sparse.config.expert.dropout == 0.1
    assert sparse.dropout.p == (0.0 if kind == "ConvMlp" else 0.1)


ENDS = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SIZES = {**ENDS, "hidden_size": DIM, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {**SIZES, "num_key_value_heads": 2}
T5 = {"vocab_size": 20, "d_model": DIM, "d_ff": 24, "d_kv": 8, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 20, "n_embd": DIM, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
DISTIL = {"vocab_size": 20, "dim": DIM, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
ALBERT = {**SIZES, "embedding_size": 8, "num_hidden_groups": 2}
BART = {
    **{f"{side}_{name}": 2 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")},
    **{**ENDS, "d_model": DIM, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24},
    **{"decoder_start_token_id": 0, "activation_dropout": 0.1},
}
BART_BLOCKS = ["encoder.layers.*", "decoder.layers.*"]
T5_BLOCKS = [f"{side}.block.*.layer.*.DenseReluDense" for side in ("encoder", "decoder")]


@pytest.mark.parametrize(
    ("kind", "options", "modules", "matrices"),
    [
        ("Bert", SIZES, "encoder.layer.*", 2),
        ("Roberta", SIZES, "encoder.layer.*", None),
        ("Albert", ALBERT, "encoder.albert_layer_groups.*.albert_layers.*", None),
        ("Bart", BART, BART_BLOCKS, None),
        ("Marian", BART, BART_BLOCKS, None),
        ("FSMT", {**BART, "langs": ["en", "de"], "src_vocab_size": 20, "tgt_vocab_size": 20}, BART_BLOCKS, None),
        ("OPT", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": DIM}, "decoder.layers.*", None),
        ("T5", T5, T5_BLOCKS, 2),
        ("T5", {**T5, "feed_forward_proj": "gated-gelu"}, T5_BLOCKS, 3),
        ("Llama", {**SIZES, "mlp_bias": True}, "layers.*.mlp", 3),
        ("Mistral", GROUPED, "layers.*.mlp", None),
        ("Qwen2", GROUPED, "layers.*.mlp", None),
        ("Gemma", {**GROUPED, "head_dim": 8}, "layers.*.mlp", None),
        ("Phi3", GROUPED, "layers.*.mlp", 3),
        ("GPT2", GPT2, "h.*.mlp", 2),
        ("DistilBert", DISTIL, "transformer.layer.*.ffn", None),
    ],
)
def test_transformers(kind, options, modules, matrices):
    transformers = pytest.importorskip("transformers")
    dense = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**options))
    both = isinstance(modules, list)
    inputs, layers = {"input_ids": IDS, **({"decoder_input_ids": IDS} if both else {})}, 4 if both else 2
    twin = None if matrices is None else (matrices, [14] * layers)
    sparse = check_begins_and_trains(dense, lambda model: model(**inputs).last_hidden_state, modules, layers, twin)
    layouts = {m.layout for m in sparse.modules() if isinstance(m, SparseFFN)}
    assert layouts == {"sequence_first" if kind == "FSMT" else "tokens"}


def test_the_hidden_dropout_of_bart_goes_into_the_experts():
    transformers = pytest.importorskip("transformers")
    dense = transformers.BartModel(transformers.BartConfig(**BART))
    sparse = sparsify(dense, MOE, BART_BLOCKS)
    assert sparse.encoder.layers[0].fc1.config.expert == GeneralFFN(24, "gelu", dropout=0.1)
    assert sparse.encoder.layers[0].activation_dropout == 0.0
    twin = dense_twin(dense, sparse).encoder.layers[0]
    # Two experts of 24 units, and a gate of 4 x 16 that costs as much as two units.
    assert (twin.fc1.out_features, twin.fc2.in_features, twin.activation_dropout) == (50, 50, 0.1)


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_towers_of_open_clip(quick_gelu):
    open_clip = pytest.importorskip("open_clip")
    vision = {"layers": 2, "width": DIM, "patch_size": 8, "image_size": 16, "head_width": 8}
    text = {"context_length": 7, "vocab_size": 20, "width": DIM, "heads": 2, "layers": 2}
    dense = open_clip.CLIP(16, vision, text, quick_gelu=quick_gelu)
    images, towers = torch.randn(2, 3, 16, 16), ["visual.transformer.resblocks.*.mlp", "transformer.resblocks.*.mlp"]
    twin = (2, [*VIT_TOKENS, 14, 14])
    check_begins_and_trains(dense, lambda model: torch.cat(model(images, IDS)[:2]), towers, 4, twin)


def test_mmoe_of_torch_rechub():
    pytest.importorskip("torch_rechub")
    from torch_rechub.basic.features import DenseFeature
    from torch_rechub.models.multi_task import MMOE

    features, tower = [DenseFeature(f"f{i}") for i in range(6)], {"dims": [4]}
    experts = {"dims": [8, 6], "dropout": 0.1}
    dense = varied(MMOE(features, ["classification", "regression"], 3, experts, [tower, tower]))
    x = {f"f{i}": torch.randn(40) for i in range(6)}
    sparse = check_begins_and_trains(dense, lambda model: model(x), "experts.*", 3)
    assert sparse.experts[0].config.expert == MLP((8, 6), norm="batch", dropout=0.1)
    with pytest.raises(ValueError, match=r"module 'towers.0': an MLP of torch-rechub .* output_layer=False"):
        sparsify(dense, MOE, "towers.*")
    twin = dense_twin(dense, like=sparse)
    # Two experts of 2 * (6 * 8 + 8 * 6) FLOPs and a gate of 2 * 6 * 4 cost 432; a unit costs 2 * (6 + 6): 18.
    assert [[m.out_features for m in e.mlp if isinstance(m, nn.Linear)] for e in twin.experts] == [[18, 6]] * 3
    y, expected = twin.eval()(x), dense(x)
    assert (y - expected).norm() <= 1e-6 * expected.norm()
