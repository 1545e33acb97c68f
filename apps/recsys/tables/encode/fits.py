"""Whether a table's description fits the data that a model was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import TableConfig


def differences(config: TableConfig, given: Encoding, parts: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Yield the differences of a description of columns and tasks from ``given``.

    Args:
        config: the description, with the parts of timestamps and texts as columns.
        given: the encoding.
        parts: the columns that were split into parts, by role.
    """
    features = given.features
    for role, columns in parts.items():
        if tuple(getattr(given, role)) != columns:
            yield f"table.{role} is {list(getattr(given, role))} there and {list(columns)} here"
    there = {f.name: "multi_valued" if f.multi_valued else "categorical" for f in features.categorical}
    there |= {f.name: "continuous" for f in features.continuous}
    there |= {f.name: "vectors" for f in features.vectors} | {f.name: "sequences" for f in features.sequences}
    here = {column: config.roles[column] for column in config.features}
    for column, role in there.items():
        if column not in here:
            yield f"column {column!r}, which the model reads, is missing: table.{role} must name it"
        elif here[column] != role:
            yield f"column {column!r} is {role} there and {here[column]} here"
    for column, role in here.items():
        if column not in there:
            yield f"column {column!r} ({role}) is none that the model reads: leave it out"
    for first, second in zip(there, here, strict=False):
        if first != second:
            yield f"column {second!r} stands where {first!r} does there: name the columns in the same order"
    for feature in features.categorical:
        sizes = {name: getattr(config, name).get(feature.name) for name in ("hash_rows", "num_rows")}
        kind = None if feature.name in given.vocabularies else "hash_rows" if feature.hashed else "num_rows"
        for name, size in sizes.items():
            expected = feature.num_rows if name == kind else None
            if size != expected:
                yield f"{name} of column {feature.name!r} is {expected} there and {size} here"
    for sequence in features.sequences:
        own = config.sequences[sequence.name]
        for name in ("items", "length"):
            if getattr(sequence, name) != getattr(own, name):
                is_there, is_here = getattr(sequence, name), getattr(own, name)
                yield f"sequences[{sequence.name!r}].{name} is {is_there!r} there and {is_here!r} here"
    if list(features.tasks) != list(config.tasks):
        yield f"the tasks are {', '.join(features.tasks)} there and {', '.join(config.tasks)} here"
    for name, target in zip(features.tasks, features.target_of_task, strict=True):
        task = config.tasks[name]
        for what, a, b in (("kind", target.kind, task.kind), ("loss", target.loss, task.loss or "squared")):
            if a != b:
                yield f"{what} of task {name!r} is {a!r} there and {b!r} here"
    if config.numbers in ("bins", "linear") and config.numbers != features.numbers:
        yield f"table.numbers is {features.numbers!r} there and {config.numbers!r} here"
    if given.domain != config.domain:
        yield f"table.domain is {given.domain!r} there and {config.domain!r} here"
