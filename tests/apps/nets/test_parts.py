"""The small parts of a network, by hand: positions, norms, and the places of real tokens without padding."""

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from apps.nets.config import TransformerConfig
from apps.nets.norms import RMSNorm, build_norm
from apps.nets.packing import Packing
from apps.nets.positions import (
    Learned,
    RelativeBias,
    Sinusoidal,
    added_positions,
    relative_buckets,
    rotate,
    rotations,
    sinusoids,
)


def config(**options):
    return TransformerConfig(**{"dim": 4, "num_heads": 2, "max_length": 5, **options})


def test_positions_are_sines_and_cosines_beyond_any_table_or_learned_rows_of_one():
    # D = 4: the frequencies 10000^0 = 1 and 10000^-1.
    sin, cos = math.sin, math.cos
    expected = [[0.0, 0.0, 1.0, 1.0], [sin(1), sin(1e-4), cos(1), cos(1e-4)], [sin(2), sin(2e-4), cos(2), cos(2e-4)]]
    assert_close(sinusoids(3, 4), torch.tensor(expected))
    assert_close(sinusoids(3, 8, start=5), sinusoids(8, 8)[5:], rtol=0, atol=0)
    table = Sinusoidal(config(position_offset=2))
    assert len(table.table) == 7  # 5 positions from row 2 on
    assert_close(table(0, 3), sinusoids(5, 4)[2:])
    assert_close(table(4, 6), sinusoids(12, 4)[6:])  # positions 4 to 9 are rows 6 to 11
    assert table.double()(4, 6).dtype == torch.float64
    assert not table.state_dict()
    table = Learned(config(position_offset=2))
    assert table.weight.shape == (7, 4)
    torch.nn.init.normal_(table.weight)
    assert torch.equal(table(1, 4), table.weight[3:])
    with pytest.raises(ValueError, match="a sequence of 6 tokens is longer than max_length=5"):
        table(1, 5)
    kinds = {"sinusoidal": Sinusoidal, "learned": Learned}  # what is added to the embeddings
    for positions in ("sinusoidal", "learned", "rotary", "relative", "none"):
        assert type(added_positions(config(positions=positions))) is kinds.get(positions, type(None))


def test_a_rotation_turns_each_pair_by_its_own_exact_angle_and_products_depend_on_the_distance():
    # d = 4, base 16: the pairs (0, 2) and (1, 3) turn by p * 16^0 and p * 16^(-1/2) = p / 4.
    turns = rotations(3, 1, 4, 16.0, torch.zeros(1, dtype=torch.float64))
    x = torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    expected = [math.cos(3), math.cos(0.75), math.sin(3), math.sin(0.75)]
    assert_close(rotate(x.view(1, 1, 4), turns).flatten(), torch.tensor(expected, dtype=torch.float64))
    # In bfloat16 257 is 256: their angles, and so their cosines, would be equal.
    cos, _ = rotations(256, 2, 2, 10000.0, torch.zeros(1, dtype=torch.bfloat16))
    assert cos.dtype == torch.bfloat16
    assert_close(cos.flatten().float(), torch.tensor([math.cos(256), math.cos(257)]), atol=2e-3, rtol=0)
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 8, dtype=torch.float64)
    turns = rotations(0, 40, 8, 10000.0, q)

    def product(m, n):
        return (rotate(q, turns[:, m : m + 1]) * rotate(k, turns[:, n : n + 1])).sum(-1)

    assert_close(product(12, 7), product(5, 0))
    assert_close(product(12, 7), product(39, 34))
    assert (product(12, 7) - product(12, 8)).abs().max() > 1e-3
    assert_close(rotate(q, turns[:, 9:10]).norm(dim=-1), q.norm(dim=-1))


def test_buckets_and_their_biases_by_hand():
    # A decoder's 32 rows up to distance 128: one each for 0 to 15, then 16 + floor(16 ln(a / 16) / ln 8).
    # 17: 0.47, 20: 1.72, 32: 5.33, 64: 10.67, 127: 15.94, 128 and beyond: 16 or more, the last row. Later keys: row 0.
    distance = -torch.tensor([0, 1, 15, 16, 17, 20, 32, 64, 127, 128, 1000, -3])
    expected = [0, 1, 15, 16, 16, 17, 21, 26, 31, 31, 31, 0]
    assert relative_buckets(distance, 32, 128, causal=True).tolist() == expected
    # An encoder's 16 rows a direction: one each for 0 to 7, then 8 + floor(8 ln(a / 8) / ln 16): a power of two has a
    # whole part, 16: 2, 32: 4, 64: 6, 128: 8, one more than there is. Keys after the query are 16 rows on.
    distance = torch.tensor([0, -7, 7, -8, -16, 16, -32, -64, 64, -128, 128, 500])
    expected = [0, 7, 23, 8, 10, 26, 12, 14, 30, 15, 31, 31]
    assert relative_buckets(distance, 32, 128, causal=False).tolist() == expected
    # 4 rows up to distance 3. A decoder's: 0, 1, and 2 or more. An encoder's: 0, 1 or more before, 1 or more after.
    options = config(positions="relative", relative_buckets=4, relative_max_distance=3)
    decoder, encoder = RelativeBias(options, causal=True), RelativeBias(options, causal=False)
    for bias in (decoder, encoder):
        torch.nn.init.normal_(bias.weight)
    rows = torch.tensor([[0, 0, 0], [1, 0, 0], [2, 1, 0]])
    assert torch.equal(decoder(3), decoder.weight[rows].permute(2, 0, 1))
    assert torch.equal(decoder.last(3), decoder(3)[:, 2])
    rows = torch.tensor([[0, 3, 3], [1, 0, 3], [1, 1, 0]])
    assert torch.equal(encoder(3), encoder.weight[rows].permute(2, 0, 1))


@pytest.fixture
def norm() -> RMSNorm:
    norm = build_norm(TransformerConfig("nano", dim=16, norm="rms", norm_eps=0.01))
    assert isinstance(norm, RMSNorm)
    torch.manual_seed(0)
    torch.nn.init.normal_(norm.weight)
    return norm


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_a_steady_norm_is_the_same(norm, scale):
    x = scale * torch.randn(3, 2, 16)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * norm.weight
    assert_close(norm(x), expected)
    with torch.no_grad(), norm.steady():
        assert_close(norm(x), expected)


def test_a_norm_is_steady_inside_the_block_alone(norm):
    x = torch.randn(2, 16)
    with torch.no_grad(), norm.steady():
        before = norm(x)
    with torch.no_grad():
        norm.weight.mul_(2.0)
    assert_close(norm(x), 2 * before)
    with torch.no_grad(), norm.steady():
        with norm.steady():
            twin = copy.deepcopy(norm)
        assert norm._scaled is not None
        twin.weight.mul_(2.0)
        assert_close(twin(x), 2 * norm(x))
    with norm.steady():  # with gradients, an optimizer may write to the weight
        norm(x).sum().backward()
    assert norm.weight.grad is not None


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
    expected, _ = Packing.of(torch.ones(2, 3, dtype=torch.bool))
    packing = Packing.full(2, 3, torch.device("cpu"))
    for name in ("slot_T", "position_T", "last_B"):
        assert torch.equal(getattr(packing, name), getattr(expected, name))
    assert (packing.is_full, packing.valid_BL()) == (True, None)
    # On the meta device all tokens are real.
    packing, index_T = Packing.of(torch.ones(2, 3, dtype=torch.bool, device="meta"))
    assert (packing.is_full, packing.num_rows, packing.length, len(index_T)) == (True, 2, 3, 6)


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
