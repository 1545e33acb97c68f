"""Inputs and outputs of a model, described once for every use but training.

``moesaic serve``, ``demo``, ``export`` and ``plan`` know a model only by its ``Task``. A room with a model has a module
``task`` with a class ``TASK`` below ``Task``; ``apps.registry`` lists the rooms.
"""

from __future__ import annotations

from apps.report.routed import MOST_EXPERTS, gates_by_layer, patches_by_layer, words_by_layer
from apps.task.inputs import Input, choice, number, text
from apps.task.outputs import Output
from apps.task.service import Service
from apps.task.sizes import Loss, Missing, Sizes, Trial, ids_on_meta, vocabulary_loss
from apps.task.task import Task

__all__ = [
    "MOST_EXPERTS",
    "Input",
    "Loss",
    "Missing",
    "Output",
    "Service",
    "Sizes",
    "Task",
    "Trial",
    "choice",
    "gates_by_layer",
    "ids_on_meta",
    "number",
    "patches_by_layer",
    "text",
    "vocabulary_loss",
    "words_by_layer",
]
