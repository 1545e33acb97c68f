"""Small models of transformers of every family that ``core.adopt`` knows, and what they compute."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import core
from core.experts.adapters import LowRankUpdate

transformers = pytest.importorskip("transformers")

SMALL = {
    **{"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1},
    "eos_token_id": 2,
}
LATENT = {
    **{"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 4},
    "qk_nope_head_dim": 4,
}
EIGHT = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1}
LOCAL, FOUR, HEAD = {"num_local_experts": 4}, {"num_experts": 4, "moe_intermediate_size": 12}, {"head_dim": 4}
SHARED = {"shared_expert_intermediate_size": 12, "decoder_sparse_step": 1}
ONE_SHARED = {"num_shared_experts": 1, "head_dim": 4}
KINDS_OF_TWO = {"layer_types": ["linear_attention", "full_attention"]}
LINEAR = {
    **{"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 4},
    **KINDS_OF_TWO,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": LOCAL | {"router_jitter_noise": 0.1},
    "Qwen2Moe": FOUR | SHARED,
    "Qwen3Moe": FOUR | HEAD,
    "Qwen3Next": FOUR | SHARED | HEAD | LINEAR,
    "Olmoe": {"num_experts": 4},
    "GptOss": LOCAL | {"head_dim": 8, "sliding_window": 8},
    "DeepseekV2": EIGHT | LATENT | {"topk_method": "group_limited_greedy"},
    "DeepseekV3": EIGHT | LATENT,
    "Glm4Moe": EIGHT | HEAD,
    "GraniteMoe": LOCAL,
    "Phimoe": LOCAL,
    "Llama4": LOCAL | HEAD | {"intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, "attention_chunk_size": 8},
    "Lfm2Moe": FOUR | {"num_dense_layers": 0, "layer_types": ["conv", "full_attention"]},
    "MiniMaxM2": LOCAL | HEAD | {"rotary_dim": 4},
    "HunYuanMoEV1": HEAD | {"num_experts": 4, "moe_topk": 2},
    "Ernie4_5_Moe": {
        **{"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 12},
        "moe_layer_start_index": 0,
    },
    "DeepseekV4": LOCAL
    | {"num_key_value_heads": 1, "moe_intermediate_size": 12, "n_routed_experts": 4, "head_dim": 8, "q_lora_rank": 8}
    | {"o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 4, "num_hash_layers": 1, "index_n_heads": 2}
    | {"index_head_dim": 8, "index_topk": 4, "sliding_window": 8},
    "JetMoe": LOCAL | {"kv_channels": 4},
    "FlexOlmo": {"num_experts": 4},
    "Mellum": FOUR | HEAD,
    "MiniMax": LOCAL | HEAD | KINDS_OF_TWO | {"block_size": 4},
    "Mistral4": EIGHT | LATENT,
    "Qwen3_5Moe": FOUR | SHARED | {"head_dim": 8} | LINEAR,
    "GraniteMoeShared": LOCAL | {"shared_intermediate_size": 12},
    "GraniteMoeHybrid": LOCAL
    | {"shared_intermediate_size": 12, "layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 8}
    | {"mamba_d_state": 4, "mamba_chunk_size": 4},
    "Jamba": {
        **{"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1},
        **{"expert_layer_offset": 0, "mamba_d_state": 4, "mamba_dt_rank": 4},
    },
    "BailingHybrid": EIGHT | LATENT | {"layer_group_size": 2},
    "KimiLinear": EIGHT | LATENT | KINDS_OF_TWO | {"linear_head_dim": 4, "linear_num_heads": 4},
    "DeepseekV32": EIGHT | LATENT,
    "Glm4MoeLite": EIGHT | LATENT,
    "GlmMoeDsa": EIGHT | LATENT,
    "Dots1": EIGHT | {"n_shared_experts": 1},
    "MiMoV2Flash": EIGHT | HEAD,
    "SolarOpen": EIGHT | HEAD,
    "ExaoneMoe": FOUR | ONE_SHARED | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "Afmoe": FOUR | ONE_SHARED | {"num_dense_layers": 1},
    "HYV3": FOUR | LOCAL | ONE_SHARED,
    "Laguna": FOUR | SHARED | HEAD,
    "Dbrx": {
        **{"d_model": 16, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 12, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 16},
    },
}
TWO_SIDED: dict[str, dict[str, Any]] = {
    "SwitchTransformers": {
        **{"d_model": 16, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4},
        **{"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "expert_capacity": 4, "dropout_rate": 0.0},
        "router_jitter_noise": 0.1,
    },
    "NllbMoe": {
        **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
        **{f"{side}_ffn_dim": 12 for side in ("encoder", "decoder")},
        **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
        **{f"{side}_sparse_step": 1 for side in ("encoder", "decoder")},
        **{"d_model": 16, "expert_capacity": 16, "activation_dropout": 0.0, "moe_token_dropout": 0.0},
        **{"dropout": 0.0, "attention_dropout": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0},
    },
}
"""Encoder-decoders, whose experts are one module each, and may be full."""
EVERY = [*FAMILIES, *TWO_SIDED]
DENSE_FIRST = {"DeepseekV2", "DeepseekV3", "Glm4Moe", "Mistral4", "BailingHybrid", "KimiLinear", "DeepseekV32"}
DENSE_FIRST |= {"Glm4MoeLite", "GlmMoeDsa", "Dots1", "MiMoV2Flash", "ExaoneMoe", "Afmoe", "HYV3", "Laguna"}
"""Families whose first layer of two has no experts."""
LIKE = {"FlexOlmo", "Mellum", "MiniMax", "Mistral4", "Qwen3Moe", "Qwen3Next", "Qwen3_5Moe", "GraniteMoeShared"}
LIKE |= {"GraniteMoeHybrid", "BailingHybrid", "KimiLinear", "DeepseekV32", "Glm4MoeLite", "GlmMoeDsa", "Dots1"}
LIKE |= {"MiMoV2Flash", "SolarOpen", "ExaoneMoe", "Glm4Moe"}
"""Families with the layout and the router of another one."""
KINDS = [pytest.param(name, marks=[pytest.mark.slow] if name in LIKE else []) for name in EVERY]
PRELOAD = ["apps.cli.train", "apps.hub.module", "apps.hub.data"]
"""What ranks import once; the first start of ranks decides."""
IDS = torch.tensor([[5, 9, 4, 31, 7, 8, 3], [0, 0, 0, 11, 6, 12, 40]])
MASK = (IDS != 0).long()


def made(name: str, std: float = 0.2) -> Any:
    """Return a small model of a family, with weights that spread the tokens over the experts; 0: as they start."""
    if name in TWO_SIDED:
        kind, head = f"{name}Config", "ForConditionalGeneration"
        given = {"vocab_size": 50, "num_experts": 4, "decoder_start_token_id": 2, "pad_token_id": 0, **TWO_SIDED[name]}
    else:
        kind, head = f"{name}{'Text' if name in ('Llama4', 'Qwen3_5Moe') else ''}Config", "ForCausalLM"
        given = ({"vocab_size": 50} if name == "Dbrx" else SMALL | {"num_experts_per_tok": 2}) | FAMILIES[name]
    given.pop("num_attention_heads" if name == "JetMoe" else "", None)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, kind)(**given)
        if name in FAMILIES:
            config._experts_implementation = config._attn_implementation = "eager"
        model = getattr(transformers, f"{name}{head}")(config)
    for parameter in model.parameters() if std else ():
        nn.init.normal_(parameter, std=std)
    return model


def pair(name: str) -> tuple[Any, Any]:
    """Return a model in evaluation, and a copy that is adopted."""
    plain = made(name).eval()
    return plain, core.adopt(copy.deepcopy(plain))


def first_layer(net: nn.Module) -> Any:
    return next(iter(core.moe_layers(net).values()))


def step(net: nn.Module) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return logits and gradients of one step, with the same noise each time."""
    net.zero_grad()
    torch.manual_seed(1)
    out = net(input_ids=IDS, attention_mask=MASK, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def logits(net: nn.Module) -> Any:
    torch.manual_seed(1)
    return net(input_ids=IDS, attention_mask=MASK, labels=IDS).logits


def run(net: nn.Module, batch: object) -> None:
    logits(net)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def check_gradients(own: dict[str, Any], expected: dict[str, Any]) -> None:
    for key, gradient in expected.items():
        assert error(own[key], gradient) < 1e-5 or float((own[key] - gradient).abs().max()) < 1e-8, key


def adapted(net: Any, *modules: str, rank: int = 2) -> Any:
    torch.manual_seed(3)
    core.add_adapters(net, core.LoRA(rank, alpha=2 * rank), modules=list(modules))
    for module in net.modules():
        if isinstance(module, LowRankUpdate):
            nn.init.normal_(module.b, std=0.2)
    return net
