"""``LayerFigures``: sums over the passes of one router, which the rules read. No token outlives its pass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..telemetry import MODALITIES
from .passes import Facts, Pass

PLACES = 64
"""Places of a sequence that are told apart; longer sequences are cut into so many parts."""


_SUMS = (
    *("num_tokens", "decisions", "chance_drops", "not_finite", "level", "chosen_E", "computed_E", "place_PE"),
    *("num_logits", "logit_M", "square_M", "place_logit_PM", "place_tokens_P", "modality_GE", "modality_tokens_G"),
)


class LayerFigures:
    """Sums over the non-padding tokens of one router's passes, float64 on the CPU.

    Attributes:
        num_experts, kind, facts: as in ``Pass``.
        num_tokens: non-padding tokens.
        decisions: tokens that decided by themselves; sequences, if all tokens of each have the same logits.
        chosen_E, computed_E: (E,), as in ``Pass``.
        place_PE: (P, E), computed pairs by place and expert.
        class_CE: (C, E), computed pairs by class and expert; None without labels.
        chance_drops: as in ``Pass``.
        num_logits: (M,), tokens with a finite logit.
        logit_M, square_M: (M,), sums of the logits less their token's mean, and of its square.
        place_logit_PM: (P, M), the first sum by place.
        place_tokens_P: (P,), tokens by place.
        modality_GE: (G, E), computed pairs by modality and expert.
        modality_tokens_G: (G,), tokens by modality.
        largest: largest absolute logit.
        not_finite: logits that are NaN or positively infinite.
        level: sum over tokens of ``logsumexp(logits)^2``.
        padding: tokens that a balance loss counts though they are padding, and all that it counts.
    """

    def __init__(self, num_experts: int, kind: str, facts: Facts, num_logits: int) -> None:
        E, M = num_experts, num_logits
        self.num_experts, self.kind, self.facts = num_experts, kind, facts
        self.num_tokens = self.decisions = 0
        self.chosen_E, self.computed_E = (torch.zeros(E, dtype=torch.float64) for _ in range(2))
        self.place_PE = torch.zeros(PLACES, E, dtype=torch.float64)
        self.class_CE: Tensor | None = None
        self.chance_drops = 0.0
        self.num_logits, self.logit_M, self.square_M = (torch.zeros(M, dtype=torch.float64) for _ in range(3))
        self.place_logit_PM = torch.zeros(PLACES, M, dtype=torch.float64)
        self.place_tokens_P = torch.zeros(PLACES, dtype=torch.float64)
        self.modality_GE = torch.zeros(MODALITIES, E, dtype=torch.float64)
        self.modality_tokens_G = torch.zeros(MODALITIES, dtype=torch.float64)
        self.largest, self.not_finite, self.level = 0.0, 0, 0.0
        self.padding = (0, 0)

    @classmethod
    def like(cls, one: Pass) -> LayerFigures:
        """Return empty figures for passes like this one."""
        return cls(one.num_experts, one.kind, one.facts, 0 if one.logits_TE is None else one.logits_TE.shape[1])

    @torch.no_grad()
    def add(self, one: Pass, labels: Tensor | None = None, real_T: Tensor | None = None) -> None:
        """Add a pass.

        Args:
            one: the pass.
            labels: int64 (B,) or (T,), the class of each sequence or token; None, or of another length: unknown.
            real_T: bool (T,), the non-padding tokens, whatever the router was told; None: not known.
        """
        real = one.num_real
        if real_T is not None and one.num_tokens == real_T.shape[0] and one.has_loss:
            counted = real_T.numel() if one.valid_T is None else int(one.valid_T.sum())
            wrong = counted - int((real_T if one.valid_T is None else real_T & one.valid_T).sum())
            self.padding = (self.padding[0] + wrong, self.padding[1] + counted)
        self.num_tokens += real
        self.chosen_E += one.chosen_E.double().cpu()
        self.computed_E += one.computed_E.double().cpu()
        self.chance_drops += one.chance_drops()
        place_T = one.place_T()
        if place_T is not None:
            length = one.num_tokens // (one.num_sequences or 1)
            place_T = place_T if length <= PLACES else place_T * PLACES // length
        if one.token_N is not None and one.expert_N is not None:
            computed_N = one.expert_N < one.num_experts
            token_N, expert_N = one.token_N[computed_N], one.expert_N[computed_N]
            if place_T is not None:
                self.place_PE += _table(place_T[token_N], expert_N, PLACES, one.num_experts)
            if one.modality_T is not None:
                self._add_modalities(one.modality_T, one.valid_T, token_N, expert_N)
            label_T = _labels_of_tokens(labels, one)
            if label_T is not None:
                known_N = label_T[token_N] >= 0
                table = _table(label_T[token_N][known_N], expert_N[known_N], int(label_T.max()) + 1, one.num_experts)
                self.class_CE = table if self.class_CE is None else _sum_of_rows(self.class_CE, table)
        decisions = real
        if one.logits_TE is not None and one.logits_TE.shape[1] == self.logit_M.shape[0]:
            decisions = self._add_logits(one, one.logits_TE, place_T)
        self.decisions += decisions

    def _add_modalities(self, modality_T: Tensor, valid_T: Tensor | None, token_N: Tensor, expert_N: Tensor) -> None:
        known_T = (modality_T >= 0) & (modality_T < MODALITIES)
        known_N = known_T[token_N]
        pairs = _table(modality_T[token_N][known_N], expert_N[known_N], MODALITIES, self.num_experts)
        self.modality_GE += pairs
        real_T = known_T if valid_T is None else known_T & valid_T
        self.modality_tokens_G += torch.bincount(modality_T[real_T], minlength=MODALITIES).double().cpu()

    def _add_logits(self, one: Pass, logits_TM: Tensor, place_T: Tensor | None) -> int:
        """Add the logits, and return how many tokens decided by themselves."""
        of_sequences = one.num_sequences or 0
        per_sequence = False
        if 1 < of_sequences < one.num_tokens and one.num_tokens % of_sequences == 0 and one.valid_T is None:
            l_BSM = logits_TM.unflatten(0, (of_sequences, -1))
            # If the sequences do not differ either, the router is constant and decides for no sequence.
            per_sequence = bool((l_BSM == l_BSM[:, :1]).all()) and not bool((l_BSM == l_BSM[:1]).all())
        if one.valid_T is not None:
            logits_TM = logits_TM[one.valid_T]
            place_T = None if place_T is None else place_T[one.valid_T]
        self.not_finite += int((logits_TM.isnan() | logits_TM.isposinf()).sum())
        finite_TM = logits_TM.isfinite()
        l_TM = logits_TM.where(finite_TM, 0.0).double()
        if l_TM.numel():
            self.largest = max(self.largest, float(l_TM.abs().max()))
        level_T = logits_TM.double().logsumexp(-1).square()
        self.level += float(level_T[level_T.isfinite()].sum())
        mean_T1 = l_TM.sum(1, keepdim=True) / finite_TM.sum(1, keepdim=True).clamp_min(1)
        l_TM = (l_TM - mean_T1).where(finite_TM, 0.0)
        self.num_logits += finite_TM.sum(0).double().cpu()
        self.logit_M += l_TM.sum(0).cpu()
        self.square_M += l_TM.square().sum(0).cpu()
        if place_T is not None:
            sums_PM = l_TM.new_zeros(PLACES, l_TM.shape[1]).index_add(0, place_T, l_TM)
            self.place_logit_PM += sums_PM.cpu()
            self.place_tokens_P += torch.bincount(place_T, minlength=PLACES).double().cpu()
        return of_sequences if per_sequence else len(l_TM)

    # ---- sums over ranks

    @property
    def outline(self) -> tuple[int, str, Facts, int]:
        """The arguments with which figures of the same shapes are made."""
        return self.num_experts, self.kind, self.facts, len(self.logit_M)

    def join(self, other: LayerFigures) -> None:
        """Add the sums of other figures with this outline."""
        for name in _SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.padding = (self.padding[0] + other.padding[0], self.padding[1] + other.padding[1])
        self.largest = max(self.largest, other.largest)
        if other.class_CE is not None:
            self.class_CE = other.class_CE if self.class_CE is None else _sum_of_rows(self.class_CE, other.class_CE)

    # ---- figures

    @property
    def pairs_per_token(self) -> float:
        return float(self.chosen_E.sum()) / max(self.num_tokens, 1)

    @property
    def decided_pairs(self) -> float:
        """Pairs that were decided one by one: a sequence's pairs count once if it decides as a whole."""
        return self.decided(self.pairs_per_token * self.num_tokens)

    def decided(self, pairs: float) -> float:
        """Return how many of so many pairs were decided one by one."""
        return pairs * self.decisions / max(self.num_tokens, 1)

    @property
    def drop_rate(self) -> float:
        """The share of the chosen pairs that no expert had room for."""
        chosen = float(self.chosen_E.sum())
        return 1 - float(self.computed_E.sum()) / chosen if chosen else 0.0

    @property
    def chance_drop_rate(self) -> float:
        return self.chance_drops / max(float(self.chosen_E.sum()), 1.0)

    @property
    def experts_in_use(self) -> float:
        """``exp`` of the load's entropy: E at balance. Few pairs look uneven by chance, which Miller and Madow's
        ``(E - 1) / 2N`` is added for."""
        return _in_use(self.chosen_E, self.decided_pairs)

    def experts_of_modality(self, modality: int) -> float:
        """Return ``experts_in_use`` of the computed pairs of one modality."""
        pairs_E = self.modality_GE[modality]
        return _in_use(pairs_E, self.decided(float(pairs_E.sum())))

    @property
    def spread(self) -> float:
        """The root mean square of a token's logits less their mean."""
        return math.sqrt(float(self.square_M.sum() / self.num_logits.sum().clamp_min(1)))

    @property
    def token_variance(self) -> float:
        """The variance over tokens of an expert's logit less the token's mean, the mean over experts."""
        n_M = self.num_logits.clamp_min(1)
        return float((self.square_M / n_M - (self.logit_M / n_M).square()).clamp_min(0).mean())

    @property
    def expert_variance(self) -> float:
        """The variance over experts of their mean logits."""
        return float((self.logit_M / self.num_logits.clamp_min(1)).var(correction=0)) if len(self.logit_M) > 1 else 0.0

    @property
    def place_share(self) -> float | None:
        """The share of the variance over tokens that their places explain by themselves, adjusted for chance; None
        if a place has too few tokens to tell."""
        total, used_P = float(self.place_tokens_P.sum()), self.place_tokens_P > 0
        places = int(used_P.sum())
        if places < 2 or total < 4 * places:
            return None
        mean_M = self.place_logit_PM.sum(0) / total
        count_P1 = self.place_tokens_P[used_P].unsqueeze(1)
        between = (self.place_logit_PM[used_P] / count_P1 - mean_M).square() * count_P1
        # Tokens at no place of a sequence are not in these sums: the total covers all.
        whole = float((self.square_M - self.logit_M.square() / max(total, 1.0)).clamp_min(0).sum())
        if whole <= 0:
            return None
        return 1 - (1 - min(float(between.sum()) / whole, 1.0)) * (total - 1) / (total - places)

    @property
    def rms_level(self) -> float:
        """The root mean square of ``logsumexp(logits)``."""
        return math.sqrt(self.level / max(self.num_tokens, 1))

    def mean_gates(self) -> Tensor:
        """Return the mean weight of each expert under a dense gate, (E,)."""
        return self.chosen_E / max(self.num_tokens, 1)


def _in_use(pairs_E: Tensor, decided: float) -> float:
    share_E = pairs_E / pairs_E.sum().clamp_min(1e-12)
    chance = (len(pairs_E) - 1) / (2 * max(decided, 1.0))
    return min(math.exp(float(torch.special.entr(share_E).sum()) + chance), float(len(pairs_E)))


def explained(counts_GE: Tensor) -> float:
    """Return the share of the experts' entropy that the groups explain: ``I(group; expert) / H(expert)``, from 0 to 1.

    What chance explains, ``(G - 1)(E - 1) / 2N`` nats, is taken off (Miller and Madow).
    """
    total = float(counts_GE.sum())
    joint_GE = counts_GE / max(total, 1.0)
    group_G, expert_E = joint_GE.sum(1), joint_GE.sum(0)
    of_experts = float(torch.special.entr(expert_E).sum())
    if total == 0 or of_experts <= 0:
        return 0.0
    information = of_experts + float(torch.special.entr(group_G).sum() - torch.special.entr(joint_GE).sum())
    chance = (int((group_G > 0).sum()) - 1) * (int((expert_E > 0).sum()) - 1) / (2 * total)
    return max(information - chance, 0.0) / of_experts


def _table(group_N: Tensor, expert_N: Tensor, groups: int, experts: int) -> Tensor:
    cells = torch.bincount(group_N * experts + expert_N, minlength=groups * experts)
    return cells.unflatten(0, (groups, experts)).double().cpu()


def _sum_of_rows(a: Tensor, b: Tensor) -> Tensor:
    """Return the sum of two tables of which one may have fewer rows."""
    rows = max(len(a), len(b))
    return sum(torch.cat((t, t.new_zeros(rows - len(t), t.shape[1]))) for t in (a, b))  # type: ignore[return-value]


def _labels_of_tokens(labels: Tensor | None, one: Pass) -> Tensor | None:
    """Return the class of each token, int64 (T,); None if the labels describe something else."""
    if labels is None or labels.ndim != 1 or not len(labels):
        return None
    labels = labels.to(one.chosen_E.device)
    if len(labels) == one.num_tokens:
        return labels
    if len(labels) == one.num_sequences and one.num_tokens % len(labels) == 0:
        return labels.repeat_interleave(one.num_tokens // len(labels))
    return None
