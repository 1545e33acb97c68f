"""The outputs of the tasks, and means over labeled rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apps.recsys.encoding.features import Features
from apps.recsys.kinds import Outputs


@dataclasses.dataclass(frozen=True)
class TaskOutputs:
    """The outputs of the tasks.

    Attributes:
        outputs: the positions of each task's outputs.
        z: (B, Z), or (M, B, Z) of an ensemble.
        label_Bt: labels; NaN for none.
        weight_Bt: weights of the labels; None: 1.
    """

    outputs: Outputs
    z: Tensor
    label_Bt: Tensor
    weight_Bt: Tensor | None = None

    def divergence(self, teacher: TaskOutputs, temperature: float) -> Tensor:
        """Return the sum over the tasks of the divergence from the teacher's prediction, its mean over the examples
        that have a label of the task. Each member of an ensemble learns the teacher's mean prediction."""
        given_BZ = teacher.z if teacher.z.ndim == 2 else self.outputs.mean(teacher.z)
        value = self.outputs.divergences(self.z, given_BZ, temperature)
        return labeled_mean(value, self.label_Bt, self.weight_Bt).sum()


def values_by_task(
    tasks: Sequence[str], outputs: Outputs, z_NZ: Tensor, label_Nt: np.ndarray
) -> dict[str, tuple[str, np.ndarray]]:
    """Return, by task, the name of its main metric and values (N,) whose mean it is."""
    parts = zip(tasks, outputs.kinds, outputs.split(z_NZ), label_Nt.T, strict=True)
    return {task: (k.main_metric, k.example_values(own.numpy(), y_N)) for task, k, own, y_N in parts}


def labeled_mean(value: Tensor, label_Bt: Tensor, weight_Bt: Tensor | None = None) -> Tensor:
    """Return the mean of (B, t) or (M, B, t) values over the labeled examples of each task, (t,); 0 without any.

    Weights have mean 1 over the training rows, and the sum is divided by the number of examples: a batch of heavy rows
    counts for more than one of light rows, and a pass over all rows weighs each as it should.
    """
    has_Bt = label_Bt == label_Bt
    value = torch.where(has_Bt, value if weight_Bt is None else weight_Bt * value, 0.0)
    if value.ndim == 3:
        value = value.mean(0)
    return value.sum(0) / has_Bt.sum(0).clamp_min(1)


def difference(in_model: Features, in_data: Features) -> str:
    """Say where two descriptions differ first."""
    pairs = ((f.name, getattr(in_model, f.name), getattr(in_data, f.name)) for f in dataclasses.fields(Features))
    name, a, b = next(pair for pair in pairs if pair[1] != pair[2])
    if isinstance(a, tuple) and len(a) == len(b):
        a, b = next((x, y) for x, y in zip(a, b, strict=True) if x != y)
    return f"{name} is {str(a)[:80]} in the model and {str(b)[:80]} in the data"
