"""A comparison as a table: on the screen, as Markdown, and as a picture of quality against FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from apps.compare.summary import Row, Summary, flops, flops_trained, flops_unit, notes, number
from apps.compare.systems import label
from apps.report import plots
from apps.report.intervals import Interval
from apps.report.tables import print_table
from apps.train.cost import megaflops

NONE = "–"

_ON_SCREEN = (0, 1, 2, 4, 5, 8)
"""Columns of the routers' table that fit 80 characters; the page has them all."""

_CLOCKS = {
    "steps": "steps times the median seconds a step of the speed measurement, in which the systems take turns",
    "recorded": "as recorded in each run, whatever else the machine did",
}


def cells(summary: Summary) -> list[list[str]]:
    """Return the table: a heading line, then a line a quantity, systems in columns."""

    def quality(value: Interval | None, signed: bool = False) -> str:
        return NONE if value is None else _interval(value, summary.percent, signed)

    def further(name: str) -> list[tuple[str, Callable[[Row], str]]]:
        share = name in summary.shares

        def show(row: Row, which: int) -> str:
            value = row.further.get(name, (None, None))[which]
            return NONE if value is None else _interval(value, share, signed=which == 1)

        return [
            (f"test {name}{', %' if share else ''}", lambda row: show(row, 0)),
            (f"  sparse minus it{', points' if share else ''}", lambda row: show(row, 1)),
        ]

    def speed(name: str) -> Callable[[Row], str]:
        return lambda row: f"{row.speed[name]:,.0f}" if name in row.speed else NONE

    def memory(row: Row) -> str:
        if "peak_memory_bytes" not in row.speed:
            return NONE
        return f"{(row.speed['peak_memory_bytes'] - row.speed['base_memory_bytes']) / 2**20:,.0f}"

    def ratio(name: str) -> Callable[[Row], str]:
        def show(row: Row) -> str:
            value = getattr(row.system, name)
            return NONE if value is None else f"{value:.3f}"

        return show

    name, rows = summary.metric.partition("/")[2], summary.systems()
    percent, points = (", %", ", points") if summary.percent else ("", "")
    lines: list[tuple[str, Callable[[Row], str]]] = [
        (f"test {name}{percent}", lambda r: quality(r.test)),
        (f"  sparse minus it{points}", lambda r: quality(r.difference, signed=True)),
        *(line for metric in summary.rows[0].further for line in further(metric)),
        (f"val. {name} at {_seconds(summary.equal_seconds)}{percent}", lambda r: quality(r.equal_time)),
        (f"  sparse minus it{points}", lambda r: quality(r.equal_time_difference, signed=True)),
        ("learning rate", lambda r: NONE if r.rate is None else f"{r.rate:g}{' (edge)' if r.rate_at_edge else ''}"),
        ("settings tried", lambda r: f"{len(r.tuning['tried'])} of {r.tuning['num_settings']}" if r.tuning else NONE),
        ("parameters", lambda r: f"{r.system.cost.num_params:,}" if r.system.cost else NONE),
        ("active parameters", lambda r: f"{r.system.cost.active_params:,}" if r.system.cost else NONE),
        (f"MFLOPs {flops_unit(summary)}", lambda r: _megaflops(flops(r))),
        ("  x sparse, replaced", ratio("replaced_ratio")),
        ("  x sparse, whole model", ratio("flops_ratio")),
        *([("  computed once trained", lambda r: _megaflops(flops_trained(r)))] if _trained_differ(rows) else []),
        ("training, examples/s", speed("train_examples_per_second")),
        ("inference, examples/s", speed("inference_examples_per_second")),
        ("peak memory, MiB", memory),
        ("training time, s", lambda r: f"{r.train_seconds:,.1f}"),
    ]
    table = [["", *(label(row.system.name) for row in rows)]]
    table += [[title, *(show(row) for row in rows)] for title, show in lines]
    return [table[0], *(line for line in table[1:] if any(cell != NONE for cell in line[1:]))]


def router_cells(summary: Summary) -> list[list[str]]:
    """Return the table of routers: a heading, then a line a router, the sparse model's own first; empty without any."""
    if not summary.routers():
        return []
    name = summary.metric.partition("/")[2]
    percent, points = (", %", ", points") if summary.percent else ("", "")
    rows = [*summary.systems()[:1], *summary.routers()]
    trained = _trained_differ(rows)
    lines = [
        [
            "router",
            f"test {name}{percent}",
            f"minus the config's{points}",
            "learning rate",
            "load imbalance",
            "dropped, %",
            "active parameters",
            f"MFLOPs {flops_unit(summary)}",
            "training, examples/s",
            "inference, examples/s",
            *(
                f"{what}, {of}" if metric in summary.shares else what
                for metric in summary.rows[0].further
                for what, of in ((f"test {metric}", "%"), ("minus the config's", "points"))
            ),
            *(["MFLOPs computed once trained"] if trained else []),
        ]
    ]
    for row in rows:
        own = row.difference is None
        cost, used, speed = row.system.cost, row.routing, row.speed
        lines.append(
            [
                "the config's" if own else label(row.system.name),
                _interval(row.test, summary.percent),
                NONE if row.difference is None else _interval(row.difference.negated(), summary.percent, signed=True),
                NONE if row.rate is None else f"{row.rate:g}{' (edge)' if row.rate_at_edge else ''}",
                f"{used['load_imbalance']:.2f}" if "load_imbalance" in used else NONE,
                f"{100 * used['drop_rate']:.1f}" if "drop_rate" in used else NONE,
                NONE if cost is None else f"{cost.active_params:,}",
                _megaflops(flops(row)),
                *(
                    f"{speed[k]:,.0f}" if k in speed else NONE
                    for k in ("train_examples_per_second", "inference_examples_per_second")
                ),
                *(
                    NONE if value is None else _interval(value, metric in summary.shares, signed)
                    for metric, (own_value, difference) in row.further.items()
                    for value, signed in ((own_value, False), (difference and difference.negated(), True))
                ),
                *([_megaflops(flops_trained(row))] if trained else []),
            ]
        )
    return lines


def _megaflops(value: float | None) -> str:
    return NONE if value is None else megaflops(value)


def _trained_differ(rows: Sequence[Row]) -> bool:
    """Whether a trained model computes other FLOPs than were counted before, by more than rounding shows."""
    pairs = [(flops(row), flops_trained(row)) for row in rows]
    return any(a is not None and b is not None and abs(b - a) > 0.005 * a for a, b in pairs)


def _interval(value: Interval, percent: bool, signed: bool = False) -> str:
    shown = number(value.mean, percent, signed, value.half_width)
    if value.half_width is None:
        return shown
    return f"{shown} ± {number(value.half_width, percent, half_width=value.half_width)}"


def _seconds(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.1f} s" if mean < 120 else f"{mean / 60:.1f} min"


def legend(summary: Summary) -> list[str]:
    """Return how each line was measured, in few words."""
    n = len(summary.seeds)
    lines = [
        f"Means of {n} seed{'s' if n > 1 else ''}, ± half a 95 % interval (Student's t); differences are paired by "
        f"seed. Test data was read once a seed, with the weights {summary.weights}.",
        f"FLOPs: of one forward of {flops_unit(summary)}, the same figure as moesaic fit gives: in the first batch of "
        "the validation, without padding, products alone, two a multiply-add, counted by torch.utils.flop_counter. 'x "
        "sparse' is over the sparse model's: those of the blocks that differ, then those of the whole model.",
    ]
    if len(summary.systems()) > 1:
        lines.append(
            "Equal time: the last validation by the time the fastest system had ended its training; the slower ones "
            f"are cut short of their schedule. Time is {_CLOCKS[summary.clock]}."
            + (" Models without steps take no part." if any(r.system.cost is None for r in summary.rows) else "")
        )
    if summary.routers():
        lines.append(
            "Routers: the config's model with another router, its experts as wide as gives equal active FLOPs. Load "
            "imbalance is the most loaded expert over the mean, in the test; means over layers and seeds."
        )
    if any(row.speed for row in summary.rows):
        lines.append(
            "Speed: median of rounds in which the systems take turns, after a warm-up round, without reading data. "
            "Peak memory: in training, of a process of its own, above what it held before the model was built."
        )
    return lines


def tables(summary: Summary) -> list[list[list[str]]]:
    """Return what there is to show: systems in columns, routers in lines."""
    systems = [cells(summary)] if len(summary.systems()) > 1 else []
    return [*systems, router_cells(summary)] if summary.routers() else systems


def markdown(title: str, summary: Summary, facts: Sequence[str], read: str = "") -> str:
    """Return table, sentences, notes and legend as a Markdown page; ``read``: examples, as they are."""
    lines = [f"# {title}"]
    for table in tables(summary):
        lines += ["", "| " + " | ".join(table[0]) + " |", "|" + " --- |" + " ---: |" * (len(table[0]) - 1)]
        lines += ["| " + " | ".join(row) + " |" for row in table[1:]]
    lines += ["", *(f"**{s}**  " for s in summary.sentences()), ""]
    examples = summary.example_lines()
    if examples:
        lines += [summary.two_intervals(), "", *(f"{line}  " for line in examples), ""]
    lines += [f"- {note}" for note in [*notes(summary), *legend(summary), *facts]]
    lines += ["", "```", read, "```"] if read else []
    return "\n".join(lines) + "\n"


def show(title: str, summary: Summary) -> None:
    """Print the table with its sentences and notes."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    for rows in tables(summary):
        routers = rows[0][0] == "router"
        for part, shown in enumerate([list(_ON_SCREEN)] if routers else _parts(rows, console.width)):
            columns = [rows[0][index].replace(", ", ",\n") for index in shown]
            lines = [[row[index] for index in shown] for row in rows[1:]]
            lines = [line for line in lines if any(cell != NONE for cell in line[1:])]
            print_table("" if part else title, columns, lines)
    for line in summary.sentences():
        console.print(f"[bold]{escape(line)}[/bold]", highlight=False)
    for line in filter(None, [summary.two_intervals(), *summary.example_lines(parts=False)]):
        console.print(escape(line), highlight=False)
    for line in [*notes(summary), *legend(summary)[:2]]:
        console.print(f"- {escape(line)}", highlight=False)


def _parts(rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Return the columns of tables that fit ``width`` characters one below another, each with the first column."""

    def needed(index: int) -> int:
        words = rows[0][index].replace(",", ", ").split()
        return 3 + max(map(len, [*words, *(row[index] for row in rows[1:])]), default=0)

    first = 4 + max(len(row[0]) for row in rows)
    parts: list[list[int]] = []
    room = 0
    for index in range(1, len(rows[0])):
        if not parts or needed(index) > room:
            parts.append([0])
            room = width - first
        parts[-1].append(index)
        room -= needed(index)
    return parts


def picture(title: str, summary: Summary, path: Path) -> Path | None:
    """Draw quality against FLOPs, one point a system with its interval; None where no system has FLOPs."""
    series = []
    for row in summary.systems():
        cost = flops_trained(row) if _trained_differ([row]) else flops(row)
        if cost is not None:
            half = row.test.half_width
            series.append(
                plots.Series(label(row.system.name), [cost], [row.test.mean], None if half is None else [half])
            )
    if not series:
        return None
    metric = f"test {summary.metric.partition('/')[2]}"
    drawn = plots.quality_against_flops(series, metric, title, percent=summary.percent, unit=flops_unit(summary))
    return plots.save_picture(drawn, path)
