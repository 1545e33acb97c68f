"""The use of a multi-task model's gates and experts by the examples of a split, read from the tape.

``GateReader`` collects, batch by batch, the weight that each gate gives each expert and the share of each expert's
outputs that is zero. They show which gate uses which expert, on which column the gates depend, and whether there is
what HoME (arXiv 2408.05430) calls polarization: *collapse*, outputs that are nearly all zero; *degradation*, a shared
expert that one task has taken for itself; *underfitting*, a task's own experts that its gate passes by.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import core
from apps.recsys.encoding.features import Features
from apps.recsys.tables.rows.arrays import TableArrays
from apps.report.routed import gate_weights
from apps.report.use import numbers

COLLAPSED = 0.9
"""Share of zero outputs from which an expert has collapsed (HoME, section 1)."""

TAKEN = 0.9
"""Share of a shared expert's weight from one task, from which the task has it for itself."""

PASSED_BY = 0.05
"""Weight of all of a task's own experts together, up to which its gate passes them by."""

UNUSED = 0.01
"""Weight over the even share, up to which no gate uses an expert."""


@dataclass(frozen=True)
class Gate:
    """One gate over the examples of a split.

    Attributes:
        block: layer or level to which it belongs; "" if there is one.
        end: last part of its entry's name on the tape: "task0", "category0", "shared" (for a shared representation),
            "selection", "tasks" or "".
        task: number of its task; None if it serves all.
        experts: names of its E experts: "shared0", "task0.1", "domain.0", or their numbers.
        weights_NE: float32 (N, E), the weight of each expert's output; 0 if it is not computed.
        tasks: names of all tasks.
    """

    block: str
    end: str
    task: int | None
    experts: tuple[str, ...]
    weights_NE: np.ndarray
    tasks: tuple[str, ...]

    @property
    def label(self) -> str:
        """The gate in words: the name of its task, or its purpose."""
        if self.task is not None:
            return self.tasks[self.task]
        if self.end.startswith("category"):
            return f"category {self.end.removeprefix('category')}"
        return {"shared": "shared representation", "selection": "selection"}.get(self.end, "all tasks")

    @property
    def name(self) -> str:
        """The gate's label among the gates of all blocks."""
        return f"{self.block}: {self.label}" if self.block else self.label

    @property
    def expert_labels(self) -> tuple[str, ...]:
        """The experts in words."""
        return tuple(expert_label(name, self.tasks) for name in self.experts)

    @property
    def entropy(self) -> float:
        """The mean entropy of an example's weights over log E: 0 for one expert, 1 for all alike."""
        return float(_entropy(self.weights_NE).mean()) if len(self.weights_NE) else math.nan

    @property
    def mean_entropy(self) -> float:
        """The entropy of the mean weights over log E. It exceeds ``entropy`` where the gate depends on the example."""
        return float(_entropy(self.mean_E[None])[0])

    @property
    def mean_E(self) -> np.ndarray:
        """The mean weights, (E,)."""
        return self.weights_NE.mean(0, dtype=np.float64) if len(self.weights_NE) else np.zeros(len(self.experts))


def _entropy(weights_NE: np.ndarray) -> np.ndarray:
    E = weights_NE.shape[1]
    if E < 2:
        return np.zeros(len(weights_NE))
    p_NE = weights_NE / np.maximum(weights_NE.sum(1, keepdims=True, dtype=np.float64), 1e-20)
    return -np.sum(np.where(p_NE > 0, p_NE * np.log(np.maximum(p_NE, 1e-30)), 0.0), axis=1) / math.log(E)


# ---- reading


@dataclass
class GateReader:
    """Collects over batches::

        reader = GateReader(module)
        for batch in batches:
            with reader.reading():
                module(batch)

    Attributes:
        model: a model with MoE layers and ``features``, in evaluation mode.
        weights: the gates' weights, a list of batches by entry of the tape.
        experts: names of the experts, by entry.
        zeros: counts of each expert's outputs by block, (2, E): those that are zero, and all.
    """

    model: Any
    weights: dict[str, list[np.ndarray]] = field(default_factory=dict)
    experts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    zeros: dict[str, np.ndarray] = field(default_factory=dict)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Read the model's internals."""
        with torch.no_grad(), core.record(self.model) as tape, contextlib.ExitStack() as stack:
            for name, layer in core.moe_layers(self.model).items():
                levels = layer.experts if isinstance(layer.experts, nn.ModuleList) else [layer.experts]
                for i, experts in enumerate(levels):
                    block = f"{name}.level{i}" if isinstance(layer.experts, nn.ModuleList) else name
                    stack.enter_context(experts.register_forward_hook(functools.partial(self._count, block)))
            yield
        self.add(tape)

    def add(self, tape: core.Tape) -> None:
        """Read a tape of the model."""
        for entry in tape.entries:
            self.weights.setdefault(entry.name, []).append(gate_weights(entry.routing).cpu().numpy())
            names = tuple(getattr(entry.routing, "expert_names", ()))
            self.experts[entry.name] = names or self._names(entry.name, self.weights[entry.name][-1].shape[1])

    def _count(self, block: str, experts: Any, args: tuple[Any, ...], output: Any) -> None:
        """Count the zeros among the outputs of ``experts``, in whichever way they are asked for them."""
        E = experts.num_experts
        if isinstance(output, Tensor):  # each expert on every example, (T, n, H)
            zeros, every = (output == 0).sum((0, 2)), torch.full((output.shape[1],), output[:, 0].numel())
        elif output.combined or not output.gathered:
            return  # summed in the kernel: there are no outputs to look at
        else:
            y_RH = output.x
            expert_R = torch.bucketize(torch.arange(len(y_RH), device=y_RH.device), output.offsets_E, right=True)
            zeros = torch.bincount(expert_R, weights=(y_RH == 0).sum(1).double(), minlength=E + 1)[:E]
            every = y_RH.shape[1] * torch.bincount(expert_R, minlength=E + 1)[:E]
        sums = self.zeros.setdefault(block, np.zeros((2, E)))
        sums[0, : len(zeros)] += zeros.cpu().numpy()
        sums[1, : len(every)] += every.cpu().numpy()

    def _groups(self, entry: str) -> Any:
        """Return the groups of the experts that a layer, or its level, tells apart; None if it tells none."""
        layer = self._layer(entry)
        groups = getattr(core.moe_layers(self.model)[layer], "groups", None)
        if not isinstance(groups, tuple):
            return groups
        level = re.match(r"\.?level(\d+)", entry[len(layer) :])  # groups of their own, level by level
        return groups[int(level[1])] if level else groups[-1]

    def _names(self, entry: str, number: int) -> tuple[str, ...]:
        """Return the names of all experts of a block: their numbers where the layer tells nothing of them."""
        groups = self._groups(entry)
        if groups is not None:
            return tuple(groups.all_names())
        layer = core.moe_layers(self.model)[self._layer(entry)]
        return tuple(getattr(layer, "expert_names", numbers(number)))

    def _layer(self, entry: str) -> str:
        """Return the layer of an entry: the longest name that starts the entry's."""
        layers = sorted(core.moe_layers(self.model), key=len, reverse=True)
        return next(n for n in layers if entry == n or entry.startswith(f"{n}.") or not n)

    def _blocks(self) -> dict[str, str]:
        """Return the short names of the blocks, in the order of the passes."""
        full = dict.fromkeys(self._split(name)[0] for name in self.weights)
        return dict(zip(full, _short(list(full)), strict=True))

    def _split(self, entry: str) -> tuple[str, str]:
        """Return an entry's block, a layer or a level of one, and its end."""
        layer = self._layer(entry)
        level, _, end = entry[len(layer) :].lstrip(".").rpartition(".")
        return ".".join(p for p in (layer, level) if p), end

    def gates(self) -> list[Gate]:
        """Return the gates in the order of the passes."""
        short, gates = self._blocks(), []
        for name, parts in self.weights.items():
            block, end = self._split(name)
            task = int(end[4:]) if end.startswith("task") and end[4:].isdigit() else None
            weights_NE = np.concatenate(parts)
            gates.append(Gate(short[block], end, task, self.experts[name], weights_NE, self.model.features.tasks))
        return gates

    def zero_share(self) -> dict[str, dict[str, float]]:
        """Return the share of each expert's outputs that is zero, by block; NaN for one that computed nothing.

        A block whose outputs are summed in a kernel is missing.
        """
        short, shares_by_block = self._blocks(), {}
        for block, (zeros_E, all_E) in self.zeros.items():
            names = self._names(block, len(all_E))
            shares = np.where(all_E > 0, zeros_E / np.maximum(all_E, 1), np.nan)
            shares_by_block[short.get(block, block)] = dict(zip(names, shares.tolist(), strict=True))
        return shares_by_block


def _short(blocks: Sequence[str]) -> list[str]:
    """Return names of blocks in words, without what all have in common; "" for a lone one."""
    if len(blocks) < 2:
        return [""] * len(blocks)
    parts = [block.split(".") for block in blocks]
    start = next(i for i, p in enumerate(zip(*parts, strict=False)) if len(set(p)) > 1 or i == min(map(len, parts)) - 1)
    if any(p[start].isdigit() for p in parts) and start:
        start -= 1  # "members 0" says more than "0"
    ends = [p[::-1] for p in parts]
    same = next((i for i, p in enumerate(zip(*ends, strict=False)) if len(set(p)) > 1), 0)
    words = (" ".join(p[start : max(len(p) - same, start + 1)]) for p in parts)
    return [re.sub(r"\blevel(\d)", r"level \1", w) for w in words]


# ---- judging


@dataclass(frozen=True)
class ExpertUse:
    """One expert of a block.

    Attributes:
        block: see ``Gate``.
        name: see ``Gate.experts``.
        label: the name in words.
        zero_share: share of its outputs that is zero; NaN if they are summed in a kernel, or not computed.
        weights: its mean weight by the label of the gate; NaN for gates that cannot reach it.
        problem: "collapsed", "taken by <task>", "passed by", "unused", several with commas; "" if there is none.
    """

    block: str
    name: str
    label: str
    zero_share: float
    weights: dict[str, float]
    problem: str = ""


def expert_label(name: str, tasks: Sequence[str]) -> str:
    """Return an expert in words: "task0.1" is "income 1" with the first task income."""
    own = re.fullmatch(r"(task|self)(\d+)\.(.*)", name)
    if own:
        return f"{tasks[int(own[2])]} {'self ' if own[1] == 'self' else ''}{own[3]}"
    return re.sub(r"^(shared|category|category-self|domain)(\d+)", r"\1 \2", name).replace(".", " ")


def expert_use(gates: Sequence[Gate], zero_share: Mapping[str, Mapping[str, float]]) -> list[ExpertUse]:
    """Return every expert, with the gates that reach it and its problems."""
    uses = []
    for block in dict.fromkeys(g.block for g in gates):
        own, zeros = [g for g in gates if g.block == block], zero_share.get(block, {})
        names = dict.fromkeys([*(name for g in own for name in g.experts), *zeros])
        judges = [g for g in own if g.task is not None] or own
        for name in names:
            weights = {g.label: float(g.mean_E[g.experts.index(name)]) if name in g.experts else math.nan for g in own}
            zero = zeros.get(name, math.nan)
            problem = ", ".join(_problems(name, zero, judges))
            uses.append(ExpertUse(block, name, expert_label(name, own[0].tasks), zero, weights, problem))
    return uses


def _problems(name: str, zero: float, gates: Sequence[Gate]) -> Iterator[str]:
    if zero > COLLAPSED:
        yield "collapsed"
    reach = [g for g in gates if name in g.experts]
    weights = {g.label: float(g.mean_E[g.experts.index(name)]) for g in reach}
    if reach and all(w * len(g.experts) <= UNUSED for w, g in zip(weights.values(), reach, strict=True)):
        yield "unused"
    elif name.startswith("shared") and len(weights) > 1 and max(weights.values()) >= TAKEN * sum(weights.values()):
        yield f"taken by {max(weights, key=weights.__getitem__)}"
    for gate in reach:
        prefix = f"task{gate.task}."
        own = [i for i, n in enumerate(gate.experts) if n.startswith(prefix)]
        if name.startswith(prefix) and len(own) < len(gate.experts) and gate.mean_E[own].sum() <= PASSED_BY:
            yield "passed by"


# ---- on what the gates depend


def dependence(gates: Sequence[Gate], arrays: TableArrays) -> dict[str, dict[str, float]]:
    """Return the share of the variance of a gate's weights that a column explains, by column and gate.

    It is the correlation ratio, sum over the values v of ``n_v (mean_v - mean)^2`` over ``sum (x - mean)^2``, both
    summed over the experts. Numbers are cut at their quantiles. Columns of more than 255 values, which would explain
    much by having many, and multi-valued ones are left out. A gate that weights all examples alike has none.

    Returns:
        ``{column: {gate.name: share}}``.
    """
    explained: dict[str, dict[str, float]] = {}
    for column, values_N, _ in coded_columns(arrays):
        counts_V = np.bincount(values_N)
        used = counts_V > 0
        for gate in gates:
            x_NE = gate.weights_NE.astype(np.float64)
            x_NE = x_NE - x_NE.mean(0)
            total = float(np.sum(x_NE**2))
            if total <= 1e-12 * x_NE.size:
                continue
            sums_VE = np.stack([np.bincount(values_N, weights=x_N) for x_N in x_NE.T], 1)
            between = float(np.sum(sums_VE[used] ** 2 / counts_V[used, None]))
            explained.setdefault(column, {})[gate.name] = between / total
    return explained


MAX_CODES = 255
"""Values of a categorical column that is shown value by value."""


def domain_column(features: Features) -> str:
    """Return the name of the domain in `coded_columns`, which no column has."""
    names = [*(f.name for f in features.categorical), *(c.name for c in features.continuous)]
    return "domain" if "domain" not in names else "(domain)"


def coded_names(features: Features) -> list[str]:
    """Return the names of the columns in `coded_columns`: one value per row, 255 at most, and numbers that vary."""
    names = [f.name for f in features.single if f.num_rows <= MAX_CODES]
    names += [domain_column(features)] * bool(features.num_domains)
    return names + [c.name for c in features.continuous if c.quantiles]


def coded_columns(arrays: TableArrays) -> Iterator[tuple[str, np.ndarray, list[str] | None]]:
    """Yield columns as codes: (name, int64 (N,), words of the codes or None if the data module has them)."""
    features = arrays.features
    names = coded_names(features)
    single = [f.name for f in features.single]
    for name, ids_N in zip(single, arrays.ids_NF.T, strict=True):
        if name in names:
            yield name, ids_N, None
    if arrays.domain_N is not None:
        yield domain_column(features), arrays.domain_N, None
    for column, values_N in zip(features.continuous, arrays.dense_NC.T, strict=True):
        q = np.asarray(column.quantiles)
        if len(q) > 12:
            q = np.unique(q[np.linspace(0, len(q) - 1, 12).round().astype(int)])
        codes_N = np.where(np.isnan(values_N), len(q) + 1, np.searchsorted(q, values_N))
        if len(q):
            middle = [f"over {a:g} to {b:g}" for a, b in itertools.pairwise(q)]
            yield column.name, codes_N, [f"to {q[0]:g}", *middle, f"over {q[-1]:g}", "missing"]
