"""Gates of transformers with random weights, the settings of ours that they are, and what both decide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from beside import tensor_of
from torch import Tensor, nn

from core import Routing, TokenChoice
from core.routing.selection import Capacity

transformers = pytest.importorskip("transformers", minversion="5.0")

D, F, E, K = 16, 24, 8, 2
B, S = 3, 14
T = B * S


def modeling(name: str) -> Any:
    """Return the peer's module; skip the test in a version without it."""
    return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def config_of(name: str, **options: Any) -> Any:
    config = getattr(transformers, name)(**options)
    config._experts_implementation = "eager"  # a loop over experts, and no warning about a layer on its own
    return config


def randomize(module: nn.Module, std: float = 0.5) -> Any:
    """The peers leave their weights empty or zero: a model's ``init_weights`` would fill them."""
    with torch.no_grad():
        for weight in (*module.parameters(), *module.buffers()):
            if weight.is_floating_point():
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


@dataclass(frozen=True)
class Gate:
    """A peer's router, and the setting of ``TokenChoice`` that is it; ``parameters`` pairs our names with theirs, and
    ``dense`` reads (T, E) combine weights from its output."""

    model: str
    router: str
    config: str
    options: dict[str, Any]
    ours: TokenChoice
    parameters: dict[str, str] = field(default_factory=lambda: {"gate.weight": "weight"})
    dense: Callable[..., Tensor] = lambda out, num_experts=E: combine_TE(out[2], out[1], num_experts)


QWEN = {"hidden_size": D, "num_experts": E, "num_experts_per_tok": 3}
DEEPSEEK = {"hidden_size": D, "num_attention_heads": 2, "n_routed_experts": E, "num_experts_per_tok": 3}
V2 = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.0}
V3 = {**DEEPSEEK, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
SIGMOID = TokenChoice(top_k=3, score_func="sigmoid", expert_bias=True, num_groups=4, limited_groups=2, scale=2.5)
BIAS = {"gate.weight": "weight", "expert_bias": "e_score_correction_bias"}
LOCAL = {"hidden_size": D, "num_local_experts": E}
NLLB = {"d_model": D, "num_experts": E}
CLASSIFIER = {"gate.weight": "classifier.weight"}


def of(
    model: str, prefix: str, options: dict[str, Any], ours: TokenChoice, *args: Any, router: str = "TopKRouter"
) -> Gate:
    return Gate(model, f"{prefix}{router}", f"{prefix}Config", options, ours, *args)


GATES = {
    "mixtral": of("mixtral", "Mixtral", {**LOCAL, "num_experts_per_tok": K}, TokenChoice(top_k=K)),
    "qwen2": of("qwen2_moe", "Qwen2Moe", QWEN, TokenChoice(top_k=3, normalize=False)),
    "qwen3": of("qwen3_moe", "Qwen3Moe", {**QWEN, "norm_topk_prob": True}, TokenChoice(top_k=3, normalize=True)),
    "olmoe": of("olmoe", "Olmoe", QWEN, TokenChoice(top_k=3, normalize=False)),
    "deepseek-v2-lite": of(
        *("deepseek_v2", "DeepseekV2", {**DEEPSEEK, "topk_method": "greedy"}, TokenChoice(top_k=3, normalize=False)),
        router="TopkRouter",
    ),
    "deepseek-v2": of(
        *("deepseek_v2", "DeepseekV2", {**DEEPSEEK, **V2}),
        TokenChoice(top_k=3, normalize=False, num_groups=4, limited_groups=2, group_score="max", scale=2.0),
        router="TopkRouter",
    ),
    "deepseek-v3": of("deepseek_v3", "DeepseekV3", {**V3, "norm_topk_prob": True}, SIGMOID, BIAS, router="TopkRouter"),
    "deepseek-v3-not-normalized": of(
        *("deepseek_v3", "DeepseekV3", {**V3, "norm_topk_prob": False}, replace(SIGMOID, normalize=False), BIAS),
        router="TopkRouter",
    ),
    "gpt-oss": of(
        *("gpt_oss", "GptOss", {**LOCAL, "num_experts_per_tok": 4}, TokenChoice(top_k=4, gate_bias=True)),
        {"gate.weight": "weight", "gate.bias": "bias"},
    ),
    # The peer gives the scores (T, E), 0 where not chosen.
    "llama4": Gate(
        *("llama4", "Llama4Router", "Llama4TextConfig", {**LOCAL, "num_experts_per_tok": 1}),
        TokenChoice(top_k=1, score_func="sigmoid", gates_on="input"),
        dense=lambda out: out[0],
    ),
    # The peer gives a one-hot of the choice, 0 past the capacity, and the score of the best expert.
    "switch": Gate(
        *("switch_transformers", "SwitchTransformersTop1Router", "SwitchTransformersConfig"),
        *({**NLLB, "router_bias": True}, TokenChoice(top_k=1, gate_bias=True)),
        {**CLASSIFIER, "gate.bias": "classifier.bias"},
        dense=lambda out: (out[0] * out[1]).view(-1, E),
    ),
    "nllb": of(
        *("nllb_moe", "NllbMoe", {**NLLB, "normalize_router_prob_before_dropping": True}, TokenChoice(top_k=2)),
        *(CLASSIFIER, lambda out: out[1]),
        router="Top2Router",
    ),
    "nllb-kept": of(
        *("nllb_moe", "NllbMoe", NLLB, TokenChoice(top_k=2, normalize="kept"), CLASSIFIER, lambda out: out[1]),
        router="Top2Router",
    ),
}


def pair_of_gates(gate: Gate, limit: Capacity = Capacity(), **options: Any) -> tuple[Any, Any]:
    """The peer's router and ours with the same weights, both in evaluation."""
    config = config_of(gate.config, **{**gate.options, **options})
    peer = randomize(getattr(modeling(gate.model), gate.router)(config)).eval()
    router = gate.ours.build(D, E, limit).eval()
    with torch.no_grad():
        for name, their_name in gate.parameters.items():
            tensor_of(router, name).copy_(tensor_of(peer, their_name))
    return peer, router
