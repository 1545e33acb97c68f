"""``RankMixer``: a layer that mixes the features of an example as tokens, with experts for each token."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..experts import FFN, ExpertConfig
from ..fields import Count
from ..layers import MultiGateLayer, RankMixerLayer
from ..layers.rank_mixer import FeatureTokens
from ..routing.multi_gate import ExpertGroups
from ..routing.router import RouterConfig
from ..routing.selection import Capacity
from .multi_gate import MultiGateConfig


@dataclass(frozen=True)
class RankMixer(MultiGateConfig):
    """Token mixing and networks for each token (RankMixer, arXiv 2507.15551). An example's vector becomes P tokens of
    width H, and a block maps them by ``s = LN(mix(x) + x)``, ``x' = LN(f(s) + s)``: ``mix`` joins the h-th of P heads
    of all tokens to token h, without a parameter, and f is a network of its own for each token i, ``f_i(s_i)``, or with
    a ``router`` the sum of ``g_i,e f_i,e(s_i)`` over the token's own experts. The mean of the last tokens is the
    output, the same for all tasks.

    These equations are the paper's. Its sparse experts are ``router=ReLURouting(top_k, dense_training=True)``: gates
    ``relu(W_i s_i)``, trained by two routers of which evaluation knows one. The paper groups the features by meaning;
    here the joined columns are cut into P parts of equal width. The paper holds the gates down by a weight that is
    tuned; ``ReLURouting`` steers it to ``top_k`` experts. Other routers that choose pairs work too.

    Attributes:
        num_experts: experts of each token, in each block; 1 without a router.
        expert: kind of the networks; its output is as wide as its input.
        router: chooses among a token's experts; None: each token has one network, which computes every example.
        num_tokens: tokens of an example, and heads of a token, P.
        token_dim: width of a token, H.
        depth: number of blocks.
    """

    num_experts: Count = 1
    expert: ExpertConfig = FFN(bias=True)
    router: RouterConfig | None = None
    num_tokens: Count = 8
    token_dim: Count = 64
    depth: Count = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_dim % self.num_tokens:
            raise ValueError(f"token_dim={self.token_dim} is not divisible by num_tokens={self.num_tokens}")
        if (width := self.expert.out_dim(self.token_dim)) != self.token_dim:
            raise ValueError(f"expert={self.expert} makes {width} of token_dim={self.token_dim}: they must be equal")
        if self.router is None:
            if self.num_experts != 1:
                raise ValueError(f"num_experts={self.num_experts} needs a router that chooses among a token's experts")
        elif self.router.layer_kind != "pairs" or getattr(self.router, "gates_on", "output") == "input":
            raise ValueError(f"router {self.router.source()} does not weight the outputs of chosen experts")
        else:
            self.router.check(self.num_experts)
        own = ("num_experts", "expert", "backend", "router", "num_tokens", "token_dim", "depth")
        self.check_no_gates(*own, *(() if self.router is None else ("balance",)))

    @property
    def terms(self) -> frozenset[str]:
        return frozenset() if self.router is None else self.router.terms

    @property
    def is_sparse(self) -> bool:
        return self.router is not None

    @property
    def _taken(self) -> float:
        """Experts that a token takes on average."""
        return 1.0 if self.router is None else self.router.pairs_per_token(self.num_experts)

    def _groups(self, num_tasks: int, num_domains: int) -> ExpertGroups:
        return ExpertGroups(num_tasks, self.num_experts, (0,) * num_tasks)  # a domain is a feature as others are

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        P, width, E, router = self.num_tokens, self.token_dim, self.num_experts, self.router
        num_routers = 0 if router is None else self.depth * P
        routers = [router.build(width, E, Capacity(group="batch")) for _ in range(num_routers) if router is not None]
        experts = [self.expert.build(P * E, width) for _ in range(self.depth)]
        tokens = FeatureTokens(dim, P, width)
        return RankMixerLayer(tokens, experts, routers, num_tasks, self._taken, balance=self.balance, dim=dim)

    def out_dim(self, dim: int) -> int:
        return self.token_dim

    def num_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        return self._params_of(dim, num_tasks, num_domains, self.num_experts)

    def active_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        """Return the parameters that one example touches; with a router on average."""
        return self._params_of(dim, num_tasks, num_domains, self._taken)

    def _params_of(self, dim: int, num_tasks: int, num_domains: int, experts: float) -> int:
        self.groups(num_tasks, num_domains)
        P, width, depth, E = self.num_tokens, self.token_dim, self.depth, self.num_experts
        gates = 0 if self.router is None else self.router.num_params(width, E)
        tokens = P * width * (math.ceil(dim / P) + 1)
        blocks = depth * (P * gates + 4 * width)  # two norms
        return tokens + blocks + round(depth * P * experts * self.expert.num_params(width))

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        """Return the forward FLOPs of an example, for all tasks; with a router those of the mean of its experts."""
        self.groups(num_tasks, num_domains)
        P, width, E, router = self.num_tokens, self.token_dim, self.num_experts, self.router
        rows = 1.0 if router is None else router.rows_per_token(E, batch_size)
        gates = 0 if router is None else router.flops_per_token(width, E)
        token = gates + round(rows * self.expert.flops_per_row(width))
        return P * (2 * math.ceil(dim / P) * width + self.depth * token)
