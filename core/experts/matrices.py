"""``QuantizedMatrices`` replaces a stacked parameter once experts are quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import QuantizedWeight


class QuantizedMatrices(nn.Module):
    """The matrices of E experts as integers. They are read as the parameter was: ``w.shape``, ``w[e]``, ``w[:n]``.

    Nothing is kept in floating point but the scales: ``w[e]`` is computed each time.

    Buffers: ``values`` and ``scales``, stacked by expert as in ``QuantizedWeight``. They are saved, loaded and moved
    with the model; a model that is cast has its scales cast.
    """

    values: Tensor
    scales: Tensor

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.fan_in = weight.fan_in
        self.register_buffer("values", weight.values)
        self.register_buffer("scales", weight.scales)

    @property
    def weight(self) -> QuantizedWeight:
        """The matrices for the kernels, in the dtype of the scales."""
        return QuantizedWeight(self.values, self.scales, self.fan_in, self.scales.dtype)

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, the inputs K and the outputs N."""
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    def numel(self) -> int:
        """Return how many numbers the matrices have."""
        E, K, N = self.shape
        return E * K * N

    def __getitem__(self, experts: int | slice) -> Any:
        return self.weight[experts]

    def extra_repr(self) -> str:
        (E, K, N), weight = self.shape, self.weight
        return f"num_experts={E}, fan_in={K}, fan_out={N}, bits={weight.bits}, group_size={weight.group_size}"
