"""What a plan asks of a model's task: arguments of the constructor, and a forward without values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from apps import registry
from apps.cli.errors import UsageError
from apps.plan.options import Options
from apps.task import Sizes, Trial

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
    return task.data_arguments(given, sizes_of(options))


def sizes_of(options: Options) -> Sizes:
    """Return what a command says of data."""
    columns = {name: getattr(options, name) for name in (*COLUMNS, "tasks", "domains", "pooling")}
    return Sizes(options.config.get("data"), options.batch, options.tokens_per_gpu, options.length, columns)


def trial(module: Any, options: Options, dtype: torch.dtype) -> Trial:
    """Return a forward of a model that is on the meta device.

    Args:
        module: of the suite.
        options: of the command.
        dtype: of the products.

    Raises:
        Missing: the batch's size is missing.
    """
    return registry.task_of(type(module), "plan").trial(module, sizes_of(options), dtype)
