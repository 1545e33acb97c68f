"""M2M-100 (arXiv 2010.11125), the dense NLLB models on its code, and NLLB-MoE (arXiv 2207.04672)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

import core
from apps.base.checks import check_name
from apps.nets.config import TransformerConfig
from apps.porting.architecture import THEIR_ACTIVATIONS, Architecture, Family, activation, needed, sparse_parts
from apps.porting.encoder_decoder import expert_parts, ids_of, model_parts, read_specials, read_tie, sides, sparse_step
from apps.porting.parts import Part, Parts, cross_attention, linear, self_attention

SPARSE = "nllb-moe"
UNK = 3
SECOND: dict[str, Literal["always", "random"]] = {"all": "always", "random": "random"}
BEFORE_DROPPING = "normalize_router_prob_before_dropping"


def sparse_layers(step: int, depth: int) -> tuple[int, ...]:
    """Return the layers that have experts: the last of each ``step``."""
    return tuple(range(step - 1, depth, step)) if step > 0 else ()


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture of an M2M-100 or NLLB-MoE configuration.

    ``moe_token_dropout`` p leaves expert outputs out in training without making up for it, and evaluation multiplies by
    1 - p. Ours makes up for it, so gates of ``scale = 1 - p`` give both. Capacity is not carried over: theirs has none
    in evaluation, where ``moe_eval_capacity_token_fraction`` is 1. For a capacity that you set, it is read whether
    gates are normalized before it drops pairs, or after.
    """
    model_type = config["model_type"]
    for name in ("ffn_dim", "attention_heads"):
        encoder, decoder = (needed(config, f"{side}_{name}") for side in ("encoder", "decoder"))
        if encoder != decoder:
            raise ValueError(f"encoder_{name}={encoder} is not decoder_{name}={decoder}: here they are one")
    vocabulary, start = FAMILY.vocabulary(config)
    assert vocabulary.pad is not None
    transformer = TransformerConfig(
        dim=needed(config, "d_model"),
        hidden_dim=config["encoder_ffn_dim"],
        num_heads=config["encoder_attention_heads"],
        encoder_layers=needed(config, "encoder_layers"),
        decoder_layers=needed(config, "decoder_layers"),
        positions="sinusoidal",
        max_length=config.get("max_position_embeddings", 1024),
        position_offset=vocabulary.pad + 1,
        norm="layer",
        norm_eps=1e-5,
        activation=activation(config.get("activation_function", "relu")),
        bias=True,
        tie=read_tie(tensors, "model.", own_head=config.get("tie_word_embeddings") is False),
        start=start,
        scale_embeddings=config.get("scale_embedding", True),
        dropout=float(config.get("dropout", 0.1)),
        attn_dropout=float(config.get("attention_dropout", 0.1)),
        ffn_dropout=float(config.get("activation_dropout", 0.0)),
    )
    if model_type != SPARSE:
        return Architecture(model_type, transformer, vocabulary)
    encoder, decoder = (
        sparse_layers(config.get(f"{side}_sparse_step", 4), config[f"{side}_layers"]) for side in ("encoder", "decoder")
    )
    moe = _moe(config, transformer.activation) if encoder or decoder else None
    return Architecture(model_type, transformer, vocabulary, moe, encoder, decoder)


def _moe(config: Mapping[str, Any], act: str) -> core.MoEConfig:
    policy, masking = config.get("second_expert_policy", "all"), float(config.get("moe_token_dropout", 0.2))
    check_name("second_expert_policy", policy, [*SECOND])
    return core.MoEConfig(
        needed(config, "num_experts"),
        core.TokenChoice(
            top_k=2,
            normalize=True if config.get(BEFORE_DROPPING, False) else "kept",
            second_expert_policy=SECOND[policy],
            scale=1 - masking,
            gate_bias=config.get("router_bias", False),
        ),
        core.FFN(config["encoder_ffn_dim"], act, bias=True),
        priority="score" if config.get("batch_prioritized_routing") else "position",
        expert_output_masking=masking,
        # Theirs is K times ours.
        balance=core.Balance(
            load_balancing_loss=2 * config.get("router_aux_loss_coef", 0.001),
            router_z_loss=config.get("router_z_loss_coef", 0.001),
        ),
    )


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the values of our architecture in an M2M-100 or NLLB-MoE configuration."""
    config, shape, moe = architecture.transformer, architecture.transformer.shape, architecture.moe
    written: dict[str, Any] = {
        "architectures": ["M2M100ForConditionalGeneration"],
        "d_model": shape.dim,
        "max_position_embeddings": config.max_length,
        "activation_function": THEIR_ACTIVATIONS[config.activation],
        "scale_embedding": config.scale_embeddings,
        "dropout": config.dropout,
        "attention_dropout": config.attn_dropout,
        "activation_dropout": config.ffn_dropout,
        "is_encoder_decoder": True,
        **ids_of(architecture),
    }
    hidden_dim = shape.hidden_dim
    if moe is not None:
        router, expert = sparse_parts(moe, SPARSE)
        hidden_dim, masking = expert.hidden(shape.dim), moe.expert_output_masking
        written.update(
            architectures=["NllbMoeForConditionalGeneration"],
            activation_function=THEIR_ACTIVATIONS[expert.activation],
            num_experts=moe.num_experts,
            moe_token_dropout=masking if router.scale == 1 - masking else 1 - router.scale,
            second_expert_policy="random" if router.second_expert_policy == "random" else "all",
            normalize_router_prob_before_dropping=router.normalize != "kept",
            batch_prioritized_routing=moe.priority == "score",
            router_bias=router.gate_bias,
            router_aux_loss_coef=moe.balance.load_balancing_loss / 2,
            router_z_loss_coef=moe.balance.router_z_loss,
        )
    for side, depth, indices in sides(architecture):
        written[f"{side}_layers"] = depth
        written[f"{side}_ffn_dim"] = hidden_dim
        written[f"{side}_attention_heads"] = shape.num_heads
        if moe is not None:
            written[f"{side}_sparse_step"] = sparse_step(indices, sparse_layers, depth)
    return written


def parts(architecture: Architecture) -> Parts:
    """Return the table of our parameters and their tensors."""
    return model_parts(architecture, "model.", _stack)


def _stack(architecture: Architecture, side: str, depth: int, sparse: tuple[int, ...]) -> list[Part]:
    rows = [architecture.transformer.shape.dim] * 3
    is_moe = architecture.model_type == SPARSE
    cross, ffn_norm = ("cross_attention", "ff_layer_norm") if is_moe else ("encoder_attn", "final_layer_norm")
    stack = linear(f"{side}.norm", f"model.{side}.layer_norm", bias=True)
    for i in range(depth):
        ours, theirs = f"{side}.layers.{i}", f"model.{side}.layers.{i}"
        attention = f"{theirs}.self_attn"
        stack += self_attention(ours, f"{attention}_layer_norm", f"{attention}.{{}}_proj", "out", rows, bias=True)
        if side == "decoder":
            attention = f"{theirs}.{cross}"
            products = f"{attention}.{{}}_proj"
            stack += cross_attention(ours, f"{attention}_layer_norm", products, "out", rows[:2], bias=True)
        stack += linear(f"{ours}.ffn_norm", f"{theirs}.{ffn_norm}", bias=True)
        if i in sparse:
            names = {"w_in": "fc1.weight", "b_in": "fc1.bias", "w_out": "fc2.weight", "b_out": "fc2.bias"}
            stack += expert_parts(architecture.moe, f"{ours}.ffn", f"{theirs}.ffn", names)
        else:
            theirs = f"{theirs}.ffn" if is_moe else theirs
            stack += linear(f"{ours}.ffn.w_in", f"{theirs}.fc1", bias=True)
            stack += linear(f"{ours}.ffn.w_out", f"{theirs}.fc2", bias=True)
    return stack


_IDS = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
_DEFAULTS = {**_IDS, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}

FAMILY = Family(
    defaults={
        "m2m_100": _DEFAULTS,
        SPARSE: {**_DEFAULTS, "moe_eval_capacity_token_fraction": 1.0},
    },
    vocabulary=lambda config: read_specials({**_IDS, "decoder_start_token_id": 2, **config}, UNK),
    read=read,
    write=write,
    parts=parts,
    bias=True,
    computed=("embed_positions.weights", "final_logits_bias"),
)
