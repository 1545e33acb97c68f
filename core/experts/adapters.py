"""``Adapters``: low-rank updates of a module's matrices, which stay where they are and keep their names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import AdaptedWeight
from .base import CHILD as CHILD, local_tensor
from .products import init_linear_


class LowRankUpdate(nn.Module):
    """``scale * x a b``, of one matrix or of E stacked ones.

    Parameters: ``a`` (K, r) or (E, K, r), at U(-1/sqrt(K), 1/sqrt(K)), and ``b`` (r, N) or (E, r, N), at zero: the
    adapted module starts with the outputs that it had. ``dropout``, of a linear layer alone, is on its way into ``a``.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        *stacked, K, N = shape
        self.scale, self.dropout = scale, dropout
        self.a = nn.Parameter(torch.empty(*stacked, K, rank))
        self.b = nn.Parameter(torch.empty(*stacked, rank, N))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start ``a`` as a linear layer, and ``b`` at zero."""
        init_linear_(self.a if self.a.ndim == 3 else self.a[None])
        nn.init.zeros_(self.b)

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    def extra_repr(self) -> str:
        return f"{'x'.join(map(str, self.a.shape[:-1]))} -> {self.b.shape[-1]}, rank={self.rank}, scale={self.scale:g}"


class Adapters(nn.ModuleDict):
    """The adapters of one module by name; each has a ``LowRankUpdate`` for each matrix that it changes.

    Attributes:
        active: names of the adapters that compute.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()

    def put(self, adapter: str, key: str, update: LowRankUpdate) -> None:
        """Add the update of a matrix to an adapter."""
        if adapter not in self:
            self[adapter] = nn.ModuleDict()
        of_adapter: Any = self[adapter]
        of_adapter[_name(key)] = update

    def of(self, key: str) -> list[LowRankUpdate]:
        """Return the active updates of a matrix."""
        every: Any = [self[adapter] for adapter in self.active if adapter in self]
        return [own[_name(key)] for own in every if _name(key) in own]


def _name(key: str) -> str:
    return key.replace(".", "/")  # no module's name has a point


def updates_of(module: nn.Module, key: str) -> list[tuple[Tensor, Tensor, float]]:
    """Return this process's part of ``a`` and ``b``, and ``scale``, of the active updates of a module's matrix."""
    adapters = module._modules.get(CHILD)
    updates = adapters.of(key) if isinstance(adapters, Adapters) else []
    return [(local_tensor(update.a), local_tensor(update.b), update.scale) for update in updates]


def adapted(base: Any, updates: list[tuple[Tensor, Tensor, float]]) -> Any:
    """Return stacked matrices with their updates, for ``expert_linear``; without an update they are ``base``."""
    in_its_dtype = tuple((a.to(base.dtype), b.to(base.dtype), scale) for a, b, scale in updates)
    return AdaptedWeight(base, in_its_dtype) if updates else base
