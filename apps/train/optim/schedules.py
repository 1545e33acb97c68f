"""Schedules of experts in a training, as callbacks: they are averaged, start as one, or are more and more a token.

A configuration names them in ``trainer.callbacks``. They follow the optimizer's steps, so that a resumed run continues
as one run, and leave a model without MoE layers as it is, with a warning: a comparison trains its baselines by them
too.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor

import core
from core.fields import Count, PositiveShare, ShareBelowOne, check_values
from core.routing.pairs.top_k import TopKConfig

_logger = logging.getLogger(__name__)


class ExpertAveraging(Callback):
    """Moves all experts of a layer towards each other after each step: ``w_e += share (mean of all w - w_e)``.

    The mean stays where it is (EWA, arXiv 2308.06093). With ``Random(evaluation="merged")`` as the router, evaluation
    takes the mean expert, and ``core.average_experts`` makes a dense model of it. Shared experts are left as they are.

    Args:
        share: how far an expert moves, in (0, 1]; at 1 all are the same.
        until: part of the training's steps after which experts go their own ways, in (0, 1].

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(self, share: float = 0.3, until: float = 1.0) -> None:
        check_values(PositiveShare, share=share, until=until)
        self.share, self.until = share, until

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        experts = _experts(pl_module, type(self).__name__)
        last = math.inf if self.until == 1 else _steps(trainer, self.until)
        self.start(experts, trainer.global_step)
        for optimizer in trainer.optimizers:
            # A hook, and not on_train_batch_end: a callback before this one may have saved the weights by then.
            _after_steps(optimizer, lambda: self.after_step(experts, trainer.global_step + 1, last))

    def start(self, experts: Mapping[str, core.Experts], step: int) -> None:
        """Start a training, or resume one after ``step`` steps."""

    def after_step(self, experts: Mapping[str, core.Experts], step: int, last: float) -> None:
        """Move the experts after step number ``step``, from 1; the schedule ends with number ``last``."""
        if step <= last:
            for layer in experts.values():
                average(layer, self.share)


class SharedStart(ExpertAveraging):
    """Trains all experts of a layer as one at first, then makes them differ (EvoMoE, arXiv 2112.14397).

    They start as copies of the first expert, and each step updates all by the mean of their updates. Then each sets a
    random part of its matrices' weights to zero, and all train on. With ``DenseToSparse`` as the router this is EvoMoE,
    which trains one expert, while this trains equal ones.

    Args:
        until: part of the training's steps in which the experts are one, in (0, 1]; at 1 they never differ.
        mask: probability that a weight is set to zero, in [0, 1).
        seed: seed of the masks, which are the same on every process.

    Raises:
        ValueError: a value out of its range.
    """

    def __init__(self, until: float = 0.1, mask: float = 0.3, seed: int = 0) -> None:
        super().__init__(share=1.0, until=until)
        check_values(ShareBelowOne, mask=mask)
        self.mask, self.seed = mask, seed

    @torch.no_grad()
    def start(self, experts: Mapping[str, core.Experts], step: int) -> None:
        for layer in experts.values() if step == 0 else ():
            for stacked in layer.parameters():
                stacked.copy_(stacked[:1].expand_as(stacked).clone())

    @torch.no_grad()
    def after_step(self, experts: Mapping[str, core.Experts], step: int, last: float) -> None:
        super().after_step(experts, step, last)
        if step != last:
            return
        generator = torch.Generator().manual_seed(self.seed)
        for layer in experts.values():
            for stacked in layer.parameters():
                if stacked.ndim >= 3:  # biases and norms stay
                    drawn = torch.rand(stacked.shape, generator=generator)
                    stacked.masked_fill_((drawn < self.mask).to(stacked.device), 0.0)


class GrowingTopK(Callback):
    """Lets tokens take ever more experts: from ``start`` to the router's ``top_k``, in equal times.

    SMoE-Dropout (arXiv 2303.01610) grows to all experts, and has gates that are randomly initialized and never trained.
    Validation and test take ``top_k`` experts at any time, as a checkpoint of the model does.

    Args:
        start: experts per token at first.
        until: part of the training's steps after which tokens take ``top_k``, in (0, 1]. At 1 the last part of the
            training, as long as the others, has ``top_k``.
        freeze: the routers' parameters keep the values with which the training starts.

    Raises:
        ValueError: a value out of its range; at the start of a training, no router that takes the best ``top_k`` by
            logits, one whose ``top_k`` is below ``start`` or has an option that needs it, or a training without an end.
    """

    def __init__(self, start: int = 1, until: float = 1.0, freeze: bool = True) -> None:
        check_values(Count, start=start)
        check_values(PositiveShare, until=until)
        self.first, self.until, self.freeze = start, until, freeze
        self._routers: list[tuple[Any, TopKConfig]] = []
        self._last = math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        routers = [router for layer in core.moe_layers(pl_module).values() for router in layer.routers().values()]
        configs = [getattr(router, "config", None) for router in routers]
        self._routers = [(r, c) for r, c in zip(routers, configs, strict=True) if isinstance(c, TopKConfig)]
        if not routers:
            _logger.warning("GrowingTopK: the model has no router, and trains as without it")
        elif not self._routers:
            raise ValueError(f"GrowingTopK: no router takes the top_k of its logits, not router={configs[0]}")
        for router, config in self._routers:
            if config.top_k < self.first:
                raise ValueError(f"GrowingTopK: start={self.first} exceeds top_k={config.top_k}")
            _with_top_k(config, self.first)  # an option that needs the whole top_k is rejected here
            if self.freeze:
                router.requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = _steps(trainer, self.until)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for router, config in self._routers:
            top_k = self.top_k(trainer.global_step, config.top_k)
            if router.config.top_k != top_k:
                router.config = _with_top_k(config, top_k)

    def top_k(self, step: int, final: int) -> int:
        """Return the number of experts per token in a step, from 0, of a router whose ``top_k`` is ``final``."""
        return min(final, self.first + int((final - self.first + 1) * step / self._last))

    def on_validation_start(self, *_: Any) -> None:
        for router, config in self._routers:
            router.config = config

    on_train_end = on_exception = on_validation_start


@torch.no_grad()
def average(experts: core.Experts, share: float) -> None:
    """Move each expert's parameters ``share`` of the way to the mean of all experts'."""
    for stacked in experts.parameters():
        stacked.lerp_(stacked.mean(0, keepdim=True), share)


def _after_steps(optimizer: torch.optim.Optimizer, call: Callable[[], None]) -> None:
    """Call after each step of an optimizer, once: its step may call its base class's step, whose hooks run too."""
    running: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: running.append(True))

    def after(*_: Any) -> None:
        running.pop()
        if not running:
            call()

    optimizer.register_step_post_hook(after)


def _experts(module: LightningModule, name: str) -> dict[str, core.Experts]:
    """Return the routed experts of each layer of tokens, each set once.

    Raises:
        ValueError: experts of several kinds, or that are split over processes or frozen.
    """
    frozen = getattr(getattr(module, "grow", None), "freeze", False)
    if frozen:
        raise ValueError(f"{name} moves all experts, and model.grow.freeze=True keeps some: set one of them off")
    sets: dict[int, tuple[str, core.Experts]] = {}
    for place, layer in core.moe_layers(module).items():
        if not isinstance(layer, core.MoE) or not isinstance(layer.experts, core.Experts):
            continue
        experts = layer.experts
        stacks = list(experts.parameters())
        if any(len(stacked) != experts.num_experts or isinstance(stacked, DTensor) for stacked in stacks):
            raise ValueError(f"{name}: the experts of {place} are of several kinds, or split over processes")
        sets.setdefault(id(experts), (place, experts))
    if not sets:
        _logger.warning("%s: the model has no experts, and trains as without it", name)
    return dict(sets.values())


def _steps(trainer: Trainer, part: float) -> float:
    """Return how many optimizer steps a part of the training has, at least 1.

    Raises:
        ValueError: the training has no end.
    """
    total = float(trainer.estimated_stepping_batches)
    if math.isinf(total):
        raise ValueError(f"until={part} is a part of a training, and this one has no end: set trainer.max_epochs")
    return max(1.0, round(part * total))


def _with_top_k(config: TopKConfig, top_k: int) -> TopKConfig:
    changed: Any = config  # the base of the configs is not a dataclass itself
    return dataclasses.replace(changed, top_k=top_k)  # type: ignore[no-any-return]
