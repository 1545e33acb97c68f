"""DenseArch: continuous columns as numbers or as rows of an embedding table. NaN and infinities are missing values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import core
from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature
from core.fields import Bounds, Checked, Count

_KNEE = 3.0
"""Standard deviations from which on "quantile_normal" takes the logarithm."""

_DIM = 16
"""Width of a column's encoding by "by_label" and "linear", where none is given."""

_CLIP = 100.0
"""Standard deviations beyond which a value is taken as this far off: a slip of the decimal point must not blow up."""


@core.register_config
@dataclass(frozen=True)
class DenseConfig(Checked):
    """The encoding of the continuous columns.

    - "normalize": ``(x - mean) / std``, of the training split; with ``log1p`` then ``sign(z) log(1 + |z|)``. A missing
      value is 0, the mean, and 1 in an indicator of its own where the column has missing values in training.
    - "quantile": the bin ``b[i-1] < x <= b[i]`` of the training split's quantiles, embedded like a category; missing
      values have the row 0.
    - "piecewise_linear": the encoding of Gorishniy et al. (arXiv 2203.05556, equation 1): each bin is 0 below, 1 above
      and linear inside. Beyond the outermost boundary, as their bins continue linearly, two more numbers grow as
      ``log(1 + distance / std)``. A missing value is 0 everywhere but in its indicator.
    - "quantile_normal": two numbers a column: the value's quantile in the training split as one of a normal
      distribution, which skewed values spread evenly over, and ``z = (x - mean) / std``, logarithmic beyond 3, which
      tells large ones apart. A value outside the training split's range is taken as the end of it, as trees do.
      Missing values as with "normalize". With ``num_bins`` the bins are embedded too, as with "quantile": single values
      of a column may mean something of their own.
    - "by_label": the two numbers of "quantile_normal", and what ``table.numbers`` makes of the thresholds that the
      encoding learned from labels: "bins" embeds the bins between them; "linear" is "piecewise_linear" with a ``dim``,
      from the column's smallest value to its largest.

    Attributes:
        kind: "normalize", "quantile", "piecewise_linear", "quantile_normal" or "by_label".
        log1p: whether "normalize" takes the logarithm.
        num_bins: largest number of bins of a column, taken evenly from its quantiles; None: all of them, and none that
            are embedded with "quantile_normal".
        dim: width to which a linear map and ReLU take each column's encoding, with "piecewise_linear"; None: the
            encoding itself. With "by_label" that of "linear", None: 16; bins are as wide as other embeddings.

    Raises:
        ValueError: a value out of its range, or one that the kind does not use.
    """

    prefix = "dense."

    kind: Literal["normalize", "quantile", "piecewise_linear", "quantile_normal", "by_label"] = "normalize"
    log1p: bool = False
    num_bins: Annotated[int, Bounds(2)] | None = None
    dim: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log1p and self.kind != "normalize":
            raise ValueError(f"dense.log1p=True has no meaning with dense.kind={self.kind!r}")
        if self.num_bins is not None and self.kind == "normalize":
            raise ValueError(f"dense.num_bins={self.num_bins} has a meaning with bins only")
        if self.num_bins is not None and self.kind == "by_label":
            raise ValueError(f"dense.num_bins={self.num_bins}: dense.kind='by_label' takes all thresholds")
        if self.dim is not None and self.kind not in ("piecewise_linear", "by_label"):
            raise ValueError(f"dense.dim={self.dim} needs dense.kind='piecewise_linear' or 'by_label'")


class DenseArch(nn.Module):
    """The continuous columns of a batch.

    Args:
        features: the C columns.
        config: how they are encoded.
        copies: number of separate weights, for models that share nothing.
        numbers: ``Features.numbers``, which "by_label" reads.

    Attributes:
        out_dim: width of the output; 0 if there is none.
        bin_features: columns that ``bins`` gives to the embeddings, with "quantile", "quantile_normal" and "by_label".

    Raises:
        ValueError: "by_label", and no thresholds were learned.
    """

    _edges_CM: Tensor

    def __init__(
        self,
        features: Sequence[ContinuousFeature],
        config: DenseConfig = DenseConfig(),
        copies: int = 1,
        numbers: str = "",
    ) -> None:
        super().__init__()
        self.config, self.copies = config, copies
        self.bin_features: tuple[CategoricalFeature, ...] = ()
        self.out_dim = 0
        self.numbers: Normalize | PiecewiseLinear | None = None
        self.encode: PiecewiseLinearEmbedding | None = None
        if not features:
            return
        dim, edges = config.dim, [thin(f.quantiles, config.num_bins) for f in features]
        embeds = config.kind == "quantile" or (config.kind == "quantile_normal" and config.num_bins is not None)
        if config.kind == "by_label":
            embeds, dim = numbers == "bins", None if numbers == "bins" else dim or _DIM
            edges = _by_label(features, numbers)
        if embeds:
            self.bin_features = tuple(
                CategoricalFeature(f.name, num_rows=len(e) + 2) for f, e in zip(features, edges, strict=True)
            )
            self.register_buffer("_edges_CM", _padded(edges), persistent=False)
        if config.kind == "normalize":
            self.numbers = Normalize(features, config.log1p)
        elif config.kind in ("quantile_normal", "by_label"):
            self.numbers = QuantileNormal(features, [thin(f.quantiles, None) for f in features])
        elif config.kind == "piecewise_linear" and dim is None:
            self.numbers = PiecewiseLinear(features, edges)
        if self.numbers is not None:
            self.out_dim = self.numbers.out_dim
        if dim is not None:
            self.encode = PiecewiseLinearEmbedding(features, edges, copies * dim)
            self.out_dim += len(features) * dim

    def bins(self, dense_BC: Tensor) -> Tensor | None:
        """Return the rows int64 (C, B) of the columns' tables, 0 if missing, else 1 + the bin; None without bins."""
        if not self.bin_features:
            return None
        x_CB = dense_BC.t().contiguous()
        bin_CB = num_below(self._edges_CM, x_CB)
        return torch.where(x_CB.isfinite(), bin_CB + 1, 0)

    def forward(self, dense_BC: Tensor) -> Tensor | None:
        """Map (B, C) to (B, ``out_dim``), or (copies, B, ``out_dim``); None if the columns give no numbers."""
        parts = [] if self.numbers is None else [self.numbers(dense_BC).expand(self.copies, -1, -1)]
        if self.encode is not None:
            x_BCd = self.encode(dense_BC).unflatten(2, (self.copies, -1))
            parts.append(x_BCd.permute(2, 0, 1, 3).flatten(2))
        if not parts:
            return None
        x = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
        return x[0] if self.copies == 1 else x


class Normalize(nn.Module):
    """``(x - mean) / std``, and an indicator for columns with missing values. See ``DenseConfig``."""

    _mean_C: Tensor
    _scale_C: Tensor
    _indicated: Tensor

    def __init__(self, features: Sequence[ContinuousFeature], log1p: bool = False) -> None:
        super().__init__()
        self.log1p = log1p
        self.register_buffer("_mean_C", torch.tensor([f.mean for f in features]), persistent=False)
        self.register_buffer("_scale_C", torch.tensor([1 / f.std for f in features]), persistent=False)
        where = [i for i, f in enumerate(features) if f.missing > 0]
        self.register_buffer("_indicated", torch.tensor(where, dtype=torch.int64), persistent=False)
        self._indicators = bool(where)
        self.out_dim = len(features) + len(where)

    def forward(self, dense_BC: Tensor) -> Tensor:
        # An infinity stays one until nan_to_num; so does a number that overflows.
        z_BC = ((dense_BC - self._mean_C) * self._scale_C).nan_to_num(0.0, 0.0, 0.0).clamp(-_CLIP, _CLIP)
        if self.log1p:
            z_BC = z_BC.sign() * z_BC.abs().log1p()
        if not self._indicators:
            return z_BC
        missing = ~dense_BC.index_select(1, self._indicated).isfinite()
        return torch.cat((z_BC, missing.to(z_BC.dtype)), dim=1)


class QuantileNormal(Normalize):
    """The normal quantile, ``z`` within the training split's range, and the indicator. See ``DenseConfig``."""

    _edges_CM: Tensor
    _score_CM: Tensor
    _low_C: Tensor
    _high_C: Tensor

    def __init__(self, features: Sequence[ContinuousFeature], edges: Sequence[tuple[float, ...]]) -> None:
        super().__init__(features)
        # Of M boundaries the i-th has i / (M + 1) of the values at or below it.
        places = [torch.arange(1, len(e) + 1, dtype=torch.float64) / (len(e) + 1) for e in edges]
        scores = [torch.special.ndtri(place).float() for place in places]
        self.register_buffer("_edges_CM", F.pad(_padded(edges), (0, 2), value=math.inf), persistent=False)
        padded = F.pad(pad_sequence(scores, batch_first=True), (0, self._edges_CM.shape[1] - max(map(len, scores))))
        self.register_buffer("_score_CM", padded, persistent=False)
        low = torch.tensor([-math.inf if f.least is None else f.least for f in features])
        high = torch.tensor([math.inf if f.most is None else f.most for f in features])
        self.register_buffer("_low_C", low, persistent=False)
        self.register_buffer("_high_C", high, persistent=False)
        self.out_dim += len(features)

    def forward(self, dense_BC: Tensor) -> Tensor:
        C = dense_BC.shape[1]
        x_BC = torch.where(dense_BC.isfinite(), dense_BC.clamp(self._low_C, self._high_C), dense_BC)
        z_BK = super().forward(x_BC)
        z_BC, size_BC = z_BK[:, :C], z_BK[:, :C].abs()
        z_BC = z_BC.sign() * (size_BC.clamp_max(_KNEE) + (size_BC - _KNEE).clamp_min(0).log1p())
        # The last boundary and infinity end the highest bin, whose values all have the last score.
        x_CB = torch.where(dense_BC.isfinite(), x_BC, -math.inf).t().contiguous()
        bin_CB = (num_below(self._edges_CM, x_CB) - 1).clamp_min(0)
        low, high = self._edges_CM.gather(1, bin_CB), self._edges_CM.gather(1, bin_CB + 1)
        share_CB = ((x_CB - low) / (high - low)).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
        score_CB = torch.lerp(self._score_CM.gather(1, bin_CB), self._score_CM.gather(1, bin_CB + 1), share_CB)
        score_BC = torch.where(dense_BC.isfinite(), score_CB.t(), 0.0)
        return torch.cat((score_BC, z_BC, z_BK[:, C:]), dim=1)


class _Bins(nn.Module):
    """Base of the piecewise-linear forms: boundaries, and how far a value lies beyond the outermost ones."""

    _edges_CM: Tensor
    _first_C: Tensor
    _last_C: Tensor
    _scale_C: Tensor

    def __init__(self, features: Sequence[ContinuousFeature], edges: Sequence[tuple[float, ...]]) -> None:
        super().__init__()
        edges_CM = _padded(edges)
        self.register_buffer("_edges_CM", edges_CM, persistent=False)
        first = torch.tensor([e[0] if e else math.nan for e in edges])
        last = torch.tensor([e[-1] if e else math.nan for e in edges])
        self.register_buffer("_first_C", first, persistent=False)
        self.register_buffer("_last_C", last, persistent=False)
        self.register_buffer("_scale_C", torch.tensor([1 / f.std for f in features]), persistent=False)

    def tails(self, dense_BC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return how far values lie below the first and above the last boundary, and 1 if missing: (B, C) each."""
        # The boundaries of a constant column are NaN, and both distances 0.
        below = ((self._first_C - dense_BC) * self._scale_C).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, _CLIP).log1p()
        above = ((dense_BC - self._last_C) * self._scale_C).nan_to_num(0.0, 0.0, 0.0).clamp(0.0, _CLIP).log1p()
        return below, above, (~dense_BC.isfinite()).to(dense_BC.dtype)


class PiecewiseLinear(_Bins):
    """The encoding itself: each column's bins, its two tails, and an indicator where values are missing."""

    _left_R: Tensor
    _slope_R: Tensor
    _column_R: Tensor
    _tailed: Tensor
    _missing: Tensor

    def __init__(self, features: Sequence[ContinuousFeature], edges: Sequence[tuple[float, ...]]) -> None:
        super().__init__(features, edges)
        bins = [(c, low, high) for c, e in enumerate(edges) for low, high in pairwise(e)]
        self.register_buffer("_left_R", torch.tensor([low for _, low, _ in bins]), persistent=False)
        self.register_buffer("_slope_R", torch.tensor([1 / (high - low) for _, low, high in bins]), persistent=False)
        column_R = torch.tensor([c for c, _, _ in bins], dtype=torch.int64)
        self.register_buffer("_column_R", column_R, persistent=False)
        tailed = torch.tensor([c for c, e in enumerate(edges) if e], dtype=torch.int64)
        missing = torch.tensor([c for c, f in enumerate(features) if f.missing > 0], dtype=torch.int64)
        self.register_buffer("_tailed", tailed, persistent=False)
        self.register_buffer("_missing", missing, persistent=False)
        self.out_dim = len(bins) + 2 * len(tailed) + len(missing)

    def forward(self, dense_BC: Tensor) -> Tensor:
        ramp_BR = (dense_BC.index_select(1, self._column_R) - self._left_R) * self._slope_R
        ramp_BR = torch.where(dense_BC.isfinite().index_select(1, self._column_R), ramp_BR, 0.0).clamp(0.0, 1.0)
        below, above, missing = self.tails(dense_BC)
        return torch.cat(
            (
                ramp_BR,
                below.index_select(1, self._tailed),
                above.index_select(1, self._tailed),
                missing.index_select(1, self._missing),
            ),
            dim=1,
        )


class PiecewiseLinearEmbedding(_Bins):
    """The encoding, a linear map for each column, and ReLU: "PLE-LR" of the paper; (B, C) to (B, C, d).

    A linear map of the encoding is linear interpolation between prefix sums of its weights: for each value two rows are
    looked up, whatever the number of bins, and the encoding is never made.

    Parameters: ``weight`` (bins of all columns, d), ``tails_weight`` (3, C, d) for below, above and missing, ``bias``
    (C, d).
    """

    _index_CM: Tensor
    _last_bin_C1: Tensor
    _node_C1: Tensor
    _left_CM: Tensor
    _slope_CM: Tensor

    def __init__(self, features: Sequence[ContinuousFeature], edges: Sequence[tuple[float, ...]], dim: int) -> None:
        super().__init__(features, edges)
        C = len(features)
        sizes = [max(len(e) - 1, 0) for e in edges]
        # Row 0 is zero: a sum starts there, and the bins that a column lacks point to it.
        index_CM = F.pad(pad_sequence(torch.arange(1, sum(sizes) + 1).split(sizes), batch_first=True), (1, 0))
        self.register_buffer("_index_CM", index_CM, persistent=False)
        self.register_buffer("_last_bin_C1", torch.tensor([[max(s - 1, 0)] for s in sizes]), persistent=False)
        self.register_buffer("_node_C1", torch.arange(C)[:, None] * index_CM.shape[1], persistent=False)
        left = [torch.tensor(e[:-1]) for e in edges]
        slope = [torch.tensor([1 / (high - low) for low, high in pairwise(e)]) for e in edges]
        self.register_buffer("_left_CM", F.pad(pad_sequence(left, batch_first=True), (0, 1)), persistent=False)
        self.register_buffer("_slope_CM", F.pad(pad_sequence(slope, batch_first=True), (0, 1)), persistent=False)
        self.dim = dim
        bound_C = torch.tensor([1 / math.sqrt(s + 2) for s in sizes])
        by_row = torch.cat([b.expand(s) for b, s in zip(bound_C, sizes, strict=True)])
        self.weight = nn.Parameter((2 * torch.rand(sum(sizes), dim) - 1) * by_row[:, None])
        self.tails_weight = nn.Parameter((2 * torch.rand(3, C, dim) - 1) * bound_C[:, None])
        self.bias = nn.Parameter((2 * torch.rand(C, dim) - 1) * bound_C[:, None])
        with torch.no_grad():
            self.tails_weight[2].zero_()  # where training has no missing value, a missing one changes nothing

    def forward(self, dense_BC: Tensor) -> Tensor:
        B, C = dense_BC.shape
        # Below every boundary where missing: the encoding is 0 there.
        x_CB = torch.where(dense_BC.isfinite(), dense_BC, -math.inf).t().contiguous()
        bin_CB = (num_below(self._edges_CM, x_CB) - 1).clamp_min(0).minimum(self._last_bin_C1)
        share_CB = ((x_CB - self._left_CM.gather(1, bin_CB)) * self._slope_CM.gather(1, bin_CB)).nan_to_num(0.0)
        share_BC1 = share_CB.clamp(0.0, 1.0).t().unsqueeze(-1)
        weights = torch.cat((self.weight.new_zeros(1, self.dim), self.weight))
        node_Nd = weights.index_select(0, self._index_CM.reshape(-1)).view(C, -1, self.dim).cumsum(1).flatten(0, 1)
        node_BC = (bin_CB + self._node_C1).t().reshape(-1)
        low = node_Nd.index_select(0, node_BC).view(B, C, self.dim)
        # A column without bins has one node; the next node is another column's, with a share of 0.
        high = node_Nd.index_select(0, (node_BC + 1).clamp_max(len(node_Nd) - 1)).view(B, C, self.dim)
        tails_BC3 = torch.stack(self.tails(dense_BC), dim=-1)
        tails = torch.bmm(tails_BC3.transpose(0, 1), self.tails_weight.transpose(0, 1)).transpose(0, 1)
        return F.relu(torch.lerp(low, high, share_BC1) + tails + self.bias)


def _by_label(features: Sequence[ContinuousFeature], numbers: str) -> list[tuple[float, ...]]:
    """Return the boundaries of "by_label": the thresholds, for "linear" between the smallest and the largest value.

    Raises:
        ValueError: no thresholds were learned.
    """
    if not numbers:
        raise ValueError("dense.kind='by_label' needs thresholds: give table.numbers (auto, bins or linear)")
    if numbers == "bins":
        return [thin(f.thresholds, None) for f in features]
    ends = [() if f.least is None or f.most is None else (f.least, *f.thresholds, f.most) for f in features]
    return [thin(own, None) for own in ends]


def thin(quantiles: Sequence[float], num_bins: int | None) -> tuple[float, ...]:
    """Return at most ``num_bins - 1`` of the boundaries, evenly taken, distinct in float32.

    The outermost two stay: the first one separates a value that fills a bin of its own, as 96 % zeros do, from the
    rest.
    """
    kept = tuple(quantiles)
    if num_bins is not None and len(kept) > num_bins - 1:
        steps = max(num_bins - 2, 1)
        kept = tuple(kept[i * (len(kept) - 1) // steps] for i in range(num_bins - 1))
    return tuple(dict.fromkeys(torch.tensor(kept, dtype=torch.float32, device="cpu").tolist()))


def num_below(edges_CM: Tensor, x_CB: Tensor) -> Tensor:
    """Return how many of its column's boundaries, ascending, lie below each value, int64 (C, B)."""
    if torch.compiler.is_exporting():  # other runtimes have no search
        return (edges_CM.unsqueeze(1) < x_CB.unsqueeze(2)).sum(2)
    return torch.searchsorted(edges_CM, x_CB)


def _padded(edges: Sequence[tuple[float, ...]]) -> Tensor:
    """Return the boundaries as a tensor (C, M); shorter rows end in infinities, which no value exceeds."""
    return pad_sequence([torch.tensor(e) for e in edges], batch_first=True, padding_value=math.inf)
