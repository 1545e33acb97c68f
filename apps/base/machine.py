"""What figures were taken on, in words."""

from __future__ import annotations

import platform
import time

import torch

from core.kernels.cpu.products import cpu_field


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its kind."""
    return cpu_field("model name") or platform.processor() or platform.machine()


def machine_line() -> str:
    """Device, threads of torch, its version and the date, for the head of a benchmark's table."""
    if torch.cuda.is_available():
        where = torch.cuda.get_device_name()
    else:
        where = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return f"{where}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
