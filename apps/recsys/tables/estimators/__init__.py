"""Baselines of a multi-task recommender: one of scikit-learn's models a task, nothing shared."""

from apps.recsys.tables.estimators.boosting import HistGradientBoosting, HistGradientBoostingUntuned
from apps.recsys.tables.estimators.linear import LogisticRegression

__all__ = ["HistGradientBoosting", "HistGradientBoostingUntuned", "LogisticRegression"]
