"""What a module tells a comparison: its baselines, the blocks they replace, its routers' place, and its test examples.

Training asks none of this. A module that is to be compared takes ``Comparable`` beside ``SparseModule``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from lightning.pytorch import LightningDataModule

import core
from apps.nets.place import Place


@dataclass(frozen=True)
class Baseline:
    """A model that ``moesaic compare`` trains beside the sparse one.

    Attributes:
        build: makes it, untrained: a ``SparseModule``, or an ``Estimator``; None where it cannot exist or coincides
            with another.
        note: what it is, or why there is none.
    """

    build: Callable[[], Any] | None
    note: str = ""


@runtime_checkable
class Estimator(Protocol):
    """A baseline that is no LightningModule, such as boosted trees: ``Baseline.build`` may return one.

    It has no steps, learning rate or FLOPs. What it tunes, it tunes in ``fit``, on the validation split. Or it has an
    attribute ``tunes``, True where there is anything to search, and ``tune(data, seed, search)``, which finds plain
    settings in the time that ``search``, a ``Search``, allows; they are searched once, before the training with each
    seed, and are the third argument of its ``fit``.
    """

    def fit(self, data: LightningDataModule, seed: int) -> None:
        """Train on the training split of ``data``, which is set up already."""

    def evaluate(self, data: LightningDataModule, split: Literal["val", "test"]) -> Mapping[str, float]:
        """Return the metrics that the sparse module logs, named without the split: ``{"top1": 0.93}``."""


@dataclass(frozen=True)
class ExampleDifference:
    """How two systems differ on the same test examples.

    Attributes:
        name: of the figure, such as "BLEU".
        difference: the first system's minus the second's.
        low, high: its 95 % interval over other examples of the same kind.
        p: of no difference.
        method: what was done, in a few words.
        is_part: it is of a part of the examples; a comparison shows those of all on the screen.
        over: what the interval is over, such as "test sentences".
    """

    name: str
    difference: float
    low: float
    high: float
    p: float
    method: str
    is_part: bool = False
    over: str = "test examples"


@dataclass(frozen=True)
class RoutedLayers:
    """The MoE layers of a model, as a comparison of routers needs to know them.

    Attributes:
        config: of the layers.
        dim: width D of the tokens that reach them.
        place: what routers are given there, and what they must not do.
        flops_arguments: further arguments of ``config.flops_per_token`` at these layers, such as the length of a
            sequence.
    """

    config: core.MoEConfig | core.MultiGateConfig
    dim: int
    place: Place
    flops_arguments: Mapping[str, int] = field(default_factory=dict)

    def flops_per_token(self) -> float:
        return self.config.flops_per_token(self.dim, **self.flops_arguments)


class Comparable:
    """A module that ``moesaic compare`` can ask. Every answer has a default, so a subclass gives those it has.

    Attributes:
        note: what a comparison says of the model, which it calls "sparse", where that needs a word.
    """

    note: str = ""

    def baselines(self) -> Mapping[str, Baseline]:
        """Return the models to compare this one with, by name."""
        return {}

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """Dotted names of the blocks that a baseline of equal cost replaces: the MoE layers, or what holds them."""
        return tuple(core.moe_layers(self))  # type: ignore[arg-type]

    def routed_layers(self) -> RoutedLayers | None:
        """Return the layers whose router may be another; None where there are none."""
        return None

    def with_moe(self, moe: Any) -> Any:
        """Return the model anew, untrained, with other MoE layers: a configuration of the class of its own ones."""
        raise NotImplementedError(f"{type(self).__name__} must define with_moe(moe) for a comparison of routers")

    def examples_of_test(self) -> list[dict[str, Any]]:
        """Return plain values of each example of the last test, which a comparison keeps; empty: it keeps none."""
        return []

    def compare_examples(
        self, first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
    ) -> list[ExampleDifference]:
        """Return the differences between two systems' ``examples_of_test``, the most important first."""
        return []

    def side_by_side(self, systems: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
        """Return lines that show some examples as each system has them, by its heading; empty: none are shown."""
        return ""
