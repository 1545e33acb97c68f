"""Gates by domain and personal columns (EPNet, PPNet), and the domain's part of the logits (STAR)."""

import pytest
import torch
from made_table import batch, features
from refusals import refused
from torch.testing import assert_close

import core
from apps.recsys.tables.columns.bottoms import SharedBottom, SingleTask
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.columns.personal import EmbeddingGate, TowerGates
from apps.recsys.tables.model import MultiTaskModel
from apps.recsys.tables.tasks import HeadConfig
from apps.train.optim.optimizers import parameter_groups
from apps.train.step.module import OptimizerConfig

BOTTOM = SharedBottom(expert=core.MLP((6,)))
PEPNET = {"head": HeadConfig(hidden_dims=(5, 4), personal=("city",), gate_dim=7), "gate_embeddings": 3}


def build(shared=BOTTOM, num_domains=3, move=True, **options):
    torch.manual_seed(0)
    embedding = EmbeddingConfig(dim=4, init_std=1.0)
    model = MultiTaskModel(features(num_domains=num_domains), shared, embedding, **options)
    with torch.no_grad():
        for parameter in model.parameters() if move else ():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def two_layers(layers, x):
    return (x @ layers.first.weight.T + layers.first.bias).relu() @ layers.last.weight.T + layers.last.bias


def test_columns_are_scaled_by_the_domain_and_have_no_gradient_through_their_gate():
    torch.manual_seed(0)
    gate = EmbeddingGate(2, 5, 3)
    torch.nn.init.normal_(gate.layers.last.weight)
    domain, dense, sparse = torch.randn(4, 2), torch.randn(4, 2), torch.randn(4, 3)
    scale = 2 * two_layers(gate.layers, torch.cat((domain, dense, sparse), 1)).sigmoid()
    scaled = gate(domain, (dense, sparse))
    assert_close(torch.cat(scaled, 1), torch.cat((dense, sparse), 1) * scale)
    assert gate(domain, (None, torch.cat((dense, sparse), 1)))[0] is None
    torch.manual_seed(0)
    gate = EmbeddingGate(2, 3, 3)
    torch.nn.init.normal_(gate.layers.last.weight)
    domain, sparse = torch.randn(4, 2), torch.randn(4, 3, requires_grad=True)
    (scaled,) = gate(domain, (sparse,))
    scaled.sum().backward()
    assert_close(sparse.grad, (scaled / sparse).detach())  # the gate itself


@pytest.mark.parametrize("hidden_dims", [(5, 4), ()])
@pytest.mark.parametrize("kind", ["plain", "aitm"])
def test_each_layer_of_a_tower_has_a_scaled_input(hidden_dims, kind):
    torch.manual_seed(0)
    head = HeadConfig(kind, hidden_dims=hidden_dims, personal=("user",), activation="silu").build(3, 2)
    gates = TowerGates(4, 7, head.widths(3), 2)
    for layers in gates.layers:
        torch.nn.init.normal_(layers.last.weight)
    x_tBD, prior = torch.randn(2, 6, 3), torch.randn(6, 4)
    z = head(x_tBD, gates(prior))
    for k in (0,) if kind == "aitm" else (0, 1):  # AITM's first task reads its own input alone
        h = x_tBD[k]
        for i, layers in enumerate(gates.layers):
            width = h.shape[1]
            h = h * (2 * two_layers(layers, prior).sigmoid())[:, k * width : (k + 1) * width]
            if i < len(hidden_dims):
                tower = head.towers[i]
                h = torch.nn.functional.silu(h @ tower.w_0[k] + tower.b_0[k])
        assert_close(z[:, k], (h @ head.weight[k] + head.bias[k]).squeeze(-1))


def test_a_network_with_gates_starts_as_one_without():
    gated, plain = build(move=False, **PEPNET), build(move=False, head=HeadConfig(hidden_dims=(5, 4)))
    state = gated.state_dict()
    for name in plain.state_dict():
        if name.startswith("head.towers"):  # a network a layer, each with one
            kind, i = name.rpartition(".")[2].split("_")
            plain.state_dict()[name].copy_(state[f"head.towers.{i}.{kind}_0"])
        else:
            plain.state_dict()[name].copy_(state[name])
    assert_close(gated(batch(num_domains=3)), plain(batch(num_domains=3)))


@pytest.mark.parametrize("head", [{"personal": ("film.tags", "city")}, {"domain_dim": 5}, {}], ids=str)
@pytest.mark.parametrize("gate_embeddings", [0, 3])
def test_domains_and_personal_columns_reach_the_logits(head, gate_embeddings):
    model = build(head=HeadConfig(**head), gate_embeddings=gate_embeddings)
    rows = batch(num_domains=3)
    z = model(rows)
    z.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    object.__setattr__(rows, "domain_B", (rows.domain_B + 1) % 3)
    assert torch.equal(model(rows), z) == (not head and not gate_embeddings)


def test_vectors_and_factors_of_domains_do_not_decay():
    model = build(core.STAR(expert=core.MLP((4,))), gate_embeddings=3)
    groups = parameter_groups(model, OptimizerConfig(weight_decay=0.1))
    ids = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    decayed = {name for name, p in model.named_parameters() if id(p) in ids}
    assert "shared.experts.centre.w_0" in decayed
    assert "embedding_gate.layers.first.weight" in decayed
    assert not decayed & {"domain.weight", "shared.experts.w_0", "shared.norm.domain_weight", "sparse.weight"}


def test_personal_columns_are_read_where_they_stand_and_a_domain_s_logits_are_added_to_the_steps():
    # Embeddings of 4 numbers, city before tags: the places of tags come first where they are named first.
    model = build(head=HeadConfig(personal=("film.tags", "city")))
    assert model._personal_P.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    model = build(num_domains=0, head=HeadConfig(personal=("city",)))
    assert model.domain is None
    assert model(batch()).shape == (6, 2)
    # A purchase stays below a click: the shift is of a step given the one before.
    model = build(head=HeadConfig("esmm", domain_dim=4))
    torch.nn.init.constant_(model.domain_logits.last.bias, 50.0)
    p_Bt = model(batch(num_domains=3)).double().sigmoid()
    assert (p_Bt > 0.9999).all()
    assert (p_Bt[:, 1] <= p_Bt[:, 0]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"gate_embeddings": -1}, "gate_embeddings=-1 is negative"),
     ({"gate_embeddings": 4, "num_domains": 0}, r"gate_embeddings=4 goes by the domain, and .* table\.domain"),
     ({"head": HeadConfig(domain_dim=4), "num_domains": 0}, r"head\.domain_dim=4 goes by the domain"),
     ({"head": HeadConfig(personal=("town",))}, r"head\.personal names 'town', which has no embedding; .* city"),
     ({"shared": SingleTask(), **PEPNET}, "gate_embeddings=3 joins tasks that SingleTask keeps apart")],
)  # fmt: skip
def test_gates_without_a_ground_are_refused(options, message):
    refused(message, lambda: build(**options))
