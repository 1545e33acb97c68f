"""The data that a run was trained on, for examples, where its files are on this machine: nothing is fetched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apps import registry
from apps.cli.configs import read_config
from apps.data.datasets import without_fetching
from apps.report.exhibit import Exhibit
from apps.train.checkpoint.loading import check_beside
from core.config.plain import arguments_from_plain

CONFIG = "config.yaml"


def with_examples(make: Any, model: Any, checkpoint: Path, most: int) -> tuple[Exhibit, str]:
    """Return the exhibit of a model with examples of its run's data, and a line on why it has none; else "".

    Args:
        make: the app's function ``exhibit(model, data, most)``.
        model: the model.
        checkpoint: its file, beside which the run's configuration may lie.
        most: number of examples at most; 0: the data are not read.
    """
    if not most:
        return make(model, None, 0), ""
    config = checkpoint.parent.parent / CONFIG
    if not config.is_file():
        return make(model, None, 0), f"no {CONFIG} lies beside {checkpoint}, and examples come from its data"
    try:
        with without_fetching():
            return make(model, data_of(config, model), most), ""
    except (ValueError, OSError, ImportError) as error:  # data that cannot be had are no reason against the page
        return make(model, None, 0), str(error)


def data_of(config: Path, model: Any) -> Any:
    """Return the data of a run, which read their files in the way of its model.

    Raises:
        ValueError: the configuration is damaged, names a class that is not the apps', or contradicts the model.
    """
    values = read_config(config)
    check_beside(values, config)
    section = values.get("data")
    section = {"class_path": section} if isinstance(section, str) else dict(section or {})
    name = section.get("class_path")
    if not isinstance(name, str) or registry.full_path(name) is None:
        raise ValueError(f"{config} names no data of the apps")
    kind = registry.resolve(name)
    given = {**arguments_from_plain(kind, section.get("init_args") or {}, "data")}
    given |= {name: getattr(model, name) for name in getattr(kind, "from_checkpoint", ()) if hasattr(model, name)}
    data = kind(**given)
    if model.encoding_state is not None and hasattr(data, "adopt"):
        data.adopt(model.encoding_state)
    return data
