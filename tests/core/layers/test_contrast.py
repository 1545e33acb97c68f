"""The contrast of experts' outputs: by hand, against a loop over pairs, and which rows and layers it is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from core.memory import kept_bytes
from core.routing.balance.losses import contrast_losses
from core.routing.balance.terms import balance_sums, balance_terms

ALONE = {"load_balancing_loss": 0.0, "router_z_loss": 0.0}
OUTPUT = torch.tensor([[0.75, 0.0], [0.75, 0.0], [0.0, 0.75], [torch.nan, 0.0]])
# |y|^2 = 9/16, so u = y / (5/4): u . u = 0.36, which a temperature of 0.36 makes a similarity of 1.


def contrast(layer: core.MoE, x: Tensor, context: core.RoutingContext | None = None) -> Tensor:
    """Return the term of one pass, which is the whole of the losses."""
    with core.record(layer) as tape:
        layer(x, context)
    losses = core.aux_losses(tape)
    assert losses.terms.keys() == {"contrast"}
    return losses.total


def built(router: core.RouterConfig, expert: core.FFN | core.LoRA = core.FFN(12), **options) -> core.MoE:
    balance = core.Balance(**ALONE, contrast=1.0, **options)
    layer = core.MoEConfig(4, router, expert, balance=balance).build(8)
    if isinstance(expert, core.LoRA):
        nn.init.normal_(layer.experts.w_b)
    return layer


def test_a_contrast_by_hand():
    expert_S, kept_S = torch.tensor([0, 0, 1, 0]), torch.tensor([True, True, True, False])
    loss_S, has_loss_S = contrast_losses(OUTPUT, expert_S, kept_S, 0.36)
    # Row 0: row 1 is as it is, row 2 is at right angles: -log(e / (e + 1)) = 0.313262. Row 2 is alone in its expert.
    assert loss_S.tolist() == pytest.approx([0.313262, 0.313262, 0.0, 0.0], abs=1e-6)
    assert has_loss_S.tolist() == [True, True, False, False]
    # Of one expert: row 0 has the mean of -log(e / (e + 1)) and -log(1 / (e + 1)) = 1.313262; row 2 has log 2.
    loss_S, has_loss_S = contrast_losses(OUTPUT, torch.zeros(4, dtype=torch.int64), kept_S, 0.36)
    assert loss_S.tolist() == pytest.approx([0.813262, 0.813262, math.log(2), 0.0], abs=1e-6)
    assert has_loss_S.tolist() == [True, True, True, False]
    y = torch.zeros(4, 3, requires_grad=True)  # outputs of zero have a gradient of zero
    loss_S, _ = contrast_losses(y, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool), 0.1)
    assert loss_S.tolist() == pytest.approx([math.log(3)] * 4)
    loss_S.sum().backward()
    assert y.grad.tolist() == [[0.0] * 3] * 4


def test_sampled_rows_are_evenly_spaced_among_those_that_are_computed():
    x = torch.arange(5.0)[:, None]
    rows = core.Rows(
        x, torch.tensor([3, 1, 4, 0, 2, 0, 0]), torch.tensor([3, 3, 5], dtype=torch.int32), torch.rand(7), 5
    )
    sample, kept_S = rows.sampled(3)
    # Of five rows those at 0, 5 // 3 and 10 // 3: tokens 3 and 1 of expert 0, token 0 of expert 2.
    assert sample.x[:, 0].tolist() == [3.0, 1.0, 0.0]
    assert sample.offsets_E.tolist() == [2, 2, 3]
    assert sample.gates_R.tolist() == [1.0] * 3
    assert kept_S.tolist() == [True] * 3
    # Seven places for five rows: copies are left out, and so is what is not computed.
    sample, kept_S = rows.sampled(100)
    assert sample.x[kept_S][:, 0].tolist() == [3.0, 1.0, 4.0, 0.0, 2.0]
    assert sample.materialized() is sample
    idle = core.Rows(x, torch.tensor([3, 1]), torch.zeros(3, dtype=torch.int32), torch.rand(2), 5)
    assert idle.sampled(4)[1].tolist() == [False, False]
    empty = core.Rows(x[:0], torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int32), torch.rand(0), 0)
    assert empty.sampled(4)[0].x.shape == (0, 1)


@pytest.mark.parametrize(
    ("router", "expert"),
    [
        (core.TokenChoice(2), core.FFN(12)),
        (core.ExpertChoice(1.5), core.LoRA(4)),
        (core.Dense(), core.FFN(12)),
        (core.Hash(5, top_k=2), core.LoRA(4)),
    ],
)
def test_the_contrast_of_a_layer_is_that_of_a_loop_over_its_pairs(router, expert):
    layer = built(router, expert, contrast_temperature=0.5)
    x, context = torch.randn(2, 5, 8), core.RoutingContext(token_ids_BS=torch.randint(5, (2, 5)))
    actual = contrast(layer, x, context)
    routing = layer.router(x, context)
    x_TD = x.flatten(0, 1)
    pairs = [
        (t, e) for t, e in zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), strict=True) if e < 4
    ]
    outputs = [layer.experts(x_TD[t : t + 1], "each")[0, e] for t, e in pairs]
    units = [y / (1 + y @ y).sqrt() for y in outputs]
    losses = []
    for i, (_, expert_of_i) in enumerate(pairs):
        share = {j: (units[i] @ units[j] / 0.5).exp() for j in range(len(pairs)) if j != i}
        same = [j for j in share if pairs[j][1] == expert_of_i]
        if same:
            losses.append(-sum((share[j] / sum(share.values())).log() for j in same) / len(same))
    torch.testing.assert_close(actual, sum(losses) / len(losses), rtol=1e-4, atol=0)
    actual.backward()
    # Gates are not in it: it moves the experts, and no router.
    assert all(p.grad is None or not p.grad.any() for p in layer.router.parameters())
    assert all(p.grad.any() for p in layer.experts.parameters())


def test_it_is_of_real_tokens_and_of_training_alone():
    layer = built(core.TokenChoice(2))
    x = torch.randn(2, 5, 8)
    padded, valid = torch.full((2, 7, 8), torch.nan), torch.zeros(2, 7, dtype=torch.bool)
    padded[:, :5], valid[:, :5] = x, True
    torch.testing.assert_close(contrast(layer, padded, core.RoutingContext(valid)), contrast(layer, x))
    with core.record(layer.eval()) as tape:
        layer(x)
    assert core.aux_losses(tape).terms == {}


def test_rows_are_few_whatever_the_batch_and_the_choice_is_the_same_each_time():
    layer, plain = (
        built(core.TokenChoice(2), contrast_rows=16),
        core.MoEConfig(4, core.TokenChoice(2), core.FFN(12)).build(8),
    )
    x = torch.randn(1, 2000, 8, requires_grad=True)
    # 16 rows of 8, 12 and 8 numbers and some (16, 16) matrices; an output of each pair alone would be 128,000 bytes.
    assert kept_bytes(layer, x) - kept_bytes(plain, x) < 20_000
    assert contrast(layer, x) == contrast(layer, x)
    assert contrast(built(core.TokenChoice(2), contrast_rows=1), x) == 0.0  # a row alone has nothing to compare with


def test_a_checkpointed_layer_has_the_same_gradient():
    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        layer = built(core.TokenChoice(2), core.LoRA(4, dropout=0.2))
        x = torch.randn(2, 5, 8)
        with core.record(layer) as tape:
            y = checkpoint(layer, x, use_reentrant=False) if checkpointed else layer(x)
        (y.square().sum() + core.aux_losses(tape).total).backward()
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(*grads)


def test_the_mean_is_over_the_rows_of_all_ranks():
    layer = built(core.TokenChoice(2))
    with core.record(layer) as tape:
        layer(torch.randn(1, 3, 8))
        layer(torch.randn(1, 9, 8))
    wanted = frozenset({"contrast"})
    first, second = (balance_sums(entry.routing, wanted) for entry in tape.entries)
    added = balance_terms({name: first[name] + second[name] for name in first}, wanted)["contrast"]
    (of_first, of_second), (n, m) = zip(*((s["contrast"], s["num_contrasts"]) for s in (first, second)), strict=True)
    assert 0 < n < m <= 18
    torch.testing.assert_close(added, ((of_first + of_second) / (n + m))[0])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((core.SoftSlots(),), "does not apply to SoftSlots"),
        ((core.Merge(),), "does not apply to Merge"),
        ((core.ProductKeys(2, 1), core.PEER()), "does not apply to Prod"),
        ((core.TokenChoice(), core.AttentionExperts()), "does not apply to Token"),
        ((core.TokenChoice(), core.MLP((4,), norm="batch")), "computes rows twice, and MLPExperts gathers statistics"),
    ],
)
def test_where_it_has_no_meaning_it_is_refused(parts, message):
    with pytest.raises(ValueError, match=f"balance.contrast=1.0 {message}"):
        core.MoEConfig(4, *parts, balance=core.Balance(**ALONE, contrast=1.0)).build(8, 4)


def test_compiled_it_is_the_same_and_under_autocast_that_of_rounded_outputs_in_float32(fresh_compiler):
    layer, x = built(core.TokenChoice(2), core.LoRA(4), contrast_temperature=1.0), torch.randn(2, 5, 8)
    expected = contrast(layer, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = contrast(layer, x)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=0)
    with core.record(layer) as tape:
        torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(core.aux_losses(tape).total, expected)
