"""The use of a model's experts over many pairs: by modality, by class of the image and by piece of the text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import core
from apps.base.messages import some
from apps.multimodal.stack import IMAGE, MODALITIES, TEXT
from apps.report.routed import expert_label_counts, experts_of_token, gate_weights
from core.diagnose.figures import explained

TOKENS = ("patches", "pieces of texts")
"""Names of the modalities' tokens, by number."""

_MOST_PATCHES = 8
"""Patches of an expert that are kept."""


class Rows(NamedTuple):
    """The layout of a pass: each row is an image or a text.

    Attributes:
        modality_RL: int64 (R, L), the modality of each token.
        real_RL: bool (R, L), False for padding.
        images, texts: int64, the rows of images and of texts, in the order of the batch.
        tokens_of_image: number of tokens of an image; 0 without images.
    """

    modality_RL: Tensor
    real_RL: Tensor
    images: Tensor
    texts: Tensor
    tokens_of_image: int

    @classmethod
    def of(cls, context: core.RoutingContext) -> Rows:
        """Return the layout that the context of a pass tells."""
        modality_RL = context.modality_BS
        assert modality_RL is not None
        valid_RL = context.valid_BS
        real_RL = torch.ones_like(modality_RL, dtype=torch.bool) if valid_RL is None else valid_RL
        images, texts = ((modality_RL[:, 0] == kind).nonzero().squeeze(1) for kind in (IMAGE, TEXT))
        count = int(real_RL[images[0]].sum()) if len(images) else 0
        return cls(modality_RL, real_RL, images, texts, count)

    @classmethod
    def of_entry(cls, entry: Any) -> Rows | None:
        """Return the layout of an entry of a tape; None where its layer does not see the tokens of images and texts:
        the head of the attributes sees whole images, and few tokens enter some blocks."""
        context = entry.context
        if context is None or context.modality_BS is None or context.modality_BS.numel() != entry.routing.num_tokens:
            return None
        return cls.of(context)

    def patches(self, num_patches: int) -> slice | None:
        """Return where the patches stand in the rows of images; None where the layer does not see each of them."""
        has_all = len(self.images) > 0 and self.tokens_of_image >= num_patches
        return slice(self.tokens_of_image - num_patches, self.tokens_of_image) if has_all else None

    def patch_experts(self, routing: Any, num_patches: int, most: int) -> Tensor | None:
        """Return the experts of each patch, best first, int64 (B, rows, columns, most); E where there are fewer."""
        places = self.patches(num_patches)
        if places is None:
            return None
        ids_RLK = experts_of_token(routing, most).unflatten(0, self.modality_RL.shape)
        return ids_RLK[self.images][:, places].unflatten(1, (math.isqrt(num_patches), -1)).cpu()

    def piece_experts(self, routing: Any, most: int) -> Tensor:
        """Return the experts of each piece, best first, int64 (U, L, most); E where there are fewer."""
        return experts_of_token(routing, most).unflatten(0, self.modality_RL.shape)[self.texts].cpu()


class PatchSample(NamedTuple):
    """The patches to which an expert gives its largest gates, at most one of an image.

    Attributes:
        gate_En: float32 (E, n), the gates, the largest first; 0 and below: there is none.
        patch_EnCHW: float32 (E, n, C, h, w), the patches, normalised.
    """

    gate_En: Tensor
    patch_EnCHW: Tensor

    def joined(self, other: PatchSample) -> PatchSample:
        """Return the largest of both."""
        gate_EN = torch.cat((self.gate_En, other.gate_En), 1)
        best = gate_EN.topk(min(_MOST_PATCHES, gate_EN.shape[1]), dim=1)
        patch_ENCHW = torch.cat((self.patch_EnCHW, other.patch_EnCHW), 1)
        index = best.indices[:, :, None, None, None].expand(-1, -1, *patch_ENCHW.shape[2:])
        return PatchSample(best.values, patch_ENCHW.gather(1, index))


@dataclass
class LayerUse:
    """The computed pairs of a layer over an evaluation.

    Attributes:
        tokens_M: int64 (2,), real tokens of each modality.
        by_modality_ME: int64 (2, E).
        by_class: int64 (C, E), those of images' tokens by the class of the image, for each attribute.
        by_piece_VE: int64 (V, E), those of texts.
        patches: a sample of the patches that each expert computes; None: the layer sees none.
    """

    tokens_M: Tensor
    by_modality_ME: Tensor
    by_class: list[Tensor]
    by_piece_VE: Tensor
    patches: PatchSample | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.by_modality_ME.shape[1]

    def unreached(self, modality: int) -> list[int]:
        """Return the experts that computed no token of a modality; none where the layer saw none."""
        if not self.tokens_M[modality]:
            return []
        return (self.by_modality_ME[modality] == 0).nonzero().squeeze(1).tolist()


@dataclass(frozen=True)
class Shown:
    """A pair that is shown with its experts.

    Attributes:
        image: float32 (C, H, W), normalised.
        caption: number of the text.
        ids: the ids of the text's pieces.
        grids: the expert of each patch, int64 (rows, columns), by layer; E where there is none.
        pieces: the experts of each piece, best first, by layer.
    """

    image: Tensor
    caption: int
    ids: list[int]
    grids: dict[str, Tensor]
    pieces: dict[str, list[list[int]]]


@dataclass
class ExpertUse:
    """Adds up, batch by batch, what each expert computes.

    Args:
        module: the ``ImageTextRetriever``, in evaluation.
        num_classes: number of classes of each attribute of the data.
        wanted: number of pairs to be shown.

    Attributes:
        layers: the use of each layer whose tokens have a modality, by its name in words.
        stats: the loads of all layers.
        shown: the pairs to be shown, of different images.
    """

    module: Any
    num_classes: Sequence[int]
    wanted: int = 0
    layers: dict[str, LayerUse] = field(default_factory=dict)
    stats: core.RoutingStats = field(default_factory=lambda: core.RoutingStats({}))
    shown: list[Shown] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._doctor = core.Doctor(self.module, modalities=MODALITIES) if core.moe_layers(self.module) else None

    @torch.no_grad()
    def add(self, tape: core.Tape, batch: Any) -> None:
        """Add the passes of a batch of pairs; images and texts may have gone through the layers in one pass or two."""
        if self._doctor is None:
            return
        self._doctor.add(tape)
        self.stats = self.stats + core.RoutingStats.from_tape(tape)
        shown = _to_be_shown(batch, self.wanted if not self.shown else 0)
        for entry in tape.entries:
            rows = Rows.of_entry(entry)
            if rows is None:
                continue
            name = layer_name(entry.name)
            counts = self._counts(entry, rows, batch)
            self.layers[name] = counts if name not in self.layers else _sum(self.layers[name], counts)
            if shown:
                grids = rows.patch_experts(entry.routing, self.num_patches, 1)
                pieces = rows.piece_experts(entry.routing, 2)
                for place, pair in shown.items():
                    if grids is not None:
                        pair.grids[name] = grids[place, ..., 0]
                    if len(pieces):
                        pair.pieces[name] = pieces[place, : len(pair.ids)].tolist()
        self.shown += shown.values()

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return int(self.module.model.towers.num_patches)

    def _counts(self, entry: Any, rows: Rows, batch: Any) -> LayerUse:
        """Return the use of one pass."""
        routing, context = entry.routing, entry.context
        modality_T = rows.modality_RL.flatten()
        real_T = rows.real_RL.flatten()
        label_R = torch.full(rows.modality_RL.shape[:1], -1, device=modality_T.device)
        by_class = []
        for a, count in enumerate(self.num_classes):
            label_R[rows.images] = batch.label_BA[:, a].to(label_R.device)[: len(rows.images)]
            by_class.append(_known_counts(routing, label_R, count))
        vocab_size = self.module.vocab_size
        ids_T = torch.full_like(modality_T, -1)
        if context.token_ids_BS is not None:
            ids_T = torch.where(modality_T == TEXT, context.token_ids_BS.flatten(), ids_T)
        return LayerUse(
            torch.bincount(modality_T[real_T], minlength=len(MODALITIES)).cpu(),
            _known_counts(routing, modality_T, len(MODALITIES)),
            by_class,
            _known_counts(routing, ids_T, vocab_size),
            self._patches(routing, rows, batch.image),
        )

    def _patches(self, routing: Any, rows: Rows, image: Tensor) -> PatchSample | None:
        places = rows.patches(self.num_patches)
        if places is None:
            return None
        gate_RLE = gate_weights(routing).unflatten(0, rows.modality_RL.shape)
        gate_BPE = gate_RLE[rows.images][:, places]
        best = gate_BPE.max(1)
        side = math.isqrt(gate_BPE.shape[1])
        cut = image.unflatten(3, (side, -1)).unflatten(2, (side, -1))  # (B, C, rows, h, columns, w)
        patch_BPCHW = cut.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
        own = torch.arange(len(image), device=image.device)[:, None]
        sample = PatchSample(best.values.T.cpu(), patch_BPCHW[own, best.indices].transpose(0, 1).cpu())
        return sample.joined(PatchSample(sample.gate_En[:, :0], sample.patch_EnCHW[:, :0]))

    def alarms(self) -> list[str]:
        """Return a line for each layer and modality of which experts compute nothing, and for what the doctor finds
        wrong with a modality's loads."""
        lines = []
        for finding in self._doctor.findings() if self._doctor is not None else ():
            if "modality" in finding.name:
                lines.append(f"{layer_name(finding.layer)}: {finding.evidence}. Remedy: {finding.remedy}.")
        for name, use in self.layers.items():
            for modality in (IMAGE, TEXT):
                experts = use.unreached(modality)
                if not experts:
                    continue
                which = f"{len(experts)} of {use.num_experts} experts ({some(list(map(str, experts)), 8)})"
                lines.append(f"{name}: {which} computed none of the {use.tokens_M[modality]:,} {TOKENS[modality]}.")
        return lines


def _known_counts(routing: Any, label: Tensor, num_labels: int) -> Tensor:
    """Return ``expert_label_counts`` of the tokens or sequences whose label is not negative, on the CPU."""
    label = torch.where(label < 0, num_labels, label)
    return expert_label_counts(routing, label, num_labels + 1)[:num_labels].cpu()


def _sum(a: LayerUse, b: LayerUse) -> LayerUse:
    patches = b.patches if a.patches is None else a.patches
    if a.patches is not None and b.patches is not None:
        patches = a.patches.joined(b.patches)
    return LayerUse(
        a.tokens_M + b.tokens_M,
        a.by_modality_ME + b.by_modality_ME,
        [x + y for x, y in zip(a.by_class, b.by_class, strict=True)],
        a.by_piece_VE + b.by_piece_VE,
        patches,
    )


def _to_be_shown(batch: Any, wanted: int) -> dict[int, Shown]:
    """Return the first pairs of a batch by their place, each of another image and text."""
    chosen: dict[int, Shown] = {}
    seen: set[int] = set()
    for place, (image, caption) in enumerate(zip(batch.image_B.tolist(), batch.caption_B.tolist(), strict=True)):
        if len(chosen) >= wanted:
            break
        if image in seen:
            continue
        seen.add(image)
        ids = [i for i in batch.text_BL[place].tolist() if i]
        chosen[place] = Shown(batch.image[place].float().cpu(), caption, ids, {}, {})
    return chosen


def layer_name(layer: str) -> str:
    """Return a layer's name in words.

    Example::

        layer_name("model.towers.stack.layers.1.ffn")         # "block 1"
        layer_name("model.towers.image.blocks.1.mlp")         # "image block 1"
    """
    match = re.search(r"(?:^|\.)(?:blocks|layers)\.(\d+)\.", layer)
    if match is None:
        return layer.removeprefix("model.")
    tower = next((name for name in MODALITIES if name in re.split(r"[._]", layer[: match.start()])), None)
    return f"{tower} block {match[1]}" if tower else f"block {match[1]}"


def class_information(layers: Mapping[str, LayerUse], num_attributes: int) -> dict[str, list[float]]:
    """Return, by layer, what a patch's expert says of each attribute's class of its image: the share of the experts'
    entropy that the classes explain, from 0 to 1."""
    return {
        name: [explained(use.by_class[a].double()) for a in range(num_attributes)]
        for name, use in layers.items()
        if use.tokens_M[IMAGE]
    }


def frequent_pieces(layers: Mapping[str, LayerUse], most: int) -> np.ndarray:
    """Return the ids of the commonest pieces that the layers saw, int64, the commonest first."""
    count_V = sum((use.by_piece_VE.sum(1) for use in layers.values()), torch.zeros(1, dtype=torch.int64)).numpy()
    order = np.argsort(-count_V, kind="stable")[:most]
    return order[count_V[order] > 0]
