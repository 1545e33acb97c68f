"""The command line of ``moesaic export``, read and checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, get_args

from apps.base.checks import check_installed
from apps.cli.errors import UsageError
from apps.cli.options import Quantize
from apps.cli.parser import CommandLine, Config, Run

ENDINGS = {"onnx": ".onnx", "torch_export": ".pt2", "aoti": ".pt2"}
"""The ending of a file, by format."""
Form = Literal["fastest", "standard", "contrib"]
FORMS: tuple[Form, ...] = get_args(Form)
"""How an ONNX graph computes MoE layers; see ``onnx.to_onnx``."""
LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
"""What the format "onnx" needs."""


@dataclass(frozen=True)
class ExportOptions(CommandLine):
    """Write a trained model as a graph that runs without this suite, with what turns inputs into its tensors.

    moesaic predict --onnx PATH runs an ONNX export as predict runs the checkpoint. docs/reference/onnx_scripts.md has
    scripts that run what moesaic export writes and need only onnxruntime and numpy.

    Attributes:
        config: configuration that names classes of your own, such as the run's
        output: file that ends in .onnx or .pt2, or a folder
        format: what is written
        onnx_ops: MoE layers of an ONNX graph: standard operators, those of onnxruntime, or the faster of both
        overwrite: replace an earlier export at PATH

    Raises:
        UsageError: an output that exists or has another ending, or a library that is missing.
    """

    prog: ClassVar[str] = "moesaic export"

    ckpt_path: Run
    output: Path
    config: Config | None = None
    format: Literal["onnx", "torch_export", "aoti"] = "onnx"
    onnx_ops: Form = FORMS[0]
    quantize: Quantize | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        output, ending = self.output, ENDINGS[self.format]
        if output.suffix and output.suffix != ending:
            raise UsageError(f"--output {output} must end in {ending}, or name a folder, for --format {self.format}")
        if self.onnx_ops != FORMS[0] and self.format != "onnx":
            raise UsageError(f"--onnx_ops {self.onnx_ops} is of --format onnx, not of {self.format}")
        if output.is_dir() and output.suffix:
            raise UsageError(f"--output {output} is a folder: give a file")
        if (output.exists() or output.is_symlink()) and not self.overwrite:
            raise UsageError(f"--output {output} exists: --overwrite replaces it")
        if self.format == "onnx":
            check_installed("--format onnx", LIBRARIES, "export")


OPTIONS = ExportOptions
