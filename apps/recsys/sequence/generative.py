"""The next item as the codes that a small decoder generates, among the codes of real items (TIGER, arXiv 2305.05065).

TIGER has an encoder-decoder: the codes of a history are its source, and those of one next item its target. Here an item
of the history is one token, the sum of its codes' embeddings, and the decoder begins with the history transformer's
output at a position, so that all positions of a history train at once (as in the RQ-Transformer, arXiv 2203.01941).
The softmax of each code leaves out codes that no item has after the ones before, so that the probabilities of all items
sum to 1; the paper's beam search may end at codes of no item.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.nets.blocks import FFNConfig
from apps.nets.config import TransformerConfig
from apps.nets.layers import Stack
from apps.recsys.sequence.semantic_ids import SemanticIdsConfig
from apps.recsys.sequence.trie import Trie, masked_log_softmax, trie_search


class CodeEmbedding(nn.Module):
    """Items as the sum of their codes' embeddings.

    Parameters: ``weight`` (levels + 1, K, D). Buffer: ``codes`` int64 (num_items + 1, levels + 1), by item id. Until
    ``set_codes`` they are the digits of the item's number.

    Args:
        config: numbers of levels and codes.
        num_items: number of items, which count from 1.
        dim: D.

    Attributes:
        trie: the codes of real items; sequence i is item i + 1.

    Raises:
        ValueError: there are more items than codes can tell apart.
    """

    codes: Tensor
    trie: Trie

    def __init__(self, config: SemanticIdsConfig, num_items: int, dim: int) -> None:
        super().__init__()
        self.length, self.size = config.levels + 1, config.codes
        if num_items > self.size**self.length:
            raise ValueError(
                f"semantic_ids.codes={self.size} in {config.levels} levels do not tell {num_items} items apart"
            )
        self.weight = nn.Parameter(torch.empty(self.length, self.size, dim))
        self.register_buffer("codes", torch.empty(num_items + 1, self.length, dtype=torch.int64))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        number_N1 = torch.arange(len(self.codes) - 1, device="cpu")[:, None]
        self.set_codes(number_N1 // self.size ** torch.arange(self.length, device="cpu") % self.size)

    def set_codes(self, codes_NL: Tensor) -> None:
        """Set the codes of all items, int64 (num_items, levels + 1); no two items have the same."""
        trie = Trie(codes_NL.cpu(), self.size)
        with torch.no_grad():
            self.codes.copy_(nn.functional.pad(codes_NL, (0, 0, 1, 0)))  # padding has those of some item
        self.trie = trie.to(self.codes.device)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state, prefix, *args)
        if not self.codes.is_meta:
            self.set_codes(self.codes[1:])

    def forward(self, item_T: Tensor) -> Tensor:
        """Return the vectors (T, D) of items, given their ids (T,)."""
        return self.embed(self.codes[item_T]).sum(-2)

    def embed(self, codes: Tensor) -> Tensor:
        """Return the embeddings (..., l, D) of the first l codes of items, (..., l)."""
        level_l = torch.arange(codes.shape[-1], device=codes.device)
        return nn.functional.embedding(codes + level_l * self.size, self.weight.flatten(0, 1))

    def logits(self, h: Tensor, first: int = 0) -> Tensor:
        """Return the logits (..., l, K) of l codes from level ``first`` on, given (..., l, D)."""
        weight_lKD = self.weight[first : first + h.shape[-2]].to(h.dtype)
        return torch.bmm(h.flatten(0, -3).transpose(0, 1), weight_lKD.mT).transpose(0, 1).unflatten(0, h.shape[:-2])


class CodeDecoder(nn.Module):
    """A causal transformer from the output at a position and the first codes of the next item to its further codes.

    Args:
        config: its depth, and the numbers of levels and codes.
        transformer: width, heads and dropout.
        ffn: FFN or MoE layer of its layers; None: the dense one of ``transformer``.
    """

    def __init__(self, config: SemanticIdsConfig, transformer: TransformerConfig, ffn: FFNConfig | None) -> None:
        super().__init__()
        self.width, length = config.beam_size, config.levels + 1
        own = dataclasses.replace(
            transformer,
            decoder_layers=config.depth,
            positions="learned",
            max_length=length,
            scale_embeddings=False,
            embed_dropout=0.0,
        )
        built = [(ffn or own.dense_ffn).build(own.shape.dim, causal=True) for _ in range(config.depth)]
        self.stack = Stack(own, built, causal=True, cross=False)

    def ffn_names(self, prefix: str) -> tuple[str, ...]:
        """Return the dotted names of the FFNs, given the decoder's."""
        return tuple(f"{prefix}.stack.layers.{i}.ffn" for i in range(len(self.stack.layers)))

    def hidden(self, h_RD: Tensor, codes_Rl: Tensor, items: CodeEmbedding) -> Tensor:
        """Return the outputs (R, l + 1, D) at the position's output (R, D) and the codes that follow it, (R, l)."""
        scale = math.sqrt(h_RD.shape[-1])
        x_RLD = torch.cat((h_RD[:, None], (items.embed(codes_Rl) * scale).to(h_RD.dtype)), 1)
        return self.stack(x_RLD, core.RoutingContext())

    def loss(self, h_RD: Tensor, target_R: Tensor, items: CodeEmbedding) -> Tensor:
        """Return the mean of -log p of the items that follow, float32 (); 0 without rows.

        Args:
            h_RD: outputs at R positions.
            target_R: int64 (R,), the ids of the items.
            items: the codes.
        """
        codes_RL = items.codes[target_R]
        logits_RLK = items.logits(self.hidden(h_RD, codes_RL[:, :-1], items))
        node_RL = nn.functional.pad(items.trie.path_NL[target_R - 1, :-1], (1, 0))
        log_p_RLK = masked_log_softmax(logits_RLK, items.trie.next_nodes(node_RL))
        return -log_p_RLK.gather(-1, codes_RL[..., None]).sum() / max(len(target_R), 1)

    def scores(self, h_BD: Tensor, items: CodeEmbedding, seen_BH: Tensor | None = None) -> Tensor:
        """Return log p of the items that a beam search finds, float32 (B, num_items + 1) by id; -inf for others.

        Args:
            h_BD: outputs after the last item of histories.
            items: the codes.
            seen_BH: int64 (B, H), items that are not to be found, 0 for none; None: all may be.
        """

        def logits_of(ids_Bkl: Tensor) -> Tensor:
            B, k, done = ids_Bkl.shape
            h_RD = h_BD[:, None].expand(-1, k, -1).flatten(0, 1)
            last_R1D = self.hidden(h_RD, ids_Bkl.flatten(0, 1), items)[:, -1:]
            return items.logits(last_R1D, done).unflatten(0, (B, k)).squeeze(2)

        emptied_Bn = None if seen_BH is None else items.trie.emptied(seen_BH - 1)
        found_Bk, score_Bk = trie_search(items.trie, logits_of, h_BD.shape[0], self.width, emptied_Bn)
        scores_BI = score_Bk.new_full((h_BD.shape[0], len(items.codes)), -math.inf)
        scores_BI = scores_BI.scatter(1, found_Bk + 1, score_Bk)
        scores_BI[:, 0] = -math.inf
        return scores_BI
