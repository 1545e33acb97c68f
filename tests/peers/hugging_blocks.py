"""MoE blocks of transformers, ours, and how the weights of the one are laid out in the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from beside import Layout, Read, load
from hugging import DEEPSEEK, GATES, LOCAL, NLLB, QWEN, D, E, F, S, config_of, modeling, randomize
from torch import Tensor, nn

from core import FFN, ClampedSwiGLU, Hash, Identity, Mixed, MoEConfig, RouterConfig, SparseMixer, SwiGLU, TokenChoice


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


def gated(gate: Any, experts: Any, read: Read) -> dict[str, Tensor]:
    """A linear gate and two tensors of experts."""
    return {
        "router.gate.weight": read(gate.weight),
        **swiglu("experts", read(experts.gate_up_proj), read(experts.down_proj)),
    }


def routed(block: Any, read: Read) -> dict[str, Tensor]:
    return gated(block.gate, block.experts, read)


def with_shared(num: int) -> Layout:
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


def dbrx_layout(block: Any, read: Read) -> dict[str, Tensor]:
    """(E * F, D) each, all of them as of an ``nn.Linear`` from D to F."""
    mlp = block.experts.mlp
    w_gate, w_in, w_out = (read(w).unflatten(0, (E, F)) for w in (mlp.w1, mlp.v1, mlp.w2))
    return {
        "router.gate.weight": read(block.router.layer.weight),
        "experts.w_gate": w_gate.mT,
        "experts.w_in": w_in.mT,
        "experts.w_out": w_out,
    }


def longcat_layout(block: Any, read: Read) -> dict[str, Tensor]:
    """The first product has places for the experts that copy, which nobody reads."""
    experts = block.experts
    return {
        "router.gate.weight": read(block.router.classifier.weight),
        **swiglu("experts.parts.0", read(experts.gate_up_proj)[:E], read(experts.down_proj)),
    }


class Gemma4Block(nn.Module):
    """Router and experts of a Gemma 4 layer on the same tokens: in the model, the experts' are normalized with a scale
    of their own."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        module = modeling("gemma4")
        self.router, self.experts = module.Gemma4TextRouter(config), module.Gemma4TextExperts(config)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.flatten(0, 1)
        _, gates_TK, expert_ids_TK = self.router(x_TD)
        y_TD: Tensor = self.experts(x_TD, expert_ids_TK, gates_TK)
        return y_TD.view_as(x_BSD)


def gemma4_layout(block: Any, read: Read) -> dict[str, Tensor]:
    return {
        **gated(block.router.proj, block.experts, read),
        "router.gate.input_scale": read(block.router.scale),
        "router.expert_scale": read(block.router.per_expert_scale),
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
    """A peer's block (its class's name, or what makes it of its configuration and ``args``), ours, and the peer's
    weights in our layout."""

    model: str
    block: str | Callable[[Any], nn.Module]
    config: str
    options: dict[str, Any]
    ours: MoEConfig
    layout: Layout = routed
    args: tuple[Any, ...] = ()

    def pair(self, **options: Any) -> tuple[Any, Any]:
        """Return the peer's block and ours with the same weights, both in evaluation."""
        config = config_of(self.config, **{**self.options, **options})
        block = getattr(modeling(self.model), self.block) if isinstance(self.block, str) else self.block
        peer = randomize(block(config, *self.args), std=0.3).eval()
        layer = self.ours.build(D).eval()
        load(layer, self.layout(peer, lambda p: p.detach()))
        for name, bias in peer.named_buffers():
            if name.endswith("e_score_correction_bias"):
                layer.router.expert_bias.copy_(bias)
        return peer, layer


def moe(router: RouterConfig, **options: Any) -> MoEConfig:
    return MoEConfig(E, router, **{"expert": SwiGLU(F), **options})


VOCAB = 50
V4 = {
    **{**DEEPSEEK, "vocab_size": VOCAB, "moe_intermediate_size": F, "swiglu_limit": 0.5},
    "routed_scaling_factor": 1.5,
}
V4_EXPERTS: dict[str, Any] = {"expert": ClampedSwiGLU(F, limit=0.5), "num_shared_experts": 1}
LONGCAT = {"hidden_size": D, "expert_ffn_hidden_size": F, "n_routed_experts": E, "zero_expert_num": 4, "moe_topk": 5}
DBRX = {"hidden_size": D, "ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": 3}


def of(name: str, kind: str, options: dict[str, Any], ours: MoEConfig, *rest: Any, **args: Any) -> Block:
    """Return a ``Block`` whose class ``kind`` begins with its configuration's name, up to a ``:``."""
    prefix, suffix = kind.split(":")
    return Block(name, prefix + suffix, f"{prefix}Config", options, ours, *rest, **args)


def gate(name: str, **options: Any) -> dict[str, Any]:
    return {**GATES[name].options, **options}


BLOCKS = {
    "mixtral": of(
        "mixtral", "Mixtral:SparseMoeBlock", gate("mixtral", intermediate_size=F), moe(GATES["mixtral"].ours)
    ),
    "qwen2": of(
        *("qwen2_moe", "Qwen2Moe:SparseMoeBlock"),
        {**QWEN, "moe_intermediate_size": F, "shared_expert_intermediate_size": 2 * F},
        *(moe(GATES["qwen2"].ours, num_shared_experts=2, shared_gate="scale"), qwen2_layout),
    ),
    "qwen3": of(
        "qwen3_moe", "Qwen3Moe:SparseMoeBlock", gate("qwen3", moe_intermediate_size=F), moe(GATES["qwen3"].ours)
    ),
    "olmoe": of("olmoe", "Olmoe:SparseMoeBlock", {**QWEN, "intermediate_size": F}, moe(GATES["olmoe"].ours)),
    "deepseek-v2": of(
        *("deepseek_v2", "DeepseekV2:Moe", gate("deepseek-v2", moe_intermediate_size=F, n_shared_experts=2)),
        *(moe(GATES["deepseek-v2"].ours, num_shared_experts=2), with_shared(2)),
    ),
    "deepseek-v3": of(
        *("deepseek_v3", "DeepseekV3:MoE", gate("deepseek-v3", moe_intermediate_size=F, n_shared_experts=1)),
        *(moe(GATES["deepseek-v3"].ours, num_shared_experts=1), with_shared(1)),
    ),
    "llama4": of(
        *("llama4", "Llama4Text:Moe", gate("llama4", intermediate_size=F)),
        *(moe(GATES["llama4"].ours, num_shared_experts=1), llama4_layout),
    ),
    "llama4-two-experts": of(
        *("llama4", "Llama4Text:Moe", gate("llama4", intermediate_size=F, num_experts_per_tok=2)),
        moe(TokenChoice(top_k=2, score_func="sigmoid", normalize=False, gates_on="input"), num_shared_experts=1),
        llama4_layout,
    ),
    # Limits of 1: those of the published weights would be out of reach of random ones.
    "gpt-oss": of(
        *("gpt_oss", "GptOss:MLP", gate("gpt-oss", intermediate_size=F, swiglu_limit=1.0)),
        moe(GATES["gpt-oss"].ours, expert=ClampedSwiGLU(F, bias=True, limit=1.0, alpha=1.702, shift=1.0)),
        gpt_oss_layout,
    ),
    "jetmoe": of(
        *("jetmoe", "JetMoe:MoE"),
        {**LOCAL, "intermediate_size": F, "num_experts_per_tok": 2, "activation_function": "silu"},
        *(moe(TokenChoice(top_k=2), output_bias=True), jetmoe_layout),
    ),
    "switch": of(
        *("switch_transformers", "SwitchTransformers:SparseMLP"),
        {**NLLB, "d_ff": F, "expert_capacity": 2, "dropout_rate": 0.0},
        moe(TokenChoice(top_k=1), expert=FFN(F, "relu"), capacity_factor=2 * E / S, group="sequence"),
        switch_layout,
    ),
    # A distance of 0.6 to the best, where the published 0.02 would leave each gate at 1.
    "phimoe": of(
        *("phimoe", "Phimoe:SparseMoeBlock", {**LOCAL, "intermediate_size": F, "router_jitter_noise": 0.3}),
        *(moe(SparseMixer(jitter_eps=0.3)), lambda block, read: gated(block.router, block.experts, read)),
    ),
    **{
        f"dbrx-{p}": of(
            *("dbrx", "Dbrx:FFN", {"d_model": D, "ffn_config": {**DBRX, "moe_normalize_expert_weights": p}}),
            *(moe(TokenChoice(top_k=3, norm_order=p)), dbrx_layout),
        )
        for p in (1.0, 2.0)
    },
    "longcat-flash": of(
        *("longcat_flash", "LongcatFlash:MoE", {**LONGCAT, "routed_scaling_factor": 6.0}),
        MoEConfig(
            E + 4,
            TokenChoice(top_k=5, normalize=False, expert_bias=True, scale=6.0),
            Mixed((SwiGLU(F), Identity()), (E, 4)),
        ),
        longcat_layout,
    ),
    "gemma4": Block(
        *("gemma4", Gemma4Block, "Gemma4TextConfig"),
        {"hidden_size": D, "num_experts": E, "top_k_experts": 3, "moe_intermediate_size": F},
        moe(TokenChoice(top_k=3, input_norm=True, expert_scale=True), expert=SwiGLU(F, "gelu_tanh")),
        gemma4_layout,
    ),
    "deepseek-v4": of(
        *("deepseek_v4", "DeepseekV4:SparseMoeBlock", V4),
        moe(TokenChoice(top_k=3, score_func="sqrt_softplus", expert_bias=True, scale=1.5), **V4_EXPERTS),
        *(with_shared(1), (3,)),
    ),
    # The first layers choose by a table of token ids.
    "deepseek-v4-hash": of(
        *("deepseek_v4", "DeepseekV4:SparseMoeBlock", V4),
        moe(Hash(VOCAB, top_k=3, score_func="sqrt_softplus", scale=1.5), **V4_EXPERTS),
        *(with_shared(1), (0,)),
    ),
}
