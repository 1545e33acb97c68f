"""A dense model made sparse: its outputs at the start, what is kept, what trains, and what is refused."""

from __future__ import annotations

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from core import (
    FFN,
    Balance,
    Dense,
    ExpertChoice,
    GeneralFFN,
    Hash,
    LoRA,
    Merge,
    MoE,
    MoEConfig,
    Random,
    SoftSlots,
    SwiGLU,
    TokenChoice,
    aux_loss,
    average_models,
    moe_layers,
    record,
    sparsify,
    summary,
)
from core.convert import SparseFFN

MOE = MoEConfig(4, TokenChoice(2))
UNIT = MoEConfig(4, TokenChoice(1, normalize="unit"))


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
        MoEConfig(4, TokenChoice(3, score_func="sigmoid", expert_bias=True, scale=2.5)),
        MoEConfig(4, TokenChoice(2, normalize="unit")),
        MoEConfig(4, Dense()),
        MoEConfig(4, Merge()),
        MoEConfig(4, Random(2)),
        MoEConfig(4, Random(1, per="batch", evaluation="merged")),
        MoEConfig(4, TokenChoice(2), num_shared_experts=1, shared_gate="mix", output_bias=True),
    ],
    ids=lambda moe: type(moe.router).__name__,
)
def test_copies_begin_as_the_network(moe):
    dense = net()["blocks"]
    sparse = sparsify(dense, moe, "*.mlp")
    check_same(sparse, dense, torch.randn(3, 5, 8))
    assert list(moe_layers(sparse)) == ["0.mlp.moe", "1.mlp.moe"]
    assert all(isinstance(layer, MoE) for layer in moe_layers(sparse).values())


@pytest.mark.parametrize("shape", [(6, 8), (2, 5, 8), (2, 3, 4, 8), (2, 3, 2, 2, 8)])
def test_tokens_of_any_shape(shape):
    dense = ffn(out=5)
    sparse = sparsify(dense, MOE, "")
    check_same(sparse, dense, torch.randn(shape))
    assert isinstance(sparse, SparseFFN)


def test_maps_are_channels_first():
    dense = nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 6, 1))
    check_same(sparsify(dense, MOE, ""), dense, torch.randn(2, 8, 3, 5))


def test_an_image_is_one_sequence_of_a_router():
    """Expert choice takes ``capacity_factor * S / E`` tokens of a sequence: 12 of a map of 3 x 4, or tokens of it."""
    moe = MoEConfig(4, ExpertChoice(1.0))
    of_maps = nn.Sequential(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
    for dense, x in ((ffn(), torch.randn(2, 3, 4, 8)), (of_maps, torch.randn(2, 8, 3, 4))):
        sparse = sparsify(dense, moe, "", start="random")
        with record(sparse) as tape:
            sparse(x)
        assert tape.entries[0].routing.tokens_per_expert_E.tolist() == [2 * 12 // 4] * 4


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.SiLU()])
def test_an_encoder_of_torch(batch_first, activation):
    layer = nn.TransformerEncoderLayer(8, 2, 12, 0.1, activation, batch_first=batch_first)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    sparse = sparsify(dense, MOE, "layers.*")
    check_same(sparse, dense, torch.randn(3, 4, 8))
    assert list(moe_layers(sparse)) == ["layers.0.linear1.moe", "layers.1.linear1.moe"]
    with record(sparse) as tape:
        sparse(torch.randn(3, 4, 8))
    assert tape.entries[0].routing.num_sequences == (3 if batch_first else 4)


def test_padding_of_an_encoder_of_torch():
    dense = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True), 2).eval()
    sparse = sparsify(dense, MOE, "layers.1")  # the first block alone would go by torch's fused path
    x, padding = torch.randn(2, 4, 8), torch.tensor([[False] * 4, [False, False, True, True]])
    with torch.no_grad():
        y, expected = (m(x, src_key_padding_mask=padding)[~padding] for m in (sparse, dense))
    assert (y - expected).norm() <= 1e-6 * expected.norm()


def test_a_transformer_of_torch_with_its_decoder():
    dense = nn.Transformer(8, 2, 1, 2, 12, batch_first=True)
    sparse = sparsify(dense, MOE, ["encoder.layers.*", "decoder.layers.*"])
    check_same(sparse, dense, torch.randn(2, 4, 8), torch.randn(2, 3, 8))
    assert len(moe_layers(sparse)) == 3


@pytest.mark.parametrize("activation", [F.gelu, nn.GELU()])
def test_a_copy_of_a_sparse_decoder_layer_computes_the_same(activation):
    """torch gives a decoder layer without an activation of its own a ReLU where it is copied or unpickled."""
    sparse = sparsify(nn.TransformerDecoderLayer(8, 2, 12, 0.0, activation), MOE, "")
    x, memory = torch.randn(5, 2, 8), torch.randn(4, 2, 8)
    for copied in (copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse)), average_models([sparse])):
        assert torch.equal(copied(x, memory), sparse(x, memory))


def test_a_block_like_bert_s_keeps_residual_norm_and_dropout():
    class Into(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.intermediate_act_fn = nn.Linear(8, 12), nn.GELU()

        def forward(self, x):
            return self.intermediate_act_fn(self.dense(x))

    class Out(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.LayerNorm, self.dropout = nn.Linear(12, 8), nn.LayerNorm(8), nn.Dropout(0.1)

        def forward(self, h, x):
            return self.LayerNorm(self.dropout(self.dense(h)) + x)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.intermediate, self.output = Into(), Out()

        def forward(self, x):
            return self.output(self.intermediate(x), x)

    dense = nn.Sequential(Layer(), Layer())
    sparse = sparsify(dense, MOE, "*")
    check_same(sparse, dense, torch.randn(2, 3, 8))
    assert isinstance(sparse[0].output.dropout, nn.Dropout)
    assert list(moe_layers(sparse)) == ["0.intermediate.moe", "1.intermediate.moe"]


def test_a_named_container_goes_on_to_answer_for_its_weight():
    dense = nn.ModuleDict(
        {"mlp": nn.Sequential(OrderedDict(c_fc=nn.Linear(8, 12), act=nn.ReLU(), c_proj=nn.Linear(12, 8)))}
    )
    sparse = sparsify(dense.double(), MOE, "mlp")
    assert sparse["mlp"].c_fc.weight.dtype == torch.float64
    check_same(sparse["mlp"], dense["mlp"], torch.randn(5, 8, dtype=torch.float64))


def test_dropout_is_kept_inside_and_behind():
    dense = nn.Sequential(nn.Linear(1, 4000), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4000, 1, bias=False))
    with torch.no_grad():
        for p in dense.parameters():
            p.fill_(1.0)
    sparse = sparsify(dense, MOE, "").train()
    # Each hidden number is 1 + 1 at x = 1; half of them stay and are doubled, so that the mean stays and others vary.
    y = sparse(torch.ones(50, 1)).flatten() / 8000
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert 0.004 < y.std().item() < 0.03  # sqrt(1 / 4000) = 0.016 of one network, and less of two
    assert sparse.eval()(torch.ones(1, 1)).item() == pytest.approx(8000)
    behind = sparsify(nn.Sequential(*ffn(), nn.Dropout(0.25)), MOE, "").train()
    assert (behind(torch.randn(200, 8)) == 0).float().mean().item() == pytest.approx(0.25, abs=0.06)


def test_the_dense_model_and_torch_s_random_state_stay():
    dense = net()
    before, state = copy.deepcopy(dense.state_dict()), torch.random.get_rng_state()
    sparse = sparsify(dense, MOE, "blocks.*.mlp")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.items())
    with torch.no_grad():
        for p in sparse.parameters():
            p.add_(1.0)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.items())


def test_a_seed_decides_the_gates():
    gates = [
        sparsify(net(), MOE, "blocks.*.mlp", seed=seed).get_parameter(f"blocks.{i}.mlp.moe.router.gate.weight")
        for seed, i in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    assert [torch.equal(gates[0], gate) for gate in gates] == [True, True, False, False]


def test_experts_and_routers_train():
    sparse = sparsify(net(), MoEConfig(4, TokenChoice(2), balance=Balance(load_balancing_loss=0.01)), "blocks.*.mlp")
    with record(sparse) as tape:
        loss = sparse["head"](sparse["blocks"](torch.randn(4, 5, 8))).square().mean()
    assert [entry.name for entry in tape.entries] == ["blocks.0.mlp.moe", "blocks.1.mlp.moe"]
    (loss + aux_loss(tape)).backward()
    assert all(p.grad is not None and p.grad.any() for p in sparse.parameters())


def test_it_is_saved_loaded_copied_and_pickled():
    sparse, x = sparsify(net()["blocks"], MOE, "*.mlp", seed=1), torch.randn(2, 3, 8)
    y = sparse(x)
    fresh = sparsify(net()["blocks"], MOE, "*.mlp")
    assert not torch.equal(fresh[0].mlp.moe.router.gate.weight, sparse[0].mlp.moe.router.gate.weight)
    fresh.load_state_dict(sparse.state_dict())
    file = io.BytesIO()
    torch.save(sparse, file)
    file.seek(0)
    for other in (
        fresh,
        copy.deepcopy(sparse),
        pickle.loads(pickle.dumps(sparse)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), y)
    assert str(summary(copy.deepcopy(sparse))) == str(summary(sparse))


def test_layers_have_the_model_s_dtype_device_and_mode():
    dense = net().to(torch.bfloat16)
    dense["blocks"][1].eval()
    sparse = sparsify(dense, MOE, "blocks.*.mlp")
    assert {p.dtype for p in sparse.parameters()} == {torch.bfloat16}
    assert [block.mlp.moe.experts.training for block in sparse["blocks"]] == [True, False]
    with torch.device("meta"):
        dense = ffn()
    assert sparsify(dense, MOE, "").moe.experts.w_in.is_meta


def test_one_expert_by_its_score_begins_scaled_and_is_refused_unless_asked_for():
    dense, moe, x = ffn(), MoEConfig(4, TokenChoice(1)), torch.randn(6, 8)
    with pytest.raises(
        ValueError, match=r"do not sum to a constant, so that start='copy' does not begin .* exact=False"
    ):
        sparsify(dense, moe, "")
    sparse = sparsify(dense, moe, "", exact=False)
    gate_T = sparse.moe.router.gate(x).softmax(-1).amax(-1)
    ratio_T = (sparse(x) / dense(x)).mean(-1)
    # Outputs are scaled by one number, so that they are right where the gate is as on average.
    torch.testing.assert_close(ratio_T / ratio_T[0], gate_T / gate_T[0])
    assert 0.7 < ratio_T.mean() < 1.4


def test_noise_is_relative_to_each_matrix():
    dense = ffn(200, 300)
    with torch.no_grad():
        dense[0].weight.mul_(10)
    experts = sparsify(dense, MOE, "", noise=0.1).moe.experts
    for name, weight in (("w_in", dense[0].weight.t()), ("w_out", dense[2].weight.t())):
        change = getattr(experts, name) - weight
        assert (change.std() / weight.std()).item() == pytest.approx(0.1, rel=0.02)
        assert not torch.equal(change[0], change[1])
    assert torch.equal(experts.b_in, dense[0].bias.expand(4, -1))


def test_a_random_start_has_experts_of_the_network_s_kind_or_of_any():
    dense = ffn(out=5)
    sparse = sparsify(dense, MOE, "", start="random")
    assert sparse.config.expert == FFN(12, bias=True)
    assert not torch.equal(sparse.moe.experts.w_in[0], dense[0].weight.t())
    other = sparsify(dense, MoEConfig(4, TokenChoice(1), SwiGLU(7)), "", start="random")
    assert other.moe.experts.w_gate.shape == (4, 8, 7)
    assert other(torch.randn(3, 8)).shape == (3, 5)


def test_a_hidden_dropout_in_a_block_of_torch_is_of_the_experts():
    sparse = sparsify(nn.TransformerEncoderLayer(8, 2, 12, 0.3), MOE, "")
    assert sparse.linear1.config.expert == GeneralFFN(12, "relu", dropout=0.3)
    assert sparse.dropout2.p == 0.3
    assert isinstance(sparse.dropout, nn.Identity)


def frozen() -> nn.Module:
    model = net()
    model["blocks"][1].mlp[0].bias.requires_grad_(False)
    return model


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
        (lambda: sparsify(net(), MOE, "blocks.*.mlp"), MOE, "blocks.0.mlp", {}, r"'blocks.0.mlp' is sparse already"),
        (net, MOE, "head", {}, r"module 'head' is a Linear, which is no feed-forward network"),
        (net, MOE, "blocks.0.*", {}, r"module 'blocks.0.norm' is a LayerNorm"),
        (net, MOE, ["blocks.*.mlp", "blocks.0.mlp"], {}, r"'blocks.\*.mlp' and 'blocks.0.mlp' both name"),
        (lambda: nn.Sequential(ffn(), nn.ReLU(), nn.Linear(8, 8)), MOE, [], {}, r"modules=\[\] is neither"),
        (frozen, MOE, "blocks.*.mlp", {}, r"module 'blocks.1.mlp': its weight blocks.1.mlp.0.bias is frozen"),
        (lambda: tied(True), MOE, "blocks.0.mlp", {}, r"is tied: blocks.0.mlp.0.weight and head.weight are one"),
        (lambda: tied(False), MOE, "blocks.0.mlp", {}, r"is tied: blocks.0.mlp.0.weight and blocks.1.mlp.0"),
        (net, MoEConfig(4, Hash(vocab_size=9)), "blocks.*.mlp", {}, r"Hash .* needs context.token_ids_BS"),
        (
            net,
            MoEConfig(4, expert=FFN(3)),
            "blocks.*.mlp",
            {},
            r"module 'blocks.0.mlp': expert=FFN\(hidden_dim=3.* leave",
        ),
        (net, MoEConfig(4, expert=LoRA()), "blocks.*.mlp", {}, r"leave moe.expert at its default"),
        (net, MoEConfig(4, granularity=2), "blocks.*.mlp", {}, r"granularity=2 makes experts narrower"),
        (net, MoEConfig(4, num_shared_experts=1), "blocks.*.mlp", {}, r"num_shared_experts=1 with .*='none' adds"),
        (net, MoEConfig(4, SoftSlots()), "blocks.*.mlp", {}, r"do not sum to a constant"),
        (net, MoEConfig(4, ExpertChoice()), "blocks.*.mlp", {"exact": False, "causal": True}, r"not for a causal"),
        (net, MOE, "blocks.*.mlp", {"start": "clone"}, r"start='clone' is not one of copy, "),
        (net, MOE, "blocks.*.mlp", {"noise": -1.0}, r"noise=-1.0 is not at least 0"),
        (net, MOE, "blocks.*.mlp", {"seed": 0.5}, r"seed=0.5 is not an integer"),
        (net, TokenChoice(2), "blocks.*.mlp", {}, r"moe=TokenChoice.* is not of class MoEConfig"),
        (net, MoEConfig(2, TokenChoice(2), core.MLP((3,))), "blocks.*.mlp", {"start": "random"}, r"out_dim=8 is not 3"),
    ],
)
def test_bad_input(model, moe, modules, options, message):
    dense = model()
    before = dict(dense.named_modules())
    with pytest.raises(ValueError, match=message) as error:
        sparsify(dense, moe, modules, **options)
    assert "\n" not in str(error.value)
    assert dict(dense.named_modules()) == before


def test_a_network_inside_another_one_that_is_named_too_is_refused():
    layer = nn.TransformerEncoderLayer(8, 2, 12)
    layer.inner = ffn()
    with pytest.raises(ValueError, match=r"names 'layer' and 'layer.inner', which is a part of it"):
        sparsify(nn.ModuleDict({"layer": layer}), MOE, ["layer", "layer.inner"])
