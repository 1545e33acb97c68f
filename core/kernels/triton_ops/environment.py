"""The Triton version and the card that are here. This file imports no Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache

import torch

from ...torch_internals import mark_constant

OLDEST_TRITON = (3, 6)
_INSTALL = f"pip install -U 'triton>={'.'.join(map(str, OLDEST_TRITON))}'"
OLDEST_CARD = (8, 0)
MAX_EXPERTS = 1024
"""Each tile looks at all offsets to find its expert: 4 kB of them."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def triton_version() -> tuple[int, ...] | None:
    """Return the major and minor version of the installed Triton: None without one, () if it is unknown."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return ()


def interpreted() -> bool:
    """Return whether ``TRITON_INTERPRET=1`` runs the kernels on the CPU, slowly, as in the tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def upcast(dtype: torch.dtype) -> bool:
    """Return whether kernels have to compute in float32, and round by themselves.

    The interpreter multiplies bfloat16 as integers and cuts off where it should round.
    """
    return interpreted() and dtype == torch.bfloat16


def card(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, of the current one if ``device`` has no index."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in a few words why the kernels cannot run on tensors of this device and dtype, or None."""
    version = triton_version()
    if version is None:
        return f"triton is not installed ({_INSTALL})"
    if version and version < OLDEST_TRITON:
        installed, oldest = (".".join(map(str, v)) for v in (version, OLDEST_TRITON))
        return f"triton {installed} is older than {oldest} ({_INSTALL})"
    if dtype not in DTYPES:
        return f"the kernels have no {dtype}"
    if device.type == "cpu":
        return None if interpreted() else "a CPU runs Triton in its interpreter alone (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for CUDA, not for {device.type}"
    if card(device) < OLDEST_CARD:
        this, oldest = ("sm_{}{}".format(*v) for v in (card(device), OLDEST_CARD))
        return f"a card of {this} is older than {oldest}"
    return None


mark_constant(missing)  # versions and cards do not change under a compiled graph
