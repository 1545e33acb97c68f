"""Models of tables with scikit-learn's methods."""

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from refusals import refused
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils.estimator_checks import check_estimator, estimator_checks_generator

import apps
import moesaic
from apps.recsys.tables.encode.ids import ids_among_numbers
from moesaic.tables import FAILED_CHECKS

QUICK = {"model.blend": None, "data.table.numbers": "bins"}
"""Neither trees nor a trial of the encoding: a fit of few rows takes a second."""
TELLING = (
    "check_fit2d_1feature",
    "check_estimators_pickle",
    "check_classifiers_classes",
    "check_n_features_in",
    "check_dataframe_column_names_consistency",
    "check_fit_idempotent",
)
N = 240


def rows() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    town = rng.choice(["Oslo", "Rome", None], N)
    return pd.DataFrame({"age": rng.integers(18, 90, N), "heat": rng.normal(size=N), "town": town})


def labels(X: pd.DataFrame) -> np.ndarray:
    return np.where(X["heat"] > 0, "warm", "cold")


def test_a_classifier_learns_predicts_and_is_pickled():
    X = rows()
    y = labels(X)
    model = moesaic.TableClassifier(random_state=0, max_epochs=20, config=QUICK).fit(X[:200], y[:200])
    shares_NC = model.predict_proba(X[200:])
    assert model.classes_.tolist() == ["cold", "warm"]
    assert shares_NC.shape == (40, 2)
    np.testing.assert_allclose(shares_NC.sum(1), 1.0, rtol=1e-12)
    assert model.score(X[200:], y[200:]) > 0.8
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict_proba(X[200:]), shares_NC)
    unseen = X[200:].assign(town="Bern", heat=np.nan)  # a town that training lacks, and no number
    assert np.isfinite(model.predict_proba(unseen)).all()


def test_trees_of_a_blend_are_kept_with_the_model(tmp_path):
    X = rows()
    model = moesaic.TableRegressor(random_state=0, max_epochs=1, config={"data.table.numbers": "bins"})
    y = 3 * X["heat"] + 0.01 * X["age"]
    model.fit(X, y)
    assert list(model.trees_) == ["best.0.trees.txt"]
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.predict(X), model.predict(X))
    (tmp_path / "best.ckpt").write_bytes(model.checkpoint_)
    for name, text in model.trees_.items():
        Path(tmp_path, name).write_text(text)
    served = apps.load(tmp_path / "best.ckpt").predict(X)
    np.testing.assert_allclose(served["value_y"], model.predict(X), rtol=1e-5)


def test_several_targets_categories_and_weights():
    X = rows()
    y = pd.DataFrame({"warm": X["heat"] > 0, "old": X["age"] > 50})
    model = moesaic.TableClassifier(max_epochs=1, categorical_features=["age"], config=QUICK)
    model.fit(X, y, sample_weight=np.ones(N))
    assert model.predict(X).shape == (N, 2)
    assert [own.shape for own in model.predict_proba(X)] == [(N, 2), (N, 2)]
    table = model.config_["data"]["init_args"]["table"]
    assert table["categorical"] == ["age", "town"]


def test_scikit_learn_s_tools_take_them():
    X = rows()
    y, model = labels(X), moesaic.TableClassifier(max_epochs=1, random_state=0, config=QUICK)
    assert clone(model).get_params() == model.get_params()
    assert len(cross_val_score(make_pipeline(FunctionTransformer(), model), X, y, cv=2)) == 2


def test_refused():
    X = rows()
    y = labels(X)
    refused("max_epochs=0", moesaic.TableClassifier(max_epochs=0).fit, X, y)
    refused("y has one class, 'cold', in every row", moesaic.TableClassifier().fit, X, np.full(N, "cold"))
    refused("y holds no numbers", moesaic.TableRegressor().fit, X, y)
    refused("categorical_features names 'twon'", moesaic.TableClassifier(categorical_features=["twon"]).fit, X, y)
    refused(
        "column 'heat' of X is infinite in row 3", moesaic.TableClassifier().fit, X.replace(X["heat"][3], np.inf), y
    )


@pytest.mark.parametrize("kind", [moesaic.TableClassifier, moesaic.TableRegressor])
def test_telling_checks_of_scikit_learn(kind):
    model = kind(max_epochs=1, random_state=0, config=QUICK)
    for estimator, check in estimator_checks_generator(model):
        if check.func.__name__ in TELLING:
            check(estimator)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [moesaic.TableClassifier, moesaic.TableRegressor])
def test_every_check_of_scikit_learn(kind):
    check_estimator(kind(random_state=0), expected_failed_checks=FAILED_CHECKS)


def test_integers_whose_order_says_nothing_are_ids():
    rng = np.random.default_rng(0)
    user, age = rng.integers(0, 400, 8000).astype(float), rng.integers(0, 60, 8000).astype(float)
    # Half of the label's variance is the user's, whose number says nothing: a tree cuts 400 values into 128.
    label = rng.normal(size=400)[user.astype(int)] + rng.normal(size=8000) + age / 100
    found = ids_among_numbers({"user": user, "age": age, "price": age + 0.5}, [label])
    assert list(found) == ["user"]
    assert found["user"].startswith("their order says little of the label: R2 ")
