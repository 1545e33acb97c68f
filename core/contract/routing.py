"""The decisions of routers: routed pairs, slots, merged experts, or every expert for every token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .evidence import Evidence
from .groups import TokenGroups


@dataclass(frozen=True)
class RoutingContext:
    """Facts about tokens and sequences that a gate may use in addition to the hidden states. Every field is optional.

    Attributes:
        valid_BS: bool (B, S), True for non-padding tokens. Padding is never routed, counted or in a loss.
        token_ids_BS: int64 (B, S), vocabulary ids; patch positions in vision.
        task_ids_B: int64 (B,), the task of each sequence; a language pair is a task.
        domain_ids_B: int64 (B,), the domain of each sequence (papers on recommenders call it a scenario).
        domain_weights_BE: float32 (B, number of domains), a mixture of domains for each sequence, such as a posterior.
        modality_BS: int64 (B, S), the modality of each token.
    """

    valid_BS: Tensor | None = None
    token_ids_BS: Tensor | None = None
    task_ids_B: Tensor | None = None
    domain_ids_B: Tensor | None = None
    domain_weights_BE: Tensor | None = None
    modality_BS: Tensor | None = None


# ``torch.export`` then takes a layer's own arguments, and a saved program can be loaded.
torch.export.register_dataclass(RoutingContext, serialized_type_name="core.RoutingContext")
torch.serialization.add_safe_globals([RoutingContext])


class Decision(Protocol):
    """The interface that every kind of routing has for the losses and the statistics."""

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """The number of pairs that each expert computes, (E,)."""

    @property
    def chosen_per_expert_E(self) -> Tensor:
        """The number of pairs of non-padding tokens that chose each expert, before capacity, (E,)."""

    @property
    def num_tokens(self) -> int:
        """The number of tokens T, padding included."""

    @property
    def valid_T(self) -> Tensor | None:
        """Bool (T,), False for padding; None if every token is real."""

    @property
    def num_sequences(self) -> int | None:
        """The number of sequences B, of T / B tokens each; None if it is not known."""

    @property
    def evidence(self) -> Evidence:
        """The evidence for the losses and the statistics."""


@dataclass(frozen=True)
class Routing:
    """Flat routed pairs: token choice, expert choice, hashing and assignment share this form.

    Attributes:
        token_index_N: int64 (N,), the token of each pair, in ``range(T)``, to which its output is added.
        expert_ids_N: int64 (N,), the expert of each pair, or E if the pair is not computed.
        gates_N: float32 (N,), the combine weight of the expert's output, or of its input if the router says so.
        tokens_per_expert_E, chosen_per_expert_E: int64 (E,), as in ``Decision``.
        num_tokens, valid_T, num_sequences, evidence: as in ``Decision``.
        top_k: K if the pairs are token-major, so that pair ``n`` belongs to token ``n // K``; else None.
        input_index_N: int64 (N,), the token that each pair reads, if several tasks route the same tokens
            (``core.dispatch.join_tasks``); None: ``token_index_N``.
        most_per_expert: the most pairs that an expert computes, known without a look at the choice; None: as many as
            there are tokens.
    """

    token_index_N: Tensor
    expert_ids_N: Tensor
    gates_N: Tensor
    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor
    num_tokens: int
    top_k: int | None = None
    input_index_N: Tensor | None = None
    valid_T: Tensor | None = None
    num_sequences: int | None = None
    evidence: Evidence = field(default_factory=Evidence)
    most_per_expert: int | None = None


@dataclass(frozen=True)
class SlotRouting:
    """Soft slots: each of an expert's P slots is a weighted mean of the tokens of a group (arXiv 2308.00951).

    A group is a sequence, so ``G = B`` and ``T = G * S``. No slot is ever left out, so both counts cover all of them.
    With ``across`` a group is the tokens at one position of several sequences (arXiv 2310.15961).

    Attributes:
        dispatch_GSEP: float32 (G, S, E, P), the share of each token in each slot: sums to 1 over the group's
            non-padding tokens.
        combine_GSEP: float32 (G, S, E, P), the share of each slot in each token: sums to 1 over E and P, but with
            ``across``, where it is ``dispatch_GSEP``. Padding has 0 in both.
        tokens_per_expert_E: int64 (E,), slots each expert computes for the groups that have a real token.
        num_tokens, valid_T: as in ``Decision``.
        across: the groups of tokens that share slots; None: they are the sequences.
    """

    dispatch_GSEP: Tensor
    combine_GSEP: Tensor
    tokens_per_expert_E: Tensor
    num_tokens: int
    valid_T: Tensor | None = None
    across: TokenGroups | None = None

    @property
    def chosen_per_expert_E(self) -> Tensor:
        return self.tokens_per_expert_E

    @property
    def num_sequences(self) -> int:
        return self.combine_GSEP.shape[0]

    @property
    def evidence(self) -> Evidence:
        """The scores are how a token's output is shared out among the experts."""
        return Evidence(self.combine_GSEP.sum(-1).flatten(0, 1))


@dataclass(frozen=True)
class MergeRouting:
    """Merged experts: all tokens of a group take one expert, the weighted sum of the experts' parameters.

    A group is a sequence or a segment of one, ``G = B * groups_per_sequence``, sequence by sequence. Nothing is ever
    left out, so both counts are equal.

    Attributes:
        weights_GE: float32 (G, E), the share of each expert's parameters.
        tokens_per_group: number of tokens of a group; the last of a sequence may have fewer.
        groups_per_sequence: number of groups of a sequence.
        tokens_per_expert_E: int64 (E,), non-padding tokens whose merged expert has a part of this one.
        num_tokens, valid_T: as in ``Decision``.
        in_segments: whether a sequence may have several groups.
        logits_GE: float32 (G, E), logits that the weights are the softmax of.
    """

    weights_GE: Tensor
    tokens_per_group: int
    groups_per_sequence: int
    tokens_per_expert_E: Tensor
    num_tokens: int
    in_segments: bool = False
    logits_GE: Tensor | None = None
    valid_T: Tensor | None = None

    @property
    def chosen_per_expert_E(self) -> Tensor:
        return self.tokens_per_expert_E

    @property
    def num_sequences(self) -> int:
        return self.weights_GE.shape[0] // self.groups_per_sequence

    @property
    def evidence(self) -> Evidence:
        """The scores are the weights of each token's group."""
        B = self.num_sequences
        weights_BSE = self.weights_GE.unflatten(0, (B, self.groups_per_sequence)).repeat_interleave(
            self.tokens_per_group, dim=1
        )
        return Evidence(weights_BSE[:, : self.num_tokens // max(B, 1)].flatten(0, 1))


@dataclass(frozen=True)
class DenseRouting:
    """Softmax gates over all experts they reach, one gate per task (MMoE, KDD 2018): all experts compute every example.

    A layer records one for each of its gates. Gates of one size share ``gates_BtE`` and differ in ``gate``; of several
    sizes, each is the only one of its own ``gates_BtE``.

    Attributes:
        gates_BtE: float32 (B, t, E), the weight of each expert in each task's output, without expert dropout. Sums to 1
            over E, except that padding has 0, and experts left out by a selection.
        gate: index of this gate among the t.
        num_tokens: B, padding included.
        logits_BtE: float32 (B, t, E), logits of the softmax; None if it was of more than logits.
        valid_T: bool (B,), False for padding; None if every example is real.
        expert_names: names of the E experts of this gate: "shared0", "task0.1" (expert 1 of task 0's own), "domain.0"
            (expert 0 of the example's domain).
        num_sequences: number of sequences that the examples come in; None: not known.
    """

    gates_BtE: Tensor
    gate: int
    num_tokens: int
    logits_BtE: Tensor | None = None
    valid_T: Tensor | None = None
    expert_names: tuple[str, ...] = ()
    num_sequences: int | None = None

    @property
    def chosen_per_expert_E(self) -> Tensor:
        """The load of experts that all examples take, float32 (E,): the sum of their gates over real examples."""
        return self.gates_BtE[:, self.gate].detach().sum(0)

    @property
    def tokens_per_expert_E(self) -> Tensor:
        """The load too, since nothing is ever left out."""
        return self.chosen_per_expert_E

    @property
    def evidence(self) -> Evidence:
        """The scores and the logits are this gate's."""
        logits_BE = None if self.logits_BtE is None else self.logits_BtE[:, self.gate]
        return Evidence(self.gates_BtE[:, self.gate], logits_BE)


@dataclass(frozen=True)
class Loads:
    """The counts of a decision (see ``Decision`` and ``Evidence``), which replace it on the tape of ``Tape.loads``: all
    that ``update_expert_bias`` reads."""

    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor
    counts: Tensor | None = None
