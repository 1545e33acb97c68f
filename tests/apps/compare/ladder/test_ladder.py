"""``moesaic compare CONFIG --ladder`` as a user calls it, its section of a configuration, and its curves."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from compared import CONFIG
from refusals import refused

from apps.cli import main as moesaic
from apps.cli.errors import UsageError
from apps.compare.ladder.curves import Fit, Measured
from apps.compare.ladder.growth import Growth, Rule, flags
from apps.compare.ladder.page import Story
from apps.compare.ladder.rungs import Outcome, Rung, RungWork, limits
from apps.compare.options import CompareOptions
from apps.compare.training import Unit
from apps.compare.work import Plan

SECTION = "ladder: {model.moe.expert.hidden_dim: linear, learning_rate: -0.5}\n"
LADDER = CONFIG.replace("max_epochs: 2", "max_epochs: 10") + SECTION


def asked(tmp_path, rungs="0.5,1,2", *more):
    (tmp_path / "tiny.yaml").write_text(LADDER)
    fixed = ["--seeds", "2", "--rounds", "0", "--data.n", "128", "--output", str(tmp_path / "out")]
    return ["compare", str(tmp_path / "tiny.yaml"), "--ladder", rungs, *fixed, *more]


def files(folder):
    return {p.relative_to(folder): p.stat().st_mtime_ns for p in folder.rglob("result.json")}


@pytest.mark.slow
def test_a_ladder_and_one_rung_more(tmp_path, capsys):
    assert moesaic(asked(tmp_path, "0.5,1")) == 0
    out = tmp_path / "out"
    begun, first = json.loads((out / "gates.json").read_text()), files(out)
    # F = 4, 8, 16 take 128 + 4 (64 + 64 F) + 48 FLOPs an example: 1456, 2480, 4528. 80 steps of 16 are the budget.
    assert [rung["steps"] for rung in begun["rungs"]] == [68, 80]
    assert "Sparse against dense, equal FLOPs, rung by rung: " in " ".join(capsys.readouterr().out.split())
    assert moesaic(asked(tmp_path)) == 0
    ladder = json.loads((out / "ladder.json").read_text())
    assert files(out).items() >= first.items(), "finished runs are not done again"
    assert [rung["steps"] for rung in ladder["rungs"]] == [68, 80, 88]
    assert ladder["rungs"][1]["kinds"]["sparse"]["flops"] == 3 * 2480 * 16 * 80
    for rung in ladder["rungs"]:
        sparse, dense = rung["kinds"]["sparse"], rung["kinds"]["dense_equal_flops"]
        assert dense["flops"] == sparse["flops"]
        assert len(sparse["loss"]) == len(dense["loss"]) == 2
        assert len(sparse["blocks"][0]) == len(sparse["shares"]) > 1
        assert np.dot(sparse["blocks"][0], sparse["shares"]) == pytest.approx(sparse["loss"][0], rel=1e-3)
    # The rate is searched on two rungs; the third has the second's over the root of 2.
    rates = [{k: v["learning_rate"] for k, v in rung["kinds"].items()} for rung in ladder["rungs"]]
    assert all(rate in (0.00471, 0.0141, 0.0424) for rate in rates[0].values())
    assert rates[2] == {kind: pytest.approx(rate / 2**0.5, rel=0.01) for kind, rate in rates[1].items()}
    saved = json.loads((out / "gates.json").read_text())
    assert saved["gates"] == begun["gates"]
    assert saved["date"] == begun["date"], "the gates are those of the first run"
    assert len(saved["rungs"]) == 3
    assert (out / "report.html").exists()
    assert (out / "ladder.png").exists()


def test_minutes_end_a_ladder_whose_gates_do_not_change_and_fit_takes_its_configuration(tmp_path, capsys):
    argv = asked(tmp_path, "0.5,1", "--learning_rates", "0.01", "--minutes", "0.001", "--trainer.max_epochs", "4")
    assert moesaic(argv) == 0
    shown = capsys.readouterr()
    assert "rung 1 and above are not begun" in shown.out + shown.err
    ladder = json.loads((tmp_path / "out" / "ladder.json").read_text())
    assert [rung["rung"] for rung in ladder["rungs"]] == [0.5]
    gates = tmp_path / "out" / "gates.json"
    gates.write_text(gates.read_text().replace("lies below 0", "lies below 1"))
    assert moesaic(argv) == 1
    assert "holds another ladder (gates.gain on a rung" in capsys.readouterr().err
    (tmp_path / "tiny.yaml").write_text(LADDER)
    files = ["--config", str(tmp_path / "tiny.yaml"), "--run_dir", str(tmp_path / "run")]
    assert moesaic(["fit", *files, "--trainer.max_epochs", "1"]) == 0


@pytest.mark.parametrize(("rungs", "section", "message"), [
    ("3", "", "--ladder 3 is one rung"),
    ("1,1", "", "must rise"),
    ("3,1", "", "must rise"),
    ("0,1", "", "must rise"),
    ("1,x", "", "give numbers with commas"),
    ("0.001,1", "", "fewer than 20 are no training"),
    ("1,2", "ladder: null", "has no section ladder"),
])  # fmt: skip
def test_bad_input_is_one_line_and_nothing_is_written(rungs, section, message, tmp_path, capsys):
    argv = asked(tmp_path, rungs)
    if section:
        (tmp_path / "tiny.yaml").write_text(CONFIG)
    assert moesaic(argv) in (1, 2)
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def outcome(number, sparse, dense, turned=0.0):
    rung = Rung(number, 0, {}, 100, 800, number * 1e12, ())
    both = (("sparse", sparse, 2 * number), ("dense_equal_flops", dense, number))
    kinds = {name: Measured(number * 1e12, s, np.array(losses)[:, None], np.ones(1)) for name, losses, s in both}
    return Outcome(rung, kinds, dict.fromkeys(kinds, (0.01, False)), dict.fromkeys(kinds, turned), 1.0)


def test_the_story_of_a_ladder_by_hand():
    # 2 x^-1/2 and 4 x^-1/2, seeds at -1, 0 and +1 %: sparse needs a quarter of the FLOPs and half of the time.
    seeds = np.array([0.99, 1.0, 1.01])
    outcomes = [outcome(x, 2 * seeds * x**-0.5, 4 * seeds * x**-0.5) for x in (1.0, 4.0, 16.0, 64.0)]
    story = Story(outcomes, "loss")
    text = " ".join(story.sentences())
    assert "wins at 1, wins at 4, wins at 16, wins at 64" in text
    assert "x0.25 (0.2" in text
    assert "the training FLOPs: cheaper" in text
    assert "x0.50 (0.4" in text
    assert "the gain shows no change" in text
    assert "cannot tell the floor" in text
    assert [p.expected.value for p in story.tested] == pytest.approx([2 / 8, 4 / 8], rel=1e-3)
    assert all(p.expected.holds(p.came) for p in story.tested)
    assert (story.next, [p.expected.value for p in story.ahead]) == (256, pytest.approx([2 / 16, 4 / 16], rel=1e-3))


def test_rungs_beyond_the_turn_are_not_fitted():
    seeds = np.array([0.99, 1.0, 1.01])
    outcomes = [outcome(x, 2 * seeds * x**-0.5, 4 * seeds * x**-0.5) for x in (1.0, 4.0, 16.0)]
    turned = {"sparse": 0.05, "dense_equal_flops": 0}
    outcomes += [replace(outcomes[-1], rung=replace(outcomes[-1].rung, number=64.0), turned=turned)]
    outcomes += [outcome(256.0, 3 * seeds, 1 * seeds)]
    assert limits(outcomes) == [False, False, False, True, True]
    story = Story(outcomes, "loss")
    assert [o.rung.number for o in story.fitted] == [1, 4, 16]
    assert "Limited by data, and not fitted: 2 rungs (64, 256)" in " ".join(story.sentences())


@pytest.mark.parametrize(("best", "tried", "chosen"), [
    (0.11, [0.033, 0.1, 0.3], (0.1, False)),
    (0.5, [0.033, 0.1, 0.3, 0.6, 1.2], (0.6, False)),
    (0.02, [0.033, 0.1, 0.3, 0.0165, 0.00825], (0.0165, False)),
    (1e9, [0.033, 0.1, 0.3, 0.6, 1.2, 2.4], (2.4, True)),
])  # fmt: skip
def test_a_search_goes_on_beyond_its_edge(best, tried, chosen, tmp_path, monkeypatch):
    plan = Plan({}, CompareOptions(), {}, (0.033, 0.1, 0.3), 0.1, (0,), 1000)
    experiment, whole = SimpleNamespace(monitor_mode="min"), SimpleNamespace(grow=lambda share: None)
    work, done = RungWork({}, experiment, plan, [], tmp_path, whole, 1), []

    def train(units):
        done.extend(unit.rate for unit in units)
        return {unit: {"quality": abs(np.log(unit.rate / best))} for unit in units}

    monkeypatch.setattr(work, "_train", train)
    system = SimpleNamespace(name="sparse", title="sparse", cost=1)
    searched = train(plan.search_units("sparse"))
    assert work._choose(system, searched) == chosen
    assert done == tried == [unit.rate for unit in searched]
    assert {type(unit) for unit in searched} == {Unit}


OPTIONS = {"vit": {"embed_dim": 128, "depth": 6}, "dims": [64, 16], "drop": 0.1}
PLAIN = {"model": {"class_path": "M", "init_args": OPTIONS}}


@pytest.mark.parametrize(("given", "base", "rung", "expected"), [
    ("linear", 8, 3.0, 24),
    ("square_root", 8, 4.0, 16),
    ("cube_root", 64, 8.0, 128),
    ({"power": "fourth_root", "multiple": 32}, 128, 16.0, 256),
    ({"power": "cube_root", "multiple": 32}, 128, 2.0, 160),  # 161.3
    ({"power": "linear", "multiple": 32}, 128, 0.01, 32),  # no less than the multiple
    (-0.5, 0.1, 100.0, 0.01),
    (0.5, [64, 16], 4.0, [128, 32]),
    ([1, 1.5], 64, 10.0, 96),
])  # fmt: skip
def test_an_option_grows_by_its_rule(given, base, rung, expected):
    assert Rule.of("x", given).value(base, rung, 1) == expected


def test_options_and_the_learning_rate_of_a_rung():
    section = {"model.vit.embed_dim": "square_root", "model.dims": [1, 2], "learning_rate": -0.5}
    growth = Growth.of(section, (1.0, 4.0), "x.yaml")
    values = growth.options(PLAIN, 4.0, 1)
    assert values == {"model.vit.embed_dim": 256, "model.dims": [128, 32]}
    assert flags(values) == ["--model.vit.embed_dim", "256", "--model.dims", "[128, 32]"]
    assert growth.rate(0.01, 4.0, 1) == 0.005
    assert growth.rate(None, 4.0, 1) is None
    assert Growth.of({"model.dims": 1}, (1.0,), "x").rate(0.01, 4.0, 0) == 0.01


@pytest.mark.parametrize(("section", "message"), [
    (None, "x.yaml has no section ladder"),
    ({"model.vit.embed_dim": "sixth_root"}, "is no rule"),
    ({"model.vit.embed_dim": {"power": 1, "multiple": 0}}, "is no rule"),
    ({"model.vit.embed_dim": {"powr": 1}}, "is no rule"),
    ({"model.vit.embed_dim": [1, 0]}, "is no rule"),
    ({"model.vit.embed_dim": [1, 2, 3]}, "has 3 multiples for 2 rungs"),
    ({"trainer.max_steps": 1}, "follow from its budget"),
    ({"model.vit.width": 1}, "has no number there (null)"),
    ({"model.vit": 1}, "has no number there"),
])  # fmt: skip
def test_a_section_that_says_nothing_is_one_line(section, message):
    with pytest.raises(UsageError) as raised:
        Growth.of(section, (1.0, 2.0), "x.yaml").options(PLAIN, 2.0, 1)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def measured(losses: np.ndarray, flops: float, blocks: int = 1) -> Measured:
    return Measured(flops, 1.0, np.repeat(losses[:, None], blocks, 1), np.full(blocks, 1 / blocks))


def rungs(places, floor, scale, exponent, noise=0.0, seeds=3, generator=None, of_rung=0.0):
    """Return rungs on ``floor + scale x^-exponent`` with relative noise of seeds, and of rungs."""
    generator = generator or np.random.default_rng(0)

    def losses(kind, x):
        mean = floor + scale[kind] * x ** -exponent[kind]
        scatter = noise * generator.standard_normal(seeds) + of_rung * generator.standard_normal()
        return mean * np.exp(scatter)

    return [{kind: measured(losses(kind, x), x * 1e12) for kind in scale} for x in places]


def test_curves_and_a_crossing_over_a_floor_are_found():
    fit = Fit(rungs([1, 4, 16, 64], 0.0, {"sparse": 2.0, "dense": 4.0}, {"sparse": 0.5, "dense": 0.5}))
    assert fit.loss("sparse", 256e12) == pytest.approx(2 / 16)
    # 4 x^-1/2 = 2 y^-1/2 at y = x / 4.
    assert fit.cheaper("sparse", "dense", 16e12).value == pytest.approx(4)
    assert fit.growth("sparse", "dense", 1e12, 64e12).value == pytest.approx(1)
    assert not fit.tells_floor
    assert fit.num_params == 4
    # 1 + 4 x^-1/2 and 1 + 2 x^-1/4 cross at x^1/4 = 2.
    fit = Fit(rungs([1, 4, 64, 256], 1.0, {"sparse": 4.0, "dense": 2.0}, {"sparse": 0.5, "dense": 0.25}, 1e-4))
    assert fit.tells_floor
    assert (fit.num_params, fit.floor().value) == (5, pytest.approx(1, rel=0.02))
    assert fit.exponent("sparse").value == pytest.approx(0.5, rel=0.03)
    crossing = fit.crossing("sparse", "dense")
    assert crossing.value == pytest.approx(16e12, rel=0.05)
    assert crossing.low < 16e12 < crossing.high
    assert fit.growth("sparse", "dense", 4e12, 64e12).low > 1
    two = rungs([1, 16], 0.0, {"sparse": 2.0, "dense": 4.0}, {"sparse": 0.5, "dense": 0.25}, 0.01)
    fit = Fit(two)
    assert fit.num_params == 3 < 4
    assert fit.exponent("sparse").value == fit.exponent("dense").value == pytest.approx(0.375, rel=0.1)
    refused("got 1 of 2", Fit, two[:1])
    refused("above 0", Fit, [{k: measured(np.array([0.0, 1.0]), m.flops) for k, m in rung.items()} for rung in two])


def test_other_examples_or_blocks_do_not_change_the_prediction():
    own = rungs([1, 4, 16, 64], 0.0, {"sparse": 2.0, "dense": 4.0}, {"sparse": 0.3, "dense": 0.3}, 0.01)
    share = np.exp(np.random.default_rng(0).standard_normal(20))
    blocks, even = share / share.mean(), np.full(20, 1 / 20)
    scattered = [{k: Measured(m.flops, 1.0, m.loss_S[:, None] * blocks, even) for k, m in r.items()} for r in own]
    plain, blocks = Fit(own), Fit(scattered)
    assert blocks.loss("sparse", 1e14) == pytest.approx(plain.loss("sparse", 1e14))
    assert blocks.predicted("sparse", 1e14).low == pytest.approx(plain.predicted("sparse", 1e14).low)
    # A share that is the same for all models and rungs changes no ratio of theirs.
    ratios = (fit.cheaper("sparse", "dense", 4e12).low for fit in (blocks, plain))
    assert next(ratios) == pytest.approx(next(ratios), rel=0.1)
    own = rungs((1, 3, 9), 1.0, {"sparse": 2.0, "dense": 2.2}, {"sparse": 0.3, "dense": 0.3}, noise=0.01)
    other = [*own[:2], {kind: measured(m.loss_S, m.flops, 7) for kind, m in own[2].items()}]
    # Blocks of equal losses change nothing, however many.
    assert Fit(other).predicted("sparse", 3e13) == Fit(own).predicted("sparse", 3e13)


@pytest.mark.parametrize("places, floor, of_rung, ladders", [
    ([1, 3, 10], 1.5, 0.0, 150),
    pytest.param([1, 3, 10], 1.5, 0.0, 500, marks=pytest.mark.slow),
    pytest.param([1, 3, 10, 30], 0.0, 0.01, 500, marks=pytest.mark.slow),
    pytest.param([1, 3, 10], 0.0, 0.0, 500, marks=pytest.mark.slow),
    pytest.param([1, 3, 10, 30], 0.2, 0.0, 500, marks=pytest.mark.slow),
])  # fmt: skip
def test_intervals_of_made_ladders_hold_what_comes(places, floor, of_rung, ladders):
    scale, exponent = {"sparse": 3.0, "dense": 3.2}, {"sparse": 0.3, "dense": 0.28}
    top, beyond = places[-1], 3 * places[-1]
    cheaper = top / (scale["sparse"] / (scale["dense"] * top ** -exponent["dense"])) ** (1 / exponent["sparse"])
    held = np.zeros(3)
    for seed in range(ladders):
        made = {"noise": 0.01, "generator": np.random.default_rng(seed), "of_rung": of_rung}
        own, further = (rungs(p, floor, scale, exponent, **made) for p in (places, [beyond]))
        fit = Fit(own, draws=200)
        for i, kind in enumerate(scale):
            held[i] += fit.predicted(kind, beyond * 1e12).holds(further[0][kind].loss_S.mean())
        held[2] += fit.cheaper("sparse", "dense", top * 1e12).holds(cheaper)
    assert (held / ladders >= 0.9).all(), held / ladders
    assert (held / ladders <= 0.99).all(), held / ladders
