"""Undocumented parts of torch that the apps use, besides ``core.torch_internals``: nothing else in apps uses any.

Each docstring says what torch lacks in public. All hold for torch 2.12 and 2.13;
tests/apps/train/test_torch_internals.py fails if a new version changes one.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


def assert_on_device(condition: Tensor, message: str) -> None:
    """Have a GPU stop where a condition is false, without waiting for it. No public function does."""
    torch._assert_async(condition, message)


def has_amx() -> bool:
    """Return whether the CPU multiplies bfloat16 in tiles (AMX). torch says in public only which kernels it has."""
    return torch.cpu._is_amx_tile_supported()


def checkpoint_activations(module: nn.Module) -> None:
    """Make a module compute its activations again in the backward. The public function is for a call, not a module."""
    from torch.distributed._composable import checkpoint

    checkpoint(module)


def limit_waiting(timeout: timedelta | None) -> None:
    """Give every group of this process a timeout. torch makes a mesh's groups with its own, of half an hour, and has no
    public function to change it."""
    if timeout is not None:
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def find_cpp_compiler() -> None:
    """Raise an error if AOTInductor finds no C++ compiler. In public only compiling shows it."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    get_cpp_compiler()
