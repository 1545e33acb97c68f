"""``OneExpert``, the dense layer that replaces an MoE layer, and the ways to make its expert of many."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...config.dense import DenseFFN
from ...contract import RoutingContext
from ...experts import Experts, FFNExperts, check_merges
from ...experts.base import check_no_adapters
from ...experts.mixed import MixedExperts
from ...layers import AttentionMoE, FeedForward, MoE, NeuronMoE, PatchMoE, SharedGate
from ...layers.base import nothing
from ..read.parts import check_all_here, like, restack


class OneExpert(nn.Module):
    """A layer of one expert for every token, with the shared experts and the output's bias of the layer before.

    Args:
        expert: experts, of which there is one.
        shared_experts, shared_gate, output_bias: as in ``MoE``; None: there is none.
    """

    def __init__(
        self,
        expert: Experts,
        shared_experts: Experts | None = None,
        shared_gate: SharedGate | None = None,
        output_bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.expert, self.shared_experts, self.shared_gate = expert, shared_experts, shared_gate
        self.output_bias = output_bias
        # As in ``MoELayer``: torch's encoder layer computes its own feed-forward block unless there is a hook in it.
        self.register_forward_pre_hook(nothing)

    @property
    def experts(self) -> Experts:
        """The expert, by the name that a MoE layer has for its experts."""
        return self.expert

    @classmethod
    def in_place_of(cls, layer: MoE, expert: Experts) -> OneExpert:
        """Return the layer of ``expert`` with copies of the MoE layer's other parts, in its mode.

        Raises:
            ValueError: the layer's experts take more than a row each, as attention and patches do, or it is adopted.
        """
        if isinstance(layer, (AttentionMoE, NeuronMoE, PatchMoE)):
            raise ValueError(f"no layer of one expert takes the place of a {type(layer).__name__}")
        if layer.is_adopted:
            raise ValueError(f"an adopted {type(layer).__name__} stays one: core.densify gives it one expert in place")
        beside = copy.deepcopy((layer.shared_experts, layer.shared_gate, layer.output_bias))
        return cls(expert, *beside).train(layer.training)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Return (..., D) tokens after the expert, (..., D_out); the context, which a MoE layer gets, is not read."""
        y: Tensor = self.expert(x, "dense")
        if self.shared_experts is not None:
            shared = self.shared_experts(x, "dense")
            y = y + shared if self.shared_gate is None else self.shared_gate.combine(self.shared_gate(x), y, shared)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    @torch.no_grad()
    def feed_forward(self) -> FeedForward:
        """Return one dense FFN that computes the same, the shared experts in its hidden layer; its weights are copies.

        Raises:
            ValueError: the experts are not FFNs of one activation, or have adapters, a gate or a bias.
        """
        if self.shared_gate is not None:
            raise ValueError("a shared_gate weights the experts token by token: no dense FFN does")
        if self.output_bias is not None:
            raise ValueError("output_bias is added beside the experts: no dense FFN has a place for it")
        weights: dict[str, Tensor] = {}
        for experts in (self.expert, self.shared_experts):
            if experts is None:
                continue
            check_no_adapters(experts)
            if type(experts) is not FFNExperts:
                raise ValueError(f"{type(experts).__name__} are no dense FFN: those of FFN, SwiGLU and GEGLU are")
            one = joined(experts, range(experts.num_experts), torch.ones(experts.num_experts)).weights_of(0)
            if weights and (weights.keys() != one.keys() or experts.activation != self.expert.activation):
                raise ValueError("shared experts with another activation, gate or bias do not join the FFN")
            # ``weights_of`` has no axis of experts, and so each axis of hidden units one place further left.
            axes = {name: axis - 1 for name, axis in experts.hidden_axes.items()}
            for name, tensor in one.items():
                before = weights.get(name)
                if before is not None:
                    tensor = torch.cat((before, tensor), axes[name]) if name in axes else before + tensor
                weights[name] = tensor
        return _feed_forward(weights, str(self.expert.activation)).train(self.training)


def _feed_forward(weights: dict[str, Tensor], activation: str) -> FeedForward:
    """Return the FFN of one expert's tensors: ``w_in``, ``w_out``, and ``w_gate``, ``b_in`` and ``b_out`` if there."""
    w_in, w_out, bias = weights["w_in"], weights["w_out"], "b_in" in weights
    config = DenseFFN(w_in.shape[1], activation, gated="w_gate" in weights, bias=bias)
    ffn = config.build(w_in.shape[0], w_out.shape[1]).to(w_in.device, w_in.dtype)
    for name, linear in (("in", ffn.w_in), ("gate", ffn.w_gate), ("out", ffn.w_out)):
        if linear is not None:
            linear.weight.copy_(weights[f"w_{name}"].t())
            if bias:
                # Experts have no bias at the gate.
                linear.bias.copy_(weights.get(f"b_{name}", torch.zeros_like(linear.bias)))
    return ffn


@torch.no_grad()
def average_experts(layer: MoE, weights_E: Tensor | Sequence[float] | None = None) -> OneExpert:
    """Return the dense layer of one expert whose parameters are the mean of all experts' (AdaMix, arXiv 2205.12410).

    The parameters are copies. For ``Random(evaluation="merged")`` it is the layer's evaluation, at the cost of one
    expert; of experts that were not trained at random, a mean may be no good expert.

    Args:
        layer: a layer whose experts compute rows and can be merged.
        weights_E: (E,), weights of the experts' parameters, taken as they are; None: 1 / E each.

    Raises:
        ValueError: another module, an adopted block, experts that cannot be merged or have adapters, or that are split
            over ranks.

    Example::

        block.mlp = core.average_experts(block.mlp)
    """
    if not isinstance(layer, MoE):
        raise ValueError(f"a {type(layer).__name__} has no experts to average: core.MoE and its subclasses do")
    check_all_here(layer.experts, "a layer is averaged")
    check_merges(layer.experts)

    def mean(stacked: Tensor) -> Tensor:
        if weights_E is None:
            return stacked.mean(0, keepdim=True)
        wide = stacked if stacked.dtype == torch.float64 else stacked.float()
        weights = torch.as_tensor(weights_E, dtype=wide.dtype, device=wide.device)
        return torch.tensordot(weights, wide, 1).unsqueeze(0).to(stacked.dtype)

    return OneExpert.in_place_of(layer, restack(copy.deepcopy(layer.experts), 1, mean))


def can_join(experts: Experts) -> bool:
    """Return whether several of these experts are one: all their tensors have hidden units, or are linear in the
    output."""
    return bool(experts.linear_in) and _names(experts) <= {*experts.hidden_axes, *experts.linear_in}


def _names(experts: Experts) -> set[str]:
    return {name for name, _ in (*experts.named_parameters(), *experts.named_buffers())}


@torch.no_grad()
def joined(experts: Experts, expert_ids: Sequence[int], gates_K: Tensor) -> Experts:
    """Return one expert with output ``sum over k of gates_K[k] * f_{expert_ids[k]}(x)``, whose tensors are copies.

    FFNs side by side are one FFN that is K times as wide, with the gates in the output matrix of its hidden layer. LoRA
    experts are one of K times the rank. One expert at a gate of 1 may be of any kind.

    Args:
        experts: of one kind, or mixed.
        expert_ids: K ids.
        gates_K: (K,).

    Raises:
        ValueError: no one expert of this kind computes the sum, or the experts are split over ranks.
    """
    check_all_here(experts, "an expert is taken out")
    if isinstance(experts, MixedExperts):
        kinds = {next(i for i, end in enumerate(experts.bounds[1:]) if e < end) for e in expert_ids}
        if len(kinds) > 1:
            raise ValueError("experts of several kinds cannot be joined into one")
        (kind,) = kinds
        part = experts.parts[kind]
        assert isinstance(part, Experts)
        return joined(part, [e - experts.bounds[kind] for e in expert_ids], gates_K)
    axes, linear = experts.hidden_axes, experts.linear_in
    if not can_join(experts):
        if len(expert_ids) > 1 or float(gates_K[0]) != 1.0:
            what = f"{len(expert_ids)} of them" if len(expert_ids) > 1 else f"one at a gate of {float(gates_K[0]):.4g}"
            raise ValueError(f"{type(experts).__name__} cannot be joined into one expert: {what}")
        linear = frozenset()
    one = copy.deepcopy(experts)
    for name in _names(experts):
        path, _, last = name.rpartition(".")
        module, stacked = one.get_submodule(path), getattr(one.get_submodule(path), last)
        rows = stacked.detach()[list(expert_ids)]
        if name in linear:
            rows = rows * gates_K.to(rows).reshape(-1, *[1] * (rows.ndim - 1))
        side_by_side = torch.cat(rows.split(1), axes[name]) if name in axes else rows.sum(0, keepdim=True)
        setattr(module, last, like(side_by_side, stacked))
    one.num_experts = 1
    return one
