"""``sparsify`` makes feed-forward networks of a dense model MoE layers."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config import MoEConfig
from ...contract import MergeRouting, Routing
from ...contract.checks import check_tensor
from ...fields import NotNegative, check_values
from ...layers import AveragedMoE, MoE, set_capacity_factor
from ..read.calls import call, evaluating, hooked, naming_module
from ..read.feed_forward import FeedForwardPart, copy_weights
from ..read.names import matches, matching_names
from ..read.parts import value_of_layer
from ..read.readers import named_part, recognized_ffns
from ..read.structure import Seen
from .sparse_ffn import SparseFFN, put_layer
from .starts import Start, outputs_of, start_of

MAX_TOKENS = 4096
"""Tokens of one forward that a start looks at."""


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
    inputs: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    importances: Tensor | Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Return a copy of a dense model in which feed-forward networks are MoE layers.

    The copy starts with the model's outputs, in evaluation and whenever no capacity drops a pair, but for
    ``start="random"``, the redrawn units of "drop", and "split" with fewer experts per token than there are. Each layer
    is a ``core.MoE`` within a ``SparseFFN``, with a router of its own. ``core.summary`` lists the replaced networks.

    The model still calls a layer with tokens only. So padding is routed as any token, and a router that needs a context
    raises an error. Dropout stays where it was; the dropout of the hidden layer becomes the experts'. Hooks on a
    network that is replaced are gone.

    Args:
        model: any module, which stays as it is.
        moe: the layers. ``expert`` stays at its default: kind, width, biases and activation are the network's.
        modules: pattern of the dotted names of the networks, or several: ``*`` matches one name without dots. If a
            network is spread over the modules of a block, as in ``nn.TransformerEncoderLayer`` and in BERT, the pattern
            names the block. "" names the model itself.
        start: how experts are initialized, a name of ``core.convert.STARTS`` or a ``core.convert.Start``: "copy",
            copies of the network (arXiv 2212.05055); "granular", narrow experts in virtual groups (2410.07524), with
            ``moe.granularity``; "drop", copies with some of their hidden units reinitialized (2502.19261); "split", the
            hidden units split among the experts (2110.01786); "random", new ones, of any kind that ``moe.expert``
            names. ``GranularStart`` and its like say more.
        noise: standard deviation of normal noise on each matrix of an expert, relative to the matrix's own.
        seed: of the gates' and random experts' start, and of the noise. torch's own random state is not touched.
        exact: a router whose gates do not sum to a constant raises an error, since the copy's outputs would start out
            scaled by them. False: it is accepted, with outputs that are right on the average of normal tokens.
        causal: the model is a causal decoder, so that a router that looks ahead raises an error.
        inputs: arguments of one call of the model, for ``SplitStart("coactivation")``: a tensor, a sequence, or a
            mapping of names.
        importances: for ``SplitStart("importance")``, importance of each network's hidden units (F,), by its name, as
            ``core.convert.unit_importances`` returns them; or of the one network that the model is.

    Returns:
        the copy; a ``SparseFFN`` if the model itself is the network.

    Raises:
        ValueError: a pattern names no module, a module that is not a feed-forward network or one that no expert
            computes, or two name the same; a weight is frozen, or tied to another module's; the router needs a context,
            or its gates do not sum to a constant; ``moe`` sets experts that are not the network's; or inputs are
            missing, or without a meaning.

    Example::

        moe = core.MoEConfig(8, core.TokenChoice(2))
        sparse = core.sparsify(timm.create_model("vit_tiny_patch16_224"), moe, modules="blocks.*.mlp")
        print(core.summary(sparse))
    """
    check_values(MoEConfig, moe=moe)
    check_values(NotNegative, noise=noise)
    check_values(int, seed=seed)
    begun = start_of(start)
    if moe.router.needs:
        needed = ", ".join(f"context.{name}" for name in moe.router.needs)
        raise ValueError(f"router {moe.router.source()} needs {needed}, which no feed-forward network is called with")
    for argument, given in (("inputs", inputs), ("importances", importances)):
        if (begun.reads == argument) != (given is not None):
            raise ValueError(f"{begun} {'needs' if given is None else 'does not read'} {argument} of the model")
    parts = matching_parts(model, modules)
    known = {} if inputs is None else _tokens_of(model, parts, inputs)
    if importances is not None:
        known = {name: _importances_of(name, part, importances) for name, part in parts.items()}
    # All layers are made before the copy: an error costs no memory.
    layers: dict[str, SparseFFN] = {}
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        for name, part in parts.items():
            module = model.get_submodule(name)
            with naming_module(name):
                config = begun.config(moe, part)
                layer = config.build(part.dim, part.out_dim, causal=causal)
                _begin(layer, config, part, begun, exact, generator, known.get(name))
            _add_noise(layer, noise, generator)
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
    known = chain.from_iterable(map(recognized_ffns, (model,)))  # reads networks only if the error names them
    names = matching_names(model, patterns, known, "feed-forward networks")
    for name in names:
        by = [pattern for pattern in patterns if matches(name, pattern)]
        if len(by) > 1:
            raise ValueError(f"modules {by[0]!r} and {by[1]!r} both name {name!r}")
    seen: Seen = {}
    parts = {name: named_part(name, model.get_submodule(name), seen) for name in names}
    for outer, inner in pairwise(names):  # in the model's order the parts of a module come right behind it
        if inner.startswith(f"{outer}." if outer else ""):
            raise ValueError(f"modules={modules!r} names {outer!r} and {inner!r}, which is a part of it")
    _check_weights(model, parts)
    return parts


def _check_weights(model: nn.Module, parts: dict[str, FeedForwardPart]) -> None:
    """Raise a ``ValueError`` if a weight of a network is frozen, or is another module's too."""
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(f"{path}.{name}".lstrip("."))
    for name, part in parts.items():
        for parameter in part.replaced_in(model.get_submodule(name)).parameters():
            names = owners[id(parameter)]
            if len(names) > 1:
                raise ValueError(f"module {name!r}: its weight is tied: {' and '.join(names)} are one")
            if not parameter.requires_grad:
                raise ValueError(f"module {name!r}: its weight {names[0]} is frozen: requires_grad is False")


@torch.no_grad()
def _tokens_of(
    model: nn.Module, parts: Mapping[str, FeedForwardPart], inputs: Tensor | Sequence[Any] | Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return tokens (T, D) that each network is called with in one forward of the model, the first of them."""
    tokens: dict[str, Tensor] = {}

    def keep(name: str, layout: str, x: Tensor) -> None:
        x_TD = x.flatten(2).transpose(1, 2).flatten(0, 1) if layout == "channels_first" else x.flatten(0, -2)
        tokens[name] = x_TD[:MAX_TOKENS]

    hooks = []
    for name, part in parts.items():
        called = model.get_submodule(".".join(filter(None, (name, part.at))))
        hook = functools.partial(keep, name, part.layout)
        hooks.append(called.register_forward_pre_hook(lambda module, args, hook=hook: hook(args[0])))
    with evaluating(model), hooked(hooks):
        call(model, inputs)
    silent = next((name for name in parts if name not in tokens), None)
    if silent is not None:
        raise ValueError(f"module {silent!r} is not called in a forward of these inputs")
    return tokens


def _importances_of(name: str, part: FeedForwardPart, importances: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Return the importances (F,) of a network's hidden units, on the CPU."""
    importance_F = value_of_layer(importances, name, "importances")
    check_tensor(f"importances of module {name!r}", importance_F)
    if importance_F.shape != (part.hidden_dim,) or not importance_F.isfinite().all():
        raise ValueError(
            f"importances of module {name!r} have shape {tuple(importance_F.shape)}: they are {part.hidden_dim} "
            "finite numbers, one for each hidden unit"
        )
    return importance_F.detach().cpu()


@torch.no_grad()
def _begin(
    layer: MoE,
    config: MoEConfig,
    part: FeedForwardPart,
    start: Start,
    exact: bool,
    generator: torch.Generator,
    known: Tensor | None,
) -> None:
    """Write the experts of a new layer that replaces a network, and move it to the network's device."""
    if layer.experts.reads_context:
        raise ValueError(f"{type(config.expert).__name__} reads the context, which no feed-forward network is given")
    gates = _gates_of(layer) if start.keeps_output else None
    fits = gates is not None and gates.are_constant and (gates.are_even or not start.even_gates)
    if start.keeps_output and exact and not fits:
        what = "are not equal" if start.even_gates else "do not sum to a constant"
        raise ValueError(
            f"the gates of a token by {config.router.source()} {what}, so that start={start.name!r} does not begin "
            "with the network's output: take TokenChoice with normalize=True, for one expert a token or a split with "
            "normalize='unit', or exact=False"
        )
    like = next(iter(part.weights.values()))
    layer.to(like.device, like.dtype)
    start.fill(part, layer, generator, known)
    if start.keeps_output and layer.shared_experts is not None:
        copy_weights(layer.shared_experts, 0, part.weights)
    if gates is not None:
        _scale_outputs(layer, start.total_gate(part, layer) / gates.total)


class _Gates(NamedTuple):
    """The gates that a new router gives to tokens.

    Attributes:
        total: mean of the sums over a token's gates.
        are_constant: all tokens have this sum.
        are_even: all gates are equal.
    """

    total: float
    are_constant: bool
    are_even: bool


@torch.no_grad()
def _gates_of(layer: MoE) -> _Gates | None:
    """Return the gates of normal tokens in evaluation without a capacity; None if they weight no expert's output.

    Args:
        layer: a layer as it starts, on the CPU.
    """
    router = layer.router
    if isinstance(layer, AveragedMoE):
        return _Gates(1.0, True, True)
    if router.gates_on != "output" or layer.dim is None:
        return None
    with set_capacity_factor(layer, None), evaluating(router):
        routing = router(torch.randn(2, 16, layer.dim))
    if isinstance(routing, MergeRouting):
        sums, gates_N = routing.weights_GE.sum(1), routing.weights_GE.flatten()
    elif isinstance(routing, Routing):
        sums = torch.zeros(routing.num_tokens).index_add(0, routing.token_index_N, routing.gates_N)
        gates_N = routing.gates_N
    else:
        return None

    def are_equal(values: Tensor) -> bool:
        return bool(values.max() - values.min() <= 1e-5 * values.abs().max())

    return _Gates(float(sums.mean()), are_equal(sums), are_equal(gates_N)) if sums.mean() > 0 else None


def _scale_outputs(layer: MoE, scale: float) -> None:
    """Multiply the experts' outputs by a number, unless it is 1 but for rounding."""
    if abs(scale - 1.0) <= 1e-6:
        return
    for e in range(layer.num_experts):
        outputs = outputs_of(layer.experts.weights_of(e))
        if not outputs:
            name = type(layer.experts).__name__
            raise ValueError(
                f"gates that sum to {1 / scale:g} scale the output, and {name} has no last product to undo it"
            )
        for tensor in outputs:
            tensor.mul_(scale)


@torch.no_grad()
def _add_noise(layer: MoE, noise: float, generator: torch.Generator) -> None:
    """Add normal noise to each matrix of each expert, relative to the standard deviation of the matrix."""
    for e in range(layer.num_experts if noise else 0):
        for tensor in layer.experts.weights_of(e).values():
            if tensor.ndim == 2:
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.add_(drawn.to(tensor) * (noise * tensor.std()))
