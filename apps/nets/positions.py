"""Positions of tokens: tables added to embeddings, rotations of queries and keys, biases by distance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.nets.config import TransformerConfig


def sinusoids(num_positions: int, dim: int, device: torch.device | None = None, start: int = 0) -> Tensor:
    """Return float32 (P, D): sines of D/2 frequencies, then their cosines, as in tensor2tensor and fairseq.

    The first row belongs to position ``start``.

    Frequency i is ``10000 ** (-i / (D/2 - 1))``; arXiv 1706.03762, section 3.5, interleaves both instead.
    """
    half = dim // 2
    rate_H = torch.exp(torch.arange(half, device=device).float() * -(math.log(10000) / (half - 1)))
    angle_PH = torch.arange(start, start + num_positions, device=device).float()[:, None] * rate_H
    return torch.cat((angle_PH.sin(), angle_PH.cos()), dim=1)


class Sinusoidal(nn.Module):
    """Adds ``sinusoids``, of any length."""

    table: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.offset = config.position_offset
        rows = min(config.max_length + self.offset, 1 << 16)
        self.register_buffer("table", sinusoids(rows, config.shape.dim), persistent=False)

    def forward(self, start: int, length: int) -> Tensor:
        """Return the (L, D) rows of the positions from ``start`` on."""
        begin, end = start + self.offset, start + self.offset + length
        # An exported graph takes any length, so it must not ask whether the table has it.
        if torch.compiler.is_exporting() or end > len(self.table):
            return sinusoids(length, self.table.shape[1], self.table.device, begin).to(self.table.dtype)
        return self.table[begin:end]


class Learned(nn.Module):
    """A learned vector for each position."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.offset, self.max_length = config.position_offset, config.max_length
        self.weight = nn.Parameter(torch.empty(self.max_length + self.offset, config.shape.dim))

    def forward(self, start: int, length: int) -> Tensor:
        """Return the (L, D) rows of the positions from ``start`` on.

        Raises:
            ValueError: beyond ``max_length``.
        """
        # In an exported graph the look-up itself rejects positions beyond the table.
        if not torch.compiler.is_exporting() and start + length > self.max_length:
            raise ValueError(f"a sequence of {start + length} tokens is longer than max_length={self.max_length}")
        begin = start + self.offset
        # Looked up: without gradients a slice of a parameter still says that it has one, which a FLOP counter rejects.
        return F.embedding(torch.arange(begin, begin + length, device=self.weight.device), self.weight)


def added_positions(config: TransformerConfig) -> Sinusoidal | Learned | None:
    """Return the table that is added to the embeddings, if there is one."""
    if config.positions == "sinusoidal":
        return Sinusoidal(config)
    return Learned(config) if config.positions == "learned" else None


def rotations(start: int, length: int, dim: int, base: float, like: Tensor) -> Tensor:
    """Return cosines and sines of the angles ``position * base ** (-2i / d)``, (2, L, 1, d/2), in ``like``'s dtype."""
    # Angles in float32 at least: in bfloat16 position 257 would be 256.
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    rate_H = base ** -(torch.arange(0, dim, 2, device=like.device, dtype=dtype) / dim)
    angle_LH = torch.arange(start, start + length, device=like.device, dtype=dtype)[:, None] * rate_H
    return torch.stack((angle_LH.cos(), angle_LH.sin()))[:, :, None].to(like.dtype)


def rotate(x_BLHd: Tensor, rotations_2L1h: Tensor) -> Tensor:
    """Rotate queries or keys, (..., L, H, d): element i of a head's first half is paired with i of its second."""
    cos, sin = rotations_2L1h
    first, second = x_BLHd.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def relative_buckets(distance: Tensor, num_buckets: int, max_distance: int, causal: bool) -> Tensor:
    """Return the row of each distance in T5's table (arXiv 1910.10683, section 2.1).

    A direction's near half of the rows is for one distance each; the far half grows logarithmically up to
    ``max_distance``, and all beyond share the last one.

    Args:
        distance: int64, key's position minus query's.
        num_buckets: rows; with both directions, half of them for each.
        max_distance: distance that reaches the last row.
        causal: keys after the query are never seen, and share row 0.
    """
    if causal:
        base, rows, away = torch.zeros_like(distance), num_buckets, (-distance).clamp_min(0)
    else:
        rows = num_buckets // 2
        base, away = (distance > 0) * rows, distance.abs()
    near = rows // 2
    # In float32 and in this order, as T5 does: whole results, at powers of two, must not fall on the other side.
    grown = torch.log(away.clamp_min(1).float() / near) / math.log(max_distance / near) * (rows - near)
    far = (near + grown.to(torch.int64)).clamp_max(rows - 1)
    return base + torch.where(away < near, away, far)


class RelativeBias(nn.Module):
    """A bias for each head and bucket of distances, added to the scores of all layers of a stack."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.max_distance, self.causal = config.relative_max_distance, causal
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.shape.num_heads))

    def forward(self, length: int, past: int = 0) -> Tensor:
        """Return the biases of L queries and S = past + L keys, the queries' own last, (H, L, S)."""
        position_S = torch.arange(past + length, device=self.weight.device)
        return self._of(position_S - position_S[past:, None]).permute(2, 0, 1)

    def last(self, length: int) -> Tensor:
        """Return the biases of only the last query, (H, L)."""
        return self._of(torch.arange(1 - length, 1, device=self.weight.device)).t()

    def _of(self, distance: Tensor) -> Tensor:
        return self.weight[relative_buckets(distance, len(self.weight), self.max_distance, self.causal)]
