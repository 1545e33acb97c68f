"""A transformer's configuration fills in its size's numbers, and what cannot be built or put in a place is refused."""

from dataclasses import replace

import pytest
import torch

import core
from apps.nets.config import SIZES, TransformerConfig
from apps.nets.place import Place, check_fits, check_layers, misfit


def test_a_field_left_at_none_takes_the_sizes_value_and_heads_may_be_of_any_width():
    assert TransformerConfig().shape == (4, 4, 128, 256, 4, 4, 32)  # heads of 128 / 4
    assert TransformerConfig("base").shape == (6, 6, 512, 2048, 8, 8, 64)
    assert TransformerConfig("big").shape == (6, 6, 1024, 4096, 16, 16, 64)
    shape = TransformerConfig("base", dim=256, decoder_layers=1, num_kv_heads=2).shape
    assert shape == (6, 1, 256, 2048, 8, 2, 32)
    assert shape.group == 4  # 8 query heads on 2 of keys and values
    # A copy of another size is that size: nothing was filled in for good.
    assert replace(TransformerConfig(), size="base").shape == TransformerConfig("base").shape
    for size in SIZES:
        assert TransformerConfig(size).shape.dim == SIZES[size].dim
    gated = TransformerConfig(hidden_dim=8, gated=True, activation="silu", bias=False, dropout=0.0)
    assert gated.dense_ffn == core.DenseFFN(8, "silu", gated=True, bias=False)
    config = TransformerConfig(dim=10, num_heads=4, head_dim=3)
    assert config.shape.head_dim == 3
    assert config.score_scale == 3**-0.5
    assert replace(config, attention_scale=1.0).score_scale == 1.0


NEAR = "relative_max_distance=16 must exceed half of relative_buckets=32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=128 is not divisible by num_heads=3: set head_dim"),
        ({"num_kv_heads": 3}, "num_heads=4 is not divisible by num_kv_heads=3"),
        ({"dim": 15, "num_heads": 3}, "dim=15 must be even and at least 4 for positions='sinusoidal'"),
        ({"dim": 15, "num_heads": 3, "positions": "rotary"}, "head_dim=5 must be even for positions='rotary'"),
        ({"positions": "relative", "relative_buckets": 5}, "relative_buckets=5 must be even and at least 4"),
        ({"positions": "relative", "relative_max_distance": 16}, NEAR),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError) as error:
        TransformerConfig(**options)
    assert str(error.value) == message


PAIRS = "the pairs en-de, de-en"
ACAUSAL = "ExpertChoice.* lets later tokens change earlier ones: not for a causal decoder"
NO_STEPS = "ExpertChoice.* cannot decode step by step: .*; take another router for the decoder"
OF_TASKS = f"Task.* has num_tasks=3, which does not fit {PAIRS}: they have 2"
OF_DOMAINS = "Domain.* has num_domains=2, which does not fit the data: they have 3"


@pytest.mark.parametrize(
    "place, router, message",
    [
        (Place("Net", is_causal=True), core.ExpertChoice(), ACAUSAL),
        (Place("Net", ()), core.Hash(8), "Hash.* needs context.token_ids_BS, which Net does not give"),
        (Place("Net", decodes_stepwise=True), core.ExpertChoice(), NO_STEPS),
        (Place("Net", num_tasks=2, data=PAIRS), core.Task(num_tasks=3), OF_TASKS),
        (Place("Net", num_domains=3), core.Domain(num_domains=2), OF_DOMAINS),
    ],
    ids=["causal", "context", "steps", "tasks", "domains"],
)
def test_each_rule_says_what_it_refuses(place, router, message):
    with pytest.raises(ValueError, match=f"router {message}"):
        check_fits(place, router)
    assert misfit(Place("Net"), router) is None  # what is not known of a place refuses nothing


def test_balance_losses_and_layers_that_ask_in_training_alone_need_their_context_too():
    balance = core.Balance(mutual_information=0.1, num_tasks=2)
    assert misfit(Place("Net", ("task_ids_B",)), core.TokenChoice(), balance) is None
    problem = misfit(Place("Net", ()), core.TokenChoice(), balance)
    assert problem == "moe.balance needs context.task_ids_B, which Net does not give"
    tasks = misfit(Place("Net", num_tasks=3), core.TokenChoice(), balance)
    assert tasks == "moe.balance has num_tasks=2, which does not fit the data: they have 3"
    localized = core.Balance(localized=0.1, expert_types=(0, 1))
    types = misfit(Place("Net", num_tasks=3), core.TokenChoice(), localized)
    assert types == "moe.balance has expert_types of 2 tasks, which does not fit the data: they have 3"
    assert misfit(Place("Net", num_tasks=2), core.TokenChoice(), localized) is None
    # Domain's config needs nothing: in evaluation it mixes all experts where the domain is not known.
    model = torch.nn.Sequential(core.MoEConfig(2, core.Domain(num_domains=2)).build(4))
    with pytest.raises(ValueError, match=r"Domain needs context.domain_ids_B or domain_weights_BE in training"):
        check_layers(Place("Net", ("token_ids_BS",)), model)
    check_layers(Place("Net", ("domain_ids_B",)), model)
