"""What ``ImageTextRetriever`` is compared with: dense towers of equal cost, one for both modalities or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import core
from apps.equal_cost.comparison import (
    Baseline,
    Comparison,
    DenseTwin,
    ExampleValues,
    RoutedLayers,
    dense_twins,
    equal_widths,
)
from apps.multimodal.report.metrics import Gallery
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.towers import SingleTower, TowerConfig
from apps.multimodal.towers.two_towers import PairOfTowers, TwoTowers
from apps.train.step.module import TaskOutput
from core.convert import same_width


class ImageTextComparison(Comparison):
    """An ``ImageTextRetriever`` as a comparison sees it."""

    def baselines(self) -> dict[str, Baseline]:
        """Return dense models whose FFNs replace the experts: of equal active FLOPs, and of equal parameters.

        A single tower has a third one, "two_towers": a tower of the same sizes for each modality, of which each token
        goes through one. So it has the FLOPs of the first baseline, and about twice the parameters.
        """
        tower: TowerConfig = self.module.tower
        if self.routed_layers() is None:
            return {}
        if isinstance(tower, TwoTowers):
            return _of_two_towers(self.module, tower)
        twins = dense_twins(self, tower.dense_ffn)
        equal = twins["dense_equal_flops"]
        if isinstance(tower, SingleTower) and isinstance(equal.build, DenseTwin):
            parts = TwoTowers(PatchImages(blocks_as=tower), PieceTexts(blocks_as=tower))
            note = f"a tower for each modality, each with {equal.note}"
            twins["two_towers"] = Baseline(replace(equal.build, changed={"tower": parts}), note)
        return twins

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """Return the MoE layers of the towers: a baseline keeps the head of the attributes."""
        return tuple(f"model.towers.{name}" for name in core.moe_layers(self.module.model.towers))

    def routed_layers(self) -> RoutedLayers | None:
        if self.module.moe is None:
            return None
        arguments = {"tokens_per_sequence": self.module.model.towers.num_patches}
        return RoutedLayers(self.module.moe, self.module.tower.widths[0], self.module.place, arguments)

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return one value per pair, whose mean is the recall at ``recall_at``: both ways, over all images and texts.

        A pair gets half of its image's hit and half of its text's, over how many pairs share them.
        """
        columns = [(*out.outputs[:2], out.targets.image_B, out.targets.caption_B) for out in outs]
        gallery = Gallery.of_pairs(*(torch.cat(column) for column in zip(*columns, strict=True)))
        values_P = torch.zeros(len(gallery.image_P), dtype=torch.float64)
        for rank_Q, query_P in zip(gallery.ranks(), (gallery.image_P, gallery.text_P), strict=True):
            pairs_Q = query_P.bincount(minlength=len(rank_Q))
            share_Q = (rank_Q <= self.module.recall_at).double() * len(query_P) / len(rank_Q) / pairs_Q
            values_P += share_Q[query_P].cpu() / 2
        return ExampleValues(f"recall_{self.module.recall_at}", values_P)


def _of_two_towers(sparse: Any, tower: TwoTowers) -> dict[str, Baseline]:
    """Return the baselines of two towers, whose FFNs are solved for by themselves: widths may differ."""
    towers = sparse.model.towers
    assert isinstance(towers, PairOfTowers)
    lengths = (towers.num_patches, sparse.max_tokens)
    dense: list[tuple[str, core.DenseFFN, dict[str, tuple[int, str]]]] = []
    for name, part, own, length in zip(
        ("images", "texts"), (tower.image, tower.text), (towers.image, towers.text), lengths, strict=True
    ):
        if own.moes:
            layers = RoutedLayers(list(own.moes), part.width, sparse.place, {"tokens_per_sequence": length})
            costs = layers.flops_per_token(), layers.num_params()
            dense.append((name, part.dense_ffn, dict(equal_widths("dense", part.dense_ffn, part.width, *costs))))
    twins: dict[str, Baseline] = {}
    kept: dict[str, Sequence[int]] = {}
    for baseline in ("dense_equal_flops", "dense_equal_params"):
        widths = [solved[baseline][0] for _, _, solved in dense]
        problem = next((why for _, _, solved in dense if (why := solved[baseline][1])), "")
        note = "FFN hidden dims in place of experts: " + ", ".join(
            f"{width} of {name}" for (name, _, _), width in zip(dense, widths, strict=True)
        )
        same = next((n for n, w in kept.items() if all(map(same_width, w, widths))), None)
        if problem:
            twins[baseline] = Baseline(None, problem)
        elif same is not None:
            twins[baseline] = Baseline(None, f"coincides with {same}: {note}")
        else:
            ffns = [replace(ffn, hidden_dim=width) for (_, ffn, _), width in zip(dense, widths, strict=True)]
            twins[baseline] = Baseline(DenseTwin(sparse, ffns[0], {"tower": replace(tower, text_ffn=ffns[-1])}), note)
            kept[baseline] = widths
    return twins


COMPARISON = ImageTextComparison
