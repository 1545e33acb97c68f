"""The apps' public classes by their short names. A class is imported when it is asked for, and not before."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any

MODELS = {
    "VisionClassifier": "apps.vision",
    "ImageGenerator": "apps.vision.generation",
    "MultiTaskRecommender": "apps.recsys.tables",
    "NextItemRecommender": "apps.recsys.sequence",
    "TwoTowerRetriever": "apps.recsys.retrieval",
    "Translator": "apps.nlp.translation",
    "TextToText": "apps.nlp.text_to_text",
    "LanguageModeler": "apps.nlp.language",
    "ImageTextRetriever": "apps.multimodal",
    "ImageCaptioner": "apps.multimodal.captions",
    "HubCausalLM": "apps.hub",
}
"""The room of each LightningModule: its module ``module`` has the class, ``task`` says how it is used, and
``comparison`` what it is compared with."""

OWN_EXPORT = "apps.train.publish.own_export"
"""The module of the task of a user's model that was made sparse."""

DATA = {
    "VisionData": "apps.vision.data",
    "GenerationData": "apps.vision.generation.data",
    "TableData": "apps.recsys.tables.data",
    "HistoryData": "apps.recsys.sequence.data",
    "RetrievalData": "apps.recsys.retrieval.data",
    "TranslationData": "apps.nlp.translation.data",
    "TextToTextData": "apps.nlp.text_to_text.data",
    "TextData": "apps.nlp.language.data",
    "ImageTextData": "apps.multimodal.data",
    "HubTextData": "apps.hub.data",
}
"""The module of each LightningDataModule."""

DATASETS = (
    *("apps.vision.datasets", "apps.recsys.datasets", "apps.nlp.text.datasets"),
    *("apps.nlp.text_to_text.datasets", "apps.multimodal.datasets"),
)
"""Modules that register the apps' datasets when they are imported."""

OF_FOLDER = ("HubCausalLM", "HubTextData")
"""The model and the data of a folder of transformers."""

OWN_DATA = ("ImageTextRetriever", "VisionClassifier", "MultiTaskRecommender", "Translator")
"""Models for data of a user's own, in the order in which they are asked.

A folder of images with a table of titles is also a folder of images, and holds a table.
"""

TRAINER = {
    "BestAndLast": "apps.train.checkpoint.checkpoints",
    "ExpertAveraging": "apps.train.optim.schedules",
    "ExpertParallelStrategy": "apps.train.sharded.expert_parallel",
    "GrowingTopK": "apps.train.optim.schedules",
    "RoutingDetail": "apps.report.live",
    "RoutingDoctor": "apps.train.watch.doctor",
    "SharedStart": "apps.train.optim.schedules",
    "TorchRecStrategy": "apps.recsys.tables.shard.strategy",
}
"""The module of each callback and strategy of the trainer."""

TEXTS = ("text", "query", "query_image")
"""Options of the data that are texts, and no YAML."""

DROPPED: dict[str, dict[str, tuple[str, ...]]] = {
    "VisionClassifier": {"report": ("capacity_factors", "sweep_images")},
    "TwoTowerRetriever": {"": ("top_k", "rank", "rank_task", "candidates", "index_file")},  # of RetrievalData now
}
"""Options of models that only earlier versions had, by the section that they are in."""

FORMER = {
    "apps.multimodal.drawn.PatchImages": "apps.multimodal.towers.random_init.PatchImages",
    "apps.multimodal.drawn.PieceTexts": "apps.multimodal.towers.random_init.PieceTexts",
    "apps.multimodal.loss.SigmoidLoss": "apps.multimodal.towers.loss.SigmoidLoss",
    "apps.multimodal.loss.SoftmaxLoss": "apps.multimodal.towers.loss.SoftmaxLoss",
    "apps.multimodal.pretrained.BertTexts": "apps.multimodal.towers.pretrained.BertTexts",
    "apps.multimodal.pretrained.ClipImages": "apps.multimodal.towers.pretrained.ClipImages",
    "apps.multimodal.pretrained.ClipTexts": "apps.multimodal.towers.pretrained.ClipTexts",
    "apps.multimodal.pretrained.ViTImages": "apps.multimodal.towers.pretrained.ViTImages",
    "apps.multimodal.towers.SingleTower": "apps.multimodal.towers.towers.SingleTower",
    "apps.multimodal.two_towers.TwoTowers": "apps.multimodal.towers.two_towers.TwoTowers",
    "apps.plan.inputs.Vocabulary": "apps.nlp.sizes.Vocabulary",
    "apps.recsys.tables.bottoms.SharedBottom": "apps.recsys.tables.columns.bottoms.SharedBottom",
    "apps.recsys.tables.bottoms.SingleTask": "apps.recsys.tables.columns.bottoms.SingleTask",
    "apps.recsys.tables.strategy.TorchRecStrategy": "TorchRecStrategy",
    "apps.train.checkpoints.BestAndLast": "BestAndLast",
    "apps.train.doctor.RoutingDoctor": "RoutingDoctor",
    "apps.train.expert_parallel.ExpertParallelStrategy": "ExpertParallelStrategy",
    "apps.train.schedules.ExpertAveraging": "ExpertAveraging",
    "apps.train.schedules.GrowingTopK": "GrowingTopK",
    "apps.train.schedules.SharedStart": "SharedStart",
    "core.Copy": "core.Identity",
}
"""Class paths in files of earlier versions, each with what the class is called today.

That is the short name of a public class, and the class path of a registered config.
"""

RENAMED = {
    "strategy": {
        "experts": "expert_parallel_size",
        "hidden": "expert_tensor_parallel_size",
        "shards": "fsdp_size",
        "rest": "non_experts",
        "static_exchange": "static_all_to_all",
    },
    "decode": {"num_best": "num_return_sequences", "beam_size": "num_beams", "min_length": "min_new_tokens"},
    "model": {"train_unseen": "mask_seen_items"},
    "negatives": {"moves_with": "item_features"},
    "model.optimizer": {"warmup": "warmup_steps"},
    "balance": {"load_balancing": "load_balancing_loss", "router_z": "router_z_loss"},
    "mixing_balance": {"load_balancing": "load_balancing_loss", "router_z": "router_z_loss"},
    "router": {"second": "second_expert_policy", "eval_second": "eval_second_expert_policy"},
}
"""Names of options in files of earlier versions, each with today's, by the end of their section's name."""


def full_path(name: str) -> str | None:
    """Return the class path of a public class, given by that, a former one or its short name; None: there is none."""
    module, _, short = FORMER.get(name, name).rpartition(".")
    home = {**{own: f"{room}.module" for own, room in MODELS.items()}, **DATA, **TRAINER}.get(short)
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
    """Return the name that users and files have for a class: a public class's short name, else the class path.

    Args:
        kind: the class, its path, a former path or its short name.
    """
    path = kind if isinstance(kind, str) else class_path(kind)
    path = full_path(path) or FORMER.get(path, path)
    return path.rpartition(".")[2] if full_path(path) else path


def today(path: str) -> str:
    """Return the class path of today in place of a former one. Other names are returned as they are."""
    return (full_path(path) or FORMER[path]) if path in FORMER else path


def renamed(value: Any, rename: Callable[[str], str]) -> Any:
    """Return nested plain values in which each ``class_path`` is what ``rename`` returns for it."""
    if isinstance(value, Mapping):
        return {
            key: rename(item) if key == "class_path" and isinstance(item, str) else renamed(item, rename)
            for key, item in value.items()
        }
    return [renamed(item, rename) for item in value] if isinstance(value, list) else value


def of_today(value: Any, section: str = "") -> Any:
    """Return nested plain values of an earlier version with the class paths and the names of options of today.

    Args:
        value: the plain values.
        section: dotted name of the section that they are, such as "model".
    """
    return _with_new_names(renamed(value, today), section)


def _with_new_names(value: Any, section: str) -> Any:
    if isinstance(value, list):
        return [_with_new_names(item, section) for item in value]
    if not isinstance(value, Mapping):
        return value
    around = [part for part in section.split(".") if part not in ("", "init_args")]
    old = {**RENAMED.get(".".join(around[-1:]), {}), **RENAMED.get(".".join(around[-2:]), {})}
    return {old.get(key, key): _with_new_names(item, f"{section}.{key}") for key, item in value.items()}


def short(class_path: str | None) -> str | None:
    """Return the name of the class, as a configuration may write it."""
    return class_path and class_path.rpartition(".")[2]


def differences(a: Any, b: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield where two plain values differ, as a dotted path below ``where``, with both values there."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if short(a.get("class_path")) != short(b.get("class_path")):
            yield where, short(a.get("class_path")), short(b.get("class_path"))
        for key in dict.fromkeys((*b, *a)):
            if key != "class_path":
                inside = where if key == "init_args" else f"{where}.{key}" if where else str(key)
                yield from differences(a.get(key), b.get(key), inside)
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}.{i}")
    elif a != b:
        yield where, a, b


def task_named(name: str) -> Any:
    """Import and return the task of a model, an ``apps.task.Task``, by the model's short name."""
    return importlib.import_module(f"{MODELS[name]}.task").TASK


def task_of(kind: type, what: str) -> Any:
    """Return the task of a model's class, or of the first class above it that an app has.

    Args:
        kind: the class.
        what: what it is asked for, for the message: "demo".

    Raises:
        ValueError: no app has one.
    """
    name = next((n for n in (b.__name__ for b in kind.__mro__) if n in MODELS), None)
    if name is None:
        raise ValueError(
            f"there is no {what} of {name_of(kind)}: there is of {', '.join(MODELS)}, and of models whose class is "
            "below one of these"
        )
    return task_named(name)


def comparison_of(kind: type) -> Any:
    """Return the ``apps.equal_cost.comparison.Comparison`` of a model's class, or of the first above it that has one.

    A model of an app has it in its room; one of the user's own as ``COMPARISON`` beside its class.

    Raises:
        ValueError: there is none.
    """
    for base in kind.__mro__:
        if base.__name__ in MODELS:
            return importlib.import_module(f"{MODELS[base.__name__]}.comparison").COMPARISON
        if (own := getattr(sys.modules.get(base.__module__), "COMPARISON", None)) is not None:
            return own
    raise ValueError(f"{name_of(kind)} has no COMPARISON beside its class, which says its baselines")


def exported_task(kind: type) -> Any:
    """Return the task of a public class, or of a user's own that was made sparse: it has an export.

    Raises:
        ValueError: the class is neither.
    """
    if any(base.__name__ == "SparsifiedModule" for base in kind.__mro__):
        return importlib.import_module(OWN_EXPORT).OwnTask
    if full_path(class_path(kind)) is None:
        raise ValueError(f"a {kind.__name__} has no export: moesaic export takes {', '.join(MODELS)}")
    return task_of(kind, "export")


def without_dropped(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's arguments, as a checkpoint or a configuration has them, without those of ``DROPPED``.

    Args:
        name: name of the model's class, with or without its module.
        arguments: plain values.
    """
    kept, short = dict(arguments), name.rpartition(".")[2]
    for section, names in DROPPED.get(short, {}).items():
        own = kept.get(section) if section else kept
        if isinstance(own, Mapping) and (old := [option for option in names if option in own]):
            rest = {option: value for option, value in own.items() if option not in old}
            kept = {**kept, section: rest} if section else rest
            dotted = (f"{section}.{option}" if section else option for option in old)
            _tell(f"options of {short} in earlier versions are ignored: {', '.join(dotted)}")
    return kept


@cache
def _tell(text: str) -> None:
    """Log a line once."""
    logging.getLogger(__name__).info(text)


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
