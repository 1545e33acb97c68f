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


def test_a_program_keeps_padding_behind_the_real_tokens(monkeypatch):
    valid_BS = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    monkeypatch.setattr("torch.compiler.is_exporting", lambda: True)
    packing, index_T = Packing.of(valid_BS)
    # Row 0 has its real tokens 1 and 3 first, then 0 and 2.
    assert index_T.tolist() == [1, 3, 0, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert packing.slot_T.tolist() == list(range(12))
    assert packing.position_T.tolist() == [0, 1, 2, 3] * 3
    assert packing.last_B.tolist() == [1, -1, 10]
    assert packing.valid_BL().tolist() == [[True, True, False, False], [False] * 4, [True, True, True, False]]
    padded = packing.pad(torch.arange(1, 13)[:, None]).squeeze(-1)
    assert padded.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [9, 10, 11, 0]]
    assert packing.pack(padded[..., None]).shape == (12, 1)


def test_a_full_packing_is_that_of_rows_without_padding():
    expected, _ = Packing.of(torch.ones(2, 3, dtype=torch.bool))
    packing = Packing.full(2, 3, torch.device("cpu"))
    for name in ("slot_T", "position_T", "last_B"):
        assert torch.equal(getattr(packing, name), getattr(expected, name))
    assert packing.is_full
    assert packing.valid_BL() is None
