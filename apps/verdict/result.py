"""Everything that is known in the end, as JSON, as a page and as lines on the screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.verdict.decision import LEAST_SEEDS, Answer, last_line

PAGE, NUMBERS = "verdict.md", "verdict.json"


@dataclass(frozen=True)
class Verdict:
    """The result of a verdict.

    Attributes:
        title: name of the data.
        quality: name of the quality that is compared, such as "auc".
        higher_is_better: True where a larger quality is better.
        answers: at equal FLOPs, and at equal time.
        systems: figures of each system's final runs, by its name: chosen rate, steps, quality, seconds a step.
        seeds: seeds that have all their runs.
        reasons: why sparse lost.
        changes: what would change the answers.
        notes: how the data were read, and what the two systems are.
        checks: what may make the answers worthless, such as a column that gives the label away.
        facts: budget, machine, versions, schedule, configuration and command, in plain values.
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
    """Return what a terminal shows: sentences, then the last line of the verdict."""
    shown = [in_words(answer, verdict.quality) for answer in verdict.answers]
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
