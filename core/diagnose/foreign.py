"""Routers of other libraries: found next to their experts, and read by their logits. No library is imported."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import unwrapped_modules
from ..convert.read.calls import hooked
from ..layers import MoELayer
from ..torch_internals import in_backward
from .passes import Facts, Pass

LOGITS = "router_logits"
"""The name under which models of transformers say what their routers put out."""


@dataclass(frozen=True)
class ForeignRouter:
    """A router of another library.

    Attributes:
        name: dotted name of the block that contains it.
        module: the module that outputs the logits: a gate, or the whole block.
        index: place of the logits in its output; None: the output is the logits.
        experts: the experts next to it; None: not known.
        top_k: experts per token, if the output does not name them.
        has_loss: whether the model's configuration asks for a balance loss.
    """

    name: str
    module: nn.Module
    index: int | None
    experts: nn.Module | None
    top_k: int
    has_loss: bool

    @property
    def num_experts(self) -> int | None:
        """E, if the experts are a list or stacked in one tensor."""
        if self.experts is None:
            return None
        if isinstance(self.experts, nn.ModuleList):
            return len(self.experts)
        first = next((p for p in self.experts.parameters(recurse=False) if p.ndim > 2), None)
        return None if first is None else first.shape[0]


def foreign_routers(model: nn.Module) -> dict[str, ForeignRouter]:
    """Return the routers of other libraries by the names of their blocks, in the order of the modules.

    A router is a module whose output a model of transformers records as its ``router_logits``, or a module ``gate`` or
    ``router`` whose sibling is called ``experts``. Modules inside a layer of ours are left out.
    """
    modules = dict(unwrapped_modules(model))
    ours = [name for name, m in modules.items() if isinstance(m, MoELayer)]
    routers: dict[str, ForeignRouter] = {}

    def put(name: str, module: nn.Module, index: int | None) -> None:
        if any(own == "" or name == own or name.startswith(f"{own}.") for own in ours):
            return
        block_name = name if hasattr(module, "experts") else name.rpartition(".")[0]
        block = modules.get(block_name, module)
        experts = getattr(block, "experts", None)
        config = _config(modules, name)
        top_k = next(
            (int(k) for m in (module, block) for a in ("top_k", "num_experts_per_tok") if (k := getattr(m, a, None))),
            int(getattr(config, "num_experts_per_tok", 0) or 1),
        )
        weight = getattr(config, "router_aux_loss_coef", 0.0)
        routers[block_name] = ForeignRouter(
            block_name, module, index, experts if isinstance(experts, nn.Module) else None, top_k, bool(weight)
        )

    for owner_name, owner in modules.items():
        for recorder in _recorders(owner):
            kind, index = getattr(recorder, "target_class", recorder), getattr(recorder, "index", None)
            part = getattr(recorder, "layer_name", None)
            for name, module in modules.items():
                below = not owner_name or name.startswith(f"{owner_name}.")
                if below and isinstance(kind, type) and isinstance(module, kind) and (not part or part in name):
                    put(name, module, index)
    if not routers:
        for name, block in modules.items():
            gate = next((g for g in ("gate", "router") if isinstance(getattr(block, g, None), nn.Module)), None)
            if gate is not None and isinstance(getattr(block, "experts", None), nn.Module):
                put(f"{name}.{gate}".lstrip("."), getattr(block, gate), None)
    return routers


def _recorders(module: nn.Module) -> list[Any]:
    recorded = getattr(module, "_can_record_outputs", None)
    given = recorded.get(LOGITS) if isinstance(recorded, Mapping) else None
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]


def _config(modules: Mapping[str, nn.Module], name: str) -> Any:
    """Return the configuration of the nearest module above that has one."""
    while True:
        config = getattr(modules.get(name), "config", None)
        if config is not None or not name:
            return config
        name = name.rpartition(".")[0]


@contextlib.contextmanager
def foreign_passes(
    routers: Mapping[str, ForeignRouter], batch: Any, real_BS: Tensor | None = None
) -> Iterator[list[Pass]]:
    """Collect a pass of each router for each call inside the ``with`` block.

    Args:
        routers: from ``foreign_routers``.
        batch: the model's input: a tensor (B, S) in it tells the number of sequences.
        real_BS: bool (B, S), False for padding; None: not known.
    """
    passes: list[Pass] = []
    shape = _shape(batch) if real_BS is None else tuple(real_BS.shape)

    def hook_of(router: ForeignRouter) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not in_backward():  # else an activation checkpoint repeats the forward
                passes.append(_pass_of(router, output, shape, real_BS))

        return hook

    hooks = [router.module.register_forward_hook(hook_of(router)) for router in routers.values()]
    with hooked(hooks):
        yield passes


def _pass_of(router: ForeignRouter, output: Any, shape: tuple[int, ...] | None, real_BS: Tensor | None) -> Pass:
    """Return the pass that a router's output is.

    Raises:
        ValueError: the output has no logits.
    """
    parts = output if isinstance(output, (tuple, list)) else (output,)
    logits = parts[router.index or 0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim < 2:
        raise ValueError(f"router {router.name!r} puts out no logits: a {type(router.module).__name__} is not known")
    logits_TE = logits.detach().float().flatten(0, -2)
    (T, M), E = logits_TE.shape, router.num_experts
    E = M if E is None or M < E else E
    chosen = next(
        (p for p in parts if isinstance(p, Tensor) and not p.is_floating_point() and p.ndim >= 2 and p.numel() % T == 0
         and p.numel() // T < M + 1 and p.dtype != torch.bool), None
    )  # fmt: skip
    expert_TK = logits_TE.topk(min(router.top_k, M), dim=-1).indices if chosen is None else chosen.reshape(T, -1)
    valid_T = None
    if real_BS is not None and real_BS.numel() == T:
        valid_T = real_BS.reshape(T).to(logits_TE.device)
        expert_TK = expert_TK.masked_fill(~valid_T[:, None], E)
    expert_N = expert_TK.flatten().long().clamp_max(E)
    counts_E = torch.bincount(expert_N, minlength=E + 1)[:E]
    sequences = shape[0] if shape is not None and len(shape) > 1 and shape[0] * shape[1] == T else None
    return Pass(
        layer=router.name,
        num_experts=E,
        num_tokens=T,
        chosen_E=counts_E,
        computed_E=counts_E,
        facts=Facts(router.name, is_balanced=router.has_loss),
        token_N=torch.arange(T, device=expert_N.device).repeat_interleave(expert_TK.shape[1]),
        expert_N=expert_N,
        logits_TE=logits_TE,
        valid_T=valid_T,
        num_sequences=sequences,
    )


def _shape(batch: Any) -> tuple[int, ...] | None:
    """Return the shape of the first tensor of at least two axes in a batch."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else (batch,)
    return next((tuple(v.shape) for v in values if isinstance(v, Tensor) and v.ndim >= 2), None)


def every_expert(experts: nn.Module, num_experts: int, x_TD: Tensor) -> Tensor | None:
    """Return the output of each expert for every token, (T, E, D_out); None if these experts cannot be asked.

    They can where they are a list of modules, or take the chosen experts and their weights as transformers' do.
    """
    if isinstance(experts, nn.ModuleList):
        return torch.stack([expert(x_TD) for expert in experts], 1)
    names = set(inspect.signature(experts.forward).parameters)
    if not {"top_k_index", "top_k_weights"} <= names:
        return None
    outputs = []
    for e in range(num_experts):
        index_T1 = torch.full((len(x_TD), 1), e, dtype=torch.int64, device=x_TD.device)
        outputs.append(experts(x_TD, top_k_index=index_T1, top_k_weights=x_TD.new_ones(len(x_TD), 1)))
    return torch.stack(outputs, 1)


def expert_tensors(experts: nn.Module, num_experts: int, e: int) -> list[Tensor]:
    """Return the parameters of one expert, as views: of a list its modules', else slices of stacked ones."""
    if isinstance(experts, nn.ModuleList):
        return [p.data for p in experts[e].parameters()]
    return [p.data[e] for p in experts.parameters() if p.ndim and p.shape[0] == num_experts]
