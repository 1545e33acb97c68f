"""The figures that the rules read, on numbers that can be checked by hand; bad input; and what a diagnosis leaves."""

import math
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from patients import Patient, Training, batches, task_loss, whole_loss
from torch import nn

import core
from core import MLP, STAR, MMoE, RoutingContext
from core.diagnose.alike import Inputs, _distances, _products
from core.diagnose.figures import LayerFigures, explained
from core.diagnose.passes import Facts, Pass
from core.diagnose.rules import load_findings, modality_findings

TOP2 = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=16))


def a_pass(**values):
    """A pass of 8 tokens of one choice among 2 experts, in 2 sequences: tokens 0 to 5 take expert 0."""
    chosen = torch.tensor([6, 2])
    given = {"chosen_E": chosen, "computed_E": chosen, "token_N": torch.arange(8), "num_sequences": 2,
             "expert_N": torch.tensor([0, 0, 0, 0, 0, 0, 1, 1])}  # fmt: skip
    return Pass("layer", num_experts=2, num_tokens=8, **{**given, **values})


def figures_of(*passes, **options):
    figures = LayerFigures.like(passes[0])
    for one in passes:
        figures.add(one, **options)
    return figures


def test_experts_in_use_and_what_groups_explain():
    # Loads of 3/4 and 1/4: an entropy of 0.5623 nats, and (2 - 1) / (2 * 8) more for chance.
    assert figures_of(a_pass()).experts_in_use == pytest.approx(math.exp(0.5623351 + 1 / 16))
    # Each of two groups has its expert: all of the log 2 nats, less (1 * 1) / (2 * 200).
    assert explained(torch.tensor([[100.0, 0.0], [0.0, 100.0]])) == pytest.approx(1 - 1 / 400 / math.log(2))
    assert (explained(torch.tensor([[50.0, 50.0], [50.0, 50.0]])), explained(torch.zeros(2, 2))) == (0, 0)
    # Places 0 to 3 of the first sequence take expert 0; of the second, places 2 and 3 take expert 1.
    figures = figures_of(a_pass(), labels=torch.tensor([0, 1]))
    assert figures.place_PE[:4].tolist() == [[2, 0], [2, 0], [1, 1], [1, 1]]
    assert figures.class_CE.tolist() == [[4, 0], [2, 2]]


def test_the_variances_of_logits():
    # Logits less their mean are +-1 for the first half and +-3 for the second: a mean of +-2 and a variance of 1.
    logits = torch.tensor([[1.0, -1.0]] * 4 + [[8.0, 2.0]] * 4)
    figures = figures_of(a_pass(logits_TE=logits))
    assert (figures.token_variance, figures.expert_variance) == (pytest.approx(1), pytest.approx(4))
    assert figures.largest == 8
    # A sequence's tokens have the same logits: they decided twice, not eight times.
    assert figures.decisions == 2
    # Unreachable experts are no broken logits.
    logits = torch.zeros(8, 2)
    logits[0, 1] = -torch.inf
    assert figures_of(a_pass(logits_TE=logits)).not_finite == 0
    logits[1, 0], logits[2, 1] = torch.nan, torch.inf
    assert figures_of(a_pass(logits_TE=logits)).not_finite == 2


def test_an_expert_that_another_task_uses_is_not_dead():
    # 90 pairs of 3 experts, none of them the last one's; the other task's router takes it 45 times.
    chosen = torch.tensor([45, 45, 0])
    one = Pass("layer.task0", 3, 90, chosen, chosen)
    figures = figures_of(one)
    (dead,) = load_findings("layer.task0", figures)
    assert dead.name == "dead_experts"
    assert list(load_findings("layer.task0", figures, chosen + torch.tensor([45, 0, 45]))) == []


def test_drops_by_chance():
    # 64 pairs of 4 experts are 16 each with a deviation of sqrt(12), and room for 16: 4 * sqrt(12) / sqrt(2 pi) over.
    chosen = torch.full((4,), 16)
    one = Pass("layer", 4, 64, chosen, chosen, facts=Facts(capacity=(1.0, "batch")))
    assert one.chance_drops() == pytest.approx(4 * math.sqrt(12 / (2 * math.pi)))
    # In 4 sequences there are 4 each with a deviation of sqrt(3), 16 times.
    one = replace(one, num_sequences=4, facts=Facts(capacity=(1.0, "sequence")))
    assert one.chance_drops() == pytest.approx(16 * math.sqrt(3 / (2 * math.pi)))
    assert replace(one, facts=Facts()).chance_drops() == 0


def test_the_experts_of_each_modality():
    # Tokens 0 to 3 are of modality 0, 4 to 7 of modality 1; the last is padding, and of none.
    modality, valid = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.arange(8) < 7
    one = a_pass(modality_T=modality, valid_T=valid, token_N=torch.arange(7), expert_N=torch.tensor([0] * 5 + [1, 2]))
    figures = figures_of(one)
    assert figures.modality_GE[:2].tolist() == [[4, 0], [1, 1]]  # expert 2 of 2 stands for a pair that had no room
    assert figures.modality_tokens_G[:3].tolist() == [4, 3, 0]
    # Loads of 1/2 each: an entropy of log 2, and (2 - 1) / (2 * 2) more for chance, of at most 2 experts.
    assert (figures.experts_of_modality(1), figures.experts_of_modality(0)) == (2, pytest.approx(math.exp(1 / 8)))
    # One modality is no evidence.
    assert list(modality_findings("layer", figures_of(replace(one, modality_T=torch.zeros_like(modality))))) == []


def of_modalities(expert_of_1: torch.Tensor, **facts):
    """Return the findings of 400 tokens of 4 experts, of which every second one is of modality 1."""
    expert = torch.arange(400) // 2 % 4
    expert[1::2] = expert_of_1
    chosen = expert.bincount(minlength=5)[:4]
    one = Pass(
        "layer", 4, 400, chosen, chosen, facts=Facts(**facts), token_N=torch.arange(400), expert_N=expert,
        modality_T=torch.arange(400) % 2,
    )  # fmt: skip
    return list(modality_findings("layer", figures_of(one), ("image",)))


def test_a_modality_that_uses_one_expert_and_one_that_is_crowded_out():
    (finding,) = of_modalities(torch.tensor(3))
    assert (finding.name, finding.severity) == ("collapsed_modality", "warning")
    # Without a name it has its number. 1.0 is exp(0 + 3 / 400), for chance.
    assert finding.evidence == "the tokens of modality 1 use 1.0 of 4 experts, and each takes 1.0"
    assert "num_modalities=2" in finding.remedy
    assert of_modalities(torch.arange(200) % 2) == []  # two experts are enough
    assert of_modalities(torch.tensor(3), by_data=True) == []  # the data decide by design
    # 20 of its 200 tokens are computed; of all tokens 220 of 400 are.
    (finding,) = of_modalities(torch.where(torch.arange(200) < 20, 3, 4))
    assert (finding.name, finding.severity) == ("starved_modality", "error")
    assert finding.evidence == "0.1 experts compute a token of modality 1, and 0.55 one of any modality"
    assert of_modalities(torch.where(torch.arange(200) < 160, torch.arange(200) % 4, 4)) == []


def test_a_diagnosis_reads_the_modality_from_the_context():
    layer = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(8)).build(4)
    layer.router.gate.weight.data.copy_(torch.eye(4))
    x_BSD = torch.eye(4)[torch.arange(4 * 64) % 4].view(4, 64, 4)
    x_BSD[2:] = torch.eye(4)[3]  # texts
    modality_BS = (torch.arange(4) >= 2)[:, None].expand(4, 64).long()
    findings = core.diagnose(
        layer, [x_BSD], lambda layer, x: layer(x, core.RoutingContext(modality_BS=modality_BS)),
        modalities=("image", "text"),
    )  # fmt: skip
    assert "the tokens of text use 1.0 of 4 experts, and each takes 1.0" in [f.evidence for f in findings]


def test_a_diagnosis_and_an_ablation_leave_the_model_as_it_was():
    net, start = Training(TOP2, steps=5).run()
    net.train()
    before, random = deepcopy(net.state_dict()), torch.get_rng_state()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    core.diagnose(net, batches(2), loss=whole_loss, start=start)
    assert net.training
    assert net.moe.balance == TOP2.balance
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is gradients[n] or torch.equal(p.grad, gradients[n]) for n, p in net.named_parameters())
    scores = core.ablate_experts(net, lambda: task_loss(net, batches(1)[0]).item())
    assert scores.keys() == {"moe"}
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    for e, score in enumerate(scores["moe"]):
        other = deepcopy(net)
        for t in other.moe.experts.weights_of(e).values():
            t.data.zero_()
        assert score == task_loss(other, batches(1)[0]).item()


def test_a_finding_is_one_line_and_bad_input_is_named():
    finding = core.Finding("dead_experts", "blocks.1.mlp", "warning", "2 of 8 got none", "raise the weight")
    assert str(finding) == "warning: blocks.1.mlp: dead experts: 2 of 8 got none. Remedy: raise the weight"
    with pytest.raises(ValueError, match="a Patient without MoE layers has no routing to diagnose"):
        core.diagnose(Patient(None), batches(1))
    with pytest.raises(ValueError, match="there is no batch to diagnose the model on"):
        core.diagnose(Patient(TOP2), [])
    with pytest.raises(ValueError, match="the loss of a training step has no gradient"):
        core.diagnose(Patient(TOP2), batches(1), loss=lambda net, ids: task_loss(net, ids).detach())
    with pytest.raises(ValueError, match="a Linear has no MoE layer of 2 to 256 experts"):
        core.ablate_experts(nn.Linear(2, 2), lambda: 0.0)


def test_the_same_outputs_have_a_distance_of_0_and_likeness_by_design_is_not_compared():
    # Two domains of a star start as one network; copies among MMoE's experts have a distance of 0.
    known = RoutingContext(domain_ids_B=torch.tensor([0, 1, 1, 0]))
    model = nn.ModuleDict({"star": STAR(expert=MLP((6,))).build(5, 1, 2), "mmoe": MMoE(2, MLP((6,))).build(5, 1)})
    with torch.no_grad():
        for parameter in model["mmoe"].experts.parameters():
            parameter[1] = parameter[0]
    inputs = Inputs(model)
    with inputs.listening():
        model["star"](torch.randn(4, 5), known)
        model["mmoe"](torch.randn(4, 5))
    distances = inputs.distances()
    assert (list(distances), distances["mmoe"][0, 1]) == (["mmoe"], 0)
    # Outputs (1, 0), (0, 1), (1, 0) and nothing: unrelated 1, the same 0, and nothing can be said of nothing.
    y_TED = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]]).double()
    distance = _distances(_products(y_TED))
    assert (distance[0, 1], distance[0, 2]) == (1, 0)
    assert distance[3, 3].isnan()
