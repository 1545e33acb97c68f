"""``MoEConfig``: the parts of a layer put together. Its fields are the YAML schema."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any

from ..dispatch import Dispatcher
from ..experts import FFN, ExpertConfig
from ..experts.unloaded import device_of_experts
from ..fields import Checked, Count, CountOrZero, OneOf, ShareBelowOne, check_values
from ..kernels import Backend
from ..layers import AttentionMoE, AveragedMoE, MergedMoE, MoE, NeuronMoE, PatchMoE, SharedGate, SoftMoE
from ..layers.shared import KINDS
from ..registry import register_config
from ..routing.balance.balance import Balance
from ..routing.pairs.token_choice import TokenChoice
from ..routing.router import LAYER_OPTIONS, RouterConfig
from ..routing.selection import Capacity, EvalFactor, Factor, Group, Priority
from .plain import make, to_plain

LAYERS: dict[tuple[str, str], type[MoE]] = {
    ("pairs", "rows"): MoE,
    ("slots", "rows"): SoftMoE,
    ("merged", "rows"): MergedMoE,
    ("averaged", "rows"): AveragedMoE,
    ("pairs", "attention"): AttentionMoE,
    ("pairs", "neurons"): NeuronMoE,
    ("slots", "neurons"): SoftMoE,
    ("pairs", "patches"): PatchMoE,
}
"""The layer of each kind of decision (``RouterConfig.layer_kind``) and of experts (``ExpertConfig.layer_kind``).

Experts that compute each row by itself are of the kind "rows". Others, such as attention, name a kind of their own and
add its layers here.
"""


@register_config
@dataclass(frozen=True)
class MoEConfig(Checked):
    """A mixture-of-experts layer, to be built at any width.

    Attributes:
        num_experts: E.
        router: choice of the experts: ``TokenChoice(...)`` or another router config. It decides which layer is built,
            and which of the fields below have a meaning; a field without a meaning raises an error unless it is left at
            its default.
        expert: kind of the experts: ``FFN(...)``, ``SwiGLU(...)``, ``GEGLU(...)``.
        capacity_factor: in training an expert takes ``ceil(capacity_factor * K * tokens in group / E)`` tokens and the
            rest are dropped; None: dropless.
        eval_capacity_factor: the same in evaluation; None: as in training; infinity: dropless.
        priority: order of service when capacity is short: "position", "score" (batch priority) or "random".
        group: tokens that compete for capacity: "batch", "sequence", a number of tokens; None: the router's default.
        num_shared_experts: experts that every token takes besides.
        shared_expert: kind of the shared experts, such as one of another width (Qwen2-MoE), or an FFN next to ``PEER``
            (Doge); None: as ``expert``.
        balance: weights of the balance losses.
        backend: kernels that compute: "auto", "eager", "cpu", "grouped" or "triton".
        shared_gate: how the shared experts' output s joins the routed one, r: "none": ``r + s``; "mix": ``(1 - g) s +
            g r`` with a gate ``g = sigmoid(x w)`` a token (NLLB's conditional routing, arXiv 2207.04672), whose share
            ``Balance(gate_budget=..., budget=...)`` holds; "scale": ``r + g s`` (Qwen-MoE).
        shared_gate_dropout: probability, with "mix" in training, that a token's g is 0: only the shared experts.
        expert_output_masking: in training each computed pair is left out of its token's sum with this probability, and
            the others are scaled by 1 / (1 - it) (NLLB, arXiv 2207.04672); losses, loads and capacity stay as they are.
        expert_dropout: probability in training that a token cannot choose an expert, sampled for each token and expert
            before the choice (SiRA, arXiv 2311.09179); the gates come from the choice among the rest, of which at least
            K stay. The dropout inside an expert that Switch fine-tunes with (arXiv 2101.03961) is another method.
        granularity: g, which makes the experts finer at the same cost (DeepSeekMoE, arXiv 2401.06066): g E experts of
            width F / g, of which a token takes g K. Shared experts of the routed kind have that width too, and their
            number stays.
        output_bias: a learned vector is added to the output of every token (JetMoE, arXiv 2404.07413).

    Example::

        layer = MoEConfig(num_experts=8, router=TokenChoice(top_k=2)).build(dim=64)
        y = layer(torch.randn(4, 16, 64))

    Raises:
        ValueError: a value is out of its range, or two of them do not go together.
    """

    num_experts: Count
    router: RouterConfig = TokenChoice()
    expert: ExpertConfig = FFN()
    capacity_factor: Factor | None = None
    eval_capacity_factor: EvalFactor | None = None
    priority: Priority = "position"
    group: Group | None = None
    num_shared_experts: CountOrZero = 0
    shared_expert: ExpertConfig | None = None
    balance: Balance = Balance()
    backend: Backend = "auto"
    shared_gate: Annotated[str, OneOf("none", *KINDS)] = "none"
    shared_gate_dropout: ShareBelowOne = 0.0
    expert_output_masking: ShareBelowOne = 0.0
    expert_dropout: ShareBelowOne = 0.0
    granularity: Count = 1
    output_bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_shared_expert()
        self.layer_class()
        fine = self.split()
        fine.router.check(fine.num_experts)
        fine.expert.check(fine.num_experts)
        self._check_options()
        self._check_shared_gate()
        terms = self.router.terms | self.layer_class().own_terms
        terms |= {"gate_budget"} if self.shared_gate == "mix" else set()
        self.balance.check(terms, self.router.source(), fine.num_experts)
        if self.balance.adaptive and self.capacity_factor is None:
            raise ValueError("balance.adaptive=True follows the drop rate, which is 0 without a capacity_factor")

    def _check_options(self) -> None:
        """Raise an error for options that were set by hand and have no meaning with the router."""
        heeded, router = self.router.layer_options, self.router.source()
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in LAYER_OPTIONS - heeded and value != f.default:
                own = f", which has its own {f.name}" if hasattr(self.router, f.name) else ""
                raise ValueError(f"{f.name}={value!r} does not apply to {router}{own}")
        if self.group is not None:
            self.router.check_group(self.group)
        if self.expert_output_masking and self.router.layer_kind != "pairs":
            raise ValueError(f"expert_output_masking={self.expert_output_masking} does not apply to {router}")
        if self.expert_dropout and not self.router.drops_experts:
            why = "it is for routers that choose by their logits alone"
            raise ValueError(f"expert_dropout={self.expert_dropout} does not apply to {router}: {why}")

    def _check_shared_expert(self) -> None:
        if self.shared_expert is not None and not self.num_shared_experts:
            raise ValueError(f"shared_expert={self.shared_expert} needs num_shared_experts, which is 0")
        if self.num_shared_experts:
            shared = self.shared_expert or self.expert
            shared.check(self.num_shared_experts)
            for kind, allowed in ((shared, ("rows",)), (self.expert, ("rows", "neurons"))):
                if kind.layer_kind not in allowed:
                    name, does = type(kind).__name__, kind.layer_kind
                    raise ValueError(f"num_shared_experts={self.num_shared_experts} with {name}, which computes {does}")

    def _check_shared_gate(self) -> None:
        if self.shared_gate != "none" and not self.num_shared_experts:
            raise ValueError(f"shared_gate={self.shared_gate!r} needs num_shared_experts, which is 0")
        for name, value in (
            ("shared_gate_dropout", self.shared_gate_dropout),
            ("balance.gate_budget", self.balance.gate_budget),
        ):
            if value and self.shared_gate != "mix":
                raise ValueError(f"{name}={value} needs shared_gate='mix', not {self.shared_gate!r}")

    def split(self, dim: int | None = None) -> MoEConfig:
        """Return the layer that ``granularity`` means, written out: all its experts, and a granularity of 1.

        Args:
            dim: D of the tokens; None: a width that depends on it stays as it is.

        Raises:
            ValueError: the granularity does not divide the experts' width, or they or the router cannot be split.
        """
        times = self.granularity
        if times == 1:
            return self
        top_k = getattr(self.router, "top_k", None)
        if not isinstance(top_k, int) or self.router.layer_kind != "pairs":
            raise ValueError(f"granularity={times} multiplies top_k, which {self.router.source()} does not have")
        fine = replace(
            self,
            num_experts=times * self.num_experts,
            router=replace(self.router, top_k=times * top_k),  # type: ignore[call-arg]
            expert=self.expert.narrowed(times, dim),
            granularity=1,
        )
        return fine

    def capacity(self) -> Capacity:
        """Return the capacity limits, with the router's default group filled in."""
        group = self.router.default_group if self.group is None else self.group
        return Capacity(self.capacity_factor, self.eval_capacity_factor, self.priority, group)

    def build(self, dim: int, out_dim: int | None = None, *, causal: bool = False) -> MoE:
        """Build the layer for tokens of width ``dim``: ``MoE``, or its subclass of ``LAYERS``.

        Args:
            dim: D of the tokens.
            out_dim: width of the output; None: as ``dim``.
            causal: the layer is part of a causal decoder, in which a later token must not change an earlier one.

        Raises:
            ValueError: ``dim`` or ``out_dim`` is below 1, router or experts are not causal and have to be, the
                granularity does not divide the experts' width, or shared experts have another output width.
        """
        if causal and not self.router.is_causal:
            raise ValueError(
                f"router {self.router.source()} lets later tokens change earlier ones: not for a causal decoder"
            )
        if causal and not self.expert.is_causal:
            name = type(self.expert).__name__
            raise ValueError(f"{name} shows a token those after it: not for a causal decoder")
        check_values(Count | None, dim=dim, out_dim=out_dim)
        if self.granularity > 1:
            return self.split(dim).build(dim, out_dim)
        shared, has_gate = self.num_shared_experts, self.shared_gate != "none"
        width = self.expert.out_dim(dim) if out_dim is None else out_dim
        shared_expert = self.shared_expert or self.expert
        own = shared_expert.out_dim(dim) if out_dim is None else out_dim
        if shared and own != width:
            raise ValueError(f"shared_expert={shared_expert} has outputs of width {own}, the routed experts of {width}")
        router = self.router.build(self.expert.row_dim(dim), self.num_experts, self.capacity())
        with device_of_experts():
            experts = self.expert.build(self.num_experts, dim, out_dim)
        layer = self.layer_class()(
            router,
            experts,
            self.balance,
            self.make_dispatcher(),
            shared_experts=shared_expert.build(shared, dim, out_dim) if shared else None,
            shared_gate=SharedGate(dim, self.shared_gate, self.shared_gate_dropout) if has_gate else None,
            expert_output_masking=self.expert_output_masking,
            bias_dim=width if self.output_bias else None,
            pairs_per_token=self.router.pairs_per_token(self.num_experts),
            dim=dim,
            **self.expert.layer_arguments(),
        )
        layer.out_dim = width
        layer.router.expert_dropout = self.expert_dropout
        layer.backend = self.backend
        if isinstance(layer, AttentionMoE):
            layer.causal = causal
        return layer

    def make_dispatcher(self) -> Dispatcher:
        """Return the dispatcher of the layer that ``build`` makes: all experts are here."""
        return self.layer_class().default_dispatcher()

    def layer_class(self) -> type[MoE]:
        """Return the layer of this router and these experts.

        Raises:
            ValueError: no layer brings the two together.
        """
        layer = LAYERS.get((self.router.layer_kind, self.expert.layer_kind))
        if layer is None:
            router = f"the {self.router.layer_kind} of {self.router.source()}"
            raise ValueError(f"{type(self.expert).__name__} computes {self.expert.layer_kind}: not with {router}")
        return layer

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the parameters of the layer, equal to the sum of ``numel`` of the built one."""
        if self.granularity > 1:
            return self.split(dim).num_params(dim, out_dim)
        routed = sum(kind.num_params(dim, out_dim) for kind in self.expert.of_each(self.num_experts))
        return self.own_params(dim, out_dim) + routed + self._shared(lambda kind: kind.num_params(dim, out_dim))

    def active_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the parameters that one token touches; of experts of several kinds, at balance."""
        if self.granularity > 1:
            return self.split(dim).active_params(dim, out_dim)
        routed = self.router.pairs_per_token(self.num_experts) * self._mean(lambda kind: kind.num_params(dim, out_dim))
        return self.own_params(dim, out_dim) + round(routed + self._shared(lambda kind: kind.num_params(dim, out_dim)))

    def flops_per_token(self, dim: int, out_dim: int | None = None, *, tokens_per_sequence: int | None = None) -> int:
        """Return the forward FLOPs of a token and its router. A capacity factor below 1 bounds the experts' part.

        Args:
            dim: D.
            out_dim: width of the output; None: as ``dim``.
            tokens_per_sequence: S. Soft slots and merged experts cost so much a sequence, and need it; expert choice
                rounds its capacity up by it; other routers do not ask. Attention experts need it too. Without it, no
                token is counted as one of a prefix, which no expert takes.

        Raises:
            ValueError: the router or the experts need ``tokens_per_sequence``, it is below 1, or the experts' patches
                do not divide it.
        """
        check_values(Count | None, tokens_per_sequence=tokens_per_sequence)
        if self.granularity > 1:
            return self.split(dim).flops_per_token(dim, out_dim, tokens_per_sequence=tokens_per_sequence)
        length = None if tokens_per_sequence is None else self.expert.rows_per_sequence(tokens_per_sequence)
        group = self.capacity().group
        rows_per_group = group if isinstance(group, int) else length if group == "sequence" else None
        rows = self.router.rows_per_token(self.num_experts, rows_per_group)
        shared_parts = self.expert.layer_flops_per_token(dim, rows, tokens_per_sequence)
        rows *= min(1.0, self.capacity_factor or 1.0)
        layer = self.router.layer_flops_per_token(
            dim,
            self.expert.out_dim(dim) if out_dim is None else out_dim,
            self.num_experts,
            round(self._mean(lambda kind: kind.num_params(dim, out_dim))),
            rows_per_group,
        )
        experts = rows * self._mean(lambda kind: kind.flops_per_row(dim, out_dim))
        experts += self._shared(lambda kind: kind.flops_per_row(dim, out_dim))
        gates = self.router.flops_per_token(self.expert.row_dim(dim), self.num_experts)
        gates += 0 if self.shared_gate == "none" else 2 * dim
        # The unit that the router decides on: a token, or a patch of several.
        per_decision = gates + round(experts + layer + shared_parts)
        if tokens_per_sequence is None or length is None:
            return round(per_decision / self.expert.tokens_per_row)
        return round(per_decision * length / tokens_per_sequence)

    def _mean(self, cost: Callable[[ExpertConfig], int]) -> float:
        """Return the mean cost of a routed expert."""
        return sum(map(cost, self.expert.of_each(self.num_experts))) / self.num_experts

    def _shared(self, cost: Callable[[ExpertConfig], int]) -> int:
        """Return the cost of all shared experts."""
        return self.num_shared_experts * cost(self.shared_expert or self.expert)

    def own_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the parameters of router, shared gate and output's bias, and the parameters that all experts share."""
        bias = (self.expert.out_dim(dim) if out_dim is None else out_dim) if self.output_bias else 0
        gates = self.router.num_params(self.expert.row_dim(dim), self.num_experts)
        gates += 0 if self.shared_gate == "none" else dim
        return gates + bias + self.expert.layer_params(dim)

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, as in YAML: parts that may be of several classes name theirs."""
        return to_plain(self, type(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoEConfig:
        """Return the config that ``to_dict`` wrote; parts may also be config objects already.

        Raises:
            ValueError: an unknown field or class, naming it.
        """
        return make(cls, values)
