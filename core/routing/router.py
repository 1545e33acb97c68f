"""``Router`` and ``RouterConfig``: the bases of every router, and of the configs that build them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import Routing, RoutingContext, span
from ..contract.checks import at_most_experts, clean_ids
from ..fields import Count, Positive
from ..kernels.eager import outside_autocast
from ..registry import OpenConfig
from .gates import LinearGate, widened
from .selection import Capacity, Choice, select_pairs


@dataclass(frozen=True)
class Tokens:
    """The tokens of a call in float32 with their context: all that a gate sees.

    Attributes:
        x_TD: float32 (T, D), T = B * S; padding is zero.
        num_sequences: B.
        length: S.
        valid_T: bool (T,), False for padding; None if every token is real.
        context: the context that the layer got, or an empty one.
        kept_TD: (T, D), the tokens in half precision if they came in it and a backward follows; else None.
    """

    x_TD: Tensor
    num_sequences: int
    length: int
    valid_T: Tensor | None
    context: RoutingContext
    kept_TD: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, context: RoutingContext | None) -> Tokens:
        """Return the flattened tokens of ``x`` (B, S, D), with padding cleared."""
        context = RoutingContext() if context is None else context
        x_TD = x.flatten(0, 1)
        valid_T = None if context.valid_BS is None else context.valid_BS.flatten()
        if valid_T is not None:
            # Padding may hold anything, NaN too; a masked gradient would not stop 0 * NaN.
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0.0)
        x_TD, kept_TD = widened(x_TD)
        return cls(x_TD, x.shape[0], x.shape[1], valid_T, context, kept_TD)

    def logits(self, gate: nn.Module) -> Tensor:
        """Return the logits that a gate computes from the tokens, (T, E)."""
        kept = (self.kept_TD,) if self.kept_TD is not None and isinstance(gate, LinearGate) else ()
        return gate(self.x_TD, *kept)  # type: ignore[no-any-return]

    @property
    def real_T(self) -> Tensor:
        """bool (T,), True for non-padding tokens."""
        if self.valid_T is not None:
            return self.valid_T
        return torch.ones(self.x_TD.shape[0], dtype=torch.bool, device=self.x_TD.device)

    def ids(self, name: str, size: int) -> Tensor:
        """Return a field of the context that the router needs, int64 (B, S) or (B,) as its name ends; 0 for padding.

        Args:
            name: name of the field.
            size: number of ids, which are in ``range(size)``.

        Raises:
            ValueError: the field has another shape or no integers, or, on CPU, an id of a real token is out of range.
                On a GPU and in compiled code nothing is read back: there the indexing kernel stops.
        """
        of_sequences = (self.num_sequences, self.length)
        return clean_ids(getattr(self.context, name), name, size, of_sequences, self.valid_T)

    def to_tokens(self, value_B: Tensor) -> Tensor:
        """Repeat (B, ...) values of the sequences for each of their tokens: (T, ...)."""
        return value_B.unsqueeze(1).expand(-1, self.length, *value_B.shape[1:]).flatten(0, 1)

    def mean_of_sequences(self) -> Tensor:
        """Return the mean of the non-padding tokens of each sequence, (B, D); zero where it has none."""
        x_BSD = self.x_TD.unflatten(0, (self.num_sequences, self.length))
        if self.valid_T is None:
            return x_BSD.sum(1) / max(self.length, 1)
        count_B = self.valid_T.unflatten(0, (self.num_sequences, self.length)).sum(1).clamp_min(1)
        return x_BSD.sum(1) / count_B[:, None]


class Router(nn.Module):
    """Base of all routers: ``router(x_BSD, context)`` decides which expert computes which token.

    Attributes:
        capacity: limits of the experts' loads, replaced by ``set_capacity_factor``.
        terms: names of the balance terms that apply.
        needs: fields of ``RoutingContext`` without which the router cannot decide.
        gates_on: side of the experts that the gates scale, "output" or "input".
        extra_weights: weights of ``Evidence.extra`` by name; the names are among ``terms`` too.
        backend: name of the kernels that choose and count.
        expert_dropout: probability in training that a token cannot choose an expert, if ``drops_experts`` says that
            the router heeds it; ``MoEConfig.build`` sets it.
        expert_bias: float32 (E,) buffer added to the scores for the choice only, or None.
        num_counts: length of ``Evidence.counts`` if ``after_counts`` reads them, else 0.
    """

    capacity: Capacity = Capacity()
    terms: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()
    gates_on: str = "output"
    backend: str = "auto"
    expert_dropout: float = 0.0
    extra_weights: Mapping[str, float] = MappingProxyType({})
    expert_bias: Tensor | None
    num_counts: int = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expert_bias", None)
        self._read: tuple[int, int] | None = None

    def reset_parameters(self) -> None:
        """Set the router's own parameters and buffers to their initial values, in place; the gate resets its own."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def _is_unread(self, buffer: Tensor) -> bool:
        """Return whether a buffer was replaced or written to since the last call, so that its value on the host is out
        of date. Compiled code keeps the value that was read before."""
        if torch.compiler.is_compiling() or buffer.is_meta or buffer.is_inference():
            return False
        before, self._read = self._read, (id(buffer), buffer._version)
        return before != self._read

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Any:
        """Decide which expert computes which token.

        Args:
            x: (B, S, D) tokens.
            context: their routing context; ``valid_BS`` marks the real ones.

        Raises:
            ValueError: the context lacks a field that the gate needs.
        """
        raise NotImplementedError

    def check_context(self, context: RoutingContext | None) -> None:
        """Raise a ``ValueError`` if the context lacks a field that this router reads."""
        for name in self.needs:
            if context is None or getattr(context, name) is None:
                raise ValueError(f"{type(self).__name__} needs context.{name}, which is None")

    def update_expert_bias(self, chosen_per_expert_E: Tensor) -> None:
        """Move the selection bias by one step; a router without one does nothing."""

    def moving_weights(self) -> dict[str, Tensor]:
        """Return the weights of losses of the router's own that move between steps, float32 () buffers by name; the
        names are among ``extra_weights`` too."""
        return {}

    def after_counts(self, counts: Tensor) -> None:
        """Update what follows the step's counts: ``Evidence.counts`` (num_counts,), added up over passes and ranks."""

    def after_step(self) -> None:
        """Update annealed values; ``core.update_expert_bias`` calls it once per optimizer step, in training."""


class PairRouter(Router):
    """Base of the routers that choose experts for each token. A gate is one method, ``choose``.

    This class does padding, capacity, priority and counting in one way for all of them.

    Attributes:
        num_experts, config, capacity: the arguments of the config's ``build``.
        gate: the module that computes logits from tokens, made by ``RouterConfig.make_gate``, if there is one.
    """

    gate: nn.Module

    def __init__(self, dim: int, num_experts: int, config: RouterConfig, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config, self.capacity = num_experts, config, capacity
        self.extra_weights, self.needs = config.extra_weights, config.needs
        self.terms = config.terms | frozenset(self.extra_weights)
        gate = config.make_gate(dim, num_experts)
        if gate is not None:
            self.gate = gate

    def choose(self, tokens: Tokens) -> Choice:
        """Return the experts and gates of each token; padding may be given any. It runs outside autocast."""
        raise NotImplementedError

    @span("moe.router")
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        self.check_context(context)
        with outside_autocast(x.device):
            tokens = Tokens.of(x, context)
            return select_pairs(
                self.choose(tokens),
                num_experts=self.num_experts,
                num_sequences=tokens.num_sequences,
                valid_T=tokens.valid_T,
                limit=self.capacity,
                training=self.training,
                backend=self.backend,
            )


LAYER_OPTIONS = frozenset({"capacity_factor", "eval_capacity_factor", "priority", "backend"})
"""Fields of ``MoEConfig`` that have a meaning with some routers alone."""


def _with_paper(method: Callable[..., None]) -> Callable[..., None]:
    """Return a check of a config whose ``ValueError`` also names the config and its paper."""

    @functools.wraps(method)
    def checked(self: RouterConfig, *args: Any) -> None:
        try:
            method(self, *args)
        except ValueError as error:
            if not self.paper or self.source() in str(error):
                raise
            raise ValueError(f"{error}; {self.source()}") from None

    return checked


@dataclass(frozen=True)
class RouterConfig(OpenConfig):
    """Base of the router configs. A subclass is a frozen dataclass of options, with its facts and its costs.

    It raises a ``ValueError`` for an option that is out of its range, and for options that do not go together.
    """

    paper: ClassVar[str] = ""
    """arXiv number of the method's paper; the config's error messages end with it."""
    router_class: ClassVar[type[Any]]
    """The router, which is called with ``(dim, num_experts, config, capacity)``."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("__post_init__", "check", "check_group"):
            if name in vars(cls):
                setattr(cls, name, _with_paper(vars(cls)[name]))

    @_with_paper
    def __post_init__(self) -> None:
        super().__post_init__()

    def source(self) -> str:
        """Return name and paper, for messages."""
        return f"{type(self).__name__}{f' (arXiv {self.paper})' if self.paper else ''}"

    def build(self, dim: int, num_experts: int, capacity: Capacity | None = None) -> Router:
        """Return the router for tokens of width ``dim``.

        Args:
            dim: D.
            num_experts: E.
            capacity: limits of the experts' loads; None: no limits.

        Raises:
            ValueError: the router cannot work with this many experts.
        """
        self.check(num_experts)
        return self.router_class(dim, num_experts, self, capacity or Capacity(group=self.default_group))

    def resized(self, num_experts: int) -> RouterConfig:
        """Return the config with which the router works after its layer has grown or shrunk to so many experts."""
        return self

    def make_gate(self, dim: int, num_experts: int) -> nn.Module | None:
        """Return the module ``gate`` of a ``PairRouter``, or None if it has no gate."""
        return None

    def check(self, num_experts: int) -> None:
        """Raise a ``ValueError`` if the router cannot work with this many experts."""

    def check_group(self, group: str | int) -> None:
        """Raise a ``ValueError`` if the router cannot work within such groups."""

    # Facts of the router, which are asked before one is built. A subclass states a fact as a class variable, or as a
    # property where it depends on the options. ``core.testing`` derives its checks from them.

    @property
    def is_causal(self) -> bool:
        """True if a later token never changes an earlier one's output, capacity aside, as a causal decoder needs.
        It is also False if this fails only in training."""
        return True

    @property
    def depends_on(self) -> str:
        """The tokens that decide a token's experts in evaluation, capacity aside: "token", only the token itself with
        its context; "sequence", all tokens of its sequence; "batch", all tokens of the call."""
        return "token" if self.is_causal else "sequence" if self.default_group == "sequence" else "batch"

    @property
    def reads_position(self) -> bool:
        """True if a token's place in its sequence decides its experts."""
        return False

    @property
    def reads_batch_index(self) -> bool:
        """True if a sequence's place in the batch decides its experts."""
        return False

    @property
    def decodes_stepwise(self) -> bool:
        """True if a token by itself, its prefix computed before, takes the experts it has in the sequence."""
        return self.depends_on == "token" and not (self.reads_position or self.reads_batch_index)

    @property
    def has_exact_gradient(self) -> bool:
        """True if the gradient is the derivative of the output, and none is stopped or passes straight through a
        step."""
        return True

    @property
    def moves_statistics(self) -> bool:
        """True if a forward in training moves running statistics, as batch norm does."""
        return False

    @property
    def repeats_experts(self) -> bool:
        """True if a token may take an expert twice, as by two heads."""
        return False

    @property
    def needs(self) -> tuple[str, ...]:
        """The fields of ``RoutingContext`` without which the router cannot decide."""
        return ()

    @property
    def terms(self) -> frozenset[str]:
        """The names of the balance terms that apply."""
        return frozenset()

    @property
    def extra_weights(self) -> dict[str, float]:
        """The weights of the losses that the gate itself leaves in ``Evidence.extra``, by name."""
        return {}

    @property
    def default_group(self) -> str | int:
        """The group in which tokens compete for capacity if the layer's config does not name one."""
        return "batch"

    @property
    def layer_kind(self) -> str:
        """The kind of layer that carries the decision out: "pairs" (``MoE``), "slots" (``SoftMoE``), "merged"
        (``MergedMoE``) or "averaged" (``AveragedMoE``: pairs in training, one merged expert in evaluation)."""
        return "pairs"

    @property
    def layer_options(self) -> frozenset[str]:
        """The ``LAYER_OPTIONS`` that have a meaning with this router; ``MoEConfig`` rejects the others."""
        return LAYER_OPTIONS

    @property
    def drops_experts(self) -> bool:
        """True if ``MoEConfig.expert_dropout`` has a meaning: only the logits decide, and the router masks them by
        ``top_k.without_some``."""
        return False

    @property
    def can_grow(self) -> bool:
        """True if each row of the gate belongs to exactly one expert, so that ``core.grow_experts`` can add rows and
        leave the others' logits as they are: not if a table, a code or the other experts decide."""
        return True

    @property
    def can_shrink(self) -> bool:
        """True if the logits of an expert can be taken away and leave the others' as they are, so that
        ``core.prune_experts`` can."""
        return self.can_grow

    def constant_gates(self, num_experts: int) -> tuple[float, ...] | None:
        """Return the gate of each expert if every token has the same gates in evaluation, capacity aside; None if they
        may differ."""
        return None

    # Costs.

    def pairs_per_token(self, num_experts: int) -> float:
        """Return how many experts compute a token, before capacity."""
        raise NotImplementedError

    def rows_per_token(self, num_experts: int, tokens_per_group: int | None) -> float:
        """Return how many rows the experts compute for a token, before capacity; their FLOPs are in proportion.

        Raises:
            ValueError: the number depends on ``tokens_per_group``, which is None.
        """
        return self.pairs_per_token(num_experts)

    def layer_flops_per_token(
        self, dim: int, out_dim: int, num_experts: int, params_per_expert: int, tokens_per_group: int | None
    ) -> float:
        """Return the FLOPs of sums over slots or of merging parameters, which neither router nor experts count.

        Raises:
            ValueError: they depend on ``tokens_per_group``, which is None.
        """
        return 0.0

    def num_params(self, dim: int, num_experts: int) -> int:
        return 0

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        """Return the FLOPs of the router in an evaluation forward."""
        return 0


class FixedKConfig(RouterConfig):
    """Base of the configs whose tokens take ``top_k`` experts each, before capacity.

    Attributes:
        top_k: experts per token, K.
    """

    top_k: Count

    def check(self, num_experts: int) -> None:
        at_most_experts("top_k", self.top_k, num_experts)

    def pairs_per_token(self, num_experts: int) -> float:
        return float(self.top_k)


class LinearGateConfig(RouterConfig):
    """Base of the configs whose router has a linear gate, ``logits = x W^T`` with W (E, D): its costs are the gate's.

    Attributes:
        init_scale: variance of the gate's initial weights times D.
    """

    init_scale: Positive

    def make_gate(self, dim: int, num_experts: int) -> nn.Module:
        return LinearGate(dim, num_experts, self.init_scale)

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * num_experts

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * dim * num_experts
