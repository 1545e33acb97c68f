"""A dense model made sparse: its outputs at the start, what is kept, what trains, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core.convert import SparseFFN

MOE = core.MoEConfig(4, core.TokenChoice(2))
UNIT = core.MoEConfig(4, core.TokenChoice(1, normalize="unit"))


def ffn(dim: int = 8, hidden: int = 12, out: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim if out is None else out))


class Block(nn.Module):
    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), ffn() if mlp is None else mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.Sequential(Block(), Block()), "head": nn.Linear(8, 3)})


def check_same(sparse: nn.Module, dense: nn.Module, *inputs: Tensor) -> None:
    """Check that two models compute the same in evaluation, to 1e-6 of the output's norm."""
    sparse.eval(), dense.eval()
    with torch.no_grad():
        y, expected = sparse(*inputs), dense(*inputs)
    assert y.shape == expected.shape
    assert (y - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(
    "moe",
    [
        MOE,
        UNIT,
        # Gates that sum to 2.5 and to 2: the outputs of the copies are divided by that.
        core.MoEConfig(4, core.TokenChoice(3, score_func="sigmoid", expert_bias=True, scale=2.5)),
        core.MoEConfig(4, core.TokenChoice(2, normalize="unit")),
        core.MoEConfig(4, core.Dense()),
        core.MoEConfig(4, core.Merge()),
        core.MoEConfig(4, core.Random(2)),
        core.MoEConfig(4, core.Random(1, per="batch", evaluation="merged")),
        core.MoEConfig(4, core.TokenChoice(2), num_shared_experts=1, shared_gate="mix", output_bias=True),
    ],
    ids=lambda moe: type(moe.router).__name__,
)
def test_copies_begin_as_the_network(moe):
    dense = net()["blocks"]
    sparse = core.sparsify(dense, moe, "*.mlp")
    check_same(sparse, dense, torch.randn(3, 5, 8))
    assert list(core.moe_layers(sparse)) == ["0.mlp.moe", "1.mlp.moe"]
    assert all(isinstance(layer, core.MoE) for layer in core.moe_layers(sparse).values())


def test_tokens_are_of_any_shape_and_maps_channels_first():
    dense = ffn(out=5)
    sparse = core.sparsify(dense, MOE, "")
    assert isinstance(sparse, SparseFFN)
    for shape in ((6, 8), (2, 5, 8), (2, 3, 4, 8), (2, 3, 2, 2, 8)):
        check_same(sparse, dense, torch.randn(shape))
    maps = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 1))
    check_same(core.sparsify(maps, MOE, ""), maps, torch.randn(2, 8, 3, 5))


def test_an_image_is_one_sequence_of_a_router():
    """Expert choice takes ``capacity_factor * S / E`` tokens of a sequence: 12 of a map of 3 x 4, or tokens of it."""
    moe = core.MoEConfig(4, core.ExpertChoice(1.0))
    of_maps = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    for dense, x in ((ffn(), torch.randn(2, 3, 4, 8)), (of_maps, torch.randn(2, 8, 3, 4))):
        sparse = core.sparsify(dense, moe, "", start="random")
        with core.record(sparse) as tape:
            sparse(x)
        assert tape.entries[0].routing.tokens_per_expert_E.tolist() == [2 * 12 // 4] * 4


@pytest.mark.parametrize(("batch_first", "activation"), [(True, "relu"), (False, F.gelu), (True, nn.SiLU())])
def test_an_encoder_of_torch(batch_first, activation):
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, activation, batch_first=batch_first)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sparse = core.sparsify(dense, MOE, "layers.*")
    check_same(sparse, dense, torch.randn(3, 4, 8))
    assert list(core.moe_layers(sparse)) == ["layers.0.linear1.moe", "layers.1.linear1.moe"]
    with core.record(sparse) as tape:
        sparse(torch.randn(3, 4, 8))
    assert tape.entries[0].routing.num_sequences == (3 if batch_first else 4)


def test_padding_of_an_encoder_of_torch():
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    sparse = core.sparsify(dense, MOE, "layers.1")  # the first block alone would go by torch's fused path
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        y, expected = (m(x, src_key_padding_mask=padding)[~padding] for m in (sparse, dense))
    assert (y - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("activation", [F.gelu, nn.GELU()])
def test_a_copy_of_a_sparse_decoder_layer_computes_the_same(activation):
    """torch gives a decoder layer without an activation of its own a ReLU where it is copied or unpickled."""
    sparse = core.sparsify(nn.TransformerDecoderLayer(8, 2, 12, 0.0, activation), MOE, "")
    x, memory = torch.randn(5, 2, 8), torch.randn(4, 2, 8)
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), core.average_models([sparse])):
        assert torch.equal(copied(x, memory), sparse(x, memory))


def test_a_named_container_goes_on_to_answer_for_its_weight():
    dense = nn.ModuleDict(
        {"mlp": nn.Sequential(OrderedDict(c_fc=nn.Linear(8, 12), act=nn.ReLU(), c_proj=nn.Linear(12, 8)))}
    )
    sparse = core.sparsify(dense.double(), MOE, "mlp")
    assert sparse["mlp"].c_fc.weight.dtype == torch.float64
    check_same(sparse["mlp"], dense["mlp"], torch.randn(5, 8, dtype=torch.float64))


def test_dropout_is_kept_inside_and_behind():
    dense = nn.Sequential(nn.Linear(1, 4000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4000, 1, bias=False))
    with torch.no_grad():
        for p in dense.parameters():
            p.fill_(1.0)
    sparse = core.sparsify(dense, MOE, "").train()
    # Each hidden number is 1 + 1 at x = 1; half of them stay and are doubled, so that the mean stays and others vary.
    y = sparse(torch.ones(50, 1)).flatten() / 8000
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert 0.004 < y.std().item() < 0.03  # sqrt(1 / 4000) = 0.016 of one network, and less of two
    assert sparse.eval()(torch.ones(1, 1)).item() == pytest.approx(8000)
    behind = core.sparsify(nn.Sequential(*ffn(), nn.Dropout(0.25)), MOE, "").train()
    assert (behind(torch.randn(200, 8)) == 0).float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_the_dense_model_and_torch_s_random_state_stay():
    dense = net()
    before, state = copy.deepcopy(dense.state_dict()), torch.random.get_rng_state()
    sparse = core.sparsify(dense, MOE, "blocks.*.mlp")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        for p in sparse.parameters():
            p.add_(1.0)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.items())


def test_experts_and_routers_train():
    sparse = core.sparsify(
        net(), core.MoEConfig(4, core.TokenChoice(2), balance=core.Balance(load_balancing_loss=0.01)), "blocks.*.mlp"
    )
    with core.record(sparse) as tape:
        loss = sparse["head"](sparse["blocks"](torch.randn(4, 5, 8))).square().mean()
    assert [entry.name for entry in tape.entries] == ["blocks.0.mlp.moe", "blocks.1.mlp.moe"]
    (loss + core.aux_loss(tape)).backward()
    assert all(p.grad is not None and p.grad.any() for p in sparse.parameters())


def test_it_is_saved_loaded_copied_and_pickled():
    sparse, x = core.sparsify(net()["blocks"], MOE, "*.mlp", seed=1), torch.randn(2, 3, 8)
    y = sparse(x)
    fresh, again = (core.sparsify(net()["blocks"], MOE, "*.mlp", seed=seed) for seed in (0, 1))
    of_fresh, of_sparse = ([block.mlp.moe.router.gate.weight for block in model] for model in (fresh, sparse))
    assert torch.equal(again(x), y)  # a seed decides the gates
    assert not torch.equal(of_fresh[0], of_sparse[0])
    assert not torch.equal(of_sparse[0], of_sparse[1])
    fresh.load_state_dict(sparse.state_dict())
    for other in (fresh, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))):
        assert torch.equal(other(x), y)
    assert str(core.summary(copy.deepcopy(sparse))) == str(core.summary(sparse))


def test_layers_have_the_model_s_dtype_device_and_mode():
    dense = net().to(torch.bfloat16)
    dense["blocks"][1].eval()
    sparse = core.sparsify(dense, MOE, "blocks.*.mlp")
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert [block.mlp.moe.experts.training for block in sparse["blocks"]] == [True, False]
    with torch.device("meta"):
        dense = ffn()
    assert core.sparsify(dense, MOE, "").moe.experts.w_in.is_meta


def test_one_expert_by_its_score_begins_scaled_and_is_refused_unless_asked_for():
    dense, moe, x = ffn(), core.MoEConfig(4, core.TokenChoice(1)), torch.randn(6, 8)
    with pytest.raises(
        ValueError, match=r"do not sum to a constant, so that start='copy' does not begin .* exact=False"
    ):
        core.sparsify(dense, moe, "")
    sparse = core.sparsify(dense, moe, "", exact=False)
    gate_T = sparse.moe.router.gate(x).softmax(-1).amax(-1)
    ratio_T = (sparse(x) / dense(x)).mean(-1)
    # Outputs are scaled by one number, so that they are right where the gate is as on average.
    torch.testing.assert_close(ratio_T / ratio_T[0], gate_T / gate_T[0])
    assert 0.7 < ratio_T.mean() < 1.4


def test_noise_is_relative_to_each_matrix():
    dense = ffn(200, 300)
    with torch.no_grad():
        dense[0].weight.mul_(10)
    experts = core.sparsify(dense, MOE, "", noise=0.1).moe.experts
    for name, weight in (("w_in", dense[0].weight.t()), ("w_out", dense[2].weight.t())):
        change = getattr(experts, name) - weight
        assert (change.std() / weight.std()).item() == pytest.approx(0.1, rel=0.02)
        assert not torch.equal(change[0], change[1])
    assert torch.equal(experts.b_in, dense[0].bias.expand(4, -1))


def test_a_random_start_has_experts_of_the_network_s_kind_or_of_any():
    dense = ffn(out=5)
    sparse = core.sparsify(dense, MOE, "", start="random")
    assert sparse.config.expert == core.FFN(12, bias=True)
    assert not torch.equal(sparse.moe.experts.w_in[0], dense[0].weight.t())
    other = core.sparsify(dense, core.MoEConfig(4, core.TokenChoice(1), core.SwiGLU(7)), "", start="random")
    assert other.moe.experts.w_gate.shape == (4, 8, 7)
    assert other(torch.randn(3, 8)).shape == (3, 5)


def frozen() -> nn.Module:
    model = net()
    model["blocks"][1].mlp[0].bias.requires_grad_(False)
    return model


def nested() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12)
    layer.inner = ffn()
    return nn.ModuleDict({"layer": layer})


def tied(weight_alone: bool) -> nn.Module:
    model = net()
    if weight_alone:
        model["head"] = nn.Linear(8, 12)
        model["head"].weight = model["blocks"][0].mlp[0].weight
    else:
        model["blocks"][1].mlp = model["blocks"][0].mlp
    return model


@pytest.mark.parametrize(
    ("model", "moe", "modules", "options", "message"),
    [
        (net, MOE, "blocks.*.ffn", {}, r"modules='blocks.\*.ffn' names no module; .* are blocks.0.mlp, blocks.1.mlp"),
        (net, MOE, "*.mlp", {}, r"modules='\*.mlp' names no module"),
        (net, MOE, "blocks.*", {}, r"module 'blocks.0' is a Block, which is no .*; there are blocks.0.mlp in it"),
        (
            lambda: core.sparsify(net(), MOE, "blocks.*.mlp"),
            MOE,
            "blocks.0.mlp",
            {},
            r"'blocks.0.mlp' is sparse already",
        ),
        (net, MOE, "head", {}, r"module 'head' is a Linear, which is no feed-forward network"),
        (net, MOE, "blocks.0.*", {}, r"module 'blocks.0.norm' is a LayerNorm"),
        (net, MOE, ["blocks.*.mlp", "blocks.0.mlp"], {}, r"'blocks.\*.mlp' and 'blocks.0.mlp' both name"),
        (lambda: nn.Sequential(ffn(), nn.ReLU(), nn.Linear(8, 8)), MOE, [], {}, r"modules=\[\] is neither"),
        (frozen, MOE, "blocks.*.mlp", {}, r"module 'blocks.1.mlp': its weight blocks.1.mlp.0.bias is frozen"),
        (nested, MOE, ["layer", "layer.inner"], {}, r"names 'layer' and 'layer.inner', which is a part of it"),
        (lambda: tied(True), MOE, "blocks.0.mlp", {}, r"is tied: blocks.0.mlp.0.weight and head.weight are one"),
        (lambda: tied(False), MOE, "blocks.0.mlp", {}, r"is tied: blocks.0.mlp.0.weight and blocks.1.mlp.0"),
        (net, core.MoEConfig(4, core.Hash(vocab_size=9)), "blocks.*.mlp", {}, r"Hash .* needs context.token_ids_BS"),
        (
            net,
            core.MoEConfig(4, expert=core.FFN(3)),
            "blocks.*.mlp",
            {},
            r"module 'blocks.0.mlp': expert=FFN\(hidden_dim=3.* leave",
        ),
        (net, core.MoEConfig(4, expert=core.LoRA()), "blocks.*.mlp", {}, r"leave moe.expert at its default"),
        (net, core.MoEConfig(4, granularity=2), "blocks.*.mlp", {}, r"granularity=2 makes experts narrower"),
        (net, core.MoEConfig(4, num_shared_experts=1), "blocks.*.mlp", {}, r"num_shared_experts=1 with .*='none' adds"),
        (net, core.MoEConfig(4, core.SoftSlots()), "blocks.*.mlp", {}, r"do not sum to a constant"),
        (
            net,
            core.MoEConfig(4, core.ExpertChoice()),
            "blocks.*.mlp",
            {"exact": False, "causal": True},
            r"not for a causal",
        ),
        (net, MOE, "blocks.*.mlp", {"start": "clone"}, r"start='clone' is not one of copy, "),
        (net, MOE, "blocks.*.mlp", {"noise": -1.0}, r"noise=-1.0 is not at least 0"),
        (net, MOE, "blocks.*.mlp", {"seed": 0.5}, r"seed=0.5 is not an integer"),
        (net, core.TokenChoice(2), "blocks.*.mlp", {}, r"moe=TokenChoice.* is not of class MoEConfig"),
        (
            net,
            core.MoEConfig(2, core.TokenChoice(2), core.MLP((3,))),
            "blocks.*.mlp",
            {"start": "random"},
            r"out_dim=8 is not 3",
        ),
    ],
)
def test_bad_input(model, moe, modules, options, message):
    dense = model()
    before = dict(dense.named_modules())
    with pytest.raises(ValueError, match=message) as error:
        core.sparsify(dense, moe, modules, **options)
    assert "\n" not in str(error.value)
    assert dict(dense.named_modules()) == before
