"""The feed-forward network of any module, read from what its linear layers are called with: names do not matter.

Two linear layers with an activation between them are a network, or three of which two are multiplied. A random copy of
the module runs, and the activation is the one that the numbers fit. The network counts as read if the module computes
the same with an expert in its place, in evaluation and in training.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ...experts.general import GENERAL_ACTIVATIONS
from .feed_forward import FeedForwardPart, affine, feed_forward_part, is_linear, is_pointwise
from .trial import ModuleTrial, Reading, are_close, marked, trials

Seen = dict[Hashable, Reading | ValueError]
"""What reads the modules of a ``signature``, or the reason why none does. It lives as long as the modules do."""

MOST_LINEARS = 16
"""Linear layers of a module that is tried out. A larger one is a model of several blocks."""


@dataclass(frozen=True)
class _Formula:
    """The linear layers of a network, by name, and its activation.

    Attributes:
        w_in, w_out, w_gate: ``w_out(act(w_in(x)))`` or ``w_out(act(w_gate(x)) * w_in(x))``.
        gate_half: which half of ``w_in`` is the gate's, 0 or 1; None: ``w_in`` holds one matrix.
        activation: a name of ``GeneralFFN``.
    """

    w_in: str
    w_out: str
    w_gate: str | None = None
    gate_half: int | None = None
    activation: str = "relu"

    def linear_names(self) -> set[str]:
        """Return the names of the linear layers."""
        return {name for name in (self.w_in, self.w_out, self.w_gate) if name is not None}

    def hidden(self, calls: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
        """Return the hidden layer (T, F) without dropout, given the inputs and outputs of the linear layers."""
        act, (_, up) = GENERAL_ACTIVATIONS[self.activation], calls[self.w_in]
        if self.gate_half is not None:
            halves = up.chunk(2, 1)
            return act(halves[self.gate_half]) * halves[1 - self.gate_half]
        return act(up) if self.w_gate is None else act(calls[self.w_gate][1]) * up

    def part(self, module: nn.Module, **more: Any) -> FeedForwardPart:
        """Return the network with the weights of a module."""
        into, out = affine(module.get_submodule(self.w_in)), affine(module.get_submodule(self.w_out))
        gate = None if self.w_gate is None else affine(module.get_submodule(self.w_gate))
        if self.gate_half is not None:
            w, b = into[0].chunk(2, 1), (None, None) if into[1] is None else into[1].chunk(2)
            gate, into = (w[self.gate_half], b[self.gate_half]), (w[1 - self.gate_half], b[1 - self.gate_half])
        return feed_forward_part(into, out, gate, activation=self.activation, **more)


def signature(value: Any, met: dict[int, int] | None = None) -> Hashable:
    """Return what decides how a module computes, but for the numbers in its tensors."""
    met = {} if met is None else met
    if isinstance(value, bool | int | float | str | None):
        return type(value), value
    if id(value) in met:
        return met[id(value)]
    is_known = isinstance(value, nn.Module | Tensor | dict | list | tuple | set)
    if not is_known or (isinstance(value, Tensor) and is_lazy(value)):
        return id(value)  # of another kind only the very same object counts as equal
    met[id(value)] = len(met)
    if isinstance(value, Tensor):
        return type(value), value.shape, value.dtype, value.is_meta
    items = vars(value) if isinstance(value, nn.Module) else value
    pairs = items.items() if isinstance(items, dict) else enumerate(items)
    return type(value), tuple((key, signature(item, met)) for key, item in pairs)


def read_structure(module: nn.Module, seen: Seen) -> FeedForwardPart | ValueError:
    """Return the feed-forward network of a module, or the reason why none is read, also for modules like it."""
    key = signature(module)
    if key not in seen:
        seen[key] = _reading(module)
    read = seen[key]
    return read if isinstance(read, ValueError) else read(module)  # type: ignore[return-value]


def _reading(module: nn.Module) -> Reading | ValueError:
    """Return a function that reads modules like this one, or the reason why there is none."""
    try:
        sizes = {name: affine(m)[0].shape for name, m in module.named_modules() if name and is_linear(m)}
    except ValueError as error:  # quantized
        return error.with_traceback(None)
    if len(sizes) > MOST_LINEARS or not any(a[1] in (b[0], 2 * b[0]) for a, b in permutations(sizes.values(), 2)):
        return ValueError("it has no two linear layers of which one could read the other")
    failures: list[ValueError] = []
    problems: list[ValueError] = []
    for trial in trials(module, (D for D, _ in sizes.values()), failures):
        read = _read(module, trial)
        if not isinstance(read, str):
            return read
        problems.append(ValueError(read))
    return (problems or failures)[0]


def _read(module: nn.Module, trial: ModuleTrial) -> Reading | str:
    """Return a function that reads the network of a module, given a trial of it; or the reason why none is read."""
    evaluation, training = trial.runs
    formulas = {formula.w_out: formula for formula in _formulas(evaluation.linears)}
    if not formulas:
        return f"what is between its linear layers is none of {', '.join(GENERAL_ACTIVATIONS)}"
    if len(formulas) > 1:
        return f"it has several, behind which are {' and '.join(formulas)}"
    (formula,) = formulas.values()
    if not formula.linear_names() <= set(training.linears):
        return "it calls other layers in training"
    h_TF, rates = formula.hidden(training.linears), (0.0, *training.rates)
    dropout = next((p for p in rates if are_close(marked(h_TF, p), training.linears[formula.w_out][0])), None)
    if dropout is None:
        return "its hidden layer is changed in training, and not by dropout behind the activation"
    for place in _places(module, formula, trial):
        read = functools.partial(formula.part, hidden_dropout=dropout, **place)
        if trial.difference(read) == "":
            return read
    return (
        "it does more than a feed-forward network, or drops other numbers in training: what is around the network "
        "stays if the activation and the dropout behind it are modules, not functions"
    )


def _formulas(calls: dict[str, tuple[Tensor, Tensor]]) -> Iterator[_Formula]:
    """Yield the networks among linear layers that were called, in evaluation."""
    names = list(calls)
    for i, w_out in enumerate(names):
        h_TF, before = calls[w_out][0], names[:i]
        ways = [_Formula(w_in, w_out) for w_in in before]
        ways += [_Formula(w_in, w_out, gate_half=half) for w_in in before for half in (0, 1)]
        ways += [_Formula(w_in, w_out, gate) for w_in, gate in permutations(before, 2)]
        for way in ways:
            shapes = {tuple(calls[name][1].shape) for name in (way.w_in, way.w_gate) if name}
            same_input = way.w_gate is None or torch.equal(calls[way.w_in][0], calls[way.w_gate][0])
            if shapes != {(len(h_TF), h_TF.shape[1] * (1 if way.gate_half is None else 2))} or not same_input:
                continue
            tried = (replace(way, activation=name) for name in GENERAL_ACTIVATIONS)
            # Number by number: GELU and its approximation differ little, and only near zero.
            yield from (one for one in tried if torch.allclose(one.hidden(calls), h_TF, 1e-6, 1e-6))


def _places(module: nn.Module, formula: _Formula, trial: ModuleTrial) -> Iterator[dict[str, Any]]:
    """Yield places that a layer could take, as attributes of a ``FeedForwardPart``: the module's own, or a part's."""
    x, (ran, training) = trial.x, trial.runs
    x_TD = (x if trial.layout == "tokens" else x.movedim(1, -1)).flatten(0, -2)
    # Other code asks for names that are not numbers, such as the first weight's dtype: the container stays.
    stays = isinstance(module, nn.Sequential) and not all(name.isdigit() for name in module._modules)
    if not stays and torch.equal(ran.linears[formula.w_in][0], x_TD):
        yield from ({"layout": trial.layout, "output_dropout": p} for p in (0.0, *training.rates))
    first = min(formula.linear_names(), key=ran.called.index)
    if len({name.split(".")[0] for name in formula.linear_names()}) == 1:
        return  # the network is a child, which has a name of its own
    path, between = first.split("."), ran.called[ran.called.index(first) : ran.called.index(formula.w_out) + 1]
    for n in range(len(path), 0, -1):
        at = ".".join(path[:n])
        emptied = tuple(dict.fromkeys(name for name in between if not f"{name}.".startswith(f"{at}.")))
        form = "channels_first" if at == first and is_pointwise(module.get_submodule(first)) else "tokens"
        yield {"at": at, "emptied": emptied, "layout": form}
