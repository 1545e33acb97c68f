"""Trees and a linear model beside the networks: which model is best, task by task."""

from __future__ import annotations

import numpy as np
import pytest

from apps.verdict.references import OfTask, best_model, by_task
from apps.verdict.work import Finished

DENSE = "dense_equal_flops"


def of_task(model, *means, task="spend"):
    """Return values of 40 rows that are ``means`` by seed, each row at 0.1 from its mean."""
    scatter = 0.1 * np.where(np.arange(40) % 2, 1, -1)
    return OfTask(task, model, "r2", np.array(means)[:, None] + scatter)


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        (
            (of_task("sparse", 0.3, 0.31, 0.29), of_task(DENSE, 0.29, 0.28, 0.30), of_task("lightgbm", 0.5)),
            "spend: lightgbm is best (r2: lightgbm 0.5, sparse 0.3, dense, equal FLOPs 0.29; over the second 95 % "
            "interval +0.173 to +0.227). Of the networks, sparse adds nothing that is shown.",
        ),
        (
            (of_task("sparse", 0.6, 0.61, 0.59), of_task(DENSE, 0.3, 0.31, 0.29), of_task("lightgbm", 0.5)),
            "spend: sparse is best (r2: sparse 0.6, lightgbm 0.5, dense, equal FLOPs 0.3; over the second 95 % "
            "interval +0.0734 to +0.127).",
        ),
        (
            (of_task("sparse", 0.5, 0.7), of_task(DENSE, 0.3, 0.5), of_task("lightgbm", 0.55)),
            "spend: no model is shown to be best (r2: sparse 0.6, lightgbm 0.55, dense, equal FLOPs 0.4; the first "
            "over the second 95 % interval -1.22 to +1.32). Fewer than 3 seeds decide nothing.",
        ),
        (  # the intervals of one seed and of two exclude 0, as three seeds' would
            (of_task("sparse", 0.6), of_task(DENSE, 0.3), of_task("lightgbm", 0.5)),
            "spend: no model is shown to be best (r2: sparse 0.6, lightgbm 0.5, dense, equal FLOPs 0.3; the first "
            "over the second 95 % interval +0.1 to +0.1). Fewer than 3 seeds decide nothing.",
        ),
        (
            (of_task("sparse", 0.6, 0.6), of_task(DENSE, 0.3, 0.3), of_task("lightgbm", 0.7)),
            "spend: no model is shown to be best (r2: lightgbm 0.7, sparse 0.6, dense, equal FLOPs 0.3; the first "
            "over the second 95 % interval +0.1 to +0.1). Fewer than 3 seeds decide nothing.",
        ),
    ],
)
def test_the_best_model_is_named_where_an_interval_of_three_seeds_shows_it(models, sentence):
    assert best_model("spend", {own.model: own for own in models}, DENSE) == sentence


def test_values_are_gathered_by_task_and_model():
    tasks = [{"a": ("auc", np.full(4, value)), "b": ("r2", np.full(4, value + 1))} for value in (0.1, 0.2, 0.3)]
    finished = [Finished(seed, [{}] * 3, [np.zeros(4)] * 3, tasks) for seed in (0, 1)]
    models = by_task(finished, [OfTask("b", "lightgbm", "r2", np.full((1, 4), 0.9))], DENSE)
    assert list(models) == ["a", "b"]
    assert list(models["b"]) == ["sparse", DENSE, "lightgbm"]
    assert models["a"][DENSE].values_SN.tolist() == [[0.2] * 4] * 2
    assert models["b"]["sparse"].quality == pytest.approx(1.1)
