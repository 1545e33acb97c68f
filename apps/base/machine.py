"""The machine that figures were measured on, in words."""

from __future__ import annotations

import platform
import time

import torch

from core.kernels.cpu.products import cpu_field


def device_name() -> str:
    """Return the name of the GPU, or of the processor where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu_field("model name") or platform.processor() or platform.machine()


def machine_line() -> str:
    """Return device, threads of torch, its version and the date, for the head of a benchmark's table."""
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} threads"
    return f"{device_name()}{threads}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
