"""The report of a verdict: the answers first, then figures by seed, why, and how to repeat it."""

from __future__ import annotations

import yaml

from apps.base.messages import counted
from apps.compare.costs import SECONDS, Costs, Quality
from apps.report.intervals import mean_interval
from apps.report.page import BarChart, Entry, Page, Part, Section, Table, Text, how_to_repeat, shown
from apps.verdict.result import Verdict, how, in_words


def verdict_page(verdict: Verdict) -> Page:
    """Return the report of a verdict."""
    quality = verdict.quality
    facts = verdict.facts
    return Page(
        title=f"Does sparse pay? {verdict.title}",
        verdict=(verdict.last_line, *(in_words(answer, quality) for answer in verdict.answers)),
        figures=_figures(verdict) if verdict.systems else None,
        sections=(
            Section("Checks", Text.if_any(verdict.checks)),
            Section("Why", Text.if_any(verdict.reasons)),
            Section("What would change it", Text.if_any(verdict.changes)),
            Section("The answers", (_answers(verdict),)),
            Section("Quality", _charts(verdict) if verdict.systems else ()),
            Section("How it was found", (Text((*verdict.notes, *how(verdict))),)),
            how_to_repeat(facts["command"], yaml.safe_dump(facts["config"], sort_keys=False), facts["machine"]),
        ),
        kind="verdict",
        date=facts["date"],
        entries=tuple(
            Entry(name, {f"test {quality}": own["quality"], "ms a step": 1000 * own["seconds_per_step"]})
            for name, own in verdict.systems.items()
        ),
    )


def _figures(verdict: Verdict) -> Table:
    better = "higher" if verdict.higher_is_better else "lower"
    names = ("learning rate", "steps", "ms a step", f"test {verdict.quality}", f"{verdict.quality} on training data")
    columns = (
        (own["rate"], own["steps"], 1000 * own["seconds_per_step"], own["quality"], own["train_quality"])
        for own in verdict.systems.values()
    )
    rows = tuple((name, *map(shown, values)) for name, *values in zip(names, *columns, strict=True))
    return Table(f"Means over the seeds; {better} {verdict.quality} is better", ("", *verdict.systems), rows)


def _answers(verdict: Verdict) -> Table:
    rows = []
    for answer in verdict.answers:
        gain, of = answer.gain, ("–", "–", "–")
        if gain is not None and gain.half_width is not None:
            of = (f"{shown(gain.low)} to {shown(gain.high)}", str(gain.count), str(gain.num_examples))
        rows.append((answer.where, answer.outcome, "–" if gain is None else shown(gain.mean), *of))
    headings = ("at", "sparse", "gain", "95 % interval", "seeds", "test values")
    return Table("How much better sparse is than dense; above 0 is better", headings, tuple(rows))


def _charts(verdict: Verdict) -> tuple[Part, ...]:
    quality = f"test {verdict.quality}"
    models = [
        (name, mean_interval(own["by_seed"]), Costs(None, {}, own["steps"] * own["seconds_per_step"]))
        for name, own in verdict.systems.items()
    ]
    against = Quality(quality, False, verdict.higher_is_better, models)
    by_seed = BarChart(
        "Quality of each seed",
        f"The {quality} of {counted(len(verdict.seeds), 'seed')} of each model; the seeds share the order of the data.",
        "seed",
        quality,
        tuple(map(str, verdict.seeds)),
        {name: tuple(own["by_seed"]) for name, own in verdict.systems.items()},
    )
    return *against.charts({SECONDS: "the time of a training"}), by_seed
