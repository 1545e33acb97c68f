"""What a plan asks of a model's task: arguments of the constructor, and a forward without values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from apps import registry
from apps.cli import UsageError
from apps.plan.options import Options
from apps.task import Sizes, Trial, ids_on_meta, vocabulary_loss

COLUMNS = ("tables", "numbers", "histories", "item_tables", "item_numbers")
"""Options that describe columns, each of some models' data."""


def data_arguments(kind: str, given: Mapping[str, Any], options: Options) -> dict[str, Any]:
    """Return the arguments of a model's constructor that its data would tell, from configuration and options.

    Args:
        kind: short name of the model's class.
        given: arguments that the configuration has.
        options: of the command.

    Raises:
        Missing: something is missing; the message names the option.
        UsageError: an option describes columns that such a model does not have.
    """
    task = registry.task_named(kind)
    for name in COLUMNS:
        if getattr(options, name) and name not in task.columns:
            kinds = [model for model in registry.MODELS if name in registry.task_named(model).columns]
            raise UsageError(f"--{name} describes columns of {' and '.join(kinds)}, not of {kind}")
    if hasattr(task, "data_arguments"):
        return task.data_arguments(given, sizes_of(options))
    from apps.nlp.sizes import text_arguments  # a language model has no task yet

    return text_arguments(given, sizes_of(options))


def sizes_of(options: Options) -> Sizes:
    """Return what a command says of data."""
    columns = {name: getattr(options, name) for name in (*COLUMNS, "tasks", "domains", "pooling")}
    return Sizes(options.config.get("data"), options.batch, options.tokens, options.length, columns)


def trial(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    """Return a forward of a model that is on the meta device.

    Args:
        module: of the suite.
        options: of the command.
        dtype: of the products.

    Raises:
        Missing: the batch's size is missing.
    """
    task, sizes = registry.task_of(type(module), "plan"), sizes_of(options)
    if hasattr(task, "trial"):
        return task.trial(module, sizes, dtype)
    return _language(module, sizes, dtype)


def _language(module: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
    length = sizes.length or sizes.option("block_size") or 128
    batch = sizes.examples(length)
    loss = vocabulary_loss(batch * length, module.model.output_weight, dtype)
    return Trial(lambda: module.model.hidden(ids_on_meta(batch, length)), batch, batch * length, loss)
