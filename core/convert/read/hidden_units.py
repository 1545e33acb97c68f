"""``HiddenUnits`` says which linear layers of a module make the hidden units of a feed-forward network, and gives it
more or fewer of them.

It writes into a module the tensors that a reader of ``readers.py`` reads from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ...experts import MLP
from ...torch_internals import storage_id
from .feed_forward import FeedForwardPart, affine, is_linear, set_affine


@dataclass(frozen=True)
class UnitLayer:
    """One layer of a feed-forward network, as the modules that compute it.

    Attributes:
        linears: dotted name of each linear module, and the number of matrices that it holds side by side. A gated
            network's first layer is two modules, or one that holds two matrices.
        norm: dotted name of the batch norm behind it; "": there is none.
        vectors: parameters of a unit besides the rows of the matrices: biases, and the two of the norm.
    """

    linears: tuple[tuple[str, int], ...]
    norm: str
    vectors: int

    @property
    def num_matrices(self) -> int:
        return sum(count for _, count in self.linears)


@dataclass(frozen=True)
class HiddenUnits:
    """The layers of a feed-forward network, and how many units each has.

    Attributes:
        layers: the layers, in their order.
        dims: D, the hidden widths, D_out: one number more than there are layers.
    """

    layers: tuple[UnitLayer, ...]
    dims: tuple[int, ...]

    @property
    def width(self) -> int:
        """The first hidden width."""
        return self.dims[1]

    def dims_at(self, width: int) -> tuple[int, ...]:
        """Return the dims with another first hidden width; further ones grow by the factor of the first."""
        first, *_ = hidden = self.dims[1:-1]
        return (self.dims[0], *(max(1, round(width * h / first)) for h in hidden), self.dims[-1])

    def flops_per_token(self, width: int) -> int:
        """Return the forward FLOPs of a token at a first hidden width, two a multiply-add."""
        return 2 * sum(layer.num_matrices * into * out for layer, into, out in self._each(width))

    def num_params(self, width: int) -> int:
        """Return the parameters at a first hidden width, equal to the sum of ``numel`` of the modules."""
        return sum((layer.num_matrices * into + layer.vectors) * out for layer, into, out in self._each(width))

    def _each(self, width: int) -> Iterator[tuple[UnitLayer, int, int]]:
        for layer, (into, out) in zip(self.layers, pairwise(self.dims_at(width)), strict=True):
            yield layer, into, out

    @torch.no_grad()
    def resize(self, module: nn.Module, width: int, fresh: bool, generator: torch.Generator) -> None:
        """Give the network another number of hidden units, in place: parameters are new ones, modules stay.

        Units that stay keep their weights. An added unit reads the layer before it by normal weights as large as the
        others', has zero biases and a new norm, and the layer behind it reads it by zero weights: the network's output
        does not change. If units are removed, the units with the largest weights stay: by the product of the norms of
        the vectors that a unit reads with, and of the one that it is read with.

        Args:
            module: the network that was read, or a copy of it.
            width: the first hidden width.
            fresh: reinitialize every weight, as ``nn.Linear`` does, and keep no unit.
            generator: CPU generator for random weights.
        """
        dims = self.dims_at(width)
        kept = self._kept(module, dims)
        for i, layer in enumerate(self.layers):
            for name, count in layer.linears:
                linear = module.get_submodule(name)
                w, b = affine(linear)
                w_IcO = w.unflatten(1, (count, -1))
                b_cO = None if b is None else b.unflatten(0, (count, -1))
                if fresh:
                    new = _drawn(w_IcO, b_cO, dims[i], dims[i + 1], generator)
                else:
                    new = _extended(w_IcO, b_cO, dims[i] - len(kept[i]), kept[i], kept[i + 1], dims[i + 1], generator)
                set_affine(linear, new[0].flatten(1), None if new[1] is None else new[1].flatten())
            if layer.norm:
                norm = module.get_submodule(layer.norm)
                assert isinstance(norm, nn.BatchNorm1d)
                _resize_norm(norm, kept[i + 1][:0] if fresh else kept[i + 1], dims[i + 1])

    def _kept(self, module: nn.Module, dims: tuple[int, ...]) -> list[Tensor]:
        """Return the indices of the units that are kept, in their order, of the input, each layer and the output."""
        kept = [torch.arange(min(before, after)) for before, after in zip(self.dims, dims, strict=True)]
        for i, (above, below) in enumerate(pairwise(self.layers), start=1):
            if dims[i] < self.dims[i]:
                sizes = [affine(module.get_submodule(name))[0].norm(dim=1) for name, _ in below.linears]
                for name, count in above.linears:
                    sizes += affine(module.get_submodule(name))[0].norm(dim=0).unflatten(0, (count, -1))
                largest = torch.stack(sizes).prod(0).topk(dims[i]).indices
                kept[i] = largest.sort().values
        return kept


def _drawn(
    w_IcO: Tensor, b_cO: Tensor | None, into: int, out: int, generator: torch.Generator
) -> tuple[Tensor, Tensor | None]:
    """Return a matrix (into, c, out) and bias (c, out) initialized as ``nn.Linear``: U(-1/sqrt(into), 1/sqrt(into))."""
    count, bound = w_IcO.shape[1], 1 / math.sqrt(into)
    w = torch.empty(into, count, out).uniform_(-bound, bound, generator=generator).to(w_IcO)
    if b_cO is None:
        return w, None
    return w, torch.empty(count, out).uniform_(-bound, bound, generator=generator).to(b_cO)


def _extended(
    w_IcO: Tensor,
    b_cO: Tensor | None,
    added_in: int,
    rows: Tensor,
    columns: Tensor,
    out: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor | None]:
    """Return the matrix (in, c, out) and bias (c, out) of the units that stay and of added ones.

    Args:
        w_IcO, b_cO: matrix and bias, of which there are c side by side.
        added_in: number of added units that the matrix reads, by zeros.
        rows, columns: indices of the units that stay, of those that it reads and of those that it makes.
        out: number of units that it makes.
        generator: of the CPU, for the columns of added units.
    """
    rows, columns = rows.to(w_IcO.device), columns.to(w_IcO.device)
    R, C, count = len(rows), len(columns), w_IcO.shape[1]
    w = w_IcO.new_zeros(R + added_in, count, out)
    w[:R, :, :C] = w_IcO[rows][:, :, columns]
    # The root mean square is defined for one number too, unlike the standard deviation.
    size = w_IcO.float().square().mean().sqrt()
    w[:R, :, C:] = torch.randn(R, count, out - C, generator=generator).to(w) * size.to(w.dtype)
    if b_cO is None:
        return w, None
    b = b_cO.new_zeros(count, out)
    b[:, :C] = b_cO[:, columns]
    return w, b


def _resize_norm(norm: nn.BatchNorm1d, kept: Tensor, width: int) -> None:
    """Give a batch norm another width, in place; units that are not kept start as in a new norm."""
    norm.num_features = width
    for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
        old = getattr(norm, name)
        new = old.new_full((width,), start)
        new[: len(kept)] = old[kept.to(old.device)]
        setattr(norm, name, nn.Parameter(new) if isinstance(old, nn.Parameter) else new)


def hidden_units(module: nn.Module, part: FeedForwardPart) -> HiddenUnits:
    """Return the layers of a module that make its network's hidden units.

    Args:
        module: the module.
        part: a reader's result for this very module: its tensors are views of the module's.

    Raises:
        ValueError: the network has no hidden units, or one of its matrices is neither a linear layer's in the module
            nor half of one.
    """
    if isinstance(part.expert, MLP):
        names = [[f"w_{i}"] for i in range(len(part.expert.hidden_dims))]
    elif {"w_in", "w_out"} <= set(part.weights):
        names = [[name for name in ("w_in", "w_gate") if name in part.weights], ["w_out"]]
    else:
        raise ValueError(f"{type(part.expert).__name__} has no w_in and w_out, whose hidden units could be more")
    if len(names) == 1:
        raise ValueError("it is one linear layer, which has no hidden units")
    layers = []
    for i, matrices in enumerate(names):
        linears = tuple(dict.fromkeys(_linear_of(module, name, part.weights[name]) for name in matrices))
        norm = _norm_of(module, part.weights.get(f"norm_weight_{i}"))
        biases = sum(count for name, count in linears if affine(module.get_submodule(name))[1] is not None)
        layers.append(UnitLayer(linears, norm, biases + 2 * bool(norm)))
    known = {f"{kind}{name[1:]}" for matrices in names for name in matrices for kind in "wb"}
    other = [name for name in part.weights if name not in known and not name.startswith(("norm_", "running_"))]
    if other or sum(layer.num_matrices for layer in layers) != sum(map(len, names)):
        raise ValueError(f"a {type(module).__name__} has weights besides those of its hidden units")
    dims = (part.dim, *(part.weights[matrices[0]].shape[1] for matrices in names))
    return HiddenUnits(tuple(layers), dims)


def _linear_of(module: nn.Module, name: str, matrix: Tensor) -> tuple[str, int]:
    """Return the dotted name of the linear layer that a matrix is a view of, and how many such matrices it holds.

    Raises:
        ValueError: there is none.
    """
    for child_name, child in module.named_modules():
        if is_linear(child) and "weight" in child._parameters:
            w = affine(child)[0]
            for count in (1, 2):
                if any(_is_same_view(matrix, half) for half in w.chunk(count, 1)):
                    return child_name, count
    raise ValueError(f"{name} of a {type(module).__name__} is no matrix of a linear layer in it, which could be wider")


def _norm_of(module: nn.Module, weight: Tensor | None) -> str:
    norms = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.BatchNorm1d))
    return "" if weight is None else next(name for name, m in norms if _is_same_view(weight, m.weight))


def _is_same_view(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are the same numbers in memory. ``Tensor.is_set_to`` rejects the meta device."""
    same_storage = storage_id(a) == storage_id(b)
    return same_storage and (a.storage_offset(), a.shape, a.stride()) == (b.storage_offset(), b.shape, b.stride())
