"""Base of the experts and of their configs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from ..contract import Rows, span
from ..kernels import AdaptedWeight, QuantizedWeight, check_devices
from ..registry import OpenConfig
from .matrices import QuantizedMatrices

HIDDEN = "hidden"
"""Name of the axis of a mesh along which the hidden units of each expert are sharded."""
CHILD = "lora"
"""The name under which a module has its low-rank adapters."""
COMMON = "common"
"""The name under which experts have parameters that all of them share, the one kind that is not stacked."""
Way = Literal["rows", "dense", "each", "merged", "queries", "outputs"]


class ExpertCache(Protocol):
    """Cache between experts and parameters that are stored elsewhere, such as on a disk."""

    def compute(self, experts: Experts, x: Any, way: Way, args: tuple[Any, ...]) -> Any:
        """Compute as ``Experts.forward`` does."""

    def check(self, experts: Experts) -> None:
        """Raise a ``ValueError`` if the parameters differ from the stored ones."""

    def apply(self, experts: Experts, fn: Callable[[Tensor], Tensor]) -> None:
        """Do what ``nn.Module._apply`` would do to the parameters."""


class Experts(nn.Module):
    """Base of all experts. A layer asks them in one of these ways, always by a call, so that hooks run (FSDP2's too):

        experts(rows)                           rows sorted by expert, computed
        experts(x, "dense")                     every token through every expert, summed: shared experts
        experts(x, "each", counts, real_T)      every token through each expert: layers of several gates
        experts(x, "merged", weights_GE)        groups of tokens through an expert of weighted parameters
        experts(rows, "queries"), "outputs"     the matmuls before and after attention: only ``AttentionHeads``

    A subclass sets ``num_experts`` and writes ``compute_rows``; the base class does "dense" by "each" and "each" by
    rows, which a subclass may do better, and cannot do "merged" for it. See ``FFNExperts``. A class that overrides
    ``forward`` is a ``ValueError``.

    Every parameter and buffer is *stacked*: its first axis counts the experts; those below ``common`` are of all of
    them, and such experts are not split over ranks. One that is split over ranks is a
    ``DTensor`` sharded along that axis; its local experts are the rows that this process holds, numbered from 0. Who
    starts, converts or stores experts uses ``init_each``, ``weights_of`` and ``num_local_experts``, and no parameter's
    name.

    Attributes:
        num_experts: E, of all ranks.
        backend: kernels that compute; a layer sets it (``MoELayer.backend``).
        cache: computes instead of the experts if their parameters are stored elsewhere (``core.offload_experts``);
            None: they compute by themselves. A copy or pickle of the experts has none.
    """

    num_experts: int
    backend: str = "auto"
    cache: ExpertCache | None = None
    takes_index: ClassVar[bool] = False
    """``compute_rows`` reads the token of each row by ``row_index_R``; others are given rows that are copies."""
    reads_context: ClassVar[bool] = False
    """``compute_rows`` reads ``rows.of_context(...)``: such experts are for an ``MoE`` alone, whose rows are tokens."""
    starts_alike: ClassVar[bool] = False
    """Experts share parameters and start as one by design, so that it is no fault where they put out the same."""
    hidden_axes: ClassVar[Mapping[str, int]] = MappingProxyType({})
    """The axis of hidden units in each stacked tensor that has one, where an expert is a sum over hidden units: several
    experts side by side are then one wider expert. Empty where they are not."""
    linear_in: ClassVar[frozenset[str]] = frozenset()
    """The stacked tensors in which, taken together, the output is linear: scaled by a gate, they scale the output."""
    shown: ClassVar[tuple[str, ...]] = ()
    """Attributes that a print of a model shows beside the shapes of the experts' tensors."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.forward is not Experts.forward:
            raise ValueError(
                f"{cls.__name__} overrides forward, which has the checks of all experts: write compute_rows instead, "
                "or the compute_... method of another way"
            )

    @span("moe.experts")
    def forward(self, x: Any, way: Way = "rows", *args: Any) -> Any:
        """Compute in one of the ways: ``Rows`` to ``Rows``, tokens to tokens.

        Raises:
            ValueError: a parameter is on another device than the tokens, rows are sorted by another number of experts
                than are here, a way that takes tokens meets experts that are split over ranks, or experts that read
                the context do not get one.
        """
        of_rows, local = isinstance(x, Rows), self.num_local_experts
        tokens = x.x if of_rows else x
        if self.cache is None:
            for tensors in (self._parameters, self._buffers):
                check_devices(tokens, type(self).__name__, tensors)
            for name, matrices in self._quantized().items():
                check_devices(tokens, f"{type(self).__name__}.{name}", matrices._buffers)
        if of_rows and x.offsets_E.shape[0] != local:
            raise ValueError(f"rows are sorted by {x.offsets_E.shape[0]} experts, and {local} are here")
        if not of_rows and local != self.num_experts:
            raise ValueError(f"{local} of {self.num_experts} experts are here: they compute rows alone, not {way!r}")
        if self.reads_context and (not of_rows or x.context is None):
            raise ValueError(
                f"{type(self).__name__} reads the context of each token, which this layer does not hand on"
            )
        if self.cache is not None:
            return self.cache.compute(self, x, way, args)
        if of_rows and not self.takes_index:
            x = x.materialized()
        return getattr(self, f"compute_{way}")(x, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        if self.cache is None:
            super()._apply(fn, recurse)
            return self
        self.cache.apply(self, fn)
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.cache is not None:
            self.cache.check(self)
        return {**self.__dict__, "cache": None}

    def _save_to_state_dict(self, *args: Any) -> None:
        if self.cache is not None:
            self.cache.check(self)
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        if self.cache is not None:
            raise ValueError("offloaded experts take no other weights: load them before core.offload_experts")
        super()._load_from_state_dict(*args)

    def compute_rows(self, rows: Rows) -> Rows:
        """Return the rows computed.

        A subclass reads ``rows.x``, (R, D) rows sorted by expert, and ``rows.offsets_E``, and returns
        ``rows.with_output(y_RD)``: the dispatcher weights and sums. One that ``takes_index``, as ``FFNExperts``, may
        get (T, D) tokens with an index into them, and may weight and sum by itself.
        """
        raise NotImplementedError

    @property
    def num_local_experts(self) -> int:
        """Number of experts whose parameters this process holds; experts without parameters of their own are all here.

        Under FSDP2 it is the shard's between the calls, and all of them inside one.
        """
        first = next((p for p in self._parameters.values() if p is not None), None)
        if first is not None:
            return local_tensor(first).shape[0]
        return next((matrices.shape[0] for matrices in self._quantized().values()), self.num_experts)

    @property
    def is_stacked(self) -> bool:
        """Whether the first axis of every parameter counts the experts; in some adopted blocks it does not."""
        return True

    @property
    def is_quantized(self) -> bool:
        """Whether ``core.quantize_experts`` has quantized the matrices. They are frozen, and pass gradients on."""
        return bool(self._quantized())

    def _quantized(self) -> dict[str, QuantizedMatrices]:
        """Return the quantized matrices by the names that their parameters had."""
        return {name: m for name, m in self._modules.items() if isinstance(m, QuantizedMatrices)}

    def weights_of(self, e: int) -> dict[str, Tensor]:
        """Return the parameters and buffers of local expert ``e`` by name, as views: writing to one changes the expert.

        Raises:
            ValueError: ``e`` is not in ``range(num_local_experts)``.
        """
        if not 0 <= e < self.num_local_experts:
            raise ValueError(f"expert {e} is not in range(num_local_experts={self.num_local_experts})")
        return {name: local_tensor(t)[e] for name, t in (*self.named_parameters(), *self.named_buffers())}

    def adapter_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Return (E, in, out) of each stacked matrix that may have low-rank adapters, by its key; {}: none may."""
        return {}

    def add_to(self, key: str, update: Tensor) -> None:
        """Add an update (E, in, out) to the matrix of that key, in place."""
        local_tensor(getattr(self, key)).add_(update)

    def quantizable(self) -> dict[str, Tensor]:
        """Return the stacked matrices (E, in, out) that ``core.quantize_experts`` replaces, by name."""
        return {name: p for name, p in self._parameters.items() if p is not None and p.ndim == 3}

    def put_quantized(self, name: str, weight: QuantizedWeight) -> None:
        """Replace one of ``quantizable``. The experts' other parameters train no more either, but for adapters."""
        delattr(self, name)  # a parameter gives its name to no module
        self.register_module(name, QuantizedMatrices(weight))
        for parameter in self._without_adapters():
            parameter.requires_grad_(False)

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        """Start every local expert's matrices by ``fn``, each by itself, and its biases at zero.

        Matrices are called for in the order of the parameters, each for all experts in turn: ``w_in`` of expert 0, of
        expert 1, ..., then ``w_out`` of expert 0, and so on. Norms and adapters stay as they are.

        Args:
            fn: fills one (in, out) matrix in place, as ``nn.init.xavier_uniform_`` does; gradients are off. That layout
                is the transpose of ``nn.Linear``'s: a function that only uses ``fan_in`` has to take
                ``mode="fan_out"``.

        Example::

            for module in model.modules():  # routed and shared experts, layer by layer
                if isinstance(module, core.Experts):
                    module.init_each(nn.init.xavier_uniform_)

        Raises:
            ValueError: the experts are quantized.
        """
        if self.is_quantized:
            raise ValueError(f"{type(self).__name__} are quantized and cannot be initialized: fill them before")
        with torch.no_grad():
            for parameter in self._without_adapters():
                if parameter.ndim >= 3 and not parameter.is_meta:
                    for matrix in local_tensor(parameter):
                        fn(matrix)
            for bias in self.biases():
                local_tensor(bias).zero_()

    def _without_adapters(self) -> Iterator[nn.Parameter]:
        """Yield the experts' parameters but for those of their adapters."""
        return (p for name, p in self.named_parameters() if not name.startswith(f"{CHILD}."))

    def biases(self) -> list[Tensor]:
        """Return the stacked parameters that ``init_each`` sets to zero: none, unless a subclass says so."""
        return []

    def compute_dense(self, x: Tensor) -> Tensor:
        """Return the sum over all experts for every token: (..., D) to (..., D_out)."""
        y_TnD: Tensor = self.compute_each(x.flatten(0, -2))
        return y_TnD.sum(1).unflatten(0, x.shape[:-1])

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        """Return the output of each expert for every token, not summed. This one computes rows that are copies.

        Args:
            x: (T, D); with ``counts`` (G, T, D), G inputs of the same T tokens.
            counts: how many experts take each input: the first ``counts[0]`` of them input 0, the next ``counts[1]``
                input 1, and so on. Their sum n may be below E: the last experts are left out. None: all take ``x``.
            real_T: bool (T,), False for padding, which is zero in ``x``: for experts that gather statistics.

        Returns:
            (T, n, D_out).
        """
        E = self.num_experts
        counts, x_GTD = (E,) if counts is None else counts, x if x.ndim == 3 else x.unsqueeze(0)
        if real_T is not None and any(True for _ in self.buffers()):
            # Padding is not there at all.
            kept = real_T.nonzero()[:, 0]
            y_TnD = Experts.compute_each(self, x_GTD.index_select(1, kept), counts)
            return y_TnD.new_zeros(x_GTD.shape[1], *y_TnD.shape[1:]).index_copy(0, kept, y_TnD)
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
        return self.compute_rows(rows).x.unflatten(0, (n, T)).transpose(0, 1)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return each group of tokens after one expert, whose parameters are a weighted sum over all E experts.

        Args:
            x: (G, S, D), tokens by group.
            weights: float32 (G, E), the share of each expert.

        Returns:
            (G, S, D_out).
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged: it has no method `compute_merged`")

    def extra_repr(self) -> str:
        shapes = {name: tuple(p.shape[1:]) for name, p in self._parameters.items() if p is not None}
        options = {name: getattr(self, name) for name in (*self.shown, "backend")}
        shown = {"num_experts": self.num_experts, **shapes, **options}
        return ", ".join(f"{name}={value}" for name, value in shown.items())


@dataclass(frozen=True)
class ExpertConfig(OpenConfig):
    """Base of the expert configs: a subclass is a frozen dataclass with ``build`` and the costs of one expert.

    Attributes:
        layer_kind: "rows": experts compute each row by itself, whatever the layer. Experts that need more than a row,
            such as attention, name a kind of their own, whose layers are listed in ``core.config.LAYERS``.
        is_causal: False where an expert shows a token those after it, so that no causal decoder can have it.
    """

    layer_kind: ClassVar[str] = "rows"
    is_causal: ClassVar[bool] = True
    follows_base: ClassVar[bool] = False
    """In ``core.add_adapters`` the experts take the frozen layer's output; others take its input and are added."""

    def check(self, num_experts: int) -> None:
        """Raise a ``ValueError`` if there cannot be this many experts."""

    def of_each(self, num_experts: int) -> tuple[ExpertConfig, ...]:
        """Return the config of each expert: this one, unless their kinds are mixed."""
        return (self,) * num_experts

    def narrowed(self, times: int, dim: int | None = None) -> ExpertConfig:
        """Return experts of a ``times``-th of the hidden width, for ``MoEConfig.granularity``.

        Args:
            times: g, the factor that the width shrinks by.
            dim: D of the tokens; None: a width that depends on it stays as it is.

        Raises:
            ValueError: ``times`` does not divide the width, or these experts have none.
        """
        own: Any = self
        if not hasattr(self, "hidden_dim"):
            raise ValueError(f"granularity={times} divides hidden_dim, which {type(self).__name__} does not have")
        if dim is None and own.hidden_dim is None:
            return self
        hidden = own.hidden(dim or 0)
        if hidden % times:
            raise ValueError(f"granularity={times} does not divide hidden_dim={hidden} of {type(self).__name__}")
        return replace(own, hidden_dim=hidden // times)  # type: ignore[no-any-return]

    @property
    def tokens_per_row(self) -> int:
        """The tokens that make a row: the unit that the router decides on, and an expert takes. 1, but for patches."""
        return 1

    def row_dim(self, dim: int) -> int:
        """Return the width of a row of tokens of width ``dim``, which is the router's dim."""
        return self.tokens_per_row * dim

    def rows_per_sequence(self, num_tokens: int) -> int:
        """Return the rows that a sequence of so many tokens makes.

        Raises:
            ValueError: so many tokens do not make whole rows.
        """
        return num_tokens

    def layer_arguments(self) -> dict[str, Any]:
        """Return the layer's constructor arguments that ``MoE`` does not have."""
        return {}

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> Experts:
        raise NotImplementedError

    def out_dim(self, dim: int) -> int:
        """Return the width of the output if the layer does not ask for another one."""
        return dim

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the parameters of one expert."""
        raise NotImplementedError

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        """Return the forward FLOPs of one expert on one row, two a multiply-add; activations are not counted.

        Each parameter multiplies one number of the row, unless a subclass says more.
        """
        return 2 * self.num_params(dim, out_dim)

    def layer_params(self, dim: int) -> int:
        """Return the parameters that all experts of a layer share, such as the key and value projections."""
        return 0

    def layer_flops_per_token(self, dim: int, rows_per_token: float, tokens_per_sequence: int | None) -> float:
        """Return the forward FLOPs per token of the parameters that the experts of a layer share.

        Args:
            dim: D.
            rows_per_token: experts that a token takes, before capacity.
            tokens_per_sequence: S.

        Raises:
            ValueError: they depend on ``tokens_per_sequence``, which is None.
        """
        return 0.0


def num_params(module: nn.Module) -> int:
    """Return the parameters of a module. A ``DTensor`` counts in full, a quantized matrix as the numbers that it
    encodes."""
    matrices = (m for m in module.modules() if isinstance(m, QuantizedMatrices))
    return sum(p.numel() for p in module.parameters()) + sum(m.numel() for m in matrices)


def check_no_adapters(experts: Experts) -> None:
    """Raise a ``ValueError`` if experts have low-rank adapters, whose factors are no matrices to convert."""
    if any(CHILD in module._modules for module in experts.modules()):
        raise ValueError(f"{type(experts).__name__} have adapters: core.merge_adapters merges them before")


def check_merges(experts: Experts) -> None:
    """Raise a ``ValueError`` if no expert can have the mean parameters: no ``compute_merged``, adapters, statistics."""
    name = type(experts).__name__
    check_no_adapters(experts)
    if type(experts).compute_merged is Experts.compute_merged:
        raise ValueError(f"{name} cannot be merged: it has no method compute_merged")
    if any(True for _ in experts.buffers()):
        raise ValueError(f"{name} with statistics of its tokens cannot be merged: a mean has none")


def local_tensor(t: Any) -> Any:
    """Return the part of a stacked tensor that this process holds: of a ``DTensor`` its shard, else the whole.

    ``QuantizedMatrices`` give the kernels' inputs, and adapted weights a local base.

    Raises:
        ValueError: the shard is cut along another axis than the expert axis, so that no expert is whole; but for a mesh
            that divides hidden units.
    """
    if t is None or type(t) is nn.Parameter:
        return t
    if isinstance(t, QuantizedMatrices):
        return t.weight
    if isinstance(t, AdaptedWeight):
        return replace(t, base=local_tensor(t.base))  # its updates are local
    if not hasattr(t, "to_local"):
        return t
    placements, mesh = getattr(t, "placements", ()), getattr(t, "device_mesh", None)
    names = getattr(mesh, "mesh_dim_names", None) or ()
    meant = [bool(names) and names[i] == HIDDEN for i in range(len(placements))]
    axes = [p.dim for p, is_meant in zip(placements, meant, strict=True) if p.is_shard() and not is_meant]
    if any(axes):
        raise ValueError(f"a tensor of experts of shape {tuple(t.shape)} is sharded along axis {max(axes)}, not 0")
    return t.to_local()
