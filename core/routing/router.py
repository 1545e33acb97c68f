"""``Router``: gate, selection and balance terms put together, and the configs that build routers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import Evidence, Routing, RoutingContext, check_kinds
from ..kernels import topk_gate
from ..kernels.eager import outside_autocast
from ..registry import OpenConfig
from .balance import SCORE_TERMS, Balance, expert_bias_step
from .checks import at_least_one, at_most_experts
from .gates import LinearGate, NoisyGate, widened
from .selection import Capacity, Choice, select_pairs


@dataclass(frozen=True)
class Tokens:
    """What a gate sees: all tokens of a call in float32, with what is known beside them.

    Attributes:
        x_TD: float32 (T, D), T = B * S; padding is zero.
        num_sequences: B.
        length: S.
        valid_T: bool (T,), False for padding; None where every token is real.
        context: as the layer got it, or an empty one.
        kept_TD: (T, D), the tokens in half precision where a backward follows and they are in it; else None.
    """

    x_TD: Tensor
    num_sequences: int
    length: int
    valid_T: Tensor | None
    context: RoutingContext
    kept_TD: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, context: RoutingContext | None) -> Tokens:
        """``x`` is (B, S, D)."""
        context = RoutingContext() if context is None else context
        x_TD = x.flatten(0, 1)
        valid_T = None if context.valid_BS is None else context.valid_BS.flatten()
        if valid_T is not None:
            # Padding may hold anything, NaN too; a masked gradient would not stop 0 * NaN.
            x_TD = x_TD.masked_fill(~valid_T[:, None], 0.0)
        x_TD, kept_TD = widened(x_TD)
        return cls(x_TD, x.shape[0], x.shape[1], valid_T, context, kept_TD)

    def logits(self, gate: nn.Module) -> Tensor:
        """What a gate says of the tokens."""
        if self.kept_TD is not None and isinstance(gate, LinearGate):
            return gate(self.x_TD, self.kept_TD)  # type: ignore[no-any-return]
        return gate(self.x_TD)  # type: ignore[no-any-return]

    @property
    def real_T(self) -> Tensor:
        """bool (T,), True for real tokens."""
        if self.valid_T is not None:
            return self.valid_T
        return torch.ones(self.x_TD.shape[0], dtype=torch.bool, device=self.x_TD.device)

    def to_tokens(self, value_B: Tensor) -> Tensor:
        """(B, ...) values of the sequences, repeated for their tokens: (T, ...)."""
        return value_B.unsqueeze(1).expand(-1, self.length, *value_B.shape[1:]).flatten(0, 1)

    def mean_of_sequences(self) -> Tensor:
        """(B, D), the mean of the real tokens of each sequence; zero where it has none."""
        x_BSD = self.x_TD.unflatten(0, (self.num_sequences, self.length))
        if self.valid_T is None:
            return x_BSD.sum(1) / max(self.length, 1)
        count_B = self.valid_T.unflatten(0, (self.num_sequences, self.length)).sum(1).clamp_min(1)
        return x_BSD.sum(1) / count_B[:, None]


class Router(nn.Module):
    """Base of all routers: ``router(x_BSD, context)`` decides which expert computes which token.

    Attributes:
        capacity: ``Capacity`` limits, replaced by ``set_capacity_factor``.
        terms: the balance terms that apply.
        needs: fields of ``RoutingContext`` without which it cannot decide.
        gates_on: what the gates scale: the experts' "output", or their "input".
        extra_weights: weights of ``Evidence.extra`` by name; the names are among ``terms`` too.
        backend: whose kernels choose and count.
        expert_bias: float32 (E,) buffer added to the scores for the choice alone, or None.
    """

    capacity: Capacity = Capacity()
    terms: frozenset[str] = frozenset()
    needs: tuple[str, ...] = ()
    gates_on: str = "output"
    backend: str = "auto"
    extra_weights: Mapping[str, float] = MappingProxyType({})
    expert_bias: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("expert_bias", None)
        self._read: tuple[int, int] | None = None

    def reset_parameters(self) -> None:
        """Parameters and buffers of its own as they start, wherever they are: after ``to_empty``, as those of its gate
        by the gate's method."""
        if self.expert_bias is not None:
            self.expert_bias.zero_()

    def _is_unread(self, buffer: Tensor) -> bool:
        """Whether a buffer is another one, or was written to, since it was last asked: what is read off it on the host
        is read again then alone. Compiled code keeps what was read before."""
        if torch.compiler.is_compiling() or buffer.is_meta or buffer.is_inference():
            return False
        before, self._read = self._read, (id(buffer), buffer._version)
        return before != self._read

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Any:
        raise NotImplementedError

    def check_context(self, context: RoutingContext | None) -> None:
        """Raise a ``ValueError`` where the context lacks what this router reads."""
        for name in self.needs:
            if context is None or getattr(context, name) is None:
                raise ValueError(f"{type(self).__name__} needs context.{name}, which is None")

    def update_expert_bias(self, chosen_per_expert_E: Tensor) -> None:
        """Nothing to do without a selection bias."""

    def after_step(self) -> None:
        """Called by ``core.update_expert_bias`` once per optimizer step, in training: for what anneals."""


class PairRouter(Router):
    """Base of the routers that choose experts for each token. A gate is one method, ``choose``.

    Padding, capacity, priority and counting are done here, and are the same for all.
    """

    def __init__(self, num_experts: int, config: RouterConfig, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config, self.capacity = num_experts, config, capacity
        self.extra_weights, self.needs = config.extra_weights(), config.needs()
        self.terms = config.balance_terms() | frozenset(self.extra_weights)

    def choose(self, tokens: Tokens) -> Choice:
        """Experts and gates of each token; padding may be given any. Runs outside autocast."""
        raise NotImplementedError

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Decide.

        Args:
            x: (B, S, D) tokens.
            context: ``valid_BS`` marks the real ones.

        Raises:
            ValueError: the context lacks what the gate needs.
        """
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


class TokenChoiceRouter(PairRouter):
    """Each token takes its ``top_k`` best experts. Built by ``TokenChoice``."""

    config: TokenChoice

    def __init__(self, dim: int, num_experts: int, config: TokenChoice, capacity: Capacity) -> None:
        super().__init__(num_experts, config, capacity)
        gate = NoisyGate if config.noise == "learned" else LinearGate
        self.gate = gate(dim, num_experts, config.init_scale, config.gate_bias)
        self.gates_on = config.gates_on
        if config.expert_bias:
            self.expert_bias = torch.zeros(num_experts, dtype=torch.float32)

    def choose(self, tokens: Tokens) -> Choice:
        config, x_TD = self.config, tokens.x_TD
        if self.training and config.jitter_eps:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - config.jitter_eps, 1 + config.jitter_eps)
        logits_TE = tokens.logits(self.gate) if x_TD is tokens.x_TD else self.gate(x_TD)
        if config.logit_norm is not None:
            logits_TE = normalize_logits(logits_TE, config.logit_norm)
        noise_std, noisy_TE = None, logits_TE
        if self.training and config.noise is not None:
            learned = self.gate.noise_std(x_TD)
            noise_std = config.noise_std / self.num_experts if learned is None else learned
            noisy_TE = logits_TE + torch.randn_like(logits_TE) * noise_std
        best = topk_gate(
            noisy_TE,
            config.top_k,
            score_func=config.score_func,
            normalize=config.normalizes,
            bias_E=self.expert_bias,
            num_groups=config.num_groups,
            limited_groups=config.limited_groups,
            group_score=config.group_score,
            scale=config.scale,
            valid_T=tokens.valid_T,
            backend=self.backend,
        )
        expert_ids_TK, chosen_E, sums = best.expert_ids_TK, best.chosen_per_expert_E, best.sums
        if self.training and config.second == "random":
            # GShard, algorithm 1: with probability 2 * g2, so a second expert of gate 1/2 always stays.
            g2_T = best.gates_TK[:, 1].detach() / config.scale
            second_T = torch.where(2 * g2_T > torch.rand_like(g2_T), expert_ids_TK[:, 1], self.num_experts)
            expert_ids_TK, chosen_E = torch.stack((expert_ids_TK[:, 0], second_T), -1), None
        scores_TE, threshold_TE = best.scores_TE, None
        if noise_std is not None:
            # The losses see the clean logits, as V-MoE's importance and load losses do; noise only explores.
            sums = None
            scores_TE = logits_TE.softmax(-1) if config.score_func == "softmax" else logits_TE.sigmoid()
            threshold_TE = _noise_threshold(noisy_TE, config)
        return Choice(
            expert_ids_TK,
            best.gates_TK,
            Evidence(scores_TE, logits_TE, noise_std, threshold_TE, sums=sums),
            priority_T=None if noise_std is None else best.scores_TE.amax(-1),  # the losses' scores else
            chosen_per_expert_E=chosen_E,
        )

    @torch.no_grad()
    def update_expert_bias(self, chosen_per_expert_E: Tensor) -> None:
        """One step of aux-loss-free balancing, from the pairs that chose each expert since the last one."""
        if self.expert_bias is not None:
            self.expert_bias += expert_bias_step(chosen_per_expert_E, self.config.bias_update_rate)

    def _apply(self, fn: Any, recurse: bool = True) -> TokenChoiceRouter:
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None and self.expert_bias.dtype != before.dtype:
            # In bfloat16 a bias above 0.25 would swallow steps of 1e-3: keep its dtype, and its value unrounded.
            self.expert_bias = before.to(self.expert_bias.device)
        return self


def normalize_logits(logits_TE: Tensor, factor: float) -> Tensor:
    """``factor * (l - mean) / std`` over the experts of each token (Skywork-MoE, arXiv 2406.06563)."""
    centred_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    # A floor of 1e-4 for the deviation: equal logits stay equal, with a finite gradient.
    return factor * centred_TE * (centred_TE.square().mean(-1, keepdim=True) + 1e-8).rsqrt()


def _noise_threshold(noisy_TE: Tensor, config: TokenChoice) -> Tensor:
    """What a noisy logit had to reach to be among the ``top_k``.

    Fixed noise: the k-th largest (V-MoE, arXiv 2106.05974, section A.2). Learned noise: the k-th largest of the
    *others* (arXiv 1701.06538, eq. 9), which is the (k+1)-th for the chosen ones.
    """
    K, E = config.top_k, noisy_TE.shape[-1]
    top = noisy_TE.topk(min(K + 1, E), dim=-1).values
    kth = top[:, K - 1 : K]
    if config.noise == "fixed":
        return kth
    # With K = E every expert is chosen. Far below and not -inf, which would make the gradient of the noise 0 * inf.
    beyond = top[:, K:] if K < E else torch.full_like(kth, -1e9)
    return torch.where(noisy_TE >= kth, beyond, kth)


LAYER_OPTIONS = frozenset({"capacity_factor", "eval_capacity_factor", "priority", "backend"})
"""Fields of ``MoEConfig`` that have a meaning with some routers alone."""


def _with_paper(method: Callable[..., None]) -> Callable[..., None]:
    """``method`` of a config, whose ``ValueError`` also says what method it is about."""

    @functools.wraps(method)
    def checked(self: RouterConfig, *args: Any) -> None:
        try:
            if method.__name__ == "__post_init__":
                check_kinds(self)
            method(self, *args)
        except ValueError as error:
            if not self.paper or self.source() in str(error):
                raise
            raise ValueError(f"{error}; {self.source()}") from None

    return checked


@dataclass(frozen=True)
class RouterConfig(OpenConfig):
    """Base of the router configs. A subclass is one frozen dataclass with ``build`` and the costs of its router."""

    paper: ClassVar[str] = ""
    """arXiv number of the method's paper: what the config refuses, it refuses with it."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("__post_init__", "check", "check_group"):
            if name in vars(cls):
                setattr(cls, name, _with_paper(vars(cls)[name]))

    def __post_init__(self) -> None:
        check_kinds(self)

    def source(self) -> str:
        """Name and paper, for messages."""
        return f"{type(self).__name__}{f' (arXiv {self.paper})' if self.paper else ''}"

    def build(self, dim: int, num_experts: int, capacity: Capacity = Capacity()) -> Router:
        raise NotImplementedError

    def check(self, num_experts: int) -> None:
        """Raise a ``ValueError`` where the router cannot work with this many experts."""

    def balance_terms(self) -> frozenset[str]:
        """Names of the balance terms that apply to this router."""
        return frozenset()

    def extra_weights(self) -> dict[str, float]:
        """Weights of the losses that the gate itself leaves in ``Evidence.extra``, by name."""
        return {}

    def pairs_per_token(self, num_experts: int) -> float:
        """Experts that compute a token, before capacity."""
        raise NotImplementedError

    def default_group(self) -> str | int:
        """Whose tokens compete for capacity where the layer's config does not say."""
        return "batch"

    def needs(self) -> tuple[str, ...]:
        """Fields of ``RoutingContext`` without which the router cannot decide."""
        return ()

    def is_causal(self) -> bool:
        """Whether a later token never changes an earlier one's output, capacity aside: what a causal decoder needs."""
        return True

    def depends_on(self) -> str:
        """What decides a token's experts in evaluation, capacity aside: "token": itself and what the context says of
        it; "sequence": the tokens of its sequence; "batch": all tokens of the call."""
        return "token" if self.is_causal() else "sequence" if self.default_group() == "sequence" else "batch"

    def exceptions(self) -> dict[str, str]:
        """Properties of ``core.testing`` that the method gives up, by name, each with the reason."""
        return {}

    def layer_kind(self) -> str:
        """The layer that carries out what is decided: "pairs" (``MoE``), "slots" (``SoftMoE``), "merged"
        (``MergedMoE``)."""
        return "pairs"

    def layer_options(self) -> frozenset[str]:
        """Which of ``LAYER_OPTIONS`` mean anything with this router: ``MoEConfig`` refuses the others."""
        return LAYER_OPTIONS

    def check_group(self, group: str | int) -> None:
        """Raise a ``ValueError`` where the router cannot work within such groups."""

    def rows_per_token(self, num_experts: int, tokens_per_group: int | None) -> float:
        """Rows that the experts compute for a token, before capacity: what their FLOPs are.

        Args:
            num_experts: E.
            tokens_per_group: where it is known.

        Raises:
            ValueError: it depends on ``tokens_per_group``, which is None.
        """
        return self.pairs_per_token(num_experts)

    def layer_flops_per_token(
        self, dim: int, out_dim: int, num_experts: int, params_per_expert: int, tokens_per_group: int | None
    ) -> float:
        """FLOPs beside ``flops_per_token`` and the experts' rows: sums over slots, merging of parameters.

        Raises:
            ValueError: they depend on ``tokens_per_group``, which is None.
        """
        return 0.0

    def num_params(self, dim: int, num_experts: int) -> int:
        return 0

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 0


@dataclass(frozen=True)
class LinearGateConfig(RouterConfig):
    """Base of the configs whose router has a linear gate and no other weights: ``logits = x W^T``, W (E, D)."""

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * num_experts

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        """Of an evaluation forward."""
        return 2 * dim * num_experts


@dataclass(frozen=True)
class TokenChoice(RouterConfig):
    """Each token takes its ``top_k`` best experts.

    ========================  ==========================================================================================
    Switch                    ``TokenChoice(top_k=1, jitter_eps=0.01)``
    GShard                    ``TokenChoice(top_k=2, second="random")``
    Shazeer                   ``TokenChoice(top_k=4, noise="learned")``
    V-MoE                     ``TokenChoice(top_k=2, normalize=False, noise="fixed")``
    Mixtral                   ``TokenChoice(top_k=2)``
    GPT-OSS                   ``TokenChoice(top_k=4, gate_bias=True)``
    Llama 4                   ``TokenChoice(top_k=1, score_func="sigmoid", gates_on="input")``
    DeepSeek-V2               ``TokenChoice(top_k=6, normalize=False, num_groups=8, limited_groups=3,
                              group_score="max", scale=16.0)``
    DeepSeek-V3               ``TokenChoice(top_k=8, score_func="sigmoid", expert_bias=True, num_groups=8,
                              limited_groups=4, scale=2.5)``
    Skywork-MoE               ``TokenChoice(top_k=2, logit_norm=1.0)``
    ========================  ==========================================================================================

    Attributes:
        top_k: experts per token, K.
        score_func: "softmax" or "sigmoid" of the logits.
        normalize: True: the gates of a token sum to 1 (softmax after the selection). False: its scores over all E
            experts (softmax before). None: True for K > 1, False for K = 1, where it would cut the router's gradient.
        noise: normal noise on the logits in training: None, "fixed" (V-MoE) or "learned" (Shazeer).
        noise_std: of the fixed noise, times E: its standard deviation is ``noise_std / E``.
        jitter_eps: in training, the router's input times U(1 - eps, 1 + eps).
        second: "always", or "random": in training the second of two experts is kept with probability 2 * gate, the gate
            before ``scale``.
        expert_bias: a bias on the scores steers the choice, never the gate, and is moved by ``update_expert_bias``.
        bias_update_rate: its step.
        num_groups, limited_groups: the choice is limited to the best ``limited_groups`` of ``num_groups`` equal groups.
        group_score: a group is judged by the sum of its two best scores, "top2", or by its best one, "max".
        scale: factor on the gates.
        gates_on: the gates scale the experts' "output", or their "input": ``f(g x)`` in place of ``g f(x)`` (Llama 4),
            which copies the rows of the tokens.
        gate_bias: the gate's logits are ``x W^T + b``, with a ``b`` that is learned as ``W`` is.
        init_scale: variance of the gate's initial weights times D.
        logit_norm: lambda of Skywork-MoE (arXiv 2406.06563): a token's logits are brought to mean 0 and this standard
            deviation before noise and softmax; the larger, the sharper the gates. None: left as they are.

    Raises:
        ValueError: a value is out of its range, or two of them do not go together.
    """

    top_k: int = 2
    score_func: str = "softmax"
    normalize: bool | None = None
    noise: str | None = None
    noise_std: float = 1.0
    jitter_eps: float = 0.0
    second: str = "always"
    expert_bias: bool = False
    bias_update_rate: float = 1e-3
    num_groups: int = 1
    limited_groups: int = 1
    group_score: str = "top2"
    scale: float = 1.0
    gates_on: str = "output"
    gate_bias: bool = False
    init_scale: float = 0.1
    logit_norm: float | None = None

    def __post_init__(self) -> None:
        at_least_one("top_k", self.top_k)
        for name, allowed in (
            ("score_func", ("softmax", "sigmoid")),
            ("noise", (None, "fixed", "learned")),
            ("second", ("always", "random")),
            ("group_score", ("top2", "max")),
            ("gates_on", ("output", "input")),
        ):
            if getattr(self, name) not in allowed:
                choices = ", ".join(str(a) for a in allowed)
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {choices}")
        if self.top_k == 1 and self.normalize:
            raise ValueError("normalize=True with top_k=1 makes every gate 1: the router would get no gradient")
        if self.second == "random" and self.top_k != 2:
            raise ValueError(f"second='random' needs top_k=2, not top_k={self.top_k}")
        if not 0 <= self.jitter_eps < 1:
            raise ValueError(f"jitter_eps={self.jitter_eps} is not in [0, 1)")
        for name in ("noise_std", "init_scale", "scale", "bias_update_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} is not a positive number")
        if self.logit_norm is not None and not 0 < self.logit_norm < float("inf"):
            raise ValueError(f"logit_norm={self.logit_norm} is not a positive number")
        if self.logit_norm is not None and self.score_func != "softmax":
            raise ValueError(f"logit_norm={self.logit_norm} needs score_func='softmax', not {self.score_func!r}")
        if not 1 <= self.limited_groups <= self.num_groups:
            raise ValueError(f"limited_groups={self.limited_groups} is not between 1 and num_groups={self.num_groups}")

    @property
    def normalizes(self) -> bool:
        """``normalize`` with its default filled in."""
        return self.top_k > 1 if self.normalize is None else self.normalize

    def build(self, dim: int, num_experts: int, capacity: Capacity = Capacity()) -> TokenChoiceRouter:
        self.check(num_experts)
        return TokenChoiceRouter(dim, num_experts, self, capacity)

    def check(self, num_experts: int) -> None:
        at_most_experts("top_k", self.top_k, num_experts)
        if num_experts % self.num_groups:
            raise ValueError(f"num_groups={self.num_groups} does not divide num_experts={num_experts}")
        reachable = num_experts // self.num_groups * self.limited_groups
        if self.top_k > reachable:
            raise ValueError(
                f"top_k={self.top_k} exceeds the {reachable} experts of limited_groups={self.limited_groups}"
            )

    def balance_terms(self) -> frozenset[str]:
        # Normalized logits have no size for the z-loss to hold down.
        terms = SCORE_TERMS | ({"sequence_balance"} if self.logit_norm else {"sequence_balance", "router_z"})
        # The smooth load asks what noise on the logits would choose; a bias or group limit chooses by more than them.
        plain = not self.expert_bias and self.limited_groups == self.num_groups
        return terms | {"load"} if self.noise and plain else terms

    def pairs_per_token(self, num_experts: int) -> float:
        return float(self.top_k)

    def num_params(self, dim: int, num_experts: int) -> int:
        weights = dim * num_experts * (2 if self.noise == "learned" else 1)
        return weights + (num_experts if self.gate_bias else 0)

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        # The noise gate runs in training only.
        return 2 * dim * num_experts


__all__ = [
    "Balance",
    "LinearGateConfig",
    "PairRouter",
    "Router",
    "RouterConfig",
    "TokenChoice",
    "TokenChoiceRouter",
    "Tokens",
]
