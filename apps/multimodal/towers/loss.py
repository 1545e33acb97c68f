"""The contrastive losses of images and texts: softmax (CLIP) and sigmoid (SigLIP), over the pairs of all ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from apps.base.checks import check_at_least
from core.contract import several_ranks
from core.fields import Positive
from core.kernels import outside_autocast
from core.registry import OpenConfig


@dataclass(frozen=True)
class ContrastiveLoss(OpenConfig):
    """Base of the losses of pairs: vectors of length 1 are compared by their product over a temperature.

    Attributes:
        temperature: products are divided by it; with ``learn_temperature`` training starts there.
        learn_temperature: whether training updates the temperature.
        least_temperature: lower bound of the temperature in training (CLIP, arXiv 2103.00020, section 2.5).
        equal: what two pairs of one batch are to each other that have the same image or the same text. "ignore": the
            image of the one and the text of the other are in no sum; "positive": they are a further right answer;
            "negative": a wrong one, as if they differed. A text that several images have cannot be told from itself, so
            "negative" pushes apart equal texts. "ignore" keeps 0 as the least loss; "positive" learns from all right
            answers, which counts where a text has many images or an image many texts.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: Positive
    learn_temperature: bool = True
    least_temperature: Positive = 0.01
    equal: Literal["ignore", "positive", "negative"] = "ignore"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self.least_temperature, temperature=self.temperature)

    def build(self) -> PairLoss:
        """Return the loss, with its temperature."""
        raise NotImplementedError


@dataclass(frozen=True)
class SoftmaxLoss(ContrastiveLoss):
    """CLIP's loss (arXiv 2103.00020, figure 3): each image chooses among the texts, and each text among the images.

    It is the mean of the two cross-entropies. The temperature starts at 0.07.
    """

    temperature: Positive = 0.07

    def build(self) -> PairLoss:
        return _Softmax(self)


@dataclass(frozen=True)
class SigmoidLoss(ContrastiveLoss):
    """SigLIP's loss (arXiv 2303.15343, section 3.2): each image and each text are scored by themselves, right or wrong.

    It is ``-1/B`` times the sum over all B x B of ``log sigmoid(z (x . y / temperature + bias))``, where z is 1 for
    what belongs together and -1 for the rest.

    Attributes:
        bias: start of a learned number that is added to all scores: at first nearly all of them are wrong answers.
    """

    temperature: Positive = 0.1
    bias: float = -10.0

    def build(self) -> PairLoss:
        return _Sigmoid(self)


class PairLoss(nn.Module):
    """Base of the losses: the temperature, the pairs of the other ranks, and the scores in float32.

    Args:
        config: options.
    """

    def __init__(self, config: ContrastiveLoss) -> None:
        super().__init__()
        self.config = config
        log_scale = torch.tensor(-math.log(config.temperature))
        self.log_scale: Tensor
        if config.learn_temperature:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)

    @property
    def temperature(self) -> Tensor:
        """Return what products are divided by, ()."""
        return (-self.log_scale).exp()

    @torch.no_grad()
    def begin(self, log_scale: float, bias: float | None) -> None:
        """Start with the values of published weights, if they are learned.

        Args:
            log_scale: logarithm of one over the temperature.
            bias: of ``SigmoidLoss``; None: there is none.
        """
        if self.config.learn_temperature:
            self.log_scale.fill_(log_scale)
            self.clamp_()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring a temperature that a step has moved below its bound back to it."""
        # Clamped in the forward, it would have no gradient beyond the bound, and never come back.
        self.log_scale.clamp_(max=-math.log(self.config.least_temperature))

    def probabilities(self, image_ND: Tensor, text_CD: Tensor) -> Tensor:
        """Return how likely each text is to belong to each image, float32 (N, C).

        Args:
            image_ND: float32 vectors of length 1.
            text_CD: the vectors of the texts that an image chooses from.
        """
        with outside_autocast(image_ND.device):
            return self._shares(self.log_scale.exp() * image_ND.float() @ text_CD.float().T)

    @abstractmethod
    def _shares(self, logits_NC: Tensor) -> Tensor:
        """Return the probabilities of texts (N, C), given their dot products over the temperature."""

    def forward(
        self, image_BD: Tensor, text_BD: Tensor, image_B: Tensor, caption_B: Tensor, *, gather: bool = False
    ) -> Tensor:
        """Return the mean loss of this rank's pairs, ().

        With ``gather`` they are compared with the pairs of all ranks. The mean over the ranks is then the loss of one
        process with all pairs, and the mean of the ranks' gradients, which DDP and FSDP take, its gradient.

        Args:
            image_BD, text_BD: float32 vectors of length 1.
            image_B, caption_B: int64 (B,), numbers of images and texts; equal ones have one number.
            gather: compare with the pairs of all ranks, each of which calls this with equally many.
        """
        B = len(image_BD)
        images_ND, texts_ND, image_N, caption_N, first = image_BD, text_BD, image_B, caption_B, 0
        if gather and several_ranks(None):
            images_ND, texts_ND = gathered(image_BD), gathered(text_BD)
            image_N, caption_N = gathered(torch.stack((image_B, caption_B), 1)).unbind(1)
            first = dist.get_rank() * B
        own_B = torch.arange(first, first + B, device=image_B.device)
        equal_BN = (image_B[:, None] == image_N) | (caption_B[:, None] == caption_N)
        with outside_autocast(image_BD.device):
            scale = self.log_scale.exp()
            return self._loss((image_BD, text_BD), (images_ND, texts_ND), scale, own_B, equal_BN)

    @abstractmethod
    def _loss(
        self,
        own: tuple[Tensor, Tensor],
        others: tuple[Tensor, Tensor],
        scale: Tensor,
        own_B: Tensor,
        equal_BN: Tensor,
    ) -> Tensor:
        """Return the mean loss of this rank's pairs.

        Args:
            own: vectors (B, D) of images and of texts.
            others: vectors (N, D) of the pairs of all ranks.
            scale: 1 / temperature.
            own_B: int64 (B,), places of this rank's pairs among all.
            equal_BN: whether pairs have the same image or text, the own one too.
        """


class _Softmax(PairLoss):
    """The loss of ``SoftmaxLoss``."""

    def _shares(self, logits_NC: Tensor) -> Tensor:
        return logits_NC.softmax(1)

    def _loss(self, own: Any, others: Any, scale: Tensor, own_B: Tensor, equal_BN: Tensor) -> Tensor:
        (images_BD, texts_BD), (images_ND, texts_ND) = own, others
        each = ((images_BD, texts_ND), (texts_BD, images_ND))
        losses = [self._choice(scale * query_BD @ key_ND.T, own_B, equal_BN) for query_BD, key_ND in each]
        return torch.stack(losses).mean()

    def _choice(self, logits_BN: Tensor, own_B: Tensor, equal_BN: Tensor) -> Tensor:
        """Return the mean cross-entropy of each row's own column."""
        if self.config.equal == "positive":
            share_BN = equal_BN / equal_BN.sum(1, keepdim=True)
            return F.cross_entropy(logits_BN, share_BN.to(logits_BN.dtype))
        if self.config.equal == "ignore":
            logits_BN = logits_BN.masked_fill(_without_own(equal_BN, own_B), -math.inf)
        return F.cross_entropy(logits_BN, own_B)


class _Sigmoid(PairLoss):
    """The loss of ``SigmoidLoss``."""

    def __init__(self, config: SigmoidLoss) -> None:
        super().__init__(config)
        self.bias = nn.Parameter(torch.tensor(float(config.bias)))

    @torch.no_grad()
    def begin(self, log_scale: float, bias: float | None) -> None:
        super().begin(log_scale, bias)
        if bias is not None:
            self.bias.fill_(bias)

    def _shares(self, logits_NC: Tensor) -> Tensor:
        return (logits_NC + self.bias).sigmoid()

    def _loss(self, own: Any, others: Any, scale: Tensor, own_B: Tensor, equal_BN: Tensor) -> Tensor:
        # A sum over all pairs of an image and a text, of which each rank has its own images.
        (images_BD, _), (_, texts_ND) = own, others
        logits_BN = scale * images_BD @ texts_ND.T + self.bias
        others_BN = _without_own(equal_BN, own_B)
        is_right_BN = equal_BN if self.config.equal == "positive" else equal_BN & ~others_BN
        losses_BN = F.softplus(torch.where(is_right_BN, -logits_BN, logits_BN))
        if self.config.equal == "ignore":
            losses_BN = losses_BN.masked_fill(others_BN, 0.0)
        return losses_BN.sum() / len(images_BD)


def _without_own(equal_BN: Tensor, own_B: Tensor) -> Tensor:
    """Return which other pairs have the image or the text of each row's pair, bool (B, N)."""
    return equal_BN.scatter(1, own_B[:, None], False)


def gathered(x_B: Tensor) -> Tensor:
    """Return the (B, ...) rows of all ranks, (N, ...) rank by rank. A rank's gradient is the gradient of the sum of all
    ranks' losses by its own rows."""
    return _Gathered.apply(x_B)


class _Gathered(torch.autograd.Function):
    """``gathered``."""

    @staticmethod
    def forward(ctx: Any, x_B: Tensor) -> Tensor:
        parts = [torch.empty_like(x_B) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x_B.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total_N = grads[0].clone()
        dist.all_reduce(total_N)
        return total_N.chunk(dist.get_world_size())[dist.get_rank()]


def attribute_loss(logits: Sequence[Tensor], label_BA: Tensor) -> Tensor:
    """Return the cross-entropy of the classes: of each attribute the mean over its known labels, and of those the mean.

    An attribute without a known label in the batch counts 0.

    Args:
        logits: (B, C) of each attribute.
        label_BA: int64 (B, A), -1 if a class is not known.
    """
    losses = []
    for logits_BC, label_B in zip(logits, label_BA.T, strict=True):
        total = F.cross_entropy(logits_BC.float(), label_B, ignore_index=-1, reduction="sum")
        losses.append(total / (label_B >= 0).sum().clamp_min(1))
    return torch.stack(losses).mean()
