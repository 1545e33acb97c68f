"""What router, dispatcher and experts hand to each other, and the tape that remembers it.

Shape legend, used as suffixes of local names and never of parameters:

    B batch            S sequence            T tokens (B*S, flattened)     G groups
    D model dim        F expert hidden dim   E experts                     K experts per token
    N routed pairs     R rows on the local experts                         C capacity
    P slots per expert

A *routed pair* is one (token, expert) choice. A pair that is not computed (its expert was full, its token is padding,
its second expert was left out) keeps its row with the expert id ``E``: it sorts last, past the last offset.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutingContext:
    """What a gate may know beside the hidden states. Every field is optional.

    Attributes:
        valid_BS: bool (B, S), True for real tokens. Padding is never routed, counted or in a loss.
        token_ids_BS: int64 (B, S), vocabulary ids; patch positions in vision.
        task_ids_B: int64 (B,), the task of each sequence; a language pair is a task.
        domain_ids_B: int64 (B,), the domain or scenario of each sequence.
        domain_weights_BE: float32 (B, number of domains), a mixture of domains for each sequence, as its posterior.
        modality_BS: int64 (B, S), the modality of each token.
    """

    valid_BS: Tensor | None = None
    token_ids_BS: Tensor | None = None
    task_ids_B: Tensor | None = None
    domain_ids_B: Tensor | None = None
    domain_weights_BE: Tensor | None = None
    modality_BS: Tensor | None = None


# So that ``torch.export`` takes a layer's own arguments, and a saved program is loaded.
torch.export.register_dataclass(RoutingContext, serialized_type_name="core.RoutingContext")
torch.serialization.add_safe_globals([RoutingContext])


@dataclass(frozen=True)
class Routing:
    """Flat routed pairs: token choice, expert choice, hashing and assignment share this form.

    Attributes:
        token_index_N: int64 (N,), the token of each pair, in ``range(T)``.
        expert_ids_N: int64 (N,), its expert, or E where the pair is not computed.
        gates_N: float32 (N,), the combine weight of the expert's output, or of its input where the router says so.
        tokens_per_expert_E: int64 (E,), pairs each expert computes.
        chosen_per_expert_E: int64 (E,), pairs of real tokens that chose it, before capacity.
        num_tokens: T, padding included.
        top_k: K where the pairs are token-major, so that pair ``n`` belongs to token ``n // K``; else None.
        logits_TE: float32 (T, E), without noise; (T, M) with null experts; -inf where a token cannot reach an expert;
            None where E is too large to hold them.
        scores_TE: float32 (T, E), the score function of ``logits_TE``; each row sums to 1 in the balance losses.
        valid_T: bool (T,), False for padding; None where every token is real.
        noise_std: standard deviation of the noise added to the logits, a float or (T, E); None without noise.
        threshold_TE: float32, broadcastable to (T, E): what a noisy logit had to reach to be chosen; or None.
        num_sequences: B, for the losses of each sequence; T is B times their length. None where it is not known.
        extra: the gate's own losses by name, float32 (T,) each; padding may hold any finite value. Their means over
            the real tokens join the balance losses with the weights of ``RouterConfig.extra_weights``. None: none.
        balance_scores, balance_chosen: float32 (T, M) and (M,), what the ``load_balancing`` and ``importance`` losses
            read in place of ``scores_TE`` and ``chosen_per_expert_E``, where they judge more than the E experts (null
            experts), or another choice than the computed one. None: the same.
        sums: what the balance losses sum over the real tokens, where the gate summed it on the way: see
            ``kernels.eager.TopK``. None: they sum it themselves.
    """

    token_index_N: Tensor
    expert_ids_N: Tensor
    gates_N: Tensor
    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor
    num_tokens: int
    top_k: int | None = None
    logits_TE: Tensor | None = None
    scores_TE: Tensor | None = None
    valid_T: Tensor | None = None
    noise_std: float | Tensor | None = None
    threshold_TE: Tensor | None = None
    num_sequences: int | None = None
    extra: dict[str, Tensor] | None = None
    balance_scores: Tensor | None = None
    balance_chosen: Tensor | None = None
    sums: dict[str, Tensor] | None = None

    def detach(self) -> Routing:
        """The same decision without its graph."""
        return replace(self, **_detached(self))


def _detached(routing: Any) -> dict[str, Any]:
    detached: dict[str, Any] = {k: v.detach() for k, v in vars(routing).items() if isinstance(v, Tensor)}
    for name in ("extra", "sums"):
        values = getattr(routing, name, None)
        if values is not None:
            detached[name] = {key: value.detach() for key, value in values.items()}
    return detached


class _WithoutPairs:
    """What the balance losses ask of a routing, and one without pairs does not have."""

    top_k: ClassVar[None] = None
    noise_std: ClassVar[None] = None
    threshold_TE: ClassVar[None] = None
    extra: ClassVar[None] = None
    balance_scores: ClassVar[None] = None
    balance_chosen: ClassVar[None] = None
    sums: ClassVar[None] = None


@dataclass(frozen=True)
class SlotRouting(_WithoutPairs):
    """Soft slots: each of an expert's P slots is a weighted mean of the tokens of a group (arXiv 2308.00951).

    A group is a sequence, so ``G = B`` and ``T = G * S``.

    Attributes:
        dispatch_GSEP: float32 (G, S, E, P), the share of each token in each slot: sums to 1 over the real tokens S.
        combine_GSEP: float32 (G, S, E, P), the share of each slot in each token: sums to 1 over E and P.
            Padding has 0 in both.
        tokens_per_expert_E: int64 (E,), slots each expert computes for the groups that have a real token.
        chosen_per_expert_E: the same: no slot is ever left out.
        num_tokens: T, padding included.
        valid_T: bool (T,), False for padding; None where every token is real.
    """

    dispatch_GSEP: Tensor
    combine_GSEP: Tensor
    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor
    num_tokens: int
    valid_T: Tensor | None = None
    logits_TE: ClassVar[None] = None
    num_sequences: ClassVar[None] = None

    @property
    def scores_TE(self) -> Tensor:
        """float32 (T, E), how a token's output is shared out among the experts."""
        return self.combine_GSEP.sum(-1).flatten(0, 1)

    def detach(self) -> SlotRouting:
        """The same decision without its graph."""
        return replace(self, **_detached(self))


@dataclass(frozen=True)
class MergeRouting(_WithoutPairs):
    """Merged experts: all tokens of a group take one expert, the weighted sum of the experts' parameters.

    A group is a sequence or a segment of one, ``G = B * groups_per_sequence``, sequence by sequence.

    Attributes:
        weights_GE: float32 (G, E), the share of each expert's parameters.
        tokens_per_group: tokens of a group; the last of a sequence may have fewer.
        groups_per_sequence: groups of a sequence.
        tokens_per_expert_E: int64 (E,), real tokens whose merged expert has a part of this one.
        chosen_per_expert_E: the same: nothing is ever left out.
        num_tokens: T, padding included.
        in_segments: a sequence may have several groups.
        logits_GE: float32 (G, E), what the weights were made of.
        valid_T: bool (T,), False for padding; None where every token is real.
    """

    weights_GE: Tensor
    tokens_per_group: int
    groups_per_sequence: int
    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor
    num_tokens: int
    in_segments: bool = False
    logits_GE: Tensor | None = None
    valid_T: Tensor | None = None
    logits_TE: ClassVar[None] = None
    num_sequences: ClassVar[None] = None

    @property
    def scores_TE(self) -> Tensor:
        """float32 (T, E), the weights of each token's group."""
        B = self.weights_GE.shape[0] // self.groups_per_sequence
        weights_BSE = self.weights_GE.unflatten(0, (B, self.groups_per_sequence)).repeat_interleave(
            self.tokens_per_group, dim=1
        )
        return weights_BSE[:, : self.num_tokens // max(B, 1)].flatten(0, 1)

    def detach(self) -> MergeRouting:
        """The same decision without its graph."""
        return replace(self, **_detached(self))


@dataclass(frozen=True)
class DenseRouting(_WithoutPairs):
    """Softmax gates over all experts they reach, one gate a task (MMoE, KDD 2018): all experts compute every example.

    A layer records one for each of its gates; they share ``gates_BtE`` and differ in ``gate``.

    Attributes:
        gates_BtE: float32 (B, t, E), the weight of each expert in each task's output, without expert dropout. Sums to 1
            over E, except that padding has 0, and experts left out by a selection.
        gate: which of the t gates this is about.
        num_tokens: B, padding included.
        logits_BtE: float32 (B, t, E), what the softmax was taken of; None where it was of more than logits.
        valid_T: bool (B,), False for padding; None where every example is real.
        expert_names: what the E experts of this gate are: "shared0", "task0.1" (expert 1 of task 0's own), "domain.0"
            (expert 0 of the example's domain).
        num_sequences: sequences that the examples come in; None: not known.
    """

    gates_BtE: Tensor
    gate: int
    num_tokens: int
    logits_BtE: Tensor | None = None
    valid_T: Tensor | None = None
    expert_names: tuple[str, ...] = ()
    num_sequences: int | None = None

    @property
    def scores_TE(self) -> Tensor:
        """float32 (B, E), this gate's weights."""
        return self.gates_BtE[:, self.gate]

    @property
    def logits_TE(self) -> Tensor | None:
        """float32 (B, E), this gate's logits."""
        return None if self.logits_BtE is None else self.logits_BtE[:, self.gate]

    @property
    def chosen_per_expert_E(self) -> Tensor:
        """float32 (E,), the load of an expert that all examples take: the sum of its gates over real examples."""
        return self.scores_TE.detach().sum(0)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """The same: nothing is ever left out."""
        return self.chosen_per_expert_E

    def detach(self) -> DenseRouting:
        """The same decision without its graph."""
        return replace(self, **_detached(self))


@dataclass(frozen=True)
class Loads:
    """What ``update_expert_bias`` reads of a routing of any kind, in its place on the tape of ``Tape.loads``.

    Attributes:
        tokens_per_expert_E, chosen_per_expert_E: as in ``Routing``.
    """

    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor

    def detach(self) -> Loads:
        """Itself: counts have no graph."""
        return self


@dataclass(frozen=True)
class RowPlan:
    """How the local dispatcher finds its way back.

    Attributes:
        order_R: int64 (R,), the pair each row came from.
        inverse_N: int64 (N,), the row of each pair.
        top_k: as in ``Routing``.
    """

    order_R: Tensor
    inverse_N: Tensor
    top_k: int | None


@dataclass(frozen=True)
class SlotPlan:
    """How the slot dispatcher finds its way back.

    Attributes:
        combine_GSEP: as in ``SlotRouting``.
    """

    combine_GSEP: Tensor


@dataclass(frozen=True)
class Rows:
    """Between dispatcher and experts: an index into the tokens, not necessarily a copy of them.

    Attributes:
        x: (T, D) tokens; (R, D) rows once ``gathered``; (T, D_out) once ``combined``.
        row_index_R: int64 (R,), the token of each row, rows sorted by expert.
        offsets_E: int32 (E,), inclusive cumulative count of rows; rows past the last one are not computed.
        gates_R: float32 (R,), combine weight of each row.
        num_tokens: T.
        plan: the dispatcher's own.
        gathered, weighted, combined: what has been done already.
    """

    x: Tensor
    row_index_R: Tensor
    offsets_E: Tensor
    gates_R: Tensor
    num_tokens: int
    plan: Any = None
    gathered: bool = False
    weighted: bool = False
    combined: bool = False

    def materialize(self) -> Tensor:
        """The rows themselves, (R, D), for simple experts and a user's own."""
        return self.x if self.gathered else self.x.index_select(0, self.row_index_R)

    def weighted_input(self) -> Rows:
        """The rows times their gates, with gates of 1 from here on: ``f(g x)`` in place of ``g f(x)``."""
        x_RD = (self.materialize() * self.gates_R[:, None]).to(self.x.dtype)
        return replace(self, x=x_RD, gates_R=torch.ones_like(self.gates_R), gathered=True)

    def with_output(self, y: Tensor, *, weighted: bool = False, combined: bool = False) -> Rows:
        """These rows after the experts: ``y`` is (R, D_out), or (T, D_out) when ``combined``."""
        return replace(self, x=y, gathered=True, weighted=weighted or combined, combined=combined)


@dataclass(frozen=True)
class Entry:
    """One pass of one layer.

    Attributes:
        name: the layer's dotted name in the recorded model.
        routing: what its router decided.
        context: what the layer was told.
        balance: the layer's own loss weights.
        terms: the balance terms that apply to its router.
        needs_grad: the router trains and gradients were wanted when the tape was opened.
        has_grad: gradients were on during the pass.
        load_balancing_weight: the layer's adaptive weight of that term, (); None where ``balance`` says it.
        extra_weights: the router's weights of ``routing.extra``.
        shared_gate_T: float32 (T,), the gate between the routed path and the shared experts, without dropout; padding
            may hold any finite value. None: there is none.
    """

    name: str
    routing: Any
    context: RoutingContext | None
    balance: Any
    terms: frozenset[str] = frozenset()
    needs_grad: bool = False
    has_grad: bool = True
    load_balancing_weight: Tensor | None = None
    extra_weights: Mapping[str, float] = field(default_factory=dict)
    shared_gate_T: Tensor | None = None

    def detach(self) -> Entry:
        gate_T = None if self.shared_gate_T is None else self.shared_gate_T.detach()
        context = None if self.context is None else replace(self.context, **_detached(self.context))
        return replace(self, routing=self.routing.detach(), context=context, needs_grad=False, shared_gate_T=gate_T)

    def loads(self) -> Entry:
        """The pass with its loads alone."""
        loads = Loads(self.routing.tokens_per_expert_E, self.routing.chosen_per_expert_E)
        return replace(self, routing=loads, context=None, needs_grad=False, shared_gate_T=None)


WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_dmp_wrapped_module"})
"""Names that ``torch.compile``, checkpoint wrappers, FSDP1 and TorchRec give the module that they wrap."""


def unwrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by dotted name, without the levels that wrappers add.

    A level ``module`` is a wrapper's (DDP) where it stands at the root and is all that its parent has.
    """
    while len(model._modules) == 1 and not model._parameters:
        ((name, inner),) = model._modules.items()
        if inner is None or name not in WRAPPED | {"module"}:
            break
        model = inner
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPED), module


class Tape:
    """The passes of a model's MoE layers, in their order. See ``record``.

    Attributes:
        grad_wanted: gradients were on when it was opened.
        shared_on: a device of the model, where ranks add up the sums of its layers; None: of no layer that can be told.
        layers: names of the layers that are recorded, whether they run or not.
    """

    def __init__(
        self,
        entries: tuple[Entry, ...] = (),
        shared_on: torch.device | None = None,
        layers: tuple[str, ...] = (),
    ) -> None:
        self._entries: list[Entry] = list(entries)
        self.grad_wanted = torch.is_grad_enabled()
        self.shared_on = shared_on
        self.layers = layers

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def silent_layers(self) -> tuple[str, ...]:
        """Return the names of the recorded layers without a pass: those that the forward did not reach, by intent as in
        a part of a model, or because something else computed in their place."""
        ran = tuple(entry.name for entry in self._entries)

        def is_silent(layer: str) -> bool:  # a pass of a layer with several routers is named "<layer>.<router>"
            return not any(not layer or name == layer or name.startswith(f"{layer}.") for name in ran)

        return tuple(layer for layer in self.layers if is_silent(layer))

    def append(self, entry: Entry) -> None:
        self._entries.append(entry)

    def detach(self) -> Tape:
        """The same passes without their graphs; ``loads`` is what to keep across micro-batches."""
        return Tape(tuple(e.detach() for e in self._entries), self.shared_on, self.layers)

    def loads(self) -> Tape:
        """The same passes with the experts' loads alone: what to keep across the micro-batches of a step for
        ``update_expert_bias``. Losses and statistics are taken of the tape itself."""
        return Tape(tuple(e.loads() for e in self._entries), layers=self.layers)

    def merge(self, other: Tape) -> Tape:
        """Both tapes' passes as one tape, this one's first."""
        layers = tuple(dict.fromkeys(self.layers + other.layers))
        return Tape(self.entries + other.entries, self.shared_on or other.shared_on, layers)


def several_ranks() -> bool:
    """Whether there is a process group of more than one rank."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Tape]:
    """Collect one ``Entry`` a pass of each MoE layer of ``model`` inside the ``with`` block.

    Layers hold a reference to the tape only inside the block: a forward leaves nothing behind in a module.
    A pass that an activation checkpoint repeats during the backward is not collected again.

    Example::

        with core.record(model) as tape:
            loss = task_loss(model(x), y)
        (loss + core.aux_loss(tape)).backward()
    """
    tape = Tape()
    listening: list[Any] = []
    for name, module in unwrapped_modules(model):
        if hasattr(module, "_tapes"):
            listening.append(module)
            listening[-1]._tapes = (*listening[-1]._tapes, (name, tape))
            tape.layers = (*tape.layers, name)
    if several_ranks():
        # A rank that records no pass of a layer takes part in the sums of those that do.
        tape.shared_on = next((device for m in listening if (device := m.shares_sums()) is not None), None)
    try:
        yield tape
    finally:
        for module in listening:
            module._tapes = tuple(t for t in module._tapes if t[1] is not tape)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "None": ("None", lambda value: value is None),
}


def check_kinds(config: Any, prefix: str = "") -> None:
    """Raise a ``ValueError`` where a field of a config is not of the kind that its annotation says.

    Args:
        config: a dataclass. Fields of other kinds than numbers, text, booleans and None are left to the config.
        prefix: before the names of the fields in the message.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), f.type if isinstance(f.type, str) else getattr(f.type, "__name__", "")
        names = kind.split(" | ")
        if all(name in _KINDS for name in names) and not any(_KINDS[name][1](value) for name in names):
            allowed = " or ".join(_KINDS[name][0] for name in names)
            raise ValueError(f"{prefix}{f.name}={value!r} is not {allowed}")


def check_part(name: str, value: object, kind: type, example: str) -> None:
    """Raise a ``ValueError`` where a field that holds a config holds another thing; ``example`` is one that fits."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} is not a config of its kind, as {example} is")
