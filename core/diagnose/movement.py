"""``TrainingStart``: a few weights of a model at the start of a training, and how far each part has moved from them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contract import unwrapped_modules
from ..experts import Experts
from ..experts.base import local_tensor
from ..layers import MoELayer
from .alike import MOST_EXPERTS
from .foreign import foreign_routers
from .ranks import summed

KEPT = 1024
"""Most numbers that are kept of a parameter."""


@dataclass(frozen=True)
class Moved:
    """The root mean square change of a layer's weights.

    Attributes:
        router, experts: of the tensor that moved most; None: there is none that trains.
        rest: the median over the matrices outside of MoE layers and tables of embeddings; None: there are none.
    """

    router: float | None
    experts: float | None
    rest: float | None


class TrainingStart:
    """Some weights of a model, by name. Make it before the first step: ``core.TrainingStart(model)``.

    Args:
        model: any module with MoE layers, ours or foreign.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kept = {name: _sample(p) for name, p in _parameters(model).items() if p.requires_grad and not p.is_meta}

    @torch.no_grad()
    def moved(self, model: nn.Module, group: dist.ProcessGroup | None = None) -> dict[str, Moved]:
        """Return how far each MoE layer has moved, by its name. Weights of other shapes than at the start are left out.

        Every rank calls it: each has its shard of the sharded tensors.

        Args:
            model: the model that ``TrainingStart`` was made of, or a copy of it, trained.
            group: the ranks; None: all.
        """
        parameters = {name: p for name, p in _parameters(model).items() if name in self.kept}
        squares = [_square(self.kept[name], _sample(p)) for name, p in parameters.items()]
        of_ranks = zip(parameters, summed(squares, group), strict=True)
        distance = {name: float((square / count).sqrt()) for name, (square, count) in of_ranks if count > 0}
        layers = _layers(model)
        inside = tuple(f"{part}." for _, parts in layers.values() for part in parts)
        matrices = _matrices(model)
        rest = [d for name, d in distance.items() if name in matrices and not name.startswith(inside)]
        moved = {}
        for layer, ((router, experts), _) in layers.items():
            of_router = [d for name, d in distance.items() if router and name.startswith(f"{router}.")]
            of_experts = [d for name, d in distance.items() if experts and name.startswith(f"{experts}.")]
            moved[layer] = Moved(
                max(of_router, default=None), max(of_experts, default=None), median(rest) if rest else None
            )
        return moved


def _square(before: Tensor, now: Tensor) -> Tensor:
    """Return the sum of the squares of a movement and the count of its numbers, float64 (2,); 0 for other shapes."""
    moved = (now - before).double() if before.shape == now.shape else now.new_zeros(0, dtype=torch.float64)
    return torch.stack((moved.square().sum(), torch.tensor(float(moved.numel()), dtype=torch.float64)))


def _sample(p: Tensor) -> Tensor:
    """Return at most ``KEPT`` numbers of a parameter, evenly spaced, float32 on the CPU."""
    flat = local_tensor(p.detach()).reshape(-1)
    step = max(flat.numel() // KEPT, 1) | 1  # odd, so that it does not walk along one column of a matrix
    return flat[::step][:KEPT].float().cpu().clone()


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by their names without wrappers, each under its first name."""
    named: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in unwrapped_modules(model):
        for key, p in module._parameters.items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                named[f"{name}.{key}".lstrip(".")] = p
    return named


def _matrices(model: nn.Module) -> set[str]:
    """Return the names of the weights of linear layers and convolutions. Rows of a table move when they are looked up.

    A table is a module, or a part of one, with "embed" in its name.
    """
    return {
        name
        for name, p in _parameters(model).items()
        if p.ndim >= 2 and "embed" not in name.lower() and "norm" not in name.lower()
    } - {
        f"{name}.weight"
        for name, m in unwrapped_modules(model)
        if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) or "embedding" in type(m).__name__.lower()
    }


def _layers(model: nn.Module) -> dict[str, tuple[tuple[str, str], tuple[str, ...]]]:
    """Return by layer the dotted names of its router and its experts ("" if it has none), and the modules inside."""
    layers: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {}

    def below(name: str, part: str) -> str:
        return f"{name}.{part}".lstrip(".")

    for name, m in unwrapped_modules(model):
        if isinstance(m, MoELayer):
            experts = getattr(m, "experts", None)
            few = not isinstance(experts, Experts) or experts.num_experts <= MOST_EXPERTS
            inside = tuple(below(name, child) for child, _ in m.named_children())
            layers[name] = ((below(name, "router"), below(name, "experts") if few else ""), inside)
    names = {id(m): name for name, m in unwrapped_modules(model)}
    for name, foreign in foreign_routers(model).items():
        router = names[id(foreign.module)]
        experts_name = "" if foreign.experts is None else names[id(foreign.experts)]
        # If the block itself outputs the logits, its parameters are not told apart.
        layers[name] = (("" if router == name else router, experts_name), (name,))
    return layers
