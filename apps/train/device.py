"""The device of a trainer and its precision, if a configuration leaves them open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer

import core
from apps.base.machine import device_name
from apps.train.threads import Threads


def device_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a trainer that choose its device and its precision.

    "auto" is a CUDA GPU if there is one, else the processor. (Lightning would take Apple's GPU as well, which has no
    float64.) A GPU with bfloat16 trains in bf16-mixed if no precision is named; without one Lightning takes 32-true.

    Args:
        given: options of the trainer.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    kind = best if given.get("accelerator", "auto") == "auto" else given["accelerator"]
    # A plugin may be the precision, and Lightning rejects both.
    is_open = given.get("precision") is None and not given.get("plugins")
    on_cuda = best == "cuda" and kind in ("cuda", "gpu")
    if is_open and on_cuda and torch.cuda.is_bf16_supported(including_emulation=False):
        return {"accelerator": kind, "precision": "bf16-mixed"}
    return {"accelerator": kind}


def set_matmul_precision(options: Mapping[str, Any], precision: str) -> None:
    """Let a CUDA GPU multiply float32 numbers as torch's ``set_float32_matmul_precision`` says; elsewhere do nothing.

    Args:
        options: from ``device_options``.
        precision: "highest", "high" (TF32: tensor cores read 10 bits of a mantissa) or "medium".
    """
    if options.get("accelerator") in ("cuda", "gpu") and torch.cuda.is_available():
        torch.set_float32_matmul_precision(precision)


def device_line(trainer: Trainer, module: LightningModule, threads: Threads | None = None) -> str:
    """Return in one line the setup of a run: device, precision, threads, and the kernels that compute its experts."""
    device = trainer.strategy.root_device
    with trainer.precision_plugin.forward_context():
        mixed = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if mixed else torch.get_default_dtype()
    given = {layer.backend for layer in core.moe_layers(module).values()}
    resolved = {name: core.resolve_backend(name, device, dtype) for name in given}
    if resolved.get("auto") == "triton":
        resolved["auto"] = "the fastest of triton, grouped and eager"
    backends = ", ".join(sorted(set(resolved.values())))
    number = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    tf32 = f", float32 products {torch.get_float32_matmul_precision()}" if device.type == "cuda" else ""
    return (
        f"device {number}{device.type} ({device_name(device)}): precision {trainer.precision}{tf32}, "
        f"{threads or Threads(trainer, measures=False)}, experts by {backends or 'none'}"
    )
