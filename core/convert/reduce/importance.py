"""``unit_importances`` measures how much a loss depends on each hidden unit of feed-forward networks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...contract.checks import check_tensor
from ..build.sparsify import matching_parts
from ..read.calls import evaluating, naming_module
from ..read.feed_forward import FeedForwardPart
from ..read.readers import read_ffn


def unit_importances(
    model: nn.Module,
    modules: str | Sequence[str],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Return how much a loss depends on each hidden unit of feed-forward networks, for ``SplitStart("importance")``.

    The importance of a unit is the sum over batches of ``|w . dloss/dw|``, to first order the change of the loss if
    the unit were gone. ``w`` are the weights of the unit in all matrices: its columns of ``w_in`` and ``w_gate``, and
    its row of ``w_out`` (MoEBERT, arXiv 2204.07675, which sums over single examples: give batches of one for this).

    Args:
        model: any module. It runs in evaluation; its modes and gradients are as before afterwards.
        modules: pattern of the networks' names, or several, as in ``core.sparsify``.
        batches: a few, such as a hundred examples.
        loss: returns the loss () of the model on a batch.

    Returns:
        the importances (F,) by the network's name, float32 on the CPU.

    Raises:
        ValueError: as ``core.sparsify`` of the patterns; a network without hidden units; no batch is given; or the loss
            is not a single number, or does not depend on a network.

    Example::

        importances = core.convert.unit_importances(model, "blocks.*.mlp", loader, lambda model, batch: ...)
        start = core.convert.SplitStart("importance", shared=64)
        sparse = core.sparsify(model, moe, "blocks.*.mlp", start, importances=importances)
    """
    parts = matching_parts(model, modules)
    networks = {name: model.get_submodule(name) for name in parts}
    sums: dict[str, Tensor] = {}
    for name, part in parts.items():
        with naming_module(name):
            sums[name] = torch.zeros(part.hidden_dim)
    own = {name: list(part.replaced_in(networks[name]).parameters()) for name, part in parts.items()}
    every = [p for parameters in own.values() for p in parameters]
    reached: set[str] = set()
    with evaluating(model), torch.enable_grad():
        for batch in batches:
            value = loss(model, batch)
            _check_loss(value)
            slopes = torch.autograd.grad(value.sum(), every, allow_unused=True)
            slope_of = {p: slope for p, slope in zip(every, slopes, strict=True) if slope is not None}
            for name, parameters in own.items():
                if any(p in slope_of for p in parameters):
                    reached.add(name)
                    sums[name] += _products(networks[name], parts[name], slope_of).abs()
    for name in networks:
        if name not in reached:
            raise ValueError(f"module {name!r}: the loss of no batch depends on it")
    return sums


def _check_loss(value: object) -> None:
    """Raise a ``ValueError`` if a value is not a loss with gradients."""
    check_tensor("the loss of a batch", value)
    assert isinstance(value, Tensor)
    if value.numel() != 1:
        raise ValueError(f"the loss of a batch has shape {tuple(value.shape)}, and is not one number")
    if not value.requires_grad:
        raise ValueError("the loss of a batch has no gradient: it is detached, or was taken without one")


@torch.no_grad()
def _products(module: nn.Module, part: FeedForwardPart, slope_of: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """Return ``w . dloss/dw`` of each hidden unit, float32 (F,) on the CPU.

    Args:
        module, part: the network, and its description.
        slope_of: gradients by parameter; one that is missing is zero.
    """
    # A copy with the gradients in the parameters' places is read as the network is, whatever its layout.
    slopes = copy.deepcopy(module)
    for parameter, slope in zip(module.parameters(), slopes.parameters(), strict=True):
        slope.copy_(slope_of.get(parameter, torch.zeros_like(parameter)))
    read = read_ffn(slopes)
    assert read is not None
    total_F = torch.zeros(part.hidden_dim)
    for name in ("w_in", "w_gate", "w_out"):
        if name in part.weights:
            product = (part.weights[name].float() * read.weights[name].float()).cpu()
            total_F += product.sum(1 if name == "w_out" else 0)
    return total_F
