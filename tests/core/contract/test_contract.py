"""The tape, what ``record`` collects and leaves behind, and the names that a profiler shows."""

import copy
import pickle
from collections import Counter, OrderedDict

import pytest
import torch
from routed import recorded
from torch import Tensor, nn
from torch.profiler import profile

import core
from core import MoE, MoEConfig, RoutingStats, Tape, TokenChoice, aux_loss, moe_layers, record, update_expert_bias
from core.contract import Rows, unwrapped_modules


class Net(nn.Module):
    """Two MoE layers, the first of which may run twice."""

    def __init__(self, passes: int = 1, **options) -> None:
        super().__init__()
        config = MoEConfig(4, **options)
        self.blocks = nn.ModuleList([config.build(8), config.build(8)])
        self.passes = passes

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.passes):
            x = x + self.blocks[0](x)
        return x + self.blocks[1](x)


def names(tape: Tape) -> list[str]:
    return [entry.name for entry in tape.entries]


def test_one_entry_a_pass_in_the_order_of_the_passes():
    net = Net(passes=2)
    with record(net) as tape:
        net(torch.randn(2, 3, 8))
        net(torch.randn(1, 5, 8))
    assert (names(tape), len(tape)) == (["blocks.0", "blocks.0", "blocks.1"] * 2, 6)
    assert [entry.routing.num_tokens for entry in tape.entries] == [6] * 3 + [5] * 3
    # A layer used twice counts twice in the loss.
    single = [aux_loss(Tape((entry,))).item() for entry in tape.entries]
    assert aux_loss(tape).item() == pytest.approx(sum(single), rel=1e-6)
    assert single[0] != single[1]


def test_an_entry_tells_the_routing_the_context_and_the_layers_own_balance():
    layer = MoEConfig(4, router=TokenChoice(1)).build(8)
    context = core.RoutingContext(valid_BS=torch.tensor([[True, True, False]]))
    tape = recorded(layer, torch.randn(1, 3, 8), context)
    (entry,) = tape.entries
    assert entry.name == ""
    assert entry.context is context
    assert entry.balance is layer.balance
    assert {"load_balancing_loss", "router_z_loss", "importance"} < entry.terms
    assert "load" not in entry.terms  # no noise
    assert entry.routing.tokens_per_expert_E.sum() == 2


def test_blocks_may_be_nested_hear_their_own_part_alone_and_leave_nothing_behind():
    net, other, x = Net(), Net(), torch.randn(1, 3, 8)
    net(x)
    with record(net) as outer:
        net(x)
        with record(net.blocks[1]) as inner:
            net(x)
        other(x)
        net(x)
    net(x)
    assert (names(outer), names(inner)) == (["blocks.0", "blocks.1"] * 3, [""])
    net = Net()
    with pytest.raises(RuntimeError, match="stop"), record(net):
        net(torch.randn(1, 3, 8))
        raise RuntimeError("stop")
    assert all(layer._tapes == () for layer in moe_layers(net).values())
    assert not [name for layer in moe_layers(net).values() for name in vars(layer) if "routing" in name]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_or_pickle_taken_inside_the_block_is_equal_and_not_recorded(duplicate):
    net, x = Net(), torch.randn(1, 3, 8)
    with record(net) as tape:
        y, twin = net(x), duplicate(net)
        assert torch.equal(twin(x), y)
    assert names(tape) == ["blocks.0", "blocks.1"]
    # It trains apart from its original.
    with record(twin) as own:
        loss = twin(x).square().mean()
    assert names(own) == ["blocks.0", "blocks.1"]
    (loss + aux_loss(own)).backward()
    assert all(p.grad is not None for p in twin.parameters())
    assert all(p.grad is None for p in net.parameters())


def test_tapes_merge_and_change_neither_and_a_detached_one_keeps_the_numbers_and_drops_the_graph():
    net, tapes = Net(), []
    for length in (3, 5):
        tape = recorded(net, torch.randn(1, length, 8))
        tapes.append(tape)
    merged = tapes[0].merge(tapes[1])
    assert [entry.routing.num_tokens for entry in merged.entries] == [3, 3, 5, 5]
    assert (len(tapes[0]), len(tapes[1])) == (2, 2)
    assert aux_loss(merged).item() == pytest.approx(sum(aux_loss(t).item() for t in tapes), rel=1e-6)
    net = Net()
    tape = recorded(net, torch.randn(1, 3, 8))
    detached = tape.detach()
    assert aux_loss(tape).requires_grad
    assert not aux_loss(detached).requires_grad
    assert aux_loss(detached).item() == aux_loss(tape).item()
    for entry, kept in zip(tape.entries, detached.entries, strict=True):
        assert torch.equal(entry.routing.chosen_per_expert_E, kept.routing.chosen_per_expert_E)
        assert not any(t.requires_grad for t in vars(kept.routing).values() if isinstance(t, Tensor))


@pytest.mark.parametrize(
    "name, clean",
    [
        ("blocks.0.mlp", "blocks.0.mlp"),
        ("", ""),
        ("module.blocks.0", "blocks.0"),  # DDP
        ("module", ""),  # DDP around the layer itself
        ("_orig_mod.blocks.0", "blocks.0"),  # torch.compile
        ("_orig_mod", ""),
        ("module._orig_mod.blocks.0", "blocks.0"),  # DDP around a compiled model
        ("_orig_mod.module.blocks.0", "blocks.0"),  # and the other way round
        ("blocks.0._checkpoint_wrapped_module.mlp", "blocks.0.mlp"),
        ("blocks.0.module.mlp", "blocks.0.module.mlp"),  # a name of the model's own
    ],
)
def test_names_are_those_of_the_unwrapped_model(name, clean):
    model = layer = MoEConfig(2).build(2)
    for level in reversed(name.split(".") if name else []):
        model = nn.ModuleDict({level: model})
    assert [n for n, m in unwrapped_modules(model) if m is layer] == [clean]


def test_a_level_that_is_called_module_beside_others_keeps_its_name():
    model = nn.ModuleDict({"moe": bias_layer(), "module": nn.ModuleDict({"moe": bias_layer()})})
    with record(model) as tape:
        model["moe"](torch.tensor([[[1.0, 0.0]]]))
        model["module"]["moe"](torch.tensor([[[0.0, 1.0]]]))
    assert [entry.name for entry in tape.entries] == ["moe", "module.moe"]
    update_expert_bias(model, tape)
    assert model["moe"].router.expert_bias.tolist() == [-0.5, 0.5]
    assert model["module"]["moe"].router.expert_bias.tolist() == [0.5, -0.5]


@pytest.mark.parametrize("part", ["layer", "holder"])
def test_a_tape_of_a_part_of_the_model_is_refused(part):
    model = nn.ModuleDict({"encoder": nn.ModuleDict({"moe": bias_layer()})})
    recorded = model["encoder"] if part == "holder" else model["encoder"]["moe"]
    with record(recorded) as tape:
        model["encoder"]["moe"](torch.tensor([[[1.0, 0.0]]]))
    name = "moe" if part == "holder" else ""
    with pytest.raises(ValueError, match=rf"a pass of layer '{name}', the model's are 'encoder.moe': record this very"):
        update_expert_bias(model, tape)
    update_expert_bias(recorded, tape)
    assert model["encoder"]["moe"].router.expert_bias.tolist() == [-0.5, 0.5]


def test_the_loads_of_a_tape_move_the_bias_of_a_bare_layer_and_have_no_losses():
    layer = bias_layer()
    tape = recorded(layer, torch.tensor([[[1.0, 0.0]]]))
    loads = tape.loads()
    (entry,) = loads.entries
    kept = [value for value in vars(entry.routing).values() if isinstance(value, Tensor)]
    assert sum(value.numel() for value in kept) == 4  # two counts of two experts
    assert entry.context is None
    update_expert_bias(layer, loads.merge(tape.loads()))
    assert layer.router.expert_bias.tolist() == [-0.5, 0.5]
    for read in (aux_loss, RoutingStats.from_tape):
        with pytest.raises(ValueError, match="layer '' is on this tape with its loads alone"):
            read(loads)
    layer = bias_layer()
    wrapped = nn.Sequential(OrderedDict(module=layer))  # names its content as DDP does
    tape = recorded(wrapped, torch.tensor([[[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]]))
    update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.5, 0.5]  # loads 2 and 1


def bias_layer() -> MoE:
    """Two experts, whose logits are the token."""
    layer = MoEConfig(2, router=TokenChoice(1, expert_bias=True, bias_update_rate=0.5)).build(2)
    layer.router.gate.weight.data.copy_(torch.eye(2))
    return layer


def test_rows_materialize_to_the_tokens_sorted_by_expert():
    x = torch.tensor([[1.0], [2.0], [3.0]])
    rows = Rows(x, torch.tensor([2, 0, 2, 1]), torch.tensor([2, 4], dtype=torch.int32), torch.ones(4), 3)
    assert rows.materialize().tolist() == [[3.0], [1.0], [3.0], [2.0]]
    done = rows.with_output(torch.zeros(4, 5))
    assert (done.gathered, done.weighted, done.combined) == (True, False, False)
    assert done.materialize() is done.x
    summed = rows.with_output(torch.zeros(3, 5), combined=True)
    assert (summed.gathered, summed.weighted, summed.combined) == (True, True, True)


PARTS = ("moe.router", "moe.dispatch", "moe.experts", "moe.combine")


def calls(layer, x):
    with profile() as trace:
        layer(x)
    return Counter(event.name for event in trace.events() if event.name.startswith("moe."))


@pytest.mark.parametrize(
    "router", [core.TokenChoice(2), core.ExpertChoice(), core.SoftSlots(1), core.TokenRounding(2, tile=2)]
)
@pytest.mark.parametrize("training", [True, False])
def test_a_profiler_shows_each_part_of_a_layer_once(router, training):
    layer = core.MoEConfig(4, router).build(8).train(training)
    assert calls(layer, torch.randn(2, 3, 8)) == dict.fromkeys(PARTS, 1)


def test_a_layer_of_several_gates_is_shown_too_and_a_spans_arguments_are_the_functions():
    layer = core.MMoE(4, core.MLP((8, 6))).build(8, num_tasks=3)
    assert set(calls(layer, torch.randn(5, 8))) >= {"moe.router", "moe.experts"}

    @core.contract.span("moe.part")
    def halved(x: int, by: int = 2) -> float:
        """Halve."""
        return x / by

    assert (halved(3), halved(3, by=3), halved.__name__, halved.__doc__) == (1.5, 1.0, "halved", "Halve.")
