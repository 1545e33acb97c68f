"""What can run here: which Triton, which card. Imports no Triton."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from functools import cache

import torch

OLDEST_TRITON = (3, 6)
OLDEST_CARD = (8, 0)
MAX_EXPERTS = 1024
"""Each tile looks at all offsets to find its expert: 4 kB of them."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def triton_version() -> tuple[int, ...] | None:
    """Of the installed Triton, None without one."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in ("triton", "pytorch-triton", "triton-windows"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return ()  # a build of one's own, of unknown version


def interpreted() -> bool:
    """``TRITON_INTERPRET=1``: the kernels run on the CPU, slowly, as the tests do."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def upcast(dtype: torch.dtype) -> bool:
    """The interpreter multiplies bfloat16 as whole numbers and cuts off where it should round: kernels see to it."""
    return interpreted() and dtype == torch.bfloat16


def card(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; without an index that of the current one."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def missing(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of this device and dtype, in a few words; None where they can."""
    version = triton_version()
    if version is None:
        return "triton is not installed (pip install 'moesaic[kernels]')"
    if version and version < OLDEST_TRITON:
        found, oldest = (".".join(map(str, v)) for v in (version, OLDEST_TRITON))
        return f"triton {found} is older than {oldest} (pip install -U 'moesaic[kernels]')"
    if dtype not in DTYPES:
        return f"the kernels have no {dtype}"
    if device.type == "cpu":
        return None if interpreted() else "a CPU runs Triton in its interpreter alone (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"the kernels are for CUDA, not for {device.type}"
    if card(device) < OLDEST_CARD:
        found, oldest = ("sm_{}{}".format(*v) for v in (card(device), OLDEST_CARD))
        return f"a card of {found} is older than {oldest}"
    return None


# Versions and cards do not change under a compiled graph. This is all that ``torch.compiler.assume_constant_result``
# does, which imports the compiler: that would double the time of ``import core``.
missing._dynamo_marked_constant = True  # type: ignore[attr-defined]
