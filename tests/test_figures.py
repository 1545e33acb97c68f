"""Every measured number of the pages that tell whether sparse pays comes from a file of docs/runs.

A figure is followed by a comment with its key, as in ``+0.21 ± 0.16<!--runs:fashion.json#100*top1/{sparse-dense}-->``.
A key is a file below docs/runs, a factor if there is one, and names from the top of the file down. In a name all but
letters and digits are written ``_``; ``*`` stands for each seed; ``{A-B}`` is A minus B, paired by seed. A key without
``#`` is a count of ``COUNTS``.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from apps.equal_cost import routers
from apps.report.intervals import CrossedInterval, Interval, mean_interval, paired_difference
from apps.verdict.schedule import LEAST_SEEDS, decide
from benchmarks import ladder_picture

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "docs" / "runs"
PAGES = ("README.md", "docs/index.md", "docs/results/does_sparse_pay.md")

SETTINGS = (
    r"Python 3\.11 to 3\.14", r"Apache-2\.0", "95 % confidence interval", r"(?:more|More) than forty (?:routers|ways)",
    "four backends", "in five lines", "Five commands",
    "MovieLens-1M", "Multi30k", "MNIST-5k", r"recall@10", r"NDCG@10", r"0\.01 of top-1", "CIFAR-10", "four domains",
    "[24] of 8 experts", "4 dense-gated experts", "one to three labels", "mean of two tasks", "20 minutes",
    "[23]00 steps", "at least three\nseeds", r"\(two seeds\)", r"\[two\n  processes\]",
)  # fmt: skip
"""Numbers that are no figures: names, settings, and what other tests count."""

FIGURE = re.compile(r"(\*\*)?([+-]?\d[\d,]*(?:\.\d+)?)(?: ± (\d+(?:\.\d+)?))?(?:\*\*)?<!--runs:(\S+?)-->")
TEENS = "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen"
NUMBER = re.compile(
    rf"\d|\b(?:two|three|four|five|six|seven|eight|nine|{TEENS}|twenty|thirty|forty|fifty|sixty)\b", re.IGNORECASE
)


@cache
def read(file: str) -> Any:
    return json.loads((RUNS / file).read_text(encoding="utf-8"))


def values(node: Any, path: list[str], seed: str = "0") -> dict[str, float]:
    """Return the values at the end of a path by seed."""
    if path:
        name, *rest = path
        if name == "*":
            own = node.items() if isinstance(node, dict) else ((str(run["seed"]), run) for run in node)
            return {key: value for seed, below in own for key, value in values(below, rest, seed).items()}
        if isinstance(node, list):
            return values(node[int(name)], rest, seed)
        (found,) = (key for key in node if re.sub(r"\W+", "_", key) == name)
        return values(node[found], rest, seed)
    return {str(i): value for i, value in enumerate(node)} if isinstance(node, list) else {seed: node}


def parsed(key: str) -> tuple[str, float, list[str]]:
    """Return the file of a key, its factor, and its path or the two paths of a difference."""
    file, _, path = key.partition("#")
    factor, path = re.fullmatch(r"(?:([\d.e-]+)\*)?(.*)", path).groups()
    pair = re.search(r"\{(\w+)-(\w+)\}", path)
    return file, float(factor or 1), [path.replace(pair[0], one) for one in pair.groups()] if pair else [path]


def interval(key: str) -> Interval:
    """Return the mean over the seeds of a key, or the mean difference, with its interval."""
    if "#" not in key:
        return Interval(COUNTS[key](), None, 1)
    file, factor, paths = parsed(key)
    found = [{seed: factor * value for seed, value in values(read(file), p.split("/")).items()} for p in paths]
    if len(found) == 1:
        return mean_interval(list(found[0].values()))
    assert found[0].keys() == found[1].keys(), key
    assert len(found[0]) >= LEAST_SEEDS, key
    return paired_difference(*([own[seed] for seed in sorted(own)] for own in found))


VERDICTS, BESIDE_TREES = "verdict.json", "table_verdicts.json"
TABLES = {
    "adult": ("adult_income", "adult_gender", "adult_hours", "Adult"),
    "california": ("housing", "California"),
    "census_income": ("census_income", "census_married", "Census-Income"),
    "movielens_1m": ("movielens_1m", "MovieLens-1M"),
    "protein": ("protein", "KDD Cup 2004, homologous proteins"),
}
"""The tables that have several names in the two files; each other name is a table by itself."""


def of_tables() -> list[str]:
    """Return the names of the verdicts on one label of a public table."""
    own = read(VERDICTS)["tasks"]
    return [name for name in own if own[name]["20"]["quality"] == "auc" and not name.startswith("made_")]


def beside_trees() -> dict[str, str]:
    return {run["data"]: run["verdict"] for run in read(BESIDE_TREES)["runs"]}


def num_paying() -> int:
    """Return how many verdicts on tables say that sparse pays, at equal FLOPs or at equal time."""
    answers = [a["outcome"] for name in of_tables() for a in read(VERDICTS)["tasks"][name]["20"]["answers"]]
    return answers.count("pays") + sum("verdict: pays" in v or "; pays" in v for v in beside_trees().values())


COUNTS = {
    "tables": lambda: len(
        {next((t for t, own in TABLES.items() if name in own), name) for name in [*of_tables(), *beside_trees()]}
    ),
    "verdicts": lambda: len(of_tables()) + len(beside_trees()),
    "verdicts_that_pay": num_paying,
    "tables_beside_trees": lambda: len(beside_trees()),
    "labels_beside_trees": lambda: len(read(BESIDE_TREES)["runs"]),
    "labels_led_by_trees": lambda: sum(": lightgbm is best" in run["best"] for run in read(BESIDE_TREES)["runs"]),
    "labels_led_by_networks": lambda: sum(
        bool(re.search(r": (sparse|shared bottom).* is best", run["best"])) for run in read(BESIDE_TREES)["runs"]
    ),
}


def keyed(page: str) -> list[tuple[str, str, str, str]]:
    return FIGURE.findall((ROOT / page).read_text(encoding="utf-8"))


def prose(page: str) -> str:
    """Return a page without what is not read as its words: code, targets of links, and figures with their keys."""
    text = (ROOT / page).read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", FIGURE.sub("", text))


def printed(value: float, like: str) -> str:
    """Return a number with as many decimals, commas and as much of a sign as another one."""
    decimals = len(like.partition(".")[2])
    return f"{value:{'+' if like[0] in '+-' else ''}{',' if ',' in like else ''}.{decimals}f}"


@pytest.mark.parametrize("page", PAGES)
def test_each_figure_is_that_of_its_file(page):
    for bold, mean, half_width, key in keyed(page):
        found = interval(key)
        assert printed(found.mean, mean) == mean, key
        if half_width:
            assert printed(found.half_width, half_width) == half_width, key
        else:  # 0.12 is no 0
            assert float(mean.replace(",", "")) == pytest.approx(found.mean, rel=0.05), key
        if "{" in key:
            assert half_width, f"{key}: a difference has an interval"
            assert bool(bold) == found.excludes_zero, f"{key}: bold is what is significant"


@pytest.mark.parametrize("page", PAGES)
def test_no_number_is_without_a_key(page):
    text = re.sub("|".join(SETTINGS), "", prose(page))
    assert "<!--runs:" not in text, "a key follows its figure without a space"
    assert [line for line in text.splitlines() if NUMBER.search(line)] == []


def test_each_setting_that_may_stand_without_a_key_does():
    text = "".join(map(prose, PAGES))
    assert [setting for setting in SETTINGS if not re.search(setting, text)] == []
    assert len(routers.overlays()) > 40


def flops(file: str, path: str) -> float | None:
    """Return the FLOPs of the model that a path leads to, where its file has them."""
    for top, below in (("leaderboard/", "rows/{}/cost/flops_per_example"), ("ladder_", "{}/flops")):
        if file.startswith(top):
            names = path.split("/")
            one = below.format(names[1] if top == "leaderboard/" else "/".join(names[:4]))
            return next(iter(values(read(file), one.split("/")).values()))
    return None


def test_models_below_equal_flops_have_equal_flops():
    pages = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
    equal = re.search(r"## At equal FLOPs\n(.*?)\n## ", pages[PAGES[2]], re.DOTALL)[1]
    equal += re.search(r"Sparse minus dense at equal FLOPs(.*?)At lower FLOPs", pages["README.md"], re.DOTALL)[1]
    pairs = [parsed(key) for *_, key in FIGURE.findall(equal) if "{" in key]
    compared = [(key, *(flops(key[0], path) for path in key[2])) for key in pairs]
    assert len(pairs) > 15
    assert [key for key, sparse, dense in compared if sparse and not abs(sparse / dense - 1) < 0.02] == []


@pytest.mark.parametrize("minutes", ["20", "2"])
def test_the_outcomes_of_verdicts_are_those_of_their_figures(minutes):
    for own in read(VERDICTS)["tasks"].values():
        for answer in own[minutes]["answers"]:
            given = (answer[name] for name in ("mean", "half_width", "count", "num_examples"))
            assert answer["outcome"] == decide(CrossedInterval(*given, 0.0, 0.0, 0.0))
    few = [run["best"] for run in read(BESIDE_TREES)["runs"] if run["seeds"] < LEAST_SEEDS]
    assert few
    assert all("no model is shown to be best" in best and "better" not in best for best in few)


def test_a_key_is_read_as_it_says():
    assert parsed("a.json#100*runs/{x-y}/*/auc") == ("a.json", 100.0, ["runs/x/*/auc", "runs/y/*/auc"])
    runs = {"MMoE, 2 of 8": {"runs": {"1": {"auc": 0.5}, "0": {"auc": 0.25}}}, "b": [{"seed": 3, "auc": 1.0}]}
    assert values(runs, ["MMoE_2_of_8", "runs", "*", "auc"]) == {"1": 0.5, "0": 0.25}
    assert values(runs, ["b", "*", "auc"]) == {"3": 1.0}
    # Of 92.74, 92.45, 92.63 and 92.46, 92.29, 92.44: 0.28, 0.16, 0.19, whose mean is 0.21 and standard deviation
    # 0.0624; 4.3027 * 0.0624 / sqrt(3) = 0.155.
    found = interval("fashion_mnist.json#100*test_top1/{sparse-dense_equal_flops}")
    assert (found.mean, found.half_width) == (pytest.approx(0.21), pytest.approx(0.1551, abs=1e-4))
    assert FIGURE.findall("**-1,0.5 ± 2**<!--runs:k-->") == [("**", "-1,0.5", "2", "k")]
    assert NUMBER.search("of seven")
    assert not NUMBER.search("often")


def test_the_picture_of_ladders_shows_their_files():
    for name in ("ladder_bible.json", "ladder_debian.json"):
        points = ladder_picture.chart_of("a corpus", RUNS / name).points
        own = [rung["kinds"][kind] for kind in ("sparse", "dense_equal_flops") for rung in read(name)["rungs"]]
        assert [point.y for point in points] == pytest.approx([mean_interval(k["loss"]).mean for k in own], rel=1e-3)
        assert [point.x for point in points] == [k["flops"] for k in own]
        assert [point.x for point in points[:3]] == pytest.approx([point.x for point in points[3:]], rel=1e-3)
