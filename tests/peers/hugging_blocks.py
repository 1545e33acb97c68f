"""MoE blocks of transformers, ours, and how the weights of the one are laid out in the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hugging import GATES, QWEN, D, E, F, S, tensor_of
from torch import Tensor, nn

from core import FFN, ClampedSwiGLU, MoEConfig, SwiGLU, TokenChoice

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


def gpt_oss_layout(block: Any, read: Read) -> dict[str, Tensor]:
    """(E, D, 2F), of which every second column is the gate's."""
    experts = block.experts
    gate_up, bias = read(experts.gate_up_proj), read(experts.gate_up_proj_bias)
    return {
        "router.gate.weight": read(block.router.weight),
        "router.gate.bias": read(block.router.bias),
        "experts.w_gate": gate_up[..., ::2],
        "experts.w_in": gate_up[..., 1::2],
        "experts.w_out": read(experts.down_proj),
        "experts.b_gate": bias[..., ::2],
        "experts.b_in": bias[..., 1::2],
        "experts.b_out": read(experts.down_proj_bias),
    }


def jetmoe_layout(block: Any, read: Read) -> dict[str, Tensor]:
    return {
        "router.gate.weight": read(block.router.layer.weight),
        "output_bias": read(block.bias),
        **swiglu("experts", read(block.input_linear.weight), read(block.output_linear.weight)),
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
    # Limits of 1: those of the published weights would be out of reach of random ones.
    "gpt-oss": Block(
        "gpt_oss",
        "GptOssMLP",
        "GptOssConfig",
        {**GATES["gpt-oss"].options, "intermediate_size": F, "swiglu_limit": 1.0},
        moe(GATES["gpt-oss"].ours, expert=ClampedSwiGLU(F, bias=True, limit=1.0, alpha=1.702, shift=1.0)),
        gpt_oss_layout,
    ),
    "jetmoe": Block(
        "jetmoe",
        "JetMoeMoE",
        "JetMoeConfig",
        {
            "hidden_size": D,
            "intermediate_size": F,
            "num_local_experts": E,
            "num_experts_per_tok": 2,
            "activation_function": "silu",
        },
        moe(TokenChoice(top_k=2), output_bias=True),
        jetmoe_layout,
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
