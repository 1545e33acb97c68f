"""The report of ``moesaic test``: its metrics, the app's report, the training, and how to repeat it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from apps.base.machine import moment
from apps.report.page import MOST_FIGURES, Entry, Page, Section, Table, how_to_repeat, shown
from apps.report.page.training import training_section
from apps.report.routed import layer_names
from apps.report.tables import is_share
from apps.train.checkpoint.paths import run_title
from apps.train.watch.logs import METRICS, read_rows, split_routing

_SIZES = {"parameters": "num_params", "active parameters": "active_params", "MFLOPs": "flops_per_example"}


def test_page(
    metrics: Mapping[str, float],
    monitored: str | None,
    shown_metrics: Sequence[str],
    run: Path,
    checkpoint: Path | None,
    command: str,
    config: str,
    sections: Sequence[Section],
    notes: Sequence[str],
) -> Page:
    """Return the report of a test.

    Args:
        metrics: logged metrics by name, such as "test/top1" and "test/routing/model.blocks.1.mlp/entropy".
        monitored: name of the metric that the training monitors, which comes first; None: the first one.
        shown_metrics: names, without the split, of those that come next.
        run: the run's folder.
        checkpoint: the tested checkpoint; None: an untrained model.
        command: shell command of the test.
        config: the configuration in force, as YAML.
        sections: sections of the app's report.
        notes: further remarks of the verdict on the tested model, such as how its experts are quantized.
    """
    own, layers = split_routing(metrics, "test")
    first = (monitored or "").partition("/")[2]
    order = sorted(own, key=lambda name: (name != first, name not in shown_metrics))
    rows = tuple(_line(name, own[name]) for name in order)
    sizes = _sizes(run / METRICS)
    rows += tuple((name, shown(value, 6)) for name, value in sizes.items())
    tested = checkpoint or "an untrained model"
    value = _in_words(*rows[0]) if rows else "nothing logged"
    verdict = f"{value} in the test of {tested}; a single run gives no estimate of the spread over seeds."
    figures = {name: float(_percent(name, value)) for name, value in own.items()}
    every = Table("Metrics of the test", ("metric", "value"), rows)
    return Page(
        title=f"Test of {run_title(run)}",
        verdict=(verdict, *notes),
        figures=Table("", ("metric", "value"), rows[:MOST_FIGURES]),
        sections=(
            *sections,
            _routing(layers),
            training_section(run / METRICS),
            Section("Every figure", (every,) if len(rows) > MOST_FIGURES else ()),
            how_to_repeat(command, config),
        ),
        kind="test",
        date=moment(),
        entries=(Entry("", {_title(name, own[name]): value for name, value in figures.items()} | sizes),),
    )


def _line(name: str, value: float) -> tuple[str, str]:
    return _title(name, value), f"{_percent(name, value):.4f}" if abs(value) < 1e4 else shown(value, 6)


def _in_words(title: str, value: str) -> str:
    """Return "test top1 94.99 %" for the row ("test top1, %", "94.99")."""
    name, percent, _ = title.partition(", %")
    return f"{name} {value} %" if percent else f"{name} {value}"


def _title(name: str, value: float) -> str:
    title = name if name.startswith("test") else f"test {name}"  # a module of the user's names its own
    return f"{title}, %" if is_share(name, [[value]]) else title


def _percent(name: str, value: float) -> float:
    return 100 * value if is_share(name, [[value]]) else value


def _sizes(metrics: Path) -> dict[str, float]:
    """Return parameters and FLOPs of an example as the training has logged them; empty where it has not."""
    rows = [row for row in read_rows(metrics) if row.get("model/num_params")]
    if not rows:
        return {}
    sizes = {name: float(rows[0][f"model/{column}"]) for name, column in _SIZES.items()}
    return {**sizes, "MFLOPs": sizes["MFLOPs"] / 1e6}


def _routing(layers: Mapping[str, Mapping[str, float]]) -> Section:
    """Return the figures of each layer's routing in the test."""
    figures = list(dict.fromkeys(figure for values in layers.values() for figure in values))
    rows = tuple(
        (layer or "mean", *(shown(values.get(figure)) for figure in figures))
        for layer, values in zip(layer_names(list(layers)), layers.values(), strict=True)
    )
    table = Table("Routing in the test", ("layer", *(f.replace("_", " ") for f in figures)), rows)
    return Section("Routing in the test", (table,) if rows else ())
