"""Offloaded experts of a trained model, as the words ``0.5``, ``64MB`` and ``64MB:FILE`` ask for them.

A command line is checked before torch is imported, which this file therefore only does in its functions.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from core import OffloadedExperts

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 2**10, "MI": 2**20, "GI": 2**30}


@dataclass(frozen=True)
class Budget:
    """How much of a model's experts is on the device, and where they are kept.

    Attributes:
        size: bytes, or a share of the experts' bytes if ``is_share``.
        path: file of safetensors that keeps the experts; None: memory.
    """

    size: float
    is_share: bool
    path: Path | None = None


def read_budget(text: str) -> Budget:
    """Return the budget of a text such as "0.5", "64MB" or "1.5GiB:experts.safetensors".

    Raises:
        ValueError: it is none, or a share above 1.
    """
    amount, _, path = text.partition(":")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([KMG]I?)?(B))?", amount.upper())
    if match is None or (not match[3] and float(match[1]) > 1 and "." in match[1]):
        raise ValueError(f"offload={text} is no share of the experts up to 1, such as 0.5, and no size, such as 64MB")
    number = float(match[1])
    is_share = not match[3] and number <= 1
    if number == 0:
        raise ValueError(f"offload={text} leaves no expert on the device")
    return Budget(number if is_share else number * _UNITS[match[2] or ""], is_share, Path(path) if path else None)


def offload(model: nn.Module, how: str, device: str | torch.device | None = None) -> OffloadedExperts:
    """Offload the experts of a trained model in place.

    Args:
        model: any module with experts.
        how: "0.5": so much of the experts is on the device; "64MB": as many as that holds; either with ":FILE", a file
            that keeps them instead of memory.
        device: device of the slots; None: the device of the experts.

    Raises:
        ValueError: another text, or a model that ``core.offload_experts`` rejects.
    """
    import core
    from core.offload import offloadable_bytes

    budget = read_budget(how)
    size = budget.size * offloadable_bytes(model) if budget.is_share else budget.size
    return core.offload_experts(model, int(size), budget.path, device=device)


def room_for_experts(how: str | None) -> contextlib.AbstractContextManager[None]:
    """Return the context in which a model is made that is to be offloaded: without memory for experts that go to a
    file, so that a checkpoint's values go there and nowhere else. They keep the checkpoint's memory until then.

    Args:
        how: as ``offload`` takes it; None: the experts stay on the device.
    """
    from core.offload import unloaded_experts

    to_file = how is not None and read_budget(how).path is not None
    return unloaded_experts() if to_file else contextlib.nullcontext()


def described(offloaded: OffloadedExperts) -> str:
    """Return the counters, as one line."""
    counted = offloaded.statistics
    rate = f"hit rate {counted.hit_rate:.3f}" if counted.needed else "no expert needed"
    return (
        f"{offloaded.num_slots} of {offloaded.num_experts} experts in slots of {offloaded.slot_bytes:,} bytes: {rate}, "
        f"{counted.stall_seconds:.2f} s of waiting, {counted.bytes_moved:,} bytes moved"
    )


def record(how: str, offloaded: OffloadedExperts) -> dict[str, Any]:
    """Return plain values for the record of a test."""
    counted = offloaded.statistics
    return {
        "budget": how,
        "slots": offloaded.num_slots,
        "experts": offloaded.num_experts,
        "slot_bytes": offloaded.slot_bytes,
        "hit_rate": counted.hit_rate if counted.needed else None,
        "stall_seconds": counted.stall_seconds,
        "bytes_moved": counted.bytes_moved,
    }
