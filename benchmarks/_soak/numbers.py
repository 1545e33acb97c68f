"""Numbers: random layers against the loop oracle, trainings on two ranks against one, coverage of printed intervals."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import divided_runs
import numpy as np
import torch
from two_ranks import on_two_ranks

import core
from apps.base.quiet import quiet
from apps.compare.ladder.curves import Fit, Measured
from apps.nlp.text.significance import paired_bootstrap
from apps.report.intervals import crossed_interval, mean_interval, paired_difference, verdict
from apps.verdict.schedule import decide
from benchmarks._soak.outcome import Outcome, generator
from core.fields import Bounds, OneOf
from core.registry import OpenConfig
from core.testing.check import FLOAT32, step
from core.testing.router_case import RouterCase, seeded

LAYERS, TRIES, DRAWS = 100, 200, 4000
BOUNDS = {torch.float64: 1e-12, torch.float32: 4 * FLOAT32, torch.bfloat16: 32 * 2**-8}
"""Bounds of an error over the largest element; of bfloat16 some roundings of 2^-8, of terms that may cancel."""
SMALL = 0.1
"""Gradients and outputs whose largest element is below this share of the step's largest gradient, since their terms
cancel, are judged as if it were that share."""


# ---- random layers


def drawn(hint: Any, rng: np.random.Generator) -> Any:
    """Return a value of a field's type. Not all that are drawn fit together.

    Raises:
        ValueError: nothing is known of the type.
    """
    inner = typing.get_args(hint)
    kind = typing.get_origin(hint) or hint
    choices = inner if kind is Literal else (False, True) if kind is bool else ()
    if kind is Annotated:
        for rule in inner[1:]:
            if type(rule) is Bounds:  # and not of a length
                low = max(rule.low, -4.0)
                high = min(rule.high, low + 8)
                return math.ceil(rng.uniform(low - 1, high)) if inner[0] is int else rng.uniform(low, high)
            if isinstance(rule, OneOf):
                choices = rule.names
    if choices:
        return choices[rng.integers(len(choices))]
    if kind in (Annotated, typing.Union, types.UnionType):
        return drawn(inner[0 if kind is Annotated else rng.integers(len(inner))], rng)
    if kind is tuple:
        return tuple(drawn(one, rng) for one in (inner[:1] * rng.integers(1, 4) if inner[-1] is ... else inner))
    if kind is type(None):
        return None
    if isinstance(kind, type) and issubclass(kind, OpenConfig):
        kind = kinds_of(kind)[rng.integers(len(kinds_of(kind)))]
    if dataclasses.is_dataclass(kind):
        return config(kind, rng)
    raise ValueError(f"no value of {hint} is drawn")


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
    for f in dataclasses.fields(kind):
        if not f.init or f.name in given or f.name == "dropout":  # backends draw it in another order
            continue
        if f.default is dataclasses.MISSING or rng.random() < 0.15:
            given[f.name] = drawn(types_of(kind)[f.name], rng)
    return kind(**given)


def layer(rng: np.random.Generator, dims: Sequence[int] = (1, 2, 3, 7, 8, 16, 30)) -> tuple[core.MoEConfig, core.MoE]:
    """Return a layer as wide as one of ``dims`` and its config: of many that are drawn, the first that is built."""
    for attempt in itertools.count():
        if attempt % TRIES == 0:
            router = kinds_of(core.RouterConfig)[rng.integers(len(kinds_of(core.RouterConfig)))]
        with contextlib.suppress(ValueError):
            parts = {"router": config(router, rng), "num_experts": int(rng.integers(1, 10)), "backend": "eager"}
            parts |= {"expert": drawn(core.ExpertConfig, rng)} if rng.random() < 0.7 else {}
            made = config(core.MoEConfig, rng, **parts)
            return made, made.build(int(rng.choice(dims)))
    raise AssertionError("unreachable")


def against_the_oracle(rng: np.random.Generator) -> str:
    """Try a random layer with a fast backend against the loop, and return what it was.

    Raises:
        AssertionError: outputs, losses, loads or gradients differ.
    """
    made, built = layer(rng)
    B, S = int(rng.choice([0, 1, 2, 3])), int(rng.choice([0, 1, 2, 5, 8, 13]))
    dtype = list(BOUNDS)[rng.integers(3)]
    backend = ("cpu", "grouped")[rng.integers(2)]
    case = RouterCase(made.router, made.num_experts, built.dim, int(rng.integers(2**31)))
    valid = torch.from_numpy(rng.random((B, S)) < 0.7) if rng.random() < 0.5 else None
    steps = []
    for name in ("eager", backend if case.has("backend") else "eager"):
        with seeded(case.seed):
            built = dataclasses.replace(made, backend=name).build(built.dim)
            for p in built.parameters():
                p.data.add_(torch.randn_like(p), alpha=0.1)
        built = built.to(dtype).train(case.seed % 2 == 0)
        given = case.tokens(B, S).to(dtype), case.context(B, S, valid_BS=valid)
        steps.append(step(built, *given))
    what = f"{made} of {built.dim} by {backend}, {B}x{S} {dtype}"
    assert {n: x.shape for n, x in steps[0].items()} == {n: x.shape for n, x in steps[1].items()}, what
    expected = {name: value.to_dense().double() for name, value in steps[0].items() if value.numel()}
    gradients = [value.abs().max().item() for name, value in expected.items() if name.startswith("gradient")]
    for name, value in expected.items():
        if name.startswith("gradient") and dtype is torch.bfloat16:
            continue  # a unit of ReLU near 0 turns with the order of sums
        largest, error = value.abs().max().item(), (steps[1][name].to_dense() - value).abs().max().item()
        small = SMALL * max(gradients, default=0.0) if name.startswith(("gradient", "output")) else 0.0  # terms cancel
        bound = BOUNDS[dtype] * max(largest, small)
        if error > bound:  # the loop rounds as well: float64 says which of the two is off
            exact = step(built.double(), *given, lambda x, context: built(x.double(), context).to(dtype))[name]
            error = (steps[1][name].to_dense() - exact.to_dense()).abs().max().item()
        assert error <= bound, f"{what}: {name} is off by {error:.2e}, its largest element is {largest:.2e}"
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
            if "does not require grad" in str(error):  # a constant, such as that of Zero experts
                continue
            yield Outcome(number, f"layers: the one at place {i}", f"{type(error).__name__}: {error}")
    yield Outcome(number, "layers: a batch", "" if computed > LAYERS / 2 else f"only {computed} are taken", computed)


# ---- trainings


def on_a_rank(rank: int, moe: core.MoEConfig, division: str, folder: Path) -> str:
    """Train on one rank of two, and return the message of its error."""
    divided_runs.as_rank(rank)
    model, strategy = divided_runs.model(moe=moe), divided_runs.divided(division)
    return divided_runs.complaint(lambda: divided_runs.fit(folder / "two", model, strategy, 2))


def training(number: int, rng: np.random.Generator, folder: Path) -> Outcome:
    """Train a random layer for three steps on two ranks, and in one process with the batches of both."""
    division = list(divided_runs.DIVISIONS)[rng.integers(len(divided_runs.DIVISIONS))]
    while True:  # what a rank's other tokens or chance decide is another result on two ranks
        moe, built = layer(rng, [8])
        is_alone = moe.router.is_causal and moe.router.decodes_stepwise
        if type(built) is not core.MoE or moe.router.needs or not is_alone:
            continue
        if moe.capacity_factor or moe.balance.contrast:
            continue
        x = torch.linspace(-1, 1, 72).sin().view(1, 9, 8)
        state = torch.get_rng_state()
        with contextlib.suppress(ValueError):  # of a context that is missing
            with core.record(built) as tape:
                y = built(x)
            core.aux_loss(tape)
            if not torch.equal(torch.get_rng_state(), state):
                continue
            # FSDP gathers weights for a backward pass that begins at the layer's output: that of Zero experts has none.
            if y.requires_grad and y.shape == x.shape and torch.allclose(y[:, :4], built(x[:, :4]), atol=1e-6):
                break
    folder = folder / f"training-{number}"
    (folder / "ranks").mkdir(parents=True)
    divided_runs.fit(folder / "one", divided_runs.model(moe=moe))
    on_two = functools.partial(on_a_rank, moe=moe, division=division, folder=folder)
    said = on_two_ranks(on_two, folder / "ranks", ["apps.train.sharded.expert_parallel", "divided_runs"])
    if all(one.startswith("ValueError: ") for one in said):
        return Outcome(number, f"rejected trainings: {said[0]}: {moe}")
    one, two = (
        [*map(float, divided_runs.curve(path))] if path.exists() else [] for path in (folder / "one", folder / "two")
    )
    is_alike = len(one) == len(two) == 3 and np.allclose(one, two, rtol=1e-5, atol=0)
    fault = "" if is_alike else f"losses {two} on two ranks, which say {said}, {one} on one"
    return Outcome(number, f"trainings: {moe} by {division}", fault)


# ---- intervals


Drawn = tuple[Any, float, bool]
"""An interval of drawn values, the truth, and whether its verdict is that nothing differs, as is true."""


def _mean(rng: np.random.Generator, S: int) -> Drawn:
    return mean_interval(rng.normal(1.0, 2.0, S).tolist()), 1, True


def _pairs(rng: np.random.Generator, S: int) -> Drawn:
    order = rng.normal(0.8, 0.05, S)  # what a seed's order of the data does to both models
    difference = paired_difference(*(order + rng.normal(0, 0.01, S) for _ in range(2)))
    return difference, 0, verdict(difference) == "no difference shown"


def _crossed(rng: np.random.Generator, S: int, share: float = 1.0, N: int = 50) -> Drawn:
    interval = crossed_interval(share * rng.normal(0, 1, (S, 1)) + 0.5 * rng.normal(0, 1, N) + rng.normal(0, 1, (S, N)))
    return interval, 0, decide(interval) == "undecided"


def _texts(rng: np.random.Generator, S: int) -> Drawn:
    """Two systems that make as many mistakes; 100 sentences for each seed: with fewer BLEU's interval is narrow."""
    told = rng.integers(50, size=(100 * S, 12))
    wrong = (np.where(rng.random(told.shape) < 0.3, rng.integers(50, size=told.shape), told) for _ in range(2))
    texts = [[" ".join(f"w{word}" for word in row) for row in rows] for rows in (*wrong, told)]
    found = paired_bootstrap(*texts)
    return found, 0, found.p > 0.05


def _ladder(rng: np.random.Generator, S: int) -> Drawn:
    """Two kinds with one curve, on four rungs: neither is cheaper."""
    losses = {x: 3 * x**-0.3 * np.exp(rng.normal(0, 0.01, (2, S, 1))) for x in (1, 3, 10, 30)}
    rungs = [
        {kind: Measured(x * 1e12, 1.0, own, np.ones(1)) for kind, own in zip(("sparse", "dense"), both, strict=True)}
        for x, both in losses.items()
    ]
    fit = Fit(rungs, draws=400)
    return fit.exponent("sparse"), 0.3, fit.cheaper("sparse", "dense", 3e13).holds(1)


INTERVALS: dict[str, tuple[Callable[[np.random.Generator, int], Drawn], int, float]] = {
    "a mean over seeds": (_mean, DRAWS, 0.97),
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
    drawn_ones = [draw(rng, S) for _ in range(draws)]
    held, right = np.mean([(span.low <= truth <= span.high, is_right) for span, truth, is_right in drawn_ones], 0)
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
