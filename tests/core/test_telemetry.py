"""RoutingStats by hand."""

import math

import pytest
import torch
from layered import identity_gate
from routed import recorded

from core import MoEConfig, RoutingContext, RoutingStats, TokenChoice, record


def stats(x: list[list[float]], valid: list[bool] | None = None, **options):
    """Return the statistics of one pass of a layer whose logits are its input, one sequence."""
    layer = identity_gate(MoEConfig(len(x[0]), **options).build(len(x[0])))
    context = None if valid is None else RoutingContext(valid_BS=torch.tensor([valid]))
    tape = recorded(layer, torch.tensor([x]), context)
    return RoutingStats.from_tape(tape).layers[""]


def test_load_imbalance_dead_experts_and_drop_rate_by_hand():
    # Choices 0, 0, 0, 1 of four experts with room for ceil(1 * 1 * 4 / 4) = 1: two of the three for expert 0 drop.
    x = [[9.0, 0, 0, 0], [9.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 9.0, 0, 0]]
    layer_stats = stats(x, router=TokenChoice(1), capacity_factor=1.0)
    assert layer_stats.chosen_per_expert.tolist() == [3, 1, 0, 0]
    assert layer_stats.tokens_per_expert.tolist() == [1, 1, 0, 0]
    assert layer_stats.load_imbalance == 3.0  # 3 over the mean 1
    assert (layer_stats.dead_experts, layer_stats.drop_rate) == (2, 0.5)
    # Shares 3/4, 1/4: (0.75 log(4/3) + 0.25 log 4) / log 4 = 0.405639.
    assert layer_stats.load_entropy == pytest.approx(0.405639, abs=1e-6)
    # The loads 3, 1, 0, 0 have the mean 1, deviations 2, 0, -1, -1, and the quartiles 0, 0.5, 1.5.
    figures = layer_stats.figures(detailed=True)
    assert layer_stats.relative_load.tolist() == [3.0, 1.0, 0.0, 0.0]
    assert (figures["max_violation"], figures["load_variation"]) == (2.0, pytest.approx(math.sqrt(6 / 4)))
    assert [figures[f"load_p{p}"] for p in (5, 25, 50, 75, 95)] == pytest.approx([0.0, 0.0, 0.5, 1.5, 2.7])
    assert {name: figures[name] for name in layer_stats.figures()} == layer_stats.figures()
    # Balanced, nothing is dropped.
    even = stats([[9.0, 0.0], [0.0, 9.0]], router=TokenChoice(1), capacity_factor=1.0)
    assert (even.load_imbalance, even.drop_rate, even.dead_experts) == (1.0, 0.0, 0)
    assert even.load_entropy == pytest.approx(1.0)


def test_entropy_is_that_of_the_scores_over_log_e():
    # Scores (1/2, 1/2) and (3/4, 1/4): entropies log 2 and 0.562335; their mean 0.627741 over log 2.
    layer_stats = stats([[0.0, 0.0], [math.log(3), 0.0]], router=TokenChoice(1))
    assert layer_stats.entropy == pytest.approx(0.905639, abs=1e-6)
    # Sigmoids 3/4 and 1/4 sum to 1: entropy 0.562335 / log 2 = 0.811278.
    layer_stats = stats([[math.log(3), -math.log(3)]], router=TokenChoice(1, score_func="sigmoid"))
    assert layer_stats.entropy == pytest.approx(0.811278, abs=1e-6)
    # One expert has none.
    layer_stats = stats([[1.0], [2.0]], router=TokenChoice(1))
    assert (layer_stats.entropy, layer_stats.load_entropy, layer_stats.load_imbalance) == (0.0, 1.0, 1.0)


def test_padding_is_in_no_figure_and_nothing_routed_has_figures_too():
    # Real tokens 0 and 2, both for expert 0, room for ceil(2 / 2) = 1: one of two is dropped. Padding would be
    # a drop rate of 3/4 or 1/4 if it counted, and would have woken expert 1.
    x = [[9.0, 0.0], [0.0, 9.0], [9.0, 0.0], [0.0, 9.0]]
    layer_stats = stats(x, [True, False, True, False], router=TokenChoice(1), capacity_factor=1.0)
    assert (layer_stats.num_tokens, layer_stats.chosen_per_expert.tolist()) == (2, [2, 0])
    assert (layer_stats.tokens_per_expert.tolist(), layer_stats.drop_rate) == ([1, 0], 0.5)
    assert (layer_stats.dead_experts, layer_stats.load_imbalance) == (1, 2.0)
    alone = stats([x[0], x[2]], router=TokenChoice(1), capacity_factor=1.0)
    assert layer_stats.figures() == pytest.approx(alone.figures())
    layer = MoEConfig(3).build(4)
    tape = recorded(layer, torch.randn(2, 0, 4))
    figures = RoutingStats.from_tape(tape).layers[""].figures()
    expected = {"load_imbalance": 1.0, "entropy": 0.0, "load_entropy": 0.0, "drop_rate": 0.0, "dead_experts": 3.0}
    assert figures == expected


def of_modalities(modality: list[int], valid: list[bool] | None = None, **options):
    """Return the statistics of four experts that the tokens 0 to 5 choose as 0, 0, 1, 2, 2, 2."""
    x = [[9.0 * (e == chosen) for e in range(4)] for chosen in (0, 0, 1, 2, 2, 2)]
    layer = identity_gate(MoEConfig(4, router=TokenChoice(1), **options).build(4))
    valid_BS = None if valid is None else torch.tensor([valid])
    tape = recorded(layer, torch.tensor([x]), RoutingContext(valid_BS=valid_BS, modality_BS=torch.tensor([modality])))
    return RoutingStats.from_tape(tape)


def test_the_experts_of_each_modality_by_hand_add_up_without_padding_and_drops():
    layer_stats = of_modalities([0, 0, 0, 1, 1, 1]).layers[""]
    assert layer_stats.tokens_of_modality.tolist() == [3, 3, 0, 0, 0, 0, 0, 0]
    assert layer_stats.pairs_of_modality[:2].tolist() == [[2, 1, 0, 0], [0, 0, 3, 0]]
    # Modality 0 uses shares 2/3 and 1/3: exp(2/3 log 1.5 + 1/3 log 3) = 3 / 2 ** (2 / 3) experts.
    figures = layer_stats.figures()
    assert figures["modality0_experts"] == pytest.approx(3 / 2 ** (2 / 3))
    assert (figures["modality0_unreached"], figures["modality1_experts"], figures["modality1_unreached"]) == (2, 1, 3)
    assert "modality2_experts" not in figures
    # Room for ceil(0.25 * 6 / 4) = 1: of the three tokens for expert 2 the first one, of modality 1, is computed.
    layer_stats = of_modalities([0, 0, 0, 1, 2, 2], capacity_factor=0.25).layers[""]
    assert layer_stats.pairs_of_modality[:3].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    assert layer_stats.figures()["modality2_experts"] == 0.0
    padded = of_modalities([0, 0, 0, 1, 1, 9], [True, True, True, True, False, True]).layers[""]
    assert padded.tokens_of_modality.tolist() == [3, 1, 0, 0, 0, 0, 0, 0]  # 9 is no modality that is told apart
    both = (of_modalities([0] * 6) + of_modalities([1] * 6)).layers[""]
    assert (both.tokens_of_modality[:2].tolist(), both.figures()["modality1_unreached"]) == ([6, 6], 1.0)


def test_passes_and_batches_of_a_layer_add_up_and_layers_are_kept_apart():
    model = torch.nn.ModuleDict({name: MoEConfig(4, capacity_factor=0.5).build(8) for name in "ab"})
    tapes = []
    for name, batch in (("a", torch.randn(2, 6, 8)), ("a", torch.randn(3, 4, 8)), ("b", torch.randn(1, 5, 8))):
        with record(model) as tape:
            model[name](batch)
        tapes.append(tape)
    parts = [RoutingStats.from_tape(t) for t in tapes]
    both = RoutingStats.from_tape(tapes[0].merge(tapes[1])).layers["a"]
    total = parts[0] + parts[1] + parts[2]
    assert {name: int(s.num_tokens) for name, s in total.layers.items()} == {"a": 24, "b": 5}
    added = total.layers["a"]
    assert both.chosen_per_expert.sum() == 48
    assert torch.equal(both.chosen_per_expert, added.chosen_per_expert)
    assert torch.equal(both.tokens_per_expert, added.tokens_per_expert)
    assert both.figures() == pytest.approx(added.figures())


@pytest.mark.parametrize("training", [True, False])
def test_a_tape_reads_the_same_in_training_and_evaluation(training):
    layer = MoEConfig(4).build(8).train(training)
    with torch.set_grad_enabled(training), record(layer) as tape:
        layer(torch.randn(2, 6, 8))
    layer_stats = RoutingStats.from_tape(tape).layers[""]
    assert int(layer_stats.tokens_per_expert.sum()) == 24
    assert not layer_stats.entropy_sum.requires_grad
