"""Several trained models of one architecture as one: their mean, or a sparse model with their networks as experts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...config import MoEConfig
from ...experts import FFN
from ...fields import check_values
from ...routing.gates import LinearGate
from ..build.sparse_ffn import SparseFFN
from ..build.sparsify import matching_parts, sparsify
from ..read.calls import call, evaluating, hooked
from ..read.feed_forward import copy_weights

State = Mapping[str, Tensor]


@torch.no_grad()
def average_models(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """Return a model whose parameters are the mean of several models' (Branch-Train-Merge, arXiv 2208.03306).

    The models have one architecture, and are best trained on from one checkpoint, each on a domain of its own. With
    weights a domain counts more, such as by its posterior of the text to come.

    Args:
        models: at least one; they stay as they are.
        weights: one for each model, not negative, which are normalized to sum to 1; None: equal ones.

    Returns:
        a copy of the first model, in its mode, dtype and on its device, with the mean in each parameter and buffer.

    Raises:
        ValueError: as ``average_states``.

    Example::

        merged = core.average_models([law, medicine, news], weights=[0.6, 0.3, 0.1])
    """
    if not models:
        raise ValueError("there are no models to average")
    mean = average_states([model.state_dict() for model in models], weights)
    result = copy.deepcopy(models[0])
    result.load_state_dict(mean)
    return result


@torch.no_grad()
def average_states(states: Sequence[State], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the mean of several models' ``state_dict``, tensor by tensor, in the dtype and on the device of the first.

    Sums are taken in float32 at least. Integers are not averaged: a single one, such as a count of steps, is the
    largest, and a table, such as the table of ``Hash``, has to be the same in all.

    Args:
        states: at least one, with the same names and shapes.
        weights: as in ``average_models``.

    Raises:
        ValueError: no state is given; names or shapes differ, or integer tables; weights of another number, negative,
            not finite or all 0.
    """
    if not states:
        raise ValueError("there are no models to average")
    for i, state in enumerate(states[1:], 1):
        _check_like(states[0], state, i)
    share_N = _shares(weights, len(states))
    return {name: _mean(name, [state[name] for state in states], share_N) for name in states[0]}


@torch.no_grad()
def mix_models(
    models: Sequence[nn.Module],
    moe: MoEConfig,
    modules: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    seed: int = 0,
    causal: bool = False,
    gates: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a sparse model whose experts are the feed-forward networks of dense models (Branch-Train-MiX, arXiv
    2403.07816).

    Expert e of each layer is the network of ``models[e]``. All else is the mean of the models, by ``average_models``,
    and the routers are new: the paper then trains the whole on all domains. With ``gates`` it works untrained.

    Args:
        models: dense models of one architecture; they stay as they are.
        moe: the layers, with ``num_experts`` equal to the number of models, the default ``expert`` and no shared ones.
        modules: pattern of the dotted names of the networks, or several, as in ``core.sparsify``.
        weights: of the mean, as in ``average_models``.
        seed: of the routers' start.
        causal: as in ``core.sparsify``.
        gates: weight of each router's linear gate by the network's name, such as from ``example_gates``; None: random.

    Raises:
        ValueError: ``moe`` has another number of experts, another kind, shared ones or a granularity; with ``gates`` a
            router without a linear gate; or as ``core.sparsify`` and ``average_models``.

    Example::

        moe = core.MoEConfig(3, core.TokenChoice(2))
        sparse = core.mix_models([law, medicine, news], moe, modules="blocks.*.mlp")
    """
    check_values(MoEConfig, moe=moe)
    if moe.num_experts != len(models):
        raise ValueError(f"num_experts={moe.num_experts} is not the number of models, {len(models)}")
    for name, value, default in (
        ("expert", moe.expert, FFN()),
        ("granularity", moe.granularity, 1),
        ("num_shared_experts", moe.num_shared_experts, 0),
    ):
        if value != default:
            raise ValueError(f"{name}={value}: the experts are the models' networks, and there are no others")
    sparse = sparsify(average_models(models, weights), moe, modules, "random", seed=seed, causal=causal)
    for e, model in enumerate(models):
        for name, part in matching_parts(model, modules).items():
            layer = sparse.get_submodule(".".join(filter(None, (name, part.at))))
            assert isinstance(layer, SparseFFN)
            copy_weights(layer.moe.experts, e, part.weights)
            if gates is not None:
                gate = getattr(layer.moe.router, "gate", None)
                if not isinstance(gate, LinearGate):
                    raise ValueError(
                        f"router {moe.router.source()} has no linear gate that examples could give rows to"
                    )
                gate.weight.copy_(gates[name])
    return sparse


@torch.no_grad()
def example_gates(
    model: nn.Module,
    modules: str | Sequence[str],
    examples: Sequence[Iterable[Any]],
    run: Callable[[nn.Module, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """Return gates for ``mix_models`` made of examples without training, as mergekit's gate mode "hidden" does.

    Row e of a layer's gate has the direction of the mean input that the network in its place has on examples e.

    Args:
        model: the dense models' mean, from ``average_models``, or the model that they all started from.
        modules: as in ``mix_models``.
        examples: batches for each expert, of its domain.
        run: calls the model with a batch, as in ``expert_statistics``.

    Returns:
        (E, D) by the network's name, rows of norm 1.

    Raises:
        ValueError: an expert without examples; or as ``core.sparsify``.
    """
    parts = matching_parts(model, modules)
    sums = {name: torch.zeros(len(examples), part.dim, dtype=torch.float64) for name, part in parts.items()}
    networks = {name: model.get_submodule(".".join(filter(None, (name, part.at)))) for name, part in parts.items()}

    def add(sum_D: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sum_D += args[0].double().flatten(0, -2).sum(0).cpu()

    for e, batches in enumerate(examples):
        hooks = [network.register_forward_pre_hook(partial(add, sums[name][e])) for name, network in networks.items()]
        with evaluating(model), hooked(hooks):
            for batch in batches:
                call(model, batch, run)
        if not all(bool(own[e].any()) for own in sums.values()):
            raise ValueError(f"expert {e} has no examples to make its rows of the gates of")
    return {name: F.normalize(own, dim=1).float() for name, own in sums.items()}


def _shares(weights: Sequence[float] | None, num_models: int) -> list[float]:
    """Return weights that sum to 1."""
    if weights is None:
        return [1.0 / num_models] * num_models
    given = [float(weight) for weight in weights]
    if len(given) != num_models:
        raise ValueError(f"weights has {len(given)} numbers for {num_models} models")
    if not all(0 <= weight < float("inf") for weight in given) or not sum(given):
        raise ValueError(f"weights={given} are not finite, not negative and not all 0")
    return [weight / sum(given) for weight in given]


def _check_like(first: State, state: State, i: int) -> None:
    """Raise a ``ValueError`` if model ``i`` has other names or shapes than the first."""
    for lacking, missing in ((i, first.keys() - state.keys()), (0, state.keys() - first.keys())):
        if missing:
            names = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(f"model {lacking} lacks {names}, which model {i - lacking} has")
    for name, tensor in first.items():
        if state[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} in model 0 and {tuple(state[name].shape)} in model {i}"
            raise ValueError(f"{name} has shape {shapes}")


def _mean(name: str, tensors: list[Tensor], share_N: list[float]) -> Tensor:
    """Return the weighted mean of one tensor of all models."""
    first = tensors[0]
    if not first.is_floating_point():
        same = [tensor.to(first.device) for tensor in tensors]
        if first.ndim == 0 and first.dtype != torch.bool:
            return torch.stack(same).amax()
        if not all(torch.equal(first, tensor) for tensor in same):
            raise ValueError(f"{name} holds integers that differ: they have no mean")
        return first.clone()
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = torch.zeros_like(first, dtype=dtype)
    for tensor, share in zip(tensors, share_N, strict=True):
        total.add_(tensor.to(total), alpha=share)
    return total.to(first.dtype)
