"""Numbers that are not finite end a training before a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """The loss or a weight is NaN or infinite. The message names the step, the terms and what to try."""


def check_loss(loss: Tensor, terms: Mapping[str, Tensor], step: int, lr: float) -> None:
    """Refuse a training loss that is not finite.

    It waits for the device each step: a few percent on a GPU, for an error at the step that caused it.

    Args:
        loss: (), of optimizer step ``step``.
        terms: what it was made of, each (), for the message.
        step: counted from 1.
        lr: the peak learning rate.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    if bool(torch.isfinite(loss)):
        return
    values = ", ".join(f"{name}={float(value.detach()):.4g}" for name, value in terms.items())
    raise NonFiniteError(
        f"the training loss is {float(loss.detach())} at step {step} ({values}); no checkpoint holds it. Try a lower "
        f"model.optimizer.lr (now {lr:g}), a longer warmup, trainer.gradient_clip_val=1.0, or trainer.precision=32-true"
    )


def check_weights(module: nn.Module, step: int) -> None:
    """Refuse weights that are not finite after optimizer step ``step``.

    Raises:
        NonFiniteError: a parameter holds a NaN or an infinity.
    """
    broken = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    if broken:
        raise NonFiniteError(
            f"{broken[0]} is not finite after step {step} ({len(broken)} such parameters); the checkpoint was not "
            "written. Try a lower model.optimizer.lr or trainer.gradient_clip_val=1.0"
        )
