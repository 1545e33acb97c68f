"""The use of a model's experts over many pairs: by modality, by class of the image and by token of the text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import core
from apps.base.messages import some
from apps.multimodal.towers.stack import IMAGE, MODALITIES, TEXT
from apps.report.routed import experts_of_token, gate_weights, layer_label
from apps.report.use import ExpertUse, Labels, tokens_of
from core.diagnose.figures import explained

TOKENS = ("patches", "subwords of texts")
"""Names of the modalities' tokens, by number."""

_MOST_PATCHES = 8
"""Patches of an expert that are kept."""


class PassLayout(NamedTuple):
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
    def of(cls, context: core.RoutingContext) -> PassLayout:
        """Return the layout that the context of a pass tells."""
        modality_RL = context.modality_BS
        assert modality_RL is not None
        valid_RL = context.valid_BS
        real_RL = torch.ones_like(modality_RL, dtype=torch.bool) if valid_RL is None else valid_RL
        images, texts = ((modality_RL[:, 0] == kind).nonzero().squeeze(1) for kind in (IMAGE, TEXT))
        count = int(real_RL[images[0]].sum()) if len(images) else 0
        return cls(modality_RL, real_RL, images, texts, count)

    @classmethod
    def of_entry(cls, entry: Any) -> PassLayout | None:
        """Return the layout of an entry of a tape; None if its layer does not see the tokens of images and texts: the
        head of the attributes sees whole images, and few tokens enter some blocks."""
        context = entry.context
        if context is None or context.modality_BS is None or context.modality_BS.numel() != entry.routing.num_tokens:
            return None
        return cls.of(context)

    def patches(self, num_patches: int) -> slice | None:
        """Return the positions of the patches in the rows of images; None if the layer does not see each of them."""
        has_all = len(self.images) > 0 and self.tokens_of_image >= num_patches
        return slice(self.tokens_of_image - num_patches, self.tokens_of_image) if has_all else None

    def patch_experts(self, routing: Any, num_patches: int, most: int) -> Tensor | None:
        """Return the experts of each patch, best first, int64 (B, rows, columns, most); -1 if there are fewer."""
        places = self.patches(num_patches)
        if places is None:
            return None
        ids_RLK = experts_of_token(routing, most).unflatten(0, self.modality_RL.shape)
        return ids_RLK[self.images][:, places].unflatten(1, (math.isqrt(num_patches), -1)).cpu()

    def piece_experts(self, routing: Any, most: int) -> Tensor:
        """Return the experts of each token, best first, int64 (U, L, most); -1 if there are fewer."""
        return experts_of_token(routing, most).unflatten(0, self.modality_RL.shape)[self.texts].cpu()


class PatchSample(NamedTuple):
    """The patches to which an expert gives its largest gates, at most one of an image.

    Attributes:
        gate_En: float32 (E, n), the gates, the largest first; 0 and below: there is none.
        patch_EnCHW: float32 (E, n, C, h, w), the patches, normalized.
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


@dataclass(frozen=True)
class Shown:
    """A pair that is shown with its experts.

    Attributes:
        image: float32 (C, H, W), normalized.
        caption: number of the text.
        ids: the token ids of the text.
        grids: the expert of each patch, int64 (rows, columns), by layer; -1 if there is none.
        pieces: the experts of each token, best first, by layer.
    """

    image: Tensor
    caption: int
    ids: list[int]
    grids: dict[str, Tensor]
    pieces: dict[str, list[list[int]]]


class PairUse(ExpertUse):
    """Adds up, batch by batch, the load of each expert: tokens by modality, by class of the image and by token.

    Args:
        module: the ``ImageTextRetriever``, in evaluation.
        attributes: number of classes of each attribute of the data, by its name.
        wanted: number of pairs to be shown.

    Attributes:
        counts: as in ``ExpertUse``, by "modality", "piece" and, of the images' tokens, the names of the attributes.
        patches: a sample of the patches that each expert computes, by the layer's name in words.
        shown: the pairs to be shown, of different images.
    """

    def __init__(self, module: Any, attributes: Mapping[str, int], wanted: int = 0) -> None:
        classes = {name: Labels(f"class {a}", count) for a, (name, count) in enumerate(attributes.items())}
        labels = {"modality": Labels("modality", len(MODALITIES)), "piece": Labels("piece", module.vocab_size)}
        super().__init__(tokens_of(module), {**labels, **classes})
        self.attributes, self.wanted = tuple(attributes), wanted
        self.num_patches = int(module.model.towers.num_patches)
        self.patches: dict[str, PatchSample] = {}
        self.shown: list[Shown] = []
        self._doctor = core.Doctor(module, modalities=MODALITIES) if core.moe_layers(module) else None

    @torch.no_grad()
    def add(self, tape: core.Tape, batch: Any) -> None:
        """Add the passes of a batch of pairs; images and texts may have gone through the layers in one pass or two."""
        if self._doctor is None:
            return
        self._doctor.add(tape)
        super().add(tape, batch)
        shown = _to_be_shown(batch, self.wanted if not self.shown else 0)
        for entry in tape.entries:
            rows = PassLayout.of_entry(entry)
            if rows is None:
                continue
            name = layer_label(entry.name)
            sample = self._patches(entry.routing, rows, batch.image)
            if sample is not None:
                self.patches[name] = self.patches[name].joined(sample) if name in self.patches else sample
            if shown:
                grids = rows.patch_experts(entry.routing, self.num_patches, 1)
                pieces = rows.piece_experts(entry.routing, 2)
                for place, pair in shown.items():
                    if grids is not None:
                        pair.grids[name] = grids[place, ..., 0]
                    if len(pieces):
                        pair.pieces[name] = pieces[place, : len(pair.ids)].tolist()
        self.shown += shown.values()

    def _patches(self, routing: Any, rows: PassLayout, image: Tensor) -> PatchSample | None:
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
        """Return a line for each layer and modality of which experts compute nothing, and for the doctor's findings on
        a modality's loads."""
        lines = []
        for finding in self._doctor.findings() if self._doctor is not None else ():
            if "modality" in finding.name:
                lines.append(f"{layer_label(finding.layer)}: {finding.evidence}. Remedy: {finding.remedy}.")
        for layer, stats in self.stats.layers.items():
            if stats.tokens_of_modality is None or stats.pairs_of_modality is None:
                continue
            for modality in (IMAGE, TEXT):
                count, pairs_E = int(stats.tokens_of_modality[modality]), stats.pairs_of_modality[modality]
                experts = (pairs_E == 0).nonzero().squeeze(1).tolist() if count else []
                if experts:
                    which = f"{len(experts)} of {len(pairs_E)} experts ({some(list(map(str, experts)), 8)})"
                    lines.append(f"{layer_label(layer)}: {which} computed none of the {count:,} {TOKENS[modality]}.")
        return lines

    def class_information(self) -> dict[str, list[float]]:
        """Return, by layer, how much a patch's expert tells about each attribute's class of its image: the share of the
        experts' entropy that the classes explain, from 0 to 1."""
        by_attribute = [self.counts[name] for name in self.attributes]
        layers = by_attribute[0] if by_attribute else ()
        return {name: [explained(torch.from_numpy(own[name]).double()) for own in by_attribute] for name in layers}

    def frequent_pieces(self, layers: Sequence[str], most: int) -> np.ndarray:
        """Return the ids of the commonest tokens that these layers saw, int64, the commonest first."""
        count_V = sum((own.sum(1) for name, own in self.counts["piece"].items() if name in layers), np.zeros(1, int))
        order = np.argsort(-count_V, kind="stable")[:most]
        return order[count_V[order] > 0]


def tokens(entry: Any, batch: Any) -> dict[str, Tensor]:
    """Return the modality of each token of a pass over a batch of pairs, the piece of each token of a text, and the
    class of each attribute of each image."""
    rows = PassLayout.of_entry(entry)
    if rows is None:
        return {}
    modality_T = rows.modality_RL.flatten()
    numbers = {"modality": modality_T}
    if len(rows.texts) and entry.context.token_ids_BS is not None:
        numbers["piece"] = torch.where(modality_T == TEXT, entry.context.token_ids_BS.flatten(), -1)
    for a in range(batch.label_BA.shape[1] if len(rows.images) else 0):
        label_R = torch.full(rows.modality_RL.shape[:1], -1, device=modality_T.device)
        label_R[rows.images] = batch.label_BA[:, a].to(label_R.device)[: len(rows.images)]
        numbers[f"class {a}"] = label_R
    return numbers


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
