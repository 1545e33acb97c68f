"""Baselines of ``ImageTextRetriever``: dense towers of equal cost, one for both modalities or one for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import core
from apps.equal_cost.comparable import Baseline, DenseTwin, RoutedLayers, dense_twins, equal_widths
from apps.multimodal.towers.random_init import PatchImages, PieceTexts
from apps.multimodal.towers.towers import SingleTower
from apps.multimodal.towers.two_towers import PairOfTowers, TwoTowers
from core.convert import same_width


def baselines(sparse: Any) -> dict[str, Baseline]:
    """Return dense models whose FFNs replace the experts: of equal active FLOPs, and of equal parameters.

    A single tower has a third one, "two_towers": a tower of the same sizes for each modality, of which each token goes
    through one. So it has the FLOPs of the first baseline, and about twice the parameters.
    """
    layers = sparse.routed_layers()
    if layers is None:
        return {}
    if isinstance(sparse.tower, TwoTowers):
        return _of_two_towers(sparse, sparse.tower)
    twins = dense_twins(sparse, sparse.tower.dense_ffn)
    equal = twins["dense_equal_flops"]
    if isinstance(sparse.tower, SingleTower) and isinstance(equal.build, DenseTwin):
        parts = TwoTowers(PatchImages(blocks_as=sparse.tower), PieceTexts(blocks_as=sparse.tower))
        note = f"a tower for each modality, each with {equal.note}"
        twins["two_towers"] = Baseline(replace(equal.build, changed={"tower": parts}), note)
    return twins


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
