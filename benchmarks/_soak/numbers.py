"""Numbers: random layers against the loop oracle, trainings on two ranks against one, coverage of printed intervals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch

import core
from apps.base.quiet import quiet
from apps.compare.ladder.curves import Fit, Measured
from apps.nlp.text.significance import paired_bootstrap
from apps.report.intervals import crossed_interval, mean_interval, paired_difference, verdict
from apps.verdict.schedule import decide
from benchmarks._soak.outcome import Outcome, generator
from core.fields import Bounds, Length, OneOf
from core.registry import OpenConfig
from core.testing.check import FLOAT32, close, step
from core.testing.router_case import RouterCase, seeded

sys.path.append(str(Path(__file__).parents[2] / "tests" / "support"))

WEIGHT = 3
LAYERS, DRAWS = 100, 4000
BOUNDS = {torch.float64: 1e-12, torch.float32: 4 * FLOAT32, torch.bfloat16: 16 * 2**-8}
"""Bounds of an error over the largest element; of bfloat16 a few roundings of 2^-8 that add up."""


# ---- random layers


def drawn(hint: Any, rng: np.random.Generator) -> Any:
    """Return a value of a field's type. Not all that are drawn fit together.

    Raises:
        LookupError: nothing is known of the type.
    """
    inner = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    if kind is Annotated:
        for rule in inner[1:]:
            if isinstance(rule, OneOf):
                return rule.names[rng.integers(len(rule.names))]
            if isinstance(rule, Bounds) and not isinstance(rule, Length):
                low = max(rule.low, -4.0)
                high = min(rule.high, low + 8)
                if inner[0] is int:
                    return int(rng.integers(math.ceil(low), high, endpoint=True))
                return rng.uniform(low, high)
        return drawn(inner[0], rng)
    if kind in (typing.Union, types.UnionType):
        return drawn(inner[rng.integers(len(inner))], rng)
    if kind is Literal:
        return inner[rng.integers(len(inner))]
    if kind is tuple:
        return tuple(drawn(one, rng) for one in (inner[:1] * rng.integers(1, 4) if inner[-1] is ... else inner))
    if kind is bool:
        return bool(rng.integers(2))
    if kind is type(None):
        return None
    if isinstance(kind, type) and issubclass(kind, OpenConfig):
        return config(kinds_of(kind)[rng.integers(len(kinds_of(kind)))], rng)
    if dataclasses.is_dataclass(kind):
        return config(kind, rng)
    raise LookupError(hint)


@functools.cache
def kinds_of(base: type) -> list[type]:
    """Return the classes of the engine that may stand for a config."""
    below = [kind for part in base.__subclasses__() for kind in (part, *kinds_of(part))]
    return [kind for kind in dict.fromkeys(below) if getattr(core, kind.__name__, None) is kind]


@functools.cache
def types_of(kind: type) -> dict[str, Any]:
    """Return the types of a dataclass's fields, with their rules."""
    return typing.get_type_hints(kind, include_extras=True)


def config(kind: type, rng: np.random.Generator, **given: Any) -> Any:
    """Return a config whose fields are drawn where they have no default, and now and then where they have one."""
    hints = types_of(kind)
    for f in dataclasses.fields(kind):
        if f.init and f.name not in given and (f.default is dataclasses.MISSING or rng.random() < 0.15):
            try:
                given[f.name] = drawn(hints[f.name], rng)
            except LookupError:
                continue
    return kind(**given)


def taken(make: Callable[[], Any], tries: int = 100) -> Any:
    """Return what ``make`` draws as soon as the engine takes it; None: it took none of all tries."""
    for _ in range(tries):
        try:
            return make()
        except (ValueError, TypeError) as error:
            if not isinstance(error, ValueError) and "required positional" not in str(error):
                raise
    return None


def layer(rng: np.random.Generator) -> tuple[core.MoEConfig, int]:
    """Return a layer's config and width that the engine takes: one in many that are drawn."""

    def whole() -> tuple[core.MoEConfig, int]:
        made = config(core.MoEConfig, rng, backend="eager", num_experts=int(rng.integers(1, 10)), **parts)
        dim = int(rng.choice([1, 2, 3, 7, 8, 16, 30]))
        made.build(dim)
        return made, dim

    while True:
        kinds = [("router", core.RouterConfig), ("expert", core.ExpertConfig)][: 1 + int(rng.random() < 0.7)]
        parts = {name: taken(functools.partial(drawn, kind, rng)) for name, kind in kinds}
        if None not in parts.values() and (found := taken(whole)) is not None:
            return found


def against_the_oracle(rng: np.random.Generator) -> str:
    """Try a random layer with a fast backend against the loop, and return what it was.

    Raises:
        AssertionError: outputs, losses, loads or gradients differ.
    """
    made, dim = layer(rng)
    B, S = int(rng.choice([0, 1, 2, 3])), int(rng.choice([0, 1, 2, 5, 8, 13]))
    dtype = list(BOUNDS)[rng.integers(3)]
    backend = ("cpu", "grouped")[rng.integers(2)]
    case = RouterCase(made.router, made.num_experts, dim, int(rng.integers(2**31)))
    valid = torch.from_numpy(rng.random((B, S)) < 0.7) if rng.random() < 0.5 else None
    steps = []
    for name in ("eager", backend if case.has("backend") else "eager"):
        with seeded(case.seed):
            built = dataclasses.replace(made, backend=name).build(dim)
            for p in built.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.1)
        built = built.to(dtype).train(case.seed % 2 == 0)
        steps.append(step(built, case.tokens(B, S).to(dtype), case.context(B, S, valid_BS=valid)))
    what = f"{made} of {dim} by {backend}, {B}x{S} {dtype}"
    assert steps[0].keys() == steps[1].keys(), what
    for name, expected in steps[0].items():
        close(steps[1][name].to_dense(), expected.to_dense(), f"{what}: {name}", BOUNDS[dtype])
    return what


def layers(number: int, rng: np.random.Generator) -> Iterator[Outcome]:
    """Yield a batch of layers. A layer may reject its tokens, such as too few for a patch, by a ``ValueError``."""
    computed = 0
    for i in range(LAYERS):
        try:
            against_the_oracle(rng)
            computed += 1
        except ValueError:
            continue
        except Exception as error:
            yield Outcome(number, f"layers: the one at place {i}", f"{type(error).__name__}: {error}")
    yield Outcome(number, "layers: a batch", "" if computed > LAYERS / 2 else f"only {computed} are taken", computed)


# ---- trainings


def _on_a_rank(rank: int, moe: core.MoEConfig, division: str, folder: Path) -> str:
    """Train on one rank of two, and return the message of its error."""
    import divided_runs

    divided_runs.as_rank(rank)
    return str(
        divided_runs.complaint(
            lambda: divided_runs.fit(folder / "two", divided_runs.model(moe=moe), divided_runs.divided(division), 2)
        )
    )


def training(number: int, rng: np.random.Generator, folder: Path) -> Outcome:
    """Train a random layer for three steps on two ranks, and in one process with the batches of both."""
    import divided_runs
    from two_ranks import on_ranks

    division = list(divided_runs.DIVISIONS)[rng.integers(len(divided_runs.DIVISIONS))]
    while True:  # what a rank's other tokens or chance decide is another result on two ranks
        moe, _ = layer(rng)
        if moe.router.needs or moe.router.depends_on != "token" or moe.capacity_factor or moe.balance.contrast:
            continue
        built = taken(lambda moe=moe: moe.build(8).train(), 1)
        x = torch.linspace(-1, 1, 72).sin().view(1, 9, 8)
        if type(built) is core.MoE and torch.allclose(built(x)[:, :4], built(x[:, :4]), atol=1e-6):
            break
    what = f"trainings: {moe} by {division}"
    folder = folder / f"training-{number}"
    (folder / "ranks").mkdir(parents=True)
    divided_runs.fit(folder / "one", divided_runs.model(moe=moe))
    on_two = functools.partial(_on_a_rank, moe=moe, division=division, folder=folder)
    complaints = on_ranks(on_two, folder / "ranks", 2, ["apps.train.sharded.expert_parallel", "divided_runs"])
    if complaints[0].startswith("ValueError: ") and complaints[1].startswith("ValueError: "):
        return Outcome(number, f"rejected trainings: {complaints[0]}: {moe}")
    if set(complaints) != {"nothing raised"}:
        return Outcome(number, what, f"ranks say {complaints}")
    one, two = (divided_runs.curve(folder / name) for name in ("one", "two"))
    is_alike = len(one) == len(two) == 3 and np.allclose(one, two, rtol=1e-5, atol=0)
    return Outcome(number, what, "" if is_alike else f"losses {two} on two ranks, {one} on one")


# ---- intervals


def _seeds(rng: np.random.Generator, S: int) -> tuple[bool, bool]:
    """Return whether the interval of a mean over seeds holds it, and whether its verdict is "no difference shown"."""
    interval = mean_interval(rng.normal(1.0, 2.0, S).tolist())
    return interval.low <= 1 <= interval.high, True


def _pairs(rng: np.random.Generator, S: int) -> tuple[bool, bool]:
    order = rng.normal(0.8, 0.05, S)  # what a seed's order of the data does to both models
    difference = paired_difference(*(order + rng.normal(0, 0.01, S) for _ in range(2)))
    return difference.low <= 0 <= difference.high, verdict(difference) == "no difference shown"


def _crossed(rng: np.random.Generator, S: int, share: float = 1.0, N: int = 50) -> tuple[bool, bool]:
    gains = share * rng.normal(0, 1, (S, 1)) + 0.5 * rng.normal(0, 1, N) + rng.normal(0, 1, (S, N))
    interval = crossed_interval(gains)
    return interval.low <= 0 <= interval.high, decide(interval) == "undecided"


def _texts(rng: np.random.Generator, S: int) -> tuple[bool, bool]:
    """Two systems that make as many mistakes; 40 sentences for each seed."""
    words = np.array([f"w{i}" for i in range(50)])
    told = rng.integers(50, size=(40 * S, 12))
    wrong = [np.where(rng.random(told.shape) < 0.3, rng.integers(50, size=told.shape), told) for _ in range(2)]
    texts = [[" ".join(words[row]) for row in rows] for rows in (told, *wrong)]
    found = paired_bootstrap(texts[1], texts[2], texts[0], resamples=400)
    return found.low <= 0 <= found.high, found.p > 0.05


def _ladder(rng: np.random.Generator, S: int) -> tuple[bool, bool]:
    """Two kinds with one curve, on four rungs: neither is cheaper."""
    rungs = [
        {
            kind: Measured(x * 1e12, 1.0, 3 * x**-0.3 * np.exp(rng.normal(0, 0.01, (S, 1))), np.ones(1))
            for kind in ("sparse", "dense")
        }
        for x in (1, 3, 10, 30)
    ]
    fit = Fit(rungs, draws=400)
    return fit.exponent("sparse").holds(0.3), fit.cheaper("sparse", "dense", 3e13).holds(1)


INTERVALS: dict[str, tuple[Callable[[np.random.Generator, int], tuple[bool, bool]], int, float]] = {
    "a mean over seeds": (_seeds, DRAWS, 0.97),
    "paired differences": (_pairs, DRAWS, 0.97),
    "seeds and examples": (_crossed, DRAWS, 1.0),
    "seeds that do not differ": (functools.partial(_crossed, share=0.0), DRAWS, 1.0),
    "BLEU of two systems": (_texts, 200, 0.97),
    "curves of a ladder": (_ladder, 200, 1.0),
}
"""Draws of a case of each interval by its name, how many, and the highest coverage that is right: an interval of
two seeds and many examples, of seeds that do not differ, and of a curve whose floor may be 0 is wide on purpose."""


def coverage(number: int, rng: np.random.Generator) -> Outcome:
    """Count how often an interval holds the truth, and a verdict is right where nothing differs."""
    name, S = list(itertools.product(INTERVALS, (2, 3, 5, 10)))[number // 3 % (4 * len(INTERVALS))]
    draw, draws, highest = INTERVALS[name]
    held, right = np.mean([draw(rng, S) for _ in range(draws)], 0)
    slack = 3 * math.sqrt(0.05 * 0.95 / draws)
    is_right = 0.93 - slack <= held <= highest + slack and right >= 0.95 - slack
    what = f"intervals: {name}, {S} seeds: {held:.3f} hold, {1 - right:.3f} wrong verdicts"
    return Outcome(number, what, "" if is_right else f"in {draws} draws", draws)


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a batch of layers, a training and the coverage of an interval in turn."""
    torch.set_num_threads(1)
    with quiet(own_notes=False):
        for number in numbers:
            rng = generator("numbers", number)
            if number % 3 == 0:
                yield from layers(number, rng)
            else:
                yield training(number, rng, folder) if number % 3 == 1 else coverage(number, rng)
