"""Training on a part of the negative rows, resampled each epoch, with losses whose predictions stay calibrated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.base.checks import check_name
from apps.recsys.schema import NegativesConfig
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.rows import TableRows


class SampledRows(Dataset[TableBatch]):
    """Rows of a training split as they train where an epoch has a part of the negatives.

    Args:
        rows: all rows of the split.
        config: the rule.

    Attributes:
        task: name of the task.
        negatives, others: int64, positions of the negative rows and of all others in ``rows``.
        num_kept: negative rows of an epoch.

    Raises:
        ValueError: the task is missing or not of yes and no, or several tasks and none is named.
    """

    def __init__(self, rows: TableRows, config: NegativesConfig) -> None:
        features = rows.features
        if config.task is None and len(features.tasks) > 1:
            raise ValueError(f"negatives.task=None: name one of the tasks {', '.join(features.tasks)}")
        self.task = config.task or features.tasks[0]
        check_name("negatives.task", self.task, features.tasks)
        t = features.tasks.index(self.task)
        if (kind := features.target_of_task[t].kind) != "binary":
            raise ValueError(f"negatives.task={self.task!r} is of kind {kind!r}, which has no negative rows")
        self.rows, self.config = rows, config
        label_Nt = rows.columns["label"].index_select(0, rows.index)
        is_negative_N = label_Nt[:, t] == 0
        self.negatives, self.others = is_negative_N.nonzero()[:, 0], (~is_negative_N).nonzero()[:, 0]
        num_positives = int((label_Nt[:, t] == 1).sum())
        self.num_kept = min(max(round(config.per_positive * num_positives), 1), len(self.negatives))
        share = self.num_kept / len(self.negatives)
        self._t, self._offset_t, self._weight_2t = t, torch.zeros(label_Nt.shape[1]), torch.ones(2, label_Nt.shape[1])
        if config.correct:
            self._offset_t[t] = -math.log(share)
            has_Nt = ~label_Nt.isnan()
            of_negatives_t, of_others_t = has_Nt[self.negatives].sum(0), has_Nt[self.others].sum(0)
            # The mean weight of a task's labeled rows is 1, as that of all weights of rows.
            mean_t = (of_others_t + of_negatives_t) / (of_others_t + share * of_negatives_t)
            self._weight_2t = torch.stack((1 / mean_t, 1 / (share * mean_t)))
            self._weight_2t[:, t] = 1.0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TableBatch:
        batch = self.rows.__getitems__(positions)
        if not self.config.correct:
            return batch
        weight_Bt = self._weight_2t[(batch.label_Bt[:, self._t] == 0).long()]
        if batch.weight_Bt is not None:
            weight_Bt = weight_Bt * batch.weight_Bt
        return replace(batch, weight_Bt=weight_Bt, offset_Bt=self._offset_t.expand(len(batch), -1))

    @property
    def num_in_epoch(self) -> int:
        """The number of rows of an epoch."""
        return len(self.others) + self.num_kept

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Return the positions of an epoch's rows, int64, not yet in a random order."""
        kept = self.negatives[torch.randperm(len(self.negatives), generator=generator)[: self.num_kept]]
        return torch.cat((self.others, kept))

    def __str__(self) -> str:
        words = f"negatives of task {self.task}: {self.num_kept:,} of {len(self.negatives):,} train in an epoch"
        return words if self.num_kept < len(self.negatives) else f"{words}, all that there are"


class RowsOfEpoch(Protocol):
    """Rows of which each epoch has others, sampled by a generator."""

    @property
    def num_in_epoch(self) -> int:
        """The number of rows of an epoch, the same in every epoch."""

    def epoch(self, generator: torch.Generator) -> Tensor:
        """Return the positions of an epoch's rows, int64, not yet in a random order."""


class SampledPlan:
    """The batches of each epoch of such rows as ``SampledRows``; see ``apps.data.loader.BatchPlan``.

    Processes take the batches in turn, and the batches of a step have one size: some rows are repeated until each
    process has as many.

    Args:
        rows: the rows.
        batch_size: rows of a batch.
        drop_last: leave out the last batch of each process if it is not full.
        num_processes: processes that take the batches.

    Raises:
        ValueError: no full batch with ``drop_last``.
    """

    def __init__(self, rows: RowsOfEpoch, batch_size: int, drop_last: bool, num_processes: int = 1) -> None:
        self.rows, self.batch_size, self.num_processes = rows, batch_size, num_processes
        num_rows = rows.num_in_epoch
        self.num_each = -(-num_rows // num_processes)
        self.num_steps = self.num_each // batch_size if drop_last else -(-self.num_each // batch_size)
        if not self.num_steps:
            raise ValueError(
                f"batch_size={batch_size} exceeds the {num_rows} rows of an epoch; drop_last drops them all"
            )

    def __len__(self) -> int:
        return self.num_steps * self.num_processes

    def batches(self, seed: int, epoch: int) -> Sequence[Tensor]:
        """Return each batch's positions in the rows, int64."""
        (drawn,) = np.random.SeedSequence([seed, epoch]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(drawn >> np.uint64(1)))
        positions = self.rows.epoch(generator)
        positions = positions[torch.randperm(len(positions), generator=generator)]
        total = self.num_each * self.num_processes
        positions = positions.repeat(-(-total // len(positions)))[:total]
        by_process = [positions[p :: self.num_processes].split(self.batch_size) for p in range(self.num_processes)]
        return [own[step] for step in range(self.num_steps) for own in by_process]
