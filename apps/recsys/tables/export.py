"""The graph of a recommender of tables, and what of its encoding JSON holds: what ``moesaic export`` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apps.recsys.encoding.features import Features
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.kinds import Outputs
from apps.recsys.tables.model import MultiTaskModel
from apps.recsys.tables.rows.plain_columns import batch_of
from core.config.plain import from_plain

if TYPE_CHECKING:
    from apps.recsys.tables.module import MultiTaskRecommender


class PlainTables(nn.Module):
    """A recommender from plain tensors to its tasks' outputs, by the weights of its networks.

    Args:
        members: the networks, one if there is no ensemble.
        outputs: the tasks' outputs.
        features: the columns.
        names: names of the inputs, in the order of the arguments of ``forward``.
    """

    def __init__(
        self, members: list[MultiTaskModel], outputs: Outputs, features: Features, names: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.outputs, self.names, self.features = outputs, names, features

    def forward(self, *tensors: Tensor) -> Tensor:
        """Return the outputs (B, Z), one logit per task if all are binary."""
        batch = batch_of(dict(zip(self.names, tensors, strict=True)), self.features)
        z = [member(batch, plain=True) for member in self.members]
        outputs = z[0] if len(z) == 1 else torch.stack(z)
        return (outputs if outputs.ndim == 2 else self.outputs.mean(outputs)).float()


# ---- the encoding as JSON


def described_columns(encoding: Encoding) -> dict[str, Any]:
    """Return how a row's values become the inputs of a graph, in their order, as plain values.

    The value number i of ``values`` has the row i + 1, and a value that is not in it the row 0. Without ``values`` a
    column's values are row numbers, or hashed. ``length`` of a list is the number of its last values that are read,
    without those that have no row; None: all are read.
    """
    features = encoding.features

    def column(name: str, feature: Any, items: str) -> dict[str, Any]:
        vocabulary = encoding.vocabularies.get(items)
        values = None if vocabulary is None else list(vocabulary.texts())
        return {"column": name, "num_rows": feature.num_rows, "hashed": feature.hashed, "values": values}

    single = [column(f.name, f, f.name) for f in features.single]
    lists = [{**column(f.name, f, f.name), "length": None} for f in features.categorical if f.multi_valued]
    lists += [{**column(s.name, s, s.items or s.name), "length": s.length} for s in features.sequences]
    domains = None if encoding.domains is None else list(encoding.domains.texts())
    return {
        "dense": [f.name for f in features.continuous],
        "categorical": single,
        "lists": lists,
        "separator": encoding.separator,
        "vectors": [{"column": f.name, "size": f.size} for f in features.vectors],
        "domain": None if encoding.domain is None else {"column": encoding.domain, "values": domains},
        "timestamps": dict(encoding.timestamps),
        "texts": {name: dataclasses.asdict(text) for name, text in encoding.texts.items()},
    }


def state_of_columns(described: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of an encoding from what ``described_columns`` says of it.

    Args:
        described: its return value.
        features: the columns as plain values.
    """
    import pyarrow as pa

    def vocabulary(values: list[str]) -> dict[str, Tensor]:
        return Vocabulary.of(pa.array(values, pa.string())).state()

    known = from_plain(features, Features, "features")
    own = {f.name for f in known.categorical} | {s.name for s in known.sequences if s.items is None}
    columns = [*described["categorical"], *described["lists"]]
    domain = described["domain"]
    return {
        "features": dataclasses.asdict(known),
        "vocabularies": {
            one["column"]: vocabulary(one["values"])
            for one in columns
            if one["values"] is not None and one["column"] in own
        },
        "domain": None if domain is None else domain["column"],
        "domains": None if domain is None else vocabulary(domain["values"]),
        "separator": described["separator"],
        "profiles": {},  # drift is looked for with the checkpoint
        "timestamps": described["timestamps"],
        "texts": dict(described["texts"]),
    }


def described_tasks(model: MultiTaskRecommender) -> list[dict[str, Any]]:
    """Return each task's name and kind, how many outputs it has, and their meaning."""
    tasks = zip(model.features.tasks, model.features.target_of_task, model.outputs.kinds, strict=True)
    return [
        {
            "name": name,
            "kind": target.kind,
            "loss": target.loss,
            "outputs": kind.width,
            "mean": target.mean,
            "std": target.std,
            "levels": list(target.levels),
            "classes": list(target.classes),
            "shares": list(target.shares),
            "least": target.least,
            "most": target.most,
            "log_mean": target.log_mean,
            "log_std": target.log_std,
        }
        for name, target, kind in tasks
    ]
