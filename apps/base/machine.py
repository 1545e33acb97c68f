"""The machine and the versions that figures were measured with, and when."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from core import resolve_backend
from core.kernels.cpu.products import cpu_field


def device_name(device: torch.device | None = None) -> str:
    """Return the name of a device; None: of the GPU, or of the processor if there is no GPU."""
    if torch.cuda.is_available() if device is None else device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_field("model name") or platform.processor() or platform.machine()


def machine_line() -> str:
    """Return device, threads of torch, its version and the date, for the head of a benchmark's table."""
    threads = "" if torch.cuda.is_available() else f", {torch.get_num_threads()} threads"
    return f"{device_name()}{threads}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def threads_are_given() -> bool:
    """Return whether the environment or the program has set torch's number of threads, at first one a core."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    of_chip, logical = (int(cpu_field(name) or 1) for name in ("cpu cores", "siblings"))
    is_named = "OMP_NUM_THREADS" in os.environ or "MKL_NUM_THREADS" in os.environ
    return is_named or torch.get_num_threads() not in (cores, cores * of_chip // logical)


def set_threads(number: int) -> None:
    """Let torch and the loaded libraries of BLAS and OpenMP compute with ``number`` threads; 0 changes nothing."""
    if number:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        threadpool_limits(number)
        torch.set_num_threads(number)


def machine_facts() -> dict[str, Any]:
    """Return the device and the versions that figures are measured with, and the commit of a source tree."""
    versions = {}
    for package in ("moesaic", "lightning", "timm", "torchvision", "scikit-learn"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    facts = {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": versions,
    }
    commit = source_commit()
    return {**facts, "commit": commit} if commit else facts


def installation() -> dict[str, Any]:
    """Return the facts for a bug report: versions, the machine, and the kernels that compute on it."""
    facts = machine_facts()
    packages = facts.pop("packages")
    for package in ("torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "triton", "transformers"):
        with suppress(PackageNotFoundError):
            packages[package] = version(package)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **facts,
        "cuda": torch.version.cuda or "none in this torch",
        "backend": resolve_backend("auto", device, torch.float32),
        **packages,
    }


def source_commit() -> str:
    """Return the git commit of the source tree, marked if files differ from it; "" for an installed package."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (", with changes" if changed else "")
    except (OSError, subprocess.SubprocessError):  # no git here, or a tree that it does not trust
        return ""


def moment() -> str:
    """Return the present moment in ISO format."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def host_waits_for(device: torch.device) -> bool:
    """Return whether reading a value of a device, or a shape made of values, makes the host wait for all its work."""
    return device.type != "cpu"
