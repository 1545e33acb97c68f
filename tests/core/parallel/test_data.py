"""Trainings on two and four gloo ranks, however the model is divided, against one process with all tokens."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from made_once import made_once
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from two_ranks import on_ranks, results

import core
from core import FFN, MMoE, MoEConfig, RoutingContext, SwiGLU, TokenChoice, aux_loss, record, update_expert_bias
from core.parallel import (
    blocks_of,
    clip_grad_norm,
    copy_part,
    expert_mesh,
    experts_part,
    local_part,
    shard_data,
    shard_experts,
    sharded_modules,
    total_norm,
)

D, STEPS = 8, 8
BALANCE = core.Balance(load_balancing_loss=0.1, router_z_loss=0.01)
LAYERS: dict[str, MoEConfig | MMoE] = {
    "dropless": MoEConfig(4, TokenChoice(2), FFN(6, bias=True), balance=BALANCE),
    "capacity": MoEConfig(4, TokenChoice(2), FFN(6), balance=BALANCE, capacity_factor=0.75, group="sequence"),
    "shared experts": MoEConfig(4, TokenChoice(2), SwiGLU(6), balance=BALANCE, num_shared_experts=1, shared_gate="mix"),
    "expert bias": MoEConfig(4, TokenChoice(1, expert_bias=True, bias_update_rate=0.01), FFN(6), balance=BALANCE),
    "tasks": MMoE(4, FFN(6), TokenChoice(2), balance=BALANCE),
}


@dataclass(frozen=True)
class Division:
    """Ranks along the axes of the mesh, whether the rest of the model is sharded, and the layers that are tried."""

    experts: int
    shards: int = 1
    shard: bool = True
    layers: tuple[str, ...] = ("dropless",)
    nodes: int = 1
    hidden: int = 1
    static: bool = False

    def mesh(self) -> DeviceMesh:
        return expert_mesh(self.experts, self.shards, nodes=self.nodes, hidden=self.hidden)


DIVISIONS = {
    2: {
        "experts": Division(2, shard=False, layers=tuple(LAYERS)),
        "experts, rest sharded": Division(2, layers=("dropless", "tasks")),
        "shards": Division(1, 2),
        "copies": Division(1, shard=False, layers=("dropless", "expert bias")),
    },
    4: {
        "experts": Division(4),
        "experts and shards": Division(2, 2, layers=("dropless", "capacity")),
        "experts and replicas": Division(2, shard=False, layers=("dropless", "shared experts")),
        "nodes": Division(2, nodes=2, layers=("dropless", "tasks")),
        "nodes, static": Division(2, nodes=2, layers=("capacity",), static=True),
        "hidden units": Division(2, hidden=2, layers=("capacity", "shared experts")),
        "hidden units, static": Division(2, hidden=2, layers=("capacity",), static=True),
    },
}
CASES = [(world, how, name) for world, hows in DIVISIONS.items() for how in hows for name in hows[how].layers]


class Net(nn.Module):
    """A block between linear layers."""

    def __init__(self, config: MoEConfig | MMoE) -> None:
        super().__init__()
        build = config.build if isinstance(config, MoEConfig) else partial(config.build, num_tasks=2)
        self.stem, self.head = nn.Linear(D, D), nn.Linear(D, D)
        self.blocks = nn.ModuleList([build(D)])

    def forward(self, x: Tensor, context: RoutingContext) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            y = block(x, context)
            x = x + (y if y.ndim == x.ndim else y.mean(0))
        return self.head(x)


def net(name: str) -> Net:
    torch.manual_seed(0)
    return Net(LAYERS[name])


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(2, 8, 4, D, generator=generator)
    return x, y


def trained(model: nn.Module, rank: int, world: int) -> dict[str, Tensor]:
    """Train on this rank's sequences, all of them for one rank; return losses, norms, gradients and parameters."""
    losses, norms, gradients = [], [], {}
    for step in range(STEPS):
        x, y = (t.chunk(world)[rank] for t in batch(step))
        with record(model) as tape:
            loss = (model(x, RoutingContext()) - y).square().mean()
        aux = aux_loss(tape)
        (loss + aux).backward()
        gradients = gradients or {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        norms.append(clip_grad_norm(model.parameters(), 0.5) if world > 1 else clipped(model))
        descend(model)
        update_expert_bias(model, tape)
        losses.append(torch.stack((loss.detach(), aux.detach())))
    state = {name: whole(value) for name, value in model.state_dict().items()}
    return {"losses": torch.stack(losses), "norms": torch.stack(norms), "gradients": gradients, "state": state}


def descend(model: nn.Module, rate: float = 0.3) -> None:
    """Take a step of gradient descent, each rank on its own parts: an optimizer's first step on a ``DTensor`` of four
    axes takes seconds. A wrong scale of a gradient changes this step, as it does not Adam's."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                local_part(parameter).sub_(local_part(parameter.grad), alpha=rate)
            parameter.grad = None


def clipped(model: nn.Module) -> Tensor:
    return nn.utils.clip_grad_norm_(model.parameters(), 0.5)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def divided(name: str, how: Division) -> Net:
    model, mesh = net(name), how.mesh()
    part = experts_part(mesh)
    if part is not None:
        shard_experts(model, part, static=how.static)
    shard_data(model, mesh, shard=how.shard)
    return model


def work(rank: int, world: int) -> dict[str, object]:
    runs = {}
    for how, division in DIVISIONS[world].items():
        for name in division.layers:
            model = divided(name, division)
            runs[how, name] = trained(model, rank, world)
            parts = [p for block in model.blocks for p in block.experts.parameters()]
            runs[how, name]["expert numbers"] = torch.tensor(sum(local_part(p).numel() for p in parts))
    of_pairs = losses_of_pairs(rank) if world == 4 else {}
    return {"runs": runs, "refused": refusals(world), "copied": copies(rank, world), "pairs": of_pairs}


def pair_net(pair: int) -> nn.ModuleDict:
    """A model of two pipeline stages, of which each pair of ranks has one: its layer has a name of its own."""
    torch.manual_seed(pair)
    router = TokenChoice(1, expert_bias=True, bias_update_rate=0.125)
    return nn.ModuleDict({f"stage{pair}": MoEConfig(4, router, FFN(6), balance=BALANCE).build(D)})


def losses_of_pairs(rank: int, world: int = 4) -> dict[str, Tensor]:
    """Return loss, bias and counts of the stage of this rank's pair; with a world of 2, over the pair's whole batch."""
    pair = rank // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])] if world == 4 else [None, None]
    model, x = pair_net(pair), batch(pair)[0]
    x, layer = x.chunk(2)[rank % 2] if world == 4 else x, model[f"stage{pair}"]
    with record(model) as tape:
        layer(x)
    aux = aux_loss(tape, groups[pair])
    stats = core.RoutingStats.from_tape(tape).all_reduce(groups[pair]).layers[f"stage{pair}"]
    update_expert_bias(model, tape, groups[pair])
    bias = layer.router.expert_bias
    return {"aux": aux.detach(), "bias": bias.clone(), "counts": stats.tokens_per_expert.clone()}


def refusals(world: int) -> list[str]:
    said = []
    for call in (lambda: expert_mesh(3), lambda: expert_mesh(2, 1, 3), lambda: shards_of_copies(world)):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def shards_of_copies(world: int) -> None:
    shard_data(net("dropless"), expert_mesh(1, world), shard=False)


def copies(rank: int, world: int) -> bool:
    """Whether a tensor's parts, copied by ``copy_part``, make the whole again, and its norm is the whole's."""
    model, others, same = divided("dropless", DIVISIONS[world]["experts"]), net("capacity"), True
    for own, other in zip(model.parameters(), [*net("dropless").parameters()], strict=True):
        new = torch.randn(other.shape, generator=torch.Generator().manual_seed(1))
        target = copy_part(torch.empty_like(own.detach()), new)
        same &= torch.equal(whole(target), new)
        same &= torch.isclose(total_norm([target]), new.norm()).item()
    assert not list(sharded_modules(others))
    return bool(same)


@pytest.fixture(scope="module")
def of_world(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict]]:
    folders = {
        world: made_once(tmp_path_factory, f"ranks{world}", partial(on_ranks, partial(work, world=world), world=world))
        for world in DIVISIONS
    }
    return {world: results(folder, world) for world, folder in folders.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, dict]:
    return {name: trained(net(name), 0, 1) for name in LAYERS}


@pytest.mark.parametrize("world, how, name", CASES)
def test_eight_steps_on_ranks_equal_those_of_one_process(of_world, expected, world, how, name):
    runs, one = [of_rank["runs"][how, name] for of_rank in of_world[world]], expected[name]
    task = torch.stack([run["losses"][:, 0] for run in runs]).mean(0)
    assert_close(task, one["losses"][:, 0], rtol=1e-5, atol=0)
    for run in runs:
        assert_close(run["losses"][:, 1], one["losses"][:, 1], rtol=1e-5, atol=0)
        assert_close(run["norms"], one["norms"], rtol=1e-5, atol=0)
        for part in ("gradients", "state"):
            assert run[part].keys() == one[part].keys()
            for key, value in one[part].items():
                error = (run[part][key] - value).norm() / value.norm().clamp_min(1e-12)
                assert error < 1e-5, f"{part} of {key}: {error:.1e}"


def test_sums_of_a_group_are_those_of_its_ranks_alone(of_world):
    for rank, of_rank in enumerate(of_world[4]):
        one = losses_of_pairs(2 * (rank // 2), world=2)
        assert_close(of_rank["pairs"]["aux"], one["aux"], rtol=1e-6, atol=0)
        assert torch.equal(of_rank["pairs"]["bias"], one["bias"])
        assert torch.equal(of_rank["pairs"]["counts"], one["counts"])


@pytest.mark.parametrize("world", DIVISIONS)
def test_a_rank_holds_its_share_of_the_experts(of_world, world):
    # An expert of two layers (8, 6) and (6, 8) with biases 6 and 8 has 110 numbers; there are 4.
    for how, division in DIVISIONS[world].items():
        if "dropless" not in division.layers:
            continue
        for of_rank in of_world[world]:
            ranks = division.nodes * division.experts * (division.shards if division.shard else 1)
            assert of_rank["runs"][how, "dropless"]["expert numbers"] == 4 * 110 // ranks


@pytest.mark.parametrize("world", DIVISIONS)
def test_meshes_that_do_not_fit_are_refused(of_world, world):
    for of_rank in of_world[world]:
        assert of_rank["copied"]
        assert of_rank["refused"] == [
            f"experts=3 does not divide the {world} ranks",
            f"replicas=3 x experts=2 is 6, and there are {world} ranks",
            f"shards={world} with shard=False: copies are not sharded",
        ]


def test_the_blocks_of_a_model_are_the_members_of_its_outermost_lists():
    model = net("dropless")
    assert blocks_of(model) == []  # one member repeats nothing
    tower = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    assert blocks_of(nn.ModuleDict({"tower": tower})) == [tower[0], tower[2]]  # ReLU has no parameters
