"""The command line of ``moesaic convert``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.base.checks import check_at_least
from apps.cli.configs import read_config, shipped
from apps.cli.errors import UsageError
from apps.cli.flags import check_data_options
from apps.cli.parser import Parser
from apps.train.checkpoint_paths import MEANING

KINDS = {
    "upcycle": "a dense run made sparse: its feed-forward networks become the experts' start",
    "densify": "a sparse run made dense: one feed-forward network in the place of each MoE layer",
    "prune": "fewer experts: those with the highest scores stay",
    "merge": "several runs as one, their mean or their networks as experts; or one run and its updates as one model",
    "adapt": "a frozen run with trainable updates, such as LoRA, beside its linear layers",
    "consolidate": "one file of a sharded checkpoint, with the optimizer's state",
    "specialise": "the network of one task, domain, pair or expert, or the experts that one part of the data uses",
}
_DESCRIPTION = """\
Convert a trained run into another one, and show both: size, parameters, FLOPs and the validation's score. The new
folder is a run that moesaic test, predict and apps.load read as any other."""
_EPILOG = """\
Any --data.KEY VALUE names the data of the batches, such as --data.val_files PATH: their use of the experts decides.
To train on: moesaic fit --weights DIR --run_dir NEW."""


@dataclass(frozen=True)
class Options:
    """A command line of ``moesaic convert``, checked without reading a model.

    Attributes:
        kind: a key of ``KINDS``.
        runs: folders of runs or checkpoints; one, or for "merge" several.
        output: the new run's folder, which does not exist.
        batches: validation batches for scores and statistics; 0: neither.
        config: configuration of the run, where none lies beside its checkpoint.
        data: further words of the command line, ``--data.KEY VALUE``.
        values: the options of the kind, by name.
    """

    kind: str
    runs: tuple[Path, ...]
    output: Path
    batches: int
    config: Path | None
    data: tuple[str, ...]
    values: argparse.Namespace

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic convert``.

        Raises:
            UsageError: an unknown kind or option, or an output that exists.
            ValueError: a value out of its range.
        """
        values, rest = command_line().parse_known_args(list(argv))
        check_data_options(rest, f"convert {values.kind}")
        check_at_least(0, batches=values.batches)
        output = Path(values.output)
        if output.exists() or output.is_symlink():
            raise UsageError(f"--output {output} exists: it stays as it is; give a new folder")
        for path in (values.config, getattr(values, "moe", None)):
            if path is not None:
                read_config(shipped(Path(path)))  # a missing or wrong one is refused here, before anything heavy
        runs = tuple(Path(path) for path in _listed(values.ckpt_path))
        config = None if values.config is None else shipped(Path(values.config))
        return cls(values.kind, runs, output, values.batches, config, tuple(rest), values)


def _listed(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value]


def number_or_share(text: str) -> int | float:
    """Return "4" as a whole number and "0.5" as a share."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a whole number nor a share such as 0.5") from None


def command_line() -> Parser:
    """Return the parser of the command, with one of its own for each kind."""
    parser = Parser(prog="moesaic convert", allow_abbrev=False, description=_DESCRIPTION)
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND", parser_class=Parser)
    for kind, text in KINDS.items():
        one = kinds.add_parser(
            kind,
            allow_abbrev=False,
            help=text,
            description=f"Make {text}." if kind != "specialise" else f"Keep {text}.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        several: dict[str, Any] = {"nargs": "+"} if kind == "merge" else {}
        one.add_argument("--ckpt_path", required=True, metavar="RUN", help=MEANING, **several)
        one.add_argument("--output", required=True, metavar="DIR", help="folder of the new run, which must not exist")
        _OPTIONS[kind](one)
        batches = "validation batches for the score and for statistics; 0: neither (default: 8)"
        one.add_argument("--batches", type=int, default=8, metavar="N", help=batches)
        config = "configuration of the run, where none lies beside its checkpoint"
        one.add_argument("--config", metavar="FILE", help=config)
    return parser


def _upcycle(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    moe = "overlay whose model section has moe, and where it is to differ moe_blocks; experts are as the network"
    add("--moe", required=True, metavar="FILE", help=moe)
    add("--start", default="copy", help="copy, granular, drop, split or random (default: copy)")
    add("--noise", type=float, default=0.0, help="normal noise on each matrix, relative to its deviation (default: 0)")
    add("--seed", type=int, default=0, metavar="N", help="of gates, noise and what is drawn (default: 0)")
    add("--inexact", action="store_true", help="allow gates under which the model begins with other outputs")


def _densify(parser: argparse.ArgumentParser) -> None:
    how = "average, use, most_used, sum, top_k or svd (default: average); use and most_used need batches"
    parser.add_argument("--how", default="average", help=how)


def _scores(parser: argparse.ArgumentParser, required: bool) -> None:
    add = parser.add_argument
    keep = "experts that each layer keeps, or their share below 1"
    add("--keep", type=number_or_share, required=required, metavar="N", help=keep)
    add("--by", default="reap", help="score: use, reap, man, msan or spread (default: reap)")


def _prune(parser: argparse.ArgumentParser) -> None:
    _scores(parser, required=True)
    add = parser.add_argument
    add("--constants", action="store_true", help="put the mean output of an expert that goes in its place (MoNE)")
    add("--merge", action="store_true", help="merge the experts whose outputs are alike, in place of taking any away")


def _merge(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--how", choices=("average", "btx"), default="average", help="mean of all tensors, or networks as experts")
    add("--weights", nargs="+", type=float, metavar="W", help="of the mean, one a run (default: equal ones)")
    add("--moe", metavar="FILE", help="overlay with the MoE layers, for btx: an expert for each run")
    add("--seed", type=int, default=0, metavar="N", help="of the new gates (default: 0)")


def _adapt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    moe = "overlay whose model.moe has the updates, such as configs/experts/lora.yaml"
    add("--moe", required=True, metavar="FILE", help=moe)
    modules = "patterns of linear layers' names; * also stands for dots"
    add("--modules", nargs="+", required=True, metavar="PATTERN", help=modules)
    add("--seed", type=int, default=0, metavar="N", help="of the updates' start (default: 0)")


def _consolidate(parser: argparse.ArgumentParser) -> None:
    """Add nothing: a file has no options."""


def _specialise(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", type=int, metavar="N", help="cut out the network of a task, where the router is Task")
    add("--domain", type=int, metavar="N", help="cut out the network of a domain, where the router is Domain")
    add("--expert", type=int, metavar="N", help="cut out one expert of each layer")
    add("--pair", metavar="A-B", help="cut out one pair of a translator with the router Task, such as en-de")
    _scores(parser, required=False)


_OPTIONS = {
    "upcycle": _upcycle,
    "densify": _densify,
    "prune": _prune,
    "merge": _merge,
    "adapt": _adapt,
    "consolidate": _consolidate,
    "specialise": _specialise,
}
