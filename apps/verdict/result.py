"""The result of a verdict, as JSON, as a page and as lines on the screen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from apps.base.messages import counted
from apps.compare.costs import SECONDS, Costs, Quality
from apps.report.intervals import CrossedInterval, mean_interval
from apps.report.page import BarChart, Entry, Page, Part, Section, Table, Text, how_to_repeat, shown
from apps.verdict.schedule import LEAST_SEEDS, SAME_TIME, Answer, last_line

SKEWED, DROPPING, MANY_EPOCHS = 2.0, 0.05, 10.0
"""Load of the most loaded expert over the mean, share of dropped pairs, and passes over the data, from which on each is
named: an expert with twice its share leaves the others half idle; a twentieth of the pairs dropped is as much as a
twentieth of the experts missing; text-book recipes for small data start to overfit between 10 and 100 passes."""

SHORT = 0.5
"""Part of the configured steps up to which the training is called short."""

_MOST_SEEDS, _MOST_TIMES = 1000, 100.0


@dataclass(frozen=True)
class Facts:
    """Means over the final runs of one system at equal steps.

    Attributes:
        test, train: quality on the test split and on a sample of the training split, a larger one being better (an
            error has a minus sign).
        seconds_per_step: seconds of an optimizer step.
        routing: figures of the routing in the test; empty without experts.
    """

    test: float
    train: float
    seconds_per_step: float
    routing: Mapping[str, float]

    @property
    def gap(self) -> float:
        """Return how much better the model is on its training examples."""
        return self.train - self.test


def causes(answers: tuple[Answer, Answer], sparse: Facts, dense: Facts, num_experts: int, epochs: float) -> list[str]:
    """Return sentences on why sparse lost; none where it did not lose.

    Args:
        answers: at equal FLOPs, and at equal time.
        sparse, dense: facts of the two systems.
        num_experts: experts of a layer.
        epochs: passes over the training data in a final run.
    """
    at_flops, at_time = answers
    lines: list[str] = []
    if at_flops.outcome == "does not pay" and at_flops.gain is not None:
        lines += _worse_at_equal_steps(-at_flops.gain.mean, sparse, dense, num_experts, epochs)
    slower = sparse.seconds_per_step / dense.seconds_per_step - 1
    if at_time.outcome == "does not pay" and slower > SAME_TIME:
        lines.append(
            f"Slower: a sparse step takes {slower:.0%} longer here, so sparse makes {1 / (1 + slower):.0%} of the "
            "steps in the same time."
        )
    if not lines and "does not pay" in (at_flops.outcome, at_time.outcome):
        lines.append("None of the usual causes stands out: no overfitting, no idle experts, no slower step.")
    return lines


def _worse_at_equal_steps(loss: float, sparse: Facts, dense: Facts, num_experts: int, epochs: float) -> list[str]:
    lines = []
    more = sparse.gap - dense.gap
    if sparse.gap > 0 and more >= loss / 2:
        lines.append(
            f"Overfitting: sparse is {sparse.gap:.4g} better on its training examples than in the test, dense "
            f"{dense.gap:.4g}; that is {more / loss:.0%} of the difference."
        )
        if epochs >= MANY_EPOCHS:
            lines.append(
                f"Too little data: the training examples were passed over {epochs:.0f} times, and {num_experts} "
                "experts share them."
            )
    elif sparse.train < dense.train:
        lines.append(
            f"Slower learning: also on training examples sparse is {dense.train - sparse.train:.4g} behind dense: "
            f"each of {num_experts} experts sees a part of them."
        )
    dead = sparse.routing.get("dead_experts", 0.0)
    if dead >= 0.5:
        lines.append(f"Idle experts: no test token chose {dead:.1f} of {num_experts} experts (mean of the layers).")
    imbalance = sparse.routing.get("load_imbalance", 1.0)
    if imbalance >= SKEWED:
        lines.append(f"Skewed load: the most loaded expert has {imbalance:.1f} times the mean load.")
    dropped = sparse.routing.get("drop_rate", 0.0)
    if dropped >= DROPPING:
        lines.append(f"Drops: {dropped:.0%} of the chosen pairs had no room in their expert.")
    return lines


def changes(answers: tuple[Answer, Answer], reasons: list[str], minutes: float, trained: float) -> list[str]:
    """Return sentences on what would change the answers, or decide them.

    Args:
        answers: at equal FLOPs, and at equal time.
        reasons: the ``causes``.
        minutes: budget of the verdict.
        trained: steps of a final run over the steps of the configured training.
    """
    lines = []
    if trained <= SHORT:
        lines.append(
            f"Longer training: a run has {trained:.0%} of the configured steps, so the answer is about a training's "
            f"beginning; about {minutes / trained:.3g} minutes would train to the end."
        )
    for answer in answers:
        if answer.outcome == "undecided":
            lines.append(f"At {answer.where}: {_to_decide(answer.gain, minutes)}")
    names = {reason.partition(":")[0] for reason in reasons}
    if names & {"Overfitting", "Too little data"}:
        lines.append("More data, fewer experts (model ... num_experts) or more dropout would lessen the overfitting.")
    if "Slower learning" in names:
        lines.append("Longer training or fewer experts would give each expert more examples.")
    if names & {"Idle experts", "Skewed load", "Drops"}:
        lines.append("A larger weight of the balance loss, or a larger capacity, would use the experts more evenly.")
    if "Slower" in names:
        lines.append("Larger batches, wider experts or a GPU would bring the time of a step nearer to the dense one's.")
    return lines


def _to_decide(gain: CrossedInterval | None, minutes: float) -> str:
    """Return a sentence on how much more it takes to decide a difference of the size that was measured."""
    if gain is None or gain.half_width is None:
        return f"fewer than two seeds were finished; {2 * minutes:.3g} minutes or more would give an interval."
    if gain.half_width == 0:
        return "each seed gave both models the same values, which do not estimate the spread over seeds."
    size = abs(gain.mean)
    seeds = seeds_to_decide(gain)
    if seeds is not None and seeds / gain.count <= _MOST_TIMES:
        more = max(minutes * seeds / gain.count, minutes)
        return (
            f"if the difference stays {gain.mean:+.4g}, about {seeds} seeds would decide it, in about {more:.3g} "
            "minutes (--minutes)."
        )
    of_examples = gain.half_width_at(_MOST_SEEDS, gain.num_examples)
    times = (of_examples / size) ** 2 if size else math.inf
    if times <= 1 or times > _MOST_TIMES:  # hundreds of seeds, or of times as many examples
        return "the difference is small compared to its spread; no budget near this one would decide it."
    return (
        f"more minutes alone would not decide it: the {gain.num_examples:,} test examples leave "
        f"{of_examples:.4g} of uncertainty; about {times:.1f} times as many would be needed."
    )


def seeds_to_decide(gain: CrossedInterval) -> int | None:
    """Return the fewest seeds whose interval would exclude 0 if mean and spread stay; None: up to 1,000 do not."""
    low, high = LEAST_SEEDS, _MOST_SEEDS
    if not gain.half_width_at(high, gain.num_examples) < abs(gain.mean):
        return None
    while low < high:
        middle = (low + high) // 2
        if gain.half_width_at(middle, gain.num_examples) < abs(gain.mean):
            high = middle
        else:
            low = middle + 1
    return low


PAGE, NUMBERS = "verdict.md", "verdict.json"


@dataclass(frozen=True)
class Verdict:
    """The result of a verdict.

    Attributes:
        title: name of the data.
        quality: name of the quality that is compared, such as "auc".
        higher_is_better: True where a larger quality is better.
        answers: at equal FLOPs, and at equal time.
        systems: figures of each system's final runs, by its name: chosen rate, steps, quality, seconds per step.
        seeds: seeds that have all their runs.
        reasons: why sparse lost.
        changes: what would change the answers.
        notes: how the data were read, and the two systems.
        checks: what may make the answers worthless, such as a column that leaks the label.
        facts: budget, machine, versions, schedule, configuration and command, in plain values.
        best: the best model of each task of a table, trees and a linear model included.
    """

    title: str
    quality: str
    higher_is_better: bool
    answers: tuple[Answer, Answer]
    systems: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    reasons: tuple[str, ...]
    changes: tuple[str, ...]
    notes: tuple[str, ...]
    checks: tuple[str, ...]
    facts: Mapping[str, Any]
    best: tuple[str, ...] = ()

    @property
    def last_line(self) -> str:
        return last_line(self.answers)


def in_words(answer: Answer, quality: str) -> str:
    """Return an answer with its interval as a sentence."""
    gain = answer.gain
    if gain is None:
        return f"At {answer.where}: {answer.outcome}; no seed has both models."
    says = "is undecided" if answer.outcome == "undecided" else answer.outcome
    side = "better" if gain.mean >= 0 else "worse"
    text = f"At {answer.where} sparse {says}: its {quality} is {abs(gain.mean):.4g} {side} than that of dense"
    if gain.half_width is None:
        return f"{text}, with one seed, which gives no interval."
    over = f"{gain.count} seeds and {gain.num_examples:,} test values"
    if gain.half_width == 0:
        return f"{text} over {over}, which show no spread."
    holds = "excludes" if gain.excludes_zero else "holds"
    few = "" if gain.count >= LEAST_SEEDS else f" Fewer than {LEAST_SEEDS} seeds decide nothing."
    ends = f"{gain.low:+.4g} to {gain.high:+.4g}"
    return f"{text}; the 95 % interval of the gain, over {over}, is {ends} and {holds} 0.{few}"


def lines(verdict: Verdict) -> list[str]:
    """Return the text for a terminal: sentences, then the last line of the verdict."""
    shown = [*verdict.best, *(in_words(answer, verdict.quality) for answer in verdict.answers)]
    shown += [f"why: {reason}" for reason in verdict.reasons]
    shown += [f"what would change it: {change}" for change in verdict.changes]
    shown += [f"check: {check}" for check in verdict.checks]
    return [*shown, verdict.last_line]


def how(verdict: Verdict) -> Sequence[str]:
    """Return sentences on how the models were trained and compared."""
    facts = verdict.facts
    machine = facts["machine"]
    return [
        f"Seeds {', '.join(map(str, verdict.seeds)) or 'none'}; both models have the same steps, seeds, order of the "
        "data and search of learning rates on validation data. Intervals count seeds and test examples (crossed random "
        "effects, Satterthwaite's degrees of freedom, at most one less than the seeds if these differ). At equal time "
        "sparse is trained for the steps that it makes in dense's time, with a schedule of its own.",
        f"{facts['spent_seconds'] / 60:.1f} of {facts['minutes']:g} minutes, on {machine['device']} "
        f"({machine['threads']} threads), torch {machine['torch']}, Python {machine['python']}, {facts['date']}.",
    ]


def verdict_page(verdict: Verdict) -> Page:
    """Return the report of a verdict."""
    quality = verdict.quality
    facts = verdict.facts
    return Page(
        title=f"Does sparse pay? {verdict.title}",
        verdict=(verdict.last_line, *verdict.best, *(in_words(answer, quality) for answer in verdict.answers)),
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
