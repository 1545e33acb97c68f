"""``moesaic data list`` and ``moesaic data prepare NAME``."""

from __future__ import annotations

from collections.abc import Sequence

from apps.cli.parser import Parser
from apps.data import datasets


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic data ARGV``."""
    parser = Parser(prog="moesaic data", description="List the datasets, or fetch one into the cache.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|prepare")
    listing = commands.add_parser("list", help="every dataset, and whether it is on this machine")
    prepare = commands.add_parser("prepare", help="fetch a dataset, unless it is here already")
    prepare.add_argument("name")
    prepare.add_argument("--root", help="a folder with your own copy: check it, fetch nothing")
    for sub in (listing, prepare):
        sub.add_argument("--cache_dir", help="where downloads are kept (default: ~/.cache/moesaic)")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        print(datasets.prepare(args.name, root=args.root, cache_dir=args.cache_dir))
    else:
        _list(args.cache_dir)
    return 0


def _list(cache_dir: str | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "app", "here", "what", "licence", title="datasets")
    for dataset in datasets.list_datasets():
        here = "yes" if datasets.available(dataset.name, cache_dir) else "" if dataset.sources else "bring it"
        table.add_row(dataset.name, dataset.app, here, dataset.title, dataset.licence)
    Console().print(table)
