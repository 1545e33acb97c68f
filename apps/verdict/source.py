"""The configuration of the data that a verdict is asked for."""

from __future__ import annotations

from pathlib import Path

import yaml

from apps import registry
from apps.base.files import replacing
from apps.data.given import GivenData
from apps.verdict.options import Options


def configuration(options: Options) -> tuple[Path, tuple[str, ...]]:
    """Return the configuration's file and sentences on how the data were read.

    A configuration is taken as it is. For other data the apps are asked in turn, and that of the first one whose kind
    of data they are is written to ``config.yaml`` in the output folder.

    Raises:
        ValueError: data that no app knows, or that one knows and refuses.
    """
    if options.is_config:
        return options.data[0], ()
    columns = (options.exclude, options.time, options.user)
    given = GivenData(options.data, options.target, options.folder / "data", options.kind, *columns)
    for name in registry.OWN_DATA:
        made = registry.task_named(name).own_data(given)
        if made is not None:
            path = options.folder / "config.yaml"
            with replacing(path) as file:
                yaml.safe_dump(dict(made.config), file, sort_keys=False)
            return path, tuple(made.notes)
    if len(options.data) == 2:
        raise ValueError(f"{options.data[0]} and {options.data[1]} are not two files of text")
    what = "is a folder with neither images nor tables" if options.data[0].is_dir() else "is no table (.csv, .parquet)"
    raise ValueError(
        f"{options.data[0]} {what}: give a folder of images, one with a table of their titles, a table with "
        "--target, two text files, or a configuration"
    )
