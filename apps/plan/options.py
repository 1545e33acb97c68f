"""The command line of ``moesaic plan``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apps.base.checks import check_at_least, check_name
from apps.cli.classes import with_long_names
from apps.cli.configs import at, merge, read_config, shipped
from apps.cli.errors import UsageError
from apps.cli.flags import with_flags
from apps.cli.parser import Parser
from apps.plan.gpus import GPUS, MEASURED, Gpu

PRECISIONS = ("32-true", "bf16-mixed", "bf16-true")
_STRATEGY = ("trainer", "strategy")
_DESCRIPTION = """\
Print what a training costs on many GPUs, from its configuration alone: memory and traffic of a GPU, the time of a step,
the best expert-parallel degree, and where it breaks. No data are read and nothing is computed."""
_EPILOG = """\
Any value of the model's or the data's configuration may be given as well: --model.moe.num_experts 64,
--data.block_size 4096. What the data would tell is given in the same way, such as --model.num_classes 1000. The columns
of a table: --tables 1000000000 --pooling 20, and with --histories 50 the last 50 items of a row. A step's time counts
evenly loaded experts; docs/parallelism.md has the formulas."""


@dataclass(frozen=True)
class Options:
    """A command line of ``moesaic plan``.

    Attributes:
        config: configurations and values of the command line, merged.
        gpus: number of GPUs.
        per_node: GPUs of a node.
        gpu: their memory, rates and bandwidths.
        gpu_name: name of the GPU or processor, or "a GPU of these figures".
        precision: one of ``PRECISIONS``.
        param_dtype: FSDP2's dtype of gathered parameters, "bfloat16" or None.
        checkpointing: whether blocks compute their activations again in the backward.
        static: whether every place of the experts' capacity is sent.
        batch: examples of a GPU in a step; None: ``tokens``, or the configuration's.
        tokens: tokens of a GPU in a step; None: those of the batch.
        length: tokens of an example, where the configuration does not tell; None: it does.
        tables: rows of each embedding table of a recommender; empty where features are given.
        numbers: columns of numbers of a recommender.
        tasks: tasks of a recommender.
        pooling: ids of a column in an example.
        efficiency: part of the peak FLOP/s that products reach.
        latency: seconds of one message.
        usable: part of the GPU's memory that tensors may take.
        output: folder of the overlay, the table and the picture; None: no files.
        domains: domains of a recommender's table; 0: it has none.
        histories: items of each history in an example; the first one has the ids of the first table, and so on.
        item_tables, item_numbers: as ``tables`` and ``numbers``, of the items' tower of a retriever.
    """

    config: Mapping[str, Any]
    gpus: int
    per_node: int
    gpu: Gpu
    gpu_name: str
    precision: str
    param_dtype: str | None
    checkpointing: bool
    static: bool = False
    batch: int | None = None
    tokens: int | None = None
    length: int | None = None
    tables: tuple[int, ...] = ()
    numbers: int = 0
    tasks: int = 1
    pooling: int = 1
    efficiency: float = 0.4
    latency: float = 1e-5
    usable: float = 0.9
    output: Path | None = None
    domains: int = 0
    histories: tuple[int, ...] = ()
    item_tables: tuple[int, ...] = ()
    item_numbers: int = 0

    def __post_init__(self) -> None:
        check_at_least(1, gpus=self.gpus, gpus_per_node=self.per_node, batch=self.batch, tokens_per_gpu=self.tokens)
        check_at_least(1, length=self.length, tasks=self.tasks, pooling=self.pooling)
        check_at_least(1, **{n: min(getattr(self, n), default=1) for n in ("tables", "item_tables", "histories")})
        check_at_least(0, numbers=self.numbers, latency=self.latency, domains=self.domains)
        check_at_least(0, item_numbers=self.item_numbers)
        if len(self.histories) > len(self.tables):
            raise ValueError(
                f"histories={list(self.histories)} has the ids of as many tables, and there is {len(self.tables)} "
                "(tables)"
            )
        if self.gpus > self.per_node and self.gpus % self.per_node:
            raise ValueError(f"gpus={self.gpus} is no whole number of nodes: gpus_per_node={self.per_node}")
        for name in ("efficiency", "usable"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g} must lie in (0, 1]")
        for field in dataclasses.fields(self.gpu):
            value = getattr(self.gpu, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"the GPU's {field.name}={value:g} must be a positive number")
        if self.batch is not None and self.tokens is not None:
            raise ValueError(f"batch={self.batch} and tokens_per_gpu={self.tokens} say the same: give one of them")

    @property
    def node(self) -> int:
        """GPUs of a node that the run has."""
        return min(self.gpus, self.per_node)

    @property
    def autocast(self) -> bool:
        """Whether products take copies of the parameters in bfloat16."""
        return self.precision == "bf16-mixed" and self.param_dtype is None

    @property
    def rate(self) -> float:
        """Peak FLOP/s of products in their dtype."""
        return self.gpu.single if self.dtype_bytes == 4 else self.gpu.half

    @property
    def dtype_bytes(self) -> int:
        """Bytes of a number in the products."""
        return 4 if self.precision == "32-true" and self.param_dtype is None else 2

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic plan``.

        Raises:
            UsageError: an unknown option, or a configuration that is not there.
            ValueError: a value out of its range, or an unknown GPU.
        """
        args, rest = command_line().parse_known_args(list(argv))
        config: dict[str, Any] = {}
        for name in args.config:
            config = merge(config, with_long_names(read_config(shipped(Path(name)))))
        config, unknown = with_flags(config, rest, _is_of_model_or_data, yaml.safe_load)
        if unknown:
            raise UsageError(f"{unknown[0]} is no option of moesaic plan (--help lists them)")
        model = config.get("model")
        if not (isinstance(model, str) or (isinstance(model, Mapping) and "class_path" in model)):
            raise UsageError(f"{' + '.join(args.config)} names no model (model.class_path): there is nothing to plan")
        output = None if args.output is None else Path(args.output)
        if output is not None and output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file, not a folder")
        precision = args.precision or str(at(config, ("trainer", "precision")) or PRECISIONS[0])
        precision = {"32": "32-true", "bf16": "bf16-mixed"}.get(precision, precision)
        check_name("precision", precision, PRECISIONS)
        strategy = at(config, _STRATEGY)
        param_dtype = args.param_dtype or at(strategy, ("param_dtype",))
        checkpointing = args.activation_checkpointing or bool(at(strategy, ("activation_checkpointing",)))
        return cls(
            config=config,
            gpus=args.gpus,
            per_node=args.gpus_per_node,
            gpu=_gpu(args),
            gpu_name=_gpu_name(args),
            precision=precision,
            param_dtype=param_dtype,
            checkpointing=checkpointing,
            static=args.static_exchange or bool(at(strategy, ("static_exchange",))),
            batch=args.batch,
            tokens=args.tokens_per_gpu,
            length=args.length,
            tables=tuple(args.tables),
            numbers=args.numbers,
            histories=tuple(args.histories),
            item_tables=tuple(args.item_tables),
            item_numbers=args.item_numbers,
            tasks=args.tasks,
            domains=args.domains,
            pooling=args.pooling,
            efficiency=_efficiency(args),
            latency=args.latency,
            usable=args.usable_memory,
            output=output,
        )


def _is_of_model_or_data(merged: Mapping[str, Any], names: list[str], value: str) -> bool:
    return names[0] in ("model", "data", "trainer") and len(names) > 1


def _gpu_name(args: argparse.Namespace) -> str:
    """Return the name of the GPU, or of this machine's processor where that is measured."""
    if args.gpu == MEASURED:
        from apps.base.machine import device_name

        return device_name()
    return args.gpu or "a GPU of these figures"


def _efficiency(args: argparse.Namespace) -> float:
    """Return the part of the peak that is reached: all of what was measured."""
    if args.efficiency is not None:
        return float(args.efficiency)
    return 1.0 if args.gpu == MEASURED else 0.4


def _gpu(args: argparse.Namespace) -> Gpu:
    """Return the GPU that is named, or this machine, with the figures that are given in place of its own."""
    rate = None if args.tflops is None else 1e12 * args.tflops
    given = {
        "memory": None if args.memory is None else 1e9 * args.memory,
        "half": rate,
        "single": rate,
        "within": None if args.node_bandwidth is None else 1e9 * args.node_bandwidth,
        "between": None if args.network_bandwidth is None else 1e9 * args.network_bandwidth,
    }
    figures = {name: value for name, value in given.items() if value is not None}
    if args.gpu == MEASURED:
        from apps.plan.measuring import measured_gpu  # torch, which no other option needs here

        return measured_gpu(figures)
    if args.gpu is not None:
        check_name("gpu", args.gpu, [*GPUS, MEASURED])
        return dataclasses.replace(GPUS[args.gpu], **figures)
    options = dict(zip(given, ("memory", "tflops", "tflops", "node_bandwidth", "network_bandwidth"), strict=True))
    missing = dict.fromkeys(f"--{options[name]}" for name in given if name not in figures)
    if missing:
        raise UsageError(f"name the GPU (--gpu {'|'.join([*GPUS, MEASURED])}), or give {', '.join(missing)} too")
    return Gpu(**figures)


def command_line() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="moesaic plan",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--config", "-c", required=True, action="append", metavar="FILE", help="configuration; overlays may follow")
    add("--gpus", type=int, required=True, metavar="N", help="GPUs of the training")
    kinds = f"{', '.join(GPUS)}; {MEASURED}: as this machine, under torchrun its ranks"
    add("--gpu", metavar="NAME", help=f"their kind: {kinds}; figures below go before its own")
    add("--gpus_per_node", type=int, default=8, metavar="N", help="GPUs of a node (default: 8)")
    add("--tokens_per_gpu", type=int, metavar="N", help="tokens of a GPU in a step (default: by the configuration)")
    add("--batch", type=int, metavar="N", help="examples of a GPU in a step (default: the configuration's)")
    add("--length", type=int, metavar="N", help="tokens of an example, where the configuration does not tell")
    add("--precision", metavar="NAME", help=f"{', '.join(PRECISIONS)} (default: the configuration's, else 32-true)")
    add("--param_dtype", choices=("bfloat16",), help="FSDP2's mixed precision: products and gathered parameters")
    add("--activation_checkpointing", action="store_true", help="blocks compute their activations again")
    add("--static_exchange", action="store_true", help="every place of the capacity is sent (capacity_factor)")
    add("--memory", type=float, metavar="GB", help="memory of a GPU")
    add("--tflops", type=float, metavar="T", help="peak of its products in this precision, given or measured")
    add("--node_bandwidth", type=float, metavar="GB", help="GB/s that leave it for GPUs of its node")
    add("--network_bandwidth", type=float, metavar="GB", help="GB/s that leave it for other nodes")
    reached = f"part of the peak that is reached (default: 0.4, and 1 with --gpu {MEASURED})"
    add("--efficiency", type=float, metavar="P", help=reached)
    add("--latency", type=float, default=1e-5, metavar="S", help="seconds of a message (default: 1e-5)")
    usable = "part of the memory for tensors; the rest is for contexts, buffers of NCCL, fragments (default: 0.9)"
    add("--usable_memory", type=float, default=0.9, metavar="P", help=usable)
    add("--tables", type=int, nargs="+", default=[], metavar="ROWS", help="a recommender's tables, one for each column")
    add("--pooling", type=int, default=1, metavar="N", help="ids of a column in an example (default: 1)")
    add("--numbers", type=int, default=0, metavar="N", help="its columns of numbers (default: 0)")
    add("--tasks", type=int, default=1, metavar="N", help="its tasks (default: 1)")
    add("--domains", type=int, default=0, metavar="N", help="its domains, for layers that know some (default: 0)")
    histories = "items of an example in each of its histories, of the ids of the first table and on (default: none)"
    add("--histories", type=int, nargs="+", default=[], metavar="ITEMS", help=histories)
    add("--item_tables", type=int, nargs="+", default=[], metavar="ROWS", help="tables of a retriever's tower of items")
    add("--item_numbers", type=int, default=0, metavar="N", help="its columns of numbers (default: 0)")
    add("--output", metavar="DIR", help="folder for the overlay, the table as CSV and the picture")
    return parser
