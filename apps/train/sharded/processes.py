"""The processes of a run: how they meet again after a restart, how long they wait for each other, and a lost one."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout

_WORDS_OF_LOSS = (
    "closed by peer", "reset by peer", "broken pipe", "likely closed", "remote process exited", "was aborted",
    "timed out", "timeout",
)  # fmt: skip


class LostProcessError(RuntimeError):
    """Another process of a run has ended, or does not answer."""


def is_loss(error: BaseException) -> bool:
    """Return whether an error comes from a collective in which another process is missing."""
    text = str(error).lower()
    # Gloo's errors have no class of their own, and name its source.
    is_collective = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return is_collective and any(word in text for word in _WORDS_OF_LOSS)


def join_again(backend: str, timeout: timedelta | None) -> None:
    """Start the default group of processes that torchrun has started again on one machine; else do nothing.

    torchrun keeps the store by which they meet, with the addresses of those that died (torch 2.13), so that a process
    that comes early would wait for a dead one. Here each start has names of its own. On several machines the starts
    may have different numbers; there torchrun needs ``TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1``, which makes a new store.
    """
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    if not start or not shared or dist.is_initialized():
        return
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    timeout = timeout or default_pg_timeout
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    kept = dist.TCPStore(address, port, world, is_master=False, timeout=timeout)
    store = dist.PrefixStore(f"start{start}", kept)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def check_started(local_rank: int, devices: int) -> None:
    """Raise an error for a process of torchrun beyond the number that ``trainer.devices`` names.

    Raises:
        ValueError: naming both numbers.
    """
    if local_rank >= devices:
        raise ValueError(
            f"trainer.devices={devices}, but this is process {local_rank + 1} on this machine: "
            "give --trainer.devices the number of torchrun's --nproc-per-node"
        )
