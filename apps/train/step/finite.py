"""A training ends before a checkpoint holds numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """The loss or a weight is NaN or infinite. The message names the step, the terms and what to try."""


def check_loss(loss: Tensor, terms: Mapping[str, Tensor], step: int, lr: float) -> None:
    """Raise a NonFiniteError if ``loss``, (), of optimizer step ``step`` is NaN or infinite.

    The message has the ``terms`` of the loss, each (), and the peak learning rate. The check waits for the device. On a
    CPU it is made each step; on a GPU at steps that are logged, of the sum of the losses since the last one.
    """
    if bool(torch.isfinite(loss)):
        return
    values = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in terms.items())
    raise NonFiniteError(
        f"the training loss is {float(loss.detach())} at step {step} ({values}); no checkpoint holds it. Try a lower "
        f"model.optimizer.lr (now {lr:g}), a longer warmup, trainer.gradient_clip_val=1.0, or trainer.precision=32-true"
    )


def check_weights(module: nn.Module, step: int) -> None:
    """Raise a NonFiniteError if a parameter is not finite after optimizer step ``step``."""
    broken = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise NonFiniteError(
            f"{broken[0]} is not finite after step {step} ({len(broken)} such parameters); the checkpoint was not "
            "written. Try a lower model.optimizer.lr or trainer.gradient_clip_val=1.0"
        )
