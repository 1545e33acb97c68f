"""The command lines of ``moesaic convert``, one for each kind, read and checked before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from apps.base.checks import check_at_least
from apps.cli.errors import UsageError
from apps.cli.options import Quantize
from apps.cli.parser import CommandLine, Config, Run, Shown


@dataclass(frozen=True, kw_only=True)
class ConvertOptions(CommandLine):
    """Convert a trained run into another one, and show both: size, parameters, FLOPs and the validation's score. The
    new folder is a run that moesaic test, predict and apps.load read as any other.

    Any --data.KEY VALUE names the data of the batches, such as --data.val_files PATH: their use of the experts decides.
    To train on: moesaic fit --weights DIR.

    Attributes:
        output: folder of the new run, which must not exist
        batches: validation batches for the score and for statistics; 0: neither
        config: configuration of the run, if none lies next to its checkpoint

    Raises:
        UsageError: an output that exists.
        ValueError: a value out of its range.
    """

    kind: ClassVar[str]
    prog: ClassVar[str] = "moesaic convert"
    sections: ClassVar[tuple[str, ...]] = ("data",)

    ckpt_path: Run
    output: Annotated[Path, Shown("DIR")]
    batches: int = 8
    config: Config | None = None

    def __post_init__(self) -> None:
        check_at_least(0, batches=self.batches)
        if self.output.exists() or self.output.is_symlink():
            raise UsageError(f"--output {self.output} exists: it stays as it is; give a new folder")

    @classmethod
    def read(cls, argv: Sequence[str]) -> Any:
        return cls.read_one_of(KINDS, argv)

    @property
    def runs(self) -> tuple[Path, ...]:
        """Folders of runs, or checkpoints: one, or for "merge" several."""
        return (self.ckpt_path,)


@dataclass(frozen=True, kw_only=True)
class Upcycle(ConvertOptions):
    """A dense run made sparse: its feed-forward networks become the experts' start.

    Attributes:
        moe: overlay whose model section has moe, and, where it is to differ, moe_blocks; experts are as the network
        start: copy, granular, drop, split or random
        noise: normal noise on each matrix, relative to its standard deviation (default: 0)
        seed: seed of gates, noise and random choices (default: 0)
        inexact: allow gates under which the model starts with other outputs
    """

    kind = "upcycle"
    moe: Config
    start: str = "copy"
    noise: float = 0.0
    seed: int = 0
    inexact: bool = False


@dataclass(frozen=True, kw_only=True)
class Densify(ConvertOptions):
    """A sparse run made dense: one feed-forward network that replaces each MoE layer.

    Attributes:
        how: average, use, most_used, sum, top_k or svd (default: average); use and most_used need batches
    """

    kind = "densify"
    how: str = "average"


@dataclass(frozen=True, kw_only=True)
class Prune(ConvertOptions):
    """Fewer experts: those with the highest scores stay, or all but the ones that are named.

    Attributes:
        keep: experts that each layer keeps, or their share below 1
        without: experts that go, by number or by domain; everything else stays as it is
        by: score: use, reap, man, msan or spread
        constants: put the mean output of an expert that goes in its place (MoNE)
        merge: merge the experts whose outputs are alike, instead of taking any away
    """

    kind = "prune"
    keep: int | float | None = None
    without: Annotated[tuple[str, ...], Shown("EXPERT")] = ()
    by: str = "reap"
    constants: bool = False
    merge: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.keep is None) == (not self.without):
            raise UsageError("one of --keep and --without says which experts stay")
        if self.constants and self.merge:
            raise UsageError("--constants with --merge: an expert that goes is merged or becomes a constant")


@dataclass(frozen=True, kw_only=True)
class Merge(ConvertOptions):
    """Several runs as one, their mean or their networks as experts; or one run and its adapters as one model.

    Attributes:
        how: mean of all tensors, or networks as experts
        weights: weights of the mean, one per run (default: equal ones)
        moe: overlay with the MoE layers, for btx: an expert for each run
        gates: random, or made of examples: the batches of each run's own validation
        seed: seed of the new gates (default: 0)
    """

    kind = "merge"
    ckpt_path: tuple[Run, ...]  # type: ignore[assignment]
    how: Literal["average", "btx"] = "average"
    weights: tuple[float, ...] | None = None
    moe: Config | None = None
    gates: Literal["random", "examples"] = "random"
    seed: int = 0

    @property
    def runs(self) -> tuple[Path, ...]:
        return self.ckpt_path


@dataclass(frozen=True, kw_only=True)
class Adapt(ConvertOptions):
    """A frozen run with trainable adapters, such as LoRA, on its linear layers.

    Attributes:
        moe: overlay whose model.moe has num_experts and, as expert, the adapters: a core.LoRA or core.IA3
        modules: patterns of linear layers' names; * also matches dots
        seed: seed of the adapters' start (default: 0)
    """

    kind = "adapt"
    moe: Config
    modules: Annotated[tuple[str, ...], Shown("PATTERN")]
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class QuantizedRun(ConvertOptions):
    """A run whose experts are stored in 8 or 4 bits; it is tested, served and exported, and does not train on.

    Attributes:
        how: int8, int4, or with a group of inputs that share a scale: int4:64
    """

    kind = "quantize"
    how: Quantize = "int8"


@dataclass(frozen=True, kw_only=True)
class Consolidate(ConvertOptions):
    """One file of a sharded checkpoint, with the optimizer's state."""

    kind = "consolidate"


@dataclass(frozen=True, kw_only=True)
class Specialize(ConvertOptions):
    """The network of one task, domain, pair or expert, or the experts that one part of the data uses.

    Attributes:
        task: cut out the network of a task, if the router is Task
        domain: cut out the network of a domain, if the router is Domain
        expert: cut out one expert of each layer
        pair: cut out one pair of a translator with the router Task, such as en-de
        keep: experts that each layer keeps, or their share below 1
        by: score: use, reap, man, msan or spread
    """

    kind = "specialize"
    task: int | None = None
    domain: int | None = None
    expert: int | None = None
    pair: Annotated[str, Shown("A-B")] | None = None
    keep: int | float | None = None
    by: str = "reap"


KINDS = {one.kind: one for one in (Upcycle, Densify, Prune, Merge, Adapt, QuantizedRun, Consolidate, Specialize)}


OPTIONS = ConvertOptions
