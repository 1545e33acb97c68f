"""The trie of sequences that exist, and the beam search among them."""

import math

import pytest
import torch
from torch.testing import assert_close

from apps.recsys.sequence.trie import Trie, masked_log_softmax, trie_search

SEQUENCES = torch.tensor([[2, 0], [0, 1], [2, 1], [0, 0], [2, 2]])
"""Under node 0 are the ids 0 and 2, nodes 1 and 2; below node 1 the nodes 3 and 4, below node 2 the nodes 5 to 7."""


def test_nodes_count_level_by_level():
    trie = Trie(SEQUENCES, 3)
    assert trie.num_nodes == 8
    assert trie.path_NL.tolist() == [[2, 5], [1, 4], [2, 6], [1, 3], [2, 7]]
    assert trie.next_nodes(torch.tensor([0, 1, 2, 6])).tolist() == [[1, 0, 2], [3, 4, 0], [5, 6, 7], [0, 0, 0]]
    assert trie.sequences(torch.tensor([5, 4, 6, 3, 7, 0, 1])).tolist() == [0, 1, 2, 3, 4, -1, -1]


def test_sequences_may_be_shorter_and_begin_alike():
    trie = Trie(torch.tensor([[1, -1, -1], [1, 0, -1], [1, 0, 2]]), 3)
    assert trie.path_NL.tolist() == [[1, -1, -1], [1, 2, -1], [1, 2, 3]]
    assert trie.sequences(torch.arange(4)).tolist() == [-1, 0, 1, 2]


def test_only_the_given_sequences_can_be_spelled():
    trie, ids = Trie(SEQUENCES, 3), [[a, b] for a in range(3) for b in range(3)]
    spelled = []
    for a, b in ids:
        first = int(trie.next_nodes(torch.tensor(0))[a])
        if first and int(trie.next_nodes(torch.tensor(first))[b]):
            spelled.append([a, b])
    assert spelled == sorted(SEQUENCES.tolist())


def test_a_node_is_empty_if_all_below_it_is_left_out():
    trie = Trie(SEQUENCES, 3)
    emptied = trie.emptied(torch.tensor([[1, 3, 3], [0, -1, -1], [-1, -1, -1]]))
    # Sequences 1 and 3 are all that begins with id 0: node 1 and the two below it. Sequence 0 is node 5.
    assert [row.nonzero().flatten().tolist() for row in emptied] == [[1, 3, 4], [5], []]


def logits_of(table_LV):
    """Return logits that depend on the ids so far: those of the level, moved by the sum of the ids."""
    return lambda ids_Bkl: table_LV[ids_Bkl.shape[2]] * (1 + ids_Bkl.sum(-1, keepdim=True))


def test_a_search_that_keeps_all_finds_what_scoring_each_sequence_does():
    torch.manual_seed(0)
    ids = torch.cartesian_prod(*[torch.arange(5)] * 3)
    ids = ids[torch.randperm(125)[:40]]
    trie, table = Trie(ids, 5), torch.randn(3, 5)
    given, scores = logits_of(table), []
    for row in ids:
        node, score = torch.zeros((), dtype=torch.int64), 0.0
        for level in range(3):
            children = trie.next_nodes(node)
            score += masked_log_softmax(given(row[None, None, :level])[0, 0], children)[row[level]].item()
            node = children[row[level]].long()
        scores.append(score)
    scores = torch.tensor(scores)
    assert_close(scores.exp().sum(), torch.tensor(1.0))  # all that exists, and nothing else
    found, score = trie_search(trie, given, num_rows=2, width=40)
    assert_close(score[0], scores.sort(descending=True).values)
    assert found[0].tolist() == found[1].tolist() == scores.argsort(descending=True).tolist()
    # Left out: the best two of the first row.
    left_out = torch.stack((found[0, :2], torch.tensor([-1, -1])))
    without, _ = trie_search(trie, given, 2, 40, trie.emptied(left_out))
    assert without[0].tolist() == [*found[0, 2:].tolist(), -1, -1]
    assert without[1].tolist() == found[1].tolist()


def test_a_narrow_beam_keeps_the_best_prefixes():
    # The first id is 0 with p = 0.9, of which each of two sequences has a half; id 2 leads to one sequence alone.
    trie = Trie(torch.tensor([[0, 0], [0, 1], [2, 0]]), 3)
    table = torch.tensor([[math.log(0.9), 5.0, math.log(0.1)], [0.0, 0.0, 0.0]])
    found, score = trie_search(trie, lambda ids: table[ids.shape[2]].expand(1, ids.shape[1], 3), 1, 2)
    assert sorted(found[0].tolist()) == [0, 1]
    assert_close(score.exp(), torch.tensor([[0.45, 0.45]]))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[0, 3]], "ids in 0 to 2, and one at least"),
        ([[-1, 0]], "ids in 0 to 2, and one at least"),
        ([[0, 1], [1, 1], [0, 1]], "two of the 3 sequences of a trie are equal"),
    ],
)
def test_what_is_rejected(ids, message):
    with pytest.raises(ValueError, match=message):
        Trie(torch.tensor(ids), 3)
