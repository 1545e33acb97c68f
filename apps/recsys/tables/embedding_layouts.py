"""State dicts of embeddings in one joined weight, and the same as a tensor a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apps.recsys.encoding.features import CategoricalFeature
from apps.recsys.tables.embedding import table_names


def joined_to_collection(
    state: Mapping[str, Tensor], features: Sequence[CategoricalFeature], prefix: str = ""
) -> dict[str, Tensor]:
    """Return a state dict with a table for each column ("collection" and "fused") made of one with a joined table.

    Args:
        state: state of a module that holds a ``SparseArch`` under ``prefix``, such as "model.sparse.".
        features: columns of the ``SparseArch``.
        prefix: dotted path, with the last dot.

    Raises:
        ValueError: there is no joined weight, or one of another number of rows.
    """
    changed = dict(state)
    weight = changed.pop(f"{prefix}weight", None)
    rows = [f.num_rows for f in features]
    if weight is None or len(weight) != sum(rows):
        given = "none" if weight is None else f"one of {len(weight)} rows"
        raise ValueError(f"expected a joined weight of {sum(rows)} rows at {prefix}weight, found {given}")
    for name, part in zip(table_names(features), weight.split(rows), strict=True):
        changed[f"{prefix}collection.embedding_bags.{name}.weight"] = part.clone()
    return changed


def collection_to_joined(
    state: Mapping[str, Tensor], features: Sequence[CategoricalFeature], prefix: str = ""
) -> dict[str, Tensor]:
    """Undo ``joined_to_collection``.

    Raises:
        ValueError: a table is missing, or has another width or number of rows.
    """
    changed = dict(state)
    parts: list[Tensor] = []
    for feature, name in zip(features, table_names(features), strict=True):
        key = f"{prefix}collection.embedding_bags.{name}.weight"
        part = changed.pop(key, None)
        if part is None or len(part) != feature.num_rows:
            given = "nothing" if part is None else f"{len(part)} rows"
            raise ValueError(f"expected the {feature.num_rows} rows of column {feature.name!r} at {key}, found {given}")
        if parts and part.shape[1] != parts[0].shape[1]:
            raise ValueError(
                f"column {feature.name!r} is {part.shape[1]} wide and those before it {parts[0].shape[1]}: "
                "a joined weight has one width"
            )
        parts.append(part)
    changed[f"{prefix}weight"] = torch.cat(parts)
    return changed
