"""A diagnosis on two ranks against one process with the data of both, and faults that one rank alone would not see."""

import functools

import pytest
import torch
from patients import PAD, Patient, batches, whole_loss
from torch.testing import assert_close
from two_ranks import on_two_ranks

import core
from core.diagnose.figures import _SUMS, LayerFigures
from core.diagnose.passes import Pass
from core.diagnose.ranks import figures_of_ranks
from core.diagnose.rules import load_findings
from core.parallel import expert_mesh, experts_part, shard_data, shard_experts

TOP2 = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=16))
DIVISIONS = {"copies": (1, 1), "experts": (2, 1), "shards": (1, 2)}
"""Experts' ranks and shards of each division; "copies" are left as they are."""
doubled_loss = functools.partial(whole_loss, times=2)


def patient(**options):
    torch.manual_seed(0)
    return Patient(TOP2, **options)


def divided(net, name):
    experts, shards = DIVISIONS[name]
    mesh = expert_mesh(experts, shards)
    if experts > 1:
        shard_experts(net, experts_part(mesh))
    if name != "copies":
        shard_data(net, mesh)
    return net


def own_batches(rank, ids=None):
    """Three batches on rank 0, and one on rank 1."""
    ids = batches(4) if ids is None else ids
    return ids[:3] if rank == 0 else ids[3:]


def evidence(own, step_batch):
    """Return the sums of the passes, and what a step says, which adds the balance loss twice."""
    net = patient()
    doctor = core.Doctor(net)
    for ids in own:
        with doctor.watching(ids), torch.no_grad():
            net(ids)
    doctor.look_at_step(step_batch, doubled_loss)
    findings = [str(f) for f in doctor.findings()]
    figures, step = doctor._of_ranks["moe"], doctor._steps["moe"]
    return {
        "findings": findings,
        "sums": {name: torch.as_tensor(getattr(figures, name)) for name in _SUMS},
        "largest": figures.largest,
        "distances": doctor._inputs.distances()["moe"],
        "step": [step.times, step.router_gradient],
    }


def one_choice(expert):
    """Return the figures of 80 tokens that all chose one expert of 2."""
    chosen_E = 80 * torch.nn.functional.one_hot(torch.tensor(expert), 2)
    one = Pass("layer", 2, 80, chosen_E, chosen_E, token_N=torch.arange(80), expert_N=torch.full((80,), expert))
    figures = LayerFigures.like(one)
    figures.add(one, labels=torch.full((80,), 2 * expert))
    return figures


def names_of(findings):
    return [finding.name for finding in findings]


def on_rank(rank):
    halves = batches(1, seed=3)[0].chunk(2)
    result, own = {"copies": evidence(own_batches(rank), halves[rank])}, one_choice(rank)
    together = figures_of_ranks({"layer": own})["layer"]
    result["alone"], result["together"] = names_of(load_findings("", own)), names_of(load_findings("", together))
    result["classes"] = together.class_CE
    result["one rank's"] = [*figures_of_ranks({"layer": own} if rank else {})]

    padded = own_batches(rank, batches(3) + batches(1, padded=True))
    unheeding = patient(heed_padding=False)
    result["padding on rank 1"] = names_of(core.diagnose(unheeding, padded, real=lambda ids: ids != PAD))
    for name in DIVISIONS:
        net = patient()
        with torch.no_grad():
            for p in net.moe.experts.parameters():
                p.copy_(p[:1].expand_as(p))
        faults = core.diagnose(divided(net, name), own_batches(rank), loss=doubled_loss)
        healthy = core.diagnose(divided(patient(), name), own_batches(rank), loss=whole_loss)
        result[f"{name}, two faults"], result[f"{name}, healthy"] = names_of(faults), names_of(healthy)
    none = [] if rank else batches(1)
    try:
        core.diagnose(patient(), none)
    except ValueError as error:
        result["no batch"] = str(error)
    return result


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(on_rank, tmp_path_factory.mktemp("ranks"))


def test_evidence_is_that_of_all_tokens(ranks):
    expected = evidence(batches(4), batches(1, seed=3)[0])
    for of_rank in ranks:
        one = of_rank["copies"]
        assert_close(one["sums"], expected["sums"], rtol=1e-6, atol=1e-6)
        assert (one["largest"], one["findings"]) == (expected["largest"], ranks[0]["copies"]["findings"])
        assert one["step"] == pytest.approx(expected["step"], rel=1e-4)
    assert expected["step"][0] == pytest.approx(2, rel=1e-3)


def test_experts_are_compared_on_the_tokens_of_all_ranks(ranks):
    # Tokens of the first batch of each rank: the sums of both are the same on each, and not those of one rank.
    first, second = (of_rank["copies"]["distances"] for of_rank in ranks)
    assert_close(first, second, rtol=0, atol=0)
    alone = evidence(own_batches(0), batches(1)[0])["distances"]
    assert (first - alone).abs().max() > 1e-6
    assert_close(first, alone, rtol=0.2, atol=0)


def test_an_expert_that_one_rank_has_no_token_of_is_not_dead(ranks):
    for rank, of_rank in enumerate(ranks):
        assert of_rank["alone"] == ["collapsed_load"]
        assert of_rank["together"] == ["skew_by_class"]  # class 2 r is all on expert r
        assert of_rank["classes"].tolist() == [[80, 0], [0, 0], [0, 80]], rank
        assert of_rank["one rank's"] == ["layer"]


def test_a_fault_of_one_ranks_data_is_named_on_both_and_a_rank_without_a_batch_is_an_error_of_all(ranks):
    # A padded batch of 3 in 8 tokens among four batches: 9 % of what the loss counts.
    assert [of_rank["padding on rank 1"] for of_rank in ranks] == [["balance_over_padding"]] * 2
    assert {of_rank["no batch"] for of_rank in ranks} == {"there is no batch to diagnose the model on"}


@pytest.mark.parametrize("division", DIVISIONS)
def test_faults_however_the_model_is_divided(ranks, division):
    # Experts that are divided among ranks are not compared; where all are the same no gate changes the output.
    first = "no_router_gradient" if division == "experts" else "same_experts"
    for of_rank in ranks:
        assert (of_rank[f"{division}, two faults"], of_rank[f"{division}, healthy"]) == ([first, "doubled_balance"], [])
