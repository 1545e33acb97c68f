"""The command line of ``moesaic plan``, read and checked before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import yaml

from apps.base.checks import check_at_least, check_name
from apps.cli.classes import with_long_names
from apps.cli.configs import at, merge, read_config
from apps.cli.errors import UsageError
from apps.cli.flags import with_flags
from apps.cli.parser import CommandLine, Configs, Folder, Shown
from apps.plan.formulas import GPUS, Gpu

PRECISIONS = ("bf16-mixed", "32-true", "bf16-true")
"""The first is that of a GPU's training which names none."""
_STRATEGY = ("trainer", "strategy")
_Kind = Annotated[str, Shown("NAME", f"their kind: {', '.join(GPUS)}; figures below go before its own", ("--gpu",))]
_Rows = Annotated[int, Shown("ROWS")]
_Gigabytes = Annotated[float, Shown("GB")]


@dataclass(frozen=True, kw_only=True)
class PlanOptions(CommandLine):
    """Print the cost of a training on many GPUs, only from its configuration: memory and traffic of a GPU, the time of
    a step, the best expert-parallel degree, and where it breaks. No data is read and nothing is computed.

    Any value of the model's or the data's configuration may be given as well: --model.moe.num_experts 64,
    --data.block_size 4096. Facts from the data are given in the same way, such as --model.num_classes 1000. The columns
    of a table: --tables 1000000000 --pooling 20, and with --histories 50 the last 50 items of a row. A step's time
    counts evenly loaded experts; docs/concepts/planning.md has the formulas.

    Attributes:
        files: configuration; overlays may follow
        gpus: GPUs of the training
        gpus_per_node: GPUs of a node
        tokens_per_gpu: tokens of a GPU in a step (default: by the configuration)
        batch: examples of a GPU in a step (default: the configuration's)
        length: tokens of an example, if the configuration does not say
        given_precision: bf16-mixed, 32-true, bf16-true (default: the configuration's, else bf16-mixed)
        given_dtype: FSDP2's mixed precision: products and gathered parameters
        activation_checkpointing: blocks compute their activations again
        static_all_to_all: every place of the capacity is sent (capacity_factor)
        memory: memory of a GPU
        tflops: peak of its matmuls in this precision
        node_bandwidth: GB/s that leave it for GPUs of its node
        network_bandwidth: GB/s that leave it for other nodes
        efficiency: part of the peak that is reached
        latency: seconds of a message
        usable_memory: part of the memory for tensors; the rest is for contexts, buffers of NCCL, fragments
        tables: a recommender's tables, one for each column
        pooling: ids of a column in an example
        numbers: its columns of numbers (default: 0)
        tasks: its tasks
        domains: its domains, for layers that know some (default: 0)
        histories: items of an example in each of its histories, of the ids of the first table and on (default: none)
        item_tables: tables of a retriever's tower of items
        item_numbers: its columns of numbers (default: 0)
        output: folder for the overlay and the table as CSV

    Raises:
        UsageError: a configuration that is missing or names no model, or a GPU without its figures.
        ValueError: a value out of its range, or an unknown GPU.
    """

    prog: ClassVar[str] = "moesaic plan"
    sections: ClassVar[tuple[str, ...]] = ("model", "data", "trainer", "float32_matmul_precision")

    files: Configs
    gpus: int
    kind: _Kind | None = None
    gpus_per_node: int = 8
    tokens_per_gpu: int | None = None
    batch: int | None = None
    length: int | None = None
    given_precision: Annotated[str, Shown("NAME", words=("--precision",))] | None = None
    given_dtype: Annotated[Literal["bfloat16"], Shown(words=("--param_dtype",))] | None = None
    activation_checkpointing: bool = False
    static_all_to_all: bool = False
    memory: _Gigabytes | None = None
    tflops: Annotated[float, Shown("T")] | None = None
    node_bandwidth: _Gigabytes | None = None
    network_bandwidth: _Gigabytes | None = None
    efficiency: Annotated[float, Shown("P")] = 0.4
    latency: Annotated[float, Shown("S")] = 1e-5
    usable_memory: Annotated[float, Shown("P")] = 0.9
    tables: tuple[_Rows, ...] = ()
    pooling: int = 1
    numbers: int = 0
    tasks: int = 1
    domains: int = 0
    histories: Annotated[tuple[int, ...], Shown("ITEMS")] = ()
    item_tables: tuple[_Rows, ...] = ()
    item_numbers: int = 0
    output: Folder | None = None

    def __post_init__(self) -> None:
        model = self.config.get("model")
        if self.files and not (isinstance(model, str) or (isinstance(model, Mapping) and "class_path" in model)):
            files = " + ".join(map(str, self.files))
            raise UsageError(f"{files} names no model (model.class_path): there is nothing to plan")
        check_name("precision", self.precision, PRECISIONS)
        check_at_least(1, gpus=self.gpus, gpus_per_node=self.gpus_per_node, batch=self.batch)
        check_at_least(1, tokens_per_gpu=self.tokens_per_gpu, length=self.length, tasks=self.tasks)
        check_at_least(1, pooling=self.pooling)
        check_at_least(1, **{n: min(getattr(self, n), default=1) for n in ("tables", "item_tables", "histories")})
        check_at_least(0, numbers=self.numbers, latency=self.latency, domains=self.domains)
        check_at_least(0, item_numbers=self.item_numbers)
        if len(self.histories) > len(self.tables):
            raise ValueError(
                f"histories={[*self.histories]} has the ids of as many tables, of {len(self.tables)} (tables)"
            )
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(f"gpus={self.gpus} is not a multiple of gpus_per_node={self.gpus_per_node}")
        for name in ("efficiency", "usable_memory"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} must lie in (0, 1]")
        for field in dataclasses.fields(self.gpu):
            value = getattr(self.gpu, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"the GPU's {field.name}={value:g} must be a positive number")
        if self.batch is not None and self.tokens_per_gpu is not None:
            both = f"batch={self.batch} and tokens_per_gpu={self.tokens_per_gpu}"
            raise ValueError(f"{both} say the same: give one of them")

    @functools.cached_property
    def config(self) -> Mapping[str, Any]:
        """Configurations and values of the command line, merged."""
        config: dict[str, Any] = {}
        for path in self.files:
            config = merge(config, with_long_names(read_config(path)))
        return with_flags(config, self.rest, yaml.safe_load)

    @functools.cached_property
    def gpu(self) -> Gpu:
        """Memory, rates and bandwidths of a GPU: those that are given, and for others its published peaks."""
        given = {"memory": self.memory, "within": self.node_bandwidth, "between": self.network_bandwidth}
        figures = {name: 1e9 * value for name, value in given.items() if value is not None}
        figures |= {} if self.tflops is None else dict.fromkeys(("half", "tf32", "single"), 1e12 * self.tflops)
        if self.kind is not None:
            check_name("gpu", self.kind, list(GPUS))
            return dataclasses.replace(GPUS[self.kind], **figures)
        names = ("memory", "tflops", "node_bandwidth", "network_bandwidth")
        missing = [f"--{name}" for name in names if getattr(self, name) is None]
        if missing:
            raise UsageError(f"name the GPU (--gpu {'|'.join(GPUS)}), or give {', '.join(missing)}")
        return Gpu(**figures)

    @property
    def gpu_name(self) -> str:
        return self.kind or "a GPU of these figures"

    @property
    def precision(self) -> str:
        """One of ``PRECISIONS``."""
        precision = self.given_precision or str(at(self.config, ("trainer", "precision")) or PRECISIONS[0])
        return {"32": "32-true", "bf16": "bf16-mixed"}.get(precision, precision)

    @property
    def param_dtype(self) -> str | None:
        """FSDP2's dtype of gathered parameters, "bfloat16" or None."""
        return self.given_dtype or at(self.config, (*_STRATEGY, "param_dtype"))

    @property
    def checkpointing(self) -> bool:
        """Whether blocks recompute their activations in the backward."""
        return self.activation_checkpointing or bool(at(self.config, (*_STRATEGY, "activation_checkpointing")))

    @property
    def static(self) -> bool:
        """Whether every place of the experts' capacity is sent."""
        return self.static_all_to_all or bool(at(self.config, (*_STRATEGY, "static_all_to_all")))

    @property
    def node(self) -> int:
        """GPUs of a node that the run has."""
        return min(self.gpus, self.gpus_per_node)

    @property
    def autocast(self) -> bool:
        """Whether matmuls take copies of the parameters in bfloat16."""
        return self.precision == "bf16-mixed" and self.param_dtype is None

    @property
    def rate(self) -> float:
        """Peak FLOP/s of matmuls in their dtype."""
        if self.dtype_bytes != 4:
            return self.gpu.half
        return self.gpu.single if self.config.get("float32_matmul_precision") == "highest" else self.gpu.tf32

    @property
    def stored_bytes(self) -> int:
        """Bytes of a parameter, its gradient and each number of the optimizer's state."""
        return 2 if self.precision == "bf16-true" else 4

    @property
    def gathered_bytes(self) -> int:
        """Bytes of a gathered parameter and of a gradient before it is reduced."""
        return 2 if self.param_dtype is not None else self.stored_bytes

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the matmuls."""
        return 4 if self.precision == "32-true" and self.param_dtype is None else 2


OPTIONS = PlanOptions
