"""Gates that decide once for a sequence: by its mean (``Sentence``), its task (``Task``) or its domain (``Domain``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...contract import RoutingContext
from ...contract.checks import check_tensor
from ...fields import Count, Positive
from ...kernels.eager import top_k_ids
from ..balance.terms import SCORE_TERMS
from ..gates import TableGate
from ..pairs.top_k import SequenceTopKRouter, TopKConfig
from ..router import LinearGateConfig, PairRouter, RouterConfig, Tokens
from ..selection import Capacity, Choice

# A balance within a sequence is left out, since its tokens all take the same experts.
SEQUENCE_TERMS = SCORE_TERMS | {"router_z_loss"}


class SentenceRouter(SequenceTopKRouter):
    """The router of ``Sentence``: a linear gate on the mean of a sequence's non-padding tokens."""

    def sequence_logits(self, tokens: Tokens) -> Tensor:
        return self.gate(tokens.mean_of_sequences())


@dataclass(frozen=True)
class Sentence(TopKConfig, LinearGateConfig):
    """All tokens of a sequence take the ``top_k`` best experts of its mean: ``logits = W mean(x)`` (sentence-level MoE,
    arXiv 2110.03742). Not causal.

    Attributes:
        top_k: experts per sequence, K.
        normalize: as in ``TokenChoice``.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2110.03742"
    router_class = SentenceRouter
    terms = SEQUENCE_TERMS
    is_causal = False
    depends_on = "sequence"

    top_k: Count = 2
    normalize: bool | None = None
    init_scale: Positive = 0.1

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        # The gate costs 2 D E and a sum once a sequence, and no product for each token.
        return 0


@dataclass(frozen=True)
class TaskExperts:
    """The experts of one task: with ``f_e`` their outputs, the layer computes ``sum_k gates_K[k] f_{expert_ids_K[k]}``.

    Attributes:
        expert_ids_K: int64 (K,), the best first.
        gates_K: float32 (K,).
    """

    expert_ids_K: Tensor
    gates_K: Tensor


class TaskRouter(SequenceTopKRouter):
    """The router of ``Task``: a row of learned logits a task."""

    config: Task
    gate: TableGate

    def sequence_logits(self, tokens: Tokens) -> Tensor:
        return self.gate(tokens.ids("task_ids_B", self.config.num_tasks), tokens.x_TD.dtype)

    @torch.no_grad()
    def experts_of(self, task: int) -> TaskExperts:
        """Return the experts that every token of ``task`` takes: a dense network that can be served by itself.

        Raises:
            ValueError: the task does not exist.
        """
        if not 0 <= task < self.config.num_tasks:
            raise ValueError(f"task={task} is not in range({self.config.num_tasks})")
        weight = self.gate.weight
        dtype = weight.dtype if weight.dtype == torch.float64 else torch.float32
        choice = self.choose_from(self.gate(torch.tensor([task], device=weight.device), dtype))
        return TaskExperts(choice.expert_ids_TK[0], choice.gates_TK[0])


@dataclass(frozen=True)
class Task(TopKConfig):
    """All tokens of a task take the ``top_k`` best experts of its row of learned logits (Task-MoE, arXiv 2110.03742),
    so that a task's experts can be taken out as a dense model: ``layer.router.experts_of(task)``.

    A language pair is a task: with source s of S and target t of T languages, ``num_tasks=S * T`` and
    ``task_ids_B = s * T + t``; for experts by target language, ``num_tasks=T`` and ``task_ids_B = t``.

    Attributes:
        num_tasks: ``context.task_ids_B`` is in ``range(num_tasks)``.
        top_k: experts per task, K.
        normalize: as in ``TokenChoice``.
        init_scale: variance of the initial logits.
    """

    paper = "2110.03742"
    router_class = TaskRouter
    can_grow = False
    can_shrink = True
    terms = SEQUENCE_TERMS
    needs = ("task_ids_B",)

    num_tasks: Count
    top_k: Count = 2
    normalize: bool | None = None
    init_scale: Positive = 0.1

    def make_gate(self, dim: int, num_experts: int) -> TableGate:
        return TableGate(self.num_tasks, num_experts, self.init_scale)

    def num_params(self, dim: int, num_experts: int) -> int:
        return self.num_tasks * num_experts


def domain_posterior(log_likelihood_BE: Tensor, prior_E: Tensor | None = None) -> Tensor:
    """Return ``p(domain | text)`` by Bayes' rule, (B, E): proportional to ``p(text | domain) p(domain)`` (DEMix,
    arXiv 2108.05036).

    Args:
        log_likelihood_BE: (B, E), log-probability of each text under the model with only each domain's experts, as with
            ``context.domain_ids_B`` set to that domain.
        prior_E: (E,), sums to 1; None: uniform.
    """
    return (log_likelihood_BE if prior_E is None else log_likelihood_BE + prior_E.log()).softmax(-1)


class DomainRouter(PairRouter):
    """The router of ``Domain``: one expert per domain, or a mixture of them if the domain is not known.

    Attributes:
        prior: float32 (E,) buffer, mixture for sequences whose context has no domain; uniform at the start.
    """

    config: Domain
    prior: Tensor

    def __init__(self, dim: int, num_experts: int, config: Domain, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.register_buffer("prior", torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.prior.fill_(1.0 / self.num_experts)

    def check_context(self, context: RoutingContext | None) -> None:
        known = context is not None and (context.domain_ids_B is not None or context.domain_weights_BE is not None)
        if self.training and not known:
            raise ValueError("Domain needs context.domain_ids_B or domain_weights_BE in training: both are None")

    def choose(self, tokens: Tokens) -> Choice:
        x_TD, context = tokens.x_TD, tokens.context
        if context.domain_ids_B is not None:
            ids_B = tokens.ids("domain_ids_B", self.num_experts)
            # The lookup in a table stops an id out of range where it is not checked.
            expert_B = torch.arange(self.num_experts, device=x_TD.device).index_select(0, ids_B)
            return Choice(tokens.to_tokens(expert_B)[:, None], x_TD.new_ones(x_TD.shape[0], 1))
        weights_BE = context.domain_weights_BE
        if weights_BE is None:
            # All domains count alike where those with a weight were taken away.
            weights_BE = (self.prior + (self.prior.sum() == 0)).expand(tokens.num_sequences, -1)
        else:
            check_tensor("context.domain_weights_BE", weights_BE)
        if weights_BE.shape != (tokens.num_sequences, self.num_experts):
            expected = (tokens.num_sequences, self.num_experts)
            raise ValueError(f"context.domain_weights_BE has shape {tuple(weights_BE.shape)}, not {expected}")
        if weights_BE.is_complex():
            raise ValueError(f"context.domain_weights_BE is {weights_BE.dtype}: weights are real")
        weights_BE = weights_BE.to(x_TD.dtype)
        if weights_BE.device.type == "cpu" and not torch.compiler.is_compiling():
            real_BS = tokens.real_T.unflatten(0, (tokens.num_sequences, tokens.length))
            wrong = ~((weights_BE >= 0) & weights_BE.isfinite()) & real_BS.any(1)[:, None]
            if wrong.any():
                value = float(weights_BE[wrong][0])
                raise ValueError(f"context.domain_weights_BE holds {value}: weights are finite and not negative")
        expert_BK = top_k_ids(weights_BE.detach(), self.config.mixed(self.num_experts))
        weights_BK = weights_BE.gather(-1, expert_BK)
        # A domain without weight is not computed.
        expert_BK = torch.where(weights_BK > 0, expert_BK, self.num_experts)
        gates_BK = weights_BK / weights_BK.sum(-1, keepdim=True).clamp_min(1e-20)
        return Choice(tokens.to_tokens(expert_BK), tokens.to_tokens(gates_BK))

    @torch.no_grad()
    def set_prior(self, weights_E: Tensor | Sequence[float]) -> None:
        """Set the mixture of sequences of unknown domain.

        Args:
            weights_E: (E,), not negative; normalized to sum to 1.

        Raises:
            ValueError: another length, a weight that is negative or not finite, or all are 0.
        """
        weights_E = torch.as_tensor(weights_E, dtype=torch.float32)
        if weights_E.shape != (self.num_experts,):
            raise ValueError(f"prior weights have shape {tuple(weights_E.shape)}, not ({self.num_experts},)")
        if not bool(weights_E.isfinite().all()) or float(weights_E.min()) < 0 or float(weights_E.sum()) == 0:
            raise ValueError(f"prior weights {weights_E.tolist()} are not finite, not negative and not all 0")
        self.prior.copy_(weights_E / weights_E.sum())

    def estimate_prior(self, log_likelihood_BE: Tensor, decay: float | None = None) -> Tensor:
        """Set the prior to the mean posterior of held-out texts under a uniform prior: DEMix's cached prior.

        Args:
            log_likelihood_BE: (B, E), as in ``domain_posterior``; 100 texts in the paper.
            decay: share of each text in an exponential mean of it and those before (0.3 in the paper); None: the plain
                mean.

        Returns:
            The prior, (E,).

        Raises:
            ValueError: no texts are given, or ``decay`` is not in (0, 1).
        """
        posterior_BE = domain_posterior(log_likelihood_BE.detach().float())
        if not len(posterior_BE):
            raise ValueError("log_likelihood_BE has no text to estimate a prior from")
        if decay is None:
            mean_E = posterior_BE.mean(0)
        elif not 0 < decay < 1:
            raise ValueError(f"decay={decay} is not in (0, 1)")
        else:
            mean_E = posterior_BE[0]
            for posterior_E in posterior_BE[1:]:
                mean_E = (1 - decay) * mean_E + decay * posterior_E
        self.set_prior(mean_E)
        return self.prior.clone()


@dataclass(frozen=True)
class Domain(RouterConfig):
    """DEMix (arXiv 2108.05036): one expert per domain, which only computes its sequences, at gate 1.

    A sequence's domain is ``context.domain_ids_B``. If it is None, its experts are mixed by
    ``context.domain_weights_BE``, and in evaluation, if that is None too, by the router's ``prior``. The layer mixes
    its experts' outputs; the paper mixes next-token probabilities, for which the model runs once per domain.

    Attributes:
        num_domains: number of domains, equal to ``num_experts``.
        top_k: number of domains of a mixture, by largest weight; None: all. A known domain takes 1.
    """

    paper = "2108.05036"
    router_class = DomainRouter

    num_domains: Count
    top_k: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and self.top_k > self.num_domains:
            raise ValueError(f"top_k={self.top_k} exceeds num_domains={self.num_domains}")

    def resized(self, num_experts: int) -> Domain:
        return replace(self, num_domains=num_experts, top_k=self.top_k and min(self.top_k, num_experts))

    def mixed(self, num_experts: int) -> int:
        """Return ``top_k`` with its default filled in."""
        return num_experts if self.top_k is None else self.top_k

    def check(self, num_experts: int) -> None:
        if self.num_domains != num_experts:
            raise ValueError(
                f"num_domains={self.num_domains} is not num_experts={num_experts}: one expert a domain (2108.05036)"
            )

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the number for a known domain; a mixture takes ``top_k``."""
        return 1.0
