"""Decoders with rotary positions: Mixtral (arXiv 2401.04088), Qwen2-MoE, Qwen3-MoE (arXiv 2505.09388), their dense
parents Mistral, Qwen2 and Qwen3, OLMoE (arXiv 2409.02060), and GLM-4.5 (arXiv 2508.06471), whose experts are
DeepSeek-V3's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

import core
from apps.nets.config import TransformerConfig
from apps.porting.architecture import THEIR_ACTIVATIONS, Architecture, Family, activation, needed, sparse_parts
from apps.porting.parts import Part, Parts, cut, embedding, linear, same, self_attention, stacked
from apps.porting.vocabulary import Vocabulary, special_id

NAMES = {
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
QK_NORMS: dict[str, Literal["head", "all"]] = {"qwen3": "head", "qwen3_moe": "head", "olmoe": "all"}
WITHOUT_UNK = ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "olmoe")


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture of such a decoder's configuration."""
    model_type = config["model_type"]
    _check_attention(config)
    vocabulary, start = _read_specials(config)
    is_qwen2 = model_type.startswith("qwen2")
    rope = config.get("rope_parameters") or {}
    tied = config.get("tie_word_embeddings", False)
    transformer = TransformerConfig(
        dim=needed(config, "hidden_size"),
        hidden_dim=needed(config, "intermediate_size"),
        num_heads=needed(config, "num_attention_heads"),
        num_kv_heads=needed(config, "num_key_value_heads"),
        head_dim=config.get("head_dim"),
        decoder_layers=needed(config, "num_hidden_layers"),
        positions="rotary",
        rotary_base=float(rope.get("rope_theta", config.get("rope_theta", 1e6 if model_type == "mixtral" else 1e4))),
        norm="rms",
        norm_eps=config.get("rms_norm_eps", 1e-5 if model_type in ("mixtral", "olmoe", "glm4_moe") else 1e-6),
        activation=activation(config.get("hidden_act", "silu")),
        gated=True,
        bias=False,
        qkv_bias=config.get("qkv_bias", True) if is_qwen2 else bool(config.get("attention_bias", False)),
        qk_norm="head" if config.get("use_qk_norm", False) else QK_NORMS.get(model_type, "none"),
        tie="all" if tied else "none",
        start=start,
        scale_embeddings=False,
        dropout=0.0,
        attn_dropout=float(config.get("attention_dropout", 0.0)),
    )
    moe = None
    if model_type == "mixtral":
        moe, layers = _mixtral(config, transformer), tuple(range(transformer.shape.decoder_layers))
    elif model_type in ("qwen2_moe", "qwen3_moe"):
        moe, layers = _qwen(config, transformer), _qwen_layers(config)
    elif model_type == "olmoe":
        moe, layers = _olmoe(config, transformer), tuple(range(transformer.shape.decoder_layers))
    elif model_type == "glm4_moe":
        first = config.get("first_k_dense_replace", 1)
        moe, layers = _glm(config, transformer), tuple(range(first, transformer.shape.decoder_layers))
    if moe is None or not layers:
        moe, layers = None, ()
    return Architecture(model_type, transformer, vocabulary, moe, (), layers, is_language_model=True)


def _check_attention(config: Mapping[str, Any]) -> None:
    window = config.get("sliding_window", 4096 if config["model_type"] == "mistral" else None)
    if window and config.get("use_sliding_window", True):
        raise ValueError(f"sliding_window={window}: attention to the last tokens alone is not in our models")
    ropes = [config.get(name) or {} for name in ("rope_parameters", "rope_scaling")]  # transformers heeds both
    for kind in (rope.get("rope_type", rope.get("type", "default")) for rope in ropes):
        if kind != "default":
            raise ValueError(f"rope_type={kind!r}: rotary positions are 'default' in our models")
    rope = ropes[0] or ropes[1]
    if config["model_type"] == "glm4_moe":
        part = rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 0.5))
        if part != 1.0:
            raise ValueError(f"partial_rotary_factor={part}: rotary positions are of whole heads in our models")
    if config["model_type"] in QK_NORMS and config.get("attention_bias", False):
        raise ValueError("attention_bias=True: our models have no bias after attention where other products have none")
    if config.get("clip_qkv") is not None:
        raise ValueError(f"clip_qkv={config['clip_qkv']}: queries, keys and values are not clipped in our models")


def _read_specials(config: Mapping[str, Any]) -> tuple[Vocabulary, Any]:
    """Return the vocabulary, and our ``TransformerConfig.start``.

    Mistral's unknown is id 0, which byte fallback leaves unused; Qwen and OLMoE have none, and unused ids at the end.
    """
    size = config["vocab_size"]
    unk, spare = (None, size - 1) if config["model_type"] in WITHOUT_UNK else (0, 0)
    eos, bos, pad = (special_id(config, f"{name}_token_id") for name in ("eos", "bos", "pad"))
    start = "eos" if eos is not None and bos in (None, eos) else "bos"
    bos = None if bos == eos else bos
    unk = None if unk in (eos, bos) else unk
    pad = None if pad in (eos, bos, unk) else pad
    return Vocabulary(size, pad, unk, bos, eos, spare), start


def _mixtral(config: Mapping[str, Any], transformer: TransformerConfig) -> core.MoEConfig:
    top_k = config.get("num_experts_per_tok", 2)
    return core.MoEConfig(
        needed(config, "num_local_experts"),
        core.TokenChoice(top_k=top_k, normalize=True, jitter_eps=config.get("router_jitter_noise", 0.0)),
        core.SwiGLU(config["intermediate_size"], transformer.activation),
        balance=_balance(config, top_k),
    )


def _qwen(config: Mapping[str, Any], transformer: TransformerConfig) -> core.MoEConfig:
    hidden_dim = needed(config, "moe_intermediate_size")
    moe = _normalized_on_demand(config, core.SwiGLU(hidden_dim, transformer.activation))
    if config["model_type"] == "qwen3_moe":
        return moe
    shared = needed(config, "shared_expert_intermediate_size")
    if shared % hidden_dim:
        raise ValueError(
            f"shared_expert_intermediate_size={shared} is not a multiple of moe_intermediate_size={hidden_dim}"
        )
    return replace(moe, num_shared_experts=shared // hidden_dim, shared_gate="scale")


def _olmoe(config: Mapping[str, Any], transformer: TransformerConfig) -> core.MoEConfig:
    return _normalized_on_demand(config, core.SwiGLU(config["intermediate_size"], transformer.activation))


def _normalized_on_demand(config: Mapping[str, Any], expert: core.SwiGLU) -> core.MoEConfig:
    top_k = needed(config, "num_experts_per_tok")
    router = core.TokenChoice(top_k=top_k, normalize=config.get("norm_topk_prob", False))
    # transformers 5 saves Qwen3-MoE's number under another name than it was published with.
    name = "num_experts" if "num_experts" in config else "num_local_experts"
    return core.MoEConfig(needed(config, name), router, expert, balance=_balance(config, top_k))


def _glm(config: Mapping[str, Any], transformer: TransformerConfig) -> core.MoEConfig:
    router = core.TokenChoice(
        top_k=config.get("num_experts_per_tok", 8),
        score_func="sigmoid",
        normalize=config.get("norm_topk_prob", True),
        expert_bias=True,
        num_groups=config.get("n_group", 1),
        limited_groups=config.get("topk_group", 1),
        scale=float(config.get("routed_scaling_factor", 1.0)),
    )
    return core.MoEConfig(
        needed(config, "n_routed_experts"),
        router,
        core.SwiGLU(needed(config, "moe_intermediate_size"), transformer.activation),
        num_shared_experts=config.get("n_shared_experts", 1),
        balance=core.Balance(load_balancing_loss=0.0, router_z_loss=0.0),
    )


def _balance(config: Mapping[str, Any], top_k: int) -> core.Balance:
    # Theirs is K times ours.
    return core.Balance(load_balancing_loss=top_k * config.get("router_aux_loss_coef", 0.001), router_z_loss=0.0)


def _qwen_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step", 1)
    return tuple(i for i in range(step - 1, config["num_hidden_layers"], step) if i not in dense)


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the values of our architecture in such a configuration."""
    config, shape, moe = architecture.transformer, architecture.transformer.shape, architecture.moe
    vocabulary, model_type = architecture.vocabulary, architecture.model_type
    written: dict[str, Any] = {
        "architectures": [NAMES[model_type]],
        **vocabulary.token_ids(),
        "hidden_size": shape.dim,
        "intermediate_size": shape.hidden_dim,
        "num_hidden_layers": shape.decoder_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "rope_theta": config.rotary_base,
        "rope_parameters": {"rope_theta": config.rotary_base, "rope_type": "default"},
        "rms_norm_eps": config.norm_eps,
        "hidden_act": THEIR_ACTIVATIONS[config.activation],
        "attention_dropout": config.attn_dropout,
        "tie_word_embeddings": config.tie != "none",
        "sliding_window": None,
    }
    if config.head_dim is not None:
        written["head_dim"] = config.head_dim
    if model_type.startswith("qwen"):
        written["use_sliding_window"] = False
    if model_type in ("glm4_moe", "olmoe"):
        del written["sliding_window"]
    if model_type in QK_NORMS:
        written["attention_bias"] = False
    if model_type == "olmoe":
        written["clip_qkv"] = None
    if model_type == "glm4_moe":
        written["rope_parameters"] |= {"partial_rotary_factor": 1.0}
        written |= {"partial_rotary_factor": 1.0, "use_qk_norm": config.qk_norm == "head"}
        written["attention_bias"] = config.has_qkv_bias
    if moe is None:
        return written
    router, expert = sparse_parts(moe, model_type)
    hidden_dim = expert.hidden(shape.dim)
    written["hidden_act"] = THEIR_ACTIVATIONS[expert.activation]
    written["num_experts_per_tok"] = router.top_k
    written["router_aux_loss_coef"] = moe.balance.load_balancing_loss / router.top_k
    if model_type == "mixtral":
        return {
            **written,
            "intermediate_size": hidden_dim,
            "num_local_experts": moe.num_experts,
            "router_jitter_noise": router.jitter_eps,
        }
    dense = [i for i in range(shape.decoder_layers) if i not in architecture.decoder_moe_blocks]
    if model_type == "glm4_moe":
        del written["router_aux_loss_coef"]
        return {
            **written,
            "n_routed_experts": moe.num_experts,
            "moe_intermediate_size": hidden_dim,
            "n_shared_experts": moe.num_shared_experts,
            "first_k_dense_replace": len(dense),
            "norm_topk_prob": router.normalizes,
            "n_group": router.num_groups,
            "topk_group": router.limited_groups,
            "routed_scaling_factor": router.scale,
        }
    written |= {"num_experts": moe.num_experts, "norm_topk_prob": router.normalizes}
    if model_type == "olmoe":
        return {**written, "intermediate_size": hidden_dim}
    written |= {"moe_intermediate_size": hidden_dim, "mlp_only_layers": dense, "decoder_sparse_step": 1}
    if model_type == "qwen2_moe":
        written["shared_expert_intermediate_size"] = hidden_dim * moe.num_shared_experts
        written["qkv_bias"] = config.has_qkv_bias
    if model_type == "qwen3_moe":
        written["num_local_experts"] = moe.num_experts
    return written


def parts(architecture: Architecture) -> Parts:
    """Return the table of our parameters and their tensors."""
    config, shape = architecture.transformer, architecture.transformer.shape
    head, embed = "lm_head.weight", "model.embed_tokens.weight"
    table = [
        embedding("embed.weight", embed, architecture.vocabulary),
        same("decoder.norm.weight", "model.norm.weight"),
    ]
    aliases = {head: embed} if config.tie != "none" else {}
    if not aliases:
        table.append(embedding("output.weight", head, architecture.vocabulary))
    d = shape.head_dim
    rows = [shape.num_heads * d, shape.num_kv_heads * d, shape.num_kv_heads * d]
    for i in range(shape.decoder_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        norm, products = f"{theirs}.input_layernorm", f"{theirs}.self_attn.{{}}_proj"
        table += self_attention(ours, norm, products, "o", rows, bias=False, qkv_bias=config.has_qkv_bias)
        if config.qk_norm != "none":
            for name in ("q_norm", "k_norm"):
                table.append(same(f"{ours}.mixing.{name}.weight", f"{theirs}.self_attn.{name}.weight"))
        table += linear(f"{ours}.ffn_norm", f"{theirs}.post_attention_layernorm", bias=False)
        if i in architecture.decoder_moe_blocks:
            table += _experts(architecture, f"{ours}.ffn", theirs)
        else:
            for our, name in (("w_gate", "gate_proj"), ("w_in", "up_proj"), ("w_out", "down_proj")):
                table += linear(f"{ours}.ffn.{our}", f"{theirs}.mlp.{name}", bias=False)
    return Parts(tuple(table), aliases)


def _names(is_mixtral: bool) -> tuple[str, tuple[str, str, str]]:
    """Return their names of a sparse layer, and of ``w_gate``, ``w_in`` and ``w_out`` in it."""
    if is_mixtral:
        return "block_sparse_moe", ("w1", "w3", "w2")
    return "mlp", ("gate_proj", "up_proj", "down_proj")


def _experts(architecture: Architecture, ours: str, layer: str) -> list[Part]:
    moe, model_type = architecture.moe, architecture.model_type
    assert moe is not None
    block, names = _names(model_type == "mixtral")
    theirs = f"{layer}.{block}"
    table = linear(f"{ours}.router.gate", f"{theirs}.gate", bias=False)
    for our, name in zip(("w_gate", "w_in", "w_out"), names, strict=True):
        experts = [f"{theirs}.experts.{e}.{name}.weight" for e in range(moe.num_experts)]
        table.append(stacked(f"{ours}.experts.{our}", experts))
    if moe.router.expert_bias:  # type: ignore[attr-defined]  # a TokenChoice, as sparse_parts has checked
        table.append(same(f"{ours}.router.expert_bias", f"{theirs}.gate.e_score_correction_bias"))
    if moe.num_shared_experts:
        shared = f"{theirs}.shared_expert{'s' if model_type == 'glm4_moe' else ''}"
        for our, name, dim in (("w_gate", "gate_proj", 0), ("w_in", "up_proj", 0), ("w_out", "down_proj", 1)):
            table.append(
                cut(f"{ours}.shared_experts.{our}", f"{shared}.{name}.weight", moe.num_shared_experts, dim=dim)
            )
        if model_type == "qwen2_moe":
            table += linear(f"{ours}.shared_gate", f"{theirs}.shared_expert_gate", bias=False)
    return table


_OTHERS = ("mlp.shared_expert_gate.weight", "mlp.shared_experts.up_proj.weight", "self_attn.q_norm.weight")
"""Tensors of which each model but Mixtral has one in every sparse layer: of shared experts or norms of queries."""


def published(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return tensors by their published names; transformers 5 holds a layer's experts in two tensors.

    Raises:
        ValueError: one of the tensors that belong to these two is missing, or they have other numbers of experts.
    """
    fused = "mlp.experts.gate_up_proj"
    layers = [name.removesuffix(fused) for name in tensors if name.endswith(fused)]
    if not layers:
        return tensors
    renamed = dict(tensors)
    for layer in layers:
        down, router = f"{layer}mlp.experts.down_proj", f"{layer}mlp.gate.weight"
        if missing := [name for name in (down, router) if name not in renamed]:
            raise ValueError(f"tensors that are missing: {', '.join(missing)}")
        gates, outs = renamed.pop(f"{layer}{fused}"), renamed.pop(down)
        if gates.ndim != 3 or gates.shape[:1] != outs.shape[:1]:
            shapes = f"{tuple(gates.shape)} and {down} of {tuple(outs.shape)}"
            raise ValueError(f"{layer}{fused} of shape {shapes} do not have the same number of experts")
        is_mixtral = not any(f"{layer}{name}" in renamed for name in _OTHERS)
        block, (gate_name, in_name, out_name) = _names(is_mixtral)
        block = f"{layer}{block}"
        for e, (w, out) in enumerate(zip(gates, outs, strict=True)):
            gate, up = w.chunk(2)
            renamed[f"{block}.experts.{e}.{gate_name}.weight"] = gate
            renamed[f"{block}.experts.{e}.{in_name}.weight"] = up
            renamed[f"{block}.experts.{e}.{out_name}.weight"] = out
        renamed[f"{block}.gate.weight"] = renamed.pop(router)
    return renamed


FAMILY = Family(
    defaults={name: {"bos_token_id": 1, "eos_token_id": 2} for name in NAMES},
    vocabulary=_read_specials,
    read=read,
    write=write,
    parts=parts,
    published=published,
    computed=("rotary_emb.inv_freq",),
)
