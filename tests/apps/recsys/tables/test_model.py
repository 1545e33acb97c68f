"""The table recommender's network: interactions, single-task models, ensembles."""

import dataclasses
import math

import pytest
import torch
from made_table import batch, features, ragged
from refusals import refused
from torch.testing import assert_close

import core
from apps.recsys.encoding.features import CategoricalFeature, Features, Target
from apps.recsys.kinds import Outputs
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.model import Ensemble, InteractionArch, InteractionConfig, MultiTaskModel, SharedMembers
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.tasks import HeadConfig

BOTTOM = SharedBottom(expert=core.MLP((6,)))
WIDER = Features((*features().categorical, CategoricalFeature("shop", 3)), features().continuous, ("click", "buy"))


def build(shared=BOTTOM, of=None, **options):
    torch.manual_seed(0)
    return MultiTaskModel(of or features(), shared, **{"embedding": EmbeddingConfig(dim=4, init_std=1.0), **options})


def test_concat_and_dot_by_hand():
    arch = InteractionArch(InteractionConfig(), 2, (3,))
    assert arch(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    # Numbers (2, 3) projected by the identity. With e1 = (1, 1) and e2 = (-1, 2):
    # x.e1 = 5, x.e2 = 4, e1.e2 = 1.
    arch = InteractionArch(InteractionConfig("dot"), 2, (2, 2))
    with torch.no_grad():
        arch.project.weight.copy_(torch.eye(2))
        arch.project.bias.zero_()
    y_BD = arch(torch.tensor([[2.0, 3.0]]), torch.tensor([[1.0, 1.0, -1.0, 2.0]]))
    assert (y_BD.tolist(), arch.out_dim) == ([[2.0, 3.0, 5.0, 4.0, 1.0]], 5)
    # Without numbers the first column's embedding stands in their place.
    arch = InteractionArch(InteractionConfig("dot"), 0, (2, 2))
    assert (arch(None, torch.tensor([[1.0, 1.0, -1.0, 2.0]])).tolist(), arch.out_dim) == ([[1.0, 1.0, 1.0]], 3)


def test_the_path_of_an_example():
    # Columns of one number each. Age (60 - 40) / 10 = 2 and indicator 0; flat 0; city row: 5; tags 1 and 3: mean 7.
    # The bottom adds them: 2 + 0 + 0 + 5 + 7 = 14. Logits 14 * 1 and 14 * -1.
    bottom = SharedBottom(expert=core.MLP((1,)))
    model = build(bottom, embedding=EmbeddingConfig(dim=1), head=HeadConfig(hidden_dims=()))
    with torch.no_grad():
        tables = model.sparse.tables()
        tables["city"][2], tables["film.tags"][1], tables["film.tags"][3] = 5.0, 4.0, 10.0
        model.shared.experts.w_0.fill_(1.0)
        model.shared.experts.b_0.zero_()
        model.head.weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1))
        model.head.bias.zero_()
    age, zeros, place = torch.tensor([[60.0, 3.0]]), torch.zeros(1, 2), torch.tensor([0])
    row = TableBatch(age, torch.tensor([[2]]), zeros, place, lists=ragged([[1, 3]]))
    assert model(row).tolist() == [[14.0, -14.0]]


SHARED = [
    core.MMoE(3, core.MLP((4,))),
    core.OMoE(3, core.MLP((4,))),
    core.CGC(2, core.MLP((4,)), num_task_experts=1),
    core.PLE(2, core.MLP((4,)), num_task_experts=1),
    core.HoME(2, core.MLP((4,)), categories=(0, 1)),
    core.MMoE(8, core.MLP((4,)), router=core.TokenChoice(top_k=2)),
    core.SMES(8, core.MLP((4,)), 2, 1),
    core.RankMixer(num_tokens=2, token_dim=4),
    BOTTOM,
    SingleTask(expert=core.MLP((6, 5))),
]


@pytest.mark.parametrize("shared", SHARED, ids=lambda s: f"{type(s).__name__}-{getattr(s, 'router', None) is not None}")
def test_every_layer_trains_on_every_kind_of_columns(shared):
    kind = ("normalize", "quantile", "piecewise_linear")[SHARED.index(shared) % 3]
    model = build(shared, dense=DenseConfig(kind))
    z_Bt = model(batch())
    assert z_Bt.shape == (6, 2)
    assert z_Bt.isfinite().all()  # the batch has a missing and an infinite age
    z_Bt.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("interaction", "dense", "kind"),
    [("concat", DenseConfig(), "joined"), ("dot", DenseConfig("quantile"), "joined"),
     ("cross", DenseConfig("piecewise_linear", dim=2), "joined"), ("concat", DenseConfig("quantile"), "collection"),
     ("dot", DenseConfig("piecewise_linear", dim=2), "collection"), ("cross", DenseConfig(), "collection")],
)  # fmt: skip
def test_single_task_models_share_nothing(interaction, dense, kind):
    options = {"interaction": InteractionConfig(interaction), "dense": dense, "embedding": EmbeddingConfig(kind, dim=4)}
    model, rows = build(SingleTask(expert=core.MLP((6,))), **options), batch()
    model(rows)[:, 0].sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    model(rows)[:, 1].sum().backward()
    for name, p in model.named_parameters():
        assert gradients[name] is None or p.grad is None or not (gradients[name] * p.grad).any(), name
    for part in ("sparse.", "shared.", "head."):
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.startswith(part))


def test_single_task_models_equal_models_alone():
    # Task 1's part of every weight, in a model of that task alone.
    both = build(SingleTask(expert=core.MLP((6,))))
    alone = build(of=Features(*(getattr(features(), n) for n in ("categorical", "continuous")), ("buy",), (0.2,)))
    with torch.no_grad():
        alone.sparse.weight.copy_(both.sparse.weight[:, 4:])
        for name in ("w_0", "b_0"):
            getattr(alone.shared.experts, name).copy_(getattr(both.shared.experts, name)[1:])
            getattr(alone.head.towers, name).copy_(getattr(both.head.towers, name)[1:])
        alone.head.weight.copy_(both.head.weight[1:])
        alone.head.bias.copy_(both.head.bias[1:])
    assert_close(alone(batch())[:, 0], both(batch())[:, 1])


def test_domains_reach_the_gates():
    shared = core.MMoE(2, core.MLP((4,)), num_domain_experts=1)
    model = build(shared, of=features(num_domains=3)).eval()
    rows = batch(num_domains=3)
    moved = dataclasses.replace(rows, domain_B=(rows.domain_B + 1) % 3)
    assert (model(rows) != model(moved)).all(dim=1).all()
    refused("the model knows 3 domains, and the batch has no domain_B", lambda: model(batch()))


@pytest.mark.parametrize(
    "shared", [core.M3oE(2, core.MLP((4,))), core.STAR(expert=core.MLP((4,)))], ids=["M3oE", "STAR"]
)
def test_layers_of_domains_train_and_need_domains(shared):
    model, rows = build(shared, of=features(num_domains=3)), batch(num_domains=3)
    model(rows).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    refused(f"{type(shared).__name__} needs num_domains, which is 0", lambda: build(shared))


def test_one_kind_of_columns_and_one_row_are_enough_and_dropout_is_of_training_alone():
    numbers = Features((), features().continuous, ("click", "buy"))
    rows = batch()
    only_numbers = dataclasses.replace(rows, single_FB=rows.single_FB[:0], lists=())
    for kind in ("normalize", "quantile"):
        assert build(of=numbers, dense=DenseConfig(kind))(only_numbers).isfinite().all()
    categories = Features(features().categorical, (), ("click", "buy"))
    only_categories = dataclasses.replace(rows, dense_BC=rows.dense_BC[:, :0])
    for interaction in ("concat", "dot"):
        model = build(of=categories, interaction=InteractionConfig(interaction))
        assert model(only_categories).isfinite().all()
    # A batch of one is a batch.
    for shared in (core.MMoE(3, core.MLP((4,), norm="batch")), SingleTask(expert=core.MLP((4,)))):
        model = build(shared, head=HeadConfig(norm="batch"))
        assert model(batch(1)).shape == (1, 2)
        model(batch(1)).sum().backward()
    # Dropout is of training alone.
    model = build(dropout=0.5)
    assert not torch.equal(model(batch()), model(batch()))
    assert torch.equal(model.eval()(batch()), model(batch()))


def test_ensembles_mean_probabilities_and_share_nothing():
    # (0.2 + 0.6) / 2 = 0.4. Both sure: the mean is as sure as they are.
    z = torch.tensor([math.log(0.2 / 0.8), math.log(0.6 / 0.4)]).view(2, 1, 1)
    mean_logit = Outputs((Target(),)).mean
    assert_close(mean_logit(z).sigmoid(), torch.tensor([[0.4]]))
    assert_close(mean_logit(torch.tensor([[[60.0]], [[60.0]]])), torch.tensor([[60.0]]))
    assert_close(mean_logit(torch.tensor([[[-200.0]], [[-200.0]]])), torch.tensor([[-200.0]]))
    ensemble = Ensemble([MultiTaskModel(features(), BOTTOM) for _ in range(2)])
    z_MBt = ensemble(batch())
    assert z_MBt.shape == (2, 6, 2)
    z_MBt[0].sum().backward()
    assert ensemble.members[0].sparse.weight.grad.any()
    assert not any(p.grad.any() for p in ensemble.members[1].parameters())
    starts = zip(ensemble.members[0].parameters(), ensemble.members[1].parameters(), strict=True)
    assert any((a != b).any() for a, b in starts)


@pytest.mark.parametrize("kind", [SharedBottom, SingleTask])
@pytest.mark.parametrize("expert", [core.MLP((6, 5), norm="layer"), core.FFN(7)], ids=["MLP", "FFN"])
def test_a_bottoms_costs_are_counted(kind, expert):
    config = kind(expert=expert)
    layer = config.build(8, 2)
    assert sum(p.numel() for p in layer.parameters()) == config.num_params(8, 2) == config.active_params(8, 2)
    x = torch.randn(3, 8) if kind is SharedBottom else torch.randn(2, 3, 8)
    assert layer(x).shape == (2, 3, config.out_dim(8))
    assert core.count_flops(layer, x) == 3 * config.flops_per_token(8, 2)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: InteractionConfig("dot", low_rank=2), "low_rank=2 needs kind='cross'"),
        (lambda: InteractionArch(InteractionConfig("dot"), 2, (2, 3)), "one width; there is 2, 3"),
        (lambda: InteractionArch(InteractionConfig("dot"), 2, ()), "one width; there is none"),
        (lambda: build()(dataclasses.replace(batch(), dense_BC=batch().dense_BC[:, :1])), "1 contin.*, the model 2"),
        (lambda: build(of=WIDER)(batch()), "1 columns of one value and 1 of several, the model 2 and 1"),
        (
            lambda: SharedBottom(2),
            "num_experts=2: SharedBottom has one network.*over another layer's configuration set "
            r"--model\.shared\.init_args\.num_experts 1",
        ),
        (lambda: SingleTask(expert_dropout=0.1), "expert_dropout=0.1 has no meaning for SingleTask"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(make, match):
    refused(match, make)


def members(shared=BOTTOM, **options):
    torch.manual_seed(0)
    return SharedMembers(features(), shared, **{"num_members": 3, "head": HeadConfig(hidden_dims=(5,)), **options})


def test_members_that_share_weights_are_networks_by_themselves():
    together, of = members(), batch(6)
    with torch.no_grad():
        for p in together.shared.parameters():
            p.add_(torch.randn_like(p) / 4)
    z_MBZ = together(of)
    assert z_MBZ.shape == (3, 6, 2)
    x_BD = together.join(*together.read(of))
    for m, z_BZ in enumerate(z_MBZ):
        # One network of the member's own numbers: r scales the rows of w, s its columns.
        own, w = together.shared, together.shared.common["w_0"][0]
        h_BH = torch.relu(x_BD @ (own.r_0[m][:, None] * w * own.s_0[m]) + own.b_0[m])
        for k in range(2):  # tasks
            tower, place = together.head.towers, 2 * m + k
            t_BH = torch.relu(h_BH @ tower.w_0[place] + tower.b_0[place])
            assert_close(z_BZ[:, k], (t_BH @ together.head.weight[place] + together.head.bias[place])[:, 0])


def test_members_share_a_bottom_and_a_plain_head_only():
    refused("share_members=True needs a SharedBottom of an MLP without norms, not MMoE", members, shared=core.MMoE())
    refused("share_members=True needs head.kind='plain'", members, head=HeadConfig(kind="esmm"))
