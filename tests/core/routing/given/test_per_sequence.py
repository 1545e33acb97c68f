"""Gates that decide once for a sequence: by its mean, its task or its domain."""

import math

import pytest
import torch
from routed import built, ids

from core import FFN, Balance, MoEConfig, RoutingContext
from core.routing.given.per_sequence import Domain, Sentence, Task, domain_posterior
from core.routing.selection import Capacity


def sentence(num_experts: int = 2, **options):
    """D = E and the gate is the identity: a token is its own logits."""
    return built(Sentence(**options), num_experts)


def task(logits: list[list[float]], **options):
    built = Task(len(logits), **options).build(5, len(logits[0])).eval()
    built.gate.weight.data.copy_(torch.tensor(logits))
    return built


def test_a_sentence_takes_the_experts_of_its_mean_and_no_batch_mate_changes_it():
    # Means (0, log 3) and (1, 0): gates 1/4 and 3/4, then e / (1 + e) = 0.731059 and 0.268941.
    x = torch.tensor([[[1.0, 0.0], [-1.0, 2 * math.log(3)]], [[2.0, 0.0], [0.0, 0.0]]])
    routing = sentence()(x)
    assert ids(routing) == [[1, 0], [1, 0], [0, 1], [0, 1]]
    assert routing.gates_N.tolist() == pytest.approx([0.75, 0.25] * 2 + [0.731059, 0.268941] * 2, abs=1e-6)
    assert routing.evidence.logits_TE.tolist() == [pytest.approx([0.0, math.log(3)])] * 2 + [[1.0, 0.0]] * 2
    assert routing.chosen_per_expert_E.tolist() == [4, 4]
    # Padding is not in the mean.
    x = torch.tensor([[[1.0, 0.0], [3.0, 0.0], [0.0, 90.0]]])
    routing = sentence(top_k=1)(x, RoutingContext(valid_BS=torch.tensor([[True, True, False]])))
    assert (routing.evidence.logits_TE.tolist(), ids(routing)) == ([[2.0, 0.0]] * 3, [[0], [0], [2]])
    assert routing.tokens_per_expert_E.tolist() == [2, 0]
    built, x = sentence(4, top_k=1), torch.randn(3, 5, 4)
    routing = built(x)
    assert torch.equal(built(x[1:2]).expert_ids_N, routing.expert_ids_N[5:10])
    changed = x.clone()
    changed[:, -1, 3] += 100.0
    assert built(changed).expert_ids_N.tolist() == [3] * 15


def test_a_task_takes_the_experts_of_its_row():
    built = task([[math.log(6), 0.0, math.log(2)], [0.0, math.log(3), -9.0]])
    routing = built(torch.randn(3, 2, 5), RoutingContext(task_ids_B=torch.tensor([1, 0, 1])))
    assert ids(routing) == [[1, 0]] * 2 + [[0, 2]] * 2 + [[1, 0]] * 2
    # Chosen odds 3 : 1, and 6 : 2.
    assert routing.gates_N.tolist() == pytest.approx([0.75, 0.25] * 6)
    # Over all experts 6 / 9, 1 / 9 and 2 / 9.
    assert routing.evidence.scores_TE[2].tolist() == pytest.approx([6 / 9, 1 / 9, 2 / 9])
    # A sequence with padding keeps its task.
    built, valid = task([[1.0, 0.0], [0.0, 1.0]], top_k=1), torch.tensor([[True, False], [False, False]])
    routing = built(torch.randn(2, 2, 5), RoutingContext(valid, task_ids_B=torch.tensor([1, 1])))
    assert ids(routing) == [[1], [2], [2], [2]]


def test_one_expert_a_task_has_its_score_as_gate_and_sequences_compete_for_capacity():
    built = task([[math.log(6), 0.0, math.log(2)]], top_k=1)
    routing = built(torch.randn(1, 2, 5), RoutingContext(task_ids_B=torch.tensor([0])))
    assert routing.gates_N.tolist() == pytest.approx([6 / 9] * 2)
    routing.gates_N.sum().backward()
    # Two tokens, each g (1 - g) = 2/3 1/3 for the chosen and - g_0 g_i for the others.
    assert built.gate.weight.grad[0].tolist() == pytest.approx([4 / 9, -4 / 27, -8 / 27])
    # Three sequences of 4 tokens on one expert of 2: ceil(1 * 1 * 12 / 2) = 6 have room, the first ones.
    built = Task(1, top_k=1).build(5, 2, Capacity(1.0))
    routing = built(torch.randn(3, 4, 5), RoutingContext(task_ids_B=torch.zeros(3, dtype=torch.int64)))
    assert sorted(routing.tokens_per_expert_E.tolist()) == [0, 6]
    assert (routing.expert_ids_N[6:] == 2).all()


def test_a_tasks_subnetwork_computes_what_the_layer_does():
    layer = MoEConfig(6, Task(3, top_k=2), FFN(8, bias=True)).build(5).eval()
    x, subnetwork = torch.randn(4, 7, 5), layer.router.experts_of(2)
    experts, expected = layer.experts, torch.zeros_like(x)
    for expert, gate in zip(subnetwork.expert_ids_K.tolist(), subnetwork.gates_K, strict=True):
        h = torch.nn.functional.gelu(x @ experts.w_in[expert] + experts.b_in[expert])
        expected = expected + gate * (h @ experts.w_out[expert] + experts.b_out[expert])
    y = layer(x, RoutingContext(task_ids_B=torch.full((4,), 2)))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    # Tasks start with different experts.
    built = Task(200, top_k=1).build(5, 8)
    first = torch.stack([built.experts_of(t).expert_ids_K for t in range(200)]).flatten()
    assert torch.bincount(first, minlength=8).min() > 0


def test_a_known_domain_is_its_expert_at_gate_1_and_an_unknown_one_a_mixture():
    built = Domain(3).build(5, 3)
    for mode in (True, False):
        routing = built.train(mode)(torch.randn(3, 2, 5), RoutingContext(domain_ids_B=torch.tensor([2, 0, 2])))
        assert (ids(routing), routing.gates_N.tolist()) == ([[2], [2], [0], [0], [2], [2]], [1.0] * 6)
        assert routing.tokens_per_expert_E.tolist() == [2, 0, 4]
    built, x = Domain(4).build(5, 4).eval(), torch.randn(1, 2, 5)
    assert built(x).gates_N.tolist() == [0.25] * 8  # uniform at the start, of all experts
    assert built(x[:0]).expert_ids_N.shape == (0,)
    built.set_prior([1.0, 0.0, 4.0, 5.0])
    routing = built(x)
    assert ids(routing) == [[3, 2, 0, 4]] * 2  # a domain without weight is not computed
    assert routing.gates_N.tolist() == pytest.approx([0.5, 0.4, 0.1, 0.0] * 2)
    # The largest of a mixture share its weight.
    built, x = Domain(4, top_k=2).build(5, 4).eval(), torch.randn(1, 1, 5)
    built.set_prior(torch.tensor([0.1, 0.2, 0.6, 0.1]))
    assert ids(built(x)) == [[2, 1]]
    assert built(x).gates_N.tolist() == pytest.approx([0.75, 0.25])  # 0.6 / 0.8 and 0.2 / 0.8
    built = Domain(2).build(5, 2)
    weights = torch.tensor([[0.25, 0.75], [1.0, 0.0], [torch.nan, torch.nan]], requires_grad=True)
    valid = torch.tensor([[True], [True], [False]])
    for mode in (True, False):
        routing = built.train(mode)(torch.randn(3, 1, 5), RoutingContext(valid_BS=valid, domain_weights_BE=weights))
        assert ids(routing) == [[1, 0], [0, 2], [2, 2]]
        assert routing.gates_N.tolist() == pytest.approx([0.75, 0.25, 1.0, 0.0, 0.0, 0.0])


def test_the_mixture_mixes_the_outputs_of_the_experts_and_is_exported():
    layer, x = MoEConfig(3, Domain(3), FFN(8)).build(5).eval(), torch.randn(1, 4, 5)
    alone = [layer(x, RoutingContext(domain_ids_B=torch.tensor([d]))) for d in range(3)]
    layer.router.set_prior([0.2, 0.3, 0.5])
    torch.testing.assert_close(layer(x), 0.2 * alone[0] + 0.3 * alone[1] + 0.5 * alone[2], rtol=1e-5, atol=1e-6)
    layer, x = MoEConfig(4, Domain(4), FFN(8)).build(6).eval(), torch.randn(3, 5, 6)
    program = torch.export.export(layer, (x, RoutingContext())).module()
    torch.testing.assert_close(program(x, RoutingContext()), layer(x), rtol=1e-5, atol=1e-6)


def test_the_posterior_is_bayes_rule_and_the_prior_its_mean():
    likelihood = torch.tensor([[0.1, 0.3], [0.5, 0.5]]).log()
    assert domain_posterior(likelihood)[0].tolist() == pytest.approx([0.25, 0.75])
    # 0.1 0.9 : 0.3 0.1 is 0.09 : 0.03.
    posterior = domain_posterior(likelihood, torch.tensor([0.9, 0.1]))
    assert posterior.tolist() == [pytest.approx([0.75, 0.25]), pytest.approx([0.9, 0.1])]
    # The prior is estimated from held-out texts.
    built = Domain(2).build(5, 2).eval()
    likelihood = torch.tensor([[0.1, 0.3], [0.4, 0.4], [0.3, 0.1]]).log()
    # Posteriors 0.25, 0.5, 0.75 for domain 0.
    assert built.estimate_prior(likelihood[:2]).tolist() == pytest.approx([0.375, 0.625])
    assert built(torch.randn(1, 1, 5)).gates_N.tolist() == pytest.approx([0.625, 0.375])
    # 0.7 0.25 + 0.3 0.5 = 0.325; 0.7 0.325 + 0.3 0.75 = 0.4525.
    assert built.estimate_prior(likelihood, decay=0.3)[0].item() == pytest.approx(0.4525)
    other = Domain(2).build(5, 2).eval()
    other.load_state_dict(built.state_dict())
    assert other.prior[0].item() == pytest.approx(0.4525)


X = torch.zeros(2, 3, 6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Task(3).build(6, 4).experts_of(3), r"task=3 is not in range\(3\)"),
        (lambda: Domain(4).build(6, 4)(X), r"Domain needs context.domain_ids_B or domain_weights_BE in training"),
        (lambda: Domain(4).build(6, 4).eval()(X, RoutingContext(domain_weights_BE=torch.ones(2, 3))),
         r"context.domain_weights_BE has shape \(2, 3\), not \(2, 4\)"),
        (lambda: MoEConfig(4, Sentence()).build(4, causal=True),
         r"Sentence \(arXiv 2110\.03742\) lets later tokens change earlier ones"),
        (lambda: Sentence(top_k=5).build(6, 4), r"top_k=5 exceeds num_experts=4"),
        (lambda: Task(2, top_k=1, normalize=True), r"normalize=True with top_k=1"),
        (lambda: Domain(3, top_k=4), r"top_k=4 exceeds num_domains=3"),
        (lambda: Domain(3).build(6, 4), r"num_domains=3 is not num_experts=4"),
        (lambda: Domain(2).build(6, 2).set_prior([1.0]), r"prior weights have shape \(1,\), not \(2,\)"),
        (lambda: Domain(2).build(6, 2).set_prior([0.0, 0.0]), r"prior weights \[0.0, 0.0\] are not"),
        (lambda: Domain(2).build(6, 2).set_prior([-1.0, 2.0]), r"prior weights \[-1.0, 2.0\] are not"),
        (lambda: Domain(2).build(6, 2).set_prior([1.0, float("nan")]), r"prior weights \[1.0, nan\] are not"),
        (lambda: Domain(2).build(6, 2).estimate_prior(torch.zeros(0, 2)), r"no text to estimate a prior from"),
        (lambda: Domain(2).build(6, 2).estimate_prior(torch.zeros(1, 2), decay=1.0), r"decay=1.0 is not in \(0, 1\)"),
        (lambda: MoEConfig(4, Task(2), balance=Balance(sequence_balance=0.1)), r"sequence_balance=0.1 does not apply"),
        (lambda: MoEConfig(4, Domain(4), balance=Balance(importance=0.1)), r"importance=0.1 does not apply to Domain"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_with_its_value_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message):
        make()
