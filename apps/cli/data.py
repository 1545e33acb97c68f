"""``moesaic data list`` and ``moesaic data prepare NAME``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from apps.cli.parser import CommandLine, Shown
from apps.data import datasets


@dataclass(frozen=True, kw_only=True)
class DataOptions(CommandLine):
    """List the datasets, or fetch one into the cache.

    Attributes:
        cache_dir: where downloads are kept (default: ~/.cache/moesaic)
    """

    prog = "moesaic data"
    cache_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class List(DataOptions):
    """Every dataset, and whether it is on this machine."""


@dataclass(frozen=True, kw_only=True)
class Prepare(DataOptions):
    """Fetch a dataset, unless it is here already.

    Attributes:
        name: name of the dataset
        root: a folder with your own copy: check it, fetch nothing
    """

    name: Annotated[str, Shown("NAME", words=("name",))]
    root: str | None = None


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic data ARGV``."""
    options = DataOptions.read_one_of({"list": List, "prepare": Prepare}, argv)
    if isinstance(options, Prepare):
        print(datasets.prepare(options.name, root=options.root, cache_dir=options.cache_dir))
    else:
        _list(options.cache_dir)
    return 0


def _list(cache_dir: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "app", "here", "what", "license", title="datasets")
    for dataset in datasets.list_datasets():
        here = "yes" if datasets.available(dataset.name, cache_dir) else "" if dataset.sources else "bring it"
        table.add_row(dataset.name, dataset.app, here, dataset.title, dataset.license)
    Console().print(table)
