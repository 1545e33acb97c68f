"""Base of the experts and of their configs, and the products of all experts on the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..kernels import check_devices, linear
from ..registry import register_config


class Experts(nn.Module):
    """Base of all experts: ``experts(rows)`` returns the rows computed.

    A subclass may read ``rows.materialize()``, (R, D) rows sorted by expert, and ``rows.offsets_E``, and return
    ``rows.with_output(y_RD)``; the dispatcher weights and sums. See ``FFNExperts`` for one that does it all itself.

    Every parameter and buffer is *stacked*: its first axis counts the experts. One that is split over ranks is a
    ``DTensor`` sharded along that axis; its local experts are the rows that this process holds, numbered from 0. Who
    starts, converts or stores experts uses ``init_each``, ``weights_of`` and ``num_local_experts``, and no parameter's
    name.
    """

    num_experts: int
    """E, of all ranks."""

    def forward(self, rows: Rows) -> Rows:
        raise NotImplementedError

    @property
    def num_local_experts(self) -> int:
        """Number of experts whose parameters this process holds; experts without parameters are all here."""
        first = next(self.parameters(), None)
        return self.num_experts if first is None else local_tensor(first).shape[0]

    def weights_of(self, e: int) -> dict[str, Tensor]:
        """Return the parameters and buffers of local expert ``e`` by name, as views: writing to one changes the expert.

        Raises:
            ValueError: ``e`` is not in ``range(num_local_experts)``.
        """
        if not 0 <= e < self.num_local_experts:
            raise ValueError(f"expert {e} is not in range(num_local_experts={self.num_local_experts})")
        return {name: local_tensor(t)[e] for name, t in (*self.named_parameters(), *self.named_buffers())}

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        """Start every local expert's matrices by ``fn``, each by itself, and its biases at zero.

        Matrices are called for in the order of the parameters, each for all experts in turn: ``w_in`` of expert 0, of
        expert 1, ..., then ``w_out`` of expert 0, and so on. Weights and statistics of norms stay as they are.

        Args:
            fn: fills one (in, out) matrix in place, as ``nn.init.xavier_uniform_`` does; gradients are off. That layout
                is the transpose of ``nn.Linear``'s: a function of ``fan_in`` alone has to take ``mode="fan_out"``.

        Example::

            for module in model.modules():  # routed and shared experts, layer by layer
                if isinstance(module, core.Experts):
                    module.init_each(nn.init.xavier_uniform_)
        """
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.ndim >= 3:
                    for matrix in local_tensor(parameter):
                        fn(matrix)
            for bias in self.biases():
                bias.zero_()

    def biases(self) -> list[Tensor]:
        """Return the stacked parameters that ``init_each`` sets to zero: none, unless a subclass says so."""
        return []

    def check_devices(self, x: Tensor) -> None:
        """Raise a ``ValueError`` where a parameter or buffer of these experts is not on the device of the tokens."""
        for tensors in (self._parameters, self._buffers):
            check_devices(x, type(self).__name__, tensors)

    def dense(self, x: Tensor) -> Tensor:
        """Every token through every expert, summed: how shared experts run. (..., D) to (..., D_out)."""
        return self.each(x.flatten(0, -2)).sum(1).unflatten(0, x.shape[:-1])

    def each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        """Every token through each expert, not summed: what a layer with several gates mixes.

        This one runs ``forward`` on copies of the tokens, and needs ``num_experts``; a subclass may do better.

        Args:
            x: (T, D); with ``counts`` (G, T, D), G inputs of the same T tokens.
            counts: how many experts take each input: the first ``counts[0]`` of them input 0, the next ``counts[1]``
                input 1, and so on. Their sum n may be below E: the last experts are left out. None: all take ``x``.
            real_T: bool (T,), False for padding, which is zero in ``x``: for experts that gather statistics.

        Returns:
            (T, n, D_out).
        """
        E: int = self.num_experts  # type: ignore[assignment]
        counts, x_GTD = (E,) if counts is None else counts, x if x.ndim == 3 else x.unsqueeze(0)
        T, n = x_GTD.shape[1], sum(counts)
        x_RD = torch.cat([x_TD.expand(count, -1, -1) for x_TD, count in zip(x_GTD, counts, strict=True)]).flatten(0, 1)
        rows = Rows(
            x=x_RD,
            row_index_R=torch.arange(n * T, device=x.device),
            offsets_E=torch.arange(1, E + 1, dtype=torch.int32, device=x.device).clamp_max(n) * T,
            gates_R=torch.ones(n * T, dtype=torch.float32, device=x.device),
            num_tokens=n * T,
            gathered=True,
        )
        return self(rows).x.unflatten(0, (n, T)).transpose(0, 1)

    def merged(self, x: Tensor, weights: Tensor) -> Tensor:
        """Each group of tokens through one expert whose parameters are a weighted sum of those of all E.

        Args:
            x: (G, S, D), tokens by group.
            weights: float32 (G, E), the share of each expert.

        Returns:
            (G, S, D_out).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged: it has no method `merged`")


@dataclass(frozen=True)
class ExpertConfig:
    """Base of the expert configs: a subclass is a frozen dataclass with ``build`` and the costs of one expert."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_config(cls)

    def build(self, num_experts: int, dim: int, out_dim: int | None = None, backend: str = "auto") -> Experts:
        raise NotImplementedError

    def out_dim(self, dim: int) -> int:
        """Width of the output where the layer does not ask for another one."""
        return dim

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        """Of one expert."""
        raise NotImplementedError

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        """Forward FLOPs of one expert on one row, two a multiply-add; activations are not counted."""
        raise NotImplementedError


def local_tensor(t: Tensor) -> Tensor:
    """Return the part of a stacked tensor that this process holds: of a ``DTensor`` its shard, else the whole.

    Raises:
        ValueError: the shard is cut along another axis than that of the experts, so that no expert is whole.
    """
    if not hasattr(t, "to_local"):
        return t
    axes = [placement.dim for placement in getattr(t, "placements", ()) if placement.is_shard()]
    if any(axes):
        raise ValueError(f"a tensor of experts of shape {tuple(t.shape)} is sharded along axis {max(axes)}, not 0")
    local: Tensor = t.to_local()
    return local


def first_linear(x_GTD: Tensor, w: Tensor, b: Tensor | None, counts: tuple[int, ...]) -> Tensor:
    """``x_g w_e + b_e`` of every token and expert, each with its group's input: one product where the inputs allow it.

    Args:
        x_GTD: (G, T, D) inputs.
        w: (n, D, F); b: (n, F).
        counts: experts of each input, n in all.

    Returns:
        (T, n, F).
    """
    if len(set(counts)) > 1:
        weights, biases = w.split(counts), [None] * len(counts) if b is None else b.split(counts)
        parts = zip(x_GTD.split(1), weights, biases, counts, strict=True)
        return torch.cat([first_linear(x, w_g, b_g, (c,)) for x, w_g, b_g, c in parts if c], 1)
    (G, _, D), (n, _, F_), count = x_GTD.shape, w.shape, counts[0]
    w_GDF = w.unflatten(0, (G, count)).transpose(1, 2).reshape(G, D, count * F_)
    if G == 1:
        y_TF = linear(x_GTD[0], w_GDF[0].t(), None if b is None else b.reshape(-1))
        return y_TF.unflatten(1, (n, F_))
    y_GTF = torch.bmm(x_GTD, w_GDF) if b is None else torch.baddbmm(b.reshape(G, 1, count * F_), x_GTD, w_GDF)
    return y_GTF.unflatten(2, (count, F_)).transpose(0, 1).flatten(1, 2)


def next_linear(h_TnF: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """``h_e w_e + b_e`` of every token and expert, (T, n, F) to (T, n, F')."""
    h_nTF = h_TnF.transpose(0, 1)
    y_nTF = torch.bmm(h_nTF, w) if b is None else torch.baddbmm(b.unsqueeze(1), h_nTF, w)
    return y_nTF.transpose(0, 1)


def autocast_together(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, *tuple[Tensor | None, ...]]:
    """Tokens and weights in the dtype of the products: autocast does not know custom ops."""
    kind = x.device.type
    is_on = kind != "meta" and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if is_on else None
    if dtype is None or x.dtype == torch.float64:
        wrong = next((w for w in weights if w is not None and w.dtype != x.dtype), None)
        if wrong is not None:
            raise ValueError(f"tokens are {x.dtype} and expert weights {wrong.dtype}: they must agree outside autocast")
        return x, *weights
    return x.to(dtype), *(None if w is None else w.to(dtype) for w in weights)
