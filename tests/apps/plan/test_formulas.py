"""The formulas of a plan, by numbers that one can work out by hand."""

from __future__ import annotations

import pytest

from apps.plan.formulas import (
    Group,
    Memory,
    Part,
    Traffic,
    all_gather,
    all_reduce,
    all_to_all,
    exchanged_bytes,
    group,
    ids,
    peak_memory,
    pooled,
    reduce_scatter,
    step_flops,
    step_seconds,
    tables_bytes,
)


def test_a_group_lies_on_nodes():
    for ranks, stride, node, per_node in (
        (16, 1, 8, 8),  # neighbors: two whole nodes
        (4, 1, 8, 4),
        (16, 4, 8, 2),  # every fourth rank: two of them on a node of eight
        (16, 8, 8, 1),
        (16, 32, 8, 1),
        (4, 3, 8, 2),
    ):
        assert group(ranks, stride, node) == Group(ranks, per_node)


def test_sums_and_gathers_send_all_but_the_own_part_and_an_exchange_has_one_level_or_two():
    # 8 ranks on one node: 7/8 of 800 bytes.
    assert reduce_scatter(800, Group(8, 8)) == Traffic(700, 0, 7)
    assert all_gather(800, Group(8, 8)) == Traffic(700, 0, 7)
    # 16 on two nodes of 8: 700 within; of the 100 that are left half goes to the other node. 15/16 of 800 in all.
    assert reduce_scatter(800, Group(16, 8)) == Traffic(700, 50, 8)
    assert all_reduce(800, Group(16, 8)) == Traffic(1400, 100, 16)
    # One rank of each of 4 nodes: all of it between them.
    assert all_reduce(800, Group(4, 1)) == Traffic(0, 1200, 6)
    assert all_reduce(800, Group(1, 1)).total == 0
    # 16 ranks get 1/16 each: 7 neighbors, and 8 ranks of the other node.
    assert all_to_all(1600, experts=16, hidden=1, nodes=1, node=8) == Traffic(700, 800, 15)
    # By way of a neighbor: 7/8 to the neighbors, then half to the other node.
    assert all_to_all(1600, experts=8, hidden=1, nodes=2, node=8) == Traffic(1400, 800, 8)
    # Each row to both ranks that have half of its expert: 3200 bytes among 4 ranks of a node.
    assert all_to_all(1600, experts=2, hidden=2, nodes=1, node=8) == Traffic(2400, 0, 3)


def test_rows_go_there_and_back_and_so_do_their_gradients_and_what_fsdp2_sends_hides():
    # 10 rows of 6 numbers there with a gate of 4 bytes, 5 back, 2 bytes each: 10 * (22 + 4), twice.
    assert exchanged_bytes(10, 6, 5, 2) == 2 * 260
    assert exchanged_bytes(10, 6, 5, 2, passes=2) == 3 * 260
    assert (step_flops(100, False), step_flops(100, True)) == (300, 400)
    assert Traffic(300, 100, 4).seconds(within=100, between=50, latency=0.5) == 3 + 2 + 2
    # What FSDP2 sends hides behind the products; rows are waited for.
    assert step_seconds(compute=3, exchange=1, data=2) == 4
    assert step_seconds(compute=3, exchange=1, data=5) == 6


def test_the_peak_is_at_the_end_of_the_forward_where_gradients_and_activations_meet():
    blocks = [Part(activations=100, gradients=10, whole=10, whole_gradients=10, reduced=10) for _ in range(3)]
    memory = peak_memory(weights=30, optimizer=60, root=Part(), blocks=blocks, step=20)
    # Three blocks' activations and gradients, and the last block's gathered parameters.
    assert memory == Memory(30, 30, 60, 300, 10)
    assert memory.total == 30 + 60 + 30 + 300 + 10


def test_the_peak_is_in_the_backward_where_parts_are_large_beside_their_shards():
    blocks = [Part(activations=1, gradients=1, whole=100, buffer=100, whole_gradients=100, reduced=100)] * 2
    memory = peak_memory(weights=2, optimizer=4, root=Part(whole=5, activations=3), blocks=blocks, step=0)
    # The first block's backward: the root (5 + 3), its own activations (1), the gradient behind it (1), its parameters,
    # the buffer that they come out of, its gradients, and the second block's gradients on their way.
    assert memory.total == 2 + 4 + 8 + 1 + 1 + 400


def test_the_peak_is_in_the_optimizers_step_where_it_needs_much():
    memory = peak_memory(10, 20, Part(), [Part(activations=5, gradients=10, whole=10)], step=50)
    assert memory.total == 10 + 20 + 10 + 50


def test_checkpointing_keeps_what_enters_a_block_and_computes_one_block_anew():
    blocks = [Part(activations=1, gradients=2, whole=2, whole_gradients=2, reduced=2, again=100)] * 4
    memory = peak_memory(8, 16, Part(), blocks, step=0)
    # The last block's backward: four inputs, its own activations; parameters and gradients (4), no gradients behind it.
    # The first block's: its input, its activations; six bytes of gradients behind it, and 4 + 2 of its own.
    assert memory.total == 8 + 16 + max(4 + 100 + 6, 1 + 100 + 6 + 6)


def test_a_billion_rows():
    W = Group(128, 8)
    table = [(10**9, 64, 1)]
    # 4 bytes x 65 x 10^9 rows over all, over a node's 8, and on one.
    assert tables_bytes(table, W, "row_wise") == pytest.approx(260e9 / 128)
    assert tables_bytes(table, W, "table_row_wise") == pytest.approx(32.5e9)
    assert tables_bytes(table, W, "table_wise") == 260e9
    # 256 equal tables: two on each of 128 ranks.
    assert tables_bytes([(1000, 7, 1)] * 256, W, "table_wise") == 2 * 32_000
    # Partial sums of 1,024 examples for each of 127 others, there and as gradients: 2 x 33.3 MB
    # (docs/concepts/embedding_tables.md).
    assert pooled(1024, 64, 1, W, "row_wise").total == 2 * 1024 * 64 * 4 * 127
    assert pooled(1024, 64, 1, W, "row_wise").within == 2 * 1024 * 64 * 4 * 7
    # The holders alone send: 29.4 MB within their node, and 3.9 MB between nodes, there and back.
    held = pooled(1024, 64, 1, W, "table_row_wise")
    assert (held.within, held.between) == (2 * 29_360_128, 2 * 3_932_160)
    # Tables on all ranks: each example gets its vectors once.
    assert pooled(1024, 64 * 128, 128, W, "table_wise").total == pytest.approx(2 * 1024 * 64 * 128 * 4 * 127 / 128)
    assert ids(1024, 1, 1, W, "row_wise").total == 1024 * (8 + 4 * 128) * 127 / 128
