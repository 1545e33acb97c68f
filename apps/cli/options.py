"""The options of ``moesaic fit|validate|test|predict`` that are the command line's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Self

from apps.cli.errors import UsageError
from apps.cli.flags import ASKING, SECTIONS, verbatim
from apps.cli.parser import CommandLine, Configs, Folder, Shown
from apps.registry import TEXTS
from apps.train.checkpoint.paths import MEANING, NAMES, find_checkpoint
from apps.train.cost.offloading import read_budget
from apps.train.cost.quantizing import read_form

ENDINGS = (".jsonl", ".csv", ".parquet", ".txt")
"""Endings of a file of predictions; each stands for a format."""
_WHICH = f"{', '.join(NAMES)}, or {MEANING}; fit continues from it"


def _form(text: str) -> str:
    read_form(text)
    return text


def _budget(text: str) -> str:
    read_budget(text)
    return text


def check_new(path: Path, overwrite: bool) -> None:
    """Raise a ``UsageError`` for a file that exists, unless ``overwrite`` is set."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists: --overwrite replaces it, --output FILE writes another")


def check_ending(output: Path) -> None:
    """Raise a ``UsageError`` for a file of predictions whose ending is no format."""
    if output.suffix not in ENDINGS:
        raise UsageError(f"output={output} must end in one of {', '.join(ENDINGS)} ({ENDINGS[-1]}: lines of text)")


Quantize = Annotated[
    str, Shown("int8|int4[:GROUP]", "quantize the experts; GROUP inputs share a scale, else all", read=_form)
]
Offload = Annotated[
    str,
    Shown(
        "SIZE[:FILE]",
        "keep the experts in memory or FILE, and SIZE of them on the device: 64MB, or a share such as 0.5",
        read=_budget,
    ),
]


@dataclass(frozen=True, kw_only=True)
class RunOptions(CommandLine):
    """What every command of a training or its model takes.

    Any value of the configuration may be given too, such as --data.batch_size 64, --model.moe.num_experts 4,
    --seed_everything 7 and --trainer.max_epochs 5. Also:
      --print_config        print the whole configuration, with the defaults in force, and run nothing
      --help_all [SECTION]  every option, or only run, trainer, model or data; --config FILE says of which model
      --model.help [CLASS]  the options of a model by the name of its class; --data.help likewise
      --traceback           in case of an error, show where in the code

    Attributes:
        config: a configuration; may be given again: a later file overrides an earlier one
        run_dir: where logs, checkpoints and the configuration go (default: runs/<config name>)
    """

    sections: ClassVar[tuple[str, ...]] = (*SECTIONS, *ASKING)

    config: Configs = ()
    run_dir: Folder | None = None
    ckpt_path: Annotated[str, Shown("WHICH", _WHICH)] | None = None

    @classmethod
    def read(cls, argv: Sequence[str]) -> Self:
        return super().read(verbatim([*argv], [f"data.{part}{name}" for part in ("", "init_args.") for name in TEXTS]))

    @classmethod
    def unknown(cls, name: str) -> str:
        commands = [word for word, kind in COMMANDS.items() if name in (field.name for field in fields(kind))]
        command = cls.prog.rpartition(" ")[2]
        return (
            f"{name} is an option of {' and '.join(commands)}, not of {command}" if commands else super().unknown(name)
        )


@dataclass(frozen=True, kw_only=True)
class Fit(RunOptions):
    """Train a model; --ckpt_path last resumes a stopped run.

    Attributes:
        weights: fit starts a new run from the weights of another run, never in its folder (default: RUN_tuned in runs,
            with a configuration its own)
        overwrite: remove the run in the folder, which else moves to a numbered folder in earlier
    """

    prog: ClassVar[str] = "moesaic fit"

    weights: Annotated[str, Shown("RUN")] | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.weights is not None:
            find_checkpoint(Path(self.weights))


@dataclass(frozen=True, kw_only=True)
class Validate(RunOptions):
    """The metrics of a checkpoint on the validation data."""

    prog: ClassVar[str] = "moesaic validate"


@dataclass(frozen=True, kw_only=True)
class Test(RunOptions):
    """The metrics of a checkpoint on the test data, and a report as one HTML file.

    Attributes:
        open: show the report in the browser
        sweep: test cheaper forms of the model as well: quality against latency and memory
        rounds: rounds in which --sweep times a form and the trained model in turn (default: 11)
        batches: validation batches in which --sweep counts the use of the experts (default: 8)
    """

    prog: ClassVar[str] = "moesaic test"

    open: bool = False
    sweep: bool = False
    rounds: int | None = None
    batches: int | None = None
    quantize: Quantize | None = None
    offload: Offload | None = None

    def __post_init__(self) -> None:
        for name in ("rounds", "batches"):
            value = getattr(self, name)
            if value is not None and not self.sweep:
                raise UsageError(f"{name}={value} is an option of moesaic test --sweep")
            if value is not None and value < 1:
                raise UsageError(f"{name}={value} must be at least 1")
        if self.sweep and self.quantize is not None:
            raise UsageError(f"quantize={self.quantize} with sweep, which quantizes the model by itself: leave it out")
        if self.sweep and self.offload is not None:
            raise UsageError(
                f"offload={self.offload} with sweep, which makes other models of the experts: leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class Predict(RunOptions):
    """The outputs of a checkpoint, into a file.

    Attributes:
        output: .jsonl, .csv, .parquet, or .txt for lines of text (default: predictions.jsonl in the run's folder); a
            folder for images (default: images there)
        overwrite: replace an earlier file
        raw_csv: write no apostrophe before text that a spreadsheet would compute, such as =1+1
        open: show the page of a search in the browser
        explain: also write what each column of a recommender's table is worth, to FILE.importance.csv
        onnx: an ONNX file or folder of moesaic export instead of --ckpt_path
    """

    prog: ClassVar[str] = "moesaic predict"

    output: Annotated[Path, Shown("FILE")] | None = None
    overwrite: bool = False
    raw_csv: bool = False
    open: bool = False
    explain: bool = False
    onnx: Path | None = None
    quantize: Quantize | None = None
    offload: Offload | None = None

    def __post_init__(self) -> None:
        output, onnx = self.output, self.onnx
        if onnx is not None and self.ckpt_path is not None:
            raise UsageError(f"onnx={onnx} runs in place of a checkpoint: leave --ckpt_path {self.ckpt_path} out")
        if onnx is not None and self.explain:
            raise UsageError(f"explain is for a checkpoint, and onnx={onnx} is exported: leave one out")
        if onnx is not None and self.quantize is not None:
            what = f"quantize={self.quantize} is for a checkpoint"
            raise UsageError(f"{what}, and onnx={onnx} is exported: give it to moesaic export")
        if onnx is not None and self.offload is not None:
            what = f"offload={self.offload} is for a checkpoint"
            raise UsageError(f"{what}, and onnx={onnx} runs in onnxruntime: leave one out")
        if self.raw_csv and (output is None or output.suffix != ".csv"):
            raise UsageError("raw_csv is for predictions in CSV: give --output FILE.csv")
        if output is None or not output.suffix:  # a model that draws images writes a folder
            return
        check_ending(output)
        if output.is_dir():
            raise UsageError(f"output={output} is a folder: give a file")
        check_new(output, self.overwrite)


COMMANDS: dict[str, type[RunOptions]] = {"fit": Fit, "validate": Validate, "test": Test, "predict": Predict}
"""The options of the commands that train and use a model."""
