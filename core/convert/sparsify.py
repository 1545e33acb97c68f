"""``sparsify`` makes feed-forward networks of a dense model MoE layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..config import MoEConfig
from ..contract import MergeRouting, Routing, check_part
from ..contract.checks import not_negative, whole
from ..layers import AveragedMoE, MoE, set_capacity_factor
from .feed_forward import FeedForwardPart, copy_weights
from .names import matches, matching_names
from .readers import named_part, recognised_ffns
from .sparse_ffn import SparseFFN, put_layer
from .starts import Start, outputs_of, start_of


def sparsify(
    model: nn.Module,
    moe: MoEConfig,
    modules: str | Sequence[str],
    start: str | Start = "copy",
    *,
    noise: float = 0.0,
    seed: int = 0,
    exact: bool = True,
    causal: bool = False,
) -> nn.Module:
    """Return a copy of a dense model in which feed-forward networks are MoE layers.

    The copy begins with the model's outputs, in evaluation and wherever no capacity drops a pair, but for
    ``start="random"``, the redrawn units of "drop", and "split" with fewer experts a token than there are. Each layer
    is a ``core.MoE`` within a ``SparseFFN``, with a router of its own. ``core.summary`` tells what was replaced.

    The model goes on calling a layer with tokens alone. So padding is routed as any token, and a router that needs a
    context is refused. Dropout stays where it was; that of the hidden layer is the experts'. Hooks on a network that
    is replaced are gone.

    Args:
        model: any module, which stays as it is.
        moe: the layers. ``expert`` stays at its default: kind, width, biases and activation are the network's.
        modules: pattern of the dotted names of the networks, or several: ``*`` stands for one name without dots. Where
            a network is spread over the modules of a block, as in ``nn.TransformerEncoderLayer`` and in BERT, the
            pattern names the block. "" names the model itself.
        start: what experts begin as, a name of ``core.convert.STARTS`` or a ``core.convert.Start``: "copy", copies of
            the network (arXiv 2212.05055); "random", new ones, of any kind that ``moe.expert`` names.
        noise: standard deviation of normal noise on each matrix of an expert, relative to that of the matrix.
        seed: of the gates' and random experts' start, and of the noise. torch's own random state is not touched.
        exact: a router whose gates do not sum to a constant is refused, since the copy would begin with outputs
            scaled by them. False: it begins so.
        causal: the model is a causal decoder, so that a router that looks ahead is refused.

    Returns:
        the copy; a ``SparseFFN`` where the model itself is the network.

    Raises:
        ValueError: a pattern names no module, a module that is no feed-forward network or one that no expert computes,
            or two name the same; a weight is frozen, or tied to another module's; the router needs a context, or its
            gates do not sum to a constant; ``moe`` sets experts that are not the network's.

    Example::

        moe = core.MoEConfig(8, core.TokenChoice(2))
        sparse = core.sparsify(timm.create_model("vit_tiny_patch16_224"), moe, modules="blocks.*.mlp")
        print(core.summary(sparse))
    """
    check_part("moe", moe, MoEConfig, "MoEConfig(8, TokenChoice(2))")
    not_negative("noise", noise)
    whole("seed", seed)
    begun = start_of(start)
    if moe.router.needs:
        needed = ", ".join(f"context.{name}" for name in moe.router.needs)
        raise ValueError(f"router {moe.router.source()} needs {needed}, which no feed-forward network is called with")
    parts = matching_parts(model, modules)
    # All layers are made before the copy: a refusal costs no memory.
    layers: dict[str, SparseFFN] = {}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, part in parts.items():
            module = model.get_submodule(name)
            try:
                layer, config = _layer(part, moe, begun, noise, exact, causal, generator)
            except ValueError as error:
                raise ValueError(f"module {name!r}: {error}") from None
            sparse = SparseFFN(layer, part, config, begun.name, type(module).__name__)
            layers[name] = sparse.train(module.training)
    result = copy.deepcopy(model)
    for name, part in parts.items():
        result = put_layer(result, name, part, layers[name])
    return result


def matching_parts(model: nn.Module, modules: str | Sequence[str]) -> dict[str, FeedForwardPart]:
    """Return the feed-forward networks that patterns name, by dotted name, in the model's order.

    Raises:
        ValueError: as ``sparsify``.
    """
    patterns = [modules] if isinstance(modules, str) else modules
    names = matching_names(model, patterns, list(recognised_ffns(model)), "feed-forward networks")
    for name in names:
        by = [pattern for pattern in patterns if matches(name, pattern)]
        if len(by) > 1:
            raise ValueError(f"modules {by[0]!r} and {by[1]!r} both name {name!r}")
    parts = {name: named_part(name, model.get_submodule(name)) for name in names}
    for outer, inner in pairwise(names):  # in the model's order the parts of a module come right behind it
        if inner.startswith(f"{outer}." if outer else ""):
            raise ValueError(f"modules={modules!r} names {outer!r} and {inner!r}, which is a part of it")
    _check_weights(model, parts)
    return parts


def _check_weights(model: nn.Module, parts: dict[str, FeedForwardPart]) -> None:
    """Raise a ``ValueError`` where a weight of a network is frozen, or is another module's too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    for name, part in parts.items():
        children = dict(model.get_submodule(name).named_modules())
        # An activation may be a function, which is no child.
        replaced = [children[child] for child in (part.at, *part.emptied) if child in children]
        for parameter in nn.ModuleList(replaced).parameters():
            names = owners[id(parameter)]
            if len(names) > 1:
                raise ValueError(f"module {name!r}: its weight is tied: {' and '.join(names)} are one")
            if not parameter.requires_grad:
                raise ValueError(f"module {name!r}: its weight {names[0]} is frozen: requires_grad is False")


def _layer(
    part: FeedForwardPart,
    moe: MoEConfig,
    start: Start,
    noise: float,
    exact: bool,
    causal: bool,
    generator: torch.Generator,
) -> tuple[MoE, MoEConfig]:
    """Return the layer that takes the place of a network, and its config."""
    config = start.config(moe, part)
    layer = config.build(part.dim, part.out_dim, causal=causal)
    if layer.experts.reads_context:
        raise ValueError(f"{type(config.expert).__name__} reads the context, which no feed-forward network is given")
    total = _gate_sum(layer, start.even_gates) if start.keeps_output else None
    if start.keeps_output and exact and total is None:
        gates = "are not equal" if start.even_gates else "do not sum to a constant"
        raise ValueError(
            f"the gates of a token by {moe.router} {gates}, so that start={start.name!r} does not begin with the "
            "network's output: take TokenChoice with normalize=True, or normalize='unit' for one expert or a split; or "
            "exact=False"
        )
    like = next(iter(part.weights.values()))
    layer.to(like.device, like.dtype)
    start.fill(part, layer, generator)
    if start.keeps_output and layer.shared_experts is not None:
        copy_weights(layer.shared_experts, 0, part.weights)
    _scale_and_vary(layer, 1.0 if total is None else start.total_gate(layer) / total, noise, generator)
    return layer, config


@torch.no_grad()
def _gate_sum(layer: MoE, even: bool) -> float | None:
    """Return what the gates of a token sum to in evaluation without a capacity; None where tokens differ.

    Args:
        layer: a layer as it starts, on the CPU.
        even: whether the gates of a token have to be equal as well.
    """
    router = layer.router
    if isinstance(layer, AveragedMoE):
        return 1.0
    if router.gates_on != "output" or layer.dim is None:
        return None
    x_BSD = torch.randn(2, 16, layer.dim)
    mode = router.training
    with set_capacity_factor(layer, None):
        routing = router.eval()(x_BSD)
    router.train(mode)
    if isinstance(routing, MergeRouting):
        sums, gates_N = routing.weights_GE.sum(1), routing.weights_GE.flatten()
    elif isinstance(routing, Routing):
        sums = torch.zeros(routing.num_tokens).index_add(0, routing.token_index_N, routing.gates_N)
        gates_N = routing.gates_N
    else:
        return None

    def is_even(values: Tensor) -> bool:
        return bool(values.max() - values.min() <= 1e-5 * values.abs().max()) and bool(values.max() > 0)

    return float(sums.mean()) if is_even(sums) and (not even or is_even(gates_N)) else None


@torch.no_grad()
def _scale_and_vary(layer: MoE, scale: float, noise: float, generator: torch.Generator) -> None:
    """Multiply the experts' outputs by a number, and add noise to their matrices."""
    for e in range(layer.num_experts):
        weights = layer.experts.weights_of(e)
        if abs(scale - 1.0) > 1e-6:
            outputs = outputs_of(weights)
            if not outputs:
                name = type(layer.experts).__name__
                raise ValueError(f"the gates of a token sum to 1 / {scale:g}, and {name} have no last product to scale")
            for tensor in outputs:
                tensor.mul_(scale)
        for tensor in weights.values() if noise else ():
            if tensor.ndim == 2:
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.add_(drawn.to(tensor) * (noise * tensor.std()))
