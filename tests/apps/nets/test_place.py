"""Every reason for which a router does not fit where it is put."""

import pytest
import torch

import core
from apps.nets.place import Place, check_fits, check_layers, misfit


@pytest.mark.parametrize(
    "place, router, message",
    [
        (
            Place("Net", is_causal=True),
            core.ExpertChoice(),
            r"router ExpertChoice.* lets later tokens change earlier ones: not for a causal decoder",
        ),
        (Place("Net", ()), core.Hash(8), r"router Hash.* needs context.token_ids_BS, which Net does not give"),
        (
            Place("Net", decodes_stepwise=True),
            core.ExpertChoice(),
            r"router ExpertChoice.* cannot decode step by step: .*; take another router for the decoder",
        ),
        (
            Place("Net", num_tasks=2, data="the pairs en-de, de-en"),
            core.Task(num_tasks=3),
            r"router Task.* has num_tasks=3, which does not fit the pairs en-de, de-en: they have 2",
        ),
        (
            Place("Net", num_domains=3),
            core.Domain(num_domains=2),
            r"router Domain.* has num_domains=2, which does not fit the data: they have 3",
        ),
    ],
    ids=["causal", "context", "steps", "tasks", "domains"],
)
def test_each_rule_says_what_it_refuses(place, router, message):
    with pytest.raises(ValueError, match=message):
        check_fits(place, router)


def test_balance_losses_need_their_context_too():
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


def test_what_is_not_known_of_a_place_refuses_nothing():
    for router in (core.ExpertChoice(), core.Hash(8), core.Task(num_tasks=3)):
        assert misfit(Place("Net"), router) is None


def test_layers_that_ask_in_training_alone_are_asked_themselves():
    # Domain's config needs nothing: in evaluation it mixes all experts where the domain is not known.
    model = torch.nn.Sequential(core.MoEConfig(2, core.Domain(num_domains=2)).build(4))
    with pytest.raises(ValueError, match=r"Domain needs context.domain_ids_B or domain_weights_BE in training"):
        check_layers(Place("Net", ("token_ids_BS",)), model)
    check_layers(Place("Net", ("domain_ids_B",)), model)
