"""``QuantizedWeight``: matrices of experts as integers of 8 or 4 bits, with scales.

    w[e, k, n] = q[e, k, n] * scales[e, k // group_size, n]

They are symmetric: ``q`` is within ``[-127, 127]``, or ``[-7, 7]`` in 4 bits, and the largest number of each group of
``group_size`` inputs of a channel is at the end of the range. Only weights are quantized, not tokens: matmuls are
computed in the tokens' dtype (arXiv 2211.10017, section 5). Two numbers of 4 bits share a byte::

    values[e, i, n] = (q[e, 2 i, n] + 8) | (q[e, 2 i + 1, n] + 8) << 4
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LARGEST = {8: 127, 4: 7}
"""The largest integer, by the bits of each."""
ZERO = 8
"""Half a byte that stands for zero."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The quantized matrices of E experts. ``w[e]`` is one of them in floating point, ``w[:n]`` the first n.

    Attributes:
        values: int8 (E, K, N), or uint8 (E, ceil(K / 2), N) in 4 bits.
        scales: floating point (E, groups, N), one group a channel or several, each of equally many inputs.
        fan_in: K, the inputs of each matrix.
        dtype: of the numbers that are computed with.
    """

    values: Tensor
    scales: Tensor
    fan_in: int
    dtype: torch.dtype

    @property
    def bits(self) -> int:
        return 4 if self.values.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.scales.shape[0], self.fan_in, self.scales.shape[2]

    @property
    def group_size(self) -> int:
        """The inputs of a channel that share a scale: K if there is one scale a channel."""
        return self.fan_in // self.scales.shape[1]

    @property
    def is_by_channel(self) -> bool:
        """Whether an output channel has one scale, so that a matmul's output may be scaled instead of the matrix."""
        return self.scales.shape[1] == 1

    def to(self, dtype: torch.dtype) -> QuantizedWeight:
        """Return the same numbers, to be computed with in another dtype."""
        return replace(self, dtype=dtype)

    def __getitem__(self, experts: int | slice) -> Any:
        values, scales = self.values[experts], self.scales[experts]
        if isinstance(experts, slice):
            return replace(self, values=values, scales=scales)
        return dequantize(values, scales, self.fan_in, self.dtype)

    def write_whole_numbers(self, e: int, out: Tensor) -> None:
        """Write the matrix of expert ``e`` before it is scaled into ``out``, floating point (K, N)."""
        values = self.values[e]
        if values.dtype == torch.int8:
            out.copy_(values)
            return
        # Each half by itself: 512 x 2048 numbers take 0.2 ms, and 1.4 as ``whole_numbers`` makes them.
        out[::2].copy_((values & 15).view(torch.int8).sub_(ZERO))
        out[1::2].copy_((values[: self.fan_in // 2] >> 4).view(torch.int8).sub_(ZERO))

    def dequantized(self) -> Tensor:
        """Return all matrices in ``dtype``, (E, K, N)."""
        return dequantize(self.values, self.scales, self.fan_in, self.dtype)


Weight = Tensor | QuantizedWeight


def quantize(w: Tensor, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """Return matrices (E, K, N) rounded to integers times scales, one expert after another.

    Args:
        w: finite numbers.
        bits: 8 or 4.
        group_size: inputs of a channel that share a scale; None: all of them do.

    Returns:
        The quantized matrices, with scales in the dtype of ``w``. A number is off by half a scale at most. (In float16
        by more if a group has no number above 1e-3: its scale is below what that dtype holds exactly.)

    Raises:
        ValueError: other bits, a group size that does not divide K, or numbers that are not finite.
    """
    if bits not in LARGEST:
        raise ValueError(f"bits={bits} is not one of {', '.join(map(str, sorted(LARGEST)))}")
    E, K, N = w.shape
    size = K if group_size is None else group_size
    if size < 1 or K % size:
        raise ValueError(f"group_size={group_size} does not divide the {K} inputs of the matrices")
    wide = torch.promote_types(w.dtype, torch.float32)
    rows = K if bits == 8 else -(-K // 2)
    values = w.new_empty(E, rows, N, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = w.new_empty(E, K // size, N)
    for e in range(E):  # all at once would be a second copy of the largest tensors of a model
        w_gKN = w[e].to(wide).unflatten(0, (K // size, size))
        scales[e] = w_gKN.abs().amax(1) / LARGEST[bits]
        scale = scales[e].to(wide)  # as it is stored
        if not (scale.is_meta or bool(scale.isfinite().all())):
            raise ValueError(f"expert {e} has weights that are not finite: they have no scale")
        q = (w_gKN / scale.masked_fill(scale == 0, 1.0)[:, None]).round_().clamp_(-LARGEST[bits], LARGEST[bits])
        q_KN = q.flatten(0, 1).to(torch.int8)
        values[e] = q_KN if bits == 8 else pack(q_KN)
    return QuantizedWeight(values, scales, K, w.dtype)


def pack(q: Tensor) -> Tensor:
    """Pack integers of 4 bits two to a byte: int8 (..., K, N) in [-8, 7] to uint8 (..., ceil(K / 2), N).

    The lower half of a byte holds the number of the even row. If K is odd the last byte's upper half is a zero.
    """
    if q.shape[-2] % 2:
        q = torch.cat((q, torch.zeros_like(q[..., :1, :])), -2)
    half = (q + ZERO).view(torch.uint8)
    return half[..., ::2, :] | half[..., 1::2, :] << 4


def whole_numbers(values: Tensor, fan_in: int) -> Tensor:
    """Return the integers, int8 (..., K, N): ``values`` themselves, or the opposite of ``pack``."""
    if values.dtype == torch.int8:
        return values
    half = torch.stack((values & 15, values >> 4), -2).flatten(-3, -2)
    return half[..., :fan_in, :].to(torch.int8) - ZERO  # no view: ONNX has no form of one in another dtype


def dequantize(values: Tensor, scales: Tensor, fan_in: int, dtype: torch.dtype) -> Tensor:
    """Return matrices in floating point, (..., K, N): multiplied in float32 at least, and rounded once."""
    w = whole_numbers(values, fan_in).to(torch.promote_types(scales.dtype, torch.float32))
    groups = scales.shape[-2]  # not in place: an exported program has no operator that writes to its input
    scaled = w.unflatten(-2, (groups, w.shape[-2] // groups)) * scales.unsqueeze(-2)
    return scaled.flatten(-3, -2).to(dtype)


def scale_(w: Tensor, scales: Tensor) -> Tensor:
    """Multiply integers (..., K, N) by their scales (..., groups, N), in place."""
    groups = scales.shape[-2]
    w.unflatten(-2, (groups, w.shape[-2] // groups)).mul_(scales.unsqueeze(-2))
    return w
