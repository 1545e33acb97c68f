"""What ``NextItemRecommender`` is compared with: SASRec of equal cost, and of HSTU its dense form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

import core
from apps.equal_cost.comparison import (
    Baseline,
    Comparison,
    DenseTwin,
    ExampleValues,
    RoutedLayers,
    baselines_of,
    equal_widths,
)
from apps.nets.blocks import FFNConfig
from apps.recsys.metrics import CUTOFF, target_ranks
from apps.recsys.sequence.model import HistoryModelConfig
from apps.train.step.module import TaskOutput
from core.convert import SolvedWidth


class SequenceComparison(Comparison):
    """A ``NextItemRecommender`` as a comparison sees it."""

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return the NDCG at ``CUTOFF`` of each history whose next item is known."""
        rank_N = torch.cat([target_ranks(out.outputs, out.targets) for out in outs]).double().cpu()
        gain_N = torch.where(rank_N <= CUTOFF, 1 / torch.log2(1 + rank_N), 0.0)
        return ExampleValues(f"ndcg_{CUTOFF}", gain_N)

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """The blocks in which a baseline differs: the FFNs of ``moe_blocks`` and, if it is not attention, the mixing of
        positions in all blocks."""
        mixing = self.module.sequence.mixing
        if self.module.moe is None and mixing != "mixture":
            return ()
        mixings = (
            [] if mixing == "attention" else [f"model.blocks.{i}.mixing" for i in range(self.module.sequence.depth)]
        )
        generator = self.module.model.generator
        decoder = () if generator is None else generator.ffn_names("model.generator")
        return (*mixings, *(f"model.blocks.{i}.ffn" for i in self.module.model.moe_blocks), *decoder)

    def baselines(self) -> Mapping[str, Baseline]:
        """Return SASRec of equal active FLOPs and of equal parameters, with only attention and dense FFNs; of HSTU
        before them HSTU with dense FFNs.

        The FFNs of ``moe_blocks`` are so wide that they make up for the experts and, compared with SASRec, for the
        mixing's extra cost over attention. SASRec is a baseline of HSTU if every block has an FFN. With semantic ids
        the baselines have them too, and "tiger" takes the place of "sasrec".
        """
        if not self.moe_block_names:
            return {}
        baselines: dict[str, Baseline] = {}
        ids, blocks = self.module.semantic_ids, len(self.module.model.moe_blocks)
        decoder = (0, 0) if ids is None else (ids.depth * (ids.levels + 1), ids.depth)
        widths = baseline_widths(self.module.sequence, self.module.moe, blocks, self.module.max_length, decoder)
        for prefix, sequence in dense_sequences(self.module.sequence, len(self.module.model.moe_blocks)).items():
            own = {name: width for name, width in widths.items() if name.startswith(prefix)}
            elsewhere = "none" if sequence.dense_ffn is None else sequence.dense_ffn.hidden_dim
            mixing = "pointwise attention" if sequence.mixing == "hstu" else "attention"
            says = f"{mixing} and dense FFNs, hidden dim {{width}} in moe_blocks, {elsewhere} elsewhere"
            baselines |= baselines_of(own, partial(_dense_twin, self.module, sequence), says)
        if ids is None:
            return baselines
        return {
            name.replace("sasrec", "tiger"): dataclasses.replace(own, note=own.note.replace("sasrec", "tiger"))
            for name, own in baselines.items()
        }

    def routed_layers(self) -> RoutedLayers | None:
        if self.module.moe is None:
            return None
        return RoutedLayers(
            self.module.moe,
            self.module.sequence.dim,
            self.module.place,
            {"tokens_per_sequence": self.module.max_length},
        )


def _dense_twin(sparse: Any, sequence: HistoryModelConfig, width: int) -> DenseTwin:
    """Return what makes ``sparse`` with the transformer ``sequence`` and dense FFNs of ``width`` in ``moe_blocks``."""
    ffn = dataclasses.replace(sequence.transformer.dense_ffn, hidden_dim=width)
    return DenseTwin(sparse, ffn, {"sequence": sequence})


def dense_sequences(config: HistoryModelConfig, num_moe_blocks: int) -> dict[str, HistoryModelConfig]:
    """Return the transformers of the baselines by the prefix of their names: "sasrec", of HSTU "hstu" before it.

    SASRec has the biases of scores that ``config`` has. HSTU whose other blocks have no FFN has no SASRec baseline.
    """
    sasrec = dataclasses.replace(config, mixing="attention", distance_bias=config.has_pair_bias)
    if config.mixing != "hstu":
        return {"sasrec": sasrec}
    has_ffns = config.dense_ffn is not None or num_moe_blocks == config.depth
    return {"hstu": config, "sasrec": sasrec} if has_ffns else {"hstu": config}


def baseline_widths(
    config: HistoryModelConfig,
    moe: core.MoEConfig | None,
    num_moe_blocks: int,
    tokens_per_sequence: int | None = None,
    decoder: tuple[int, int] = (0, 0),
) -> dict[str, SolvedWidth]:
    """Return the FFN hidden dims with which the dense baselines cost what ``config`` with ``moe`` does.

    The FFNs of ``moe_blocks`` also make up for the mixing's extra cost compared with SASRec's attention, in all blocks.

    Args:
        config: the model.
        moe: the FFN of its ``moe_blocks``; None: they are dense.
        num_moe_blocks: number of these blocks.
        tokens_per_sequence: length of a sequence, on which some routers' cost depends.
        decoder: rows that a decoder's FFNs of the same width compute for an item, and the number of these FFNs.

    Returns:
        "sasrec_equal_flops" and "sasrec_equal_params", and of HSTU "hstu_equal_flops" and "hstu_equal_params" before
        them; see ``dense_sequences``.
    """
    dim, dense = config.dim, config.transformer.dense_ffn
    ffn: FFNConfig = moe or dense
    flops, params = ffn.flops_per_token(dim, tokens_per_sequence=tokens_per_sequence), ffn.num_params(dim)
    widths: dict[str, SolvedWidth] = {}
    for prefix, sequence in dense_sequences(config, num_moe_blocks).items():
        more_flops = config.extra_flops_per_token() - sequence.extra_flops_per_token()
        more_params = config.extra_params() - sequence.extra_params()
        own_flops = flops + more_flops * config.depth / (num_moe_blocks + decoder[0])
        own_params = params + more_params * config.depth / (num_moe_blocks + decoder[1])
        widths |= equal_widths(prefix, dense, dim, own_flops, own_params, each=" a block")
    return widths


COMPARISON = SequenceComparison
