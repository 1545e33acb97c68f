"""The apps' public classes by their short names. A class is imported when it is asked for, and not before."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping
from typing import Any

MODULES = {
    "VisionClassifier": "apps.vision.module",
    "MultiTaskRecommender": "apps.recsys.tables.module",
    "NextItemRecommender": "apps.recsys.sequence.module",
    "TwoTowerRetriever": "apps.recsys.retrieval.module",
    "Translator": "apps.nlp.translation.module",
    "LanguageModeler": "apps.nlp.language.module",
    "ImageTextRetriever": "apps.multimodal.module",
    "ImageCaptioner": "apps.multimodal.captions.module",
}
"""The module of each LightningModule."""

DATA = {
    "VisionData": "apps.vision.data",
    "TableData": "apps.recsys.tables.data",
    "HistoryData": "apps.recsys.sequence.data",
    "RetrievalData": "apps.recsys.retrieval.data",
    "TranslationData": "apps.nlp.translation.data",
    "TextData": "apps.nlp.language.data",
    "ImageTextData": "apps.multimodal.data",
}
"""The module of each LightningDataModule."""

DATASETS = ("apps.vision.datasets", "apps.recsys.datasets", "apps.nlp.text.datasets", "apps.multimodal.datasets")
"""Modules that register the apps' datasets when they are imported."""

OWN_DATA = ("apps.multimodal.own_data", "apps.vision.own_data", "apps.recsys.own_data", "apps.nlp.own_data")
"""Modules with a function ``config_for(given)``, which makes a configuration of data that are of the app's kind.

They are asked in this order: a folder of images with a table of titles is also a folder of images, and holds a table.
"""

EXHIBITS = {
    "VisionClassifier": "apps.vision.exhibit",
    "MultiTaskRecommender": "apps.recsys.tables.exhibit",
    "NextItemRecommender": "apps.recsys.sequence.exhibit",
    "TwoTowerRetriever": "apps.recsys.retrieval.exhibit",
    "ImageTextRetriever": "apps.multimodal.exhibit",
    "Translator": "apps.nlp.translation.exhibit",
    "LanguageModeler": "apps.nlp.language.exhibit",
    "ImageCaptioner": "apps.multimodal.captions.exhibit",
}
"""The module of the function ``exhibit(model, data, most)``, which says what the demo page of a model has."""

EXPORTS = {
    "VisionClassifier": "apps.vision.export",
    "MultiTaskRecommender": "apps.recsys.tables.export",
    "NextItemRecommender": "apps.recsys.sequence.export",
    "TwoTowerRetriever": "apps.recsys.retrieval.export",
    "ImageTextRetriever": "apps.multimodal.export",
    "Translator": "apps.nlp.translation.export",
    "LanguageModeler": "apps.nlp.language.export",
    "ImageCaptioner": "apps.multimodal.captions.export",
}
"""The module of ``export``, ``attach`` and ``encoding_state`` of each LightningModule; see ``apps.train.exporting``."""

SERVICES = {
    "VisionClassifier": "apps.vision.service",
    "MultiTaskRecommender": "apps.recsys.tables.service",
    "NextItemRecommender": "apps.recsys.sequence.service",
    "TwoTowerRetriever": "apps.recsys.retrieval.service",
    "ImageTextRetriever": "apps.multimodal.service",
    "Translator": "apps.nlp.translation.service",
    "LanguageModeler": "apps.nlp.language.service",
    "ImageCaptioner": "apps.multimodal.captions.service",
}
"""The module of the function ``service(model)`` of each LightningModule: its inputs and answers, for ``serve``."""

TRAINER = {
    "BestAndLast": "apps.train.checkpoints",
    "ExpertAveraging": "apps.train.schedules",
    "ExpertParallelStrategy": "apps.train.expert_parallel",
    "GrowingTopK": "apps.train.schedules",
    "RoutingDetail": "apps.report.live",
    "RoutingDoctor": "apps.train.doctor",
    "SharedStart": "apps.train.schedules",
    "TorchRecStrategy": "apps.recsys.tables.strategy",
}
"""The module of each callback and strategy of the trainer."""


def full_path(name: str) -> str | None:
    """Return the class path of a public class, given by that or by its short name; None where there is none."""
    module, _, short = name.rpartition(".")
    home = {**MODULES, **DATA, **TRAINER}.get(short)
    return f"{home}.{short}" if home is not None and module in ("", home) else None


def resolve(name: str) -> Any:
    """Import and return the class that ``full_path`` finds.

    Raises:
        KeyError: there is none.
    """
    path = full_path(name)
    if path is None:
        raise KeyError(name)
    module, _, short = path.rpartition(".")
    return getattr(importlib.import_module(module), short)


def class_path(kind: type) -> str:
    """Return the module of a class and its name in it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def name_of(kind: type | str) -> str:
    """Return a class, given by itself or its path, as users write it: a public one by its short name, else the path."""
    path = kind if isinstance(kind, str) else class_path(kind)
    return path.rpartition(".")[2] if full_path(path) == path else path


def app_function(kind: type, homes: Mapping[str, str], name: str, what: str) -> Any:
    """Import and return the function ``name`` of the app that a model's class, or one above it, is of.

    Args:
        kind: the class.
        homes: the modules of such functions, by short names: ``EXHIBITS`` or ``SERVICES``.
        name: of the function.
        what: what it makes, for the message: "demo".

    Raises:
        ValueError: no app has one for such a model.
    """
    kinds = [base.__name__ for base in kind.__mro__ if full_path(base.__name__) is not None]
    known = next((base for base in kinds if base in homes), None)
    if known is None:
        raise ValueError(
            f"there is no {what} of {name_of(kind)}: there is of {', '.join(homes)}, and of models whose class is "
            "below one of these"
        )
    return getattr(importlib.import_module(homes[known]), name)


def subclasses(kind: type[Any]) -> list[type[Any]]:
    """Return ``kind`` and the classes below it that have been imported."""
    return [kind, *(sub for direct in kind.__subclasses__() for sub in subclasses(direct))]


def import_datasets() -> None:
    """Import the modules that register datasets. One that lacks an optional library is named in a warning."""
    for module in DATASETS:
        try:
            importlib.import_module(module)
        except ImportError as error:  # an optional library of one app must not hide the data of the others
            logging.getLogger(__name__).warning("the datasets of %s are not listed: %s", module, error)
