"""A module answers a comparison through ``Comparable``: its baselines, blocks that they replace, routers and examples.

Training asks none of this. A module that is to be compared takes ``Comparable`` beside ``SparseModule``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule
from torch import Tensor

import core
from apps.nets.depths import TokenGate
from apps.nets.place import Place
from apps.train.step.module import TaskOutput


@dataclass(frozen=True)
class Baseline:
    """A model that ``moesaic compare`` trains beside the sparse one.

    Attributes:
        build: makes the untrained model, a ``SparseModule`` or an ``Estimator``; None where it cannot exist or
            coincides with another.
        note: description of the model, or the reason why there is none.
    """

    build: Callable[[], Any] | None
    note: str = ""


@runtime_checkable
class Estimator(Protocol):
    """A baseline that is no LightningModule, such as boosted trees: ``Baseline.build`` may return one.

    It has no steps, learning rate or FLOPs. It may tune itself in ``fit``, on the validation split. Or its attribute
    ``tunes`` is True, and ``tune(data, seed, search)`` returns plain settings, searched in the time that ``search``, a
    ``Search``, allows. They are searched once for all seeds, and are then the third argument of ``fit``. Its attribute
    ``kind`` says what a leaderboard calls it, such as "trees" or "linear".
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
        low, high: its 95 % interval over other examples of the same kind.
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


@dataclass(frozen=True)
class ExampleValues:
    """A quality as the mean of one value an example, so that an interval can count the examples.

    A quality that is no mean itself, such as an AUC, has values that it is the mean of, and that spread as it would
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
        config: configuration of the layers, or a list with that of each.
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
        """Return the parameters of a layer, and of shared experts its part of them; of different layers the mean."""
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
        """Return the FLOPs of a token in a layer; of different layers the mean."""
        each = [config.flops_per_token(self.dim, **self.flops_arguments) for config in self.configs]
        return sum(each) / len(each)


def heading_of(layers: Iterable[tuple[core.MoEConfig | core.MultiGateConfig, int]]) -> str:
    """Return what tables call a model with these layers, each given with the width D of its tokens."""
    for config, dim in layers:
        if not isinstance(config, core.MoEConfig):
            return "sparse"
        moe = config.split(dim)
        if moe.router.pairs_per_token(moe.num_experts) < moe.num_experts:
            return "sparse"
    return "MoE, all experts"


class Comparable:
    """A module that ``moesaic compare`` can ask. Every answer has a default, so a subclass gives those it has.

    Attributes:
        note: remark of a comparison on the model; mostly empty.
        task_metrics: the metric of each task, without the split, where a model has several: a verdict goes task by
            task, since a mean may be of different units.
    """

    note: str = ""
    task_metrics: tuple[str, ...] = ()

    @property
    def heading(self) -> str:
        """Return what tables call this model: a model that computes every expert is not called sparse."""
        layers = self.routed_layers()
        if layers is None:
            return "sparse"
        return heading_of((config, layers.dim) for config in layers.configs)

    def baselines(self) -> Mapping[str, Baseline]:
        """Return the models to compare this one with, by name."""
        return {}

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """Return dotted names of the blocks that a baseline replaces: the MoE layers, or the blocks around them."""
        layers = core.moe_layers(self)  # type: ignore[arg-type]
        return tuple(name for name, layer in layers.items() if not isinstance(layer, TokenGate))

    def routed_layers(self) -> RoutedLayers | None:
        """Return the layers whose router may be another; None where there are none."""
        return None

    def with_moe(self, moe: Any) -> Any:
        """Return an untrained copy of the model, with MoE layers of another configuration of the same class."""
        return self.twin(moe=moe, dense_ffn=None)  # type: ignore[attr-defined]  # of the ``SparseModule`` beside it

    def examples_of_test(self) -> list[dict[str, Any]]:
        """Return plain values for each example of the last test, which a comparison keeps; empty for none."""
        return []

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return the differences between two systems' ``examples_of_test``, the most important first."""
        return []

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues | None:
        """Return the quality of an evaluation by example; None: it is known of whole passes alone.

        Args:
            outs: what ``task_loss`` returns in evaluation for each batch of the pass.
        """
        return None

    def side_by_side(self, systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Return lines that show some examples as each system, named by its heading, answers them; may be empty."""
        return ""
