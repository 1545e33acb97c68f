"""A model on the meta device, and the facts that a plan reads off it: numbers, activations, routed rows and FLOPs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import core
from apps import registry
from apps.cli.configs import at
from apps.cli.errors import UsageError
from apps.plan.options import PlanOptions
from apps.registry import short
from apps.task import Sizes, Trial
from apps.train.optim.optimizers import parameter_groups
from core.config.plain import arguments_from_plain
from core.parallel import blocks_of, layers_of_experts, refusal
from core.torch_internals import fused_attention, storage_id

COLUMNS = ("tables", "numbers", "histories", "item_tables", "item_numbers")
"""Options that describe columns, each of some models' data."""


def data_arguments(kind: str, given: Mapping[str, Any], options: PlanOptions) -> dict[str, Any]:
    """Return the arguments of a model's constructor that its data would provide, from configuration and options.

    Args:
        kind: short name of the model's class.
        given: arguments that the configuration has.
        options: of the command.

    Raises:
        Missing: something is missing; the message names the option.
        UsageError: an option describes columns that such a model does not have.
    """
    task = registry.task_named(kind)
    for name in COLUMNS:
        if getattr(options, name) and name not in task.columns:
            kinds = [model for model in registry.MODELS if name in registry.task_named(model).columns]
            raise UsageError(f"--{name} describes columns of {' and '.join(kinds)}, not of {kind}")
    return task.data_arguments(given, sizes_of(options))


def sizes_of(options: PlanOptions) -> Sizes:
    """Return a command's settings of the data."""
    columns = {name: getattr(options, name) for name in (*COLUMNS, "tasks", "domains", "pooling")}
    return Sizes(options.config.get("data"), options.batch, options.tokens_per_gpu, options.length, columns)


def trial(module: Any, options: PlanOptions, dtype: torch.dtype) -> Trial:
    """Return a forward of a model that is on the meta device.

    Args:
        module: of the suite.
        options: of the command.
        dtype: of the matmuls.

    Raises:
        Missing: the batch's size is missing.
    """
    return registry.task_of(type(module), "plan").trial(module, sizes_of(options), dtype)


_PRODUCTS = {
    *(F.linear, F.conv2d, F.conv1d, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm),
    F.prelu,  # no product, but autocast takes it in bfloat16 as well
}
_STARTS = ("pretrained", "grow", "distil")


@dataclass
class Numbers:
    """Numbers of some parameters.

    Attributes:
        params: number of parameters.
        trainable: number of parameters that have a gradient.
        state: numbers that the optimizer keeps for them.
        step: temporary numbers of the optimizer's step: AdamW two for each of its largest parameter, Muon five for the
            matrices of one shape.
    """

    params: int = 0
    trainable: int = 0
    state: int = 0
    step: int = 0


@dataclass
class Block:
    """A block of the model, or the parameters outside all blocks.

    Attributes:
        name: dotted name; "" for the parameters outside all blocks.
        rest: all parameters but those of the routed experts that can be sharded.
        experts: the parameters of these routed experts.
        kept: bytes that the forward keeps for the backward.
        entering: bytes of its inputs, which are all that checkpointing keeps.
        working: temporary bytes, in addition to its MoE layers'; for parameters outside all blocks, the bytes of the
            loss.
        layers: names of the MoE layers in it.
    """

    name: str
    rest: Numbers = field(default_factory=Numbers)
    experts: Numbers = field(default_factory=Numbers)
    kept: float = 0.0
    entering: float = 0.0
    working: float = 0.0
    layers: list[str] = field(default_factory=list)


@dataclass
class Layer:
    """An MoE layer whose experts can be sharded.

    Attributes:
        name: dotted name.
        num_experts: E.
        rows: routed pairs of a rank; under a static all-to-all the places for them.
        dim, out_dim: width of a row to and from the experts.
        kept: bytes that the experts keep for the backward.
        module: the layer, on the meta device.
    """

    name: str
    num_experts: int
    module: Any
    rows: int = 0
    dim: int = 0
    out_dim: int = 0
    kept: float = 0.0


@dataclass(frozen=True)
class Table:
    """An embedding table that TorchRec shards.

    Attributes:
        rows, dim: its size.
        state: numbers of the optimizer's state for a row.
    """

    rows: int
    dim: int
    state: int


@dataclass(frozen=True)
class Outline:
    """The facts about a model that a plan needs.

    Attributes:
        kind: class of the model.
        root: the parameters outside all blocks.
        blocks: in the order of the model.
        layers: MoE layers whose experts can be sharded, by name; empty if there are none.
        undivided: why experts cannot be sharded; None if they can be, or there are none.
        flops: FLOPs of a forward of a rank's batch, only matmuls.
        trial: the batch.
        averaged: whether a moving average of the weights is kept.
        tables: tables that TorchRec shards, which are in no block.
    """

    kind: str
    root: Block
    blocks: tuple[Block, ...]
    layers: Mapping[str, Layer]
    undivided: str | None
    flops: float
    trial: Trial
    averaged: bool
    tables: tuple[Table, ...] = ()

    @property
    def parts(self) -> tuple[Block, ...]:
        """All of the model but its tables."""
        return (self.root, *self.blocks)

    @property
    def num_params(self) -> int:
        """Parameters, tables included."""
        tables = sum(t.rows * t.dim for t in self.tables)
        return sum(p.rest.params + p.experts.params for p in self.parts) + tables


def outlined(options: PlanOptions) -> Outline:
    """Build the model of a configuration on the meta device and measure it.

    Raises:
        UsageError: the model is none of the suite's, or something that the data would tell is missing.
        ValueError: a value that the model does not take.
    """
    model = options.config["model"]
    path = model if isinstance(model, str) else str(model["class_path"])
    name = str(short(path))
    if registry.full_path(path) is None:
        raise UsageError(f"moesaic plan reads configurations of {', '.join(registry.MODELS)}, not of {name}")
    kind = registry.resolve(path)
    given = {k: v for k, v in (at(options.config, ("model", "init_args")) or {}).items() if k not in _STARTS}
    arguments = arguments_from_plain(kind, given, "model")
    arguments |= data_arguments(name, given, options)  # imports tasks, and no module is imported on the meta device
    with torch.device("meta"):
        module = kind(**arguments)
    return measured(module, options)


def measured(module: Any, options: PlanOptions) -> Outline:
    """Return the outline of a module on the meta device, whose training this becomes.

    Args:
        module: of the suite.
        options: of the command.
    """
    tables = _tables(module)
    blocks, root, layers, undivided = _divided(module, {id(p) for p in tables})
    half = options.precision == "bf16-true" or options.param_dtype is not None
    dtype = torch.bfloat16 if half or options.precision == "bf16-mixed" else torch.float32
    if half:
        module.to(torch.bfloat16)
    module.train()
    made = trial(module, options, dtype)
    watch = _Watch(module, {b.name: b for b in blocks}, layers, root)
    with watch, _OnGpu(half=options.autocast), _experts_in(module, dtype):
        for layer in layers.values():  # autocast's copies of these are sharded too
            watch.leave_out(layer.module.experts)
        flops = core.count_flops(made.run)
    for layer in layers.values() if options.static else ():
        layer.rows = _places(layer)
    root.kept += made.loss.kept
    root.working = made.loss.working
    return Outline(
        kind=type(module).__name__,
        root=root,
        blocks=tuple(blocks),
        layers=layers,
        undivided=undivided,
        flops=flops + made.loss.flops,
        trial=made,
        averaged=getattr(module, "ema_decay", None) is not None,
        tables=tuple(tables.values()),
    )


def _places(layer: Layer) -> int:
    """Return the places of all experts under the training's capacity, for the tokens of a rank.

    Raises:
        UsageError: the capacity is missing.
    """
    factors = [router.capacity.factor for router in layer.module.routers().values()]
    if None in factors:
        raise UsageError("a static all-to-all needs a capacity: give --model.moe.capacity_factor N")
    return math.ceil(layer.rows * max(factors))


def _tables(module: Any) -> dict[Any, Table]:
    """Return the tables that TorchRec shards, by their parameters."""
    tables = {}
    for arch in module.modules():
        if getattr(arch, "collection", None) is None or not hasattr(arch, "features"):
            continue
        for weight in arch.collection.parameters():
            rows, dim = weight.shape
            state = {"sgd": 0, "rowwise_adagrad": 1}.get(arch.config.fused_optimizer, dim)
            tables[weight] = Table(rows, dim, state)
    return tables


def _divided(module: Any, left_out: set[int]) -> tuple[list[Block], Block, dict[str, Layer], str | None]:
    """Return the blocks, the parameters outside them, the layers whose experts can be sharded, and why some cannot."""
    found = layers_of_experts(module)
    reasons = (refusal(layer, 1) for layer in found.values())
    undivided = next((f"{name}: {why}" for name, why in zip(found, reasons, strict=True) if why is not None), None)
    layers = {} if undivided else {name: Layer(name, m.experts.num_experts, m) for name, m in found.items()}
    of_experts = {id(p) for layer in layers.values() for p in layer.module.experts.parameters()}
    names = {id(m): name for name, m in module.named_modules()}
    members = blocks_of(module)
    blocks, root = [Block(names[id(m)]) for m in members], Block("")
    owner = {id(p): block for m, block in zip(members, blocks, strict=True) for p in m.parameters()}
    for name in layers:
        (*_, block) = (root, *(b for b in blocks if f"{name}.".startswith(f"{b.name}.")))
        block.layers.append(name)
    muon, alike = _optimized(module)
    for parameter in module.parameters():
        if id(parameter) in left_out:
            continue
        block = owner.get(id(parameter), root)
        part, number = block.experts if id(parameter) in of_experts else block.rest, parameter.numel()
        part.params += number
        if parameter.requires_grad:
            part.trainable += number
            part.state += number * (1 if id(parameter) in muon else 2)
            part.step = max(part.step, 5 * alike[id(parameter)] if id(parameter) in muon else 2 * number)
    return blocks, root, layers, undivided


def _optimized(module: Any) -> tuple[set[int], dict[int, int]]:
    """Return the parameters that Muon updates, and for each the numbers of all parameters updated with it."""
    alike: dict[int, int] = {}
    for group in parameter_groups(module, module.optimizer_config):
        if group.get("muon"):
            total: dict[Any, int] = {}
            for p in group["params"]:
                total[p.shape[-2:]] = total.get(p.shape[-2:], 0) + p.numel()
            alike |= {id(p): total[p.shape[-2:]] for p in group["params"]}
    return set(alike), alike


class _OnGpu(TorchFunctionMode):
    """Attention as a fused kernel, which keeps no weights, and with ``half`` products in bfloat16 as under autocast,
    which knows no tensors on the meta device."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.half = half

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.half and (func in _PRODUCTS or func is F.scaled_dot_product_attention):
            args = tuple(_halved(value) for value in args)
            kwargs = {name: _halved(value) for name, value in kwargs.items()}
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _halved(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **kwargs: Any,
) -> Tensor:
    if attn_mask is not None and attn_mask.requires_grad:
        # Only this fused kernel differentiates a learned mask.
        attend = fused_attention("efficient_attention")
        y: Tensor = attend(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]
        return y
    y = fused_attention("flash_attention_for_cpu")(q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return y


@contextmanager
def _experts_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute experts in ``dtype``: their kernels are custom operations, which autocast casts by hand."""

    def cast(experts: nn.Module, args: Any) -> Any:
        first, *others = args
        first = replace(first, x=first.x.to(dtype)) if hasattr(first, "row_index_R") else first.to(dtype)
        return (first, *others)

    parts = [m for m in module.modules() if isinstance(m, core.Experts)]
    before = [next((p.dtype for p in m.parameters()), dtype) for m in parts]
    with ExitStack() as stack:
        for part, old in zip(parts, before, strict=True):
            if old != dtype:
                part.to(dtype)
                stack.callback(part.to, old)
                stack.callback(part.register_forward_pre_hook(cast).remove)
        yield


class _Watch:
    """Adds up the activations that a forward saves, by the block in which it is kept first, and the layers' rows."""

    def __init__(
        self, module: nn.Module, blocks: Mapping[str, Block], layers: Mapping[str, Layer], root: Block
    ) -> None:
        self.module, self.blocks, self.layers, self.root = module, blocks, layers, root
        self.inside: list[Block | Layer] = [root]
        self.owner: dict[nn.Module, Block | Layer] = {}
        self.kept: dict[int, Any] = {}

    def __enter__(self) -> _Watch:
        self.stack = ExitStack()
        modules = dict(self.module.named_modules())
        self.leave_out(self.module)
        self.owner |= {modules[name]: block for name, block in self.blocks.items()}
        for layer in self.layers.values():
            self.owner[layer.module.experts] = layer
            # Layers may share experts: then a call is of the one whose forward began last.
            begins = layer.module.register_forward_pre_hook(lambda m, _, of=layer: self.owner.update({m.experts: of}))
            self.stack.callback(begins.remove)
        for module in self.owner:
            self.stack.callback(module.register_forward_pre_hook(self._before).remove)
            self.stack.callback(module.register_forward_hook(self._after).remove)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.stack.enter_context(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def leave_out(self, module: nn.Module) -> None:
        """Count none of a module's parameters and buffers."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._note(tensor)

    def _before(self, module: nn.Module, args: Any) -> None:
        owner = self.owner[module]
        if isinstance(owner, Block):
            owner.entering += sum(x.nbytes for x in args if isinstance(x, Tensor) and x.is_floating_point())
        else:
            rows = args[0]
            tokens = getattr(rows, "x", rows)
            owner.rows += len(rows.row_index_R) if hasattr(rows, "row_index_R") else len(tokens.flatten(0, -2))
            owner.dim = tokens.shape[-1]
        self.inside.append(owner)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        owner = self.inside.pop()
        if isinstance(owner, Layer):
            owner.out_dim = getattr(output, "x", output).shape[-1]

    def _note(self, tensor: Tensor) -> float:
        """Return the bytes of a tensor's memory where it is seen for the first time, else 0."""
        storage, number = tensor.untyped_storage(), storage_id(tensor)
        if number in self.kept:
            return 0.0
        self.kept[number] = storage  # alive, so that no other gets its number
        return float(storage.nbytes())

    def _pack(self, tensor: Tensor) -> Tensor:
        size = self._note(tensor)
        block = next(owner for owner in reversed(self.inside) if isinstance(owner, Block))
        block.kept += size
        if isinstance(self.inside[-1], Layer):
            self.inside[-1].kept += size
        return tensor
