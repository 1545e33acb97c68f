"""Two gloo ranks against one process that sees both ranks' tokens: gradients, losses and bias steps are the same.

One spawn runs every scenario; each test reads the outcome of its own.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from two_ranks import WORLD, on_two_ranks

import core
from core import FFN, Balance, MoEConfig, TokenChoice, active_params, aux_losses, record, update_expert_bias
from core.routing.balance.terms import TERMS

# Every term, so heavy that the aux loss makes most of the gradient; but for the contrast of a rank's own rows.
WEIGHTS = {name: 0.1 if name == "router_z_loss" else 1.0 for name in TERMS if name != "contrast"}
BALANCE = Balance(**WEIGHTS, expert_types=(0, 0, 1, 1))
# "fsdp": fully_shard of each block and the root.
WRAPS = ("ddp", "fsdp")

Outcome = dict[str, Tensor]


class Net(nn.Module):
    """Two residual MoE blocks with noise on the logits and a gated shared expert, maybe checkpointed. Without noise the
    losses take their sums from the fused gate, where the backend has one."""

    def __init__(self, noise: str | None, checkpointed: bool = False, backend: str = "auto") -> None:
        super().__init__()
        router = TokenChoice(2, noise=noise, noise_std=4.0, init_scale=1.0)
        balance = BALANCE if noise else replace(BALANCE, load=0.0)
        shared = {"num_shared_experts": 1, "shared_gate": "mix"}
        config = MoEConfig(4, router, FFN(12), **shared, balance=balance, backend=backend)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([config.build(8), config.build(8)])
        self.checkpointed = checkpointed

    def forward(self, x: Tensor, context: core.RoutingContext) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = checkpoint(block, x, context, use_reentrant=False) if self.checkpointed else block(x, context)
            x = x + y
        return x


@contextmanager
def noise_of_the_token() -> Iterator[None]:
    """Noise that is a function of the token: the same however the tokens are split over ranks."""

    def noise(logits: Tensor) -> Tensor:
        return (3 * logits.detach()).sin()

    with mock.patch.object(torch, "randn_like", noise):
        yield


def batch(micro: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens (4, 6, 8) and their validity. The ranks' halves have other means and other numbers of real tokens."""
    g = torch.Generator().manual_seed(10 + micro)
    x = torch.randn(4, 6, 8, generator=g)
    x[2:] += 1.0
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[3, 1:] = False
    return x, valid


def model(noise: str | None, checkpointed: bool = False, backend: str = "auto") -> Net:
    torch.manual_seed(0)
    return Net(noise, checkpointed, backend)


def run(net: nn.Module, x: Tensor, valid: Tensor, factor: float = 1.0) -> Outcome:
    """Forward and backward of task and aux loss; the loss and its terms."""
    with noise_of_the_token(), record(net) as tape:
        # The task of a sequence is a function of it: the same however the batch is split over ranks.
        y = net(x, core.RoutingContext(valid_BS=valid, task_ids_B=(x[:, 0, 0] > 0).long()))
        losses = aux_losses(tape)
        ((y.square().mean() + losses.total) * factor).backward()  # inside both: a checkpoint draws the noise again
    assert len(tape) == 2
    return {"aux": losses.total.detach(), **losses.terms}


def gradients(net: nn.Module) -> Outcome:
    grads = {}
    for name, p in net.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        grads[name.removeprefix("module.")] = grad.clone()
    return grads


def share_of(tensors: tuple[Tensor, ...], rank: int) -> list[Tensor]:
    """This rank's half of the batch; the whole one where ``rank`` is -1."""
    return list(tensors) if rank < 0 else [t.chunk(WORLD)[rank] for t in tensors]


def wrap(net: Net, kind: str) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(net)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (WORLD,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(net, mesh=mesh)
    return net


def one_step(rank: int, kind: str, noise: str, checkpointed: bool = False, factor: float = 1.0) -> Outcome:
    net = wrap(model(noise, checkpointed), kind)
    return run(net, *share_of(batch(), rank), factor) | gradients(net)


def accumulation(rank: int, kind: str) -> Outcome:
    """Two micro-batches, gradients synchronized with the second one."""
    net = wrap(model("fixed"), kind)
    with net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext():
        run(net, *share_of(batch(0), rank), 0.5)
    run(net, *share_of(batch(1), rank), 0.5)
    return gradients(net)


def stepped(rank: int, kind: str, router: core.RouterConfig, halves: list[Tensor]) -> core.MoE:
    """Return a layer whose logits are the tokens after one step: of a rank's half, of both in one process."""
    width = halves[0].shape[-1]
    layer = MoEConfig(width, router).build(width)
    layer.router.gate.weight.data.copy_(torch.eye(width))
    net = DistributedDataParallel(layer) if kind == "ddp" else layer
    with record(net) as tape:
        net(torch.cat(halves) if rank < 0 else halves[rank])
    update_expert_bias(net, tape)
    return layer


def bias_step(rank: int, kind: str) -> Outcome:
    """Rank 0 sends 4 tokens to expert 0, rank 1 sends 6 to expert 1; one process sees all ten."""
    router = TokenChoice(1, expert_bias=True, bias_update_rate=0.125)
    layer = stepped(rank, kind, router, [torch.eye(3)[[0] * 4], torch.eye(3)[[1] * 6]])
    return {"bias": layer.router.expert_bias.clone()}


def l1_step(rank: int, kind: str) -> Outcome:
    """Rank 0 sends 4 tokens that take both experts, rank 1 sends 12 that take none; one process sees all 16."""
    router = core.ReLURouting(1, l1_start=0.5, l1_factor=2.0)
    return {"weight": stepped(rank, kind, router, [torch.ones(4, 2), -torch.ones(12, 2)]).router.l1_weight.clone()}


def idle_rank(rank: int, kind: str) -> Outcome:
    """Rank 1 has padding alone."""
    x, valid = batch()
    valid[2:] = False
    net = wrap(model("fixed"), kind)
    return run(net, *share_of((x, valid), rank)) | gradients(net)


def fused_gate(rank: int, kind: str) -> Outcome:
    """The Triton backend, checkpointed; one process computes by the oracle."""
    backend = "eager" if rank < 0 else "triton"
    net = wrap(model(None, True, backend), kind)
    return run(net, *share_of(batch(), rank)) | gradients(net)


class Towers(nn.Module):
    """Layers of three experts whose logits are the tokens; ``passes`` names those that run."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        config = MoEConfig(3, TokenChoice(1), FFN(4), **options)
        self.towers = nn.ModuleDict({name: config.build(3) for name in ("a", "b")})
        for tower in self.towers.values():
            tower.router.gate.weight.data.copy_(torch.eye(3))

    def forward(self, x: Tensor, passes: str) -> None:
        for name in passes:
            self.towers[name](x)


# Passes of rank 0 and rank 1, and what both say; None: the losses.
PASSES = {
    "one layer each": (("a", "b"), r"'towers.a' \(1 and 0 times\), 'towers.b' \(0 and 1 times\)"),
    "twice and once": (("aab", "ab"), r"'towers.a' \(2 and 1 times\); run these layers alike"),
    "one and none": (("b", ""), r"'towers.b' \(1 and 0 times\); run .* or give them Balance\(scope='rank'\)"),
    "in another order": (("ab", "ba"), None),
    "none at all": (("", ""), None),
}
TOKENS = (torch.eye(3)[None, [0, 0, 0, 1]], torch.eye(3)[None, [1, 1]])


def other_passes(rank: int, name: str, scope: str = "global") -> str | Tensor:
    """Return the loss of this rank's passes, or the error; for -1 that of both ranks' passes in one process."""
    passes, _ = PASSES[name]
    net = Towers(balance=Balance(load_balancing_loss=1.0, router_z_loss=0.0, scope=scope))
    with record(net) as tape:
        if rank < 0:
            net(torch.cat(TOKENS, 1), passes[0])
        else:
            net(TOKENS[rank], passes[rank])
    try:
        return aux_losses(tape).total.detach()
    except RuntimeError as error:
        return str(error)


# Layers of rank 0 and rank 1 with their numbers of experts, and what both say; None: nothing.
LAYERS: dict[str, tuple[tuple[dict[str, int], ...], str | None]] = {
    "one layer each": (({"a": 4}, {"b": 4}), r"'a' \(1 and 0 times\), 'b' \(0 and 1 times\)"),
    "one and none": (({"a": 4}, {}), r"'a' \(1 and 0 times\)"),
    "other experts": (({"a": 4}, {"a": 8}), "in another order, or of other sizes"),
    "other order": (({"a": 4, "b": 4}, {"b": 4, "a": 4}), "in another order, or of other sizes"),
    "the same": (({"a": 4, "b": 8}, {"a": 4, "b": 8}), None),
    "none at all": (({}, {}), None),
}


def other_layers(rank: int, name: str) -> tuple[str, list[list[float]]]:
    """Return the error of ``update_expert_bias``, or "", and the biases after it. Each rank has layers of its own, as
    in a pipeline; rank 0 sends 8 tokens to expert 0 and rank 1 to expert 1."""
    layers, _ = LAYERS[name]
    router = TokenChoice(1, expert_bias=True, bias_update_rate=0.125)
    net = nn.ModuleDict({key: MoEConfig(E, router, FFN(4)).build(E) for key, E in layers[rank].items()})
    with record(net) as tape:
        for layer in net.values():
            E = layer.num_experts
            layer.router.gate.weight.data.copy_(torch.eye(E))
            layer(torch.eye(E)[[rank] * 8])
    try:
        update_expert_bias(net, tape)
        message = ""
    except RuntimeError as error:
        message = str(error)
    return message, [layer.router.expert_bias.tolist() for layer in net.values()]


def sharded_params(rank: int) -> tuple[int, int]:
    """Active parameters of blocks under FSDP, whose parameters are sharded by rows, and of the same ones whole."""
    whole, net = model("fixed"), model("fixed")
    wrap(net, "fsdp")
    local = sum(p.to_local().numel() for p in net.parameters())
    assert local < sum(p.numel() for p in net.parameters())
    return active_params(net), active_params(whole)


def telemetry(rank: int) -> list[dict[str, float]]:
    """Figures by layer over both ranks' tokens, where tower b ran on rank 1 alone; those of one process for -1."""
    net = Towers()
    with record(net) as tape:
        if rank < 0:
            net(torch.cat(TOKENS, 1), "a")
            net(TOKENS[1], "b")
        else:
            net(TOKENS[rank], ("a", "ab")[rank])
    stats = core.RoutingStats.from_tape(tape).all_reduce().layers
    assert all(not s.chosen_per_expert.is_floating_point() for s in stats.values())
    return [stats[f"towers.{name}"].figures() for name in "ab"]


SCENARIOS: dict[str, Callable[[int, str], Outcome]] = {
    "fixed": lambda rank, kind: one_step(rank, kind, "fixed"),
    "learned": lambda rank, kind: one_step(rank, kind, "learned"),
    "checkpointed": lambda rank, kind: one_step(rank, kind, "fixed", checkpointed=True),
    "scaled": lambda rank, kind: one_step(rank, kind, "fixed", factor=2.0**16),
    "accumulation": accumulation,
    "idle rank": idle_rank,
    "bias": bias_step,
    "l1": l1_step,
}
if importlib.util.find_spec("triton"):
    SCENARIOS["fused gate"] = fused_gate
CASES = [
    (name, kind)
    for name in SCENARIOS
    for kind in WRAPS
    if (name, kind) not in {("accumulation", "fsdp"), ("bias", "fsdp"), ("l1", "fsdp")}
]


def work(rank: int) -> dict[str, object]:
    losses = {name: other_passes(rank, name) for name in PASSES}
    return {
        "steps": {case: SCENARIOS[case[0]](rank, case[1]) for case in CASES},
        "losses": losses | {"by rank": other_passes(rank, "one and none", "rank")},
        "layers": {name: other_layers(rank, name) for name in LAYERS},
        "params": sharded_params(rank),
        "figures": telemetry(rank),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict]]:
    """The results of ``work`` on each rank."""
    return on_two_ranks(work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name, kind", [case for case in CASES if case[0] not in ("bias", "l1")])
def test_two_ranks_equal_one_process_on_the_whole_batch(ranks, name, kind):
    expected = SCENARIOS[name](-1, "none")
    for rank in range(WORLD):
        actual = ranks[rank]["steps"][name, kind]
        assert actual.keys() == expected.keys()
        for key, tensor in expected.items():
            bound = 1e-6 * max(1.0, tensor.abs().max().item())
            error = (actual[key] - tensor).abs().max().item()
            assert error <= bound, f"rank {rank}, {key}: off by {error:.1e} of {tensor.abs().max().item():.1e}"


def test_a_step_follows_the_loads_of_all_ranks(ranks):
    # Loads 4, 6, 0 around 10/3. Rank 0 alone would raise expert 1: 4, 0, 0 around 4/3.
    # 8 positive gates of 32, below K / E = 1/2: the weight is halved. Rank 0 alone (8 of 8) would double it, and the
    # mean of the ranks' shares, 1/2, would leave it.
    moved = [(bias_step(-1, "none"), l1_step(-1, "none"))]
    moved += [(rank["steps"]["bias", "ddp"], rank["steps"]["l1", "ddp"]) for rank in ranks]
    for bias, l1 in moved:
        assert bias["bias"].tolist() == [-0.125, -0.125, 0.125]
        assert l1["weight"].item() == 0.25


def test_a_scaled_loss_scales_gradients_on_every_rank_exactly(ranks):
    for kind in WRAPS:
        for name, grad in ranks[0]["steps"]["fixed", kind].items():
            if "." in name:  # parameters; the logged losses are not scaled
                assert torch.equal(ranks[0]["steps"]["scaled", kind][name], grad * 2.0**16), name


@pytest.mark.parametrize("name", PASSES)
def test_ranks_with_different_passes_all_say_so_and_none_waits(ranks, name):
    losses = [each["losses"][name] for each in ranks]
    _, message = PASSES[name]
    if message is None:
        expected = other_passes(-1, name)
        for loss in losses:
            torch.testing.assert_close(loss, expected)
    else:
        for error in losses:
            assert re.search(f"^the ranks recorded different passes, .*: {message}", error), error
            assert "\n" not in error


@pytest.mark.parametrize("name", LAYERS)
def test_ranks_with_different_layers_all_say_so_and_move_no_bias(ranks, name):
    for rank in range(WORLD):
        error, biases = ranks[rank]["layers"][name]
        layers, message = LAYERS[name]
        if message is None:
            assert error == ""
            # Loads 8, 8, 0, 0 around 4, or 8, 8 and six times 0 around 2.
            assert biases == [[-0.125, -0.125, *[0.125] * (E - 2)] for E in layers[rank].values()]
        else:
            assert re.search(f"^the ranks train different layers, .*: {message}; every rank needs", error), error
            assert "\n" not in error
            assert biases == [[0.0] * E for E in layers[rank].values()]


def test_sharded_parameters_count_as_whole_and_losses_by_rank_may_be_of_different_passes(ranks):
    # Stem 8 * 8 + 8; a block: gate 8 * 4, shared gate 8, experts of 2 * 8 * 12 = 192, of which a token takes 2 of 4
    # and the shared one.
    by_hand = 72 + 2 * (32 + 8 + 3 * 192)
    assert [each["params"] for each in ranks] == [(by_hand, by_hand)] * WORLD
    layer = Towers(balance=Balance(load_balancing_loss=1.0, router_z_loss=0.0))
    with record(layer) as tape:
        layer(TOKENS[0], "b")
    torch.testing.assert_close(ranks[0]["losses"]["by rank"], aux_losses(tape).total.detach())
    assert ranks[1]["losses"]["by rank"] == 0


def test_figures_are_those_of_the_ranks_tokens_together(ranks):
    expected = telemetry(-1)
    # Tower a has loads 3, 1, 0 and 0, 2, 0: 3, 3, 0 around 2. The mean of the ranks' own figures would be
    # (3 / (4 / 3) + 2 / (2 / 3)) / 2 = 2.625, and (1 + 2) / 2 dead experts.
    assert (expected[0]["load_imbalance"], expected[0]["dead_experts"]) == (1.5, 1.0)
    for each in ranks:
        for figures, whole in zip(each["figures"], expected, strict=True):
            assert figures == pytest.approx(whole)
