"""``Comparison`` is a model as ``moesaic compare`` sees it: its baselines, what they replace, its routers and examples.

Its matched dense baselines and the search of an estimator's settings are here too. Training uses none of this. A room
registers its own as ``COMPARISON``, which ``apps.registry.comparison_of`` finds.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn

import core
from apps.nets.depths import TokenGate
from apps.nets.place import Place
from apps.train.step.module import TaskOutput
from core.convert import SolvedWidth, SparseFFN, same_width, solve_width, twin_widths


class Search:
    """The settings that a baseline tries, and the time for them.

    A setting starts while there is time left, and then runs to its end. Results are kept by the setting's name, so that
    an interrupted search continues with the next setting, and the seconds of all count.

    Args:
        minutes: time for all settings of all tasks.
        tried: results of an earlier part of the search.
        keep: called with ``tried`` after each setting.

    Attributes:
        tried: ``quality`` on the validation split and ``seconds`` of each tried setting, by its name.
        total: number of settings of the whole search, which the baseline counts up.
    """

    def __init__(
        self,
        minutes: float = math.inf,
        tried: Mapping[str, Mapping[str, float]] | None = None,
        keep: Callable[[dict[str, dict[str, float]]], None] = lambda tried: None,
    ) -> None:
        self.minutes, self.keep, self.total = minutes, keep, 0
        self.tried = {name: dict(result) for name, result in (tried or {}).items()}

    @property
    def seconds(self) -> float:
        return sum(result["seconds"] for result in self.tried.values())

    def quality(self, name: str, run: Callable[[], float], until: float = math.inf) -> float | None:
        """Return the quality of a setting, which ``run()`` measures where it is not known; None if time is up.

        Args:
            name: name of the setting.
            run: tries the setting and returns its quality.
            until: share of the minutes within which the setting is begun.
        """
        if name not in self.tried:
            if self.seconds >= 60 * self.minutes * until:
                return None
            began = time.perf_counter()
            quality = run()
            self.tried[name] = {"quality": quality, "seconds": time.perf_counter() - began}
            self.keep(self.tried)
        return self.tried[name]["quality"]


@dataclass(frozen=True)
class Baseline:
    """A model that ``moesaic compare`` trains beside the sparse one.

    Attributes:
        build: makes the untrained model, a ``SparseModule`` or an ``Estimator``; None if it cannot exist or coincides
            with another.
        note: description of the model, or the reason why there is none.
    """

    build: Callable[[], Any] | None
    note: str = ""


@runtime_checkable
class Estimator(Protocol):
    """A baseline that is not a LightningModule, such as boosted trees: ``Baseline.build`` may return one.

    It has no steps, learning rate or FLOPs. It may tune itself in ``fit``, on the validation split. Or its attribute
    ``tunes`` is True, and ``tune(data, seed, search)`` returns plain settings, searched in the time that ``search``, a
    ``Search``, allows. They are searched once for all seeds, and are then the third argument of ``fit``. Its attribute
    ``kind`` is its name in a leaderboard, such as "trees" or "linear".
    """

    def fit(self, data: LightningDataModule, seed: int) -> None:
        """Train on the training split of ``data``, which has been set up."""

    def evaluate(self, data: LightningDataModule, split: Literal["val", "test"]) -> Mapping[str, float]:
        """Return the metrics that the sparse module logs, named without the split: ``{"top1": 0.93}``."""


@dataclass(frozen=True)
class ExampleDifference:
    """A difference between two systems on the same test examples.

    Attributes:
        name: name of the figure, such as "BLEU".
        difference: the first system's figure minus the second's.
        low, high: its 95 % confidence interval over other examples of the same kind.
        p: probability of such a difference between equal systems.
        method: the statistical method, in a few words.
        over: kind of the examples, such as "test sentences".
    """

    name: str
    difference: float
    low: float
    high: float
    p: float
    method: str
    over: str = "test examples"

    def texts(self, percent: bool) -> tuple[str, str, str]:
        """Return the difference and its interval as texts, in points if the figure is shown in percent."""
        own, low, high = (f"{100**percent * value:+.2f}" for value in (self.difference, self.low, self.high))
        return own, low, high


@dataclass(frozen=True)
class ExampleValues:
    """A quality as the mean of one value per example, so that an interval can count the examples.

    A quality that is not a mean itself, such as an AUC, has values that it is the mean of, and that spread as it would
    over other examples (its influence function).

    Attributes:
        name: name of the quality, such as "top1".
        values_N: float64 (N,), in the order of the examples.
        higher_is_better: True where a larger quality is better.
    """

    name: str
    values_N: Tensor
    higher_is_better: bool = True

    @property
    def mean(self) -> float:
        """Return the quality."""
        return float(self.values_N.mean())


@dataclass(frozen=True)
class RoutedLayers:
    """The MoE layers of a model, as a comparison of routers needs to know them.

    Attributes:
        config: configuration of the layers, or a list with one for each.
        dim: width D of the tokens that reach them.
        place: inputs of a router there, and the rules it must keep.
        flops_arguments: further arguments of ``config.flops_per_token``, such as the length of a sequence.
        num_sharing: number of layers that share one set of experts; 1: each has its own.
    """

    config: core.MoEConfig | core.MultiGateConfig | Sequence[core.MoEConfig]
    dim: int
    place: Place
    flops_arguments: Mapping[str, int] = field(default_factory=dict)
    num_sharing: int = 1

    def num_params(self) -> float:
        """Return a layer's parameters, with its share of shared experts; the mean if layers differ."""
        each = []
        for config in self.configs:
            assert isinstance(config, core.MoEConfig)
            config = config.split(self.dim)
            own = config.own_params(self.dim)
            each.append(own + (config.num_params(self.dim) - own) / self.num_sharing)
        return sum(each) / len(each)

    @property
    def configs(self) -> Sequence[core.MoEConfig | core.MultiGateConfig]:
        """Return the configuration of each layer, or the one of all."""
        return (self.config,) if isinstance(self.config, core.MoEConfig | core.MultiGateConfig) else self.config

    def flops_per_token(self) -> float:
        """Return a layer's FLOPs per token; the mean if layers differ."""
        each = [config.flops_per_token(self.dim, **self.flops_arguments) for config in self.configs]
        return sum(each) / len(each)


def heading_of(layers: Iterable[tuple[core.MoEConfig | core.MultiGateConfig, int]]) -> str:
    """Return the name in tables of a model with these layers, each given with the width D of its tokens."""
    heading = "sparse"
    for config, dim in layers:
        if not isinstance(config, core.MoEConfig):
            return "sparse"
        moe = config.split(dim)
        if moe.router.pairs_per_token(moe.num_experts) < moe.num_experts:
            return "sparse"
        heading = "MoE, all experts"
    return heading


class Comparison:
    """A model as ``moesaic compare`` sees it. Every answer has a default, so a subclass gives those it has.

    Args:
        module: the ``SparseModule``.

    Attributes:
        note: remark of a comparison on the model; mostly empty.
        task_metrics: the metric of each task, without the split, if a model has several: a verdict goes task by task,
            since a mean may be of different units.
    """

    note: str = ""
    task_metrics: tuple[str, ...] = ()

    def __init__(self, module: Any) -> None:
        self.module = module

    @property
    def heading(self) -> str:
        """Return the name of this model in tables: a model that computes every expert is not called sparse."""
        layers = self.routed_layers()
        own = [] if layers is None else [(config, layers.dim) for config in layers.configs]
        return heading_of(own or [(m.config, m.dim) for m in self.module.modules() if isinstance(m, SparseFFN)])

    def baselines(self) -> Mapping[str, Baseline]:
        """Return the models to compare this one with, by name."""
        return {}

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """Return dotted names of the blocks that a baseline replaces: the MoE layers, or the blocks around them."""
        layers = core.moe_layers(self.module)
        return tuple(name for name, layer in layers.items() if not isinstance(layer, TokenGate))

    def routed_layers(self) -> RoutedLayers | None:
        """Return the layers whose router may be another; None if there are none."""
        return None

    def with_moe(self, moe: Any) -> Any:
        """Return an untrained copy of the model, with MoE layers of another configuration of the same class."""
        return self.module.twin(moe=moe, dense_ffn=None)

    def examples_of_test(self) -> list[dict[str, Any]]:
        """Return plain values for each example of the last test, which a comparison keeps; empty for none."""
        return []

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return the differences between two systems' ``examples_of_test``, the most important first."""
        return []

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues | None:
        """Return the quality of an evaluation by example; None: it is known only of whole passes.

        Args:
            outs: what ``task_loss`` returns in evaluation for each batch of the pass.
        """
        return None

    def task_values(self, outs: Sequence[TaskOutput]) -> dict[str, tuple[str, np.ndarray]]:
        """Return, by task, the name of its metric and float64 (N,) values by example whose mean it is; may be empty."""
        return {}

    def side_by_side(self, systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Return lines that show some examples as each system, named by its heading, answers them; may be empty."""
        return ""


@dataclass(frozen=True)
class DenseTwin:
    """Rebuilds ``sparse`` with a dense FFN instead of its experts; unlike a closure, it pickles.

    Attributes:
        sparse: ``SparseModule`` with the arguments ``moe`` and ``dense_ffn``.
        ffn: FFN of the blocks that have experts.
        changed: further arguments of the module, by name.
    """

    sparse: Any
    ffn: core.DenseFFN
    changed: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> Any:
        return self.sparse.twin(moe=None, dense_ffn=self.ffn, **self.changed)


def equal_widths(
    prefix: str, dense: core.DenseFFN, dim: int, flops: float, params: float, each: str = ""
) -> dict[str, SolvedWidth]:
    """Return the hidden dims at which ``dense`` costs ``flops`` per token, and at which it has ``params`` parameters.

    Their names are "<prefix>_equal_flops" and "<prefix>_equal_params". ``each`` ends the unit in a message, as " a
    block".
    """

    def at(width: int) -> core.DenseFFN:
        return dataclasses.replace(dense, hidden_dim=width)

    return {
        f"{prefix}_equal_flops": solve_width(lambda width: at(width).flops_per_token(dim), flops, f"flops{each}"),
        f"{prefix}_equal_params": solve_width(lambda width: at(width).num_params(dim), params, f"params{each}"),
    }


def dense_twins(sparse: Comparison, dense: core.DenseFFN) -> dict[str, Baseline]:
    """Return dense models of equal active FLOPs and of equal parameters.

    The other blocks of the model have the FFN ``dense``; only the FFNs instead of experts are wider, all alike.
    """
    layers = sparse.routed_layers()
    if layers is None:
        return {}
    widths = equal_widths("dense", dense, layers.dim, layers.flops_per_token(), layers.num_params())
    says = f"FFN hidden dim {{width}} in place of experts, {dense.hidden(layers.dim)} elsewhere"
    return baselines_of(
        widths, lambda width: DenseTwin(sparse.module, dataclasses.replace(dense, hidden_dim=width)), says
    )


def baselines_of(
    widths: Mapping[str, SolvedWidth], build: Callable[[int], Callable[[], Any]], says: str
) -> dict[str, Baseline]:
    """Return a baseline for each width, or a note if there is none or it coincides with another.

    Args:
        widths: solved widths by the baselines' names.
        build: returns what makes the model of a width, such as a ``DenseTwin``; its result pickles.
        says: description of the model, with ``{width}`` in it.
    """
    baselines: dict[str, Baseline] = {}
    for name, (width, problem) in widths.items():
        twin = next((n for n, b in baselines.items() if b.build and same_width(width, widths[n].width)), None)
        note = says.format(width=width)
        if problem:
            baselines[name] = Baseline(None, problem)
        elif twin is not None:
            baselines[name] = Baseline(None, f"coincides with {twin}: {note}, there {widths[twin].width}")
        else:
            baselines[name] = Baseline(build(width), note)
    return baselines


def adopted_twins(
    dense: nn.Module, sparse: nn.Module, build: Callable[[Literal["flops", "params"]], Callable[[], Any]]
) -> dict[str, Baseline]:
    """Return the baselines of a network that ``core.sparsify`` made: wider networks in place of experts.

    Args:
        dense: the network that it was made of.
        sparse: the network itself.
        build: returns what makes the twin of equal "flops" or "params"; its result pickles.
    """
    baselines: dict[str, Baseline] = {}
    widths: dict[str, list[int]] = {}
    costs: tuple[Literal["flops", "params"], ...] = ("flops", "params")
    for cost in costs:
        name = f"dense_equal_{cost}"
        try:
            solved = twin_widths(dense, sparse, cost).values()
        except ValueError as error:
            baselines[name] = Baseline(None, str(error))
            continue
        own = [width.width for width in solved]
        changes = ", ".join(dict.fromkeys(f"{width.before} to {width.width}" for width in solved))
        note = f"hidden dim {changes} in place of experts"
        twin = next((n for n, other in widths.items() if all(map(same_width, own, other))), None)
        if twin is None:
            baselines[name], widths[name] = Baseline(build(cost), note), own
        else:
            baselines[name] = Baseline(None, f"coincides with {twin}: {note}")
    return baselines
