"""``TokenChoice``: each token takes its best experts, in the variants that most published models are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ...contract import Evidence
from ...contract.checks import divides
from ...fields import Count, OneOf, Positive, ShareBelowOne
from ...kernels import SCORE_FUNCS, topk_gate
from ..balance.balance import expert_bias_step
from ..balance.terms import CHOICE_TERMS, SCORE_TERMS
from ..gates import LinearGate, NoisyGate, NormedGate
from ..router import LinearGateConfig, PairRouter, Tokens
from ..selection import Capacity, Choice
from .top_k import TopKConfig, without_some


class TokenChoiceRouter(PairRouter):
    """The router of ``TokenChoice``: each token takes its ``top_k`` best experts."""

    config: TokenChoice
    gate: LinearGate

    def __init__(self, dim: int, num_experts: int, config: TokenChoice, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.gates_on = config.gates_on
        if config.expert_bias:
            self.expert_bias = torch.zeros(num_experts, dtype=torch.float32)
        self.expert_scale = nn.Parameter(torch.ones(num_experts)) if config.expert_scale else None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.expert_scale is not None:
            nn.init.ones_(self.expert_scale)

    def choose(self, tokens: Tokens) -> Choice:
        config, x_TD = self.config, tokens.x_TD
        if self.training and config.jitter_eps:
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - config.jitter_eps, 1 + config.jitter_eps)
        logits_TE = tokens.logits(self.gate) if x_TD is tokens.x_TD else self.gate(x_TD)
        if config.logit_norm is not None:
            logits_TE = normalize_logits(logits_TE, config.logit_norm)
        noise_std, noisy_TE = None, logits_TE
        if self.training and config.noise is not None:
            learned = self.gate.noise_std(x_TD)
            noise_std = config.noise_std / self.num_experts if learned is None else learned
            noisy_TE = logits_TE + torch.randn_like(logits_TE) * noise_std
        drops = self.training and self.expert_dropout > 0
        if drops:
            noisy_TE = without_some(noisy_TE, self.expert_dropout, config.top_k)
        best = topk_gate(
            noisy_TE,
            config.top_k,
            score_func=config.score_func,
            normalize=config.normalizes and config.normalize != "kept",
            bias_E=self.expert_bias,
            num_groups=config.num_groups,
            limited_groups=config.limited_groups,
            group_score=config.group_score,
            scale=config.scale,
            valid_T=tokens.valid_T,
            backend=self.backend,
        )
        expert_ids_TK, chosen_E, sums = best.expert_ids_TK, best.chosen_per_expert_E, best.sums
        gates_TK = best.gates_TK
        if config.norm_order != 1.0:
            norm_T1 = torch.linalg.vector_norm(gates_TK, config.norm_order, -1, keepdim=True)
            gates_TK = gates_TK / norm_T1.clamp_min(1e-20) * config.scale
        if config.normalize == "unit":
            gates_TK = gates_TK - gates_TK.detach() + config.scale
        if self.expert_scale is not None:
            gates_TK = gates_TK * self.expert_scale.to(gates_TK.dtype)[expert_ids_TK]
        if self.training and config.second_expert_policy == "random":
            # GShard, algorithm 1: with probability 2 * g2, so a second expert of gate 1/2 always stays.
            g2_T = best.gates_TK[:, 1].detach() / config.scale
            second_T = torch.where(2 * g2_T > torch.rand_like(g2_T), expert_ids_TK[:, 1], self.num_experts)
            expert_ids_TK, chosen_E = torch.stack((expert_ids_TK[:, 0], second_T), -1), None
        scores_TE, threshold_TE = best.scores_TE, None
        is_clean = noise_std is None and not drops
        if not is_clean:
            # The losses see the clean logits, as V-MoE's importance and load losses do; noise only explores.
            sums = None
            scores_TE = SCORE_FUNCS[config.score_func](logits_TE)
        if noise_std is not None:
            threshold_TE = _noise_threshold(noisy_TE, config)
        return Choice(
            expert_ids_TK,
            gates_TK,
            Evidence(scores_TE, logits_TE, noise_std, threshold_TE, sums=sums),
            # The scores of the losses are clean ones, and the choice's come first.
            priority_T=None if is_clean else best.scores_TE.amax(-1),
            chosen_per_expert_E=chosen_E,
            kept_sum=config.scale if config.normalize == "kept" else None,
        )

    @torch.no_grad()
    def update_expert_bias(self, chosen_per_expert_E: Tensor) -> None:
        """Make one step of aux-loss-free balancing, from the pairs that chose each expert since the last step."""
        if self.expert_bias is not None:
            self.expert_bias += expert_bias_step(chosen_per_expert_E, self.config.bias_update_rate)

    def _apply(self, fn: Any, recurse: bool = True) -> TokenChoiceRouter:
        before = self.expert_bias
        super()._apply(fn, recurse)
        if before is not None and self.expert_bias is not None and self.expert_bias.dtype != before.dtype:
            # In bfloat16 a bias above 0.25 would swallow steps of 1e-3: keep its dtype, and its value unrounded.
            self.expert_bias = before.to(self.expert_bias.device)
        return self


def normalize_logits(logits_TE: Tensor, factor: float) -> Tensor:
    """Return ``factor * (l - mean) / std`` over the experts of each token (Skywork-MoE, arXiv 2406.06563)."""
    centered_TE = logits_TE - logits_TE.mean(-1, keepdim=True)
    # A floor of 1e-4 for the deviation: equal logits stay equal, with a finite gradient.
    return factor * centered_TE * (centered_TE.square().mean(-1, keepdim=True) + 1e-8).rsqrt()


def _noise_threshold(noisy_TE: Tensor, config: TokenChoice) -> Tensor:
    """Return the value that a noisy logit had to reach to be among the ``top_k``.

    With fixed noise it is the k-th largest logit (V-MoE, arXiv 2106.05974, section A.2). With learned noise it is the
    k-th largest of the *others* (arXiv 1701.06538, eq. 9), which is the (k+1)-th for the chosen ones.
    """
    K, E = config.top_k, noisy_TE.shape[-1]
    top = noisy_TE.topk(min(K + 1, E), dim=-1).values
    kth = top[:, K - 1 : K]
    if config.noise == "fixed":
        return kth
    # For K = E every expert is chosen. A threshold of -inf would make the gradient of the noise 0 * inf.
    beyond = top[:, K:] if K < E else torch.full_like(kth, -1e9)
    return torch.where(noisy_TE >= kth, beyond, kth)


@dataclass(frozen=True)
class TokenChoice(TopKConfig, LinearGateConfig):
    """Each token takes its ``top_k`` best experts.

    ========================  ==========================================================================================
    Switch                    ``TokenChoice(top_k=1, jitter_eps=0.01)``
    GShard                    ``TokenChoice(top_k=2, second_expert_policy="random")``
    Shazeer                   ``TokenChoice(top_k=4, noise="learned")``
    V-MoE                     ``TokenChoice(top_k=2, normalize=False, noise="fixed")``
    Mixtral                   ``TokenChoice(top_k=2)``
    GPT-OSS                   ``TokenChoice(top_k=4, gate_bias=True)``
    Llama 4                   ``TokenChoice(top_k=1, score_func="sigmoid", gates_on="input")``
    DeepSeek-V2               ``TokenChoice(top_k=6, normalize=False, num_groups=8, limited_groups=3,
                              group_score="max", scale=16.0)``
    DeepSeek-V3               ``TokenChoice(top_k=8, score_func="sigmoid", expert_bias=True, num_groups=8,
                              limited_groups=4, scale=2.5)``
    Skywork-MoE               ``TokenChoice(top_k=2, logit_norm=1.0)``
    DBRX                      ``TokenChoice(top_k=4, norm_order=p)``, with p its ``moe_normalize_expert_weights``
    DeepSeek-V4               ``TokenChoice(top_k=6, score_func="sqrt_softplus", expert_bias=True, scale=1.5)``
    Gemma 4                   ``TokenChoice(top_k=8, input_norm=True, expert_scale=True)``
    NLLB-MoE                  ``TokenChoice(top_k=2, normalize="kept")``
    ========================  ==========================================================================================

    Attributes:
        top_k: experts per token, K.
        score_func: "softmax", "sigmoid", or "sqrt_softplus", ``sqrt(log(1 + exp(l)))``, of the logits.
        normalize: True: the gates of a token sum to 1 (softmax after the selection). False: its scores over all E
            experts (softmax before). None: True for K > 1, False for K = 1, for which it would cut the router's
            gradient. "kept": those scores, normalized over the experts of the token that compute it, so that the gates
            sum to 1 after a capacity dropped some of them (NLLB-MoE). True and "kept" need K > 1: of one expert the
            gate is always 1. "unit": every gate is 1, with the gradient of the score, which goes straight
            through: the output is the sum of the chosen experts.
        noise: normal noise on the logits in training: None, "fixed" (V-MoE) or "learned" (Shazeer).
        noise_std: standard deviation of the fixed noise, times E: the noise has ``noise_std / E``.
        jitter_eps: half-width of the factor U(1 - eps, 1 + eps) on the router's input in training.
        second_expert_policy: rule for the second of two experts, "always", or "random": in training it is kept with
            probability 2 * gate, the gate before ``scale``.
        expert_bias: whether a bias on the scores, moved by ``update_expert_bias``, steers the choice, never the gate.
        bias_update_rate: step of the bias.
        num_groups, limited_groups: the choice is limited to the best ``limited_groups`` of ``num_groups`` equal groups.
        group_score: score of a group, the sum of its two best scores, "top2", or its best one, "max".
        scale: factor on the gates.
        gates_on: side that the gates scale, the experts' "output", or their "input": ``f(g x)`` instead of ``g f(x)``
            (Llama 4), which copies the rows of the tokens.
        gate_bias: whether the gate's logits are ``x W^T + b``, with a learned ``b``.
        init_scale: variance of the gate's initial weights times D.
        logit_norm: lambda of Skywork-MoE (arXiv 2406.06563): a token's logits are brought to mean 0 and this standard
            deviation before noise and softmax; the larger, the sharper the gates. None: left as they are.
        norm_order: p of the norm that ``normalize=True`` brings to 1, ``(sum g^p)^(1/p)``; 1: the sum (DBRX has a p).
        input_norm: whether the gate reads ``x / rms(x) * s / sqrt(D)`` with a learned s (D,) (Gemma 4).
        expert_scale: whether a learned factor (E,) multiplies each expert's gate, after ``normalize`` (Gemma 4).
    """

    router_class = TokenChoiceRouter

    top_k: Count = 2
    score_func: Annotated[str, OneOf(*SCORE_FUNCS)] = "softmax"
    normalize: bool | Literal["kept", "unit"] | None = None
    noise: Literal["fixed", "learned"] | None = None
    noise_std: Positive = 1.0
    jitter_eps: ShareBelowOne = 0.0
    second_expert_policy: Literal["always", "random"] = "always"
    expert_bias: bool = False
    bias_update_rate: Positive = 1e-3
    num_groups: Count = 1
    limited_groups: Count = 1
    group_score: Literal["top2", "max"] = "top2"
    scale: Positive = 1.0
    gates_on: Literal["output", "input"] = "output"
    gate_bias: bool = False
    init_scale: Positive = 0.1
    logit_norm: Positive | None = None
    norm_order: Positive = 1.0
    input_norm: bool = False
    expert_scale: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_order != 1.0 and (self.normalize == "kept" or not self.normalizes):
            raise ValueError(f"norm_order={self.norm_order} needs normalize=True, not {self.normalize!r}")
        if self.expert_scale and self.normalize == "kept":
            raise ValueError(
                "expert_scale=True multiplies normalized gates: not with normalize='kept', which comes last"
            )
        if self.input_norm and self.noise == "learned":
            raise ValueError("input_norm=True is not for noise='learned', whose deviation reads the token as it is")
        if self.second_expert_policy == "random" and self.top_k != 2:
            raise ValueError(f"second_expert_policy='random' needs top_k=2, not top_k={self.top_k}")
        if self.logit_norm is not None and self.score_func != "softmax":
            raise ValueError(f"logit_norm={self.logit_norm} needs score_func='softmax', not {self.score_func!r}")
        if self.limited_groups > self.num_groups:
            raise ValueError(f"limited_groups={self.limited_groups} exceeds num_groups={self.num_groups}")

    def make_gate(self, dim: int, num_experts: int) -> LinearGate:
        if self.input_norm:
            return NormedGate(dim, num_experts, self.init_scale, self.gate_bias)
        gate = NoisyGate if self.noise == "learned" else LinearGate
        return gate(dim, num_experts, self.init_scale, self.gate_bias)

    def check(self, num_experts: int) -> None:
        super().check(num_experts)
        divides("num_groups", self.num_groups, num_experts)
        reachable = num_experts // self.num_groups * self.limited_groups
        if self.top_k > reachable:
            raise ValueError(
                f"top_k={self.top_k} exceeds the {reachable} experts of limited_groups={self.limited_groups}"
            )

    @property
    def terms(self) -> frozenset[str]:
        # Normalized logits have no size for the z-loss to hold down.
        terms = SCORE_TERMS | CHOICE_TERMS | (set() if self.logit_norm else {"router_z_loss"})
        # The smooth load asks what noise on the logits would choose; a bias or group limit chooses by more than them.
        plain = not self.expert_bias and self.limited_groups == self.num_groups
        return terms | {"load"} if self.noise and plain else terms

    @property
    def has_exact_gradient(self) -> bool:
        """Unit gates are constants, and their gradient goes straight through."""
        return self.normalize != "unit"

    @property
    def drops_experts(self) -> bool:
        """Noise, a bias and groups choose by more than the logits that a dropout could mask."""
        return self.noise is None and not self.expert_bias and self.limited_groups == self.num_groups

    @property
    def can_grow(self) -> bool:
        """A normalized logit depends on the other experts' logits."""
        return self.logit_norm is None

    def constant_gates(self, num_experts: int) -> tuple[float, ...] | None:
        is_whole = num_experts == 1 and self.score_func == "softmax"
        return (self.scale,) if is_whole and self.gates_on == "output" and not self.expert_scale else None

    def num_params(self, dim: int, num_experts: int) -> int:
        weights = dim * num_experts * (2 if self.noise == "learned" else 1)
        return weights + num_experts * (self.gate_bias + self.expert_scale) + (dim if self.input_norm else 0)
