"""A trained model as a file, and the loss of a student of it, by the command line's way in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apps.train.step.distilling import Teacher
from apps.train.step.module import SparseModule


def saved(module: SparseModule, path: Path) -> str:
    """Write a model as a checkpoint of a training has it, and return the path."""
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, path)
    return str(path)


def divergence(student: SparseModule, teacher: SparseModule, batch: Any, temperature: float) -> torch.Tensor:
    """Return KL(teacher || student) of a batch as a training has it: the student in training, the teacher not."""
    out = student.train().task_loss(batch)
    assert out.distribution is not None
    with torch.no_grad():
        return out.distribution.divergence(teacher.eval().distribution(batch), temperature)


def kl(teacher_logits: torch.Tensor, student_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the mean over the rows of ``sum p log(p / q)``, row by row."""
    rows = []
    for given, own in zip(teacher_logits.double() / temperature, student_logits.double() / temperature, strict=True):
        p, q = given.exp() / given.exp().sum(), own.exp() / own.exp().sum()
        rows.append(sum(p[c] * (p[c] / q[c]).log() for c in range(len(p))))
    return torch.stack(rows).mean()


def taught(student: SparseModule) -> SparseModule:
    """Give a student its teacher, as the set-up of a training does."""
    assert student.distil is not None
    student._teacher = Teacher(student, student.distil)
    return student
