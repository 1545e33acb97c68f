"""`moesaic compare --routers` on multi-gate layers: a router for each task's gate, or a line that says why not."""

import pytest
import torch
from made_table import batch, features

import core
from apps.compare.systems import find_systems
from apps.equal_cost import routers
from apps.recsys.tables.columns.bottoms import SharedBottom
from apps.recsys.tables.module import MultiTaskRecommender

DOMAINS = 8  # as configs/routing/domain.yaml
OTHER_IDS = {
    "domain_random": "needs context.token_ids_BS, which MultiTaskRecommender does not give",
    "nllb": "num_domain_experts, num_experts, router, selection, self_gate",  # which has no capacity_factor
    "hash_gates": "needs context.token_ids_BS, which MultiTaskRecommender does not give",
    "hash": "needs context.token_ids_BS, which MultiTaskRecommender does not give",
    "hash_balanced": "needs context.token_ids_BS, which MultiTaskRecommender does not give",
    "stable": "needs context.token_ids_BS, which MultiTaskRecommender does not give",
    "task": "needs context.task_ids_B, which MultiTaskRecommender does not give",
    **{
        name: f"router {source} chooses no experts for an example, it mixes: not for MMoE"
        for name, source in {
            "lory": "Merge(kind='lory') (arXiv 2405.03133)",
            "mixture_of_tokens": "MixtureOfTokens (arXiv 2310.15961)",
            "meo": "Merge(kind='meo') (arXiv 2310.09832)",
            "smear": "Merge(kind='smear') (arXiv 2306.03745)",
            "soft_slots": "SoftSlots (arXiv 2308.00951)",
        }.items()
    },
}


def build(shared, num_domains=DOMAINS, **options):
    torch.manual_seed(0)
    return MultiTaskRecommender(features(num_domains=num_domains), shared, report=None, **options)


def test_the_rest_of_the_model_stays_and_experts_make_the_layer_cost_the_same():
    module = build(core.MMoE(8, core.MLP((16, 8)), backend="eager"), num_domains=0)
    D = module.input_dim
    made = routers.Variant(module.comparison, "switch").config()
    # Dense: 8 experts of 2 (16 D + 16 * 8), and 16 gates that each are a product of D and weight 8 numbers.
    dense = 8 * 2 * (16 * D + 16 * 8) + 2 * 16 * (D + 8)
    assert module.shared_config.flops_per_token(D, 2) == dense
    # Top-1 of two tasks: 8 (1 - (7/8)^2) = 1.875 experts of 2 (F D + F * F/2), and 2 * 8 gates of D; both layers are
    # wider by one factor.
    F = made.expert.hidden_dims[0]
    assert made.expert.hidden_dims == (F, round(F / 2))
    sparse = round(1.875 * 2 * (F * D + F * round(F / 2))) + 2 * 16 * D
    assert made.flops_per_token(D, 2) == sparse == pytest.approx(dense, rel=0.02)
    assert (made.num_experts, made.backend, made.selection) == (8, "eager", "task")
    # The rest of the layer and of the model stay.
    shared = core.MMoE(
        8,
        core.MLP((16,)),
        router=core.TokenChoice(4),
        selection="shared",
        expert_dropout=0.1,
        balance=core.Balance(load_balancing_loss=0.5, importance=0.1),
    )
    twin = routers.Variant(build(shared, num_members=2).comparison, "v_moe")()
    made = twin.shared_config
    assert (twin.num_members, made.selection, made.expert_dropout) == (2, "shared", 0.1)
    assert made.router == core.TokenChoice(2, normalize=False, noise="fixed")
    # The overlay's weights, not the model's: those of another router mean nothing here.
    assert made.balance == core.Balance(importance=0.005, load=0.005, load_balancing_loss=0.0, router_z_loss=0.0)


@pytest.mark.parametrize("name", routers.overlays())
def test_every_router_trains_or_says_why_not(name):
    module, rows = build(core.MMoE(8, core.MLP((8,)))), batch(24, num_domains=DOMAINS)
    variant = routers.variants(module.comparison, [name])[f"router_{name}"]
    if name in OTHER_IDS:
        assert variant.build is None
        assert variant.note.endswith(OTHER_IDS[name])
        return
    twin = variant.build()
    with core.record(twin) as tape:
        loss = twin.task_loss(rows).loss
    (loss + core.aux_loss(tape)).backward()
    assert list(core.RoutingStats.from_tape(tape).layers) == ["model.shared.task0", "model.shared.task1"]
    unused = [n for n, p in twin.model.shared.named_parameters() if p.grad is None]
    # What a domain adds to the router's input means nothing to a table of domains, or to chance.
    assert unused == (["router.domain.weight"] if name in ("domain", "random") else [])
    twin.eval()
    assert torch.equal(twin(rows), twin(rows))


def refusal(module, *names):
    rows = batch(24, num_domains=module.features.num_domains)
    with pytest.raises(ValueError, match="nothing to compare with") as error:
        find_systems(module, rows, wanted=[], router_names=names)
    return str(error.value).partition(": ")[2]


def test_a_bottom_and_a_router_that_lacks_something_are_said_in_a_line():
    dense = core.MMoE(8, core.MLP((8,)))
    assert refusal(build(dense, num_domains=0), "domain") == (
        "router_domain: Domain needs context.domain_ids_B or domain_weights_BE in training: both are None"
    )
    assert refusal(build(core.MMoE(8, core.MLP((8,)), self_gate=1)), "top2", "hash") == (
        "router_top2: self_gate=1 does not apply with a router; router_hash: self_gate=1 does not apply with a router"
    )
    assert refusal(build(core.MMoE(3, core.MLP((8,)))), "hierarchical") == (
        "router_hierarchical: num_groups=4 does not divide num_experts=3; Hierarchical (arXiv 1701.06538)"
    )
    with pytest.raises(ValueError, match=r"^--routers hash: MultiTaskRecommender has no layer to put it into$"):
        routers.variants(build(SharedBottom()).comparison, ["hash"])


@pytest.mark.parametrize(
    "shared", [core.OMoE(4), core.CGC(2), core.PLE(2), core.SMES(4)], ids=lambda s: type(s).__name__
)
def test_gates_that_no_router_replaces_are_refused(shared):
    with pytest.raises(ValueError, match=rf"^--routers top2: {type(shared).__name__} takes no router in place of its"):
        routers.variants(build(shared).comparison, ["top2", "hash"])
    assert routers.variants(build(shared).comparison, []) == {}
