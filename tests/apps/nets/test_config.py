"""A transformer's configuration fills in its size's numbers, and refuses what cannot be built."""

from dataclasses import replace

import pytest

import core
from apps.nets.config import SIZES, TransformerConfig


def test_a_field_left_at_none_takes_the_sizes_value():
    assert TransformerConfig().shape == (4, 4, 128, 256, 4, 4, 32)  # heads of 128 / 4
    assert TransformerConfig("base").shape == (6, 6, 512, 2048, 8, 8, 64)
    assert TransformerConfig("big").shape == (6, 6, 1024, 4096, 16, 16, 64)
    shape = TransformerConfig("base", dim=256, decoder_layers=1, num_kv_heads=2).shape
    assert shape == (6, 1, 256, 2048, 8, 2, 32)
    assert shape.group == 4  # 8 query heads on 2 of keys and values
    # A copy of another size is that size: nothing was filled in for good.
    assert replace(TransformerConfig(), size="base").shape == TransformerConfig("base").shape


def test_every_size_is_a_configuration_and_a_dense_ffn_is_its_own():
    for size in SIZES:
        assert TransformerConfig(size).shape.dim == SIZES[size].dim
    gated = TransformerConfig(hidden_dim=8, gated=True, activation="silu", bias=False, dropout=0.0)
    assert gated.dense_ffn == core.DenseFFN(8, "silu", gated=True, bias=False)


def test_heads_may_be_of_any_width():
    config = TransformerConfig(dim=10, num_heads=4, head_dim=3)
    assert config.shape.head_dim == 3
    assert config.score_scale == 3**-0.5
    assert replace(config, attention_scale=1.0).score_scale == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=128 is not divisible by num_heads=3: set head_dim"),
        ({"num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"dim": 15, "num_heads": 3}, "dim=15 must be even and at least 4 for positions='sinusoidal'"),
        ({"dim": 15, "num_heads": 3, "positions": "rotary"}, "head_dim=5 must be even for positions='rotary'"),
        ({"positions": "relative", "relative_buckets": 5}, "relative_buckets=5 must be even and at least 4"),
        (
            {"positions": "relative", "relative_max_distance": 16},
            "relative_max_distance=16 must exceed half of relative_buckets=32",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError) as error:
        TransformerConfig(**options)
    assert str(error.value) == message
