"""A checkpoint's tensors with further rows, for values and domains that the data of its training lacked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apps.recsys.encoding.features import CategoricalFeature
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.tables.columns.embedding import SparseArch
from apps.recsys.tables.columns.tables import table_names
from apps.train.checkpoint.contents import unlike
from core.routing.multi_gate import DomainEmbedding


def widened(model: nn.Module, checkpoint: Mapping[str, Any], encoding_state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a checkpoint with the tensors of ``model``, whose data have further values.

    The row of a new value starts as row 0, by which the value was scored so far, and the vector of a new domain as the
    mean of the others. So no prediction changes before the first step.

    Args:
        model: the model to be trained.
        checkpoint: contents of a checkpoint of such a model.
        encoding_state: encoding of the model's data, which extends the checkpoint's.

    Raises:
        ValueError: a tensor other than the tables and the gates' domain vectors has a part for each domain, or a table
            has another width.
    """
    if "encoding" not in checkpoint:
        return checkpoint
    old, new = Encoding.from_state(checkpoint["encoding"]), Encoding.from_state(encoding_state)
    if old == new:  # what differs encodes no row: profiles, and a retriever's catalog
        return {**checkpoint, "encoding": encoding_state}
    state, fused = dict(checkpoint["state_dict"]), list(checkpoint.get("fused_embeddings", []))
    sparse = [(name, module) for name, module in model.named_modules() if isinstance(module, SparseArch)]
    rows_of = {f.name: f.num_rows for f in old.features.categorical}
    rows_of |= {f.name: f.num_rows for f in old.features.sequences}
    for member, (name, arch) in enumerate(sparse):
        before = [replace(f, num_rows=rows_of.get(f.name, f.num_rows)) for f in arch.features]
        _extend_tables(state, f"{name}.", arch, before)
        if fused and arch.config.kind == "fused":
            fused[member] = _extend_state(fused[member], arch.features, before)
    for name, module in model.named_modules():
        if isinstance(module, DomainEmbedding) and (vectors := state.get(f"{name}.weight")) is not None:
            added = len(module.weight) - len(vectors)
            state[f"{name}.weight"] = torch.cat((vectors, vectors.mean(0, keepdim=True).expand(added, -1)))
    _check_domains(state, model, old, new)
    more = {"fused_embeddings": fused} if fused else {}
    return {**checkpoint, "state_dict": state, "encoding": encoding_state, **more}


def _extend_tables(state: dict[str, Any], prefix: str, arch: SparseArch, before: Sequence[CategoricalFeature]) -> None:
    """Add the rows of new values to the tables of one network, in place; tables of another kind stay as they are."""
    if arch.config.kind == "joined":
        key, rows = f"{prefix}weight", [f.num_rows for f in before]
        if key in state and len(state[key]) == sum(rows):
            parts = zip(state[key].split(rows), arch.features, strict=True)
            state[key] = torch.cat([_with_rows(table, f.num_rows) for table, f in parts])
        return
    for feature, name, dim in zip(arch.features, table_names(arch.features), arch.dims, strict=True):
        key = f"{prefix}collection.embedding_bags.{name}.weight"
        if key not in state:
            continue
        width = state[key].shape[1] // arch.copies
        if arch.config.by_cardinality and width != dim:
            raise ValueError(
                f"column {feature.name!r} has {feature.num_rows} rows now, which would make its embedding {dim} wide "
                f"by embedding.by_cardinality, and it is {width} wide in the checkpoint: set embedding.dims"
            )
        state[key] = _with_rows(state[key], feature.num_rows)


def _with_rows(table: Tensor, num_rows: int) -> Tensor:
    return torch.cat((table, table[:1].expand(num_rows - len(table), -1)))


def _extend_state(
    state: Mapping[str, Mapping[str, Tensor]],
    features: Sequence[CategoricalFeature],
    before: Sequence[CategoricalFeature],
) -> dict[str, dict[str, Tensor]]:
    """Return the fused optimizer's state of one network, with zeros for the rows of new values."""
    extended = {table: dict(values) for table, values in state.items()}
    for name, own, old in zip(table_names(features), features, before, strict=True):
        values = extended[f"{name}.weight"]
        for key, value in values.items():
            if value.ndim:  # a number of each row, or one of each number
                values[key] = torch.cat((value, value.new_zeros(own.num_rows - old.num_rows, *value.shape[1:])))
    return extended


def _check_domains(state: Mapping[str, Any], model: nn.Module, old: Encoding, new: Encoding) -> None:
    """Reject new domains where a tensor has a part for each that cannot be added."""
    if old.domains is None or new.domains is None or len(old.domains) == len(new.domains):
        return
    if difference := unlike(state, model):
        first = new.domains.texts()[len(old.domains)]
        raise ValueError(
            f"column {new.domain!r} has the new domain {first!r}, and the model cannot be given a part for it: only "
            f"the gates' domain vectors grow ({difference})"
        )
