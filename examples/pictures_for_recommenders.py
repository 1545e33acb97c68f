"""Vectors of pictures and titles, written by ``moesaic predict``, tell a recommender which new items a user will click.

A model of images and texts learns drawn shapes and their titles. The made users of each town click on shapes of two
colours, which no column tells. Items of the test have no click in training, so that their ids say nothing of them:

    python examples/pictures_for_recommenders.py
    python examples/pictures_for_recommenders.py --ckpt_path runs/shapes     # with a model that is trained already
"""

import argparse
import re
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import parquet
from sklearn.metrics import roc_auc_score

import apps
from apps.cli import main as moesaic
from apps.multimodal.pairs.shapes import COLOURS
from apps.report.intervals import mean_interval
from apps.train.checkpoint.paths import find_checkpoint

VECTORS = ["image_vector", "text_vector"]
TABLE = {
    "categorical": ["user", "town", "item"],
    "vectors": VECTORS,
    "tasks": {"click": {"column": "click"}},
    "split": {"kind": "given", "val": 0.1},
}
RECOMMENDER = {
    "embedding": {"init_std": 0.1},
    "interaction": {"kind": "dot"},
    "head": {"activation": "silu"},
    "optimizer": {"lr": 5.0e-3},
}
CLICKS = {
    "model": {"class_path": "MultiTaskRecommender", "init_args": RECOMMENDER},
    "data": {
        "class_path": "TableData",
        "init_args": {
            "dataset": "table",
            "batch_size": 256,
            "train_file": "train.parquet",
            "test_file": "test.parquet",
            "table": TABLE,
        },
    },
    "trainer": {"max_epochs": 3},
}
QUIET = {"trainer.enable_progress_bar": "false", "trainer.logger": "false"}


def fit(folder: Path, name: str, config: str, **options: object) -> Path:
    """Train what a configuration describes, and return the folder of the run."""
    words = [f"--{key}={value}" for key, value in {**QUIET, **options}.items()]
    assert moesaic(["fit", "--config", config, "--run_dir", str(folder / name), *words]) == 0
    return folder / name


def made_clicks(items: pa.Table, users: int, shown: int, rng: np.random.Generator) -> pa.Table:
    """Return a row for each item that a user was shown: a click is likely on the two colours of the user's town."""
    names = sorted(COLOURS)
    titles = items["text"].to_pylist()
    colour_I = np.array([names.index(re.search("|".join(names), title)[0]) for title in titles])
    user_R, item_R = np.repeat(np.arange(users), shown), rng.integers(len(items), size=users * shown)
    town_R = user_R % 4
    click_R = rng.random(len(user_R)) < np.where(colour_I[item_R] // 2 == town_R, 0.7, 0.1)
    columns = items.take(item_R)
    rows = {"user": user_R, "town": town_R, "item": columns["image"], "click": click_R.astype(int)}
    return pa.table({**rows, **{name: columns[name] for name in VECTORS}})


def user_aucs(rows: pa.Table, score_R: np.ndarray) -> dict[int, float]:
    """Return the AUC of each user who has clicked on some of the rows and not on others."""
    user_R, click_R = rows["user"].to_numpy(), rows["click"].to_numpy()
    own = {user: user_R == user for user in np.unique(user_R)}
    return {u: roc_auc_score(click_R[at], score_R[at]) for u, at in own.items() if 0 < click_R[at].mean() < 1}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ckpt_path", help="run of a model of images and texts; by default one is trained")
    parser.add_argument("--epochs", type=int, default=4, help="of that training")
    parser.add_argument("--users", type=int, default=400)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = args.ckpt_path
        if run is None:
            run = fit(folder, "pairs", "configs/multimodal/shapes.yaml", **{"trainer.max_epochs": args.epochs})
        items_file = str(folder / "items.parquet")
        predict = ["predict", "--ckpt_path", str(find_checkpoint(run)), "--output", items_file]
        assert moesaic([*predict, "--data.predict_split", "all", "--trainer.enable_progress_bar", "false"]) == 0
        rows = made_clicks(parquet.read_table(items_file), args.users, 50, np.random.default_rng(0))
        is_new = np.array([item.endswith(("1", "6")) for item in rows["item"].to_pylist()])  # a fifth of the items
        parquet.write_table(rows.filter(~is_new), folder / "train.parquet")
        parquet.write_table(test := rows.filter(is_new), folder / "test.parquet")
        (folder / "clicks.yaml").write_text(yaml.safe_dump(CLICKS))
        data, aucs = {"data.root": name, "data.cache_dir": name}, {}
        for kind, exclude in {"without": VECTORS, "with": []}.items():
            clicks = fit(folder, kind, str(folder / "clicks.yaml"), **{**data, "data.exclude": exclude})
            scores = apps.load(clicks).predict(test)["probability_click"].to_numpy()
            aucs[kind] = user_aucs(test, scores)
            print(f"{kind} vectors: AUC {np.mean(list(aucs[kind].values())):.3f}, the mean of {len(aucs[kind])} users")
    gain = mean_interval([aucs["with"][user] - auc for user, auc in aucs["without"].items()])
    print(f"with minus without: {gain.low:+.3f} to {gain.high:+.3f} (95 % interval, 1 seed)")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
