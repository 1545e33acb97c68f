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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RoutingContext:
    """What a gate may know beside the hidden states. Every field is optional.

    Attributes:
        valid_BS: bool (B, S), True for real tokens. Padding is never routed, counted or in a loss.
        token_ids_BS: int64 (B, S), vocabulary ids; patch positions in vision.
        task_ids_B: int64 (B,), the task of each sequence; a language pair is a task.
        domain_ids_B: int64 (B,), the domain or scenario of each sequence.
        modality_BS: int64 (B, S), the modality of each token.
    """

    valid_BS: Tensor | None = None
    token_ids_BS: Tensor | None = None
    task_ids_B: Tensor | None = None
    domain_ids_B: Tensor | None = None
    modality_BS: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """Flat routed pairs: token choice, expert choice, hashing and assignment share this form.

    Attributes:
        token_index_N: int64 (N,), the token of each pair, in ``range(T)``.
        expert_ids_N: int64 (N,), its expert, or E where the pair is not computed.
        gates_N: float32 (N,), the combine weight of the expert's output.
        tokens_per_expert_E: int64 (E,), pairs each expert computes.
        chosen_per_expert_E: int64 (E,), pairs of real tokens that chose it, before capacity.
        num_tokens: T, padding included.
        top_k: K where the pairs are token-major, so that pair ``n`` belongs to token ``n // K``; else None.
        logits_TE: float32 (T, E), without noise; None where E is too large to hold them.
        scores_TE: float32 (T, E), the score function of ``logits_TE``; each row sums to 1 in the balance losses.
        valid_T: bool (T,), False for padding; None where every token is real.
        noise_std: standard deviation of the noise added to the logits, a float or (T, E); None without noise.
        threshold_TE: float32, broadcastable to (T, E): what a noisy logit had to reach to be chosen; or None.
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

    def detach(self) -> Routing:
        """The same decision without its graph."""
        detached: dict[str, Any] = {k: v.detach() for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **detached)


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
    """

    name: str
    routing: Any
    context: RoutingContext | None
    balance: Any
    terms: frozenset[str] = frozenset()
    needs_grad: bool = False
    has_grad: bool = True

    def detach(self) -> Entry:
        return replace(self, routing=self.routing.detach(), context=None, needs_grad=False)


class Tape:
    """The passes of a model's MoE layers, in their order. See ``record``."""

    def __init__(self, entries: tuple[Entry, ...] = ()) -> None:
        self._entries: list[Entry] = list(entries)
        self.grad_wanted = torch.is_grad_enabled()

    @staticmethod
    def clean_name(name: str) -> str:
        """A module's dotted name without the levels that DDP, ``torch.compile`` and checkpoint wrappers add."""
        parts = [p for p in name.split(".") if p not in ("_orig_mod", "_checkpoint_wrapped_module")]
        return ".".join(parts[1:] if parts[0:1] == ["module"] else parts)

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def append(self, entry: Entry) -> None:
        self._entries.append(entry)

    def detach(self) -> Tape:
        """The same passes without their graphs: what to keep across the micro-batches of a step."""
        return Tape(tuple(e.detach() for e in self._entries))

    def merge(self, other: Tape) -> Tape:
        """Both tapes' passes as one tape, this one's first."""
        return Tape(self.entries + other.entries)


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
    listening = []
    for name, module in model.named_modules():
        if hasattr(module, "_tapes"):
            listening.append(module)
            module._tapes = (*module._tapes, (Tape.clean_name(name), tape))
    try:
        yield tape
    finally:
        for module in listening:
            module._tapes = tuple(t for t in module._tapes if t[1] is not tape)
