"""Tests of the choice of pairs: capacity, priority and groups, on tables small enough to route by hand."""

import pytest
import torch
from routed import ids
from torch import Tensor

from core.contract import Evidence, Routing
from core.routing.selection import Capacity, Choice, select_pairs


def select(
    scores: list[list[float]] | Tensor,
    top_k: int,
    limit: Capacity,
    *,
    sequences: int = 1,
    valid: list[bool] | None = None,
    training: bool = False,
    keep_second: list[bool] | None = None,
) -> Routing:
    """Route tokens by typed scores; gates are the scores of the chosen experts."""
    scores_TE = torch.as_tensor(scores)
    gates, ids = scores_TE.topk(top_k, dim=-1)
    if keep_second is not None:
        ids[~torch.tensor(keep_second), 1] = scores_TE.shape[-1]
    return select_pairs(
        Choice(ids, gates, Evidence(scores_TE)),
        num_experts=scores_TE.shape[-1],
        num_sequences=sequences,
        valid_T=None if valid is None else torch.tensor(valid),
        limit=limit,
        training=training,
    )


# Choices:          first, second
THREE = [
    [0.5, 0.3, 0.2],  # 0, 1
    [0.6, 0.1, 0.3],  # 0, 2
    [0.2, 0.7, 0.1],  # 1, 0
]
X = 3  # not computed


def test_dropless_computes_every_pair_and_no_tokens_route_to_nothing():
    routing = select(THREE, 2, Capacity())
    assert (ids(routing), routing.tokens_per_expert_E.tolist()) == ([[0, 1], [0, 2], [1, 0]], [3, 2, 1])
    assert routing.gates_N.tolist() == pytest.approx([0.5, 0.3, 0.6, 0.3, 0.7, 0.2])
    assert routing.token_index_N.tolist() == [0, 0, 1, 1, 2, 2]
    for group in ("batch", "sequence", 3):
        for sequences in (0, 2):
            routing = select(torch.zeros(0, 3), 2, Capacity(0.5, group=group), sequences=sequences)
            assert (routing.tokens_per_expert_E.tolist(), routing.expert_ids_N.shape) == ([0, 0, 0], (0,))


def test_position_priority_serves_first_choices_then_earlier_tokens():
    # Capacity ceil(0.5 * 2 * 3 / 3) = 1. First choices: token 0 takes expert 0, token 1 finds it full, token 2
    # takes expert 1. Second choices: token 0 finds expert 1 full, token 1 takes expert 2, token 2 finds 0 full.
    routing = select(THREE, 2, Capacity(0.5))
    assert (ids(routing), routing.tokens_per_expert_E.tolist()) == ([[0, X], [X, 2], [1, X]], [1, 1, 1])
    assert routing.chosen_per_expert_E.tolist() == [3, 2, 1]
    assert routing.gates_N.tolist() == pytest.approx([0.5, 0, 0, 0.3, 0.7, 0])
    # Capacity ceil(0.5 * 2 * 2 / 2) = 1. Token by token, token 0 would take both experts and token 1 none.
    assert ids(select([[0.6, 0.4], [0.4, 0.6]], 2, Capacity(0.5))) == [[0, 2], [1, 2]]
    # Capacity ceil(0.7 * 2 * 3 / 3) = ceil(1.4) = 2: token 2's second choice finds expert 0 full, all else fits.
    assert ids(select(THREE, 2, Capacity(0.7))) == [[0, 1], [0, 2], [1, X]]


def test_score_priority_serves_the_most_certain_tokens_first():
    # Order by the highest score: token 2 (0.7), 1 (0.6), 0 (0.5). First choices: 2 takes expert 1, 1 takes expert 0,
    # 0 finds it full. Second choices: 2 finds 0 full, 1 takes expert 2, 0 finds 1 full: token 0 is left with nothing.
    routing = select(THREE, 2, Capacity(0.5, priority="score"))
    assert ids(routing) == [[X, X], [0, 2], [1, X]]
    assert routing.gates_N.tolist() == pytest.approx([0, 0, 0.6, 0.3, 0.7, 0])


def kept(routing: Routing) -> list[int]:
    """Tokens computed, where K = 1."""
    return [t for t, (e,) in enumerate(ids(routing)) if e < 2]


ALL_ON_0 = [[0.9, 0.1]]


@pytest.mark.parametrize(
    "group, tokens, sequences, expected",
    [
        ("batch", 6, 2, [0, 1, 2]),  # ceil(6 / 2) = 3 of all six
        ("sequence", 6, 2, [0, 1, 3, 4]),  # ceil(3 / 2) = 2 of each three
        (4, 6, 2, [0, 1, 4]),  # ceil(4 / 2) = 2 of tokens 0-3, ceil(2 / 2) = 1 of tokens 4-5
        (2, 5, 1, [0, 2, 4]),  # one of two, one of two, ceil(1 / 2) = 1 of the last one
        (100, 5, 1, [0, 1, 2]),  # ceil(5 / 2) = 3: a group no longer than the batch
        (1, 3, 1, [0, 1, 2]),  # alone in its group, ceil(1 / 2) = 1
    ],
)
def test_capacity_holds_within_each_group(group, tokens, sequences, expected):
    assert kept(select(ALL_ON_0 * tokens, 1, Capacity(1.0, group=group), sequences=sequences)) == expected


def test_padding_takes_no_place_and_does_not_raise_the_capacity():
    # Real tokens 1 and 3 of four: capacity ceil(1 * 1 * 2 / 2) = 1 goes to token 1, though padding 0 comes first.
    routing = select(ALL_ON_0 * 4, 1, Capacity(1.0), valid=[False, True, False, True])
    assert (kept(routing), routing.chosen_per_expert_E.tolist()) == ([1], [2, 0])
    assert routing.tokens_per_expert_E.tolist() == [1, 0]
    # That of a sequence lowers its own capacity alone:
    # ceil(4 / 2) = 2 in the first sequence, ceil(1 / 2) = 1 in the second, whose one real token is its last.
    valid = [True] * 4 + [False] * 3 + [True]
    assert kept(select(ALL_ON_0 * 8, 1, Capacity(1.0, group="sequence"), sequences=2, valid=valid)) == [0, 1, 7]


def test_a_second_expert_left_out_is_neither_computed_nor_chosen_and_frees_its_place():
    routing = select(THREE, 2, Capacity(), keep_second=[True, False, False])
    assert (ids(routing), routing.chosen_per_expert_E.tolist()) == ([[0, 1], [0, X], [1, X]], [2, 2, 0])
    assert routing.gates_N.tolist() == pytest.approx([0.5, 0.3, 0.6, 0, 0.7, 0])
    # Its place is free: tokens 0 and 1 want expert 2 second, and 0 leaves it out.
    scores = [[0.6, 0.1, 0.3], [0.1, 0.6, 0.3]]
    limit = Capacity(0.5)  # ceil(0.5 * 2 * 2 / 3) = 1
    assert ids(select(scores, 2, limit)) == [[0, 2], [1, X]]
    assert ids(select(scores, 2, limit, keep_second=[False, True])) == [[0, X], [1, 2]]


def test_random_priority_is_random_in_training_alone():
    limit = Capacity(0.25, priority="random")  # ceil(0.25 * 64 / 2) = 8 of 64
    in_eval = [kept(select(ALL_ON_0 * 64, 1, limit)) for _ in range(2)]
    assert in_eval == [list(range(8))] * 2
    in_training = [kept(select(ALL_ON_0 * 64, 1, limit, training=True)) for _ in range(2)]
    assert [len(k) for k in in_training] == [8, 8]
    assert in_training[0] != in_training[1]
    assert list(range(8)) not in in_training


def test_evaluation_has_a_capacity_of_its_own():
    limit = Capacity(0.5, 2.0)
    assert kept(select(ALL_ON_0 * 8, 1, limit, training=True)) == [0, 1]  # ceil(0.5 * 8 / 2)
    assert kept(select(ALL_ON_0 * 8, 1, limit)) == list(range(8))
    # None: as in training.
    assert kept(select(ALL_ON_0 * 8, 1, Capacity(0.5))) == [0, 1]
    # Only evaluation is limited.
    assert kept(select(ALL_ON_0 * 8, 1, Capacity(None, 0.5), training=True)) == list(range(8))
    assert kept(select(ALL_ON_0 * 8, 1, Capacity(None, 0.5))) == [0, 1]
    # E / K = 2. ceil(1.99 * 7 / 2) = ceil(6.97) = 7 and ceil(1.7 * 7 / 2) = ceil(5.95) = 6.
    for factor, kept_tokens in ((1.99, 7), (2.0, 7), (2.5, 7), (1.7, 6)):
        assert len(kept(select(ALL_ON_0 * 7, 1, Capacity(factor)))) == kept_tokens
