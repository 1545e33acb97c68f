"""The command ``moesaic compare CONFIG --ladder RUNGS``: it does the rungs and writes the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from apps.base.files import holding, read_json, write_json, write_text
from apps.base.machine import machine_facts, moment
from apps.base.progress import bar, say, set_aside
from apps.base.quiet import quiet
from apps.compare.command import command_line, find_all, until_stopped
from apps.compare.experiment import BY_LOSS, Experiment, arguments
from apps.compare.ladder.growth import Growth
from apps.compare.ladder.options import Ladder
from apps.compare.ladder.page import GATES, Story
from apps.compare.ladder.rungs import SEARCHED, Outcome, Rung, RungWork, described, find_rungs, outcome_of, plan_of
from apps.compare.systems import SPARSE, of_equal_flops
from apps.compare.training import same_threads
from apps.compare.work import tell_changed
from apps.report.page import FILE, open_page, save_charts, show_page, write_page
from apps.report.page.writing import markdown, write_index
from apps.runner.runner import Budget, at_work, check_same


def run(asked: Ladder, argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``, and return 0, 130 where the user stopped it, or 143 where the system did.

    Raises:
        UsageError: a wrong option or section.
        ValueError: a wrong value, a rejected comparison, or a folder with another ladder.
    """
    return until_stopped(lambda: run_ladder(asked, argv), command_line(argv))


def run_ladder(asked: Ladder, argv: Sequence[str]) -> Story:
    """Do the rungs of a ladder that fit into the time, and write the report after each."""
    output, budget = asked.folder, Budget((asked.minutes or float("inf")) * 60)
    with quiet(own_notes=False), bar("counting FLOPs"):
        config, overlays = str(asked.config), [*map(str, asked.overlays)]
        base = Experiment((*arguments(config, overlays, asked.rest, asked.options.routers), BY_LOSS))
        growth = Growth.of(base.ladder, asked.rungs, config)
        if not asked.baselines and not asked.routers:
            asked = replace(asked, baselines=(of_equal_flops(base.module(SPARSE)),))
        rungs = find_rungs(asked, base, growth)
    for rung in rungs:
        say(described(rung))
    output.mkdir(parents=True, exist_ok=True)
    with holding(output / ".lock", f"another ladder is at work in {output}"):
        _claim(output, base, rungs)
        outcomes: list[Outcome] = []
        for rung in rungs:
            if outcomes and not _fits(rung, outcomes, budget, asked):
                break
            outcomes.append(_do(rung, asked, base, growth, outcomes))
            story = _report(asked, base, outcomes, argv, last=rung is rungs[-1])
        if len(outcomes) < len(rungs):
            story = _report(asked, base, outcomes, argv, last=True)
    write_index(output.parent)
    if asked.open:
        open_page(output / FILE)
    return story


def _claim(output: Path, base: Experiment, rungs: Sequence[Rung]) -> None:
    """Write what will be called a gain, or check that the folder has the same ladder; rungs may be added above."""
    path = output / "gates.json"
    wanted: dict[str, Any] = {"gates": GATES, "config": base.plain(), "rungs": [rung.to_dict() for rung in rungs]}
    saved = read_json(path)
    if saved is not None:
        date, shorter = saved.pop("date"), min(len(saved["rungs"]), len(rungs))
        check_same(
            output,
            "ladder",
            {**saved, "rungs": saved["rungs"][:shorter]},
            {**wanted, "rungs": wanted["rungs"][:shorter]},
        )
        if len(saved["rungs"]) >= len(rungs):
            return
        wanted["date"] = date
    write_json(path, {"date": moment(), **wanted})


def _fits(rung: Rung, outcomes: Sequence[Outcome], budget: Budget, asked: Ladder) -> bool:
    """Return whether a rung fits into the rest of the time, by the seconds of the one before, or say that it does
    not."""
    last = outcomes[-1]
    seconds = last.seconds * rung.flops / last.rung.flops
    if len(outcomes) < SEARCHED:
        seconds *= 1 + len(asked.options.rates(1.0)) / asked.options.num_seeds
    if seconds <= budget.left:
        return True
    if (rung.folder(asked.folder) / "plan.json").exists() and budget.left > 0:
        return True  # it is under way
    say(
        f"{rung.title} and above are not begun: it takes about {seconds / 60:.0f} minutes, and {budget.left / 60:.0f} "
        "are left; the same command with more --minutes goes on"
    )
    return False


def _do(rung: Rung, asked: Ladder, base: Experiment, growth: Growth, outcomes: Sequence[Outcome]) -> Outcome:
    """Do a rung, or what is left of it."""
    with quiet(own_notes=False):
        experiment = Experiment(rung.arguments)
    searches = rung.place < SEARCHED
    plan = plan_of(rung, experiment, asked, base, growth, searches)
    with at_work(rung.folder(asked.folder), "comparison", rung.title) as whole:
        systems = [s for s in find_all(experiment, asked) if s.cost or s.refused]
        fixed = {} if searches else _rates(rung, outcomes[SEARCHED - 1], growth)
        plan.claim(rung.folder(asked.folder))
        tell_changed(experiment.modules, rung.folder(asked.folder))
        with same_threads(experiment, systems, rung.folder(asked.folder), asked.jobs):
            results = RungWork(fixed, experiment, plan, systems, rung.folder(asked.folder), whole, asked.jobs).do()
    return outcome_of(rung, systems, results)


def _rates(rung: Rung, searched: Outcome, growth: Growth) -> dict[str, float | None]:
    """Return each system's learning rate: the one searched last, changed by the rule."""
    now, then = (growth.rate(1.0, r.number, r.place) or 1.0 for r in (rung, searched.rung))
    return {name: rate and float(f"{rate * now / then:.3g}") for name, (rate, _) in searched.rates.items()}


def _report(
    asked: Ladder, base: Experiment, outcomes: Sequence[Outcome], argv: Sequence[str], last: bool = False
) -> Story:
    """Write the report of the rungs so far; show it with the ``last``."""
    output, story = asked.folder, Story(outcomes, base.test_monitor.partition("/")[2])
    title = f"Ladder: {asked.name}"
    facts = {"title": title, "command": command_line(argv), "date": moment(), "machine": machine_facts()}
    numbers = {**facts, "seeds": asked.options.num_seeds, "gates": GATES, **story.numbers()}
    write_json(output / "ladder.json", numbers)
    page = story.page(title, numbers, yaml.safe_dump(base.plain(), sort_keys=False))
    write_text(output / "table.md", markdown(page))
    save_charts(story.charts()[:1], output / "ladder.png", title)
    write_page(page, output / FILE)
    if last:
        with set_aside():
            print(f"\n{title}")
            show_page(page)
        say(f"as text, numbers and a picture: {output / 'table.md'}, {output / 'ladder.json'}, {output / 'ladder.png'}")
    return story
