"""Rows of TorchRec's tables over the processes of a run: which optimizers step them, and how whole tables get there."""

from __future__ import annotations

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor

OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
}
"""The optimizers that step rows inside the backward, by name; "adam" on GPUs alone."""


def is_split(value: Any) -> bool:
    """Tell whether a value of a state dict is spread over the processes."""
    return hasattr(value, "local_shards")


@torch.no_grad()
def copy_rows(target: Any, full: Tensor) -> None:
    """Copy the part of the whole table ``full`` that this process holds of ``target``, a value of a state dict."""
    if not is_split(target):
        target.copy_(full)
        return
    for part in target.local_shards():
        (row, column), (rows, columns) = part.metadata.shard_offsets, part.metadata.shard_sizes
        part.tensor.copy_(full[row : row + rows, column : column + columns])
