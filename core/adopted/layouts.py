"""Layouts: where a block of another library keeps its router and its experts. A new family is one entry."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Layout:
    """The places of a block's parts, as names of attributes.

    The block calls ``experts(x_TD, expert_ids_TK, gates_TK)``, and its router returns logits among other things.

    Attributes:
        router: the module that computes the logits. experts: the module with the stacked matrices, whose first axis
        counts the experts. logits: place of the logits (T, E) in the router's output; None: the output is the logits.
        score: score function of the logits, a key of ``core.kernels.SCORE_FUNCS``, which the balance losses read.
        top_k: attribute of the router, or of the block, with K. bias: path, from the block, of the buffer or parameter
        that is added to the scores for the choice; "": none. up, down: paths, from the experts, of the matrices to the
        hidden layer, both halves of a gated expert in one, and
            of those back.
        gate: path of the gate's matrices if they are apart; "": ``up`` holds both halves.
        up_bias, down_bias: their biases; "": none.
        transposed: whether matrices are (E, in, out); else (E, out, in), as ``nn.Linear`` has them.
        down_transposed: the same of ``down``; None: as ``transposed``.
        flat: whether matrices are (E * F, D), the experts one below the other.
        interleaved: whether gate and input alternate along the hidden axis; else the gate's half comes first.
        activation: attribute of the experts with the activation.
        clamp: attribute of the experts with the bound of both halves; "": they have none.
        alpha: attribute with the slope of the gate's sigmoid, of clamped experts; "": 1.
        shift: what clamped experts add to the input's half.
        gated: whether experts have a gate's half.
        fixed_top_k: whether a token takes as many experts whatever ``top_k`` says.
        min_experts: fewest experts of a block; with fewer, transformers makes a dense layer in its place.
        way: how the block asks its experts. "choice": ``experts(x_TD, expert_ids_TK, gates_TK)``. "mask":
            ``experts(x_TD, chosen_T1E, gates_T1)``, and "gates": ``experts(x_TD, chosen_TE, gates_TE)``; both have a
            dict of modules, one per expert, from which the paths of matrices and biases start. "input": the router
            returns scores (T, E), 0 but for the chosen experts, which scale the experts' input; the block adds its
            ``shared_expert`` and returns the logits too. "sorted": the router sorts tokens by expert, and the matrices
            lie in the block.
    """

    router: str = "gate"
    experts: str = "experts"
    logits: int | None = 0
    score: Literal["softmax", "sigmoid", "sqrt_softplus"] = "softmax"
    top_k: str = "top_k"
    bias: str = ""
    up: str = "gate_up_proj"
    down: str = "down_proj"
    gate: str = ""
    up_bias: str = ""
    down_bias: str = ""
    transposed: bool = False
    down_transposed: bool | None = None
    flat: bool = False
    interleaved: bool = False
    activation: str = "act_fn"
    clamp: str = ""
    alpha: str = ""
    shift: float = 0.0
    gated: bool = True
    fixed_top_k: bool = False
    min_experts: int = 1
    way: Literal["choice", "mask", "gates", "input", "sorted"] = "choice"


ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "ReLU": "relu",
    "silu": "silu",
}
"""The engine's activations by the names of the classes that transformers has for them."""

_DEEPSEEK_V3 = Layout(score="sigmoid", bias="gate.e_score_correction_bias")

LAYOUTS: dict[str, Layout] = {
    **dict.fromkeys(
        (
            "DeepseekV2Moe",
            "FlexOlmoSparseMoeBlock",
            "HunYuanMoEV1Moe",
            "MellumSparseMoeBlock",
            "MiniMaxSparseMoeBlock",
            "Mistral4MoE",
            "MixtralSparseMoeBlock",
            "OlmoeSparseMoeBlock",
            "Qwen2MoeSparseMoeBlock",
            "Qwen3MoeSparseMoeBlock",
            "Qwen3NextSparseMoeBlock",
            "Qwen3_5MoeSparseMoeBlock",
        ),
        Layout(),
    ),
    **dict.fromkeys(("GraniteMoeHybridMoE", "GraniteMoeMoE", "GraniteMoeSharedMoE"), Layout(router="router")),
    "JambaSparseMoeBlock": Layout(router="router", min_experts=2),
    "PhimoeSparseMoeBlock": Layout(router="router", fixed_top_k=True),
    **dict.fromkeys(
        (
            "BailingHybridMoE",
            "DeepseekV32MoE",
            "DeepseekV3MoE",
            "Dots1MoE",
            "ExaoneMoeSparseMoEBlock",
            "Glm4MoeLiteMoE",
            "Glm4MoeMoE",
            "GlmMoeDsaMoE",
            "KimiLinearMoE",
            "LagunaSparseMoeBlock",
            "MiMoV2FlashMoE",
            "SolarOpenMoE",
        ),
        _DEEPSEEK_V3,
    ),
    "AfmoeSparseMoeBlock": Layout(router="router", score="sigmoid", bias="expert_bias"),
    "DbrxFFN": Layout(
        router="router",
        logits=None,
        up="mlp.v1",
        gate="mlp.w1",
        down="mlp.w2",
        down_transposed=True,
        flat=True,
        activation="mlp.activation_fn",
    ),
    "DeepseekV4SparseMoeBlock": replace(_DEEPSEEK_V3, score="sqrt_softplus", clamp="limit"),
    "Ernie4_5_MoeSparseMoeBlock": Layout(bias="gate.moe_statics.e_score_correction_bias"),
    "GptOssMLP": Layout(
        router="router",
        up_bias="gate_up_proj_bias",
        down_bias="down_proj_bias",
        transposed=True,
        interleaved=True,
        clamp="limit",
        alpha="alpha",
        shift=1.0,
    ),
    "JetMoeMoE": Layout(
        router="router",
        experts="",
        logits=4,
        up="input_linear.weight",
        down="output_linear.weight",
        activation="activation",
        way="sorted",
    ),
    "Lfm2MoeSparseMoeBlock": Layout(score="sigmoid", bias="expert_bias"),
    "Llama4TextMoe": Layout(router="router", logits=1, score="sigmoid", transposed=True, way="input"),
    **dict.fromkeys(("HYV3MoE", "MiniMaxM2SparseMoeBlock"), Layout(score="sigmoid", bias="e_score_correction_bias")),
    "NllbMoeSparseMLP": Layout(
        router="router",
        fixed_top_k=True,
        logits=2,
        up="fc1.weight",
        down="fc2.weight",
        up_bias="fc1.bias",
        down_bias="fc2.bias",
        activation="act",
        gated=False,
        way="gates",
    ),
    "SwitchTransformersSparseMLP": Layout(
        router="router", logits=2, up="wi.weight", down="wo.weight", activation="act", gated=False, way="mask"
    ),
}
"""The layouts by the name of the block's class."""


def register_layout(block: str, layout: Layout) -> None:
    """Let ``adopt`` know a block by the name of its class.

    Raises:
        ValueError: a layout of that name is there.
    """
    if block in LAYOUTS:
        raise ValueError(f"the layout of {block} is registered already: {LAYOUTS[block]}")
    LAYOUTS[block] = layout
