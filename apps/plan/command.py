"""The whole of ``moesaic plan``: outline a model, go through the layouts, and show them."""

from __future__ import annotations

import os

from apps.base.files import replacing
from apps.base.quiet import quiet
from apps.cli.errors import UsageError
from apps.plan.display import COLUMNS, MESH, chart, details, header, overlay, rows, shown
from apps.plan.options import Options
from apps.plan.outline import Outline, outlined
from apps.plan.sweep import Sweep, over_gpus, sweep
from apps.report.page import save_charts
from apps.report.tables import print_table, write_csv
from apps.task.sizes import Missing


def run(options: Options) -> int:
    """Print the plan, and write its files where a folder is named; of torchrun's ranks the first one does."""
    if os.environ.get("RANK", "0") != "0":
        return 0
    try:
        with quiet():
            outline = outlined(options)
    except Missing as missing:
        raise UsageError(str(missing)) from None
    plan = sweep(outline, options)
    for line in header(outline, options):
        print(line)
    table = shown(rows(plan))
    if not outline.tables:
        print(MESH)
    print(COLUMNS)
    print_table("", list(table[0]), [list(row.values()) for row in table])
    if not plan.best.fits:
        print("nothing fits: the row with * needs the least memory")
    for line in (*plan.breaks(), *details(plan.best)):
        print(line)
    print()
    print(overlay(plan.best, options), end="")
    if options.output is not None:
        _write(outline, plan, options)
    return 0


def _write(outline: Outline, plan: Sweep, options: Options) -> None:
    """Write overlay, table and picture into the folder, and name them."""
    assert options.output is not None
    options.output.mkdir(parents=True, exist_ok=True)
    with replacing(options.output / "overlay.yaml") as file:
        file.write(overlay(plan.best, options))
    write_csv(options.output / "plan.csv", rows(plan))
    title = f"{outline.kind}, {outline.num_params:,} parameters"
    save_charts([chart(over_gpus(outline, options))], options.output / "gpus.png", title)
    print(f"{options.output}: overlay.yaml, plan.csv, gpus.png")
