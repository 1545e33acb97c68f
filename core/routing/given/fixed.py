"""Choices that are not learned: ``Hash`` by token id, ``Random``, and ``DomainRandom`` by domain and token id."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from ...contract import Evidence, MergeRouting, RoutingContext
from ...contract.checks import divides
from ...fields import Count, OneOf, Positive
from ...kernels import SCORE_FUNCS
from ...kernels.eager import gates_of
from ..gates import LinearGate
from ..router import LAYER_OPTIONS, FixedKConfig, PairRouter, RouterConfig, Tokens
from ..selection import Capacity, Choice
from .clusters import balanced_clusters

HASHES = ("random", "balanced", "clustered")


def random_table(vocab_size: int, num_experts: int, top_k: int, seed: int) -> Tensor:
    """Draw K different experts for each token id, int64 (V, K), uniformly and independently of the other ids."""
    generator = torch.Generator().manual_seed(seed)
    columns: list[Tensor] = []
    for k in range(top_k):
        drawn_V = torch.randint(num_experts - k, (vocab_size,), generator=generator, device="cpu")
        # A draw counts the experts that the earlier columns left, so it steps over theirs, the lowest first.
        for taken_V in torch.stack(columns, -1).sort(-1).values.unbind(-1) if columns else ():
            drawn_V = drawn_V + (drawn_V >= taken_V)
        columns.append(drawn_V)
    return torch.stack(columns, -1)


def balanced_table(counts: Sequence[float], num_experts: int, top_k: int, seed: int) -> Tensor:
    """Return a table, int64 (V, K), in which ids from the most frequent to the rarest each take the K experts with the
    fewest tokens so far, and of those the ones with the fewest ids.

    Args:
        counts: number of occurrences of each id; ids of equal counts are put in a random order.
        num_experts, top_k: E and K.
        seed: seed of that order.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(counts), generator=generator, device="cpu").tolist()
    load = [(0.0, 0, expert) for expert in range(num_experts)]
    rows: list[list[int]] = [[]] * len(counts)
    for token in sorted(shuffled, key=lambda t: -counts[t]):
        emptiest = [heapq.heappop(load) for _ in range(top_k)]
        rows[token] = [expert for *_, expert in emptiest]
        for tokens, ids, expert in emptiest:
            heapq.heappush(load, (tokens + counts[token], ids + 1, expert))
    return torch.tensor(rows, device="cpu")


class HashRouter(PairRouter):
    """The router of ``Hash``: experts by token id, from a table.

    Attributes:
        table: int64 (V, K) buffer; -1 in a clustered table that is not made yet.
    """

    config: Hash
    table: Tensor

    def __init__(self, dim: int, num_experts: int, config: Hash, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.register_buffer("table", torch.empty(config.vocab_size, config.top_k, dtype=torch.int64))
        self._made = config.kind != "clustered"
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the table as at the start; one that ``fit`` or ``fit_clusters`` made is gone."""
        super().reset_parameters()
        V, K, E, config = self.config.vocab_size, self.config.top_k, self.num_experts, self.config
        if self.table.is_meta:
            return
        if config.kind == "clustered":
            self.table.fill_(-1)
        # Both draw on CPU, so that a seed gives one table on every device.
        elif config.kind == "random":
            self.table.copy_(random_table(V, E, K, config.seed))
        else:
            self.table.copy_(balanced_table([1.0] * V, E, K, config.seed))

    def choose(self, tokens: Tokens) -> Choice:
        if self.config.kind == "clustered" and self._is_unread(self.table):
            self._made = bool((self.table >= 0).all())
        if not self._made:
            raise ValueError("Hash(kind='clustered') has no table yet: call router.fit_clusters(embeddings) first")
        expert_TK = self.table.index_select(0, tokens.ids("token_ids_BS", self.config.vocab_size).flatten())
        config = self.config
        if config.score_func is None:
            return Choice(expert_TK, tokens.x_TD.new_full(expert_TK.shape, 1.0 / config.top_k))
        logits_TE = tokens.logits(self.gate)
        scores_TE = SCORE_FUNCS[config.score_func](logits_TE)
        gates_TK = gates_of(logits_TE, scores_TE, expert_TK, config.score_func, normalize=config.top_k > 1)
        return Choice(expert_TK, gates_TK * config.scale, Evidence(scores_TE, logits_TE))

    def fit(self, counts: Sequence[float] | Tensor) -> None:
        """Make a balanced table for the frequencies of the training text. Call it before training: it moves tokens.

        Args:
            counts: (V,), number of occurrences of each token id; not negative.

        Raises:
            ValueError: the hash is not of this kind, or the counts have another length or are negative.
        """
        self._check_kind("balanced", "fit")
        numbers = [float(count) for count in (counts.tolist() if isinstance(counts, Tensor) else counts)]
        if len(numbers) != self.config.vocab_size:
            raise ValueError(f"{len(numbers)} counts are not one for each of vocab_size={self.config.vocab_size}")
        if not all(0 <= number < float("inf") for number in numbers):
            raise ValueError("a count is negative or not finite")
        self._set(balanced_table(numbers, self.num_experts, self.config.top_k, self.config.seed))

    def fit_clusters(self, embeddings_VD: Tensor, num_iterations: int = 20) -> None:
        """Make a clustered table: like token ids, by k-means of their embeddings, take the same expert, and each expert
        as many ids as the others. Call it before training.

        Args:
            embeddings_VD: (V, D), such as a trained dense model's.
            num_iterations: most iterations of k-means.

        Raises:
            ValueError: the hash is not of this kind, or there is not one finite embedding for each id.
        """
        self._check_kind("clustered", "fit_clusters")
        if embeddings_VD.ndim != 2 or len(embeddings_VD) != self.config.vocab_size:
            raise ValueError(
                f"embeddings of shape {tuple(embeddings_VD.shape)} are not one for each of "
                f"vocab_size={self.config.vocab_size}"
            )
        cluster_V = balanced_clusters(
            embeddings_VD, self.num_experts, seed=self.config.seed, num_iterations=num_iterations
        )
        self._set(cluster_V[:, None])

    def _check_kind(self, kind: str, method: str) -> None:
        if self.config.kind != kind:
            raise ValueError(f"{method} makes a table of kind={kind!r}, and this one is of kind={self.config.kind!r}")

    def _set(self, table_VK: Tensor) -> None:
        self.table.copy_(table_VK)
        self._made = True

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.table.is_meta:  # here as well: compiled code does not look
            self._made = bool((self.table >= 0).all())


@dataclass(frozen=True)
class Hash(FixedKConfig):
    """A token's expert is a fixed function of its id (Hash layers, arXiv 2106.04426), at gate 1, or with ``score_func``
    at a learned gate, as in the first layers of DeepSeek-V4.

    Attributes:
        vocab_size: token ids are in ``range(vocab_size)``; in vision, the number of patches.
        kind: "random"; "balanced": each expert gets as many ids as the others, or, after ``router.fit(counts)``, about
            as many tokens; "clustered": after ``router.fit_clusters(embeddings)``, like tokens together.
        top_k: different experts per token, each at gate 1 / K. The kind "clustered" has 1.
        seed: seed of the table.
        score_func: score of the logits ``x W^T`` that the gates are: "softmax", "sigmoid" or "sqrt_softplus"; for K > 1
            they are normalized to sum to 1. None: nothing is learned.
        scale: factor on the learned gates.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2106.04426"
    router_class = HashRouter
    can_grow = False
    needs = ("token_ids_BS",)

    vocab_size: Count
    kind: Annotated[str, OneOf(*HASHES)] = "random"
    top_k: Count = 1
    seed: int = 0
    score_func: Annotated[str, OneOf(*SCORE_FUNCS)] | None = None
    scale: Positive = 1.0
    init_scale: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_func is None and self.scale != 1.0:
            raise ValueError(f"scale={self.scale} is a factor on learned gates, and score_func is None")
        if self.kind == "clustered" and self.top_k != 1:
            raise ValueError(f"top_k={self.top_k} is not 1, and a token is in one cluster")

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        if self.kind == "clustered" and num_experts > self.vocab_size:
            raise ValueError(f"num_experts={num_experts} clusters exceed vocab_size={self.vocab_size}")

    @property
    def terms(self) -> frozenset[str]:
        # No gate moves a token, so there is nothing to balance.
        return frozenset({"router_z_loss"}) if self.score_func else frozenset()

    def make_gate(self, dim: int, num_experts: int) -> LinearGate | None:
        return LinearGate(dim, num_experts, self.init_scale) if self.score_func else None

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * num_experts if self.score_func else 0

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * self.num_params(dim, num_experts)


class RandomRouter(PairRouter):
    """The router of ``Random``: random experts in training, a fixed choice or equal weights of all in evaluation."""

    config: Random

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Any:
        if self.training or self.config.evaluation != "merged":
            return super().forward(x, context)
        B, S, _ = x.shape
        valid_BS = None if context is None else context.valid_BS
        count = torch.full((), B * S, device=x.device) if valid_BS is None else valid_BS.sum()
        return MergeRouting(
            weights_GE=x.new_full((B, self.num_experts), 1.0 / self.num_experts, dtype=torch.float32),
            tokens_per_group=S,
            groups_per_sequence=1,
            tokens_per_expert_E=count.expand(self.num_experts),
            num_tokens=B * S,
            valid_T=None if valid_BS is None else valid_BS.flatten(),
        )

    def choose(self, tokens: Tokens) -> Choice:
        config, x_TD = self.config, tokens.x_TD
        if self.training:
            return self._choice(self._draw(tokens), x_TD)
        experts = torch.arange(self.num_experts, device=x_TD.device)
        if config.evaluation == "average":
            return self._choice(experts.expand(x_TD.shape[0], -1), x_TD)
        # Positions take the experts in turn, K at a time, which is balanced in every sequence.
        place_SK = torch.arange(tokens.length * config.top_k, device=x_TD.device).unflatten(0, (-1, config.top_k))
        return self._choice((place_SK % self.num_experts).repeat(tokens.num_sequences, 1), x_TD)

    def _draw(self, tokens: Tokens) -> Tensor:
        rows = {"token": tokens.x_TD.shape[0], "sequence": tokens.num_sequences, "batch": 1}[self.config.per]
        # The largest of uniform numbers make every set of K experts equally likely.
        drawn = torch.rand(rows, self.num_experts, device=tokens.x_TD.device).topk(self.config.top_k, dim=-1).indices
        if self.config.per == "sequence":
            return tokens.to_tokens(drawn)
        return drawn.expand(tokens.x_TD.shape[0], -1)

    @staticmethod
    def _choice(expert_TK: Tensor, x_TD: Tensor) -> Choice:
        return Choice(expert_TK, x_TD.new_full(expert_TK.shape, 1.0 / expert_TK.shape[-1]))


@dataclass(frozen=True)
class Random(FixedKConfig):
    """Experts are chosen at random in training (THOR, arXiv 2110.04260), at gate 1 / K. THOR runs each batch twice with
    ``top_k=1`` and adds ``consistency_loss`` of the two outputs, so that any expert will do.

    In evaluation the choice is fixed: with "fixed" position s of a sequence takes the experts ``s K + k mod E``; with
    "average" every token takes all experts at gate 1 / E, at E / K times the cost; with "merged" all tokens take one
    expert, whose parameters are the mean of all experts' (AdaMix, arXiv 2205.12410, which chooses ``per="batch"``).

    Attributes:
        top_k: experts per token, K.
        per: unit of one random choice, "token", "sequence" or "batch".
        evaluation: "fixed", "average" or "merged".
    """

    paper = "2110.04260"
    router_class = RandomRouter
    can_grow = False

    top_k: Count = 1
    per: Literal["token", "sequence", "batch"] = "token"
    evaluation: Literal["fixed", "average", "merged"] = "fixed"

    @property
    def reads_position(self) -> bool:
        return self.evaluation == "fixed"

    def constant_gates(self, num_experts: int) -> tuple[float, ...] | None:
        takes_all = self.evaluation == "average" or (self.evaluation == "fixed" and self.top_k == num_experts)
        return (1.0 / num_experts,) * num_experts if takes_all else None

    @property
    def layer_kind(self) -> str:
        return "averaged" if self.evaluation == "merged" else "pairs"

    @property
    def layer_options(self) -> frozenset[str]:
        # A merged expert has no capacity, and what training drops at random would be another method.
        return frozenset({"backend"}) if self.evaluation == "merged" else LAYER_OPTIONS


class DomainRandomRouter(PairRouter):
    """The router of ``DomainRandom``: a group of experts by domain, and one expert of it by token id.

    Attributes:
        table: int64 (number of domains, V) buffer of experts.
    """

    config: DomainRandom
    table: Tensor

    def __init__(self, dim: int, num_experts: int, config: DomainRandom, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.register_buffer("table", torch.empty(config.num_domains, config.vocab_size, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        config, size = self.config, self.num_experts // self.config.num_domains
        generator = torch.Generator().manual_seed(config.seed)
        for domain in range(config.num_domains):
            # Ids in a random order take the experts in turn, so that their numbers of ids differ by at most one.
            place_V = torch.randperm(config.vocab_size, generator=generator, device="cpu")
            self.table[domain].copy_(domain * size + place_V % size)

    def choose(self, tokens: Tokens) -> Choice:
        ids_T = tokens.ids("token_ids_BS", self.config.vocab_size).flatten()
        domain_B = tokens.ids("domain_ids_B", self.config.num_domains)
        # Two lookups, by token and then by domain, each reject an id out of range.
        expert_1T = self.table.index_select(1, ids_T).gather(0, tokens.to_tokens(domain_B)[None])
        return Choice(expert_1T.T, tokens.x_TD.new_ones(expert_1T.T.shape))


@dataclass(frozen=True)
class DomainRandom(RouterConfig):
    """Random routed experts of PanGu-Sigma (arXiv 2303.10845): a sequence's domain selects one of equal groups of
    experts, and a table sampled once maps each token id to an expert of that group, at gate 1. A domain's experts can
    be taken out and trained on without touching the others.

    Attributes:
        num_domains: groups; ``context.domain_ids_B`` is in ``range(num_domains)``. Group d has the experts
            ``d E / num_domains`` and following.
        vocab_size: token ids are in ``range(vocab_size)``.
        seed: seed of the table.
    """

    paper = "2303.10845"
    router_class = DomainRandomRouter
    can_grow = False
    needs = ("token_ids_BS", "domain_ids_B")

    num_domains: Count
    vocab_size: Count
    seed: int = 0

    def check(self, num_experts: int) -> None:
        divides("num_domains", self.num_domains, num_experts)

    def pairs_per_token(self, num_experts: int) -> float:
        return 1.0
