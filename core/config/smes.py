"""``SMES``: a multi-task layer whose tasks choose few of many experts together."""

from __future__ import annotations

from dataclasses import dataclass

from ..contract.checks import at_most_experts
from ..fields import Count, CountOrZero, check_values
from ..layers import JointMultiGateMoE, MultiGateLayer
from ..routing.balance.terms import SCORE_TERMS
from ..routing.multi_gate import ExpertGroups
from .multi_gate import MultiGateConfig


@dataclass(frozen=True)
class SMES(MultiGateConfig):
    """Sparse multi-task experts: ``y_k = sum over S and P_k of g_k,e f_e(x)``, with a few experts S of an example that
    all tasks use and a few P_k that task k uses besides (SMES, arXiv 2602.09386).

    Each task has a softmax gate over all experts. S holds the ``shared_top_k`` experts with the highest mean gate over
    the tasks, P_k the ``private_top_k`` ones with task k's highest gates among the others, and ``g_k`` is the softmax
    of task k's logits over both. An expert that several tasks chose computes an example once, so that an example costs
    at most ``shared_top_k + t * private_top_k`` experts. The balance losses are one of each for all gates together, of
    their mean scores and the sum of their choices.

    Without shared experts this is ``MMoE`` with the router ``TokenChoice``, but for the balance losses, which are each
    gate's own there.

    Attributes:
        shared_top_k: experts of an example for all tasks.
        private_top_k: experts of an example for each task besides.
        dense_training: whether in training each example takes, with probability 1/2, all experts under the softmax of
            all logits. Evaluation takes only the chosen ones, and costs are counted in evaluation. Then the gates see
            the outputs of the experts that they leave out (after RankMixer, arXiv 2507.15551).
    """

    num_experts: Count = 32
    shared_top_k: CountOrZero = 2
    private_top_k: CountOrZero = 1
    dense_training: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(Count, **{"shared_top_k + private_top_k": self.shared_top_k + self.private_top_k})
        at_most_experts("shared_top_k + private_top_k", self.shared_top_k + self.private_top_k, self.num_experts)
        self._check_unused("does not apply to SMES, whose experts are all alike")

    @property
    def terms(self) -> frozenset[str]:
        return SCORE_TERMS

    @property
    def is_sparse(self) -> bool:
        return True

    def most_experts(self, num_tasks: int) -> int:
        """Return the most experts that compute an example. Tasks seldom agree on a private one, since S has the experts
        they agree on, so that the costs are counted with it."""
        return min(self.shared_top_k + num_tasks * self.private_top_k, self.num_experts)

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        return JointMultiGateMoE(
            self._gates(dim, groups),
            self.expert.build(self.num_experts, dim),
            groups,
            shared_top_k=self.shared_top_k,
            private_top_k=self.private_top_k,
            dense_training=self.dense_training,
            **self._options(dim),
        )

    def active_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        """Return the most parameters that one example touches; see ``most_experts``."""
        return self._params(dim, self.groups(num_tasks, num_domains), self.most_experts(num_tasks))

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        """Return the most forward FLOPs of an example in evaluation, for all tasks; see ``most_experts``."""
        self.groups(num_tasks, num_domains)
        hidden = sum(i * o for i, o in self._gate_layers(dim))
        gates = 2 * num_tasks * (self.num_experts * self._gate_width(dim) + hidden)
        return gates + self.most_experts(num_tasks) * self.expert.flops_per_row(dim)
