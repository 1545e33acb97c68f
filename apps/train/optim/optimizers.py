"""The optimizer of every app: AdamW, Muon combined with AdamW, or Adam of the rows with a gradient, over groups of
routers, experts and the rest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import core
from apps.train.optim.muon import MuonAdamW
from apps.train.optim.row_gradients import row_sparse_module
from core.fields import Checked, NotNegative, Positive, Share, ShareBelowOne


@core.register_config
@dataclass(frozen=True)
class OptimizerConfig(Checked):
    """One learning rate for three kinds of parameters, a linear warm-up and a decay, both by step.

    Attributes:
        name: "adamw"; or "muon" for the matrices inside the network, with AdamW for embeddings, the read-out, routers,
            biases and norms. Muon's steps have the size of AdamW's, so that ``lr`` means the same. Or "row_adam"
            (``core.RowAdam``), which only updates the rows of a table that have a gradient, for ``PEER`` with
            ``row_sparse``; all other parameters it moves as AdamW.
        lr: peak learning rate.
        weight_decay: decoupled weight decay; biases, norms and other 1-d parameters have none.
        betas: decay rates of Adam's two moments.
        eps: added to the root of the second moment.
        muon_momentum: decay of Muon's running mean of the gradients.
        fused: AdamW's step in one kernel; None: on a CUDA GPU, but not with gradient clipping under 16-mixed, which
            Lightning does not allow.
        router_lr_scale: the routers' learning rate is ``lr`` times this.
        router_weight_decay_scale: the routers' weight decay is ``weight_decay`` times this.
        expert_lr_scale: the experts' learning rate is ``lr`` times this.
        expert_weight_decay_scale: the experts' weight decay is ``weight_decay`` times this.
        warmup_steps: steps of linear warm-up; a fraction of all steps where it is below 1.
        schedule: decay after the warm-up: "cosine" to ``min_lr_ratio``; "inverse_sqrt", ``sqrt(warmup / n)`` at the
            n-th step (arXiv 1706.03762, section 5.3), which does not depend on the length of the run where
            ``warmup_steps`` is 1 or more; "linear" to ``min_lr_ratio``, whose last steps are smaller; or "constant".
        min_lr_ratio: least learning rate, as a part of the peak.
        lr_scales: factors on the learning rate of parts of the model, by prefix of their parameters' names:
            ``{"text_tower": 0.05}`` lets a pretrained tower train slowly next to a randomly initialized one. Of several
            that fit, the longest counts; it multiplies the factors of routers and experts.
        adamw_parts: parts that AdamW also updates under Muon, by prefix of their parameters' names: parts that start
            from pretrained weights, which Adam has mostly trained. "experts": those of all MoE layers, whose many
            matrices cost Muon a twentieth of a small network's step.

    Raises:
        ValueError: a value outside its range.
    """

    prefix = "optimizer."

    name: Literal["adamw", "muon", "row_adam"] = "adamw"
    lr: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.999)
    eps: NotNegative = 1e-8
    muon_momentum: ShareBelowOne = 0.95
    fused: bool | None = None
    router_lr_scale: NotNegative = 1.0
    router_weight_decay_scale: NotNegative = 1.0
    expert_lr_scale: NotNegative = 1.0
    expert_weight_decay_scale: NotNegative = 1.0
    warmup_steps: NotNegative = 0.05
    schedule: Literal["cosine", "inverse_sqrt", "linear", "constant"] = "cosine"
    min_lr_ratio: Share = 0.0
    lr_scales: dict[str, NotNegative] = field(default_factory=dict)
    adamw_parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name != "adamw" and self.fused:
            raise ValueError(f"optimizer.fused=True is a kernel of AdamW's; optimizer.name={self.name!r} has none")
        if self.warmup_steps >= 1 and self.warmup_steps != int(self.warmup_steps):
            raise ValueError(f"optimizer.warmup_steps={self.warmup_steps} is neither an integer nor a fraction below 1")

    def num_warmup_steps(self, total_steps: float) -> int:
        """Return the steps of warm-up in a run of ``total_steps`` (``inf`` where it has no end)."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return round(self.warmup_steps * total_steps) if math.isfinite(total_steps) else 0

    def factor(self, step: int, total_steps: float) -> float:
        """Return the learning rate of optimizer step ``step`` (from 0) as a part of the peak."""
        warmup = self.num_warmup_steps(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "inverse_sqrt":
            return max(math.sqrt(max(warmup, 1) / (step + 1)), self.min_lr_ratio)
        if self.schedule == "constant" or not math.isfinite(total_steps):
            return 1.0
        progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
        left = 1 - progress if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * left


def build_optimizer(
    model: nn.Module,
    config: OptimizerConfig,
    builds: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] | None = None,
    fuses: bool = True,
) -> torch.optim.Optimizer:
    """Return the optimizer of ``parameter_groups(model, config)``.

    Args:
        model: the network.
        config: rates and options.
        builds: makes another optimizer of the groups; None: the one that ``config`` names.
        fuses: whether ``config.fused=None`` may mean True.

    Raises:
        ValueError: an optimizer other than ``RowAdam`` would get sparse gradients of rows.
    """
    sparse = row_sparse_module(model)
    if sparse is not None and config.name != "row_adam":
        raise ValueError(
            f"optimizer.name={config.name!r} takes no sparse gradients, which {sparse} makes: set optimizer.name to "
            "'row_adam', or the experts' row_sparse to false"
        )
    groups = parameter_groups(model, config)
    if builds is not None:
        return builds(groups)
    options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": 0.0}
    tensors = [p for group in groups for p in group["params"]]
    if config.fused or (config.fused is None and fuses and config.name == "adamw" and _on_cuda(tensors)):
        options["fused"] = True
    if config.name == "muon":
        return MuonAdamW(groups, momentum=config.muon_momentum, **options)
    if config.name == "row_adam":
        return core.RowAdam(groups, **options)
    return torch.optim.AdamW(groups, **options)


def _on_cuda(tensors: Sequence[torch.Tensor]) -> bool:
    return all(t.is_cuda for t in tensors)


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters of ``model`` in groups: routers, experts, the rest, each with and without decay.

    1-d parameters, biases and norms (also the experts', which are (E, F)) have no decay, nor have parameters that a
    submodule names in ``no_weight_decay()`` as timm's models do. Muon's matrices have groups of their own: the weights
    of experts, shared ones too, and of ``nn.Linear`` outside the modules that ``model.readout`` names; and those of
    ``nn.Conv2d``, flattened to (channels out, rest), but not of depthwise ones or of patches. A group has the keys
    ``name``, ``params``, ``lr``, ``weight_decay`` and, under Muon, ``muon`` and ``flattened``; empty ones are left out.

    Raises:
        ValueError: no trainable parameter has a name with a prefix of ``config.lr_scales`` or ``adamw_parts``.
    """
    kind: dict[int, str] = {}
    for layer in core.moe_layers(model).values():
        kind |= dict.fromkeys(map(id, layer.router.parameters()), "router")
        for experts in (layer.experts, getattr(layer, "shared_experts", None)):
            kind |= dict.fromkeys(map(id, experts.parameters() if experts is not None else ()), "experts")
    exempt = set(_no_weight_decay(model))
    inside = [module for name, module in model.named_modules() if not _reads(model, name)]
    linear = {id(m.weight) for m in inside if isinstance(m, nn.Linear)}
    flat = {id(m.weight) for m in inside if isinstance(m, nn.Conv2d) and _mixes(m)}
    scales = {
        "router": (config.router_lr_scale, config.router_weight_decay_scale),
        "experts": (config.expert_lr_scale, config.expert_weight_decay_scale),
        "rest": (1.0, 1.0),
    }
    groups: dict[str, dict[str, Any]] = {}
    parts = sorted(config.lr_scales, key=len, reverse=True)
    unused = {*(("lr_scales", part) for part in parts), *(("adamw_parts", part) for part in config.adamw_parts)}
    unused.discard(("adamw_parts", "experts"))  # a dense twin of the model has none
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or hasattr(parameter, "_in_backward_optimizers"):
            continue  # the backward has stepped the rows of a fused embedding already
        which = kind.get(id(parameter), "rest")
        leaf = name.rpartition(".")[2]
        decays = parameter.ndim > 1 and not (name in exempt or "bias" in leaf or leaf.startswith(("b_", "norm_")))
        matrix = decays and (which == "experts" or (which == "rest" and id(parameter) in linear | flat))
        key = which if decays else f"{which}_no_decay"
        lr_scale, decay_scale = scales[which]
        by_adamw = _fitting(name, config.adamw_parts)
        unused -= {("adamw_parts", part) for part in by_adamw}
        part = next(iter(_fitting(name, parts)), None)
        if part is not None:
            unused.discard(("lr_scales", part))
            key, lr_scale = f"{part}_{key}", lr_scale * config.lr_scales[part]
        group: dict[str, Any] = {
            "name": key,
            "params": [],
            "lr": config.lr * lr_scale,
            "weight_decay": config.weight_decay * decay_scale if decays else 0.0,
        }
        if config.name == "muon":
            matrix = matrix and not by_adamw and not (which == "experts" and "experts" in config.adamw_parts)
            flattened = matrix and id(parameter) in flat
            kinds = "_convolutions" if flattened else "_matrices" if matrix else ""
            group |= {"name": f"{key}{kinds}", "muon": matrix, "flattened": flattened}
        groups.setdefault(group["name"], group)["params"].append(parameter)
    if unused:
        own = sorted({name.split(".")[0] for name, _ in model.named_parameters()})
        option, part = min(unused)
        raise ValueError(f"optimizer.{option} has {part!r}, which is no part of the model: its parts are {own}")
    return list(groups.values())


def restore_rates(module: LightningModule, config: OptimizerConfig) -> None:
    """Set a run's own rates for the next step, since resuming loads the old run's with the optimizer.

    The rates of a scheduler of torch's follow from its state, and stay.
    """
    optimizer, scheduler = module.optimizers(use_pl_optimizer=False), module.lr_schedulers()
    if not isinstance(optimizer, torch.optim.Optimizer) or not isinstance(scheduler, LambdaLR):
        return
    wanted = {g["name"]: g for g in parameter_groups(module, config)}
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        own = wanted.get(group.get("name"))
        if own is None:
            continue
        own = {**optimizer.defaults, "lr": own["lr"], "weight_decay": own["weight_decay"]}
        group.update({name: own[name] for name in optimizer.defaults}, initial_lr=own["lr"])
        group["lr"] = own["lr"] * factor(scheduler.last_epoch)
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def _fitting(name: str, parts: Sequence[str]) -> list[str]:
    """Return the parts that contain the parameter ``name``, in their order."""
    return [part for part in parts if f"{name}.".startswith(f"{part}.")]


def _reads(model: nn.Module, name: str) -> bool:
    """Return whether the module ``name`` is the read-out, or in it."""
    return any(name == own or name.startswith(f"{own}.") for own in getattr(model, "readout", ()))


def _mixes(conv: nn.Conv2d) -> bool:
    """Return whether a convolution mixes channels of positions that others see too: patches are embedded, not mixed."""
    is_patch = conv.stride == conv.kernel_size != (1, 1)
    return conv.groups == 1 and not is_patch


def _no_weight_decay(model: nn.Module) -> Iterator[str]:
    for prefix, module in model.named_modules():
        names = getattr(module, "no_weight_decay", None)
        if callable(names):
            yield from (f"{prefix}.{n}" if prefix else n for n in names())
