"""Learned gates other than the linear one: ``Cosine``, ``Attention`` and the two stages of ``Stable``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Evidence
from ..fields import Bounds, Count, Positive
from .balance.terms import CHOICE_TERMS, SCORE_TERMS
from .gates import AttentionGate, CosineGate, TokenIdGate
from .pairs.top_k import TopKConfig, TopKRouter
from .router import LinearGateConfig, PairRouter, Tokens
from .selection import Capacity, Choice


@dataclass(frozen=True)
class Cosine(TopKConfig):
    """Each token takes the experts whose embeddings point its way: ``logits = cos(P x, e) / temperature`` (X-MoE,
    arXiv 2204.09179). Long tokens and long embeddings do not win by their length, and few dimensions keep the experts'
    embeddings from collapsing.

    Attributes:
        top_k: experts per token, K.
        proj_dim: number of dimensions in which directions are compared; None: E / 2 as in the paper, but at least 2.
        temperature: initial divisor of the cosines; it is learned, and stays at least 0.01.
        normalize: as in ``TokenChoice``.
    """

    paper = "2204.09179"
    router_class = TopKRouter
    drops_experts = True

    top_k: Count = 2
    proj_dim: Annotated[int, Bounds(2, why="in 1 dimension every cosine is 1 or -1")] | None = None
    temperature: Annotated[float, Bounds(0.01, why="learning does not pass it")] = 0.5
    normalize: bool | None = None

    def space(self, num_experts: int) -> int:
        """Return ``proj_dim`` with its default filled in."""
        return max(num_experts // 2, 2) if self.proj_dim is None else self.proj_dim

    def make_gate(self, dim: int, num_experts: int) -> CosineGate:
        return CosineGate(dim, num_experts, self.space(num_experts), self.temperature)

    def num_params(self, dim: int, num_experts: int) -> int:
        return (dim + num_experts) * self.space(num_experts) + 1

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * (dim + num_experts) * self.space(num_experts)


@dataclass(frozen=True)
class Attention(TopKConfig):
    """The experts attend to each other before the choice: ``logits = softmax(q k^T) v`` with q, k and v the (E,)
    projections of the token (Yuan2.0-M32, arXiv 2405.17976, where ``top_k=2`` of 32).

    Attributes:
        top_k: experts per token, K.
        normalize: as in ``TokenChoice``.
        init_scale: variance of the initial weights times D. Larger than a linear gate's: with small q and k every
            expert attends alike, and all logits are the same mean of v.
    """

    paper = "2405.17976"
    router_class = TopKRouter
    can_grow = False
    drops_experts = True

    top_k: Count = 2
    normalize: bool | None = None
    init_scale: Positive = 1.0

    def make_gate(self, dim: int, num_experts: int) -> AttentionGate:
        return AttentionGate(dim, num_experts, self.init_scale)

    def num_params(self, dim: int, num_experts: int) -> int:
        return 3 * dim * num_experts

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 6 * dim * num_experts + 4 * num_experts**2


class StableRouter(PairRouter):
    """The router of ``Stable``: one expert per token, by hidden state until ``freeze_light_router``, then by id.

    Attributes:
        gate: module of the logits from hidden states; the chosen one's sigmoid is the combine weight in both stages.
        light: module of the logits from token ids, learned in stage 1 and frozen in stage 2.
        stage: int64 () buffer, 1 or 2. The router follows it however it is written to, by ``load_state_dict`` or by an
            average of weights.
    """

    config: Stable
    stage: Tensor

    def __init__(self, dim: int, num_experts: int, config: Stable, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.light = TokenIdGate(config.vocab_size, num_experts, config.embedding_dim)
        self.register_buffer("stage", torch.tensor(1))
        self._stage_terms = self.terms
        self._light_decides = False

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.stage.fill_(1)

    def choose(self, tokens: Tokens) -> Choice:
        if self._is_unread(self.stage) and self._light_decides != (int(self.stage) == 2):
            self._follow_stage()
        ids_T = tokens.ids("token_ids_BS", self.config.vocab_size).flatten()
        logits_TE = tokens.logits(self.gate)
        extra = None
        if self._light_decides:
            expert_T = self.light(ids_T, logits_TE.dtype).argmax(-1)
        else:
            expert_T = logits_TE.argmax(-1)
            if self.training:
                light_TE = self.light(ids_T, logits_TE.dtype)
                extra = {"distillation": F.cross_entropy(light_TE, expert_T, reduction="none")}
        scores_TE = logits_TE.sigmoid()
        gates_T1 = scores_TE.gather(-1, expert_T[:, None])
        return Choice(expert_T[:, None], gates_T1, Evidence(scores_TE, logits_TE, extra=extra))

    def freeze_light_router(self) -> None:
        """Start stage 2: the light router decides and no longer learns, and no balance loss applies, as it could change
        no choice. The optimizer skips it from now on; wrap in DDP again, or DDP waits for its gradients."""
        self.stage.fill_(2)
        self._follow_stage()

    def _follow_stage(self) -> None:
        self._light_decides = int(self.stage) == 2
        self.terms = frozenset() if self._light_decides else self._stage_terms
        self.light.requires_grad_(not self._light_decides)
        if self._light_decides:
            for parameter in self.light.parameters():
                parameter.grad = None  # or momentum would move it once more

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.stage.is_meta:
            self._follow_stage()


@dataclass(frozen=True)
class Stable(LinearGateConfig):
    """StableMoE (arXiv 2204.08396): in stage 1 a sigmoid gate on the hidden state takes the best expert, and a light
    router from token ids learns to foretell it; in stage 2, after ``layer.router.freeze_light_router()``, only the
    light router decides and it is frozen, so that a token no longer wanders between experts.

    Attributes:
        vocab_size: token ids are in ``range(vocab_size)``.
        embedding_dim: width of the light router's embedding (50 in the paper).
        distillation: weight of the light router's mean cross-entropy in the auxiliary loss.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2204.08396"
    router_class = StableRouter
    terms = SCORE_TERMS | CHOICE_TERMS | {"router_z_loss"}
    needs = ("token_ids_BS",)

    vocab_size: Count
    embedding_dim: Count = 50
    distillation: Positive = 1.0
    init_scale: Positive = 0.1

    @property
    def extra_weights(self) -> dict[str, float]:
        return {"distillation": self.distillation}

    def pairs_per_token(self, num_experts: int) -> float:
        return 1.0

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * num_experts + (self.vocab_size + num_experts) * self.embedding_dim

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        # Both gates run in training and in stage 2; in the evaluation of stage 1 the light one does not.
        return 2 * (dim + self.embedding_dim) * num_experts
