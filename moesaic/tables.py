"""Models of tables with scikit-learn's methods, which train as ``moesaic init`` and ``moesaic fit`` do."""

from __future__ import annotations

import contextlib
import io
import random
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import DataConversionWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    _check_sample_weight,
    _check_y,
    check_consistent_length,
    check_is_fitted,
    validate_data,
)

from apps import load
from apps.base.checks import check_at_least
from apps.base.messages import excerpt
from apps.data.given import GivenData
from apps.recsys.own_labels import LEAST_ROWS
from apps.recsys.own_table import config_for
from apps.recsys.schema import nearest, plain_name
from apps.recsys.tables.blend.blend import ENDING
from apps.recsys.tables.rows.scoring import is_frame, pieces
from apps.train.checkpoint.contents import read_checkpoint
from core.convert.read.calls import evaluating
from moesaic.commands import fit

__all__ = ["FAILED_CHECKS", "TableClassifier", "TableRegressor"]

FAILED_CHECKS = {
    "check_sample_weight_equivalence_on_dense_data": (
        "a row of weight 2 is not the same training as two rows: batches are drawn from the rows"
    ),
    "check_methods_subset_invariance": (
        "outputs are float32: on some processors the last digit of a row depends on how many rows are scored with it"
    ),
}
"""The checks of scikit-learn's ``check_estimator`` that both estimators fail, or may fail, and why."""

_FOR_TRAINING = ("optimizer_states", "lr_schedulers", "callbacks", "loops")
_BATCH_SIZE = 4096


class _TableModel(BaseEstimator):
    """The base of both estimators, without the kind of label."""

    def __init__(
        self,
        *,
        categorical_features: Sequence[str] | Sequence[int] | Sequence[bool] | None = None,
        max_epochs: int | None = None,
        validation_fraction: float = 0.15,
        config: Mapping[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        """Keep the parameters; ``fit`` checks them.

        Args:
            categorical_features: columns that are categories, whatever they look like: names, places, or a mask.
                Columns of pandas' type "category" are categories in any case.
            max_epochs: passes over the training rows at most; None: as many as ``moesaic init`` would write. Training
                ends early when the loss of the validation rows rises.
            validation_fraction: share of the rows that choose the best epoch and are not trained on. If they are fewer
                than 20, all rows train, and choose.
            config: values by dotted option over the configuration, as in ``moesaic.fit``, such as
                ``{"model.optimizer.lr": 1e-3}``.
            random_state: seed.
        """
        self.categorical_features = categorical_features
        self.max_epochs = max_epochs
        self.validation_fraction = validation_fraction
        self.config = config
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Train on the rows of a table.

        Args:
            X: columns, (N, D): a pandas DataFrame or an array. None and NaN are missing values.
            y: labels, (N,), or (N, t): t tasks of one model.
            sample_weight: weights of the rows in the loss, (N,); None: 1.

        Returns:
            The estimator.

        Raises:
            ValueError: an argument or a value that cannot be used, or nothing to learn.
        """
        check_at_least(1, max_epochs=self.max_epochs)
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be in [0, 1)")
        columns = self._columns(X, reset=True)
        labels = self._labels(self._targets(y, len(columns[0])))
        if sample_weight is not None:
            sample_weight = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
        own = getattr(self, "feature_names_in_", [f"x{place}" for place in range(len(columns))])
        names = _distinct([*own, *labels, "sample_weight"])
        self._names, targets, weight = names[: len(own)], names[len(own) : -1], names[-1]
        self._tasks = targets
        (table,) = pieces(
            dict(zip(self._names, columns, strict=True)), dict.fromkeys(self._names, ""), (), len(columns[0])
        )
        for target, label_N in zip(targets, labels.values(), strict=True):
            table = table.append_column(target, pa.array(label_N))
        if sample_weight is not None:
            table = table.append_column(weight, pa.array(sample_weight))
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        with tempfile.TemporaryDirectory(prefix="moesaic-") as folder, _undisturbed():
            file = Path(folder, "table.parquet")
            pq.write_table(table, file)
            exclude = () if sample_weight is None else (weight,)
            given = GivenData(
                (file,), targets[0], Path(folder, "made"), self._kind(labels), exclude, in_place=True,
                more_targets=tuple(targets[1:]), categorical=self._categories(X), is_chosen=True,
            )  # fmt: skip
            made = config_for(given)
            assert made is not None
            data = made.config["data"]["init_args"]
            split = {**data["table"]["split"], "val": self.validation_fraction, "test": 0.0, "seed": seed}
            data["table"] |= {"split": split, **({"weight": weight} if exclude else {})}
            if round(self.validation_fraction * len(table)) < LEAST_ROWS:
                data["val_file"] = data["train_file"]
                split |= {"val": 0.0}
            trainer: dict[str, Any] = {"logger": False, "enable_progress_bar": False}
            trainer |= {} if self.max_epochs is None else {"max_epochs": self.max_epochs}
            self.config_ = {**made.config, "seed_everything": seed, "trainer": {**made.config["trainer"], **trainer}}
            kept = {"data.cache_dir": str(Path(folder, "cache")), **(self.config or {})}
            run = fit(self.config_, kept, run_dir=Path(folder, "run")).run_dir
            checkpoint = read_checkpoint(run / "checkpoints" / "best.ckpt")
            content = io.BytesIO()
            torch.save({name: value for name, value in checkpoint.items() if name not in _FOR_TRAINING}, content)
            self.trees_ = {path.name: path.read_text() for path in run.glob(f"checkpoints/best.*{ENDING}")}
        self.checkpoint_ = content.getvalue()
        self._model = _loaded(self.checkpoint_, self.trees_)
        return self

    # ---- for subclasses

    def _labels(self, targets: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return the labels of each task as they are written to a table."""
        raise NotImplementedError

    def _kind(self, labels: Mapping[str, Any]) -> Any:
        """Return the kind of all labels; None: as their values are."""
        return None

    # ---- what scikit-learn calls

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = tags.input_tags.string = tags.input_tags.categorical = True
        tags.target_tags.multi_output = True
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "checkpoint_" in state:
            self._model = _loaded(state["checkpoint_"], state["trees_"])

    # ---- values

    def _outputs(self, X: Any) -> list[tuple[Any, torch.Tensor]]:
        """Return each task's kind and its outputs for the rows, (N, width)."""
        columns = dict(zip(self._names, self._columns(X, reset=False), strict=True))
        task = self._model.task
        roles = task.encoding.roles
        tables = list(pieces({name: columns[name] for name in roles}, roles, task.encoding.numbers, 1 << 16))
        with torch.inference_mode(), evaluating(self._model):
            z_NZ = task.logits(tables, _BATCH_SIZE)
        outputs = self._model.outputs
        parts = dict(zip(task.tasks, zip(outputs.kinds, outputs.split(z_NZ), strict=True), strict=True))
        return [parts[name] for name in self._tasks]

    def _columns(self, X: Any, reset: bool) -> list[Any]:
        """Return the columns of a table, checked; ``reset``: they are those of the training."""
        least = 2 if reset else 1
        if not is_frame(X):
            X = validate_data(self, X, reset=reset, dtype=None, ensure_all_finite="allow-nan", ensure_min_samples=least)
            return list(X.T)
        validate_data(self, X, reset=reset, skip_check_array=True)
        if len(X) < least or not X.shape[1]:
            raise ValueError(f"X has {len(X)} rows and {X.shape[1]} columns: {least} and 1 are needed")
        columns = [X.iloc[:, place] for place in range(X.shape[1])]
        for name, column in zip(X.columns, columns, strict=True):
            if column.dtype.kind == "f" and (bad := np.isinf(column.to_numpy(float, na_value=np.nan))).any():
                raise ValueError(f"column {name!r} of X is infinite in row {int(bad.argmax())}: numbers must be finite")
        return columns

    def _targets(self, y: Any, num_rows: int) -> dict[str, np.ndarray]:
        """Return the label of each task by name, checked."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        names = [str(name) for name in y.columns] if is_frame(y) else []
        if hasattr(y, "name") or is_frame(y):
            y = y.to_numpy()
        y = _check_y(y, multi_output=True, estimator=self)
        if not isinstance(y, np.ndarray):
            raise ValueError("y is sparse: give an array")
        check_consistent_length(range(num_rows), y)
        if y.ndim == 2 and y.shape[1] == 1:
            if not names:
                said = "A column-vector y was passed when a 1d array was expected: it is read as (n_samples,)"
                warnings.warn(said, DataConversionWarning, stacklevel=3)
            y = y[:, 0]
        self._is_single = y.ndim == 1
        by_task = [y] if self._is_single else list(y.T)
        names = names or (["y"] if self._is_single else [f"y{place}" for place in range(len(by_task))])
        for name, label_N in zip(names, by_task, strict=True):
            if label_N.dtype.kind == "O" and (bad := np.array([own is None for own in label_N])).any():
                raise ValueError(f"{name} has no value in row {int(bad.argmax())}: leave rows without a label out")
        return dict(zip(names, by_task, strict=True))

    def _categories(self, X: Any) -> tuple[str, ...]:
        """Return the table's names of ``categorical_features``, and of columns of pandas' type "category"."""
        typed = [str(kind) == "category" for kind in X.dtypes] if is_frame(X) else []
        named = [own for own, is_one in zip(self._names, typed, strict=False) if is_one]
        given = np.asarray([] if self.categorical_features is None else self.categorical_features)
        if given.dtype.kind == "b":
            if given.shape != (len(self._names),):
                raise ValueError(
                    f"categorical_features is a mask of {given.size}, and X has {len(self._names)} columns"
                )
            given = np.flatnonzero(given)
        own_names = [str(name) for name in getattr(self, "feature_names_in_", ())]
        for one in given.tolist():
            if isinstance(one, str) and one not in own_names:
                raise ValueError(f"categorical_features names {one!r}, no column of X{nearest(one, own_names)}")
            place = own_names.index(one) if isinstance(one, str) else one
            if not (isinstance(place, int) and 0 <= place < len(self._names)):
                raise ValueError(f"categorical_features={excerpt(one)} is no column of X, which has {len(self._names)}")
            named.append(self._names[place])
        return tuple(dict.fromkeys(named))


class TableClassifier(ClassifierMixin, _TableModel):
    """A classifier of a table's rows with scikit-learn's methods, trained as ``moesaic init`` and ``fit`` do.

    Attributes:
        checkpoint_, trees_: the trained model as bytes of a checkpoint, and the files of the blend's trees beside it by
            name. In a folder, ``apps.load`` and ``moesaic serve`` take them. A pickle holds these bytes and texts, and
            reads them without running code of theirs.
        config_: the configuration that was trained.
        n_features_in_, feature_names_in_: number of the columns, and their names if they are texts.
        classes_: the classes, sorted; of several tasks a list of them.
    """

    def predict(self, X: Any) -> np.ndarray:
        """Return the likeliest class of each row, (N,), or of each row and task, (N, t)."""
        check_is_fitted(self)
        shares: Any = self.predict_proba(X)
        classes: Any = self.classes_
        if self._is_single:
            shares, classes = [shares], [classes]
        found = [own[share.argmax(-1)] for own, share in zip(classes, shares, strict=True)]
        return found[0] if self._is_single else np.stack(found, axis=-1)

    def predict_proba(self, X: Any) -> Any:
        """Return the probability of each class of ``classes_``, (N, C); of several tasks a list of these."""
        check_is_fitted(self)
        classes = [self.classes_] if self._is_single else self.classes_
        found = [_shares(*own, len(names)) for own, names in zip(self._outputs(X), classes, strict=True)]
        return found[0] if self._is_single else found

    def _labels(self, targets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        classes, labels = [], {}
        for name, label_N in targets.items():
            check_classification_targets(label_N)
            own, place_N = np.unique(label_N, return_inverse=True)
            if len(own) < 2:
                raise ValueError(f"{name} has one class, {own.tolist()[0]!r}, in every row: there is nothing to learn")
            classes.append(own)
            labels[name] = place_N if len(own) == 2 else place_N.astype(str)  # integers would be levels in order
        self.classes_ = classes[0] if self._is_single else classes
        return labels


class TableRegressor(RegressorMixin, _TableModel):
    """A regressor of a table's rows with scikit-learn's methods, trained as ``moesaic init`` and ``fit`` do.

    The loss follows from the labels: integers of up to 20 values are levels in order, counts have Poisson's.

    Attributes:
        checkpoint_, trees_: the trained model as bytes of a checkpoint, and the files of the blend's trees beside it by
            name. In a folder, ``apps.load`` and ``moesaic serve`` take them. A pickle holds these bytes and texts, and
            reads them without running code of theirs.
        config_: the configuration that was trained.
        n_features_in_, feature_names_in_: number of the columns, and their names if they are texts.
    """

    def predict(self, X: Any) -> np.ndarray:
        """Return the expected label of each row, float64 (N,), or of each row and task, (N, t)."""
        check_is_fitted(self)
        found = [kind.value(z).double().numpy() for kind, z in self._outputs(X)]
        return found[0] if self._is_single else np.stack(found, axis=-1)

    def _labels(self, targets: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        labels = {}
        for name, label_N in targets.items():
            try:
                label_N = label_N.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{name} holds no numbers: {error}") from None
            if len(np.unique(label_N)) < 2:
                raise ValueError(f"{name} is {label_N[0]:g} in every row: there is nothing to learn")
            is_whole = (np.floor(label_N) == label_N).all() and np.abs(label_N).max() < 2**53
            labels[name] = label_N.astype(np.int64) if is_whole else label_N  # 5 and 5.0 are one level
        return labels

    def _kind(self, labels: Mapping[str, np.ndarray]) -> Any:
        is_few = any(len(own) < 2 * LEAST_ROWS or len(np.unique(own)) == 2 for own in labels.values())
        return "regression" if is_few else None


def _shares(kind: Any, z_Nw: torch.Tensor, num_classes: int) -> np.ndarray:
    """Return the probability of each class, float64 (N, C); 0 for a class that no training row had."""
    z_Nw = z_Nw.double()
    if kind.width == 1:
        yes_N = z_Nw[:, 0].sigmoid()
        return torch.stack((1 - yes_N, yes_N), dim=-1).numpy()
    shares = np.zeros((len(z_Nw), num_classes))
    shares[:, [int(place) for place in kind.target.classes]] = z_Nw.softmax(-1).numpy()
    return shares


def _distinct(names: Iterable[Any]) -> list[str]:
    """Return names of columns that a table takes and that all differ."""
    found: dict[str, None] = {}
    for name in names:
        name = plain_name(str(name)) or "column"
        while name in found:
            name += "_"
        found[name] = None
    return list(found)


def _loaded(checkpoint: bytes, trees: Mapping[str, str]) -> Any:
    """Return the model of a checkpoint's bytes and of the files of trees beside it, by their names."""
    with tempfile.TemporaryDirectory(prefix="moesaic-") as folder:
        file = Path(folder, "best.ckpt")
        file.write_bytes(checkpoint)
        for name, text in trees.items():
            Path(folder, Path(name).name).write_text(text)
        return load(file)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Print nothing, warn of nothing, and leave the generators of random numbers as they are."""
    plain, numbers = random.getstate(), np.random.get_state()
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(action="ignore"),
            torch.random.fork_rng(),
        ):
            yield
    finally:
        random.setstate(plain)
        np.random.set_state(numbers)
