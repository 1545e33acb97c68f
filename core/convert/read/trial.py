"""A module tried out: copies of it run as it is, and with an expert in the place of its feed-forward network.

The copies have random weights, since trained or initial ones may hide a part: a matrix of zeros, a norm or a layer
scale that is still 1. Dropout is a function of its input there, so that two runs in training can be compared.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...config import MoEConfig
from ..build.sparse_ffn import SparseFFN, put_layer
from ..reduce.merge import OneExpert
from .calls import hooked
from .feed_forward import FeedForwardPart, is_linear, is_pointwise

Reading = Callable[[nn.Module], FeedForwardPart | None]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}
"""Relative differences that are rounding. float32 is for modules that do not run in float64, and some round to it."""


def marked(x: Tensor, p: float) -> Tensor:
    """Return what a run has in place of ``x`` after dropout, which tells its place and probability."""
    return x + p * x.abs()


class _Marking(TorchFunctionMode):
    """Replaces dropout by ``marked``, and collects the probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: dict[float, None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        of_dropout = func in (F.dropout, torch.dropout, torch.dropout_)
        return (functools.partial(self._dropout, func) if of_dropout else func)(*args, **(kwargs or {}))

    def _dropout(
        self, func: Any, input: Tensor, p: float, train: bool = True, inplace: bool = False, **of_f: bool
    ) -> Tensor:
        if not of_f.get("training", train) or not p:
            return input
        self.rates[float(p)] = None
        return input.copy_(marked(input, p)) if inplace or func is torch.dropout_ else marked(input, p)


class ModuleCall(NamedTuple):
    """One call of a module.

    Attributes:
        y: the result.
        called: names of modules without children, in the order of their calls.
        linears: input and output (T, C) of each linear layer, by name, in the order of their calls.
        rates: probabilities of dropout.
        state: torch's random state afterwards.
    """

    y: Any
    called: list[str]
    linears: dict[str, tuple[Tensor, Tensor]]
    rates: tuple[float, ...]
    state: Tensor


@torch.no_grad()
def run(module: nn.Module, x: Tensor, training: bool, call: Callable[[Tensor], Any] | None = None) -> ModuleCall:
    """Call a module, which is put in a mode, or a method of it, with torch's random state at a fixed start."""
    called: list[str] = []
    linears: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, child: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        called.append(name)
        if is_linear(child):
            x, y = (t.movedim(1, -1) if is_pointwise(child) else t for t in (args[0], out))
            linears[name] = x.flatten(0, -2).clone(), y.flatten(0, -2).clone()

    leaves = [(name, m) for name, m in module.named_modules() if is_linear(m) or not list(m.children())]
    hooks = [m.register_forward_hook(functools.partial(keep, name)) for name, m in leaves]
    eager = torch.compiler.set_stance("force_eager")  # a compiled module is not compiled anew for each form of tokens
    with torch.random.fork_rng(devices=[]), eager, hooked(hooks), _Marking() as marking:
        torch.default_generator.manual_seed(0)
        module.train(training)
        y = (call or module)(x.clone())
        return ModuleCall(y, called, linears, tuple(marking.rates), torch.default_generator.get_state())


def copies_of(module: nn.Module, dtype: torch.dtype) -> Callable[[], nn.Module]:
    """Return a function that copies a module, with the same random parameters and buffers in each copy, on the CPU."""
    memo, draw = {}, torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_floating_point():
            new = torch.zeros(tensor.shape, dtype=tensor.dtype) if tensor.is_meta else tensor.detach().cpu()
        else:
            new = torch.rand(tensor.shape, dtype=dtype, generator=draw, device="cpu").add_(0.5)
            if tensor.ndim > 1 and tensor.numel():  # else a factor, a variance or a bias
                # Some outputs are small and show the bend of an activation, and others reach its bounds.
                sizes = torch.logspace(1, -2, len(new), dtype=dtype)[torch.randperm(len(new), generator=draw)]
                new.sub_(1).flatten(1).mul_(sizes[:, None] * (12 / new[0].numel()) ** 0.5)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(new, requires_grad=new.is_floating_point()) if is_parameter else new
    # A run may change buffers.
    return lambda: copy.deepcopy(
        module, {key: t if isinstance(t, nn.Parameter) else t.clone() for key, t in memo.items()}
    )


class ModuleTrial(NamedTuple):
    """A module that was called: makes copies of it, form and tokens, and the runs in evaluation and in training."""

    copied: Callable[[], nn.Module]
    layout: str
    x: Tensor
    runs: tuple[ModuleCall, ModuleCall]

    def difference(self, read: Reading) -> str:
        """Return the mode in which an expert in the place of the network that is read changes the result; "": none."""
        module = self.copied()
        part = read(module)
        assert part is not None
        layer: nn.Module = SparseFFN(OneExpert(part.build()), part, MoEConfig(2), "copy", "")  # type: ignore[arg-type]
        swapped = put_layer(module, "", part, layer) if part.dense is None else layer
        called: list[None] = []
        layer.register_forward_hook(lambda *_: called.append(None))
        for before, mode in zip(self.runs, ("evaluation", "training"), strict=True):
            try:
                after = run(swapped, self.x, mode == "training")
            except Exception:  # any: the module does not run with an expert there
                return mode
            if not (called and torch.equal(after.state, before.state) and are_close(after.y, before.y)):
                return mode
        return ""


def trials(
    module: nn.Module, dims: Iterable[int], failures: list[ValueError], read: Reading | None = None
) -> Iterator[ModuleTrial]:
    """Yield a trial of a module for each form of tokens that it takes.

    Args:
        module: any module, which stays as it is.
        dims: widths of a token to try.
        failures: gets the errors of forms that it does not take.
        read: what it reads of a copy has ``dense``, which is called; None: the copy is.
    """
    draw = torch.Generator().manual_seed(1)
    for dtype in TOLERANCE:
        copied, takes = copies_of(module, dtype), False
        for dim in dict.fromkeys(dims):
            x_TD = torch.randn(32, dim, generator=draw, dtype=dtype, device="cpu")
            x_TD *= torch.logspace(-1, 1, 32, dtype=dtype, device="cpu")[:, None]
            tokens = [("tokens", x_TD.view(shape)) for shape in ((2, 16, dim), (32, dim))]
            maps = [("channels_first", x_TD.view(shape).movedim(-1, 1)) for shape in ((2, 4, 4, dim), (2, 16, dim))]
            for layout, x in tokens + maps:
                try:
                    tried = copied()
                    call = None if read is None else read(tried).dense  # type: ignore[union-attr]
                    runs = run(tried, x, training=False, call=call), run(tried, x, training=True, call=call)
                except Exception as error:  # any: whether the module takes such an input is the question
                    failures.append(ValueError(f"called with a tensor of shape {tuple(x.shape)}, it raises {error!r}"))
                    failures[-1].__cause__ = error.with_traceback(None)  # the frames hold a copy
                    continue
                takes = True
                yield ModuleTrial(copied, layout, x, runs)
        if takes:
            return


def are_close(a: Any, b: Any) -> bool:
    """Return whether two results are the same but for rounding, vector by vector of the last axis."""
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(are_close, a, b))
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return a is b is None
    return bool(((a - b).norm(dim=-1) <= TOLERANCE[b.dtype] * b.norm(dim=-1)).all())


def check_part(module: nn.Module, part: FeedForwardPart, read: Reading) -> None:
    """Check that a part computes the same as the module that it was read of, on random weights and tokens.

    A network of another kind may have the names and shapes of one that a reader knows.

    Raises:
        ValueError: the two differ in evaluation or training, or the module, or else its ``dense``, takes no tokens.
    """
    if any(t.is_meta for t in part.weights.values()):
        return
    failures: list[ValueError] = []
    tried = trials(module, [part.dim], failures, None if part.dense is None else read)
    modes = [trial.difference(read) for trial in tried]
    if not modes:
        raise ValueError(
            f"a {type(module).__name__} cannot be compared with {part.expert}: {failures[0]}"
        ) from failures[0].__cause__
    if "" not in modes:
        raise ValueError(
            f"a {type(module).__name__} computes something else than {part.expert} in {modes[0]}, which its parts look "
            "like: register a reader of its own by core.convert.register_ffn"
        )
