"""Experts compared on the same tokens, and a model scored without one of its experts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contract import Rows, unwrapped_modules
from ..convert.read.calls import hooked
from ..experts import Experts
from ..layers import MoELayer
from .foreign import every_expert, expert_tensors, foreign_routers
from .ranks import parallel, summed

SAMPLE = 128
"""Tokens on which experts are compared."""
MOST_EXPERTS = 256
"""Experts of a layer that are compared or left out one by one; of a million neurons no one asks."""


def experts_of(model: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    """Return the experts of each layer that are compared, ours and foreign, with their number, by dotted name.

    Experts that two layers share are listed under the first; a level of several has a name of its own.
    """
    named: dict[str, tuple[nn.Module, int]] = {}
    seen: set[nn.Module] = set()

    def put(name: str, experts: nn.Module, number: int | None) -> None:
        if experts not in seen and number is not None and 1 < number <= MOST_EXPERTS:
            seen.add(experts)
            named[name] = (experts, number)

    for name, layer in unwrapped_modules(model):
        if not isinstance(layer, MoELayer):
            continue
        experts = getattr(layer, "experts", None)
        if isinstance(experts, Experts):
            # FSDP2's shards are put together for the comparison; sharded experts stay where they are.
            divided = isinstance(getattr(layer, "dispatcher", None), parallel().AllToAllDispatcher)
            put(name, experts, None if divided else experts.num_experts)
        elif isinstance(experts, nn.ModuleList):
            for i, level in enumerate(experts):
                if isinstance(level, Experts):
                    put(f"{name}.level{i}".lstrip("."), level, level.num_experts)
    for name, router in foreign_routers(model).items():
        if router.experts is not None:
            put(name, router.experts, router.num_experts)
    return named


class Inputs:
    """Hooks that keep a few tokens of the first call of each layer's experts.

    Attributes:
        tokens: (at most ``SAMPLE``, D) tokens by the layer's name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.experts = model, experts_of(model)
        self.tokens: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Keep tokens of layers that have none yet, inside the ``with`` block."""
        wanted = [(name, experts) for name, (experts, _) in self.experts.items() if name not in self.tokens]
        hooks = []
        for name, experts in wanted:
            # A list of experts is not called itself: its members are, each with the tokens that chose it.
            heard = list(experts) if isinstance(experts, nn.ModuleList) else [experts]
            hooks += [m.register_forward_pre_hook(self._hook(name)) for m in heard]
        with hooked(hooks):
            yield

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, Rows) and args[1:] in ((), ("rows",)):
                live = int(x.offsets_E[-1])
                x_TD = x.x[:live] if x.gathered else x.x[x.row_index_R[:live].unique()]
            elif isinstance(x, Tensor) and (not isinstance(module, Experts) or args[1:2] in (("each",), ("merged",))):
                # Several inputs of the same tokens, or groups of tokens: the first of them.
                x_TD = x[0] if x.ndim == 3 and args[1:2] == ("each",) else x.reshape(-1, x.shape[-1])
            else:
                return
            kept = self.tokens.get(name)
            x_TD = x_TD[:: max(len(x_TD) // SAMPLE, 1)][:SAMPLE].detach().clone()
            kept = x_TD if kept is None else torch.cat((kept, x_TD))[:SAMPLE]
            if len(kept):
                self.tokens[name] = kept

        return hook

    @torch.no_grad()
    def distances(self, group: dist.ProcessGroup | None = None) -> dict[str, Tensor]:
        """Return, by layer, how far apart the experts' outputs are: float64 (E, E) on the CPU.

        The distance of two experts is ``sum ||f_i(x) - f_j(x)||^2 / sum (||f_i(x)||^2 + ||f_j(x)||^2)`` over the same
        tokens of all ranks: 0 if they compute the same, 1 if their outputs are unrelated. It is NaN if both outputs are
        zero. Experts that cannot be asked for every token are left out.

        Args:
            group: the ranks, all of which call it; None: all.
        """
        if not self.experts:
            return {}
        with parallel().whole_parameters(self.model):
            products = {name: self._of_layer(name) for name in self.experts}
        of_ranks = zip(products, summed([sums for sums, _ in products.values()], group), strict=True)
        # Without a token of any rank, or with experts that cannot be run, all inner products are 0.
        return {
            name: _distances(sums_EE).masked_fill(~products[name][1], torch.nan)
            for name, sums_EE in of_ranks
            if float(sums_EE.abs().sum())
        }

    def _of_layer(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the sums over this rank's tokens of the inner products of two experts' outputs, float64 (E, E), and
        which pairs of experts are compared, bool (E, E)."""
        experts, number = self.experts[name]
        if isinstance(experts, Experts):
            can = (
                not (experts.reads_context or experts.starts_alike)
                and type(experts).compute_rows is not Experts.compute_rows
            )
            # Experts without weights, such as ``Zero``, are alike by design.
            learned_E = torch.tensor([bool(experts.weights_of(e)) for e in range(number)])
        else:
            can, learned_E = True, torch.ones(number, dtype=torch.bool)
        x_TD, y_TED = self.tokens.get(name), None
        if x_TD is not None and can:
            x_TD = x_TD.to(next((p.dtype for p in experts.parameters()), x_TD.dtype))
            y_TED = experts(x_TD, "each") if isinstance(experts, Experts) else every_expert(experts, number, x_TD)
        products_EE = torch.zeros(number, number, dtype=torch.float64)
        if y_TED is not None:
            products_EE = _products(y_TED.double().cpu())
        return products_EE, learned_E[:, None] & learned_E[None, :]


def _products(y_TED: Tensor) -> Tensor:
    """Return the sums over tokens of the inner products of two experts' outputs, (E, E)."""
    return torch.einsum("ted,tfd->ef", y_TED, y_TED)


def _distances(products_EE: Tensor) -> Tensor:
    """Return the distances of experts, given the sums of the inner products of their outputs."""
    square_E = products_EE.diagonal()
    together_EE = square_E[:, None] + square_E[None, :]
    # Outputs that are only rounding do not count.
    return ((together_EE - 2 * products_EE) / together_EE).masked_fill(together_EE <= 1e-12 * square_E.max(), torch.nan)


@contextlib.contextmanager
def without_expert(experts: nn.Module, num_experts: int, e: int) -> Iterator[None]:
    """Set every parameter of one expert to zero inside the ``with`` block, so that it adds nothing to any token."""
    if isinstance(experts, Experts):
        parts = [t for t in experts.weights_of(e).values() if t.is_floating_point()]
    else:
        parts = expert_tensors(experts, num_experts, e)
    with torch.no_grad():
        kept = [t.clone() for t in parts]
        try:
            for t in parts:
                t.zero_()
            yield
        finally:
            for t, value in zip(parts, kept, strict=True):
                t.copy_(value)


def ablate_experts(model: nn.Module, score: Callable[[], float]) -> Mapping[str, tuple[float, ...]]:
    """Return the score of a model without each of its experts, by layer: the tokens of an expert lose its output.

    No token is sent to another expert instead: this measures the expert's contribution. The weights are put back.

    Args:
        model: any module with MoE layers, ours or foreign. Experts that two layers share are taken out of both.
        score: runs the model as it is and returns a number, such as a loss on fixed batches.

    Raises:
        ValueError: the model has no experts to leave out, or a layer has more than ``MOST_EXPERTS``.

    Example::

        without = core.ablate_experts(model, lambda: float(loss(model(x), y)))
    """
    named = {
        name: (experts, number)
        for name, (experts, number) in experts_of(model).items()
        if not isinstance(experts, Experts) or experts.num_local_experts == number
    }
    if not named:
        raise ValueError(
            f"a {type(model).__name__} has no MoE layer of 2 to {MOST_EXPERTS} experts that are all on this process"
        )
    scores: dict[str, tuple[float, ...]] = {}
    for name, (experts, number) in named.items():
        of_layer = []
        for e in range(number):
            with without_expert(experts, number, e):
                of_layer.append(float(score()))
        scores[name] = tuple(of_layer)
    return scores
