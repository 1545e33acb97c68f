"""WideNet: one set of experts for all blocks."""

import copy

import pytest
import torch
from torch.testing import assert_close

import core
from apps.compare.systems import find_systems
from apps.nets.config import TransformerConfig
from apps.nets.depths import MixtureOfDepths
from apps.nets.transformer import LanguageModel
from apps.train.optim.optimizers import build_optimizer
from apps.train.step.module import OptimizerConfig
from apps.vision.batch import ImageBatch
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

TEXT = torch.tensor([[2, 5, 6, 7], [2, 9, 9, 4]])
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(12), num_shared_experts=1)
CONFIG = TransformerConfig("nano", dim=16, hidden_dim=24, decoder_layers=3, dropout=0.0)


def language_model(**options: object) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(CONFIG, vocab=20, ffn=MOE, **options).double()


def test_each_block_has_its_own_router_and_the_experts_of_all_whose_gradients_add_up():
    # Three layers of 4 + 1 experts of 2 * 16 * 12 = 384 weights and a router of 64: what two layers less have is gone.
    own, shared = language_model(), language_model(share_experts=True)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (own, shared)]
    assert sizes[0] - sizes[1] == 2 * 5 * 384
    layers = list(core.moe_layers(shared).values())
    assert len({id(layer.experts) for layer in layers}) == len({id(layer.shared_experts) for layer in layers}) == 1
    assert len({id(layer.router) for layer in layers}) == len(layers) == 3
    # A token takes up to all 4 of them on its way, 2 in each of 3 layers.
    assert core.active_params(shared) == sizes[1]
    assert core.active_params(own) == sizes[0] - 3 * 2 * 384
    with pytest.raises(ValueError, match="share_experts=True needs moe"):
        LanguageModel(CONFIG, vocab=20, share_experts=True)
    dense = LanguageModel(CONFIG, vocab=20, ffn=core.DenseFFN(8), share_experts=True)  # as a baseline is made
    assert core.moe_layers(dense) == {}
    shared = language_model(share_experts=True)
    own = language_model()
    own.load_state_dict(shared.state_dict())  # every layer's experts are in it, under the names of each
    assert_close(own(TEXT), shared(TEXT))
    for model in (own, shared):
        model(TEXT).square().sum().backward()
    total = sum(layer.experts.w_in.grad for layer in core.moe_layers(own).values())
    assert_close(core.moe_layers(shared)["decoder.layers.0.ffn"].experts.w_in.grad, total)
    model = language_model(share_experts=True, depths=MixtureOfDepths(0.5, predictor=True))
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.01))
    with core.record(model) as tape:
        (model(TEXT).square().mean() + core.aux_loss(tape)).backward()
    optimizer.step()
    core.update_expert_bias(model, tape)
    other = copy.deepcopy(model)
    assert torch.equal(other.eval()(TEXT), model.eval()(TEXT))
    layers = [layer for layer in core.moe_layers(other).values() if isinstance(layer, core.MoE)]
    assert len({id(layer.experts) for layer in layers}) == 1


def test_baselines_cost_what_they_say():
    torch.manual_seed(0)
    module = VisionClassifier(
        ViTConfig(patch_size=2, embed_dim=32, depth=4, num_heads=2, pool="avg"),
        moe=core.MoEConfig(8, core.TokenChoice(2), core.FFN(64)),
        moe_blocks="all",
        image_size=8,
        share_experts=True,
    )
    batch = ImageBatch(torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), torch.arange(2))
    systems = {s.name: s for s in find_systems(module, batch)}
    assert systems["dense_equal_flops"].replaced_ratio == pytest.approx(1, abs=0.05)
    # 8 experts of 64 over 4 layers are 2 a layer, and a router of 8 rows: 129 wide, where own experts would be 520.
    assert systems["dense_equal_params"].params_ratio == pytest.approx(1, abs=0.05)
    assert "hidden dim 129 in place" in systems["dense_equal_params"].note
