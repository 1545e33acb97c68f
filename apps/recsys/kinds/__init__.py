"""Kinds of tasks: how many outputs a task has, where they start, and their loss and prediction.

The outputs z of a task are float32 (..., B, width), and its labels y (B,), as ``TableBatch`` has them. The losses of
numbers are in units of the training labels' standard deviation or mean, so that a task of prices and one of clicks
weigh alike.
"""

from __future__ import annotations

from apps.recsys.kinds.binary import Kind, Metrics
from apps.recsys.kinds.classes import Multiclass, Ordinal
from apps.recsys.kinds.numbers import Count, Quantile, Regression, Revenue, Tweedie, WeightedLogistic
from apps.recsys.kinds.outputs import Outputs, kind_of

__all__ = [
    "Count",
    "Kind",
    "Metrics",
    "Multiclass",
    "Ordinal",
    "Outputs",
    "Quantile",
    "Regression",
    "Revenue",
    "Tweedie",
    "WeightedLogistic",
    "kind_of",
]
