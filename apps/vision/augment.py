"""Random transforms of a whole batch of small images at once, each image with its own draws.

Cropping an image of 28x28 takes microseconds and calling a transform for it fifty: a loop over images would cost more
than a small model. All draws are torch's global ones, as in torchvision; the loader seeds them for each batch
(`apps.data.loader.seeded`). Images are uint8 (B, C, H, W) while they are cut and colored. Erasing and mixing need
normalized float32: here they are sampled (`draw_boxes`, `draw_mix`), and `erase` and `mix` compute them on the device.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import v2

RANDAUGMENT_BINS = 31


def crop_and_flip(images: Tensor, padding: int = 0, flip: bool = False) -> Tensor:
    """Pad each side with ``padding`` black pixels, cut (H, W) out at random, mirror half of the images left to right.

    Args:
        images: (B, C, H, W) of any dtype.
        padding: width in pixels; 0 leaves the position.
        flip: mirror each image with probability 1/2.

    Returns:
        (B, C, H, W).
    """
    if not padding and not flip:
        return images
    batch, _, height, width = images.shape
    rows = torch.randint(2 * padding + 1, (batch, 1)) + torch.arange(height)
    cols = torch.randint(2 * padding + 1, (batch, 1)) + torch.arange(width)
    if flip:
        cols = torch.where(torch.rand(batch, 1) < 0.5, cols.flip(1), cols)
    padded = F.pad(images, (padding,) * 4)
    # indexing around the channel slice moves it last: (B, H, W, C)
    cut = padded[torch.arange(batch)[:, None, None], :, rows[:, :, None], cols[:, None, :]]
    return cut.permute(0, 3, 1, 2).contiguous()


def random_resized_crop(images: Tensor, min_area: float) -> Tensor:
    """Cut a box of ``min_area`` to 1 of the area and aspect ratio 3/4 to 4/3 out of each image, and scale it back.

    Args:
        images: uint8 (B, C, H, W).
        min_area: lower bound of the box's share of the image, in (0, 1].
    """
    batch, _, height, width = images.shape
    area = torch.empty(batch).uniform_(min_area, 1)
    ratio = torch.empty(batch).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    size_x, size_y = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    # affine_grid's coordinates run from -1 to 1: a box of relative size s may have its center within +-(1 - s)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = size_x, size_y
    theta[:, 0, 2] = (1 - size_x) * torch.empty(batch).uniform_(-1, 1)
    theta[:, 1, 2] = (1 - size_y) * torch.empty(batch).uniform_(-1, 1)
    grid = F.affine_grid(theta, [batch, 1, height, width], align_corners=False)
    cut = F.grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return cut.round().to(torch.uint8)


class BatchRandAugment(v2.RandAugment):
    """torchvision's RandAugment, with operations and signs sampled for each image of a batch.

    torchvision's own applies the same operations to every image of a tensor. Here each round draws an operation an
    image and applies each operation once, to the images that drew it.
    """

    def forward(self, images: Tensor) -> Tensor:
        """Transform uint8 (B, C, H, W)."""
        batch, _, height, width = images.shape
        for _ in range(self.num_ops):
            chosen = torch.randint(len(self._AUGMENTATION_SPACE), (batch,))
            negative = torch.rand(batch) < 0.5
            out = images.clone()
            for i, (name, (magnitudes_of, signed)) in enumerate(self._AUGMENTATION_SPACE.items()):
                magnitudes = magnitudes_of(self.num_magnitude_bins, height, width)
                magnitude = 0.0 if magnitudes is None else float(magnitudes[self.magnitude])
                for sign in (1, -1) if signed else (1,):
                    drew = chosen == i if not signed else (chosen == i) & (negative == (sign < 0))
                    rows = drew.nonzero().squeeze(1)
                    if len(rows):
                        out[rows] = self._apply_image_or_video_transform(
                            images[rows], name, sign * magnitude, self.interpolation, self._fill
                        )
            images = out
        return images


def draw_boxes(images: Tensor, probability: float) -> Tensor:
    """Draw a box of 2 to 33 % of the area with ``probability`` for each image (Zhong et al. 2020).

    A box that is higher or wider than the image is cut to it (torchvision draws again).

    Args:
        images: (B, C, H, W).
        probability: chance of an image to have one, in [0, 1].

    Returns:
        int32 (B, 4), first row, first column, height and width; height 0 if there is no box.
    """
    batch, _, height, width = images.shape
    area = torch.empty(batch).uniform_(0.02, 1 / 3) * height * width
    ratio = torch.empty(batch).uniform_(math.log(0.3), math.log(3.3)).exp()
    box_h = (area * ratio).sqrt().round().clamp(1, height)
    box_w = (area / ratio).sqrt().round().clamp(1, width)
    top = (torch.rand(batch) * (height - box_h + 1)).floor()
    left = (torch.rand(batch) * (width - box_w + 1)).floor()
    box_h = box_h * (torch.rand(batch) < probability)
    return torch.stack((top, left, box_h, box_w), 1).int()


def erase(images: Tensor, box_B4: Tensor) -> Tensor:
    """Set the boxes of ``draw_boxes`` to 0, the mean color of normalized images (B, C, H, W)."""
    top, left, box_h, box_w = box_B4[:, :, None].unbind(1)
    y, x = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    in_rows, in_cols = (y >= top) & (y < top + box_h), (x >= left) & (x < left + box_w)
    return images.masked_fill((in_rows[:, :, None] & in_cols[:, None, :])[:, None], 0.0)


class Mix(NamedTuple):
    """How each image of a batch is mixed with its neighbor.

    Attributes:
        share: lambda, the image's own share.
        box: the neighbor's part (CutMix), as first column, first row and the ends of both; None: a weighted sum
            (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(images: Tensor, mixup_alpha: float, cutmix_alpha: float) -> Mix:
    """Draw mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) for a batch.

    One share lambda ~ Beta(alpha, alpha) for the batch; with both alphas positive each batch takes one of them, 1:1.

    Args:
        images: (B, C, H, W).
        mixup_alpha, cutmix_alpha: parameters of each method, 0 switches it off; at least one is positive.
    """
    methods = [(m, alpha) for m, alpha in ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha)) if alpha > 0]
    method, alpha = methods[int(torch.randint(len(methods), ()))]
    drawn = method(alpha=alpha).make_params([images])
    return Mix(drawn["lam"]) if "lam" in drawn else Mix(drawn["lam_adjusted"], drawn["box"])


def mix(images: Tensor, drawn: Mix) -> Tensor:
    """Return float32 (B, C, H, W), each image mixed with the one before it."""
    other = images.roll(1, 0)
    if drawn.box is None:
        return other.mul_(1 - drawn.share).add_(images * drawn.share)
    left, top, right, bottom = drawn.box
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = other[..., top:bottom, left:right]
    return mixed


def mix_labels(labels: Tensor, num_classes: int, share: float) -> Tensor:
    """Return the soft labels of mixed images, float32 (B, num_classes), of int64 (B,); rows sum to 1."""
    return mix(F.one_hot(labels, num_classes).float(), Mix(share))
