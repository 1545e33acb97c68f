"""``FeedForwardPart`` describes a feed-forward network inside a model: its weights, and how a layer takes its place.

A *reader* makes one from a module: see ``core.convert.register_ffn`` in ``readers.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...experts import FFN, GEGLU, ExpertConfig, Experts, GeneralFFN, SwiGLU
from ...experts.general import GENERAL_ACTIVATIONS
from ...fields import Checked, OneOf, ShareBelowOne
from ...kernels import ACTIVATIONS

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
LAYOUTS = ("tokens", "sequence_first", "channels_first")
"""What a network is called with: (..., D) tokens, (S, B, D), or a map (B, D, H, W)."""


@dataclass(frozen=True)
class FeedForwardPart(Checked):
    """A feed-forward network inside a dense model, as an expert has it.

    Attributes:
        expert: config of the expert that computes the network: its kind, width, biases, activation and the dropout of
            its hidden layer.
        weights: the tensors of one such expert, by the names of ``Experts.weights_of``: matrices are (in, out), such as
            ``w_in`` (D, F), ``w_gate`` (D, F) and ``w_out`` (F, D_out). They are detached and may be views.
        dim: D.
        out_dim: D_out.
        output_dropout: probability of the network's own dropout behind the last linear layer.
        layout: arguments of the network's call, one of ``LAYOUTS``.
        at: child of the module, by dotted name, whose place the new layer takes; "": the module's own place.
        emptied: children whose work the new layer does too: each becomes an ``nn.Identity``.
        settings: attributes that the module gets with the new layer.
        dense: computes the network, (T, D) or a map, with the dropout of its hidden layer. It checks what was read of a
            module that cannot be called with tokens alone.
    """

    expert: ExpertConfig
    weights: Mapping[str, Tensor]
    dim: int
    out_dim: int
    output_dropout: ShareBelowOne = 0.0
    layout: Annotated[str, OneOf(*LAYOUTS)] = "tokens"
    at: str = ""
    emptied: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    dense: Callable[[Tensor], Tensor] | None = None

    @property
    def hidden_dim(self) -> int:
        """F, the rows of ``w_out``.

        Raises:
            ValueError: the network is a stack of layers, which has no such width.
        """
        if "w_out" not in self.weights:
            raise ValueError(f"a {type(self.expert).__name__} is a stack of layers, which has no one hidden width")
        return int(self.weights["w_out"].shape[0])

    def replaced_in(self, module: nn.Module) -> nn.ModuleList:
        """Return the modules whose work a new layer does, of the module that was read."""
        children = dict(module.named_modules())
        # An activation may be a function, which is not a child.
        return nn.ModuleList(children[child] for child in (self.at, *self.emptied) if child in children)

    def num_params(self) -> int:
        """Return the parameters of one expert."""
        return self.expert.num_params(self.dim, self.out_dim)

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of the dense network on a token, two a multiply-add."""
        return self.expert.flops_per_row(self.dim, self.out_dim)

    @torch.no_grad()
    def build(self) -> Experts:
        """Return experts, of which there is one, with copies of the weights, on their device and in their dtype."""
        like = next(iter(self.weights.values()))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # the initial values are overwritten
            experts = self.expert.build(1, self.dim, self.out_dim).to(like.device, like.dtype)
        copy_weights(experts, 0, self.weights)
        return experts


def feed_forward_part(
    w_in: tuple[Tensor, Tensor | None],
    w_out: tuple[Tensor, Tensor | None],
    w_gate: tuple[Tensor, Tensor | None] | None = None,
    *,
    activation: object,
    hidden_dropout: float = 0.0,
    **place: Any,
) -> FeedForwardPart:
    """Return the part of ``act(x w_in + b_in) w_out + b_out``, or of ``(act(x w_gate + b_gate) * (x w_in + b_in)) w_out
    + b_out``.

    The expert is ``FFN``, ``SwiGLU`` or ``GEGLU`` if one of them computes this, and else ``GeneralFFN``.

    Args:
        w_in, w_gate: matrix (D, F) and bias (F,) or None, as ``affine`` returns them.
        w_out: matrix (F, D_out) and bias (D_out,) or None.
        activation: a module or function, which ``activation_name`` recognizes, or a name of ``GeneralFFN``.
        hidden_dropout: probability of the dropout behind the activation.
        place: other attributes of ``FeedForwardPart``.

    Raises:
        ValueError: the shapes do not fit, or no expert has the activation.
    """
    D, F = w_in[0].shape
    if w_gate is not None and w_gate[0].shape != (D, F):
        raise ValueError(f"w_gate has shape {tuple(w_gate[0].shape)}, and w_in {(D, F)}")
    if w_out[0].shape[0] != F:
        raise ValueError(f"w_out takes {w_out[0].shape[0]} numbers, and w_in gives {F}")
    act = activation if isinstance(activation, str) else activation_name(activation)
    if act is None:
        raise ValueError(f"its activation {_named(activation)} is none of {', '.join(GENERAL_ACTIVATIONS)}")
    tensors = {"w_in": w_in[0], "w_out": w_out[0], "b_in": w_in[1], "b_out": w_out[1]}
    if w_gate is not None:
        tensors |= {"w_gate": w_gate[0], "b_gate": w_gate[1]}
    weights = {name: t.detach() for name, t in tensors.items() if t is not None}
    expert = _expert(F, act, weights, hidden_dropout)
    return FeedForwardPart(expert, weights, D, w_out[0].shape[1], **place)


def _expert(hidden_dim: int, activation: str, weights: Mapping[str, Tensor], dropout: float) -> ExpertConfig:
    """Return the config of an expert with these weights: a kind with fused kernels if one has them."""
    gated, biases = "w_gate" in weights, {name for name in weights if name.startswith("b_")}
    fused = activation in ACTIVATIONS and not dropout and biases in (set(), {"b_in", "b_out"})
    if not fused or (gated and biases):
        return GeneralFFN(
            hidden_dim,
            activation,
            gated=gated,
            bias_in="b_in" in biases,
            bias_gate="b_gate" in biases,
            bias_out="b_out" in biases,
            dropout=dropout,
        )
    if not gated:
        return FFN(hidden_dim, activation, bias=bool(biases))
    return GEGLU(hidden_dim) if activation == "gelu" else SwiGLU(hidden_dim, activation)


def affine(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Return matrix (in, out) and bias (out,) or None of a linear layer: a view of its weight.

    Args:
        module: ``nn.Linear``, a convolution with a kernel of 1, or transformers' ``Conv1D``.

    Raises:
        ValueError: another module, or a weight that holds no floating-point numbers, such as a quantized one.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or is_lazy(weight):
        raise ValueError(f"a {type(module).__name__} has no weight of floating-point numbers")
    if isinstance(module, nn.Linear):
        return weight.t(), bias
    if is_pointwise(module):
        return weight.flatten(1).t(), bias
    if _is_conv1d(module):
        return weight, bias
    raise ValueError(f"a {type(module).__name__} is no linear layer")


@torch.no_grad()
def set_affine(module: nn.Module, w: Tensor, b: Tensor | None) -> None:
    """Give a linear layer another matrix and bias, of any size: the inverse of ``affine``.

    Args:
        module: one that ``affine`` takes.
        w: (in, out).
        b: (out,), or None if the layer has no bias.
    """
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = w.shape
        weight = w.t()
    elif isinstance(module, _CONVOLUTIONS):
        module.in_channels, module.out_channels = w.shape
        weight = w.t().reshape(*reversed(w.shape), *module.kernel_size)
    else:
        for name, size in zip(("nx", "nf"), w.shape, strict=True):
            setattr(module, name, size)
        weight = w
    module.weight = nn.Parameter(weight.contiguous())
    if b is not None:
        module.bias = nn.Parameter(b)


def is_linear(module: object) -> bool:
    """Return whether ``affine`` takes the module."""
    return isinstance(module, nn.Linear) or is_pointwise(module) or _is_conv1d(module)


def is_pointwise(module: object) -> bool:
    """Return whether a module is a convolution over single positions, a linear layer of channels."""
    if not isinstance(module, _CONVOLUTIONS) or module.groups != 1:
        return False
    return {*module.kernel_size, *module.stride} == {1} and not any(module.padding)


def _is_conv1d(module: object) -> bool:
    # transformers' linear layer with an (in, out) weight, known by its name: transformers is not imported here.
    return type(module).__name__ == "Conv1D" and getattr(getattr(module, "weight", None), "ndim", 0) == 2


def activation_name(act: object) -> str | None:
    """Return the name in ``GeneralFFN`` of an activation, which is recognized by its output; None: it has none.

    Args:
        act: a module or a function of a tensor.
    """
    if not callable(act) or (isinstance(act, nn.Module) and any(True for _ in (*act.parameters(), *act.buffers()))):
        return None
    x_1N = torch.linspace(-20, 20, 801, dtype=torch.float64).unsqueeze(0)
    try:
        y_1N = act(x_1N.clone())
    except Exception:  # an activation has to take a row of numbers
        return None
    if not isinstance(y_1N, Tensor) or y_1N.shape != x_1N.shape or y_1N.dtype != x_1N.dtype:
        return None
    known = (name for name, fn in GENERAL_ACTIVATIONS.items() if torch.allclose(fn(x_1N), y_1N, rtol=1e-6, atol=1e-6))
    return next(known, None)


def _named(activation: object) -> str:
    name = getattr(activation, "__name__", type(activation).__name__)
    return name if not isinstance(activation, functools.partial) else repr(activation)


@torch.no_grad()
def copy_weights(experts: Experts, e: int, weights: Mapping[str, Tensor]) -> None:
    """Write the tensors of one network into local expert ``e``.

    Raises:
        ValueError: the expert has other tensors, or one of another shape.
    """
    target = experts.weights_of(e)
    if set(target) != set(weights):
        raise ValueError(f"experts have the tensors {sorted(target)}, and the network {sorted(weights)}")
    for name, tensor in target.items():
        if tensor.shape != weights[name].shape:
            raise ValueError(f"{name} is {tuple(weights[name].shape)}, and an expert's {tuple(tensor.shape)}")
        tensor.copy_(weights[name])
