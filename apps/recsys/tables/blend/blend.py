"""A trained blend: its trees and weights, and their files beside a checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apps.base.files import replacing
from apps.recsys.encoding.features import Features
from apps.recsys.kinds import Outputs, kind_of
from apps.recsys.tables.blend.text import booster_of
from apps.recsys.tables.estimators.boosting import FrequentValues
from apps.recsys.tables.estimators.libraries import Boosted, LibraryColumns, LightGBM
from apps.recsys.tables.rows.arrays import TableArrays, join
from apps.recsys.tables.rows.batch import TableBatch

ENDING = ".trees.txt"
"""Ending of the file of a task's trees, which is in LightGBM's own text format."""

KEY = "blend"
"""The entry of a checkpoint that names the files, with their digests, and has the weights."""


@dataclass(frozen=True)
class Blend:
    """The prediction of a task is ``weight`` times the network's plus ``1 - weight`` times the trees'.

    Attributes:
        features: the columns and tasks.
        several: the values of multi-valued columns that the trees read.
        weights: the network's weight of each task; 1: the task has no trees.
        texts: the trees of the other tasks, in LightGBM's text format.
        stem: first word of the names of their files: the checkpoint's name.
    """

    features: Features
    several: FrequentValues
    weights: Mapping[str, float]
    texts: Mapping[str, str]
    stem: str

    @cached_property
    def columns(self) -> LibraryColumns:
        return LibraryColumns.of_features(self.features, self.several)

    @cached_property
    def trees(self) -> dict[str, Boosted]:
        """The trees by task.

        Raises:
            ValueError: a text is none of trees for these columns and this task.
        """
        width, library, made = self.columns.width(self.features), LightGBM(), {}
        for task, target in zip(self.features.tasks, self.features.target_of_task, strict=True):
            if task in self.texts:
                kind = kind_of(target)
                try:
                    made[task] = Boosted(kind, booster_of(self.texts[task], width, library.trees_per_round(kind)), -1)
                except ValueError as error:
                    raise ValueError(f"{self.file(task)} is none of the model's trees: {error}") from error
        return made

    def mixed(self, outputs: Outputs, z_BZ: Tensor, batch: TableBatch) -> Tensor:
        """Return the blend's outputs, float32 (B, Z), of the network's, on the network's device."""
        own, tasks = outputs.split(z_BZ.double().cpu()), self.features.tasks
        x_BD = self.columns.of(in_order(batch, self.features))
        parts = [
            kind.blended(z_Bw, _outputs(self.trees[task], x_BD), self.weights[task]) if task in self.texts else z_Bw
            for task, kind, z_Bw in zip(tasks, outputs.kinds, own, strict=True)
        ]
        return torch.cat(parts, dim=-1).float().to(z_BZ.device)

    def signature(self, task: str) -> str:
        """Return the shares of network and trees in a task's prediction, in words."""
        weight = self.weights[task]
        rounds = self.trees[task].model.current_iteration() if task in self.texts else 0
        return f"{weight:.2f} network + {1 - weight:.2f} trees ({rounds} rounds)" if rounds else "the network by itself"

    # ---- files

    def file(self, task: str) -> str:
        """Return the name of the file with a task's trees."""
        return f"{self.stem}.{self.features.tasks.index(task)}{ENDING}"

    def write(self, folder: Path) -> None:
        """Write a file for each task's trees into the checkpoint's folder, whole or not at all."""
        for task, text in self.texts.items():
            with replacing(folder / self.file(task), "wb") as file:
                file.write(text.encode())

    def record(self) -> dict[str, Any]:
        """Return the entry ``KEY`` of the checkpoint: plain values and tensors."""
        contents = {task: text.encode() for task, text in self.texts.items()}
        return {
            "stem": self.stem,
            "weights": dict(self.weights),
            "several": {name: torch.from_numpy(values) for name, values in self.several.by_column.items()},
            "files": {task: [len(own), hashlib.sha256(own).hexdigest()] for task, own in contents.items()},
        }

    @classmethod
    def read(cls, record: Any, checkpoint: Path, features: Features) -> Blend:
        """Return the blend of a checkpoint's entry ``KEY``, whose files lie beside the checkpoint, or in its folder.

        Raises:
            ValueError: a file is missing or is not the one that was written; or the entry or a file is damaged.
        """
        try:
            weights = {task: float(record["weights"][task]) for task in features.tasks}
            by_column = {f.name: record["several"][f.name].numpy() for f in features.several}
            sizes = {task: (int(size), str(digest)) for task, (size, digest) in record["files"].items()}
            stem = record["stem"]
            if Path(stem).name != stem or not sizes.keys() <= weights.keys():
                raise ValueError(stem)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{checkpoint} is damaged: its entry {KEY!r} is none of a blend") from error
        several = FrequentValues({f.name: f.num_rows for f in features.several}, by_column)
        blend = cls(features, several, weights, dict.fromkeys(sizes, ""), stem)
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        texts = {task: _text(folder / blend.file(task), *known, checkpoint) for task, known in sizes.items()}
        blend = dataclasses.replace(blend, texts=texts)
        blend.trees  # noqa: B018 - a damaged file is found here
        return blend


def in_order(batch: TableBatch, features: Features) -> TableArrays:
    """Return a batch's rows as arrays, in the batch's order."""
    return join([dataclasses.replace(batch, index_B=torch.arange(len(batch)))], features)


def _outputs(trees: Boosted, x_BD: np.ndarray) -> Tensor:
    """Return the outputs of trees, float64 (B, width)."""
    return torch.from_numpy(np.asarray(trees.decision(x_BD), dtype=np.float64).reshape(len(x_BD), -1))


def _text(path: Path, size: int, digest: str, checkpoint: Path) -> str:
    """Return the content of a file, which the checkpoint knows."""
    if not path.is_file():
        raise ValueError(f"{path} is missing: {checkpoint} needs the trees in it, so copy them together")
    if path.stat().st_size != size or hashlib.sha256(content := path.read_bytes()).hexdigest() != digest:
        raise ValueError(f"{path} has other trees than those that were trained with {checkpoint}, or is damaged")
    return content.decode()
