"""transformers' gates, blocks and losses beside ours. Versions seen: 5.24."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core import (
    FFN,
    Balance,
    MoEConfig,
    Routing,
    RoutingContext,
    SwiGLU,
    TokenChoice,
    aux_losses,
    record,
)
from core.routing.selection import Capacity

transformers = pytest.importorskip("transformers", minversion="5.0")

D, F, E, K = 16, 24, 8, 2
B, S = 3, 14
T = B * S


def modeling(name: str) -> Any:
    """The peer's module, or a skip in a version without it."""
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def config_of(name: str, **options: Any) -> Any:
    config = getattr(transformers, name)(**options)
    config._experts_implementation = "eager"  # a loop over experts, and no warning about a layer on its own
    return config


def randomize(module: nn.Module, std: float = 0.5) -> Any:
    """The peers leave their weights empty or zero: a model's ``init_weights`` would fill them."""
    with torch.no_grad():
        for weight in (*module.parameters(), *module.buffers()):
            weight.normal_(std=std)
    return module


def combine_TE(expert_ids_TK: Tensor, gates_TK: Tensor, num_experts: int = E) -> Tensor:
    """(T, E) combine weights, 0 where an expert was not chosen: the same in whatever order the K come."""
    zeros = gates_TK.new_zeros(gates_TK.shape[0], num_experts + 1)
    return zeros.scatter_add(1, expert_ids_TK, gates_TK)[:, :num_experts]


def ours_TE(routing: Routing, num_experts: int = E) -> Tensor:
    shape = (routing.num_tokens, -1)
    return combine_TE(routing.expert_ids_N.view(shape), routing.gates_N.view(shape), num_experts)


def skip_if_mended(peer: Tensor, right: Tensor, what: str) -> None:
    """A peer that gives the right value has been mended: there is no difference left to state."""
    if peer.shape == right.shape and torch.allclose(peer, right, rtol=1e-4, atol=1e-5):
        pytest.skip(f"{what}: the installed version gives the right value")


# ---------------------------------------------------------------------------------------------------------------------
# Gates: the same experts with the same weights, and the same gradients
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """A peer's router, and the setting of ``TokenChoice`` that is it.

    ``parameters`` pairs our parameters with theirs by name; ``dense`` reads (T, E) combine weights from its output.
    """

    model: str
    router: str
    config: str
    options: dict[str, Any]
    ours: TokenChoice
    parameters: dict[str, str] = field(default_factory=lambda: {"gate.weight": "weight"})
    dense: Callable[[Any], Tensor] = lambda out: combine_TE(out[2], out[1])


QWEN = {"hidden_size": D, "num_experts": E, "num_experts_per_tok": 3}
DEEPSEEK = {"hidden_size": D, "num_attention_heads": 2, "n_routed_experts": E, "num_experts_per_tok": 3}
V3 = {**DEEPSEEK, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}

GATES = {
    "mixtral": Gate(
        "mixtral",
        "MixtralTopKRouter",
        "MixtralConfig",
        {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": K},
        TokenChoice(top_k=K),
    ),
    "qwen2": Gate("qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig", QWEN, TokenChoice(top_k=3, normalize=False)),
    "qwen3": Gate(
        "qwen3_moe",
        "Qwen3MoeTopKRouter",
        "Qwen3MoeConfig",
        {**QWEN, "norm_topk_prob": True},
        TokenChoice(top_k=3, normalize=True),
    ),
    "olmoe": Gate("olmoe", "OlmoeTopKRouter", "OlmoeConfig", QWEN, TokenChoice(top_k=3, normalize=False)),
    "deepseek-v2-lite": Gate(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {**DEEPSEEK, "topk_method": "greedy"},
        TokenChoice(top_k=3, normalize=False),
    ),
    "deepseek-v2": Gate(
        "deepseek_v2",
        "DeepseekV2TopkRouter",
        "DeepseekV2Config",
        {
            **DEEPSEEK,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.0,
        },
        TokenChoice(top_k=3, normalize=False, num_groups=4, limited_groups=2, group_score="max", scale=2.0),
    ),
    "deepseek-v3": Gate(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        {**V3, "norm_topk_prob": True},
        TokenChoice(top_k=3, score_func="sigmoid", expert_bias=True, num_groups=4, limited_groups=2, scale=2.5),
        {"gate.weight": "weight", "expert_bias": "e_score_correction_bias"},
    ),
    "deepseek-v3-not-normalized": Gate(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        "DeepseekV3Config",
        {**V3, "norm_topk_prob": False},
        TokenChoice(
            top_k=3,
            score_func="sigmoid",
            normalize=False,
            expert_bias=True,
            num_groups=4,
            limited_groups=2,
            scale=2.5,
        ),
        {"gate.weight": "weight", "expert_bias": "e_score_correction_bias"},
    ),
    "gpt-oss": Gate(
        "gpt_oss",
        "GptOssTopKRouter",
        "GptOssConfig",
        {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": 4},
        TokenChoice(top_k=4, gate_bias=True),
        {"gate.weight": "weight", "gate.bias": "bias"},
    ),
    # The peer gives the scores (T, E), 0 where not chosen.
    "llama4": Gate(
        "llama4",
        "Llama4Router",
        "Llama4TextConfig",
        {"hidden_size": D, "num_local_experts": E, "num_experts_per_tok": 1},
        TokenChoice(top_k=1, score_func="sigmoid", gates_on="input"),
        dense=lambda out: out[0],
    ),
    # The peer gives a one-hot of the choice, 0 past the capacity, and the score of the best expert.
    "switch": Gate(
        "switch_transformers",
        "SwitchTransformersTop1Router",
        "SwitchTransformersConfig",
        {"d_model": D, "num_experts": E, "router_bias": True},
        TokenChoice(top_k=1, gate_bias=True),
        {"gate.weight": "classifier.weight", "gate.bias": "classifier.bias"},
        dense=lambda out: (out[0] * out[1]).view(-1, E),
    ),
    "nllb": Gate(
        "nllb_moe",
        "NllbMoeTop2Router",
        "NllbMoeConfig",
        {"d_model": D, "num_experts": E, "normalize_router_prob_before_dropping": True},
        TokenChoice(top_k=2),
        {"gate.weight": "classifier.weight"},
        dense=lambda out: out[1],
    ),
}


def tensor_of(module: nn.Module, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def pair_of_gates(gate: Gate, limit: Capacity = Capacity(), **options: Any) -> tuple[Any, Any]:
    """The peer's router and ours with the same weights, both in evaluation."""
    config = config_of(gate.config, **{**gate.options, **options})
    peer = randomize(getattr(modeling(gate.model), gate.router)(config)).eval()
    router = gate.ours.build(D, E, limit).eval()
    with torch.no_grad():
        for name, their_name in gate.parameters.items():
            tensor_of(router, name).copy_(tensor_of(peer, their_name))
    return peer, router


@pytest.mark.parametrize("name", GATES)
def test_gates_choose_the_same_experts_with_the_same_weights_and_gradients(name):
    gate = GATES[name]
    peer, router = pair_of_gates(gate)
    x = torch.randn(B, S, D, requires_grad=True)
    routing = router(x)
    tokens = x if gate.model == "switch_transformers" else x.flatten(0, 1)
    theirs_TE, ours = gate.dense(peer(tokens)), ours_TE(routing)
    assert torch.equal(ours > 0, theirs_TE > 0)
    assert (ours > 0).sum(-1).eq(gate.ours.top_k).all()
    torch.testing.assert_close(ours, theirs_TE)

    weights_TE = torch.randn(T, E)
    leaves = [n for n, t in router.named_parameters() if t.requires_grad]
    got = torch.autograd.grad((ours * weights_TE).sum(), [x, *(tensor_of(router, n) for n in leaves)])
    wanted = torch.autograd.grad(
        (theirs_TE * weights_TE).sum(), [x, *(tensor_of(peer, gate.parameters[n]) for n in leaves)]
    )
    for ours_grad, their_grad in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-5, atol=1e-5)


def test_the_group_limits_of_deepseek_v2_and_v3_differ():
    # What the two settings above are for: judged by the sum of two, some tokens go to other groups.
    peer, router = pair_of_gates(GATES["deepseek-v2"])
    x = torch.randn(1, 200, D)
    top2 = TokenChoice(top_k=3, normalize=False, num_groups=4, limited_groups=2, scale=2.0).build(D, E)
    top2.gate.weight.data.copy_(router.gate.weight)
    theirs_TE = GATES["deepseek-v2"].dense(peer(x[0]))
    assert not torch.equal(ours_TE(top2(x)) > 0, theirs_TE > 0)
    assert torch.equal(ours_TE(router(x)) > 0, theirs_TE > 0)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_switch_drops_the_same_tokens_of_each_sequence(capacity):
    # Theirs is a number of tokens a sequence; ours ceil(factor * S / E) = ceil(capacity).
    limit = Capacity(capacity * E / S, group="sequence")
    peer, router = pair_of_gates(GATES["switch"], limit, expert_capacity=capacity)
    x = torch.randn(B, S, D)
    theirs_TE = GATES["switch"].dense(peer(x))
    assert (theirs_TE > 0).sum() < T
    torch.testing.assert_close(ours_TE(router(x)), theirs_TE)


@pytest.mark.parametrize("priority", ["position", "score"])
def test_nllb_drops_the_same_pairs_by_position_and_by_score(priority):
    # Capacity 2 * ceil(T / E) is a factor of 1 where E divides T; 4 is then a factor of 0.4 of T = 40 and K = 2.
    gate, x = GATES["nllb"], torch.randn(1, 40, D)
    peer, router = pair_of_gates(
        gate,
        Capacity(0.4, priority=priority),
        expert_capacity=4,
        batch_prioritized_routing=priority == "score",
        moe_eval_capacity_token_fraction=-1.0,
    )
    theirs_TE = gate.dense(peer(x[0]))
    assert (theirs_TE > 0).sum() < 80
    torch.testing.assert_close(ours_TE(router(x)), theirs_TE)


def test_nllb_routes_no_padding():
    gate, x = GATES["nllb"], torch.randn(B, S, D)
    peer, router = pair_of_gates(gate, router_ignore_padding_tokens=False)
    valid = torch.arange(S) < torch.tensor([S, 5, 9])[:, None]
    theirs_TE = gate.dense(peer(x.flatten(0, 1), (~valid).flatten().long()))
    torch.testing.assert_close(ours_TE(router(x, RoutingContext(valid_BS=valid))), theirs_TE)


# ---------------------------------------------------------------------------------------------------------------------
# Blocks: the same output, and the same gradient of the tokens and of every weight
# ---------------------------------------------------------------------------------------------------------------------

Read = Callable[[Tensor], Tensor]


def swiglu(prefix: str, gate_up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """(E, 2F, D) with the gate first and (E, D, F), as ours."""
    gate, up = gate_up.chunk(2, dim=1)
    return {f"{prefix}.w_gate": gate.mT, f"{prefix}.w_in": up.mT, f"{prefix}.w_out": down.mT}


def shared_swiglu(mlp: Any, num: int, read: Read) -> dict[str, Tensor]:
    """One wide MLP as ``num`` shared experts: their sum is the same."""
    w_gate, w_in, w_out = (read(p.weight) for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    return {
        "shared_experts.w_gate": w_gate.unflatten(0, (num, -1)).mT,
        "shared_experts.w_in": w_in.unflatten(0, (num, -1)).mT,
        "shared_experts.w_out": w_out.unflatten(1, (num, -1)).permute(1, 2, 0),
    }


def routed(block: Any, read: Read) -> dict[str, Tensor]:
    experts = block.experts
    return {
        "router.gate.weight": read(block.gate.weight),
        **swiglu("experts", read(experts.gate_up_proj), read(experts.down_proj)),
    }


def with_shared(num: int) -> Callable[[Any, Read], dict[str, Tensor]]:
    return lambda block, read: routed(block, read) | shared_swiglu(block.shared_experts, num, read)


def llama4_layout(block: Any, read: Read) -> dict[str, Tensor]:
    experts = block.experts
    return {
        "router.gate.weight": read(block.router.weight),
        **swiglu("experts", read(experts.gate_up_proj).mT, read(experts.down_proj).mT),
        **shared_swiglu(block.shared_expert, 1, read),
    }


def qwen2_layout(block: Any, read: Read) -> dict[str, Tensor]:
    return {
        **routed(block, read),
        **shared_swiglu(block.shared_expert, 2, read),
        "shared_gate.weight": read(block.shared_expert_gate.weight),
    }


def switch_layout(block: Any, read: Read) -> dict[str, Tensor]:
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    return {
        "router.gate.weight": read(block.router.classifier.weight),
        "experts.w_in": torch.stack([read(e.wi.weight).mT for e in experts]),
        "experts.w_out": torch.stack([read(e.wo.weight).mT for e in experts]),
    }


@dataclass(frozen=True)
class Block:
    """A peer's block, ours, and the peer's weights in our layout."""

    model: str
    block: str
    config: str
    options: dict[str, Any]
    ours: MoEConfig
    layout: Callable[[Any, Read], dict[str, Tensor]] = routed


def moe(router: TokenChoice, **options: Any) -> MoEConfig:
    return MoEConfig(E, router, **{"expert": SwiGLU(F), **options})


BLOCKS = {
    "mixtral": Block(
        "mixtral",
        "MixtralSparseMoeBlock",
        "MixtralConfig",
        {**GATES["mixtral"].options, "intermediate_size": F},
        moe(GATES["mixtral"].ours),
    ),
    "qwen2": Block(
        "qwen2_moe",
        "Qwen2MoeSparseMoeBlock",
        "Qwen2MoeConfig",
        {**QWEN, "moe_intermediate_size": F, "shared_expert_intermediate_size": 2 * F},
        moe(GATES["qwen2"].ours, num_shared_experts=2, shared_gate="scale"),
        qwen2_layout,
    ),
    "qwen3": Block(
        "qwen3_moe",
        "Qwen3MoeSparseMoeBlock",
        "Qwen3MoeConfig",
        {**GATES["qwen3"].options, "moe_intermediate_size": F},
        moe(GATES["qwen3"].ours),
    ),
    "olmoe": Block(
        "olmoe",
        "OlmoeSparseMoeBlock",
        "OlmoeConfig",
        {**QWEN, "intermediate_size": F},
        moe(GATES["olmoe"].ours),
    ),
    "deepseek-v2": Block(
        "deepseek_v2",
        "DeepseekV2Moe",
        "DeepseekV2Config",
        {**GATES["deepseek-v2"].options, "moe_intermediate_size": F, "n_shared_experts": 2},
        moe(GATES["deepseek-v2"].ours, num_shared_experts=2),
        with_shared(2),
    ),
    "deepseek-v3": Block(
        "deepseek_v3",
        "DeepseekV3MoE",
        "DeepseekV3Config",
        {**GATES["deepseek-v3"].options, "moe_intermediate_size": F, "n_shared_experts": 1},
        moe(GATES["deepseek-v3"].ours, num_shared_experts=1),
        with_shared(1),
    ),
    "llama4": Block(
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {**GATES["llama4"].options, "intermediate_size": F},
        moe(GATES["llama4"].ours, num_shared_experts=1),
        llama4_layout,
    ),
    "llama4-two-experts": Block(
        "llama4",
        "Llama4TextMoe",
        "Llama4TextConfig",
        {**GATES["llama4"].options, "intermediate_size": F, "num_experts_per_tok": 2},
        moe(TokenChoice(top_k=2, score_func="sigmoid", normalize=False, gates_on="input"), num_shared_experts=1),
        llama4_layout,
    ),
    "switch": Block(
        "switch_transformers",
        "SwitchTransformersSparseMLP",
        "SwitchTransformersConfig",
        {"d_model": D, "d_ff": F, "num_experts": E, "expert_capacity": 2, "dropout_rate": 0.0},
        moe(TokenChoice(top_k=1), expert=FFN(F, "relu"), capacity_factor=2 * E / S, group="sequence"),
        switch_layout,
    ),
}


def load(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    names = {name for name, _ in layer.named_parameters()}
    assert set(weights) == names
    with torch.no_grad():
        for name, value in weights.items():
            tensor_of(layer, name).copy_(value)


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_give_the_same_output_and_gradients(name):
    case = BLOCKS[name]
    peer = randomize(getattr(modeling(case.model), case.block)(config_of(case.config, **case.options)), std=0.3).eval()
    layer = case.ours.build(D).eval()
    load(layer, case.layout(peer, lambda p: p.detach()))
    if layer.router.expert_bias is not None:
        layer.router.expert_bias.copy_(peer.gate.e_score_correction_bias)

    x = torch.randn(B, S, D)
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = layer(ours_x), peer(their_x)
    their_y = (their_y[0] if isinstance(their_y, tuple) else their_y).view(B, S, D)
    torch.testing.assert_close(y, their_y, rtol=1e-5, atol=1e-5)
    weights = torch.randn(B, S, D)
    (y * weights).sum().backward()
    (their_y * weights).sum().backward()
    torch.testing.assert_close(ours_x.grad, their_x.grad, rtol=1e-5, atol=1e-5)
    for parameter, wanted in case.layout(peer, lambda p: p.grad).items():
        torch.testing.assert_close(
            tensor_of(layer, parameter).grad, wanted, rtol=1e-5, atol=1e-5, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def test_gpt_oss_experts_fed_by_our_router_give_the_block():
    # Its clamped SwiGLU is no expert of ours: the experts stay theirs.
    module = modeling("gpt_oss")
    config = config_of("GptOssConfig", **GATES["gpt-oss"].options, intermediate_size=F)
    peer = randomize(module.GptOssMLP(config), std=0.3).eval()
    router = GATES["gpt-oss"].ours.build(D, E)
    router.gate.weight.data.copy_(peer.router.weight)
    router.gate.bias.data.copy_(peer.router.bias)
    x = torch.randn(B, S, D)
    routing = router(x)
    y = peer.experts(x.view(T, D), routing.expert_ids_N.view(T, 4), routing.gates_N.view(T, 4))
    torch.testing.assert_close(y.view(B, S, D), peer(x)[0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Losses
# ---------------------------------------------------------------------------------------------------------------------


def loss_terms(
    router: TokenChoice, x: Tensor, balance: Balance, valid: Tensor | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The unweighted terms of one pass, and its logits."""
    layer = MoEConfig(E, router, FFN(1), balance=balance).build(D)
    nn.init.normal_(layer.router.gate.weight)
    with record(layer) as tape:
        layer(x, None if valid is None else RoutingContext(valid_BS=valid))
    return aux_losses(tape).terms, tape.entries[0].routing.logits_TE


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("top_k", [2, 4])
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "nllb_moe"])
def test_their_load_balancing_loss_is_top_k_times_ours(model, top_k, padded):
    # sum over e of (pairs of e / tokens) P_e * E; ours divides by the pairs, K times as many, and is 1 at balance.
    x = torch.randn(B, S, D)
    valid = torch.arange(S) < torch.tensor([S, 5, 9])[:, None] if padded else None
    terms, logits_TE = loss_terms(TokenChoice(top_k=top_k), x, Balance(), valid)
    mask = None if valid is None else valid.long()
    theirs = modeling(model).load_balancing_loss_func((logits_TE,), E, top_k, mask)
    assert terms["load_balancing"] != 1
    torch.testing.assert_close(theirs, top_k * terms["load_balancing"])


def test_their_load_balancing_loss_pools_the_layers_and_misses_a_collapse():
    # Two layers of two experts: the first sends all to expert 0, the second all to expert 1. Scores are 0.9 and 0.1.
    # Pooled: f = (1/2, 1/2), P = (1/2, 1/2), so 2 * (1/4 + 1/4) = 1, perfect balance, with gradients that cancel.
    # Ours, layer by layer: 2 * (1 * 0.9 + 0 * 0.1) = 1.8 in each.
    first_TE = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)
    theirs = modeling("mixtral").load_balancing_loss_func((first_TE, first_TE.flip(1)), 2, 1)
    ours = []
    for logits_TE in (first_TE, first_TE.flip(1)):
        layer = MoEConfig(2, TokenChoice(top_k=1), FFN(1)).build(2)
        layer.router.gate.weight.data.copy_(torch.eye(2))
        with record(layer) as tape:
            layer(logits_TE)
        ours.append(aux_losses(tape).terms["load_balancing"])
    assert torch.stack(ours).tolist() == pytest.approx([1.8, 1.8])
    skip_if_mended(theirs, torch.tensor(1.8), "loss of several layers")
    assert theirs.item() == pytest.approx(1.0)


def test_switch_losses():
    module, x = modeling("switch_transformers"), torch.randn(B, S, D)
    terms, logits_TE = loss_terms(TokenChoice(top_k=1), x, Balance(sequence_balance=1e-4))
    logits_BSE = logits_TE.view(B, S, E)
    torch.testing.assert_close(module.router_z_loss_func(logits_BSE), terms["router_z"])
    # Theirs is a mean over sequences: over the whole batch it is our load_balancing, by sequence our sequence_balance.
    scores_BSE, best_BS = logits_BSE.softmax(-1), logits_BSE.argmax(-1)
    whole = module.load_balancing_loss_func(scores_BSE.view(1, T, E), best_BS.view(1, T))
    by_sequence = module.load_balancing_loss_func(scores_BSE, best_BS)
    torch.testing.assert_close(whole, terms["load_balancing"])
    torch.testing.assert_close(by_sequence, terms["sequence_balance"])
    assert by_sequence != whole


# ---------------------------------------------------------------------------------------------------------------------
# Where transformers is wrong
# ---------------------------------------------------------------------------------------------------------------------


def nllb_block(**options: Any) -> Any:
    config = config_of(
        "NllbMoeConfig",
        **{**GATES["nllb"].options, "moe_token_dropout": 0.0, "moe_eval_capacity_token_fraction": 1.0, **options},
    )
    return randomize(modeling("nllb_moe").NllbMoeSparseMLP(config, F), std=0.3).eval()


def nllb_ours(block: Any) -> Any:
    """Our layer with the weights of an ``NllbMoeSparseMLP``."""
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    layer = moe(GATES["nllb"].ours, expert=FFN(F, "relu", bias=True)).build(D).eval()
    load(
        layer,
        {
            "router.gate.weight": block.router.classifier.weight,
            "experts.w_in": torch.stack([e.fc1.weight.mT for e in experts]),
            "experts.b_in": torch.stack([e.fc1.bias for e in experts]),
            "experts.w_out": torch.stack([e.fc2.weight.mT for e in experts]),
            "experts.b_out": torch.stack([e.fc2.bias for e in experts]),
        },
    )
    return layer


@torch.no_grad()
def test_nllb_runs_only_experts_0_and_1():
    # NllbMoeSparseMLP hands the one-hot of the first choice on as if it were expert ids, and NllbMoeExperts makes a
    # one-hot of it again: its ids are 0 and 1, so experts 2 to 7 never run, and the weight of expert j's column goes to
    # expert 1 where j was chosen first and to expert 0 elsewhere.
    peer, x = nllb_block(), torch.randn(B, S, D)
    layer = nllb_ours(peer)
    first_TE, gates_TE, _ = peer.router(x.view(T, D))
    outputs_ETD = torch.stack([peer.experts[f"expert_{e}"](x.view(T, D)) for e in range(E)])
    right = torch.einsum("te,etd->td", gates_TE, outputs_ETD).view(B, S, D)
    torch.testing.assert_close(layer(x), right, rtol=1e-5, atol=1e-5)
    # Fed with expert ids, their experts are right as well.
    routing = layer.router(x)
    fed = peer.experts(x.view(T, D), routing.expert_ids_N.view(T, 2), routing.gates_N.view(T, 2))
    torch.testing.assert_close(fed.view(B, S, D), right, rtol=1e-5, atol=1e-5)

    theirs = peer(x)
    skip_if_mended(theirs, right, "NLLB-MoE block")
    to_one_T1 = (gates_TE * first_TE).sum(-1, keepdim=True)
    to_zero_T1 = (gates_TE * (1 - first_TE)).sum(-1, keepdim=True)
    wrong = to_zero_T1 * outputs_ETD[0] + to_one_T1 * outputs_ETD[1]
    torch.testing.assert_close(theirs.view(T, D), wrong, rtol=1e-5, atol=1e-5)
    for e in range(2, E):
        randomize(peer.experts[f"expert_{e}"])
    assert torch.equal(peer(x), theirs)


@torch.no_grad()
def test_nllb_token_dropout_shrinks_the_output_in_evaluation():
    # nn.Dropout(p) keeps the mean in training, and evaluation multiplies by 1 - p besides: 0.8 of what was trained.
    peer, x = nllb_block(moe_token_dropout=0.2), torch.randn(B, S, D)
    layer = nllb_ours(peer)
    routing = layer.router(x)
    theirs = peer.experts(x.view(T, D), routing.expert_ids_N.view(T, 2), routing.gates_N.view(T, 2)).view(B, S, D)
    skip_if_mended(theirs, layer(x), "NLLB-MoE token dropout")
    torch.testing.assert_close(theirs, 0.8 * layer(x), rtol=1e-5, atol=1e-5)
    # Which is right for weights that were trained on unscaled masks: gates times 1 - p.
    router = replace(GATES["nllb"].ours, scale=0.8)
    masked = moe(router, expert=FFN(F, "relu", bias=True), expert_output_masking=0.2).build(D).eval()
    masked.load_state_dict(layer.state_dict())
    torch.testing.assert_close(theirs, masked(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_nllb_token_dropout_drops_elements_and_not_outputs_of_pairs():
    # The masking of the paper leaves a pair's output out as a whole. One expert a token, so that nothing hides it.
    peer, x = nllb_block(moe_token_dropout=0.5).train(), torch.randn(B, S, D)
    routing = nllb_ours(peer).router(x)
    ids, gates = routing.expert_ids_N.view(T, 2)[:, :1], routing.gates_N.view(T, 2)[:, :1]
    zeros_T = (peer.experts(x.view(T, D), ids, gates) == 0).sum(-1)
    if set(zeros_T.tolist()) <= {0, D}:
        pytest.skip("NLLB-MoE token dropout: mended")
    assert ((zeros_T > 0) & (zeros_T < D)).any()


@torch.no_grad()
def test_nllb_an_evaluation_changes_the_capacity_of_training():
    # 40 tokens, 8 experts, factor 1: an expert takes 2 * 40 / 8 = 10 pairs in training. The peer keeps its last
    # capacity in the module: after an evaluation of 8 tokens at a fraction of 1, training goes on with 8.
    gate = GATES["nllb"]
    peer, router = pair_of_gates(
        gate, Capacity(1.0, eval_factor=4.0), expert_capacity=10, moe_eval_capacity_token_fraction=1.0
    )
    x, other = torch.randn(1, 40, D), torch.randn(1, 8, D)
    x[..., 0] += 3.0  # so that some experts are full

    ours = ours_TE(router.train()(x))
    router.eval()(other)
    assert torch.equal(ours_TE(router.train()(x)), ours)
    assert int((ours > 0).sum(0).max()) == 10

    torch.testing.assert_close(gate.dense(peer.train()(x[0])), ours)
    peer.eval()(other[0])
    theirs = gate.dense(peer.train()(x[0]))
    skip_if_mended(theirs, ours, "NLLB-MoE capacity after an evaluation")
    assert int((theirs > 0).sum(0).max()) == 8


def test_nllb_random_second_is_not_normalized(monkeypatch):
    # Scores 0.5, 0.3, 0.2: gates 0.5 / 0.8 and 0.3 / 0.8. Under "random" the peer replaces the second by its score, so
    # a token's gates sum to 0.925. The draws are zeros: the second always stays.
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    config = config_of(
        "NllbMoeConfig",
        d_model=3,
        num_experts=3,
        second_expert_policy="random",
        normalize_router_prob_before_dropping=True,
    )
    peer = modeling("nllb_moe").NllbMoeTop2Router(config).train()
    router = TokenChoice(top_k=2, second="random").build(3, 3).train()
    peer.classifier.weight.data.copy_(torch.eye(3))
    router.gate.weight.data.copy_(torch.eye(3))
    x = torch.tensor([[0.5, 0.3, 0.2]]).log()
    ours = ours_TE(router(x[None]), 3)
    assert ours[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    theirs = peer(x)[1]
    skip_if_mended(theirs, ours, "NLLB-MoE random second expert")
    assert theirs[0].tolist() == pytest.approx([0.625, 0.3, 0.0])


def test_nllb_ignores_padding_only_when_told_not_to():
    # router_ignore_padding_tokens=True routes the padding; False leaves it out. Ours never routes it.
    gate, x = GATES["nllb"], torch.randn(1, 6, D)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    peer, router = pair_of_gates(gate, router_ignore_padding_tokens=True)
    ours = ours_TE(router(x, RoutingContext(valid_BS=valid)))
    assert (ours > 0).sum(-1).tolist() == [2, 2, 2, 2, 0, 0]
    theirs = gate.dense(peer(x[0], (~valid).flatten().long()))
    skip_if_mended(theirs, ours, "NLLB-MoE router_ignore_padding_tokens")
    assert (theirs > 0).sum(-1).tolist() == [2] * 6


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_their_jitter_overwrites_the_tokens_and_reaches_the_experts(name):
    # Switch (arXiv 2101.03961) jitters what the router sees. The peers multiply in place, so that the experts and the
    # caller's tensor are jittered as well; ours leaves both alone.
    case = BLOCKS[name]
    config = config_of(case.config, **{**case.options, "router_jitter_noise": 0.5})
    peer = randomize(getattr(modeling(case.model), case.block)(config), std=0.3).train()
    layer = MoEConfig(E, TokenChoice(case.ours.router.top_k, jitter_eps=0.5), case.ours.expert).build(D).train()
    x = torch.randn(B, S, D)
    ours_x, their_x = x.clone(), x.clone()
    with torch.no_grad():
        layer(ours_x), peer(their_x)
    assert torch.equal(ours_x, x)
    skip_if_mended(their_x, x, f"{name}: jitter")
    ratio = their_x / x
    assert 0.5 <= ratio.min() < 0.6
    assert 1.4 < ratio.max() <= 1.5


def test_deepseek_v2_does_not_heed_norm_topk_prob():
    # The published code divides by the sum where the config says so (no released model does); the peer never does.
    gate = GATES["deepseek-v2-lite"]
    peer, _ = pair_of_gates(gate, norm_topk_prob=True)
    x = torch.randn(1, 20, D)
    router = TokenChoice(top_k=3).build(D, E)
    router.gate.weight.data.copy_(peer.weight)
    ours, theirs = ours_TE(router(x)), gate.dense(peer(x[0]))
    torch.testing.assert_close(ours.sum(-1), torch.ones(20))
    skip_if_mended(theirs, ours, "DeepSeek-V2 norm_topk_prob")
    assert (theirs.sum(-1) < 0.99).any()
    torch.testing.assert_close(theirs / theirs.sum(-1, keepdim=True), ours)
