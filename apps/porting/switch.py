"""T5 (arXiv 1910.10683), its v1.1 and mT5 with gated FFNs, and Switch Transformers (arXiv 2101.03961)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import core
from apps.nets.config import TransformerConfig
from apps.porting.architecture import THEIR_ACTIVATIONS, Architecture, Family, activation, needed, sparse_parts
from apps.porting.encoder_decoder import expert_parts, ids_of, model_parts, read_specials, read_tie, sides, sparse_step
from apps.porting.parts import Part, Parts, cross_attention, linear, same, self_attention

SPARSE = "switch_transformers"
UNK = 2
DROPLESS = 1 << 30
"""The value that we write for ``expert_capacity``, in tokens of a sequence: no token is dropped."""


def sparse_layers(step: int, depth: int) -> tuple[int, ...]:
    """Return the layers that have experts: for a step of n those whose index is 1 modulo n."""
    return tuple(i for i in range(depth) if step == 1 or (step > 1 and i % step == 1))


def read(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Architecture:
    """Return the architecture of a T5 or Switch configuration.

    Capacity is not carried over: our experts take all their tokens.
    """
    model_type = config["model_type"]
    encoder_layers = needed(config, "num_layers")
    decoder_layers = config.get("num_decoder_layers") or encoder_layers
    tied, proj = config.get("tie_word_embeddings") is not False, config.get("feed_forward_proj", "relu")
    if model_type == SPARSE:
        scaled, act, gated = tied, config.get("dense_act_fn", "relu"), False
    else:
        # mT5's code never scales, whatever its files say.
        scaled = model_type == "t5" and config.get("scale_decoder_outputs", tied)
        gated, act = proj.startswith("gated-"), proj.removeprefix("gated-")
        act = "gelu_new" if proj == "gated-gelu" else act
    vocabulary, start = FAMILY.vocabulary(config)
    dim, dropout = needed(config, "d_model"), float(config.get("dropout_rate", 0.1))
    transformer = TransformerConfig(
        dim=dim,
        hidden_dim=needed(config, "d_ff"),
        num_heads=needed(config, "num_heads"),
        head_dim=needed(config, "d_kv"),
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        positions="relative",
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_max_distance=config.get("relative_attention_max_distance", 128),
        norm="rms",
        norm_eps=config.get("layer_norm_epsilon", 1e-6),
        activation=activation(act),
        gated=gated,
        bias=False,
        tie=read_tie(tensors, "", own_head=not tied and model_type != "mt5"),
        start=start,
        scale_embeddings=False,
        attention_scale=1.0,
        logits_scale=dim**-0.5 if scaled else 1.0,
        dropout=dropout,
        attn_dropout=dropout,
        ffn_dropout=dropout,
    )
    if model_type != SPARSE:
        return Architecture(model_type, transformer, vocabulary)
    encoder, decoder = (
        sparse_layers(_step(config, side, depth), depth)
        for side, depth in (("encoder", encoder_layers), ("decoder", decoder_layers))
    )
    moe = core.MoEConfig(
        needed(config, "num_experts"),
        core.TokenChoice(
            top_k=1,
            jitter_eps=float(config.get("router_jitter_noise", 0.01)),
            gate_bias=config.get("router_bias", False),
        ),
        core.FFN(config["d_ff"], transformer.activation),
        balance=core.Balance(
            load_balancing_loss=config.get("router_aux_loss_coef", 0.001),
            router_z_loss=config.get("router_z_loss_coef", 0.001),
        ),
    )
    return Architecture(model_type, transformer, vocabulary, moe if encoder or decoder else None, encoder, decoder)


def _step(config: Mapping[str, Any], side: str, depth: int) -> int:
    given = config.get(f"{side}_sparse_step")
    if given is not None:
        return int(given)
    num = config.get(f"num_sparse_{side}_layers", 3)
    return depth // num if num else depth


def write(architecture: Architecture) -> dict[str, Any]:
    """Return the values of our architecture in a T5 or Switch configuration."""
    config, shape, moe = architecture.transformer, architecture.transformer.shape, architecture.moe
    written = {
        "d_model": shape.dim,
        "d_kv": shape.head_dim,
        "d_ff": shape.hidden_dim,
        "num_layers": shape.encoder_layers,
        "num_decoder_layers": shape.decoder_layers,
        "num_heads": shape.num_heads,
        "relative_attention_num_buckets": config.relative_buckets,
        "relative_attention_max_distance": config.relative_max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "is_encoder_decoder": True,
        **ids_of(architecture),
    }
    if architecture.model_type != SPARSE:
        act = THEIR_ACTIVATIONS[config.activation]
        gated = "gated-gelu" if act == "gelu_new" else f"gated-{act}"
        name = {"t5": "T5", "mt5": "MT5"}[architecture.model_type]
        return {
            **written,
            "architectures": [f"{name}ForConditionalGeneration"],
            "feed_forward_proj": gated if config.gated else act,
            "scale_decoder_outputs": config.logits_scale != 1.0,
        }
    if moe is None:
        raise ValueError(f"a dense model cannot be said in {SPARSE}: model_type='t5' has no experts")
    router, expert = sparse_parts(moe, SPARSE)
    for side, depth, indices in sides(architecture):
        written[f"num_sparse_{side}_layers"] = len(indices)
        written[f"{side}_sparse_step"] = sparse_step(indices, sparse_layers, depth)
    return {
        **written,
        "architectures": ["SwitchTransformersForConditionalGeneration"],
        "d_ff": expert.hidden(shape.dim),
        "dense_act_fn": THEIR_ACTIVATIONS[expert.activation],
        "num_experts": moe.num_experts,
        "router_bias": router.gate_bias,
        "router_jitter_noise": router.jitter_eps,
        "router_aux_loss_coef": moe.balance.load_balancing_loss,
        "router_z_loss_coef": moe.balance.router_z_loss,
    }


def parts(architecture: Architecture) -> Parts:
    """Return the table of our parameters and their tensors."""
    return model_parts(architecture, "", _stack)


def _stack(architecture: Architecture, side: str, depth: int, sparse: tuple[int, ...]) -> list[Part]:
    shape = architecture.transformer.shape
    rows = [shape.num_heads * shape.head_dim] * 3
    dense = "mlp" if architecture.model_type == SPARSE else "DenseReluDense"
    names = {"w_in": "wi_1", "w_gate": "wi_0"} if architecture.transformer.gated else {"w_in": "wi"}
    stack = [
        same(f"{side}.norm.weight", f"{side}.final_layer_norm.weight"),
        same(f"{side}.relative.weight", f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
    ]
    for i in range(depth):
        ours, theirs = f"{side}.layers.{i}", f"{side}.block.{i}.layer"
        products = f"{theirs}.0.SelfAttention.{{}}"
        stack += self_attention(ours, f"{theirs}.0.layer_norm", products, "o", rows, bias=False)
        if side == "decoder":
            products = f"{theirs}.1.EncDecAttention.{{}}"
            stack += cross_attention(ours, f"{theirs}.1.layer_norm", products, "o", rows[:2], bias=False)
        theirs = f"{theirs}.{1 if side == 'encoder' else 2}"
        stack += linear(f"{ours}.ffn_norm", f"{theirs}.layer_norm", bias=False)
        if i in sparse:
            experts = {"w_in": "wi.weight", "w_out": "wo.weight"}
            stack += expert_parts(architecture.moe, f"{ours}.ffn", f"{theirs}.mlp", experts)
        else:
            for our, name in {**names, "w_out": "wo"}.items():
                stack.append(same(f"{ours}.ffn.{our}.weight", f"{theirs}.{dense}.{name}.weight"))
    return stack


_IDS = {"pad_token_id": 0, "eos_token_id": 1}

FAMILY = Family(
    defaults={"t5": _IDS, "mt5": _IDS, SPARSE: {**_IDS, "expert_capacity": DROPLESS}},
    vocabulary=lambda config: read_specials({**_IDS, **config}, UNK),
    read=read,
    write=write,
    parts=parts,
    # Some releases give the cross-attention a table that it does not use.
    computed=("EncDecAttention.relative_attention_bias.weight",),
)
