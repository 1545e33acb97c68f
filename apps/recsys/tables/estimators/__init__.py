"""Baselines of a multi-task recommender: one model of a library a task, nothing shared."""

from apps.recsys.tables.estimators.boosting import HistGradientBoosting, HistGradientBoostingUntuned
from apps.recsys.tables.estimators.libraries import CatBoost, LightGBM
from apps.recsys.tables.estimators.linear import LogisticRegression

__all__ = ["CatBoost", "LightGBM", "HistGradientBoosting", "HistGradientBoostingUntuned", "LogisticRegression"]
