"""The command line of ``moesaic export``, read and checked before anything heavy is imported."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from apps.cli.errors import UsageError
from apps.cli.parser import Parser
from apps.train.checkpoint_paths import MEANING
from apps.train.quantising import read_form

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "aoti": ".pt2"}
"""The ending of a file, by format."""
Form = Literal["fastest", "standard", "contrib"]
FORMS: tuple[Form, ...] = get_args(Form)
"""How an ONNX graph computes MoE layers; see ``onnx.to_onnx``."""
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
"""What the format "onnx" needs."""

_DESCRIPTION = "Write a trained model as a graph that runs without this suite, with what turns inputs into its tensors."
_EPILOG = """\
moesaic predict --onnx PATH runs an ONNX export as predict runs the checkpoint. docs/serving.md has a script of each
app that needs onnxruntime and numpy alone."""


@dataclass(frozen=True)
class Options:
    """A command line of ``moesaic export``, checked without reading a model.

    Attributes:
        run: a run's folder or a checkpoint.
        output: the file, or the folder of a model of several graphs.
        format: a key of ``ENDINGS``.
        form: one of ``FORMS``.
        overwrite: whether an earlier export is replaced.
        quantize: how the experts are quantised first, such as "int4:64"; None: they are not.
    """

    run: Path
    output: Path
    format: str
    form: Form
    overwrite: bool
    quantize: str | None = None

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic export``.

        Raises:
            UsageError: an unknown option, an output that exists or has another ending, or a library that is missing.
            ValueError: a word of ``--quantize`` that is none.
        """
        values = command_line().parse_args(list(argv))
        output = Path(values.output)
        ending = ENDINGS[values.format]
        if output.suffix and output.suffix != ending:
            raise UsageError(f"--output {output} must end in {ending}, or name a folder, for --format {values.format}")
        if values.form != FORMS[0] and values.format != "onnx":
            raise UsageError(f"--form {values.form} is of --format onnx, not of {values.format}")
        if output.is_dir() and output.suffix:
            raise UsageError(f"--output {output} is a folder: give a file")
        if (output.exists() or output.is_symlink()) and not values.overwrite:
            raise UsageError(f"--output {output} exists: --overwrite replaces it")
        missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
        if values.format == "onnx" and missing:
            raise UsageError(f'--format onnx needs {missing[0]}, which is not installed: pip install "moesaic[export]"')
        if values.quantize is not None:
            read_form(values.quantize)
        return cls(Path(values.ckpt_path), output, values.format, values.form, values.overwrite, values.quantize)


def command_line() -> Parser:
    """Return the parser of the command."""
    parser = Parser(prog="moesaic export", allow_abbrev=False, description=_DESCRIPTION, epilog=_EPILOG)
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="RUN", help=MEANING)
    add("--config", metavar="FILE", help="configuration that names classes of your own, such as that of the run")
    add("--output", required=True, metavar="PATH", help="file that ends in .onnx or .pt2, or a folder")
    add("--format", choices=tuple(ENDINGS), default="onnx", help="what is written (default: onnx)")
    form = "MoE layers of an ONNX graph: standard operators, those of onnxruntime, or the faster of both (the default)"
    add("--form", choices=FORMS, default=FORMS[0], help=form)
    add("--quantize", metavar="int8|int4[:GROUP]", help="experts in whole numbers, with a scale a channel or a group")
    add("--overwrite", action="store_true", help="replace an earlier export at PATH")
    return parser
