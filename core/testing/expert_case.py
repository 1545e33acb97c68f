"""``ExpertCase``: the experts, rows and layers of the checks of experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import MoEConfig
from ..contract import Routing, RoutingContext
from ..experts import ExpertConfig, Experts
from ..layers import MoE
from ..routing.balance.balance import Balance
from ..routing.pairs.token_choice import TokenChoice
from .router_case import seeded


@dataclass(frozen=True)
class ExpertCase:
    """A kind of experts to be checked, with the sizes and the seed of its layers and tokens."""

    expert: ExpertConfig
    num_experts: int
    dim: int
    seed: int

    def config(self, **options: Any) -> MoEConfig:
        router = TokenChoice(top_k=min(2, self.num_experts))
        return MoEConfig(self.num_experts, **{"router": router, "expert": self.expert, **options})

    def has(self, option: str) -> bool:
        """Return whether a layer heeds an option of ``MoEConfig``: a layer of ``TokenChoice`` heeds all."""
        return True

    def full_config(self) -> MoEConfig:
        """Return the config of the check of a new layer: only routed experts, since some cannot be shared ones."""
        return self.config()

    def layer(self, *, training: bool = False, **options: Any) -> MoE:
        """Return a layer with each weight moved from its initial value, which may be 0 or equal for all."""
        with seeded(self.seed):
            return _moved(self.config(**options).build(self.dim)).train(training)

    def experts(self, num_experts: int | None = None, *, training: bool = False) -> Experts:
        with seeded(self.seed):
            count = self.num_experts if num_experts is None else num_experts
            return _moved(self.expert.build(count, self.dim)).train(training)

    def one(self, e: int, experts: Experts) -> Experts:
        """Return expert ``e`` of ``experts`` as experts of their own, of which there is one."""
        kind = self.expert.of_each(self.num_experts)[e]
        dtype = next((p.dtype for p in experts.parameters()), torch.float32)
        alone = kind.build(1, self.dim, self.expert.out_dim(self.dim)).to(dtype).train(experts.training)
        own = {**dict(alone.named_parameters()), **dict(alone.named_buffers())}
        weights = experts.weights_of(e)
        assert own.keys() == weights.keys(), f"weights_of({e}) has {sorted(weights)}, an expert {sorted(own)}"
        with torch.no_grad():
            for name, value in own.items():
                value[0] = weights[name]
        return alone

    def tokens(self, T: int = 12, offset: int = 0) -> Tensor:
        """Return T rows, which are tokens unless a row is made of several; another ``offset`` gives other ones."""
        width = self.expert.row_dim(self.dim)
        return torch.randn(T, width, generator=torch.Generator().manual_seed(self.seed + 100 + offset))

    def batch(self, B: int = 3, S: int = 6) -> Tensor:
        """Return B sequences of S rows as a layer takes them: (B, S, D), or longer by the tokens that make a row, which
        follow one another, as patches do in a grid that is one patch wide."""
        return self.tokens(B * S).reshape(B, S * self.expert.tokens_per_row, self.dim)

    def balance(self) -> Balance:
        """Return the weights of the balance losses; experts have none."""
        return Balance()

    def padded(self) -> tuple[Tensor, RoutingContext]:
        """Return a batch and its padding."""
        return self.batch(), self.padding()

    def padding(self) -> RoutingContext:
        """Return the context of a batch with two rows of padding, and one sequence of only padding."""
        valid_BS = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
        return RoutingContext(valid_BS.repeat_interleave(self.expert.tokens_per_row, 1))

    def routing(self, T: int = 12, K: int = 2, dtype: torch.dtype = torch.float32) -> Routing:
        """Return a routing of T tokens in which some places are empty, and of four experts or more the last is idle."""
        generator = torch.Generator().manual_seed(self.seed + 300)
        E = self.num_experts
        busy = E - 1 if E >= 4 else E
        ids_TK = torch.stack([torch.randperm(max(busy, K), generator=generator)[:K] for _ in range(T)])
        ids_TK[ids_TK >= busy] = E
        ids_TK[::5, -1] = E
        gates_TK = torch.rand(T, K, generator=generator).to(dtype).masked_fill(ids_TK == E, 0.0)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=E + 1)[:E]
        return Routing(
            token_index_N=torch.arange(T * K) // K,
            expert_ids_N=ids_TK.flatten(),
            gates_N=gates_TK.flatten(),
            tokens_per_expert_E=counts_E,
            chosen_per_expert_E=counts_E,
            num_tokens=T,
            top_k=K,
        )


def _moved(module: Any) -> Any:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module
