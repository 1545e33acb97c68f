"""Mixture-of-Depths: which tokens enter a block, what they see there, costs, and decoding by the predictor."""

import copy

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import core
from apps.data.subwords import PAD_ID
from apps.nets import transformer
from apps.nets.config import TransformerConfig
from apps.nets.depths import LOSS, DepthGate, Entered, MixtureOfDepths, by_capacity, depth_gates
from apps.nets.transformer import LanguageModel
from apps.train.cost.flops import measure_cost
from apps.vision.model import ViTConfig, VMoE

VOCAB = 20
TEXT = torch.tensor([[2, 5, 6, 7, 9, 4, 11, 8], [2, 9, 9, 4, 12, 13, 3, 0], [2, 4, 7, 7, 0, 0, 0, 0]])
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=12))
HALF = MixtureOfDepths(0.5, predictor=True)
POSITIONS = ("sinusoidal", "learned", "rotary", "relative", "none")


def gate(weight: list[float], **options: object) -> DepthGate:
    """Return a gate whose r is the product of a token and ``weight``."""
    built = MixtureOfDepths(**options).build(len(weight))
    with torch.no_grad():
        built.router.gate.weight.copy_(torch.tensor([weight]))
    return built


def language_model(
    depths: MixtureOfDepths | None = HALF, moe: core.MoEConfig | None = None, blocks="all", seed: int = 0, **options
) -> LanguageModel:
    torch.manual_seed(seed)
    small = {"dim": 16, "hidden_dim": 24, "relative_buckets": 8, "relative_max_distance": 16, "decoder_layers": 3}
    config = TransformerConfig("nano", **{**small, "dropout": 0.0, **options})
    model = LanguageModel(config, vocab=VOCAB, ffn=moe, depths=depths, depth_blocks=blocks).double().eval()
    gates = [layer.depth_gate for layer in model.decoder.layers if layer.depth_gate is not None]
    for of_layer in gates:  # as if trained: about half of the tokens enter
        inputs: list[Tensor] = []
        hook = of_layer.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0]))
        for parameter in of_layer.router.predictor.parameters():
            torch.nn.init.normal_(parameter)
        with torch.no_grad():
            model(TEXT)
            # Between two tokens: one at 0 itself would fall on either side, by rounding.
            logits = of_layer.router.predictor(inputs[0])[TEXT != PAD_ID].flatten().mul(1e6).round().unique() / 1e6
            of_layer.router.predictor[2].bias -= logits[len(logits) // 2 - 1 : len(logits) // 2 + 1].mean()
        hook.remove()
    return model


def vision_model(depths: MixtureOfDepths | None, blocks: str = "every2", **options: object) -> VMoE:
    torch.manual_seed(0)
    vit = ViTConfig(patch_size=2, embed_dim=16, depth=4, num_heads=2, pool="avg")
    return VMoE(vit, image_size=8, in_chans=1, num_classes=3, depths=depths, depth_blocks=blocks, **options).eval()


def test_the_best_of_the_real_tokens_enter_and_the_others_pass_by():
    # r is the first number of a token: 1, 4, -2, 3. Two of four enter, 4 and 3, in their order, and the block adds 10
    # to every number: y = x + r * 10.
    x = torch.tensor([[[1.0, 0.0], [4.0, 0.0], [-2.0, 0.0], [3.0, 1.0]]])
    seen: list[Tensor] = []

    def block(x_BCD: Tensor, entered: Entered) -> Tensor:
        seen.append(x_BCD)
        assert entered.context.token_ids_BS.tolist() == [[1, 3]]
        return x_BCD + 10

    layer = gate([1.0, 0.0], capacity=0.5)
    with core.record(layer) as tape:
        y = layer.enter(x, core.RoutingContext(token_ids_BS=torch.arange(4)[None]), block)
    assert seen[0].tolist() == [[[4.0, 0.0], [3.0, 1.0]]]
    assert y.tolist() == [[[1.0, 0.0], [44.0, 40.0], [-2.0, 0.0], [33.0, 31.0]]]
    (entry,) = tape.entries
    assert entry.routing.tokens_per_expert_E.tolist() == [2]
    assert core.RoutingStats.from_tape(tape).layers[""].drop_rate == 0
    # Of 8, 7 and 4 real tokens half enter, rounded up: 4, 4 and 2, whatever padding holds; of none none.
    x = torch.randn(4, 8, 3)
    valid = torch.arange(8) < torch.tensor([8, 7, 4, 0])[:, None]
    layer = gate([1.0, 0.0, 0.0], capacity=0.5)
    context = core.RoutingContext(valid_BS=valid)
    entered = layer(x.masked_fill(~valid[..., None], torch.nan), context)
    assert entered.enters_BS.sum(1).tolist() == [4, 4, 2, 0]
    for b, count in enumerate((4, 4, 2)):
        assert entered.index_BC[b, :count].tolist() == sorted(x[b, valid[b], 0].topk(count).indices.tolist())
    y = layer.enter(x.masked_fill(~valid[..., None], torch.nan), context, lambda x_BCD, _: x_BCD + 1)
    assert y[valid].isfinite().all()


def test_a_vision_model_trains_and_costs_by_the_tokens_that_enter():
    plain, all_in, image = vision_model(None), vision_model(MixtureOfDepths(1.0), blocks="all"), torch.randn(2, 1, 8, 8)
    all_in.load_state_dict({**all_in.state_dict(), **plain.state_dict()})
    for block in all_in.blocks:  # r = 1 for every token of the bias-free gate: its weight is set by hand
        block.depth_gate.router.gate.forward = lambda x_TD, kept_TD=None: x_TD.new_ones(len(x_TD), 1)
    assert_close(all_in(image), plain(image))
    # The block of width 16 with 16 patches costs 2 * 16 * (48 + 16 + 128) a token for its products (qkv, projection,
    # FFN of 64 twice), and 4 * 16 for each pair of tokens. At capacity 1/4, 4 tokens enter and attend to 4.
    plain, quarter = vision_model(None), vision_model(MixtureOfDepths(0.25), blocks="all")
    image = torch.randn(1, 1, 8, 8)

    def block(tokens: int) -> int:
        return tokens * 2 * 16 * (48 + 16 + 128) + 4 * 16 * tokens**2

    saved = core.count_flops(plain, image) - core.count_flops(quarter, image)
    assert saved == 4 * (block(16) - block(4) - 16 * MixtureOfDepths(0.25).flops_per_token(16))
    model = vision_model(MixtureOfDepths(0.5), moe_blocks="all", ffn=MOE).train()
    with core.record(model) as tape:
        model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    names = {e.name: e.routing.num_tokens for e in tape.entries}
    assert names["blocks.1.depth_gate"] == 32
    assert names["blocks.1.mlp"] == 16  # the experts see the tokens that enter
    assert names["blocks.0.mlp"] == 32
    assert all(p.grad is not None for n, p in model.named_parameters() if "depth_gate" in n)


@pytest.mark.parametrize("positions", POSITIONS)
def test_tokens_that_enter_see_each_other_alone_at_their_own_places(positions):
    # The slow way: every token goes through the layer, under a mask that hides those that pass by.
    model = language_model(positions=positions, blocks="every2")
    slow = copy.deepcopy(model)
    layer = slow.decoder.layers[1]
    depth, layer.depth_gate = layer.depth_gate, None
    whole = layer.forward

    def forward(x, given):
        entered = depth(x, given.context)
        bias = given.mask.bias
        B, L, H = len(x), x.shape[1], layer.num_heads
        bias = bias.expand(B * H, L, L) if len(bias) == 1 else bias
        hidden = ~entered.enters_BS.repeat_interleave(H, 0)[:, None]
        masked = type(given.mask)(bias.masked_fill(hidden, torch.finfo(bias.dtype).min))
        y = whole(x, type(given)(masked, given.context, given.rotations))
        r = depth.router(x, given.context).gates_N.view(B, L, 1)
        return torch.where(entered.enters_BS[..., None], x + r * (y - x), x)

    layer.forward = forward
    assert_close(model(TEXT), slow(TEXT))
    with by_capacity(model), by_capacity(depth):
        assert_close(model(TEXT), slow(TEXT))
        for network in (model, slow):
            network(TEXT).square().sum().backward()
    of_slow = dict(slow.named_parameters())
    for name, p in model.named_parameters():
        if "depth_gate" not in name:
            assert_close(p.grad, of_slow[name].grad)
    assert_close(model.decoder.layers[1].depth_gate.router.gate.weight.grad, depth.router.gate.weight.grad)


@pytest.mark.parametrize("positions, moe", [*zip(POSITIONS, (MOE, None, MOE, None, None), strict=True)])
def test_decoding_by_the_predictor_equals_the_sequence(positions, moe, monkeypatch):
    monkeypatch.setattr(transformer, "SLOTS", 1)
    model = language_model(moe=moe, positions=positions, seed=3)
    with core.record(model) as tape:
        logits_BLV = model(TEXT)
    counts = [e.routing.tokens_per_expert_E.item() for e in tape.entries if e.name.endswith("depth_gate")]
    assert all(0 < n < (TEXT != PAD_ID).sum() for n in counts), counts  # some enter, some pass by
    cache = model.start(3).expand(2)
    for t in range(TEXT.shape[1]):
        logits_RV, real = model.step(TEXT[:, t].repeat_interleave(2), cache), TEXT[:, t] != PAD_ID
        for k in range(2):
            assert_close(logits_RV.view(3, 2, VOCAB)[real, k], logits_BLV[real, t])


def test_rows_of_a_search_go_on_from_the_past_that_they_are_given():
    # Rows are swapped, a sentence leaves, and each row still equals its own text as a sequence.
    model = language_model(seed=3)
    torch.manual_seed(1)
    cache, rows = model.start(4).expand(3), [[] for _ in range(12)]
    for t in range(9):
        token_R = torch.randint(4, VOCAB, (len(rows),))
        rows = [[*row, token] for row, token in zip(rows, token_R.tolist(), strict=True)]
        assert_close(model.step(token_R, cache), model(torch.tensor(rows))[:, -1])
        sentences = [n for n in range(len(rows) // 3) if not (t in (3, 6) and n == 1)]
        index = torch.tensor([3 * n + int(k) for n in sentences for k in torch.randint(3, (3,))])
        cache.select(index)
        rows = [rows[i] for i in index.tolist()]
    for text_L in TEXT:  # positions that no row enters leave nothing of the memory before them
        text_L, cache = text_L[text_L != PAD_ID], model.start(1)
        cache.store.fill_(torch.nan)
        logits_LV = torch.cat([model.step(token_1, cache) for token_1 in text_L.split(1)])
        assert_close(logits_LV, model(text_L[None])[0])


def test_training_learns_the_choice():
    model = language_model()
    torch.manual_seed(0)
    model.float().train()
    optimizer = torch.optim.AdamW([p for n, p in model.named_parameters() if "predictor" in n], lr=2e-2)
    losses = []
    for _ in range(50):
        with core.record(model) as tape:
            model(TEXT)
        aux = core.aux_losses(tape)
        optimizer.zero_grad()
        aux.total.backward()
        # Its gradient reaches nothing else.
        assert all((p.grad is not None) == ("predictor" in n) for n, p in model.named_parameters())
        optimizer.step()
        losses.append(aux.terms[LOSS].item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    with core.record(model) as tape:
        model(TEXT)
    with by_capacity(model), core.record(model) as by_rank:
        model(TEXT)
    first, second = (t.entries[0].routing.expert_ids_N for t in (tape, by_rank))
    assert (first == second).float().mean() > 0.8


def test_a_compiled_layer_fills_up_in_place_of_waiting_and_half_precision_is_finite():
    model = language_model(seed=3)
    torch._dynamo.reset()
    layer, given = model.decoder.layers[1].depth_gate, core.RoutingContext(valid_BS=TEXT != PAD_ID)

    def entered(x, given):
        return layer.enter(x, given, lambda x_BCD, _: 2 * x_BCD)

    x = torch.randn(3, 8, 16).double()
    assert_close(torch.compile(entered, fullgraph=True, backend="aot_eager")(x, given), entered(x, given))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(TEXT).isfinite().all()
    assert model.bfloat16()(TEXT).isfinite().all()


@pytest.mark.parametrize("predictor", [False, True])
def test_costs_of_a_gate_are_counted(predictor):
    config = MixtureOfDepths(0.5, predictor)
    layer, x = config.build(16), torch.randn(2, 6, 16)
    assert config.num_params(16) == sum(p.numel() for p in layer.parameters())
    assert config.num_params(16) == (16 + 4 * 16 + 4 + 4 + 1 if predictor else 16)
    assert core.count_flops(layer, x, core.RoutingContext()) == 2 * 6 * config.flops_per_token(16)
    assert core.active_params(layer) == config.num_params(16)


class Counted(torch.nn.Module):
    """A language model as its cost is measured."""

    module = property(lambda self: self)  # what is run is counted too
    cost_unit = "a text".format

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def cost_inputs(self, batch: Tensor) -> tuple[Tensor]:
        return (batch,)

    def forward(self, text: Tensor) -> Tensor:
        return self.model(text)


def test_a_language_model_is_counted_at_its_capacity_and_refused_in_one_line():
    models = language_model(), language_model(seed=4), language_model(None)
    half, again, plain = (measure_cost(Counted(m), TEXT[:1].repeat(2, 1)).flops_per_example for m in models)
    assert half == again < plain
    with pytest.raises(ValueError, match=r"depths\.predictor=False lets later tokens change earlier ones"):
        language_model(MixtureOfDepths(0.5))
    with pytest.raises(ValueError, match=r"depths\.predictor=True is for causal decoders"):
        vision_model(MixtureOfDepths(0.5, predictor=True))
    with pytest.raises(ValueError, match="depth_blocks='every9' does not fit depth=4"):
        depth_gates(MixtureOfDepths(), "every9", 4, 8)
