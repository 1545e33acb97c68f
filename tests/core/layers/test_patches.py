"""``PatchMoE``: the layer against a loop over pairs that calls ``F.conv2d``, its inputs, its costs, what it refuses."""

from __future__ import annotations

import copy
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from gradients import close_gradients
from pair_routers import PAIR_ROUTERS
from torch import Tensor

import core
from core.testing.check import close
from core.testing.router_case import RouterCase, seeded

D, D_OUT, E, HIDDEN = 3, 5, 8, 4
COLUMNS, ROWS = 4, 6  # of positions; 2 x 3 patches of 2 x 2
S = COLUMNS * ROWS
KIND = core.Convolution(HIDDEN, bias=True, columns=COLUMNS)


def build(
    router: core.RouterConfig = core.TokenChoice(2),
    expert: core.Convolution = KIND,
    out_dim: int | None = None,
    **options,
) -> core.PatchMoE:
    with seeded(0):
        layer = core.MoEConfig(E, router, expert, **options).build(D, out_dim)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    assert isinstance(layer, core.PatchMoE)
    return layer.double()


def tokens(B: int = 3, num: int = S) -> Tensor:
    return torch.randn(B, num, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def positions(patch: int) -> list[int]:
    """Return the four positions of a patch in the grid of 6 x 4."""
    top, left = 2 * (patch // 2), 2 * (patch % 2)
    return [COLUMNS * (top + r) + left + c for r in (0, 1) for c in (0, 1)]


def padded(router: core.RouterConfig) -> core.RoutingContext:
    """Return a context with all fields: an image, one with half a patch and two whole ones of padding, and padding."""
    valid_BS = torch.ones(3, S, dtype=torch.bool)
    valid_BS[1, [*positions(1)[:2], *positions(3), *positions(4)]] = False
    valid_BS[2] = False
    return RouterCase(router, E, D, 0).context(3, S, valid_BS=valid_BS)


def convolved(layer: core.PatchMoE, x_PD: Tensor, e: int) -> Tensor:
    """Return a patch (4, D) after expert e, (4, D_out), by torch's convolution."""
    experts, x = layer.experts, x_PD.T.reshape(1, -1, 2, 2)
    h = F.gelu(F.conv2d(x, kernel(experts.w_in[e]), experts.b_in[e], padding=1))
    return F.conv2d(h, kernel(experts.w_out[e]), experts.b_out[e], padding=1).flatten(2)[0].T


def kernel(w: Tensor) -> Tensor:
    return w.T.unflatten(1, (3, 3, -1)).permute(0, 3, 1, 2)


def patches_of_context(context: core.RoutingContext) -> core.RoutingContext:
    """Return the context of the patches: real where a position is, with the ids of the first real position."""
    real, values = context.valid_BS.tolist(), {f.name: getattr(context, f.name) for f in fields(context)}
    # Sorting is stable: real positions come first, in their order.
    first = [(b, sorted(positions(j), key=lambda s: not real[b][s])[0]) for b in range(3) for j in range(6)]
    of_tokens = {name: value for name, value in values.items() if name.endswith("_BS")}
    return replace(context, **{name: torch.stack([v[at] for at in first]).view(3, 6) for name, v in of_tokens.items()})


def slow(layer: core.PatchMoE, x_BSD: Tensor, context: core.RoutingContext | None = None) -> Tensor:
    """Return the layer's output, pair by pair."""
    own, B = None, len(x_BSD)
    if context is not None:
        own = patches_of_context(context)
        x_BSD = x_BSD * context.valid_BS[..., None]
    x_BnC = torch.stack([torch.cat([x[s] for s in positions(j)]) for x in x_BSD for j in range(6)]).unflatten(0, (B, 6))
    routing = layer.router(x_BnC, own)
    y = {(b, s): x_BSD.new_zeros(layer.experts.w_out.shape[-1]) for b in range(B) for s in range(S)}
    on_input = layer.router.gates_on == "input"
    for t, e, gate in zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N, strict=True):
        if e == layer.num_experts:
            continue
        b, j = divmod(t, 6)
        x_PD = x_BSD[b, positions(j)] * (gate if on_input else 1.0)
        y_PD = convolved(layer, x_PD, e) * (1.0 if on_input else gate)
        for s, y_D in zip(positions(j), y_PD, strict=True):
            if context is None or context.valid_BS[b, s]:
                y[b, s] = y[b, s] + y_D
    return torch.stack([y[b, s] for b in range(B) for s in range(S)]).unflatten(0, (B, S))


def compare(layer: core.PatchMoE, x: Tensor, context: core.RoutingContext | None) -> None:
    """Hold a step of the layer to the slow loop, in output and all gradients."""
    results = []
    for run in (core.PatchMoE.forward, slow):
        copied, own = copy.deepcopy(layer), x.clone().requires_grad_()
        with seeded(3):
            y = run(copied, own, context)
        weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
        (y * weight).sum().backward()
        results.append((y.detach(), {"the tokens": own.grad, **{n: p.grad for n, p in copied.named_parameters()}}))
    (y, grads), (expected, wanted) = results
    assert expected.any()
    close(y, expected, "the output", 1e-12)
    close_gradients(grads, wanted, 1e-10)


@pytest.mark.parametrize("name", PAIR_ROUTERS)
def test_every_router_gives_the_slow_loop_s_output_and_gradients(name):
    router = PAIR_ROUTERS[name]
    full = {"capacity_factor": 0.6} if "capacity_factor" in router.layer_options else {}
    for training, options in ((False, {}), (True, full)):
        compare(build(router, **options).train(training), tokens(), padded(router))


@pytest.mark.parametrize("router", [core.TokenChoice(2), core.ExpertChoice(4.0)], ids=["tokens", "experts"])
def test_without_padding_and_with_another_width_out_it_is_the_slow_loop_too(router):
    compare(build(router, out_dim=D_OUT), tokens(2), None)


def test_an_example_by_hand():
    layer = core.MoEConfig(2, core.TokenChoice(1), core.Convolution(1, activation="relu")).build(1)
    with torch.no_grad():
        # By the sign of a patch's first position; the softmax of such logits is 1 for the larger, the gate of top-1.
        layer.router.gate.weight.copy_(torch.tensor([[100.0, 0, 0, 0], [-100.0, 0, 0, 0]]))
        center = torch.zeros(9, 1)
        center[4] = 1.0
        layer.experts.w_in.copy_(torch.stack((torch.ones(9, 1), center)))
        layer.experts.w_out.copy_(torch.stack((center, 10 * center)))
    image = [[1.0, 2.0, -1.0, 2.0], [3.0, 4.0, 3.0, 4.0], [-9.0, 1.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0]]
    y = layer(torch.tensor(image)[None, None])[0, 0]
    # Expert 0 puts the sum of a patch, which all its positions see, at each of them: 1 + 2 + 3 + 4, and 1.
    # Expert 1 puts out ten times each position, and 0 where it is negative.
    expected = [[10.0, 10.0, 0.0, 20.0], [10.0, 10.0, 30.0, 40.0], [0.0, 10.0, 1.0, 1.0], [0.0, 20.0, 1.0, 1.0]]
    torch.testing.assert_close(y, torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_by_expert_choice_each_expert_takes_l_of_the_n_patches_of_an_image():
    # l = ceil(1.5 * 6 / 8) = 2 of n = 6.
    layer = build(core.ExpertChoice(1.5))
    with core.record(layer) as tape:
        layer(tokens())
    (entry,) = tape.entries
    routing = entry.routing
    assert (routing.num_tokens, routing.num_sequences) == (3 * 6, 3)
    taken = torch.zeros(3, E, dtype=torch.int64)
    taken.index_put_((routing.token_index_N // 6, routing.expert_ids_N), torch.tensor(1), accumulate=True)
    assert (taken == 2).all()
    layer = build(balance=core.Balance(load_balancing_loss=0.1)).train()
    with core.record(layer) as tape:
        layer(tokens(), padded(core.TokenChoice(2)))
    # 6 patches of the first image, and 6 - 2 of the second, for half of one is real; 2 experts each.
    assert int(tape.entries[0].routing.tokens_per_expert_E.sum()) == 2 * (6 + 4)
    core.aux_loss(tape).backward()
    assert layer.router.gate.weight.grad.any()


# ---- forms of the input


def test_a_map_is_its_tokens_and_may_be_of_any_size_of_whole_patches():
    layer, x = build(out_dim=D_OUT), tokens()
    image = x.transpose(1, 2).unflatten(2, (ROWS, COLUMNS))
    torch.testing.assert_close(layer(image).flatten(2).transpose(1, 2), layer(x), rtol=1e-12, atol=1e-12)
    assert layer(image.transpose(2, 3)).shape == (3, D_OUT, COLUMNS, ROWS)
    one = build(core.ExpertChoice(1.0))  # a sequence is a batch of one
    torch.testing.assert_close(one(x[1]), one(x)[1], rtol=1e-12, atol=1e-12)
    context = padded(core.TokenChoice(2))
    torch.testing.assert_close(layer(image, context).flatten(2).transpose(1, 2), layer(x, context), rtol=0, atol=1e-12)


def test_tokens_of_a_prefix_go_to_no_expert():
    layer = build(core.ExpertChoice(2.0), replace(KIND, columns=None, prefix_tokens=2))
    x, plain = tokens(3, 18), build(core.ExpertChoice(2.0), replace(KIND, columns=None))
    context = core.RoutingContext(torch.ones(3, 18, dtype=torch.bool))
    context.valid_BS[:, 5] = False
    y = layer(x, context)
    assert not y[:, :2].any()
    assert torch.equal(y[:, 2:], plain(x[:, 2:], core.RoutingContext(context.valid_BS[:, 2:])))
    image = tokens(3, 16).transpose(1, 2).unflatten(2, (4, 4))  # a map has no prefix
    assert torch.equal(layer(image), plain(image))


def test_a_bias_of_the_output_is_every_position_s():
    layer, plain, x = build(output_bias=True, out_dim=D_OUT), build(out_dim=D_OUT), tokens()
    with torch.no_grad():
        layer.output_bias.copy_(torch.arange(D_OUT))
    assert layer.output_bias.shape == (D_OUT,)
    plain.load_state_dict({n: w for n, w in layer.state_dict().items() if n != "output_bias"})
    torch.testing.assert_close(layer(x), plain(x) + torch.arange(D_OUT), rtol=1e-12, atol=1e-12)


def test_a_grown_layer_is_one_of_more_experts():
    layer = build()
    assert core.grow_experts(layer, 2) == (E, E + 1)
    wide = core.MoEConfig(E + 2, core.TokenChoice(2), KIND).build(D).double()
    wide.load_state_dict(layer.state_dict())
    assert torch.equal(wide(tokens()), layer(tokens()))


def test_outputs_are_masked_in_training_alone():
    layer, x = build(expert_output_masking=0.5), tokens()
    assert torch.equal(layer.eval()(x), build()(x))
    with seeded(0):
        assert not torch.equal(layer.train()(x), build()(x))


# ---- costs


@pytest.mark.parametrize(
    "expert", [KIND, core.Convolution(6, patch_size=4, kernel_size=5), core.Convolution(patch_size=1, kernel_size=1)]
)
def test_costs_are_numel_and_the_counter_s(expert):
    for router, out_dim in ((core.TokenChoice(3), None), (core.ExpertChoice(2.0), 6)):
        config = core.MoEConfig(E, router, expert)
        layer = config.build(D, out_dim)
        assert config.num_params(D, out_dim) == sum(p.numel() for p in layer.parameters())
        assert config.active_params(D, out_dim) == core.active_params(layer)
        counted = core.count_flops(layer, torch.randn(2, 64, D))
        assert config.flops_per_token(D, out_dim, tokens_per_sequence=64) * 2 * 64 == counted


def test_costs_by_hand():
    config = core.MoEConfig(E, core.ExpertChoice(2.0), core.Convolution(5, columns=COLUMNS))
    # A patch: the gate 2 * 12 * 8; 2 experts of 2 * 4 positions * 9 taps * 5 * (3 + 3), and 4 positions share it.
    assert config.flops_per_token(D) == (2 * 12 * 8 + 2 * 2 * 4 * 9 * 5 * 6) / 4 == 1128
    # An image of 6 patches: each of 8 experts takes 2 of them, for 16 / 6 a patch.
    assert config.flops_per_token(D, tokens_per_sequence=S) == (6 * 2 * 12 * 8 + 16 * 2160) / 24 == 1488
    # A class token is 1 of 25, and costs nothing.
    config = replace(config, expert=core.Convolution(5, columns=COLUMNS, prefix_tokens=1))
    assert config.flops_per_token(D, tokens_per_sequence=25) == round(1488 * 24 / 25)
    with pytest.raises(ValueError, match=r"^26 positions do not fill rows of columns=4$"):
        config.flops_per_token(D, tokens_per_sequence=27)
    coarse = core.MoEConfig(4, core.TokenChoice(1), core.Convolution(6, columns=COLUMNS), granularity=2)
    assert coarse.split(D) == core.MoEConfig(8, core.TokenChoice(2), core.Convolution(3, columns=COLUMNS))


# ---- tape, growth, graphs


# ---- what is refused


SHARED = r"^num_shared_experts=1 with Convolution, which computes patches$"
CONTEXT = r"^context.{} has shape \(3, 6\), the tokens \(3, 24\)$"
OTHER_X = r"^x has shape \({}\): patches are of tokens \(B, S, D\) or a map \(B, D, h, w\)$"


def forward(*shape: int) -> Tensor:
    return build()(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: core.Convolution(kernel_size=2), "^kernel_size=2 is even: a kernel has a middle$"),
        (
            lambda: core.Convolution(kernel_size=5),
            "^kernel_size=5 exceeds 3, beyond which a tap sees no position of a patch of patch_size=2$",
        ),
        (lambda: core.Convolution(columns=5), "^patch_size=2 does not divide columns=5$"),
        (
            lambda: core.MoEConfig(4, core.SoftSlots(), core.Convolution()),
            "^Convolution computes patches: not with the slots of SoftSlots",
        ),
        (lambda: core.MoEConfig(4, num_shared_experts=1, expert=core.Convolution()), SHARED),
        (lambda: core.MoEConfig(4, num_shared_experts=1, expert=core.FFN(), shared_expert=core.Convolution()), SHARED),
        (
            lambda: core.Mixed((core.Convolution(), core.FFN()), (1, 1)),
            "^experts has Convolution, which cannot be one of several kinds$",
        ),
        (
            lambda: core.MoEConfig(4, core.TokenChoice(1), core.Convolution()).build(D, causal=True),
            "^Convolution shows a token those after it: not for a causal decoder$",
        ),
        (lambda: forward(2, 18, D), "^18 positions do not fill rows of columns=4$"),
        (lambda: forward(2, S, 7), "^x has width 7, the layer is for dim=3$"),
        (lambda: forward(2, 7, 4, 4), r"^x is a map of 7 channels, the layer is for dim=3: \(B, D, h, w\)$"),
        (lambda: forward(2, D, 4, 5), "^patch_size=2 does not divide a grid of 4 x 5 positions$"),
        (lambda: forward(2, 2, 2, 4, D), OTHER_X.format("2, 2, 2, 4, 3")),
        (lambda: forward(D), OTHER_X.format("3,")),
        (
            lambda: build()(tokens(), core.RoutingContext(valid_BS=torch.ones(3, 6, dtype=torch.bool))),
            CONTEXT.format("valid_BS"),
        ),
        (
            lambda: build()(tokens(), core.RoutingContext(token_ids_BS=torch.ones(3, 6, dtype=torch.int64))),
            CONTEXT.format("token_ids_BS"),
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make, message):
    with pytest.raises(ValueError, match=message):
        make()
