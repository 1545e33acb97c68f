"""The command line of ``moesaic init``, read and checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from apps.cli.errors import UsageError
from apps.cli.parser import CommandLine, Shown


@dataclass(frozen=True)
class InitOptions(CommandLine):
    """Look at your data and write a first configuration for moesaic fit, with comments that say what to change.

    DATA is a CSV, TSV or Parquet file or a folder of them, a folder of images (a folder a class, or train/ and test/
    with such folders), a folder of images with a table of their titles, or two text files of which line i of one
    translates line i of the other. Nothing is trained, and no file is replaced.

    Attributes:
        data: a table, a folder, or two text files
        target: column of the table to predict, again for a second one (default: the likeliest one)
        time: split the rows by this column: the last ones test
        user: column of the users; without --time each user is in one split
        output: the configuration (default: <name of the data>.yaml in this folder)

    Raises:
        UsageError: data that are missing, or an output that exists.
    """

    prog: ClassVar[str] = "moesaic init"

    data: Annotated[tuple[Path, ...], Shown("DATA", words=("data",))]
    target: Annotated[tuple[str, ...], Shown("COLUMN", one_each=True)] = ()
    time: Annotated[str, Shown("COLUMN")] | None = None
    user: Annotated[str, Shown("COLUMN")] | None = None
    output: Annotated[Path, Shown("FILE.yaml")] | None = None

    def __post_init__(self) -> None:
        if len(self.data) > 2:
            raise UsageError(f"DATA is one path, or two text files: got {len(self.data)}")
        for path in self.data:
            if not path.exists():
                raise UsageError(f"no file or folder {path}")
        if self.file.suffix not in (".yaml", ".yml"):
            raise UsageError(f"output={self.file} must end in .yaml")
        for path in (self.file, self.folder):
            if path.exists() or path.is_symlink():
                raise UsageError(f"{path} exists: --output FILE.yaml writes another file")

    @property
    def file(self) -> Path:
        """The configuration to write."""
        name = self.data[0].name or self.data[0].resolve().name
        return self.output or Path(f"{name.partition('.')[0] or 'data'}.yaml")

    @property
    def folder(self) -> Path:
        """Folder of links to images, if a test split must be held out."""
        return self.file.with_name(f"{self.file.stem}_split")


OPTIONS = InitOptions
