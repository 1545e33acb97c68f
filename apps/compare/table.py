"""A comparison as a table: on the screen, and as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from apps.base.messages import counted
from apps.compare.summary import Row, Summary, flops, flops_trained, flops_unit, notes, number
from apps.report.intervals import Interval
from apps.report.page import MOST_FIGURES, Table
from apps.report.tables import print_in_parts, print_table
from apps.train.cost import megaflops

NONE = "–"

Line = tuple[str, Callable[[Row], str]]
"""A quantity's title, and how it is shown of one system."""

Pair = tuple[Interval | None, Interval | None]
"""A system's quality, and the sparse model's minus it."""

_ON_SCREEN = (0, 1, 2, 4, 5, 8)
"""Columns of the routers' table that fit 80 characters; the page has them all."""

_CLOCKS = {
    "steps": "steps times the median seconds a step of the speed measurement, in which the systems take turns",
    "recorded": "as recorded in each run, whatever else the machine did",
}


def cells(summary: Summary) -> list[list[str]]:
    """Return the table: a heading line, then a line a quantity, systems in columns."""
    rows, name, share = summary.systems(), summary.quality, summary.percent
    own = rows[0].system.title
    lines: list[Line] = [
        *_compared(f"test {name}", share, lambda r: (r.test, r.difference), own),
        *(line for metric in summary.rows[0].further for line in _further(metric, summary, own)),
        *_compared(_at_time(summary), share, lambda r: (r.equal_time, r.equal_time_difference), own),
        ("learning rate", _rate),
        ("settings tried", lambda r: f"{len(r.tuning['tried'])} of {r.tuning['num_settings']}" if r.tuning else NONE),
        ("parameters", _params),
        ("active parameters", _active_params),
        (f"MFLOPs {flops_unit(summary)}", lambda r: _megaflops(flops(r))),
        (f"  x {own}, replaced", lambda r: _shown(r.system.replaced_ratio, ".3f")),
        (f"  x {own}, whole model", lambda r: _shown(r.system.flops_ratio, ".3f")),
        *([("  computed once trained", lambda r: _megaflops(flops_trained(r)))] if _trained_differ(rows) else []),
        *_SPEEDS,
        ("peak memory, MiB", _memory),
        ("training time, s", _training_time),
    ]
    headings, shown = _columns(lines, rows)
    return [list(headings), *map(list, shown)]


def router_cells(summary: Summary) -> list[list[str]]:
    """Return the table of routers: a heading, then a line a router, the sparse model's own first; empty without any."""
    if not summary.routers():
        return []
    rows = [*summary.systems()[:1], *summary.routers()]
    lines: list[Line] = [
        ("router", lambda r: "the config's" if r.difference is None else r.system.title),
        *_compared(f"test {summary.quality}", summary.percent, lambda r: (r.test, r.difference)),
        ("learning rate", _rate),
        ("load imbalance", lambda r: _shown(r.routing.get("load_imbalance"), ".2f")),
        ("dropped, %", lambda r: f"{100 * r.routing['drop_rate']:.1f}" if "drop_rate" in r.routing else NONE),
        ("active parameters", _active_params),
        (f"MFLOPs {flops_unit(summary)}", lambda r: _megaflops(flops(r))),
        *_SPEEDS,
        *(line for metric in summary.rows[0].further for line in _further(metric, summary)),
        *([("MFLOPs computed once trained", lambda r: _megaflops(flops_trained(r)))] if _trained_differ(rows) else []),
    ]
    return [[title for title, _ in lines], *([show(row) for _, show in lines] for row in rows)]


def figures(summary: Summary) -> Table | None:
    """Return at most ten lines of figures: systems in columns, or the best routers; None without another model."""
    rows, name, share = summary.systems(), summary.quality, summary.percent
    if len(rows) < 2:
        routers = [[line[i] for i in _ON_SCREEN] for line in router_cells(summary)[: 1 + MOST_FIGURES]]
        return Table("", tuple(routers[0]), tuple(map(tuple, routers[1:]))) if routers else None
    own = rows[0].system.title
    lines: list[Line] = [
        *_compared(f"test {name}", share, lambda r: (r.test, r.difference), own),
        *_compared(_at_time(summary), share, lambda r: (r.equal_time, r.equal_time_difference), own),
        ("parameters", _params),
        ("active parameters", _active_params),
        (f"MFLOPs {flops_unit(summary)}", lambda r: _megaflops(flops(r))),
        *_SPEEDS,
        ("training time, s", _training_time),
        *(line for metric in rows[0].further for line in _further(metric, summary, own)),
    ]
    return Table("", *_columns(lines, rows, most=MOST_FIGURES))


def _columns(
    lines: Sequence[Line], rows: Sequence[Row], most: int | None = None
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return the headings and the first ``most`` lines that have a value, systems in columns."""
    table = [(title, *(show(row) for row in rows)) for title, show in lines]
    shown = [line for line in table if any(cell != NONE for cell in line[1:])]
    return ("", *(row.system.title for row in rows)), tuple(shown[:most])


def _compared(title: str, share: bool, pair: Callable[[Row], Pair], own: str = "") -> list[Line]:
    """Return a line for a quality and one for a difference: the model called ``own`` minus a system; without ``own``,
    a router minus the configured one."""

    def difference(row: Row) -> str:
        value = pair(row)[1]
        return shown_interval(value.negated() if value and not own else value, share, signed=True)

    percent, points = (", %", ", points") if share else ("", "")
    minus = f"  {own} minus it" if own else "minus the config's"
    return [(f"{title}{percent}", lambda row: shown_interval(pair(row)[0], share)), (f"{minus}{points}", difference)]


def _further(metric: str, summary: Summary, own: str = "") -> list[Line]:
    return _compared(f"test {metric}", metric in summary.shares, lambda row: row.further[metric], own)


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


_SPEEDS: tuple[Line, ...] = (
    ("training, examples/s", lambda row: _shown(row.speed.get("train_examples_per_second"), ",.0f")),
    ("inference, examples/s", lambda row: _shown(row.speed.get("inference_examples_per_second"), ",.0f")),
)


def _rate(row: Row) -> str:
    return NONE if row.rate is None else f"{row.rate:g}{' (edge)' if row.rate_at_edge else ''}"


def _at_time(summary: Summary) -> str:
    return f"val. {summary.quality} at {_seconds(summary.equal_seconds)}"


def _training_time(row: Row) -> str:
    return f"{row.train_seconds:,.1f}"


def _params(row: Row) -> str:
    return f"{row.system.cost.num_params:,}" if row.system.cost else NONE


def _active_params(row: Row) -> str:
    return f"{row.system.cost.active_params:,}" if row.system.cost else NONE


def _memory(row: Row) -> str:
    if "peak_memory_bytes" not in row.speed:
        return NONE
    return f"{(row.speed['peak_memory_bytes'] - row.speed['base_memory_bytes']) / 2**20:,.0f}"


def _megaflops(value: float | None) -> str:
    return NONE if value is None else megaflops(value)


def _trained_differ(rows: Sequence[Row]) -> bool:
    """Return whether a trained model computes other FLOPs than were counted before, by more than rounding shows."""
    pairs = [(flops(row), flops_trained(row)) for row in rows]
    return any(a is not None and b is not None and abs(b - a) > 0.005 * a for a, b in pairs)


def shown_interval(value: Interval | None, percent: bool, signed: bool = False) -> str:
    """Return a mean ± half of its interval as text, to the digits that the interval allows; a dash for none."""
    if value is None:
        return NONE
    shown = number(value.mean, percent, signed, value.half_width)
    if value.half_width is None:
        return shown
    return f"{shown} ± {number(value.half_width, percent, half_width=value.half_width)}"


def _seconds(values: Sequence[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.1f} s" if mean < 120 else f"{mean / 60:.1f} min"


def legend(summary: Summary) -> list[str]:
    """Return sentences that say how each line was measured."""
    n = len(summary.seeds)
    lines = [
        f"Means of {counted(n, 'seed')}, ± half a 95 % interval (Student's t); differences are paired by "
        f"seed. Test data was read once a seed, with the weights {summary.weights}.",
        f"FLOPs: of one forward of {flops_unit(summary)} (moesaic fit gives the same figure, for models of the suite), "
        "in the first batch of the validation, without padding, products alone, two a multiply-add, counted by "
        f"torch.utils.flop_counter. 'x {summary.rows[0].system.title}' is over that model's: those of the blocks that "
        "differ, then those of the whole model.",
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
    """Return the tables of a comparison: systems in columns, routers in lines."""
    systems = [cells(summary)] if len(summary.systems()) > 1 else []
    return [*systems, router_cells(summary)] if summary.routers() else systems


def markdown(title: str, summary: Summary, facts: Sequence[str], read: str = "") -> str:
    """Return tables, sentences, notes and legend as a Markdown page, with the examples ``read`` at its end."""
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
    """Print what the intervals say, and ten lines of figures, in parts that fit the terminal."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(f"\n{escape(title)}", highlight=False)
    for line in summary.sentences():
        console.print(f"[bold]{escape(line)}[/bold]", highlight=False)
    shown = figures(summary)
    if shown is None:
        return
    if shown.columns[0] == "router":
        named = [row for row in shown.rows if any(cell != NONE for cell in row[1:])]
        print_table("", [column.replace(", ", ",\n") for column in shown.columns], named)
    else:
        print_in_parts(shown.columns, shown.rows, empty=NONE)
