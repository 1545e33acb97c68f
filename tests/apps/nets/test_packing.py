"""Real tokens have their places when padding is taken out."""

import torch

from apps.nets.packing import Packing


def test_packing_by_hand():
    packing, index_T = Packing.of(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool())
    assert index_T.tolist() == [1, 3, 8, 9, 10]
    assert packing.length == 3
    assert packing.position_T.tolist() == [0, 1, 0, 1, 2]
    assert packing.slot_T.tolist() == [0, 1, 6, 7, 8]
    assert packing.last_B.tolist() == [1, -1, 4]
    padded = packing.pad(torch.arange(1, 6)[:, None])
    assert padded.squeeze(-1).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    assert packing.pack(padded).flatten().tolist() == [1, 2, 3, 4, 5]
    assert packing.valid_BL().tolist() == [[True, True, False], [False] * 3, [True] * 3]


def test_on_the_meta_device_all_tokens_are_real():
    packing, index_T = Packing.of(torch.ones(2, 3, dtype=torch.bool, device="meta"))
    assert packing.is_full
    assert (packing.num_rows, packing.length, len(index_T)) == (2, 3, 6)
