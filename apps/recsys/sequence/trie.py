"""``Trie``: which sequences of ids exist, and a beam search that only finds those."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Trie(nn.Module):
    """The tree of the prefixes of N sequences. A node is a prefix, node 0 the empty one; nodes count level by level.

    Args:
        ids_NL: int64 (N, L) on a CPU, the sequences; a shorter one has -1 after its end. No two are equal.
        size: number of different ids, V.

    Attributes:
        path_NL: int64 (N, L), the node at which each sequence is after each id; -1 after its end.
        num_nodes: number of nodes.

    Raises:
        ValueError: an id is not in 0 to ``size`` - 1, a sequence is empty, or two are equal.
    """

    path_NL: Tensor
    _token_E: Tensor
    _begin_n: Tensor
    _sequence_n: Tensor

    def __init__(self, ids_NL: Tensor, size: int) -> None:
        super().__init__()
        (N, L), self.size = ids_NL.shape, size
        if N and (int(ids_NL.min()) < -1 or int(ids_NL.max()) >= size or bool((ids_NL[:, 0] < 0).any())):
            raise ValueError(f"sequences of a trie have ids in 0 to {size - 1}, and one at least")
        # The edge that leads to node n is edge n - 1: nodes are numbered by parent, then by id.
        node_N, path_NL, keys, nodes = ids_NL.new_zeros(N), torch.full_like(ids_NL, -1), [], 1
        for level in range(L):
            (live_n,) = (ids_NL[:, level] >= 0).nonzero(as_tuple=True)
            key_e, edge_n = (node_N[live_n] * size + ids_NL[live_n, level]).unique(return_inverse=True)
            node_N[live_n] = path_NL[live_n, level] = nodes + edge_n
            keys.append(key_e)
            nodes += len(key_e)
        key_E, self.num_nodes = torch.cat(keys), nodes
        sequence_n = ids_NL.new_full((nodes,), -1)
        sequence_n[node_N] = torch.arange(N, device=ids_NL.device)
        if N != int((sequence_n >= 0).sum()):
            raise ValueError(f"two of the {N} sequences of a trie are equal")
        count_n = (key_E // size).bincount(minlength=nodes)
        self.most = int(count_n.max())
        self.register_buffer("path_NL", path_NL, persistent=False)
        self.register_buffer("_token_E", key_E % size, persistent=False)
        self.register_buffer("_begin_n", nn.functional.pad(count_n.cumsum(0), (1, 0)), persistent=False)
        self.register_buffer("_sequence_n", sequence_n, persistent=False)

    def next_nodes(self, node_R: Tensor) -> Tensor:
        """Return the node that each id leads to, int32 (..., V), from nodes (...); 0 where no sequence continues so."""
        begin_R, end_R = self._begin_n[node_R], self._begin_n[node_R + 1]
        edge_RC = begin_R[..., None] + torch.arange(self.most, device=node_R.device)
        is_edge_RC = edge_RC < end_R[..., None]
        id_RC = torch.where(is_edge_RC, self._token_E[edge_RC.clamp_max(len(self._token_E) - 1)], self.size)
        found = torch.zeros(*node_R.shape, self.size + 1, dtype=torch.int32, device=node_R.device)
        return found.scatter(-1, id_RC, (edge_RC + 1).int())[..., : self.size]

    def sequences(self, node_R: Tensor) -> Tensor:
        """Return the number of the sequence that ends at each node; -1 for none."""
        return self._sequence_n[node_R]

    def emptied(self, left_out_BX: Tensor) -> Tensor:
        """Return bool (B, nodes), True for nodes all of whose sequences are left out for a row.

        Args:
            left_out_BX: int64 (B, X), numbers of sequences, of which some may be equal; -1 is none.
        """
        B, count_n = len(left_out_BX), self.path_NL.new_zeros(self.num_nodes + 1)
        path_NL = torch.where(self.path_NL < 0, self.num_nodes, self.path_NL)
        count_n = count_n.index_add(0, path_NL.flatten(), torch.ones_like(path_NL.flatten()))
        out_BN = torch.zeros(B, len(path_NL) + 1, dtype=torch.bool, device=path_NL.device)
        out_BN = out_BN.scatter(1, torch.where(left_out_BX < 0, len(path_NL), left_out_BX), True)[:, :-1]
        lost_Bn = torch.zeros(B, self.num_nodes + 1, dtype=torch.int32, device=path_NL.device)
        for path_N in path_NL.unbind(1):
            lost_Bn = lost_Bn.index_add(1, path_N, out_BN.int())
        return ((lost_Bn == count_n) & (count_n > 0))[:, :-1]


def masked_log_softmax(logits: Tensor, children: Tensor) -> Tensor:
    """Return the log of the softmax over the ids that lead on in a trie, float32 at least; -inf for the others.

    Args:
        logits: (..., V).
        children: (..., V), from ``Trie.next_nodes``; a node without any has NaN.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.masked_fill(children == 0, -math.inf).log_softmax(-1)


def trie_search(
    trie: Trie, logits_of: Callable[[Tensor], Tensor], num_rows: int, width: int, emptied_Bn: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the sequences with the largest sums of log p that a beam search among those of a trie finds. p is the
    softmax over the ids that lead on, so that all sequences of a row together have the probability 1.

    Args:
        trie: its sequences have one length.
        logits_of: maps int64 (B, k, l) ids so far to the logits (B, k, V) of the next.
        num_rows: B.
        width: prefixes that each row keeps; as many as there are sequences find the best ones for certain.
        emptied_Bn: from ``Trie.emptied``: nodes that are not entered; None: all are.

    Returns:
        the sequences' numbers, int64 (B, k), and their sums, (B, k), best first; -1 and -inf where there are fewer.
    """
    device, V = trie.path_NL.device, trie.size
    node_Bk, score_Bk = torch.zeros(num_rows, 1, dtype=torch.int64, device=device), torch.zeros((), device=device)
    ids_Bkl = node_Bk.new_zeros(num_rows, 1, 0)
    for _ in range(trie.path_NL.shape[1]):
        children_BkV = trie.next_nodes(node_Bk)
        log_p_BkV = masked_log_softmax(logits_of(ids_Bkl), children_BkV)
        log_p_BkV = log_p_BkV.masked_fill(children_BkV == 0, -math.inf)  # a prefix that is none has no child
        child_BC = children_BkV.flatten(1).long()
        sum_BC = (score_Bk[..., None] + log_p_BkV).flatten(1)
        if emptied_Bn is not None:
            sum_BC = sum_BC.masked_fill(emptied_Bn.gather(1, child_BC), -math.inf)
        score_Bk, place_Bk = sum_BC.topk(min(width, sum_BC.shape[1]))
        before_Bkl = ids_Bkl.gather(1, (place_Bk // V)[..., None].expand(-1, -1, ids_Bkl.shape[2]))
        ids_Bkl = torch.cat((before_Bkl, (place_Bk % V)[..., None]), -1)
        node_Bk = child_BC.gather(1, place_Bk)
    return torch.where(score_Bk > -math.inf, trie.sequences(node_Bk), -1), score_Bk
